"""The networks that embed: folded, OpenVINO and cast for a GPU, each against the plain one."""

import sys
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embed_lab import BF16, trained_like

from reid import ReidError
from reid.checkpoint import save_checkpoint
from reid.files import load, save
from reid.folded import FoldedDenseNet
from reid.model import cast_network, plain_network
from reid.retrieval import extract
from reid.retrieval.extract import Extractor

DTYPES = [torch.float32, *([torch.bfloat16] if BF16 else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [{"height": 64, "width": 32}, {"height": 97, "width": 45}, {"height": 34, "width": 33}])
def test_folded_equals_plain(config, dtype):
    model = trained_like(**config)
    pixels = torch.randint(0, 256, (3, 3, config["height"], config["width"]), dtype=torch.uint8)
    expected, found = model.features(pixels), FoldedDenseNet(model, dtype)(pixels)
    assert found.dtype == torch.float32
    assert 1 - F.cosine_similarity(found, expected).min() < (1e-6 if dtype == torch.float32 else 2e-3)
    assert (found.norm(dim=1) / expected.norm(dim=1) - 1).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_without_the_operators_of_the_folded_network_the_plain_one_embeds(checkpoint, extractor, crops, monkeypatch, fault):
    """Another version of PyTorch may lack a private operator, or compute something else with it."""
    expected = extractor.embed(crops)
    linear = torch.ops.mkldnn._linear_pointwise

    class Operators:
        def __getattr__(self, name):
            if fault == "missing":
                raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute '{name}'")
            if name == "_linear_pointwise":
                return lambda x, weight, bias, *others: linear(x, weight, bias + 1, *others)
            return getattr(mkldnn, name)

    mkldnn = torch.ops.mkldnn
    monkeypatch.setattr(torch.ops, "mkldnn", Operators())
    other = Extractor(checkpoint, "cpu", "fp32")
    assert not isinstance(other._features, FoldedDenseNet)
    torch.testing.assert_close(other.embed(crops), expected, atol=1e-5, rtol=0)


def test_folded_default_model(root):
    """On the default model, and on drawn shapes rather than noise, bf16 costs less than 2e-4 of cosine."""
    extractor = Extractor(root / "models/masked-hog-908/best.pth", "cpu", "bf16" if BF16 else "fp32", mirror=False)
    blobs = F.interpolate(torch.rand(4, 3, 8, 4, generator=torch.Generator().manual_seed(0)), extractor.size, mode="bicubic")
    pixels = (255 * blobs.clamp(0, 1)).to(torch.uint8)
    assert (extractor.embed(pixels) * extractor._model(pixels)).sum(1).min() > 0.9998


def test_openvino_gives_the_same_and_keeps_what_it_compiled(checkpoint, extractor, crops, monkeypatch):
    pytest.importorskip("openvino")
    from reid.extras.openvino import OpenVinoNetwork

    checks, check = [], OpenVinoNetwork._check
    monkeypatch.setattr(OpenVinoNetwork, "_check", lambda self: checks.append(1) or check(self))
    kept = checkpoint.with_name("best.fp32.openvino")
    expected = extractor.embed(crops)
    for start in ("new", "kept", "damaged", "of another model", "of another program", "read-only"):
        if start == "damaged":
            kept.write_bytes(kept.read_bytes()[:-100])
        if start == "of another model":
            record = load(kept, "reid-openvino", 1)
            save(kept, record | {"key": "0" * 16 + record["key"][16:], "blob": record["blob"][:100].clone()}, "reid-openvino", 1)
        if start == "of another program":
            kept.write_text("mine")
        if start == "read-only":
            assert kept.read_text() == "mine"
            kept.unlink()
            monkeypatch.setattr("reid.files.atomic_path", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
        other = Extractor(checkpoint, precision="fp32", network=OpenVinoNetwork)
        torch.testing.assert_close(other.embed(crops), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(other.embed(crops[:1]), expected[:1], atol=1e-4, rtol=0)
        assert kept.exists() == (start != "read-only")
        assert start != "of another model" or load(kept, "reid-openvino", 1)["key"] == record["key"]
    assert len(checks) == 5 and "openvino" in other.describe()
    monkeypatch.setattr("reid.extras.openvino.PARITY", 1.1)
    with pytest.raises(ReidError, match="differs from PyTorch"):
        Extractor(checkpoint, precision="fp32", network=OpenVinoNetwork)


def test_choice_of_engine(checkpoint, monkeypatch):
    from reid.extras.openvino import OpenVinoNetwork, engine_of

    def choose(engine, device="cpu"):
        return engine_of(Namespace(engine=engine, device=device))

    assert choose("torch") is None and choose("openvino") is OpenVinoNetwork
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose("auto") is None  # not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "a spec")
    monkeypatch.setitem(sys.modules, "openvino", None)  # installed, but it cannot be imported
    assert Extractor(checkpoint, "cpu", network=choose("auto")).engine == "torch"
    with pytest.raises(ReidError, match=r"--engine openvino needs its package: pip install -e '\.\[openvino\]'"):
        Extractor(checkpoint, "cpu", network=choose("openvino"))
    monkeypatch.setattr(extract.torch.cuda, "is_available", lambda: True)
    assert choose("auto", "auto") is None  # a GPU


def test_ctrl_c_while_openvino_is_imported_is_no_reason_for_another_engine(monkeypatch):
    """Extension modules raise ImportError from KeyboardInterrupt."""
    from reid.extras import openvino

    def interrupted(*network):
        try:
            raise ImportError("initialization failed") from KeyboardInterrupt()
        except ImportError as error:
            raise ReidError("needs its package") from error

    monkeypatch.setattr("importlib.util.find_spec", lambda name: "a spec")
    monkeypatch.setattr(openvino, "OpenVinoNetwork", interrupted)
    with pytest.raises(KeyboardInterrupt):
        openvino.engine_of(Namespace(engine="auto", device="cpu"))()


@pytest.mark.parametrize("streams", [2, 1])
def test_first_calls_at_once_are_made_one_after_the_other(streams):
    """OpenVINO sets up its use of NumPy in the first call of a request; two of them at once can wait for each other forever."""
    pytest.importorskip("openvino")
    from reid.extras.openvino import CompiledGraph

    at_once, most, met = [], [], threading.Event()

    class Request:
        first = True

        def infer(self, inputs):
            at_once.append(1)
            most.extend([len(at_once)] * self.first)
            if self.first:
                met.wait(0.05)  # for the other thread, which must not come
            self.first = False
            at_once.pop()
            return [np.zeros((len(inputs[0]), 4), np.float32)]

    graph = CompiledGraph("--engine openvino", "fp32", 2)
    graph._compiled[streams] = Namespace(create_infer_request=Request)
    both = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: both.wait() + len(graph(torch.zeros(streams * 2 - 1, 3, 8, 4, dtype=torch.uint8))), range(2)))
    assert most == [1, 1]


def test_another_engine_is_given(checkpoint, extractor, crops):
    """The Extractor calls whatever `network` returns, and PyTorch where it returns None."""
    calls = []

    def network(model, precision, workers, path, fingerprint):
        calls.append((precision, path, fingerprint))
        return lambda views: model.features(views)

    other = Extractor(checkpoint, precision="fp32", network=network)
    assert calls == [("fp32", checkpoint, other.fingerprint)] and other.device.type == "cpu"
    expected = extractor.embed(crops)
    torch.testing.assert_close(other.embed(crops), expected, atol=1e-5, rtol=0)
    assert torch.equal(Extractor(checkpoint, precision="fp32", network=lambda *_: None).embed(crops), expected)


def test_resnet50(tmp_path, crops):
    pytest.importorskip("torchvision")
    save_checkpoint(tmp_path / "best.pth", trained_like("resnet50", height=64, width=32), {}, {})
    extractor = Extractor(tmp_path / "best.pth", "cpu", "fp32")
    assert extractor.embed(crops).shape == (7, 2048)
    pytest.importorskip("openvino")
    from reid.extras.openvino import OpenVinoNetwork, engine_of

    with pytest.raises(ReidError, match="not made for resnet50"):
        Extractor(tmp_path / "best.pth", network=OpenVinoNetwork)
    assert Extractor(tmp_path / "best.pth", network=engine_of(Namespace(engine="auto", device="cpu"))).engine == "torch"


@pytest.mark.parametrize("backbone", ["densenet121", "resnet50"])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 5e-3)])
def test_network_for_a_gpu_equals_the_plain_one(backbone, dtype, error):
    model = trained_like(backbone, height=64, width=32)
    pixels = torch.randint(256, (2, 3, 64, 32), dtype=torch.uint8)
    expected, network = plain_network(model, torch.float32)(pixels), cast_network(model, dtype)
    assert (network(pixels) - expected).norm() < error * expected.norm()
