"""Exact nearest neighbours by cosine: a fast bf16 product finds candidates, exact products rank them, a bound proves it."""

import torch

CHUNK = 1 << 17  # rows of the gallery whose scores are in memory at once
QUERIES = 256  # queries at once
SPARE = 24  # candidates beyond topk
CLOSE = 1e-6  # float32 scores nearer than this are compared again in float64


class ExactSearch:
    """Search of one gallery, made ready once. embeddings: float32 or float16 [N, D] of norm 1 (may be memory-mapped).

    Where the processor multiplies bf16 (AMX, AVX512-BF16, CUDA) a bf16 copy is kept, half of float32, else a float32 one.
    """

    def __init__(self, embeddings, device="cpu"):
        self.exact, self.device = embeddings, torch.device(device)
        self.fast = fast_bf16(self.device)
        copies = [part.float() for part in embeddings.split(CHUNK)]
        self.error = 0.0
        if self.fast:
            for i, part in enumerate(copies):
                copies[i] = part.bfloat16()
                self.error = max(self.error, (part - copies[i].float()).norm(dim=1).max().item() if len(part) else 0.0)
        self.chunks = [part.to(self.device) for part in copies]

    def search(self, embeddings, topk, keep=None, exclude=None):
        """(scores float32 [Q, k], rows int64 [Q, k]), best first, equal scores by row; -inf and -1 where rows run out.

        embeddings: float32 [Q, D]. keep: bool [N], rows that may be found. exclude: list of Q lists of rows to leave out.
        The order is that of float64 products.
        """
        results = [self._block(embeddings[i : i + QUERIES].float(), topk, keep, exclude and exclude[i : i + QUERIES])
                   for i in range(0, len(embeddings), QUERIES)]
        if not results:
            return torch.empty(0, topk), torch.empty(0, topk, dtype=torch.int64)
        return torch.cat([scores for scores, _ in results]), torch.cat([rows for _, rows in results])

    def _block(self, queries, topk, keep, exclude):
        if not len(self.exact):
            return torch.full((len(queries), topk), -torch.inf), torch.full((len(queries), topk), -1)
        rough, rows = self._candidates(queries, min(topk + SPARE, len(self.exact)), keep, exclude)
        scores, rows = self._rank(queries, rough, rows)
        short = rows.shape[1] < len(self.exact)
        if short:  # is the k-th surely better than everything that is no candidate?
            sure = scores[:, min(topk, scores.shape[1]) - 1] > rough[:, -1] + self._bound(queries, rough[:, -1])
            for i in (~sure & (rough[:, -1] > -torch.inf)).nonzero().flatten().tolist():
                best = self._all(queries[i], keep, exclude and exclude[i], topk)
                scores[i, :topk], rows[i, :topk] = best
        scores, rows = scores[:, :topk], rows[:, :topk]
        missing = topk - scores.shape[1]
        if missing > 0:
            scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
            rows = torch.nn.functional.pad(rows, (0, missing), value=-1)
        return scores.contiguous(), rows.masked_fill(scores == -torch.inf, -1)

    def _candidates(self, queries, count, keep, exclude):
        """The `count` best rows by the resident copy: (its scores float32 [Q, count], rows)."""
        on_device = queries.to(self.device, torch.bfloat16 if self.fast else torch.float32)
        best, rows, start = None, None, 0
        for chunk in self.chunks:
            scores = on_device @ chunk.T
            if keep is not None:
                scores.masked_fill_(~keep[start : start + len(chunk)].to(self.device), -torch.inf)
            for i, left_out in enumerate(exclude or ()):
                scores[i, [row - start for row in left_out if start <= row < start + len(chunk)]] = -torch.inf
            top, where = scores.topk(min(count, len(chunk)), sorted=True)
            top, where = top.float(), where + start
            if best is None:
                best, rows = top, where
            else:
                best, order = torch.cat([best, top], 1).topk(min(count, best.shape[1] + top.shape[1]))
                rows = torch.cat([rows, where], 1).gather(1, order)
            start += len(chunk)
        return best.cpu(), rows.cpu()

    def _rank(self, queries, rough, rows):
        """Exact scores of the candidates, sorted; in float64 where float32 cannot tell them apart."""
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
        """How far the resident copy's score may be from the exact one, [Q]: Cauchy-Schwarz on what rounding took away."""
        if not self.fast:
            return torch.full((len(queries),), 2e-6)
        lost = (queries - queries.bfloat16().float()).norm(dim=1)
        return lost + self.error * (1 + lost) + value.abs() * 2**-8 + 1e-5

    def _all(self, query, keep, exclude, topk):
        """One query against every row in float64."""
        scores = torch.cat([part.double() @ query.double() for part in self.exact.split(CHUNK)])
        if keep is not None:
            scores[~keep] = -torch.inf
        scores[list(exclude or ())] = -torch.inf
        best, order = scores.sort(descending=True, stable=True)
        return best[:topk].float(), order[:topk]


def fast_bf16(device):
    """Whether a bf16 product is several times faster than a float32 one there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))
