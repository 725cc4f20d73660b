"""Exact nearest neighbours by cosine: a fast half-precision product finds candidates, exact ones rank them, a bound proves it.

Tensors only. `ExactSearch` searches one gallery; `merge_shards` joins the results of several.
"""

from contextlib import contextmanager

import torch

CHUNK = {"cpu": 1 << 15, "cuda": 1 << 20}  # rows of the gallery whose scores are in memory together
QUERIES = 256  # queries searched together
SPARE, MORE = 24, 512  # candidates beyond topk, and beyond topk where that many are about as near as the k-th
EXACT = 1024  # candidates whose embeddings are in memory together: 4 MiB, which still are in the cache when multiplied
CLOSE = 1e-6  # float32 scores nearer than this are compared again in float64


class ExactSearch:
    """Exact search of one gallery. embeddings: float32 or float16 [N, D] of norm 1 (may be memory-mapped).

    Keeps a copy in memory, of the type that `fast_dtype` returns for the device. A GPU that is too small for the copy or for the
    scores is given up for the CPU.
    """

    def __init__(self, embeddings, device="cpu"):
        self.embeddings = embeddings
        try:
            self._copy_to(torch.device(device))
        except torch.OutOfMemoryError:
            self._copy_to(torch.device("cpu"))

    def _copy_to(self, device):
        self.device, self.dtype, self.chunks, self.error = device, fast_dtype(device), [], 0.0
        for part in self.embeddings.split(CHUNK[device.type]):
            copy = part.to(self.dtype)
            if len(part) and self.dtype not in (part.dtype, torch.float32):
                self.error = max(self.error, (part.float() - copy.float()).norm(dim=1).max().item())
            self.chunks.append(copy.to(device))
        # A GPU that holds all embeddings without a loss also ranks the candidates.
        self.exact = self.chunks[0] if device.type == "cuda" and len(self.chunks) == 1 and not self.error else self.embeddings

    def search(self, embeddings, topk, keep=None, exclude=None):
        """Return (scores float32 [Q, topk], rows int64 [Q, topk]), best first; -inf and -1 where rows run out.

        embeddings: float32 [Q, D] of norm 1. keep: bool [N], rows that may be found. exclude: int64 [Q], a row to
        leave out for each query, or -1. The order is that of float64 products, and equal scores are ordered by row.
        """
        scores = torch.full((len(embeddings), topk), -torch.inf)
        rows = torch.full((len(embeddings), topk), -1)
        start, size = 0, QUERIES
        while start < len(embeddings) and len(self.exact):
            block = slice(start, start + size)
            try:
                with exact_products():
                    queries = embeddings[block].float().to(self.exact.device)
                    best, found = self._block(queries, topk, keep, _rows(exclude, block), SPARE)
            except torch.OutOfMemoryError:  # of a GPU; on a CPU PyTorch raises something else
                size //= 2
                best = None
            if best is None:  # out here the failed attempt's tensors are gone
                if not size:
                    self._copy_to(torch.device("cpu"))
                    size = QUERIES
                torch.cuda.empty_cache()
                continue
            scores[block, : best.shape[1]], rows[block, : best.shape[1]] = best.cpu(), found.cpu()
            start += size
        return scores, rows.masked_fill_(scores == -torch.inf, -1)

    def _block(self, queries, topk, keep, exclude, spare):
        count = min(topk + spare, len(self.exact))
        rough, rows = self._candidates(queries, count, keep, exclude)
        step = max(1, EXACT // count)
        parts = [self._rank(*part) for part in zip(queries.split(step), rough.split(step), rows.split(step))]
        scores, rows = (torch.cat(columns)[:, :topk] for columns in zip(*parts))
        if count < len(self.exact):  # is the k-th surely better than every row that is not a candidate?
            floor = scores[:, -1] - self._bound(queries, scores[:, -1])
            unsure = ((rough[:, -1] >= floor) & (rough[:, -1] > -torch.inf)).nonzero().flatten()
            if len(unsure):
                left_out = _rows(exclude, unsure.cpu())
                scores[unsure], rows[unsure] = self._block(queries[unsure], topk, keep, left_out, MORE) if spare < MORE else \
                    self._near(queries[unsure], topk, floor[unsure], keep, left_out)
        return scores, rows

    def _scores(self, queries, keep, exclude):
        """Yield (first row of a chunk, scores [Q, n] by the copy in memory), -inf for rows that are left out."""
        on_device = queries.to(self.device, self.chunks[0].dtype)
        start, exclude = 0, None if exclude is None else exclude.to(self.device)
        for chunk in self.chunks:
            scores = (chunk @ on_device[0])[None] if len(queries) == 1 else on_device @ chunk.T
            if keep is not None:
                scores.masked_fill_(~keep[start : start + len(chunk)].to(self.device), -torch.inf)
            if exclude is not None:
                here = ((exclude >= start) & (exclude < start + len(chunk))).nonzero().flatten()
                scores[here, exclude[here] - start] = -torch.inf
            yield start, scores
            start += len(chunk)

    def _candidates(self, queries, count, keep, exclude):
        """Return the `count` best rows by the copy in memory: (its scores float32 [Q, count], rows)."""
        best = rows = None
        for start, scores in self._scores(queries, keep, exclude):
            top, where = scores.topk(min(count, scores.shape[1]), sorted=True)
            top, where = top.float(), where + start
            if best is None:
                best, rows = top, where
            else:
                best, order = torch.cat([best, top], 1).topk(min(count, best.shape[1] + top.shape[1]))
                rows = torch.cat([rows, where], 1).gather(1, order)
        return best.to(queries.device), rows.to(queries.device)

    def _rank(self, queries, rough, rows):
        """Sort the candidates by exact scores, in float64 where float32 scores are too close."""
        rows, by_row = rows.sort(dim=1)
        rough = rough.gather(1, by_row)
        found = self.exact[rows.flatten()].float().view(*rows.shape, -1)
        scores = torch.bmm(found, queries[:, :, None])[:, :, 0].masked_fill(rough == -torch.inf, -torch.inf)
        ordered, order = scores.sort(dim=1, descending=True, stable=True)
        close = ((ordered[:, :-1] - ordered[:, 1:]) < CLOSE).any(1).nonzero().flatten()
        if len(close):
            fine = torch.bmm(found[close].double(), queries[close].double()[:, :, None])[:, :, 0]
            fine = fine.masked_fill(rough[close] == -torch.inf, -torch.inf)
            fine, order[close] = fine.sort(dim=1, descending=True, stable=True)
            ordered[close] = fine.float()
        return ordered, rows.gather(1, order)

    def _bound(self, queries, value):
        """Bound the difference between exact scores about `value` [Q] and those of the copy in memory, [Q].

        Cauchy-Schwarz on the rounding errors of both vectors, the rounding of the score, two float32 sums of D products.
        """
        summed = queries.shape[1] * 2**-23
        if self.dtype == torch.float32:
            return torch.full_like(value, summed)
        lost = (queries - queries.to(self.dtype).float()).norm(dim=1)
        return lost + self.error * (1 + lost) + (value.abs() + 2**-6) * torch.finfo(self.dtype).eps / 2 + summed

    def _near(self, queries, topk, floors, keep, exclude):
        """Rank, in float64, every row whose score by the copy in memory is at least `floors` [Q]: many are about as near."""
        best = queries.new_empty(len(queries), topk), torch.empty(len(queries), topk, dtype=torch.int64, device=queries.device)
        for i, (query, floor) in enumerate(zip(queries, floors)):
            near = [(scores[0].float() >= floor.to(self.device)).nonzero().flatten() + start
                    for start, scores in self._scores(query[None], keep, _rows(exclude, slice(i, i + 1)))]
            rows = torch.cat(near).to(queries.device)
            scores = torch.cat([self.exact[part].double() @ query.double() for part in rows.split(1 << 13)])
            scores, order = scores.sort(descending=True, stable=True)
            best[0][i], best[1][i] = scores[:topk], rows[order[:topk]]
        return best


def _rows(values, rows):
    return None if values is None else values[rows]


def merge_shards(parts, topk):
    """Merge the exact searches of several shards into one ranking, equal scores by row.

    parts: [(scores [Q, k], rows [Q, k]), ...] in order of the shards, rows numbered over all of them, -1 for none.
    """
    scores, rows = (torch.cat(columns, 1) for columns in zip(*parts))
    by_row = rows.masked_fill(rows < 0, torch.iinfo(torch.int64).max).argsort(1)
    scores, rows = scores.gather(1, by_row), rows.gather(1, by_row)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :topk], rows.gather(1, order)[:, :topk]


def fast_dtype(device):
    """Return the type whose product is several times faster on `device` than that of float32, or float32 if there is none.

    float16 on the tensor cores of a GPU, where it rounds eight times finer than bfloat16; bfloat16 on a CPU with AMX.
    """
    if device.type == "cuda":
        return torch.float16 if torch.cuda.get_device_capability(device)[0] >= 7 else torch.float32
    return torch.bfloat16 if getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16") else torch.float32


@contextmanager
def exact_products():
    """Multiply in full precision on a GPU: float32 without TF32, which rounds factors to 10 bits, and sums in float32.

    Training and other libraries switch TF32 on for the whole process; what was set is set again at the end. Also a decorator.
    """
    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    try:
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in zip(names, before):
            setattr(matmul, name, value)
