"""Rank-k (CMC), mAP, mINP and TAR@FAR of queries against a gallery: exact, in blocks of queries, on the device of the inputs.

Tensors only. `evaluate`, `camera_table`, `single_shot` and `roc` take the same arguments, see `evaluate`. Only the matches are
ranked: each row of scores is sorted by value alone (several times cheaper than an argsort), a binary search counts the
gallery images that score higher than a match, and the few that do not count for the query (its own camera, its own file)
are subtracted.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reid import ReidError
from reid.retrieval.protocol import Task, blocks, make_task, refuse_nan

REASONS = (  # why a query is not averaged in; `EvalResult.reason` holds positions in here
    "valid",
    "its id is junk (-1) or a distractor (0)",
    "no image of its id in the gallery",
    "all images of its id are from its own camera",
    "the only image of its id is its own file",
)


@dataclass(frozen=True)
class EvalResult:
    """Means over the valid queries (fractions, not percent) and the values of every query, on the CPU.

    rank: {k: Rank-k}. cmc, match_rate: float64 [K], element k-1 belongs to k; K is 20 or the largest of `ks`. cmc: share of
    queries with a match within the first k; match_rate: share whose k-th image is a match (a gallery shorter than k has
    none there). skipped: {reason: number of queries}. ap, inp: float64 [Q], NaN for a skipped query; first_rank: int64 [Q],
    rank of the first match from 1, 0 for a skipped query; matches: int64 [Q]; reason: int64 [Q], position in REASONS.
    """

    mAP: float
    mAP_trapezoid: float
    mINP: float
    rank: dict[int, float]
    cmc: Tensor
    match_rate: Tensor
    valid: int
    skipped: dict[str, int]
    ap: Tensor
    inp: Tensor
    first_rank: Tensor
    matches: Tensor
    reason: Tensor


class RocResult(NamedTuple):
    """`tpr` and `threshold` map a false accept rate (FAR) to the share of same-id pairs accepted (TAR) and to the score
    above which (not at which) a pair is accepted: the lowest score with at most that share of different-id pairs above it.
    Histograms: int64 [bins], numbers of pairs between `edges` [bins + 1]; scores beyond the edges count in the end bins."""

    tpr: dict[float, float]
    threshold: dict[float, float]
    same_pairs: int
    different_pairs: int
    edges: Tensor
    same_histogram: Tensor
    different_histogram: Tensor


class CameraTable(NamedTuple):
    """cameras: sorted ids [C]. The rest is [C, C], query camera x gallery camera: mAP, rank1: float64, NaN where no query is
    valid; queries: int64, number of valid ones."""

    cameras: list[int]
    mAP: Tensor
    rank1: Tensor
    queries: Tensor


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def evaluate(q_emb, g_emb, q_pids, q_camids, g_pids, g_camids, q_ids=None, g_ids=None, *, scores=None,
             protocol="market", ks=(1, 5, 10, 20), block=None) -> EvalResult:
    """Rank the gallery for every query and average CMC, match rate, mAP (standard and trapezoid) and mINP.

    q_emb, g_emb: float32 [Q, D], [G, D], L2-normalised; a score is their dot product, higher is better.
    q_pids, q_camids, g_pids, g_camids: int64 [Q], [G]; camera -1 is unknown. q_ids, g_ids: int64 numbers of the files,
    for a gallery that holds the queries themselves. scores: used instead of the embeddings (then None), float32
    [Q, G] or a callable(start, stop) -> [stop - start, G] for a block of queries; pass a distance negated.
    protocol "market" (Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015): pid -1 in the gallery
    is junk and left out, 0 is a distractor and always wrong, images with the query's pid and camera are left out, and
    so is the query's own file. "viper" and "prid", whose splits `random_splits` draws, have the same rules. "nocam": only
    junk and the own file are left out. Equal scores rank in gallery order.
    block: queries ranked together; extra memory is about 4 float32 copies of [block, G] on the CPU, 8 on CUDA.

    mAP averages precision at each match. mAP_trapezoid is the area of Market-1501's own evaluation code: at each match
    the mean of the precision there and just before; never above the standard AP, at most 1/4 below. mINP (Ye et al.,
    Deep Learning for Person Re-identification: A Survey and Outlook, TPAMI 2021): matches / rank of the last match.
    Raises ReidError if no query is valid, for NaN, and for shapes that do not fit together.
    """
    task = make_task(q_emb, g_emb, q_pids, q_camids, g_pids, g_camids, q_ids, g_ids, scores, protocol, block)
    return _summary(task, _rank(task, [task.gallery()], max(20, *ks))[0], ks)


def pooled(results: list[EvalResult]) -> EvalResult:
    """Average the results of splits with equally many queries; the values of every query follow each other, split by split."""
    columns = {name: [getattr(result, name) for result in results] for name in vars(results[0])}
    means = {name: sum(columns[name]) / len(results) for name in ("mAP", "mAP_trapezoid", "mINP", "cmc", "match_rate")}
    joined = {name: torch.cat(columns[name]) for name in ("ap", "inp", "first_rank", "matches", "reason")}
    rank = {k: sum(ranks[k] for ranks in columns["rank"]) / len(results) for k in results[0].rank}
    skipped = sum(map(Counter, columns["skipped"]), Counter())
    return EvalResult(**means, **joined, rank=rank, valid=sum(columns["valid"]), skipped=dict(skipped))


def camera_table(*data, **options) -> CameraTable:
    """Compute mAP and Rank-1 of the queries of each camera against the gallery of each camera; arguments as in `evaluate`."""
    task = make_task(*data, **options)
    cameras = torch.cat([task.q.camids, task.g.camids]).unique().tolist()
    tables = _rank(task, [((task.g.pids >= 0) & (task.g.camids == c)).nonzero()[:, 0] for c in cameras])
    of_camera = torch.stack([task.q.camids.cpu() == c for c in cameras]).double()
    columns = []
    for table in tables:
        valid = table["ap"].isfinite()
        values = torch.stack([valid.double(), table["ap"].where(valid, 0), (table["first"] == 1).double()], 1)
        columns.append(of_camera @ values)
    queries, ap, rank1 = torch.stack(columns, 1).unbind(2)
    return CameraTable(cameras, ap / queries, rank1 / queries, queries.long())


def single_shot(*data, repeats=10, seed=0, ks=(1, 5, 10, 20), **options) -> dict[str, tuple[float, float]]:
    """Average over `repeats` galleries with one random image of each pid and camera (and all distractors).

    Returns {"mAP", "mINP", "rank1", ...: (mean, standard deviation)}; other arguments as in `evaluate`.
    """
    task, generator = make_task(*data, **options), torch.Generator().manual_seed(seed)
    keep = task.gallery()
    pids, camids = task.g.pids[keep], task.g.camids[keep]
    alone = torch.arange(1, len(keep) + 1, device=keep.device).where(pids == 0, 0)  # distractors are not one identity
    group = torch.stack([pids, camids, alone]).unique(dim=1, return_inverse=True)[1]
    galleries = []
    for _ in range(repeats):
        lot = torch.randperm(len(keep), generator=generator).to(keep.device)
        winner = torch.full_like(lot, len(keep)).scatter_reduce(0, group, lot, "amin")
        galleries.append(keep[lot == winner[group]])
    runs = [_summary(task, table, ks) for table in _rank(task, galleries, max(20, *ks))]
    values = {"mAP": [r.mAP for r in runs], "mINP": [r.mINP for r in runs]}
    values |= {f"rank{k}": [r.rank[k] for r in runs] for k in ks}
    return {name: (float(np.mean(v)), float(np.std(v))) for name, v in values.items()}


def roc(*data, rates=(1e-4, 1e-3, 1e-2), bins=200, **options) -> RocResult:
    """Compute TAR@FAR over all pairs of a labelled query and a gallery image that counts for it, and score histograms.

    Arguments as in `evaluate`; rates: false accept rates. Histograms cover -1 to 1. Exact: the
    highest different-id scores are kept, as many as the largest rate needs (4 bytes each, at most twice that number).
    Raises ReidError without pairs of both kinds.
    """
    task = make_task(*data, **options)
    gallery = task.gallery()
    has_id = (task.q.pids > 0).split(task.block)
    kept = int(max(rates) * len(gallery) * int((task.q.pids > 0).sum())) + 1
    top, same, floor, pairs = task.q.pids.new_empty(0, dtype=torch.float32), [], -torch.inf, 0
    everything = listed = 0
    for use, (_, block, rows, cols, kind) in zip(has_id, blocks(task, [gallery])):
        refuse_nan(block)
        score = block[rows, cols]
        same.append(score[kind == 0])
        wanted = use[rows]
        everything += _histogram(block[use], bins)
        listed += _histogram(score[wanted], bins)
        pairs += int(use.sum()) * block.shape[1] - int(wanted.sum())
        different = block.index_put((rows, cols), score.new_tensor(-torch.inf))[use].view(-1)
        top = torch.cat([top, different[different > floor]])
        if len(top) > 2 * kept:
            top = top.topk(kept).values
            floor = float(top[-1])
    same = torch.cat(same)
    if not len(same) or not pairs:
        raise ReidError(f"no ROC: {len(same)} same-id and {pairs} different-id pairs; both kinds are needed")
    top = top.sort(descending=True).values
    threshold = {rate: float(top[int(rate * pairs)]) if rate * pairs < len(top) else -torch.inf for rate in rates}
    tpr = {rate: float((same > score).double().mean()) for rate, score in threshold.items()}
    return RocResult(tpr, threshold, len(same), pairs, torch.linspace(-1, 1, bins + 1), _histogram(same, bins).cpu(),
                     (everything - listed).cpu())


def _histogram(values: Tensor, bins: int) -> Tensor:
    # histc counts in float32, which is exact up to 2^24
    return sum(torch.histc(part.clamp(-1, 1), bins, -1, 1).long() for part in values.reshape(-1).split(1 << 24))


def bootstrap(result: EvalResult, other: EvalResult | None = None, *, repeats=1000, level=0.95,
              seed=0) -> dict[str, Interval]:
    """Estimate percentile confidence intervals over resampled valid queries: {"mAP", "rank1": Interval}.

    With `other` (another run on the same queries) the interval is of the paired difference, result minus other,
    over the queries valid in both: the runs differ where it leaves out 0.
    """
    values = torch.stack([result.ap, (result.first_rank == 1).double()], 1)
    if other is not None:
        if len(other.ap) != len(result.ap):
            raise ReidError(f"runs with {len(result.ap)} and {len(other.ap)} queries do not pair: use the same queries")
        values = values - torch.stack([other.ap, (other.first_rank == 1).double()], 1)
    values = values[values[:, 0].isfinite()]
    if not len(values):
        raise ReidError("no query is valid in both runs: nothing to compare")
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([values[torch.randint(len(values), (len(values),), generator=generator)].mean(0)
                         for _ in range(repeats)])
    low, high = (means.quantile(q, dim=0).tolist() for q in ((1 - level) / 2, (1 + level) / 2))
    return {name: Interval(*numbers) for name, *numbers in zip(("mAP", "rank1"), values.mean(0).tolist(), low, high)}


def pool_queries(emb: Tensor, pids: Tensor, camids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Average float32 [N, D] embeddings over tracklets (same pid and camera) and normalise them again (multi-query).

    Returns embeddings [M, D], pids [M], camids [M] and the pooled row of each image, int64 [N]. Images without an id
    (pid -1 or 0) or without a camera (-1) stay alone.
    """
    alone = torch.arange(1, len(pids) + 1, device=pids.device).where((pids <= 0) | (camids < 0), 0)
    keys, group = torch.stack([pids, camids, alone], 1).unique(dim=0, return_inverse=True)
    pooled = emb.new_zeros(len(keys), emb.shape[1]).index_add_(0, group, emb)
    return torch.nn.functional.normalize(pooled, dim=1), keys[:, 0], keys[:, 1], group


def _sort_rows(block: Tensor) -> Tensor:
    if block.device.type != "cpu":
        return block.sort(dim=1).values
    # numpy sorts floats with SIMD, ten times faster than torch, but on one thread
    rows = block.numpy()
    out = np.empty_like(rows, order="C")
    threads = min(torch.get_num_threads(), len(rows))

    def sort(part):
        out[part] = rows[part]
        out[part].sort(axis=1)

    edges = np.linspace(0, len(rows), threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(sort, map(slice, edges[:-1], edges[1:])))
    return torch.from_numpy(out)


def _places(block: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return the rank of entries (rows, cols) in their row, from 1, sorted by score descending, equal scores by column."""
    if not len(rows):
        return rows
    ordered = _sort_rows(block)
    refuse_nan(ordered[:, -1])  # where NaN sorts to
    score = block[rows, cols]
    count = torch.bincount(rows, minlength=len(block))
    slot = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    table = score.new_full((len(block), int(count.max())), torch.inf)
    table[rows, slot] = score
    up_to = torch.searchsorted(ordered, table, right=True)[rows, slot]  # entries that score no higher, itself included
    place = block.shape[1] - up_to + 1
    tied = (up_to > 1) & (ordered[rows, (up_to - 2).clamp(min=0)] == score)
    column = torch.arange(block.shape[1], device=rows.device)
    for part in tied.nonzero()[:, 0].split(len(block)):
        place[part] += ((block[rows[part]] == score[part, None]) & (column < cols[part, None])).sum(1)
    return place


def _rank_block(block: Tensor, rows: Tensor, cols: Tensor, kind: Tensor, depth: int) -> dict[str, Tensor]:
    """Rank the queries of a block: float64 [b] ap, trapezoid, inp (NaN without a match), int64 [b] first (0 without),
    int64 [b, 4] kinds (number of pairs of each kind); and int64 [1, depth + 1] hits, matches at each rank."""
    size, width = len(block), block.shape[1] + 1
    kinds = torch.bincount(rows * 4 + kind, minlength=size * 4).view(size, 4)
    key, order = (rows * width + _places(block, rows, cols)).sort()
    rows, ignored = rows[order], kind[order] > 0
    above = ignored.cumsum(0) - torch.cat([kinds.new_zeros(1), kinds[:, 1:].sum(1).cumsum(0)])[rows]
    rows, ranks = rows[~ignored], (key - rows * width - above)[~ignored]
    matches = kinds[:, 0]
    nth = torch.arange(1, len(rows) + 1, device=rows.device) - (matches.cumsum(0) - matches)[rows]

    def mean(values):
        return torch.zeros(size, dtype=torch.float64, device=rows.device).index_add_(0, rows, values) / matches

    ap = mean(nth / ranks.double())  # AP: mean of the precision at each match
    before = torch.where(ranks > 1, (nth - 1) / (ranks - 1).double(), 1.0)  # precision just before each match
    first = torch.zeros_like(matches).index_put_((rows[nth == 1],), ranks[nth == 1])
    last = torch.zeros_like(matches).index_put_((rows[nth == matches[rows]],), ranks[nth == matches[rows]])
    hits = torch.bincount(ranks[ranks <= depth], minlength=depth + 1)
    return {"ap": ap, "trapezoid": (ap + mean(before)) / 2, "inp": matches / last.double(), "first": first,
            "kinds": kinds, "hits": hits[None]}


def _rank(task: Task, galleries: list[Tensor], depth: int = 20) -> list[dict[str, Tensor]]:
    """Return the values of `_rank_block` for all queries, on the CPU, for each gallery; hits are added up to [depth + 1]."""
    parts = [[] for _ in galleries]
    for number, *block in blocks(task, galleries):
        parts[number].append(_rank_block(*block, depth))
    tables = [{name: torch.cat([part[name] for part in gallery]).cpu() for name in gallery[0]} for gallery in parts]
    return [table | {"hits": table["hits"].sum(0)} for table in tables]


def _summary(task: Task, table: dict[str, Tensor], ks) -> EvalResult:
    pids, kinds = task.q.pids.cpu(), table["kinds"]
    reason = torch.where(kinds[:, 1] > 0, 3, torch.where(kinds[:, 2] > 0, 4, 2))
    reason[kinds[:, 0] > 0] = 0
    reason[pids <= 0] = 1
    valid = int((reason == 0).sum())
    skipped = {text: int((reason == number).sum()) for number, text in enumerate(REASONS) if number}
    skipped = {text: count for text, count in skipped.items() if count}
    if not valid:
        why = ", ".join(f"{text}: {count}" for text, count in skipped.items())
        raise ReidError(f"none of the {len(pids)} queries can be evaluated ({why}): check that query and gallery "
                        "belong together" + ", or use the nocam protocol" * (3 in reason))
    match_rate = table["hits"][1:].double() / valid
    length = len(match_rate)
    first = torch.bincount(table["first"].clamp(max=length + 1), minlength=length + 2)[1:-1]
    cmc = first.double().cumsum(0) / valid
    means = (float(table[name][reason == 0].mean()) for name in ("ap", "trapezoid", "inp"))
    return EvalResult(*means, {k: float(cmc[k - 1]) for k in ks}, cmc, match_rate, valid, skipped, table["ap"],
                      table["inp"], table["first"], kinds[:, 0], reason)
