"""Rows and indexes of random embeddings, an exact search to compare with, and equality of evaluations."""

import torch
import torch.nn.functional as F

from reid.data.datasets import make_records
from reid.retrieval.index import GalleryIndex


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


def same(a, b):
    """Whether two EvalResults are equal."""
    return (a.mAP, a.mAP_trapezoid, a.mINP, a.rank) == (b.mAP, b.mAP_trapezoid, b.mINP, b.rank) and torch.equal(
        a.first_rank, b.first_rank) and torch.equal(a.ap.nan_to_num(-1), b.ap.nan_to_num(-1))
