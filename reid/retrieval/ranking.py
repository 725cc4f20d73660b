"""Exact ranks of the matches of each query in a gallery, block by block of queries, on the device of the inputs.

Only the matches are ranked. Each row of scores is sorted by value alone (several times cheaper than an argsort), a
binary search tells how many gallery entries score higher than a match, and the few entries that do not count for the
query (its own camera, its own file) are subtracted. `reid.retrieval.metrics` makes the figures of it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reid import ReidError

PROTOCOLS = ("market", "nocam")


class Side(NamedTuple):
    """Labels of the queries or of the gallery, int64 [N] each."""

    pids: Tensor
    camids: Tensor
    ids: Tensor | None


class Task(NamedTuple):
    """What is ranked: see `reid.retrieval.metrics.evaluate` for the arguments."""

    scores: Callable[[int, int, int, int], Tensor]  # (first, last query, first, last column) -> float32 block
    q: Side
    g: Side
    own_camera: bool  # whether images from the query's own camera are ignored
    block: int

    def gallery(self) -> Tensor:
        """The columns of the gallery without junk, int64, ascending."""
        return (self.g.pids >= 0).nonzero()[:, 0]


def make_task(q_emb, g_emb, q_pids, q_camids, g_pids, g_camids, *, q_ids=None, g_ids=None, scores=None,
              protocol="market", block=None) -> Task:
    if protocol not in PROTOCOLS:
        raise ReidError(f"protocol {protocol!r} is unknown: choose one of {', '.join(PROTOCOLS)}")
    if (q_ids is None) != (g_ids is None):
        raise ReidError("file ids were given for one side only: pass both q_ids and g_ids, or neither")
    shape = (len(q_pids), len(g_pids))
    if 0 in shape:
        raise ReidError(f"{shape[0]} queries and {shape[1]} gallery images: there is nothing to evaluate")
    if callable(scores):
        given, device = shape, torch.as_tensor(g_pids).device
    elif scores is not None:
        given, device = tuple(scores.shape), scores.device
    else:
        given, device = (len(q_emb), len(g_emb)), g_emb.device
        if q_emb.shape[1:] != g_emb.shape[1:] or q_emb.dim() != 2:
            raise ReidError(f"embeddings are {tuple(q_emb.shape)} and {tuple(g_emb.shape)}: pass [N, D] with one D")
    if given != shape:
        raise ReidError(f"{given} queries and gallery images do not fit {shape} pids: pass equal numbers")

    ahead = None  # (low, high), first query and scores of the last product

    def product(start, stop, low, high):
        """Scores of embeddings. 64 MiB are multiplied at a time: on a CPU that takes half as long as block by block."""
        nonlocal ahead
        if not (ahead and ahead[0] == (low, high) and ahead[1] <= start and stop <= ahead[1] + len(ahead[2])):
            ahead = None  # before the next one is there
            last = max(stop, start + (1 << 24) // max(1, high - low))
            ahead = (low, high), start, q_emb[start:last] @ g_emb[low:high].T
        return ahead[2][start - ahead[1] : stop - ahead[1]]

    def source(start, stop, low, high):
        if scores is None:
            part = product(start, stop, low, high)
        elif not callable(scores):
            part = scores[start:stop, low:high]
        else:
            part = scores(start, stop)
            if part.shape != (stop - start, shape[1]):
                raise ReidError(f"scores({start}, {stop}) gave {tuple(part.shape)}, not ({stop - start}, {shape[1]})")
            part = part[:, low:high]
        if part.dtype != torch.float32:
            raise ReidError(f"embeddings or scores are {part.dtype}: pass float32")
        return part.detach()

    # Small blocks keep the buffers small; but below 64 queries the gallery is read from memory too often.
    block = block or max(64, (1 << 22 if device.type == "cpu" else 1 << 24) // max(1, shape[1]))
    q, g = _side("query", device, q_pids, q_camids, q_ids), _side("gallery", device, g_pids, g_camids, g_ids)
    return Task(source, q, g, protocol == "market", block)


def _side(name: str, device: torch.device, *labels) -> Side:
    labels = [None if values is None else torch.as_tensor(values, device=device).long() for values in labels]
    for what, values in zip(Side._fields, labels):
        if values is not None and values.shape != (len(labels[0]),):
            raise ReidError(f"{name} {what} have shape {tuple(values.shape)}: pass {len(labels[0])}, as pids")
    return Side(*labels)


class _Join:
    """All pairs (row, column) with wanted[row] == keys[column], for any range of rows."""

    def __init__(self, wanted: Tensor, keys: Tensor):
        keys, self.order = keys.sort(stable=True)
        self.first = torch.searchsorted(keys, wanted)
        self.count = torch.searchsorted(keys, wanted, right=True) - self.first

    def __getitem__(self, part: slice) -> tuple[Tensor, Tensor]:
        first, count = self.first[part], self.count[part]
        rows = torch.repeat_interleave(count)
        return rows, self.order[torch.arange(len(rows), device=rows.device) + (first - count.cumsum(0) + count)[rows]]


def blocks(task: Task, galleries: list[Tensor]):
    """Yields (number of the gallery, scores [b, n], rows, cols, kind) for each block of queries and each gallery.

    A gallery is its int64 columns, ascending, without junk. rows, cols, kind [m] are the pairs of the block that are
    not plain negatives, row by row: 0 a positive, else ignored: 1 the query's own camera, 2 its own file, 3 its own
    file under another id. Scores are asked for once a block.
    """
    every = torch.cat(galleries)
    low, high = (int(every.min()), int(every.max()) + 1) if len(every) else (0, 0)
    subsets = [Side(*(None if c is None else c[columns] for c in task.g)) for columns in galleries]
    # no junk is left in the gallery, so -1 keeps invalid queries from matching anything
    by_pid = [_Join(task.q.pids.where(task.q.pids > 0, -1), g.pids) for g in subsets]
    by_id = [None if g.ids is None else _Join(task.q.ids, g.ids) for g in subsets]
    for start in range(0, len(task.q.pids), task.block):
        part = slice(start, start + task.block)
        q = Side(*(None if c is None else c[part] for c in task.q))
        full = task.scores(start, start + len(q.pids), low, high)
        for number, (columns, g) in enumerate(zip(galleries, subsets)):
            rows, cols = by_pid[number][part]
            kind = torch.zeros_like(rows)
            if task.own_camera:
                kind[(q.camids[rows] == g.camids[cols]) & (g.camids[cols] >= 0)] = 1
            if q.ids is not None:
                kind[q.ids[rows] == g.ids[cols]] = 2
                other_rows, other_cols = by_id[number][part]
                other = q.pids[other_rows] != g.pids[other_cols]
                kind = torch.cat([kind, torch.full_like(other_rows[other], 3)])
                rows, order = torch.cat([rows, other_rows[other]]).sort(stable=True)
                cols, kind = torch.cat([cols, other_cols[other]])[order], kind[order]
            block = full if len(columns) == high - low else full.index_select(1, columns - low)
            yield number, block, rows, cols, kind


def refuse_nan(scores: Tensor) -> None:
    if scores.isnan().any():
        raise ReidError("scores contain NaN: look for a broken model or image")


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
    """1-based place of entries (rows, cols) in their row, sorted by score descending, equal scores by column."""
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
    """Of each query of the block: float64 [b] ap, trapezoid, inp (NaN without a match), int64 [b] first (0 without),
    int64 [b, 4] kinds (number of pairs of each kind); and int64 [1, depth + 1] hits, right entries at each rank."""
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

    ap = mean(nth / ranks.double())
    before = torch.where(ranks > 1, (nth - 1) / (ranks - 1).double(), 1.0)  # precision just before each match
    first = torch.zeros_like(matches).index_put_((rows[nth == 1],), ranks[nth == 1])
    last = torch.zeros_like(matches).index_put_((rows[nth == matches[rows]],), ranks[nth == matches[rows]])
    hits = torch.bincount(ranks[ranks <= depth], minlength=depth + 1)
    return {"ap": ap, "trapezoid": (ap + mean(before)) / 2, "inp": matches / last.double(), "first": first,
            "kinds": kinds, "hits": hits[None]}


def rank(task: Task, galleries: list[Tensor], depth: int = 20) -> list[dict[str, Tensor]]:
    """The values of `_rank_block` for all queries, on the CPU, for each gallery; hits are added up to [depth + 1]."""
    parts = [[] for _ in galleries]
    for number, *block in blocks(task, galleries):
        parts[number].append(_rank_block(*block, depth))
    tables = [{name: torch.cat([part[name] for part in gallery]).cpu() for name in gallery[0]} for gallery in parts]
    return [table | {"hits": table["hits"].sum(0)} for table in tables]
