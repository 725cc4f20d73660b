"""k-reciprocal re-ranking (Zhong et al., CVPR 2017, arXiv 1701.08398): exact, sparse, in blocks, on CPU and CUDA.

Tensors only. The usual code holds several dense [Q+G, Q+G] matrices. A row of the encoding V has some tens of entries, so
only those are kept here: neighbour lists, V and its inverted index. A dense row exists only inside a block.

Ragged rows are stored as `Rows`: row i owns the entries ptr[i]:ptr[i + 1] of `col` and `val`.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reid import ReidError
from reid.retrieval.search import exact_products, fast_dtype

GROUP = 16  # columns that share one maximum while the best of a row are looked for
SHORTLIST = 2.5  # candidates that the bf16 product keeps for each neighbour wanted
BF16_ERROR = 3 * 2**-9 + 2**-12  # of a cosine: both vectors and the result are rounded by 2^-9, and some for the sums
QUERIES = 128  # rows scored together


class Rows(NamedTuple):
    ptr: Tensor  # int64 [N + 1]
    col: Tensor  # int64 [entries]
    val: Tensor  # float32 [entries]


class Reranked:
    """The result of `rerank`. `scores` computes the final scores block by block; nothing of size [Q, G] is kept."""

    def __init__(self, x: Tensor, queries: int, v: Rows, lam: float, bonus: Callable | None):
        self._x, self._queries, self._lam, self._bonus, self._v = x, queries, lam, bonus, v
        first = int(v.ptr[queries])  # the entries of the queries come first
        row = _row_of(v.ptr[queries:], len(v.col) - first)
        col, order = v.col[first:].sort()
        self._inverted = Rows(_pointers(col, len(x)), row[order], v.val[first:][order])

    def scores(self, start: int, stop: int) -> Tensor:
        """Return float32 [stop - start, G]: 1 - final distance of the queries start..stop, higher is more similar."""
        return torch.cat([self._block(slice(i, min(i + QUERIES, stop))) for i in range(start, stop, QUERIES)])

    def _block(self, rows):
        sim = _similarity(self._x, rows, self._bonus)
        distance = _distance(sim[:, self._queries :], sim.amin(1, keepdim=True))
        return 1 - (1 - self._lam) * (1 - self.jaccard(rows)) - self._lam * distance

    def jaccard(self, rows: slice) -> Tensor:
        """Return float32 [b, G]: the Jaccard index of the encodings of some rows and of the gallery."""
        b, gallery = rows.stop - rows.start, len(self._x) - self._queries
        ptr = self._v.ptr[rows.start : rows.stop + 1]
        own = slice(int(ptr[0]), int(ptr[-1]))
        source, place = _segments(self._inverted.ptr, self._v.col[own])
        shared = torch.minimum(self._v.val[own][source], self._inverted.val[place])
        target = (_row_of(ptr, own.stop - own.start) * gallery)[source] + self._inverted.col[place]
        overlap = shared.new_zeros(b * gallery).scatter_add_(0, target, shared).view(b, gallery)
        return overlap / (2 - overlap)  # a row of V sums to 1, so the maxima sum to 2 - the minima


def rerank(q_emb: Tensor, g_emb: Tensor, k1: int = 20, k2: int = 6, lam: float = 0.3, block: int = 512,
           bonus: Callable[[Tensor, Tensor], Tensor] | None = None) -> Reranked:
    """Re-rank a gallery for all queries together: two images are similar if they have the same mutual neighbours.

    q_emb, g_emb: float32 [Q, D] and [G, D] on one device, normalised here if they are not. Any Q, G >= 1; a gallery
    smaller than k1 is its own neighbourhood. k1: size of a neighbourhood; k2: neighbours over which its encoding is
    averaged; lam: weight of the plain distance in the final one. The result does not depend on `block`, the number of rows
    computed together. `estimate_bytes` estimates the memory.

    The published algorithm, with the same 2 - 2 cos normalised by the maximum of a row, the same rounding of k1 / 2 and
    the same two-thirds rule. Products are float32, not TF32.

    bonus: what to add to the cosines of the rows i and j (int64 tensors that broadcast against each other; queries
    count first, the gallery after them), such as the evidence of camera and time, float32 of the broadcast shape.

    Raises ReidError for sizes that do not fit, an empty side, values that are not finite, or settings out of range.
    """
    if q_emb.ndim != 2 or g_emb.ndim != 2 or q_emb.shape[1] != g_emb.shape[1]:
        shapes = f"{tuple(q_emb.shape)} and {tuple(g_emb.shape)}"
        raise ReidError(f"re-ranking needs embeddings [Q, D] and [G, D] of one model: {shapes} given")
    if not len(q_emb) or not len(g_emb):
        raise ReidError(f"re-ranking {len(q_emb)} queries against {len(g_emb)} gallery images: neither may be empty")
    if k1 < 1 or k2 < 1 or not 0 <= lam <= 1 or block < 1:
        given = f"k1={k1} k2={k2} block={block} lam={lam}"
        raise ReidError(f"re-ranking: k1, k2 and block must be at least 1 and lam within 0 and 1: {given} given")
    x = torch.cat([q_emb.float(), g_emb.float()])
    v = _encoded(x, k1, k2, block, bonus)
    return Reranked(x, len(q_emb), v, lam, bonus)


def jaccard_pairs(embeddings: Tensor, k1: int, k2: int, floor: float, cosine: float, block: int = 512):
    """Return the pairs of rows that are alike: (rows int64 [E], greater rows int64 [E], Jaccard index float32 [E]).

    embeddings: float [N, D], normalised here. Pairs with a Jaccard index below `floor` (above 0), or a cosine below `cosine`, are
    left out.
    """
    x = embeddings.float() if embeddings.dtype != torch.float32 else embeddings.clone()
    shared, parts = Reranked(x, 0, _encoded(x, k1, k2, block, None), 0, None), []
    for start in range(0, len(x), QUERIES):
        rows = slice(start, min(start + QUERIES, len(x)))
        row, col = (found := shared.jaccard(rows)).ge(floor).nonzero().T
        row, col = (side[col > row + start] for side in (row, col))
        alike = _pair_similarity(x, rows, _pointers(row, rows.stop - start), col, None) >= cosine
        row, col = row[alike], col[alike]
        parts.append((row + start, col, found[row, col]))
    return tuple(map(torch.cat, zip(*parts)))


def _encoded(x: Tensor, k1: int, k2: int, block: int, bonus: Callable | None) -> Rows:
    """Encode embeddings float32 [N, D], which are normalised in place."""
    norm = x.norm(dim=1, keepdim=True)
    if not norm.isfinite().all():
        raise ReidError("some embeddings are not finite (NaN or infinite): make them again before re-ranking")
    x /= norm.clamp(min=1e-12)
    rank, low = _neighbours(x, min(len(x), max(k1 + 1, k2)), block, bonus)
    v = _encode(x, rank[:, : k1 + 1], low, round(k1 / 2) + 1, block, bonus)
    return _expand(v, rank[:, :k2], block) if k2 > 1 else v


def estimate_bytes(queries: int, gallery: int, dim: int = 1024, k1: int = 20, k2: int = 6, block: int = 512) -> int:
    """Estimate the bytes that `rerank` and its `scores` take beyond the embeddings given and the scores returned."""
    n = queries + gallery
    copies = 6 * dim  # float32 and bf16
    rows = 12 * (k1 + 1) + 24 * k1 * (1 + min(k2, 4))  # neighbours, V, V expanded and inverted; V has some 2 k1 a row
    return n * (copies + rows + 10 * min(block, n)) + (24 << 20)


@exact_products()
def _similarity(x: Tensor, rows: slice, bonus: Callable | None) -> Tensor:
    sim = x[rows] @ x.T
    if bonus:
        index = torch.arange(len(x), device=x.device)
        sim += bonus(index[rows, None], index)
    return sim


def _distance(sim: Tensor, low: Tensor) -> Tensor:
    """Return 2 - 2 cos over its maximum in the row. The bounds only matter for copies of one image, a case of 0 / 0."""
    return (1 - sim).clamp(min=0) / (1 - low).clamp(min=1e-6)


def _neighbours(x: Tensor, k: int, block: int, bonus: Callable | None) -> tuple[Tensor, Tensor]:
    """Find the k rows most similar to each row, int64 [N, k], best first, and the lowest similarity of each row, [N]."""
    n = len(x)
    keep = math.ceil(k * SHORTLIST)
    if n > 4 * GROUP * keep and _fast_bf16(x):
        return _neighbours_by_shortlist(x, k, keep, block, bonus)
    rank = torch.empty(n, k, dtype=torch.int64, device=x.device)
    low = torch.empty(n, device=x.device)
    for i in range(0, n, block):
        sim = _similarity(x, slice(i, i + block), bonus)
        rank[i : i + block] = sim.topk(k, 1).indices
        low[i : i + block] = sim.amin(1)
    return rank, low


def _fast_bf16(x: Tensor) -> bool:
    """Whether a bf16 product is several times faster than a float32 one, which AMX makes it on a CPU."""
    return x.device.type == "cpu" and fast_dtype(x.device) == torch.bfloat16


def _neighbours_by_shortlist(x, k, keep, block, bonus):
    """Find `_neighbours` by a bf16 product that picks `keep` candidates and float32 products that rank those.

    The k best are surely among them if the k-th, in float32, beats the last candidate's bf16 value by more than the
    error of that value; other rows are computed again in full. The lowest is the best of 8 candidates: it may
    be off by some 1e-4, and only scales the exponents of V, where that does not matter.
    """
    n = len(x)
    index = torch.arange(n)
    short = torch.zeros(n + -n % GROUP, x.shape[1], dtype=torch.bfloat16)
    short[:n] = x
    product = torch.empty(block, len(short), dtype=torch.bfloat16)
    rank, low = torch.empty(n, k, dtype=torch.int64), torch.empty(n)
    for i in range(0, n, block):
        rows = slice(i, min(i + block, n))
        sim = torch.mm(short[rows], short.T, out=product[: rows.stop - i])
        if bonus:
            sim = sim.float()
            sim[:, :n] += bonus(index[rows, None], index)
        sim[:, n:] = -math.inf
        value, candidate = _best(sim, keep)
        sim[:, n:] = math.inf
        candidate = torch.cat([candidate, _best(sim.neg_(), 8)[1]], 1)
        ptr = torch.arange(0, candidate.numel() + 1, candidate.shape[1])
        exact = _pair_similarity(x, rows, ptr, candidate.flatten(), bonus).view_as(candidate)
        low[rows] = exact[:, keep:].amin(1)
        top, order = exact[:, :keep].topk(k, 1)
        rank[rows] = candidate.gather(1, order)
        unsure = i + (top[:, -1] < value[:, -1].float() + BF16_ERROR).nonzero().flatten()
        for part in unsure.split(64):
            rank[part] = _similarity(x, part, bonus).topk(k, 1).indices
    return rank, low


def _best(sim: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return `sim.topk(k, 1)`, faster: the k best are within the k groups of columns whose maxima are the best."""
    groups = sim.view(len(sim), GROUP, -1)
    best = groups.amax(1).topk(k, 1, sorted=False).indices
    column = (best[:, None] + torch.arange(0, sim.shape[1], groups.shape[2])[:, None]).flatten(1)
    value, order = sim.gather(1, column).topk(k, 1)
    return value, column.gather(1, order)


@exact_products()
def _pair_similarity(x: Tensor, rows: slice, ptr: Tensor, col: Tensor, bonus: Callable | None) -> Tensor:
    """Return the similarity of row rows.start + r and each column in col[ptr[r]:ptr[r + 1]], without gathering vectors."""
    size = (len(ptr) - 1, len(x))
    with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
        warnings.simplefilter("ignore", UserWarning)
        wanted = torch.sparse_csr_tensor(ptr, col, x.new_zeros(len(col)), size, check_invariants=False)
    sim = torch.sparse.sampled_addmm(wanted, x[rows], x.T, beta=0.0).values()
    return sim + bonus(rows.start + _row_of(ptr, len(col)), col) if bonus else sim


def _encode(x: Tensor, rank: Tensor, low: Tensor, half: int, block: int, bonus: Callable | None) -> Rows:
    """Make V: for each row its mutual neighbours, and theirs where most of them are its own too, weighted by distance."""
    n = len(x)
    mutual, mutual_half = _mutual(rank, block), _mutual(rank[:, :half], block)
    member = torch.zeros(min(block, n), n, dtype=torch.bool, device=x.device)
    owner = torch.empty(member.numel(), dtype=torch.int32, device=x.device)
    parts = []
    for i in range(0, n, block):
        rows = slice(i, min(i + block, n))
        near, ok = rank[rows], mutual[rows]  # [b, k]
        far, far_ok = rank[near, :half], mutual_half[near]  # [b, k, half]
        inside = member[: len(near)].scatter_(1, near, ok)
        common = inside.gather(1, far.flatten(1)).view_as(far) & far_ok
        far_ok &= (ok & (3 * common.sum(2) > 2 * far_ok.sum(2)))[..., None]
        inside.scatter_(1, near, False)
        key = torch.cat([near, far.flatten(1)], 1) + n * torch.arange(len(near), device=x.device)[:, None]
        key = key[torch.cat([ok, far_ok.flatten(1)], 1)]
        key = key[_distinct(key, owner)[1]].sort().values
        row, col = key // n, key % n
        ptr = _pointers(row, len(near))
        weight = _distance(_pair_similarity(x, rows, ptr, col, bonus), low[rows][row]).neg_().exp_()
        total = weight.new_zeros(len(near)).index_add_(0, row, weight)
        parts.append((ptr.diff(), col, weight / total[row]))
    return _joined(parts)


def _mutual(rank: Tensor, block: int) -> Tensor:
    """Return bool [N, k]: whether row i is among the k nearest of its a-th nearest."""
    own = torch.arange(len(rank), device=rank.device)[:, None, None]
    return torch.cat([(rank[near] == i).any(2) for near, i in zip(rank.split(block), own.split(block))])


def _expand(v: Rows, rank: Tensor, block: int) -> Rows:
    """Replace each row by the mean of the rows nearest to it (local query expansion)."""
    n, k = rank.shape
    owner = torch.empty(min(block, n) * n, dtype=torch.int32, device=rank.device)
    parts = []
    for near in rank.split(block):
        source, place = _segments(v.ptr, near.flatten())
        key = source // k * n + v.col[place]
        slot, first = _distinct(key, owner)
        total = v.val.new_zeros(len(key)).index_add_(0, slot, v.val[place])
        key = key[first]
        parts.append((torch.bincount(key // n, minlength=len(near)), key % n, total[first] / k))
    return _joined(parts)


def _distinct(key: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Give equal keys one slot, the place of one of them: (slot [m], bool [m], true once for each key).

    `owner` is scratch space with a place for every possible key and need not be cleared. Cheaper than sorting.
    """
    place = torch.arange(len(key), dtype=owner.dtype, device=key.device)
    owner[key] = place
    slot = owner[key]
    return slot, slot == place


def _segments(ptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """List all entries of the given rows, one row after the other: which of `rows` each belongs to, and its place."""
    size = ptr[rows + 1] - ptr[rows]
    total = int(size.sum())
    source = torch.repeat_interleave(size, output_size=total)
    shift = ptr[rows] - (size.cumsum(0) - size)
    return source, shift[source] + torch.arange(total, device=ptr.device)


def _row_of(ptr: Tensor, entries: int) -> Tensor:
    return torch.repeat_interleave(ptr.diff(), output_size=entries)


def _pointers(sorted_rows: Tensor, n: int) -> Tensor:
    return F.pad(torch.bincount(sorted_rows, minlength=n).cumsum(0), (1, 0))


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Rows:
    size, col, val = (torch.cat(part) for part in zip(*parts))
    return Rows(F.pad(size.cumsum(0), (1, 0)), col, val)
