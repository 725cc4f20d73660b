"""The network: its configuration, precision and device, its embedding, and what earlier versions could build."""

import pytest
import torch
import torch.nn.functional as F

from reid import ReidError
from reid.model import REMOVED, build_model, check_config, default_config, pick_device, pick_precision, plain_network

CONFIG = default_config([1, 2, 3], height=64, width=32)


def test_configurations_of_older_checkpoints():
    check_config(CONFIG | REMOVED)
    check_config(CONFIG | {"last_stride": 1, "pool": "avg"})  # before there was IBN


@pytest.mark.parametrize("removed", [{"ibn": True}, {"pool": "gem"}, {"last_stride": 2}])
def test_networks_that_can_no_longer_be_built_are_refused(removed):
    with pytest.raises(ReidError, match=f"{next(iter(removed))} .*no such network"):
        build_model(CONFIG | removed)


def test_precision_of_a_device(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for fast, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert pick_precision(cpu) == name
    for fast, name in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, fast=fast: fast)
        assert pick_precision(gpu) == name
    assert pick_precision(gpu, "fp32") == pick_precision(cpu, "fp32") == "fp32" and pick_precision(gpu, "fp16") == "fp16"
    for name, message in (("fp16", "needs a GPU"), ("int8", "use auto, fp32, bf16, fp16")):
        with pytest.raises(ReidError, match=message):
            pick_precision(cpu, name)


def test_a_device_that_is_not_there():
    assert pick_device("cpu").type == "cpu"
    for name in ("cuda:99", "toaster"):
        with pytest.raises(ReidError, match=f"^--device {name} is not available here; use auto, cpu, cuda or cuda:<number>$"):
            pick_device(name)


def test_the_embedding_is_the_normalised_output_of_the_neck():
    torch.manual_seed(0)
    model = build_model(CONFIG).eval()
    model.neck.running_mean.normal_(0, 0.1)
    images = torch.randint(256, (2, 3, 64, 32), dtype=torch.uint8)
    with torch.inference_mode():
        pooled = plain_network(model, torch.float32)(images)
        assert pooled.shape == (2, 1024) and torch.allclose(model(images), F.normalize(model.neck(pooled)), atol=1e-6)
        assert torch.allclose(model(images.float()), model(images))
    pooled, neck, logits = model.train()(images)
    assert pooled.shape == (2, 1024) and torch.allclose(neck, model.neck(pooled), atol=1e-4)
    assert torch.allclose(logits, model.classifier(neck), atol=1e-4)
