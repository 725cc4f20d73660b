"""The Extractor: order, threads, mirrored images, bad images, memory of a GPU, its pipeline."""


import pytest
import torch
import torch.nn.functional as F
from embed_lab import BF16

from reid import ReidError, images
from reid.retrieval.extract import Extractor, in_order


def test_order_batches_and_threads_do_not_matter(checkpoint, crops):
    """Three times the same files, shuffled, by workers and alone, in batches of every size."""
    files = crops * 3
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(1)).tolist()
    before = torch.get_num_threads()
    try:
        for precision in ("fp32", *(("bf16",) if BF16 else ())):
            extractor = Extractor(checkpoint, "cpu", precision)
            single = torch.cat([extractor.embed([file]) for file in crops]).repeat(3, 1)
            for threads, size in ((1, 5), (2, 4), (3, None)) if precision == "fp32" else ((2, 4),):
                torch.set_num_threads(threads)
                extractor = Extractor(checkpoint, "cpu", precision, batch_size=size)
                found = extractor.embed([files[i] for i in order])
                assert torch.get_num_threads() == threads
                cosine = (found.double() * single[order].double()).sum(1)
                assert (1 - cosine).abs().max() < (1e-6 if precision == "fp32" else 1e-3)
    finally:
        torch.set_num_threads(before)


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


def test_mirror_is_the_sum_of_both_views(checkpoint, extractor, crops):
    pixels = images.resize([images.decode(file) for file in crops], (64, 32))
    model = extractor._model
    expected = F.normalize(model.neck(model.features(pixels)) + model.neck(model.features(pixels.flip(3))))
    torch.testing.assert_close(extractor.embed(pixels), expected, atol=1e-5, rtol=0)
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
