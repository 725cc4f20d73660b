"""A network of another origin: the same embeddings as PyTorch's, every kind of input, and what cannot be used."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from forked import Script
from torch import nn

from reid import ReidError, images
from reid.images import MEAN, STD

openvino, onnx = pytest.importorskip("openvino"), pytest.importorskip("onnx")
from reid.extras.network import NetworkExtractor, network_fingerprint  # noqa: E402

SIZE = (32, 16)


class Tiny(nn.Module):
    """Two convolutions and a pooling; `outputs` embeddings; flat: with the batch size written into its layers."""

    def __init__(self, outputs=1, flat=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.AdaptiveAvgPool2d(1))
        self.outputs, self.flat = outputs, flat

    def forward(self, x):
        x = self.body(x)
        x = x.reshape(1, 12) if self.flat else x.flatten(1)
        return x if self.outputs == 1 else (x,) * self.outputs


def write_onnx(path, network, batch=1, axes=None):
    network.eval()
    torch.onnx.export(network, (torch.zeros(batch, 3, *SIZE),), str(path), input_names=["x"], dynamo=False, opset_version=17,
                      dynamic_axes=axes)
    return path


def write_ir(path, source):
    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=False)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The path of a network with a batch of one, and the module."""
    module = Tiny()
    return write_onnx(tmp_path_factory.mktemp("network") / "tiny-peer.onnx", module), module


@pytest.fixture
def files(people):
    return sorted((people / "query").rglob("*.*"))[:7]


def expected(module, files, pixels, mirror=True):
    """Embeddings by PyTorch, from the pixels that our own networks get."""
    batch = images.resize([images.decode(file) for file in files], SIZE).float()
    if pixels == "bgr255":
        batch = batch.flip(1)
    if pixels == "imagenet":
        batch = (batch / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        return F.normalize(module(batch) + module(batch.flip(3)) if mirror else module(batch))


@pytest.mark.parametrize("pixels", ["bgr255", "rgb255", "imagenet"])
@pytest.mark.parametrize("mirror", [True, False])
def test_embeddings_equal_pytorch(network, files, pixels, mirror):
    path, module = network
    extractor = NetworkExtractor(path, pixels, mirror=mirror)
    assert (extractor.dim, extractor.size, extractor.precision) == (12, SIZE, "fp32")
    torch.testing.assert_close(extractor.embed(files), expected(module, files, pixels, mirror), atol=1e-5, rtol=0)
    assert "tiny-peer 32x16 on cpu" in extractor.describe() and ("mirrored" in extractor.describe()) == mirror


def test_the_order_of_channels_matters(network, files):
    path, _ = network
    rgb, bgr = (NetworkExtractor(path, pixels).embed(files) for pixels in ("rgb255", "bgr255"))
    assert (rgb * bgr).sum(1).max() < 0.9999
    swapped = [images.decode(file).flip(0) for file in files]
    torch.testing.assert_close(NetworkExtractor(path, "rgb255").embed(swapped), bgr, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["fixed", "variable", "written into its layers", "any size", "xml", "half"])
def test_every_kind_of_file(network, files, tmp_path, kind):
    path, module = network
    if kind == "variable":
        path = write_onnx(tmp_path / "n.onnx", module, 2, {"x": {0: "batch"}})
    elif kind == "written into its layers":
        path = write_onnx(tmp_path / "n.onnx", Tiny(flat=True))
    elif kind == "xml":
        path = write_ir(tmp_path / "n.xml", path)
    elif kind == "half":
        graph = openvino.convert_model(path)
        openvino.save_model(graph, tmp_path / "n.xml", compress_to_fp16=True)
        path = tmp_path / "n.xml"
    elif kind == "any size":
        path = write_onnx(tmp_path / "n.onnx", module, 2, {"x": {0: "batch", 2: "height", 3: "width"}})
        assert NetworkExtractor(path, "imagenet").size == (256, 128)
        return
    found, wanted = NetworkExtractor(path, "imagenet").embed(files), expected(module, files, "imagenet")
    assert (found * wanted).sum(1).min() > (0.9999 if kind == "half" else 0.999999)


def test_fingerprint_is_of_the_files_and_the_input(network, tmp_path):
    path = write_ir(tmp_path / "n.xml", network[0])
    first = network_fingerprint(path, "rgb255")
    assert len(first) == 16 and first == network_fingerprint(path, "rgb255") != network_fingerprint(path, "bgr255")
    weights = path.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert network_fingerprint(path, "rgb255") != first


def test_weights_in_a_file_of_any_name_are_in_the_fingerprint(network, files, tmp_path):
    onnx = pytest.importorskip("onnx")
    path, weights = tmp_path / "n.onnx", tmp_path / "some weights.dat"
    onnx.save(onnx.load(network[0]), path, save_as_external_data=True, location=weights.name, size_threshold=0)
    first, wanted = network_fingerprint(path, "imagenet"), expected(network[1], files, "imagenet")
    torch.testing.assert_close(NetworkExtractor(path, "imagenet").embed(files), wanted, atol=1e-5, rtol=0)
    weights.write_bytes(b"\1" + weights.read_bytes()[1:])
    assert network_fingerprint(path, "imagenet") != first
    weights.unlink()
    with pytest.raises(ReidError, match=r"no such file as .*some weights\.dat, which holds its weights"):
        network_fingerprint(path, "imagenet")


@pytest.mark.parametrize("fault, message", [
    ("missing", r"no such file$"), ("bin", r"no such file as .*n\.bin, which holds its weights$"),
    ("pth", r"give an OpenVINO network \(\.xml"), ("text", r"OpenVINO cannot read it \(.+\); give"),
    ("two outputs", r"it has 1 inputs and 2 outputs; give a network with one input \[N, 3, H, W\] and one output \[N, D\]"),
    ("map", r"its output is \[2,8,15,7\]"), ("grey", r"its input is \[.*1,32,16\]")])
def test_what_cannot_be_used(network, tmp_path, fault, message):
    path = tmp_path / "n.onnx"
    if fault == "bin":
        path = write_ir(tmp_path / "n.xml", network[0])
        path.with_suffix(".bin").unlink()
    elif fault == "pth":
        path = tmp_path / "best.pth"
    elif fault == "text":
        path.write_text("no network")
    elif fault == "two outputs":
        write_onnx(path, Tiny(2))
    elif fault == "map":
        write_onnx(path, nn.Conv2d(3, 8, 3, 2))
    elif fault == "grey":
        torch.onnx.export(nn.Flatten(), (torch.zeros(1, 1, *SIZE),), str(path), dynamo=False)
    with pytest.raises(ReidError, match=message) as error:
        NetworkExtractor(path, "rgb255")
    assert str(error.value).startswith(f"--network {path}: ") and "\n" not in str(error.value)


def test_without_openvino_and_on_a_gpu(network, monkeypatch):
    with pytest.raises(ReidError, match="--device cuda: --network computes on a CPU"):
        NetworkExtractor(network[0], "rgb255", device="cuda")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ReidError, match=r"--network needs its package: pip install -e '\.\[openvino\]'"):
        NetworkExtractor(network[0], "rgb255")


def script(folder, name, *args):
    done = Script(folder, name, *args).wait()
    return done.status, done.out, done.err


def test_a_peer_is_evaluated_compared_and_searched(people, network, files, tmp_path):
    path, _ = network
    options = ["--network", path, "--network_input", "imagenet", "--data_root", people]
    status, out, err = script(tmp_path, "eval.py", *options, "--save_index", "--json", "out.json")
    assert status == 0 and "tiny-peer on " in out and "cross-domain" not in out, err
    saved = torch.load(tmp_path / "index" / "tiny-peer.pt", weights_only=True)
    assert saved["embeddings"].shape[1] == 12 and saved["fingerprint"] == network_fingerprint(path, "imagenet")
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["exp_name"] == "tiny-peer" and results["cross_domain"] is None
    figures = [line for line in out.splitlines() if line.startswith(("plain", "camera_norm", "TAR@FAR", "95 %"))]
    loaded = script(tmp_path, "eval.py", *options, "--load_index")[1].splitlines()
    assert len(figures) >= 4 and [line for line in loaded if line in figures] == figures
    status, _, err = script(tmp_path, "eval.py", *options, "--load_index", "--network_input", "rgb255")
    assert status == 1 and "made by other weights" in err and len(err.splitlines()) == 1
    (tmp_path / "index" / "other.pt").write_bytes((tmp_path / "index" / "tiny-peer.pt").read_bytes())
    assert "no clear difference" in script(tmp_path, "eval.py", "--compare", "tiny-peer", "other")[1]

    status, out, err = script(tmp_path, "inference.py", *options, "--load_index", "--query_paths", files[0], "--topk", 1)
    assert status == 0 and "tiny-peer 32x16" in out, err


@pytest.mark.parametrize("args, message", [
    (["--network", "n.onnx"], "needs --network_input"), (["--network_input", "rgb255"], "needs --network, "),
    (["--network", "n.onnx", "--network_input", "rgb255", "--engine", "torch"], "computed by OpenVINO"),
    (["--network", "n.onnx", "--network_input", "rgb255"], "no such file")])
def test_options_that_contradict(tmp_path, args, message):
    status, _, err = script(tmp_path, "eval.py", *args)
    assert status == 1 and message in err and len(err.splitlines()) == 1
