"""Exact nearest neighbours by cosine: a fast bf16 product finds candidates, exact products rank them, a bound proves it.

Tensors only. `ExactSearch` searches one gallery; `merge_shards` joins the results of several.
"""

import torch

CHUNK = {"cpu": 1 << 15, "cuda": 1 << 20}  # rows of the gallery whose scores are in memory together
QUERIES = 256  # queries searched together
SPARE, MORE = 24, 512  # candidates beyond topk, and beyond topk where that many are about as near as the k-th
EXACT = 1024  # candidates whose embeddings are in memory together: 4 MiB, which still are in the cache when multiplied
CLOSE = 1e-6  # float32 scores nearer than this are compared again in float64


class ExactSearch:
    """Exact search of one gallery. embeddings: float32 or float16 [N, D] of norm 1 (may be memory-mapped).

    Keeps a copy in memory: bf16 where the processor multiplies it fast (AMX, CUDA), else float32.
    """

    def __init__(self, embeddings, device="cpu"):
        self.exact, self.device = embeddings, torch.device(device)
        self.fast = fast_bf16(self.device)
        if self.device.type == "cuda":  # partial sums in bf16 would break the bound
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.chunks, self.error = [], 0.0
        for part in embeddings.split(CHUNK[self.device.type]):
            part = copy = part.float()
            if self.fast and len(part):
                copy = part.bfloat16()
                self.error = max(self.error, (part - copy.float()).norm(dim=1).max().item())
            self.chunks.append(copy.to(self.device))

    def search(self, embeddings, topk, keep=None, exclude=None):
        """Return (scores float32 [Q, topk], rows int64 [Q, topk]), best first; -inf and -1 where rows run out.

        embeddings: float32 [Q, D] of norm 1. keep: bool [N], rows that may be found. exclude: list of Q lists of rows to
        leave out. The order is that of float64 products, and equal scores are ordered by row.
        """
        scores = torch.full((len(embeddings), topk), -torch.inf)
        rows = torch.full((len(embeddings), topk), -1)
        for start in range(0, len(embeddings) if len(self.exact) else 0, QUERIES):
            block = slice(start, start + QUERIES)
            best, found = self._block(embeddings[block].float(), topk, keep, exclude and exclude[block], SPARE)
            scores[block, : best.shape[1]], rows[block, : best.shape[1]] = best, found
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
                left_out = exclude and [exclude[i] for i in unsure.tolist()]
                scores[unsure], rows[unsure] = self._block(queries[unsure], topk, keep, left_out, MORE) if spare < MORE else \
                    self._near(queries[unsure], topk, floor[unsure], keep, left_out)
        return scores, rows

    def _scores(self, queries, keep, exclude):
        """Yield (first row of a chunk, scores [Q, n] by the copy in memory), -inf for rows that are left out."""
        on_device = queries.to(self.device, self.chunks[0].dtype)
        out, start = [(i, row) for i, rows in enumerate(exclude or ()) for row in rows], 0
        query, row = torch.tensor(out, dtype=torch.int64, device=self.device).view(-1, 2).T
        for chunk in self.chunks:
            scores = (chunk @ on_device[0])[None] if len(queries) == 1 else on_device @ chunk.T
            if keep is not None:
                scores.masked_fill_(~keep[start : start + len(chunk)].to(self.device), -torch.inf)
            if out:
                here = (row >= start) & (row < start + len(chunk))
                scores[query[here], row[here] - start] = -torch.inf
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
        return best.cpu(), rows.cpu()

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

        Cauchy-Schwarz on the rounding errors of both vectors, half a bf16 step of the score, two float32 sums of D products.
        """
        summed = queries.shape[1] * 2**-23
        if not self.fast:
            return torch.full_like(value, summed)
        lost = (queries - queries.bfloat16().float()).norm(dim=1)
        return lost + self.error * (1 + lost) + (value.abs() + 2**-6) * 2**-8 + summed

    def _near(self, queries, topk, floors, keep, exclude):
        """Rank, in float64, every row whose score by the copy in memory is at least `floors` [Q]: many are about as near."""
        best = torch.empty(len(queries), topk), torch.empty(len(queries), topk, dtype=torch.int64)
        for i, (query, floor) in enumerate(zip(queries, floors)):
            rows = torch.cat([(scores[0].float() >= floor).nonzero().flatten() + start
                              for start, scores in self._scores(query[None], keep, exclude and exclude[i : i + 1])]).cpu()
            scores = torch.cat([self.exact[part].double() @ query.double() for part in rows.split(1 << 13)])
            scores, order = scores.sort(descending=True, stable=True)
            best[0][i], best[1][i] = scores[:topk], rows[order[:topk]]
        return best


def merge_shards(parts, topk):
    """Merge the exact searches of several shards into one ranking, equal scores by row.

    parts: [(scores [Q, k], rows [Q, k]), ...] in order of the shards, rows numbered over all of them, -1 for none.
    """
    scores, rows = (torch.cat(columns, 1) for columns in zip(*parts))
    by_row = rows.masked_fill(rows < 0, torch.iinfo(torch.int64).max).argsort(1)
    scores, rows = scores.gather(1, by_row), rows.gather(1, by_row)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :topk], rows.gather(1, order)[:, :topk]


def fast_bf16(device):
    """Whether a bf16 product on `device` is several times faster than a float32 one."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))
