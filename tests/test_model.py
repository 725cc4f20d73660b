"""The network's configuration, and weights of what earlier versions could build."""

import pytest

from reid import ReidError
from reid.model import REMOVED, build_model, check_config, default_config

CONFIG = default_config([1, 2, 3], height=64, width=32)


def test_configurations_of_older_checkpoints():
    check_config(CONFIG | REMOVED)
    check_config(CONFIG | {"last_stride": 1, "pool": "avg"})  # before there was IBN


@pytest.mark.parametrize("removed", [{"ibn": True}, {"pool": "gem"}, {"last_stride": 2}])
def test_networks_that_can_no_longer_be_built_are_refused(removed):
    with pytest.raises(ReidError, match=f"{next(iter(removed))} .*no such network"):
        build_model(CONFIG | removed)
