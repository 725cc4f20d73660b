"""Why a run errs: who is taken for whom, which queries rank worst, which labels look wrong. Tensors in, row numbers out.

A pair that counts is what `reid.retrieval.metrics.evaluate` ranks: no junk and, in the market protocol, no image of the query's
identity from the query's own camera.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from reid.retrieval.metrics import EvalResult, RocResult
from reid.retrieval.ranking import blocks, make_task

UNLIKE = 0.1  # share of strangers' pairs above the cosine below which two images of one person look like strangers


class Extremes(NamedTuple):
    """Of each query the most alike image that is right and that is wrong; of each gallery image its most alike query of
    the same identity. Scores are cosines, float32, -inf where there is no such pair; rows are int64."""

    right: Tensor  # [Q]
    right_row: Tensor  # [Q], row of the gallery
    wrong: Tensor
    wrong_row: Tensor
    own: Tensor  # [G], same identity, another camera
    own_row: Tensor  # [G], row of the queries
    own_pairs: Tensor  # int64 [G], number of such pairs


class Confusion(NamedTuple):
    """`count` of the `queries` of identity `pid` have an image of identity `taken_for` in the first place; `back` of the
    other identity's queries are wrong the other way round. `query` and `image` are the rows of the most alike example."""

    pid: int
    taken_for: int
    count: int
    queries: int
    back: int
    query: int
    image: int


class Suspect(NamedTuple):
    """A pair whose labels and looks disagree: rows of the query, the image and, or -1, the query's best true match."""

    query: int
    image: int
    score: float
    best: int
    best_score: float


def extremes(*data, protocol="market") -> Extremes:
    """One pass over all pairs, in blocks of queries; `data` as in `reid.retrieval.metrics.evaluate`."""
    task = make_task(*data, protocol=protocol)
    gallery = task.gallery()
    own = torch.full((len(task.g.pids),), -torch.inf, device=gallery.device)
    own_row, own_pairs = torch.full_like(task.g.pids, -1), torch.zeros_like(task.g.pids)
    parts, start = [], 0
    for _, block, rows, cols, kind in blocks(task, [gallery]):
        block = block.clone()
        same, score = kind == 0, block[rows, cols]
        block[rows, cols] = -torch.inf
        wrong, wrong_row = block.max(1)
        block.fill_(-torch.inf)[rows[same], cols[same]] = score[same]
        right, right_row = block.max(1)
        parts.append((right, gallery[right_row], wrong, gallery[wrong_row]))
        row, col, score = rows[same] + start, gallery[cols[same]], score[same]
        own.scatter_reduce_(0, col, score, "amax")
        record = score == own[col]
        own_row[col[record]] = row[record]
        own_pairs += torch.bincount(col, minlength=len(own))
        start += len(block)
    return Extremes(*(torch.cat(part).cpu() for part in zip(*parts)), own.cpu(), own_row.cpu(), own_pairs.cpu())


def worst_queries(result: EvalResult, count: int) -> list[int]:
    """Rows of the valid queries with the lowest AP, lowest first; equal ones in their order."""
    order = result.ap.nan_to_num(torch.inf).argsort(stable=True)
    return order[: min(count, result.valid)].tolist()


def ranked_rows(scores: Tensor, counts: Tensor, shown: int, ignored: int) -> list[int]:
    """The `shown` best gallery rows that count and the `ignored` best that do not, best first.

    scores: float32 [G]; counts: bool [G]."""
    rows = torch.arange(len(scores), device=scores.device)
    best = [rows[kind][scores[kind].sort(descending=True, stable=True).indices[:number]]
            for kind, number in ((counts, shown), (~counts, ignored))]
    rows = torch.cat(best)
    return rows[scores[rows].sort(descending=True, stable=True).indices].tolist()


def confusions(found: Extremes, result: EvalResult, q_pids: Tensor, g_pids: Tensor) -> tuple[list[Confusion], int, int]:
    """Pairs of identities by how often one is taken for the other in the first place; then the number of queries with a wrong
    first place, and how many of these have a distractor there."""
    erring = (result.first_rank > 1).nonzero()[:, 0]
    pids, taken = q_pids.cpu()[erring], g_pids.cpu()[found.wrong_row[erring]]
    known = taken > 0
    erring, pairs = erring[known], torch.stack([pids, taken], 1)[known]
    pairs, group, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)
    people = q_pids.cpu()[result.reason == 0]
    table = {tuple(pair): count for pair, count in zip(pairs.tolist(), counts.tolist())}
    listed = []
    for number, ((pid, other), count) in enumerate(table.items()):
        rows = erring[group == number]
        query = int(rows[found.wrong[rows].argmax()])
        listed.append(Confusion(pid, other, count, int((people == pid).sum()), table.get((other, pid), 0), query,
                                int(found.wrong_row[query])))
    listed.sort(key=lambda c: (-c.count - c.back, -c.count, -float(found.wrong[c.query])))
    named = {(c.pid, c.taken_for): place for place, c in enumerate(listed)}
    listed = [c for place, c in enumerate(listed) if named.get((c.taken_for, c.pid), place) >= place]  # one of two directions
    return listed, len(known), int((~known).sum())


def level(roc: RocResult, share: float) -> float:
    """The cosine that `share` of the pairs of strangers exceed, to the width of a bin of the histogram."""
    above = roc.different_histogram.flip(0).cumsum(0).flip(0) / roc.different_pairs
    return float(roc.edges[int((above > share).sum())])


def alike_strangers(found: Extremes, result: EvalResult, roc: RocResult, count: int) -> tuple[list[Suspect], int, float]:
    """Two ids, one look: the queries whose most alike wrong image is above the threshold at false-match rate 1e-4 and
    above their best true match by the margin between the thresholds at 1e-4 and 1e-2. (worst, number of all, margin)"""
    margin = roc.threshold[1e-4] - roc.threshold[1e-2]
    excess = found.wrong - found.right
    rows = ((result.reason == 0) & (found.wrong > roc.threshold[1e-4]) & (excess > margin)).nonzero()[:, 0]
    rows = rows[excess[rows].argsort(descending=True, stable=True)]
    listed = [Suspect(q, int(found.wrong_row[q]), float(found.wrong[q]), int(found.right_row[q]), float(found.right[q]))
              for q in rows[:count].tolist()]
    return listed, len(rows), margin


def unlike_images(found: Extremes, roc: RocResult, count: int) -> tuple[list[Suspect], int, float]:
    """One id, two looks: the gallery images with two or more queries of their identity in other cameras, none of which
    is more alike than strangers are (`level` at UNLIKE). (worst, number of all, level)"""
    limit = level(roc, UNLIKE)
    rows = ((found.own_pairs > 1) & (found.own < limit)).nonzero()[:, 0]
    rows = rows[found.own[rows].argsort(stable=True)]
    return [Suspect(int(found.own_row[g]), g, float(found.own[g]), -1, 0.0) for g in rows[:count].tolist()], len(rows), limit
