"""Error analysis of an evaluation: worst queries, confused identities, likely label errors.

All functions take and return tensors and row numbers. A gallery image counts for a query if `reid.retrieval.metrics.evaluate`
ranks it: it is not junk and, in the market protocol, not of the query's identity and camera.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from reid.retrieval.metrics import EvalResult, RocResult
from reid.retrieval.protocol import blocks, make_task

UNLIKE = 0.1  # two images of one person look different if this share of the pairs of different people has a higher cosine


class Extremes(NamedTuple):
    """The most similar pairs. Scores are float32 cosines, -inf where there is no such pair; rows are int64."""

    right: Tensor  # [Q], best match of each query
    right_row: Tensor  # [Q], row of the gallery
    wrong: Tensor  # [Q], best image of another identity
    wrong_row: Tensor  # [Q], row of the gallery
    own: Tensor  # [G], best query that the gallery image is a match of
    own_row: Tensor  # [G], row of the queries
    own_pairs: Tensor  # int64 [G], number of such queries


class Confusion(NamedTuple):
    """An image of identity `taken_for` ranks first for `count` of the `queries` of identity `pid`.

    back: the same number with the two identities exchanged. query, image: rows of the most similar pair.
    """

    pid: int
    taken_for: int
    count: int
    queries: int
    back: int
    query: int
    image: int


def extremes(*data, protocol="market") -> Extremes:
    """Find the most similar pairs in one pass over all pairs. data: as in `reid.retrieval.metrics.evaluate`."""
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
        highest = score == own[col]
        own_row[col[highest]] = row[highest]
        own_pairs += torch.bincount(col, minlength=len(own))
        start += len(block)
    return Extremes(*(torch.cat(part).cpu() for part in zip(*parts)), own.cpu(), own_row.cpu(), own_pairs.cpu())


def worst_queries(result: EvalResult, count: int) -> list[int]:
    """Return the rows of the valid queries with the lowest AP, lowest first; equal ones keep their order."""
    order = result.ap.nan_to_num(torch.inf).argsort(stable=True)
    return order[: min(count, result.valid)].tolist()


def ranked_rows(scores: Tensor, counts: Tensor, shown: int, ignored: int) -> Tensor:
    """Return int64 rows, best first: the `shown` best that count and the `ignored` best that do not.

    scores: float32 [G]; counts: bool [G].
    """
    order = scores.sort(descending=True, stable=True).indices
    counts = counts[order]
    return order[torch.where(counts, counts.cumsum(0) <= shown, (~counts).cumsum(0) <= ignored)]


def confusions(found: Extremes, result: EvalResult, q_pids: Tensor, g_pids: Tensor) -> tuple[list[Confusion], int, int]:
    """Count how often an image of one identity ranks first for a query of another.

    Returns the pairs of identities, most frequent first, each in its more frequent direction; the number of queries with a
    wrong first rank; and how many of these have a distractor there.
    """
    q_pids, g_pids = q_pids.cpu(), g_pids.cpu()
    people = q_pids[result.reason == 0]
    groups, distractors = defaultdict(list), 0
    erring = (result.first_rank > 1).nonzero()[:, 0].tolist()
    for query in erring:
        pid, other = int(q_pids[query]), int(g_pids[found.wrong_row[query]])
        if other > 0:
            groups[pid, other].append(query)
        else:
            distractors += 1
    pairs = []
    for (pid, other), rows in groups.items():
        back = len(groups.get((other, pid), ()))
        if (back, other) < (len(rows), pid):
            query = max(rows, key=lambda row: float(found.wrong[row]))
            pairs.append(Confusion(pid, other, len(rows), int((people == pid).sum()), back, query, int(found.wrong_row[query])))
    pairs.sort(key=lambda pair: (-pair.count - pair.back, -pair.count, -float(found.wrong[pair.query])))
    return pairs, len(erring), distractors


def level(roc: RocResult, share: float) -> float:
    """Return the cosine that `share` of the pairs of different people exceed, to the width of a bin of the histogram."""
    above = roc.different_histogram.flip(0).cumsum(0).flip(0) / roc.different_pairs
    return float(roc.edges[int((above > share).sum())])


def similar_strangers(found: Extremes, result: EvalResult, roc: RocResult) -> tuple[Tensor, float]:
    """Find queries for which an image of another identity is more similar than it should be.

    Its cosine exceeds the threshold at false accept rate 1e-4, and the query's best match by the margin between the
    thresholds at 1e-4 and 1e-2. Returns the rows of the queries, int64, most suspicious first, and the margin.
    """
    margin = roc.threshold[1e-4] - roc.threshold[1e-2]
    excess = found.wrong - found.right
    rows = ((result.reason == 0) & (found.wrong > roc.threshold[1e-4]) & (excess > margin)).nonzero()[:, 0]
    return rows[excess[rows].argsort(descending=True, stable=True)], margin


def dissimilar_matches(found: Extremes, roc: RocResult) -> tuple[Tensor, float]:
    """Find gallery images that match two or more queries by label and none of them by appearance (`level` at UNLIKE).

    Returns their rows, int64, most suspicious first, and the level.
    """
    limit = level(roc, UNLIKE)
    rows = ((found.own_pairs > 1) & (found.own < limit)).nonzero()[:, 0]
    return rows[found.own[rows].argsort(stable=True)], limit
