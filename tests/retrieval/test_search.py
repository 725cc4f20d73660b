"""Exact search against float64: filters, ties, many that are about as near, a small GPU, shards."""

import pytest
import torch
import torch.nn.functional as F
from index_lab import make_index, random_rows, reference

from reid import ReidError
from reid.retrieval.search import ExactSearch, exact_products, merge_shards


@pytest.mark.parametrize("count, topk, spread", [(5000, 10, 0.3), (5000, 1, 0.01), (300, 50, 0.3), (20, 10, 1.0), (3, 10, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_search_has_the_order_of_float64(monkeypatch, count, topk, spread, dtype):
    monkeypatch.setattr("reid.retrieval.search.fast_dtype", lambda device: dtype)
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
    monkeypatch.setattr("reid.retrieval.search.fast_dtype", lambda device: torch.bfloat16)
    gallery, calls = random_rows(1000, spread=1e-3), []
    queries = F.normalize(gallery[::97] + 0.02 * random_rows(11, seed=5))
    exact = ExactSearch(gallery)
    for name in ("_block", "_near"):
        method = getattr(exact, name)
        monkeypatch.setattr(exact, name, lambda *args, name=name, method=method: calls.append(name) or method(*args))
    keep, exclude = torch.arange(1000) % 7 > 0, torch.arange(0, 1000, 97).index_fill(0, torch.tensor([3]), -1)
    scores, rows = exact.search(queries, 3, keep, exclude)
    every = queries.double() @ gallery.double().T
    every[:, ~keep] = -torch.inf
    for i, left_out in enumerate(exclude.tolist()):
        every[i, [left_out] * (left_out >= 0)] = -torch.inf
    best, order = every.sort(dim=1, descending=True, stable=True)
    assert torch.equal(rows, order[:, :3]) and torch.allclose(scores, best[:, :3].float(), atol=1e-6)
    assert calls[1:] == expected


class SmallCard(ExactSearch):
    """Pretends that its first copy is on a GPU with memory for the scores of `room` queries."""

    room, copies = 0, 0

    def _copy_to(self, device):
        self.copies += 1
        super()._copy_to(device)

    def _block(self, queries, *options):
        if self.copies == 1:
            self.tried.append(len(queries))
            if len(queries) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._block(queries, *options)


@pytest.mark.parametrize("room, tried", [(3, [5, 2, 2, 2, 1]), (0, [5, 2, 1])])
def test_out_of_memory_halves_the_queries_and_gives_the_gpu_up(monkeypatch, room, tried):
    monkeypatch.setattr("reid.retrieval.search.QUERIES", 5)
    gallery, queries = random_rows(300), random_rows(7, seed=1)
    small = SmallCard(gallery)
    small.room, small.tried = room, []
    _, rows = small.search(queries, 5)
    assert torch.equal(rows, reference(queries, gallery, 5)[1])
    assert small.tried == tried and small.copies == (1 if room else 2)


def test_exact_products_switch_tf32_off_and_on_again():
    before, found = torch.backends.cuda.matmul.allow_tf32, []
    torch.backends.cuda.matmul.allow_tf32 = True

    @exact_products()
    def product():
        found.append(torch.backends.cuda.matmul.allow_tf32)

    product()
    with pytest.raises(KeyError), exact_products():
        found.append(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction)
        raise KeyError
    assert found == [False, False] and torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before


def test_filters():
    index = make_index()
    queries = random_rows(5, seed=2)
    scores, rows = index.nearest(queries, 8, camids=[2])
    expected, order = reference(queries, index.embeddings, 8, index.camids == 2)
    assert torch.equal(rows, order) and torch.allclose(scores, expected.float(), atol=1e-6)
    best = index.nearest(queries, 2)[1]
    assert torch.equal(index.nearest(queries, 1, exclude=best[:, 0])[1][:, 0], best[:, 1])
    assert (index.nearest(queries, 3, camids=[99])[1] == -1).all()
    with pytest.raises(ReidError, match="dimensions"):
        index.nearest(torch.zeros(2, 3), 1)
    with pytest.raises(ReidError, match="topk 0: give the number of images to find, from 1"):
        index.search(queries, topk=0)


def test_shards_merge_to_the_whole():
    gallery, queries = random_rows(900), random_rows(30, seed=3)
    parts = []
    for start in range(0, 900, 300):
        scores, rows = ExactSearch(gallery[start : start + 300]).search(queries, 12)
        parts.append((scores, rows + start))
    scores, rows = merge_shards(parts, 12)
    expected, order = ExactSearch(gallery).search(queries, 12)
    assert torch.equal(rows, order) and torch.allclose(scores, expected, atol=1e-6)
