"""Embeddings: the folded network against the plain one, every kind of input, boxes of a frame, bad images, GPU memory."""

import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reid import ReidError, images
from reid.checkpoint import save_checkpoint
from reid.folded import FoldedDenseNet
from reid.model import build_model, cast_network, default_config, plain_network
from reid.retrieval import extract
from reid.retrieval.extract import Extractor, in_order, load_batch

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = [torch.float32, *([torch.bfloat16] if BF16 else [])]


def trained_like(backbone="densenet121", **config):
    """A network with norms as after training: scales of both signs, dead channels, channels that are always on or off."""
    torch.manual_seed(0)
    model = build_model(default_config([1, 2], backbone, **config)).eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.weight, 1, 0.5)
            torch.nn.init.normal_(norm.bias, 0, 0.3)
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.data[:4] = torch.tensor([0.0, 1e-14, 1e-6, -1e-6])
            norm.bias.data[:4] = torch.tensor([0.7, -0.7, 0.9, -0.9])
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
def test_without_the_operators_of_the_folded_network_the_plain_one_embeds(checkpoint, crops, monkeypatch, fault):
    """Another version of PyTorch may lack a private operator, or compute something else with it."""
    expected = Extractor(checkpoint, "cpu", "fp32").embed(crops)
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
    extractor = Extractor(checkpoint, "cpu", "fp32")
    assert not isinstance(extractor._features, FoldedDenseNet)
    torch.testing.assert_close(extractor.embed(crops), expected, atol=1e-5, rtol=0)


def test_folded_default_model(root):
    """On the default model, and on drawn shapes rather than noise, bf16 costs less than 2e-4 of cosine."""
    extractor = Extractor(root / "models/masked-hog-908/best.pth", "cpu", "bf16" if BF16 else "fp32", mirror=False)
    blobs = F.interpolate(torch.rand(4, 3, 8, 4, generator=torch.Generator().manual_seed(0)), extractor.size, mode="bicubic")
    pixels = (255 * blobs.clamp(0, 1)).to(torch.uint8)
    assert (extractor.embed(pixels) * extractor._model(pixels)).sum(1).min() > 0.9998


def test_order_batches_and_threads_do_not_matter(checkpoint, crops):
    """Three times the same files, shuffled, by workers and alone, in batches of every size."""
    files = crops * 3
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(1)).tolist()
    before = torch.get_num_threads()
    try:
        for precision in ("fp32", *(("bf16",) if BF16 else ())):
            single = torch.cat([Extractor(checkpoint, "cpu", precision).embed([file]) for file in crops]).repeat(3, 1)
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
    assert extractor.embed([]).shape == (0, 1024)
    arrays = [image.permute(1, 2, 0).numpy() for image in pixels]
    frozen = [array.copy() for array in arrays]
    for array in frozen:
        array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in ([array[::-1].copy()[::-1] for array in arrays], frozen, [array.astype(np.float64) for array in arrays],
                     [array.astype(np.float32) / 255 for array in arrays], [array.astype(np.uint16) for array in arrays],
                     [image / 255 for image in pixels], [array.transpose(1, 0, 2).copy().transpose(1, 0, 2) for array in arrays]):
            assert torch.equal(extractor.embed(same), expected)
        assert torch.equal(extractor.embed([array[..., ::-1] for array in arrays], channels="bgr"), expected)
        assert torch.equal(extractor.embed([image.flip(0) for image in pixels], channels="bgr"), expected)
        assert torch.equal(extractor.embed(crops, channels="bgr"), expected)  # a file states its own order
    for one in (crops[0], str(crops[0]), arrays[0], pixels[0], crops[0].read_bytes()):
        torch.testing.assert_close(extractor.embed(one), expected[:1], atol=1e-5, rtol=0)
    gray = arrays[0][..., 0]
    for same in (gray, gray[..., None], torch.from_numpy(gray.copy()), gray / np.float32(255)):
        torch.testing.assert_close(extractor.embed(same), extractor.embed(np.dstack([gray] * 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrong", [
    np.zeros((8, 8, 4), np.uint8), torch.zeros(4, 8, 8, dtype=torch.uint8), np.full((8, 8, 3), "a"), np.full((8, 8, 3), np.nan),
    np.full((8, 8, 3), 256.0), np.full((8, 8, 3), -1.0), np.zeros((2, 2, 8, 8, 3)), np.zeros(8)])
def test_arrays_that_are_no_image(checkpoint, wrong):
    with pytest.raises(ReidError, match=r"image of shape .* give"):
        Extractor(checkpoint, "cpu", "fp32").embed([wrong])


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (120, 200, 3), dtype=np.uint8)


def test_boxes_of_a_frame_equal_their_crops(checkpoint, frame):
    extractor = Extractor(checkpoint, "cpu", "fp32")
    boxes = np.array([[0, 0, 200, 120], [10.9, 20, 40, 90.2], [150, 60, 151, 61], [-30, -9, 50, 40], [170, 100, 999, np.inf]])
    crops = [frame, frame[20:90, 10:40], frame[60:61, 150:151], frame[:40, :50], frame[100:, 170:]]
    expected = extractor.embed(crops)
    assert expected.shape == (5, 1024) and expected.dtype == torch.float32 and expected.device.type == "cpu"
    for same in (boxes, torch.from_numpy(boxes), boxes.tolist(), boxes[::-1].copy()[::-1]):
        assert torch.equal(extractor.embed(frame, boxes=same), expected)
    bgr = np.ascontiguousarray(frame[..., ::-1])
    for same, channels in ((bgr, "bgr"), (bgr[..., ::-1], "rgb"), (frame / 255, "rgb"), (frame.astype(np.float32), "rgb"),
                           (torch.from_numpy(frame).permute(2, 0, 1), "rgb"), (Image.fromarray(frame), "rgb"),
                           (Image.fromarray(frame), "bgr"), (np.repeat(frame, 2, 1)[:, ::2], "rgb")):
        assert torch.equal(extractor.embed(same, boxes=boxes, channels=channels), expected)
    gray = frame[..., 0]
    expected = extractor.embed([np.dstack([gray] * 3)[20:90, 10:40]])
    assert torch.equal(extractor.embed(gray, boxes=boxes[1:2]), expected)


def test_empty_boxes_and_crops_get_a_row_of_nan(checkpoint, frame):
    extractor = Extractor(checkpoint, "cpu", "fp32")
    boxes = [[10, 20, 40, 90], [10, 20, 10, 90], [40, 90, 10, 20], [np.nan, 0, 40, 90], [300, 0, 400, 90], [5, 5, 25, 60]]
    with pytest.warns(UserWarning, match="^4 of 6 crops are empty; their embeddings are NaN$") as caught:
        found = extractor.embed(frame, boxes=boxes)
    assert len(caught) == 1
    assert found.isnan().all(1).tolist() == found.isnan().any(1).tolist() == [False, True, True, True, True, False]
    assert torch.equal(found[[0, 5]], extractor.embed([frame[20:90, 10:40], frame[5:60, 5:25]]))
    with pytest.warns(UserWarning, match="2 of 3"):
        found = extractor.embed([frame[:0], frame, torch.zeros(3, 0, 8, dtype=torch.uint8)], channels="bgr")
    assert torch.equal(found[1:2], extractor.embed([frame[..., ::-1]])) and found[[0, 2]].isnan().all()
    with pytest.warns(UserWarning, match="1 of 1"):
        assert extractor.embed(frame, boxes=boxes[1:2]).isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for none in ([], np.zeros((0, 4)), torch.zeros(0, 4), np.zeros(0)):
            assert extractor.embed(frame, boxes=none).shape == (0, 1024)
    for wrong in ([1, 2, 3, 4], [[1, 2, 3]], [[1, 2, 3, 4], [1]], np.zeros((2, 6)), "box"):
        with pytest.raises(ReidError, match=r"boxes .*x1, y1, x2, y2"):
            extractor.embed(frame, boxes=wrong)
    with pytest.raises(ReidError, match="use rgb or bgr"):
        extractor.embed(frame, boxes=boxes, channels="RGB")


def test_a_run_by_its_name(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "models" / "first-steps").mkdir(parents=True)
    (tmp_path / "models" / "first-steps" / "best.pth").write_bytes(checkpoint.read_bytes())
    monkeypatch.chdir(tmp_path)
    named = Extractor("first-steps", "cpu")
    assert named.fingerprint == Extractor("models/first-steps/best.pth", "cpu").fingerprint
    with pytest.raises(ReidError, match="runs here: first-steps"):
        Extractor("last-steps", "cpu")
    with pytest.raises(ReidError, match=r"other\.pth: no such file"):
        Extractor("other.pth", "cpu")


def test_large_images_are_resized_before_the_next_is_decoded(tmp_path, monkeypatch):
    """Else a batch of 50-megapixel pictures takes gigabytes; small ones wait, because they are resized together faster."""
    rng, waiting, most, decode = np.random.default_rng(0), [], [], images.decode
    for name, shape in (("large", (800, 600, 3)), ("small", (128, 64, 3))):
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"{name}{i}.png")
    resize = images.resize

    def counted(source):
        waiting.append(source)
        most.append(len(waiting))
        return decode(source)

    monkeypatch.setattr(images, "decode", counted)
    monkeypatch.setattr(images, "resize", lambda batch, size: waiting.clear() or resize(batch, size))
    for name, limit in (("large", 1), ("small", 4)):
        files = [tmp_path / f"{name}{i}.png" for i in range(4)]
        batch, failures = load_batch(files, range(4), (64, 32))
        assert not failures and max(most) == limit
        assert torch.equal(batch, torch.cat([resize([decode(file)], (64, 32)) for file in files]))


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


def test_what_this_machine_does_not_support_is_one_line(checkpoint):
    for options, message in (({"precision": "fp16"}, "needs a GPU"), ({"precision": "int8"}, "--precision int8"),
                             ({"device": "cuda:99"}, "--device cuda:99")):
        with pytest.raises(ReidError, match=message):
            Extractor(checkpoint, **{"device": "cpu", **options})


def test_another_engine_is_given(checkpoint, crops):
    """The Extractor calls whatever `network` returns, and PyTorch where it returns None."""
    calls = []

    def network(model, precision, workers, path, fingerprint):
        calls.append((precision, path, fingerprint))
        return lambda views: model.features(views)

    extractor = Extractor(checkpoint, precision="fp32", network=network)
    assert calls == [("fp32", checkpoint, extractor.fingerprint)] and extractor.device.type == "cpu"
    expected = Extractor(checkpoint, "cpu", "fp32").embed(crops)
    torch.testing.assert_close(extractor.embed(crops), expected, atol=1e-5, rtol=0)
    assert torch.equal(Extractor(checkpoint, precision="fp32", network=lambda *_: None).embed(crops), expected)


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
            monkeypatch.setattr("reid.files.atomic_path", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
        extractor = Extractor(checkpoint, precision="fp32", network=OpenVinoNetwork)
        torch.testing.assert_close(extractor.embed(crops), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(extractor.embed(crops[:1]), expected[:1], atol=1e-4, rtol=0)
        assert kept.exists() == (start != "read-only")
    assert len(checks) == 3 and "openvino" in extractor.describe()
    monkeypatch.setattr("reid.extras.openvino.PARITY", 1.1)
    with pytest.raises(ReidError, match="differs from PyTorch"):
        Extractor(checkpoint, precision="fp32", network=OpenVinoNetwork)


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

        record_event, wait_event = (lambda self: Event()), (lambda self, event: self.waited.append(event))

    class Event:
        def synchronize(self):
            pass

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


def test_gpu_pipeline(checkpoint, crops, tmp_path, stand_in_gpu):
    extractor = Extractor(checkpoint, "cpu", "fp32", batch_size=2)
    expected = extractor.embed(crops)
    (tmp_path / "broken.jpg").write_bytes(crops[0].read_bytes()[:90])
    files = [tmp_path / "missing.jpg", tmp_path / "broken.jpg", *crops]
    found, failures = through_gpu(extractor, files)
    assert sorted(failures) == [0, 1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_gpu_compiles_one_shape(checkpoint, crops, stand_in_gpu):
    """The last batch is padded to the shape that was compiled; where compiling fails, an error names the setting."""
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


def test_gpu_embeds_what_overflows_again(checkpoint, crops, stand_in_gpu):
    """In fp16, a batch that is not finite goes through the network in fp32."""
    extractor = Extractor(checkpoint, "cpu", "fp32", batch_size=3)
    expected, plain, calls = extractor.embed(crops), extractor._features, []

    def overflows(views):
        calls.append(len(views))
        return plain(views) * (torch.inf if len(calls) == 2 else 1)

    extractor._features, extractor.precision = overflows, "fp16"
    torch.testing.assert_close(through_gpu(extractor, crops)[0], expected, atol=1e-5, rtol=0)
    assert len(calls) == 3


@pytest.mark.parametrize("backbone", ["densenet121", "resnet50"])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 5e-3)])
def test_network_for_a_gpu_equals_the_plain_one(backbone, dtype, error):
    model = trained_like(backbone, height=64, width=32)
    pixels = torch.randint(256, (2, 3, 64, 32), dtype=torch.uint8)
    expected, network = plain_network(model, torch.float32)(pixels), cast_network(model, dtype)
    assert (network(pixels) - expected).norm() < error * expected.norm()
