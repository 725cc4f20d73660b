"""The backbone "tiny", a DenseNet of four layers, for tests in which the network does not matter.

Importing this module adds it to those of the package; every process of tests/forked.py has it, too.
"""

from functools import partial

from reid.model import BACKBONES, EMBEDDING_SIZES, DenseNet121, build_model, default_config

BACKBONES["tiny"] = partial(DenseNet121, blocks=(1, 1, 1, 1))
SIZE = EMBEDDING_SIZES["tiny"] = 68
SMALL = ["--backbone", "tiny", "--height", "64", "--width", "32", "--weights", "none", "--precision", "fp32"]  # of train.py


def tiny_config(classes=(1, 2)):
    return default_config(list(classes), "tiny", 64, 32)


def tiny_model(classes=(1, 2)):
    """Return a fresh network for images of 64 x 32."""
    return build_model(tiny_config(classes))
