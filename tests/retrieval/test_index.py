"""The gallery index: exact search against float64, filters, ties, files that are damaged or of another model."""

import pytest
import torch
import torch.nn.functional as F

from reid import ReidError
from reid import files as storage
from reid.data.datasets import UNKNOWN_PID, folder_pid, make_records
from reid.retrieval.index import FORMAT, VERSION, GalleryIndex, merge_shards
from reid.retrieval.ranked import Query, identity_name
from reid.retrieval.search import ExactSearch


def random_rows(count, dim=64, seed=0, spread=0.3):
    """Unit rows around a few centres, so that neighbours are near each other, with copies (exact ties)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(2, count // 50), dim, generator=generator)
    rows = centres[torch.randint(len(centres), (count,), generator=generator)]
    rows = F.normalize(rows + spread * torch.randn(count, dim, generator=generator))
    rows[count // 2 : count // 2 + count // 10] = rows[: count // 10]
    return rows


def reference(queries, gallery, topk, keep=None):
    scores = queries.double() @ gallery.double().T
    if keep is not None:
        scores[:, ~keep] = -torch.inf
    scores, rows = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :topk], rows[:, :topk]


def make_index(count=500, dim=64, dtype=torch.float32, root="nowhere"):
    records = make_records(root, [f"{i % 7:04}/{i % 7:04}_c{i % 3 + 1}s1_{i:06}_00.jpg" for i in range(count)], grouped=True)
    return GalleryIndex(random_rows(count, dim).to(dtype), records, "f" * 16, True)


@pytest.mark.parametrize("count, topk, spread", [(5000, 10, 0.3), (5000, 1, 0.01), (300, 50, 0.3), (20, 10, 1.0), (3, 10, 1.0)])
@pytest.mark.parametrize("fast", [True, False])
def test_search_has_the_order_of_float64(monkeypatch, count, topk, spread, fast):
    monkeypatch.setattr("reid.retrieval.search.fast_bf16", lambda device: fast)
    monkeypatch.setattr("reid.retrieval.search.CHUNK", {"cpu": 1700})
    gallery, queries = random_rows(count, spread=spread), random_rows(40, seed=1)
    queries[: min(10, count)] = gallery[:10]
    scores, rows = ExactSearch(gallery).search(queries, topk)
    expected, order = reference(queries, gallery, topk)
    found = min(count, topk)
    assert torch.equal(rows[:, :found], order) and torch.allclose(scores[:, :found], expected.float(), atol=1e-6)
    assert (rows[:, found:] == -1).all() and (scores[:, found:] == -torch.inf).all()


@pytest.mark.parametrize("more, expected", [(300, ["_block"]), (8, ["_block", "_near"])])
def test_search_among_many_that_are_about_as_near(monkeypatch, more, expected):
    """First among more candidates; where those are still too few, among every row that may be one."""
    monkeypatch.setattr("reid.retrieval.search.SPARE", 2)
    monkeypatch.setattr("reid.retrieval.search.MORE", more)
    monkeypatch.setattr("reid.retrieval.search.fast_bf16", lambda device: True)
    gallery, calls = random_rows(1000, spread=1e-3), []
    queries = F.normalize(gallery[::97] + 0.02 * random_rows(11, seed=5))
    exact = ExactSearch(gallery)
    for name in ("_block", "_near"):
        method = getattr(exact, name)
        monkeypatch.setattr(exact, name, lambda *args, name=name, method=method: calls.append(name) or method(*args))
    keep, exclude = torch.arange(1000) % 7 > 0, [[row, 8] for row in range(0, 1000, 97)]
    scores, rows = exact.search(queries, 3, keep, exclude)
    every = queries.double() @ gallery.double().T
    every[:, ~keep] = -torch.inf
    for i, left_out in enumerate(exclude):
        every[i, left_out] = -torch.inf
    best, order = every.sort(dim=1, descending=True, stable=True)
    assert torch.equal(rows, order[:, :3]) and torch.allclose(scores, best[:, :3].float(), atol=1e-6)
    assert calls[1:] == expected


def test_filters():
    index = make_index()
    queries = random_rows(5, seed=2)
    scores, rows = index.nearest(queries, 8, camids=[2])
    expected, order = reference(queries, index.embeddings, 8, index.camids == 2)
    assert torch.equal(rows, order) and torch.allclose(scores, expected.float(), atol=1e-6)
    best = index.nearest(queries, 2)[1]
    assert torch.equal(index.nearest(queries, 1, exclude=best[:, 0])[1][:, 0], best[:, 1])
    assert torch.equal(index.nearest(queries, 1, exclude=[[row] for row in best[:, 0].tolist()])[1][:, 0], best[:, 1])
    assert (index.nearest(queries, 3, camids=[99])[1] == -1).all()
    with pytest.raises(ReidError, match="dimensions"):
        index.nearest(torch.zeros(2, 3), 1)


def test_shards_merge_to_the_whole():
    gallery, queries = random_rows(900), random_rows(30, seed=3)
    parts = []
    for start in range(0, 900, 300):
        scores, rows = ExactSearch(gallery[start : start + 300]).search(queries, 12)
        parts.append((scores, rows + start))
    scores, rows = merge_shards(parts, 12)
    expected, order = ExactSearch(gallery).search(queries, 12)
    assert torch.equal(rows, order) and torch.allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_round_trip(tmp_path, dtype):
    index = make_index(dtype=dtype)
    index.queries, index.threshold, index.false_match_rate = make_index(20, dtype=dtype), 0.5, 1e-3
    index.save(tmp_path / "a.pt")
    again = GalleryIndex.load(tmp_path / "a.pt", "f" * 16)
    assert torch.equal(again.embeddings, index.embeddings) and list(again.paths) == list(index.paths)
    assert again.paths[3] == "0003/0003_c1s1_000003_00.jpg" and len(again.queries) == 20 and again.threshold == 0.5
    assert torch.equal(again.records().pids, index.pids)


def test_half_precision_moves_scores_little():
    index, half = make_index(), make_index(dtype=torch.float16)
    queries = random_rows(20, seed=4)
    assert (index.nearest(queries, 5)[0] - half.nearest(queries, 5)[0]).abs().max() < 1e-3


@pytest.mark.parametrize("change, message", [
    (lambda p: p.update(fingerprint="other"), "other weights"), (lambda p: p.update(preprocessing="other"), "other weights"),
    (lambda p: p["embeddings"].fill_(float("nan")), "NaN"), (lambda p: p.update(pids=p["pids"][:-1]), "pids is not"),
    (lambda p: p.update(pids=p["pids"].float()), "pids is not"), (lambda p: p.pop("camids"), "camids is not"),
    (lambda p: p.update(embeddings=p["embeddings"].int()), "embeddings are"), (lambda p: p.pop("embeddings"), "no embeddings"),
    (lambda p: p["path_offsets"].__setitem__(-1, 10**9), "paths do not add up"), (lambda p: p.update(data_root=3), "data_root"),
])
def test_an_index_that_contradicts_itself(tmp_path, change, message):
    part = make_index()._part()
    change(part)
    storage.save(tmp_path / "a.pt", part, FORMAT, VERSION)
    with pytest.raises(ReidError, match=message) as caught:
        GalleryIndex.load(tmp_path / "a.pt", "f" * 16)
    assert "eval.py --save_index" in str(caught.value)


class Flat:
    """Stands in for an Extractor: the mean colour of an image decides."""

    fingerprint, mirror, dim = "f" * 16, True, 64

    def stream(self, files, strict=False, progress=False, bad=None):
        for i, file in enumerate(files):
            value = float(file.read_bytes()[0])
            yield torch.tensor([i]), F.normalize(torch.cos(value * torch.arange(1.0, 65))[None])


def test_add_embeds_only_what_is_new_or_changed(tmp_path):
    def records():
        return make_records(tmp_path, sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jpg")), grouped=True)

    for i in range(4):
        (tmp_path / "1").mkdir(exist_ok=True)
        (tmp_path / "1" / f"{i}.jpg").write_bytes(bytes([i]))
    index = GalleryIndex.build(Flat(), records())
    assert index.add(Flat(), records()) == 0 and index.verify() == []
    (tmp_path / "1" / "4.jpg").write_bytes(bytes([4]))
    (tmp_path / "1" / "2.jpg").write_bytes(bytes([9, 9]))
    assert index.verify() == ["1/2.jpg"]
    assert index.add(Flat(), records()) == 2
    fresh = GalleryIndex.build(Flat(), records())
    assert sorted(index.paths) == sorted(fresh.paths) and index.verify() == []
    for path, embedding in zip(fresh.paths, fresh.embeddings):
        assert torch.equal(index.embeddings[list(index.paths).index(path)], embedding)
    assert index.remove(["1/0.jpg", "1/nothing.jpg"]) == 1 and len(index) == 4
    (tmp_path / "1" / "1.jpg").unlink()
    assert index.verify() == ["1/1.jpg"]


def test_search_returns_ranked_lists():
    index = make_index()
    queries = random_rows(3, seed=2)
    queries[1] = float("nan")  # an empty box
    index.threshold = 0.5
    scores, rows = index.nearest(queries, 4)
    assert (rows[1] == -1).all() and (scores[1] == -torch.inf).all()
    first, empty, last = index.search(queries, 4, queries=[Query(f"{i}.jpg", i) for i in range(3)])
    assert torch.equal(first.rows, rows[0]) and torch.equal(first.scores, scores[0]) and torch.equal(last.rows, rows[2])
    assert len(empty) == 0 and list(empty) == empty.names == [] and empty.query.pid == 1
    row = int(rows[0, 0])
    pid, camid = int(index.pids[row]), int(index.camids[row])
    score = float(scores[0, 0])
    assert first[0] == (1, row, f"nowhere/{index.paths[row]}", str(pid), pid, camid, score, score > 0.5)


def test_identity_names():
    assert [identity_name(pid, "a/anna/1.jpg") for pid in (7, folder_pid("anna"), UNKNOWN_PID)] == ["7", "anna", ""]
