"""Camera statistics: their values, what they do to a gallery and to its queries, and the index that keeps them."""

import pytest
import torch
import torch.nn.functional as F

from reid import ReidError
from reid.data.datasets import make_records
from reid.retrieval import metrics
from reid.retrieval.camera import PRIOR, CameraStatistics
from reid.retrieval.index import GalleryIndex


def people_in_two_cameras(count=40, dim=64, seed=0):
    """(embeddings [2 * count, dim], pids, camids): each camera adds the same large vector to all its embeddings."""
    generator = torch.Generator().manual_seed(seed)
    people, cameras = torch.randn(count, dim, generator=generator), 3 * torch.randn(2, dim, generator=generator)
    seen = people.repeat(2, 1) + 0.5 * torch.randn(2 * count, dim, generator=generator)
    camids = torch.arange(2).repeat_interleave(count)
    return F.normalize(seen + cameras[camids]), torch.arange(1, count + 1).repeat(2), camids


def index_of(embeddings, camids, dtype=torch.float32):
    records = make_records("nowhere", [f"{row:04}/a.jpg" for row in range(len(camids))], grouped=True)
    records.camids.copy_(camids)
    return GalleryIndex(embeddings.to(dtype), records, "f" * 16, True)


def test_values_by_hand():
    """One image: with PRIOR images' worth of "no change", and for its camera PRIOR images' worth of the gallery."""
    found = CameraStatistics.fit(torch.tensor([[1.0, 0.0]]), torch.tensor([5]))
    gallery = torch.tensor([1.0, 0.0]) / (1 + PRIOR)
    assert found.cameras.tolist() == [5]
    assert torch.allclose(found.mean[1], gallery)
    assert torch.allclose(found.mean[0], (torch.tensor([1.0, 0.0]) + PRIOR * gallery) / (1 + PRIOR))
    assert torch.allclose(found.variance[1], torch.full((2,), 0.5 * PRIOR / (1 + PRIOR)))
    assert torch.allclose(found.variance[0], found.variance[1] * PRIOR / (1 + PRIOR))


def test_many_images_have_their_own_mean_and_variance():
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9) + 3
    camids = torch.arange(4000) % 2
    found = CameraStatistics.fit(x, camids)
    for camera in (0, 1):
        own = x[camids == camera]
        assert torch.allclose(found.mean[camera], own.mean(0), rtol=0.02)
        assert torch.allclose(found.variance[camera], own.var(0), rtol=0.02)
    standard = (x[camids == 0] - found.mean[0]) / found.variance[0].sqrt()
    assert torch.allclose(found.apply(x, camids)[camids == 0], F.normalize(standard), atol=1e-6)


def test_cosines_of_very_few_images_hardly_change():
    x = F.normalize(torch.randn(2, 64, generator=torch.Generator().manual_seed(1)))
    camids = torch.tensor([3, 4])
    y = CameraStatistics.fit(x, camids).apply(x, camids)
    assert abs(float(y[0] @ y[1]) - float(x[0] @ x[1])) < 0.15


def test_what_a_camera_adds_is_taken_out():
    x, pids, camids = people_in_two_cameras()
    index = index_of(x, camids)
    count = len(x) // 2
    plain = metrics.evaluate(x[:count], x, pids[:count], camids[:count] + 10, pids, camids + 20)
    normalised = index.camera_normalised().embeddings
    result = metrics.evaluate(normalised[:count], normalised[count:], pids[:count], camids[:count], pids[count:], camids[count:])
    before = metrics.evaluate(x[:count], x[count:], pids[:count], camids[:count], pids[count:], camids[count:])
    assert result.mAP > before.mAP + 0.1 and plain.valid == result.valid
    assert torch.allclose(normalised.norm(dim=1), torch.ones(len(x)), atol=1e-5)


def test_queries_of_known_unknown_and_new_cameras():
    x, _, camids = people_in_two_cameras()
    gallery = index_of(x, camids).camera_normalised()
    queries = x[:3]
    known = gallery.normalise(queries, torch.tensor([0, 0, 0]))
    assert torch.allclose(known, gallery.embeddings[:3], atol=1e-6)
    unknown = gallery.normalise(queries, torch.tensor([-1, -1, -1]))
    assert torch.equal(unknown, gallery.normalise(queries)) and not torch.allclose(unknown, known, atol=1e-2)
    whole = gallery.statistics
    assert torch.allclose(unknown, F.normalize((queries - whole.mean[-1]) / whole.variance[-1].sqrt()), atol=1e-6)
    new = gallery.normalise(x[:30], torch.full((30,), 7))
    own = (30 * x[:30].mean(0) + PRIOR * whole.mean[-1]) / (30 + PRIOR)
    joined = whole.joined(x[:30], torch.full((30,), 7))
    assert joined.cameras.tolist() == [0, 1, 7] and torch.allclose(joined.mean[2], own, atol=1e-6)
    assert torch.allclose(joined.mean[[0, 1, 3]], whole.mean) and torch.allclose(new, joined.apply(x[:30], torch.full((30,), 7)))


def test_without_cameras_nothing_changes():
    x, _, camids = people_in_two_cameras()
    index = index_of(x, torch.full_like(camids, -1))
    assert index.statistics is None and index.camera_normalised() is index
    assert torch.equal(index.normalise(x), x)


def test_the_index_keeps_statistics_and_the_threshold_of_each_kind(tmp_path):
    x, _, camids = people_in_two_cameras()
    index = index_of(x, camids, torch.float16)
    index.threshold, index.camera_threshold = 0.7, 0.4
    index.queries = index_of(x[:5], camids[:5])
    index.save(tmp_path / "a.pt")
    loaded = GalleryIndex.load(tmp_path / "a.pt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.statistics, index.statistics))
    normalised = loaded.camera_normalised()
    assert (loaded.threshold, normalised.threshold) == (0.7, 0.4) and normalised.embeddings.dtype == torch.float16
    assert loaded.space != normalised.space and not loaded.normalised
    assert torch.equal(normalised.queries.embeddings, normalised.normalise(loaded.queries.embeddings, loaded.queries.camids))
    assert torch.equal(loaded.embeddings, index.embeddings), "the embeddings in the file stay as they are"


@pytest.mark.parametrize("change", [{"mean": torch.zeros(2, 64)}, {"variance": -torch.ones(3, 64)}, {"cameras": 1}, {"more": 1}])
def test_damaged_statistics_are_refused(tmp_path, monkeypatch, change):
    x, _, camids = people_in_two_cameras()
    index = index_of(x, camids)
    part = index._part()
    part["statistics"] |= change
    monkeypatch.setattr(index, "_part", lambda: part)
    index.save(tmp_path / "a.pt")
    with pytest.raises(ReidError, match="camera statistics are damaged"):
        GalleryIndex.load(tmp_path / "a.pt")


def test_a_copy_without_camera_statistics_stays_one(tmp_path):
    """It is not standardised twice, and it is never saved, extended or cut as if its embeddings were plain."""
    x, _, camids = people_in_two_cameras()
    normalised = index_of(x, camids).camera_normalised()
    assert normalised.camera_normalised() is normalised
    for use, argument in ((normalised.save, tmp_path / "a.pt"), (normalised.add, x[:1]), (normalised.select, camids == 0)):
        with pytest.raises(ReidError, match="not of a copy without camera statistics"):
            use(argument)
    assert not (tmp_path / "a.pt").exists()


def test_added_rows_are_in_the_statistics():
    x, _, camids = people_in_two_cameras()
    index = index_of(x[:40], camids[:40])
    before = index.statistics
    index.add(x[40:], camids=camids[40:].tolist())
    assert before.cameras.tolist() == [0] and index.statistics.cameras.tolist() == [0, 1]
