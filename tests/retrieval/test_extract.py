"""Embeddings: the folded network against the plain one, every kind of input, bad images, threads, memory of a GPU."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reid import ReidError, images
from reid.checkpoint import save_checkpoint
from reid.folded import FoldedDenseNet
from reid.model import build_model, default_config
from reid.retrieval.extract import Extractor, in_order
from reid.retrieval.gpu_decode import plain_jpeg

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = [torch.float32, *([torch.bfloat16] if BF16 else [])]


def trained_like(backbone="densenet121", **config):
    """A network whose norms have seen something: scales of both signs, dead channels, channels that are always on."""
    torch.manual_seed(0)
    model = build_model(default_config([1, 2], backbone, **config)).eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.weight, 1, 0.5)
            torch.nn.init.normal_(norm.bias, 0, 0.3)
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.data[:3] = torch.tensor([0.0, 1e-14, 1e-6])
            norm.bias.data[:3] = torch.tensor([0.7, -0.7, 0.9])
    torch.nn.init.normal_(model.neck.weight, 1, 0.2)
    model.neck.running_mean.normal_(0, 0.1)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "best.pth"
    save_checkpoint(path, trained_like(height=64, width=32), {}, {})
    return path


@pytest.fixture
def crops(tmp_path):
    """Seven small files: sizes, formats and names of every kind."""
    rng = np.random.default_rng(0)
    names = ["0001_c1s1_000001_00.jpg", "b.png", "ü x.jpg", "0002_c2.jpg", "c.jpg", "d.jpg", "e.jpg"]
    for i, name in enumerate(names):
        shape = (40, 20, 3) if i % 3 else (64 + i, 32, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    return [tmp_path / name for name in names]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [{"height": 64, "width": 32}, {"height": 97, "width": 45}, {"height": 34, "width": 33}])
def test_folded_equals_plain(config, dtype, packed):
    model = trained_like(**config)
    pixels = torch.randint(0, 256, (3, 3, config["height"], config["width"]), dtype=torch.uint8)
    expected, found = model.features(pixels), FoldedDenseNet(model, dtype, packed)(pixels)
    assert found.dtype == torch.float32
    assert 1 - F.cosine_similarity(found, expected).min() < (1e-6 if dtype == torch.float32 else 2e-3)
    assert (found.norm(dim=1) / expected.norm(dim=1) - 1).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_folded_default_model(root):
    """On the weights people use, and on drawn shapes rather than noise, bf16 costs less than 2e-4 of cosine."""
    extractor = Extractor(root / "models/masked-hog-908/best.pth", "cpu", "bf16" if BF16 else "fp32", mirror=False)
    blobs = F.interpolate(torch.rand(4, 3, 8, 4, generator=torch.Generator().manual_seed(0)), (256, 128), mode="bicubic")
    pixels = (255 * blobs.clamp(0, 1)).to(torch.uint8)
    assert (extractor.embed(pixels) * extractor._model(pixels)).sum(1).min() > 0.9998


def test_order_batches_and_threads_do_not_matter(checkpoint, crops):
    """Six times the same files, shuffled, by workers and alone, in batches of every size."""
    files = crops * 6
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(1)).tolist()
    before = torch.get_num_threads()
    try:
        for precision in ("fp32", *(("bf16",) if BF16 else ())):
            single = torch.cat([Extractor(checkpoint, "cpu", precision).embed([file]) for file in crops]).repeat(6, 1)
            for threads, size in ((1, 1), (1, 5), (2, 4), (3, None)):
                torch.set_num_threads(threads)
                extractor = Extractor(checkpoint, "cpu", precision, batch_size=size)
                found = extractor.embed([files[i] for i in order])
                assert torch.get_num_threads() == threads
                cosine = (found.double() * single[order].double()).sum(1)
                assert (1 - cosine).abs().max() < (1e-6 if precision == "fp32" else 1e-3)
    finally:
        torch.set_num_threads(before)


def test_every_kind_of_input(checkpoint, crops, tmp_path):
    extractor = Extractor(checkpoint, "cpu", "fp32")
    pixels = [images.decode(file) for file in crops]
    expected = extractor.embed(crops)
    assert expected.shape == (7, 1024) and expected.dtype == torch.float32 and not expected.requires_grad
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(7))
    for same in (list(map(str, crops)), pixels, [image.permute(1, 2, 0).numpy() for image in pixels],
                 [Image.open(file) for file in crops], [file.read_bytes() for file in crops]):
        torch.testing.assert_close(extractor.embed(same), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(extractor.embed(images.resize(pixels, extractor.size)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(extractor.embed(tmp_path), extractor.embed(sorted(crops)), atol=1e-5, rtol=0)
    assert extractor.embed(crops[0]).shape == extractor.embed(Image.open(crops[0])).shape == (1, 1024)
    assert extractor.embed([]).shape == (0, 1024) and extractor.embed(crops[:1], dtype=torch.float16).dtype == torch.float16
    for wrong in (torch.rand(3, 8, 8), np.zeros((8, 8), np.uint8), torch.zeros(4, 8, 8, dtype=torch.uint8),
                  torch.zeros(3, 0, 8, dtype=torch.uint8)):
        with pytest.raises(ReidError, match="image of shape"):
            extractor.embed([wrong])


def test_mirror_is_the_sum_of_both_views(checkpoint, crops):
    pixels = images.resize([images.decode(file) for file in crops], (64, 32))
    model = Extractor(checkpoint, "cpu", "fp32")._model
    expected = F.normalize(model.neck(model.features(pixels)) + model.neck(model.features(pixels.flip(3))))
    torch.testing.assert_close(Extractor(checkpoint, "cpu", "fp32").embed(pixels), expected, atol=1e-5, rtol=0)
    plain = Extractor(checkpoint, "cpu", "fp32", mirror=False).embed(pixels)
    torch.testing.assert_close(plain, model(pixels), atol=1e-5, rtol=0)


def test_bad_images_are_left_out_or_stop(checkpoint, crops, tmp_path):
    extractor = Extractor(checkpoint, "cpu", "fp32", batch_size=2)
    (tmp_path / "broken.jpg").write_bytes(crops[0].read_bytes()[:90])
    files = [tmp_path / "missing.jpg", *crops, tmp_path / "broken.jpg"]
    embeddings, kept, bad = extractor.embed_records(files, progress=False)
    assert kept.tolist() == list(range(1, 8))
    torch.testing.assert_close(embeddings, extractor.embed(crops), atol=1e-5, rtol=0)
    assert [file for file, _ in bad] == [files[0], files[-1]]
    assert all(reason and str(tmp_path) not in reason for _, reason in bad)
    for strict in (lambda: extractor.embed(files), lambda: extractor.embed_records(files, strict=True, progress=False)):
        with pytest.raises(ReidError, match=r"missing\.jpg.*no such file"):
            strict()
    assert extractor.embed_records(files[:1], progress=False)[0].shape == (0, 1024)


def test_work_runs_only_a_little_ahead():
    """Whoever is slow to take results holds up the work, else 1 M images would wait in memory."""
    from concurrent.futures import ThreadPoolExecutor

    started = []
    with ThreadPoolExecutor(2) as pool:
        results = in_order(pool, lambda part: started.append(part) or part, iter(range(100)), 4)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        assert len(started) <= 8
        results.close()
    assert len(started) <= 8


def test_out_of_memory_halves_the_batch(checkpoint, crops):
    extractor = Extractor(checkpoint, "cpu", "fp32")
    pixels, sizes, embed = images.resize([images.decode(file) for file in crops], (64, 32)), [], extractor._embed
    expected = extractor.embed(pixels)

    def small_card(batch, network=None):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(batch)

    extractor._embed = small_card
    torch.testing.assert_close(extractor._fitting(pixels), expected, atol=1e-5, rtol=0)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1] and extractor._room == 1

    def no_card(batch, network=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    extractor._embed = no_card
    with pytest.raises(ReidError, match="single image"):
        extractor._fitting(pixels)


def test_only_whole_plain_jpegs_go_to_the_gpu_decoder(tmp_path):
    image = Image.fromarray(np.zeros((16, 8, 3), np.uint8))

    def encoded(picture=image, **options):
        picture.save(tmp_path / "x.jpg", **options)
        return (tmp_path / "x.jpg").read_bytes()

    plain = encoded()
    assert plain_jpeg(plain) and plain_jpeg(encoded(progressive=True)) and plain_jpeg(encoded(image.convert("L")))
    exif = Image.Exif()
    exif[0x0112] = 6
    for other in (encoded(image.convert("CMYK")), encoded(exif=exif), plain[:-20], plain[:30], b"", b"\xff\xd8\xff\xd9",
                  plain.replace(b"\xff\xc0\x00\x11\x08\x00\x10\x00\x08", b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff")):
        assert not plain_jpeg(other)


def test_what_this_machine_cannot_do_is_one_line(checkpoint, monkeypatch):
    for options, message in (({"precision": "fp16"}, "needs a GPU"), ({"precision": "int8"}, "--precision int8"),
                             ({"engine": "tensorrt"}, "--engine tensorrt"), ({"device": "cuda:99"}, "--device cuda:99")):
        with pytest.raises(ReidError, match=message):
            Extractor(checkpoint, **{"device": "cpu", **options})
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ReidError, match=r"\.\[openvino\]"):
        Extractor(checkpoint, engine="openvino")


def test_openvino_gives_the_same_and_keeps_what_it_compiled(checkpoint, crops, monkeypatch):
    pytest.importorskip("openvino")
    from reid.extras.openvino import OpenVinoNetwork

    checks, check = [], OpenVinoNetwork._check
    monkeypatch.setattr(OpenVinoNetwork, "_check", lambda self: checks.append(1) or check(self))
    kept = checkpoint.with_name("best.fp32.openvino")
    expected = Extractor(checkpoint, "cpu", "fp32").embed(crops)
    for start in ("new", "kept", "damaged", "read-only"):
        if start == "damaged":
            kept.write_bytes(kept.read_bytes()[:-100])
        if start == "read-only":
            kept.unlink()
            monkeypatch.setattr("reid.files.atomic_path", lambda path: (_ for _ in ()).throw(OSError(30, "read-only")))
        extractor = Extractor(checkpoint, engine="openvino", precision="fp32")
        torch.testing.assert_close(extractor.embed(crops), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(extractor.embed(crops[:1]), expected[:1], atol=1e-4, rtol=0)
        assert kept.exists() == (start != "read-only")
    assert len(checks) == 3 and "openvino" in extractor.describe()
    monkeypatch.setattr("reid.extras.openvino.PARITY", 1.1)
    with pytest.raises(ReidError, match="differs from PyTorch"):
        Extractor(checkpoint, engine="openvino", precision="fp32")


def test_resnet50(tmp_path, crops):
    pytest.importorskip("torchvision")
    save_checkpoint(tmp_path / "best.pth", trained_like("resnet50", height=64, width=32), {}, {})
    extractor = Extractor(tmp_path / "best.pth", "cpu", "fp32")
    assert extractor.embed(crops).shape == (7, 2048)
    with pytest.raises(ReidError, match="not made for resnet50"):
        pytest.importorskip("openvino")
        Extractor(tmp_path / "best.pth", engine="openvino")


def test_imports_stay_light(root):
    """What `inference.py` waits for at its start."""
    heavy = ["mlflow", "tensorboard", "matplotlib", "torchvision", "openvino", "scipy"]
    code = f"import reid.retrieval.extract, reid.retrieval.index, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(root), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.fixture
def stand_in_gpu(monkeypatch):
    """CUDA's streams without CUDA: the order of things is tested, on the CPU."""
    from contextlib import nullcontext

    class Stream:
        def __init__(self, device=None):
            self.waited = []

        record_event, wait_event = (lambda self: "event"), (lambda self, event: self.waited.append(event))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def through_gpu(extractor, files):
    """What `stream` takes from `_on_gpu`: all embeddings, and {position: error}."""
    failures, rows = {}, []
    for _, failed, part in extractor._on_gpu(files):
        failures |= failed
        rows += [] if part is None else [part]
    return torch.cat(rows), failures


@pytest.mark.parametrize("nvjpeg", [True, False])
def test_gpu_pipeline(checkpoint, crops, tmp_path, stand_in_gpu, monkeypatch, nvjpeg):
    from reid.retrieval import gpu_decode

    extractor = Extractor(checkpoint, "cpu", "fp32", batch_size=2)
    expected = extractor.embed(crops)
    (tmp_path / "broken.jpg").write_bytes(crops[0].read_bytes()[:90])
    files = [tmp_path / "missing.jpg", tmp_path / "broken.jpg", *crops]
    calls = []
    if nvjpeg:
        pytest.importorskip("torchvision")
        decode = gpu_decode._nvjpeg
        monkeypatch.setattr(gpu_decode, "_nvjpeg", lambda encoded, device: calls.append(len(encoded)) or decode(encoded, device))
    monkeypatch.setattr(gpu_decode, "decoder", lambda device: "nvJPEG" if nvjpeg else "CPU threads decode")
    found, failures = through_gpu(extractor, files)
    assert sorted(failures) == [0, 1] and sum(calls) == (6 if nvjpeg else 0)  # the PNG is Pillow's
    assert (found * expected).sum(1).min() > (0.999 if nvjpeg else 0.999999)


def test_gpu_compiles_one_shape(checkpoint, crops, stand_in_gpu):
    """The last batch is padded to the shape that was compiled; where compiling fails, `auto` goes on without."""
    extractor = Extractor(checkpoint, "cpu", "fp32", batch_size=3, compile="on")
    expected, shapes, model = extractor.embed(crops), [], extractor._model
    extractor._compiled = lambda views: shapes.append(len(views)) or model.features(views)
    torch.testing.assert_close(through_gpu(extractor, crops)[0], expected, atol=1e-5, rtol=0)
    assert shapes == [6, 6, 6]

    def broken(views):
        raise RuntimeError("no C compiler\nin many lines")

    extractor._compiled = broken
    with pytest.raises(ReidError, match=r"no C compiler\)"):
        through_gpu(extractor, crops)
    extractor.compile = "auto"
    pixels = images.resize([images.decode(file) for file in crops[:3]], extractor.size)
    torch.testing.assert_close(extractor._fitting(pixels, broken), expected[:3], atol=1e-5, rtol=0)
    assert extractor._compiled is None
