"""ONNX export: the same embeddings as PyTorch for images, in any batch, and no file where they differ."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from reid import ReidError
from reid.checkpoint import save_checkpoint
from reid.extras import onnx as export
from reid.extras.onnx import export_onnx
from reid.images import MEAN, PREPROCESSING, STD, decode, resize
from reid.model import build_model, default_config
from reid.retrieval.extract import Extractor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small-input DenseNet-121 with random weights, but a neck that matters."""
    torch.manual_seed(0)
    model = build_model(default_config([1, 2], height=64, width=32))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    path = tmp_path_factory.mktemp("run") / "best.pth"
    save_checkpoint(path, model, {}, {})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("crops"), np.random.default_rng(0)
    for i, (h, w) in enumerate([(128, 64), (64, 32), (90, 41), (128, 64)]):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("mirror", [True, False])
def test_onnx_equals_the_extractor(checkpoint, files, tmp_path, mirror):
    onnxruntime = pytest.importorskip("onnxruntime", reason="extra export is not installed")
    pytest.importorskip("onnx", reason="extra export is not installed")
    assert export_onnx(checkpoint, tmp_path / "best.onnx", files, mirror) >= 0.9999
    assert [p.name for p in tmp_path.iterdir()] == ["best.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "best.onnx")
    [image], [embedding] = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape[1:]) == ("images", "tensor(uint8)", [3, 64, 32])
    assert (embedding.name, embedding.type, embedding.shape[1:]) == ("embeddings", "tensor(float)", [1024])
    extractor = Extractor(checkpoint, "cpu", "fp32", mirror=mirror)
    assert session.get_modelmeta().custom_metadata_map["fingerprint"] == extractor.fingerprint
    for count in (1, 3):
        batch = resize([decode(file) for file in files[:count]], (64, 32))
        [found] = session.run(None, {"images": batch.numpy()})
        np.testing.assert_allclose(found, extractor.embed(files[:count]), atol=1e-5)
    if mirror:  # and the mirror image gives the same embedding
        np.testing.assert_allclose(session.run(None, {"images": batch.flip(3).numpy()})[0], found, atol=1e-5)


def test_float_input_for_trackers(checkpoint, files, tmp_path):
    """Crops as trackers prepare them: RGB, resized, 0..1 minus ImageNet's mean over its deviation."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
    pytest.importorskip("onnx", reason="pip install -e '.[export]'")
    assert export_onnx(checkpoint, tmp_path / "best.onnx", files, mirror=False, pixels="float") >= 0.9999
    session = onnxruntime.InferenceSession(tmp_path / "best.onnx")
    [image] = session.get_inputs()
    assert (image.name, image.type, image.shape[1:]) == ("images", "tensor(float)", [3, 64, 32])
    metadata = session.get_modelmeta().custom_metadata_map
    extractor = Extractor(checkpoint, "cpu", "fp32", mirror=False)
    assert metadata["fingerprint"] == extractor.fingerprint and metadata["preprocessing"] == PREPROCESSING
    assert metadata["mirror"] == "false" and metadata["input"].startswith("float32 RGB, (x / 255 - mean) / std with mean (0.485")
    crops = resize([decode(file) for file in files], (64, 32)).permute(0, 2, 3, 1).numpy() / np.float32(255)
    crops = ((crops - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2)
    [found] = session.run(None, {"images": crops})
    np.testing.assert_allclose(found, extractor.embed(files), atol=1e-5)


def test_an_export_that_differs_is_not_kept(checkpoint, files, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="extra export is not installed")
    pytest.importorskip("onnx", reason="extra export is not installed")
    output = tmp_path / "best.onnx"
    output.write_bytes(b"the old one")
    # a neck forgotten in the export
    monkeypatch.setattr(export.Embedder, "forward", lambda self, images: export.F.normalize(self.model.features(images)))
    with pytest.raises(ReidError, match="differ from PyTorch"):
        export_onnx(checkpoint, output, files, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["best.onnx"]
    assert output.read_bytes() == b"the old one"


def test_missing_package_is_one_line(checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ReidError, match=r"^--export onnx needs onnx: pip install -e '\.\[export\]'$"):
        export_onnx(checkpoint, tmp_path / "best.onnx", files)


def test_no_images(checkpoint, tmp_path):
    pytest.importorskip("onnxruntime", reason="extra export is not installed")
    pytest.importorskip("onnx", reason="extra export is not installed")
    with pytest.raises(ReidError, match="no images"):
        export_onnx(checkpoint, tmp_path / "best.onnx", [])
