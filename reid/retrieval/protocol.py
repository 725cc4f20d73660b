"""The evaluation protocol: which gallery images count for a query, with the scores of all pairs, block by block of queries."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reid import ReidError
from reid.retrieval.search import exact_products

SPLITS = {"viper": 316, "prid": 100}  # identities in each of the random splits of a published protocol
REPEATS = 10
PROTOCOLS = ("market", "nocam", *SPLITS)


class Side(NamedTuple):
    """Labels of the queries or of the gallery, int64 [N] each."""

    pids: Tensor
    camids: Tensor
    ids: Tensor | None


class Task(NamedTuple):
    """The checked arguments of `evaluate`."""

    scores: Callable[[int, int, int, int], Tensor]  # (first, last query, first, last column) -> float32 block
    q: Side
    g: Side
    own_camera: bool  # whether images from the query's own camera are ignored
    block: int

    def gallery(self) -> Tensor:
        """Return the columns of the gallery without junk, int64, ascending."""
        return (self.g.pids >= 0).nonzero()[:, 0]


def make_task(q_emb, g_emb, q_pids, q_camids, g_pids, g_camids, q_ids=None, g_ids=None, scores=None,
              protocol="market", block=None) -> Task:
    """Check the arguments of `evaluate` and bring embeddings, scores or a callable into one form."""
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
    product = None if q_emb is None else _Product(q_emb, g_emb)

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
    return Task(source, q, g, protocol != "nocam", block)


def random_splits(protocol: str, q_pids: Tensor, g_pids: Tensor):
    """Yield (rows of queries, rows of the gallery), int64, for each of the REPEATS random splits of a published protocol.

    viper: 316 of the 632 people (Gray et al., Evaluating Appearance Models for Recognition, Reacquisition, and Tracking, PETS
    2007). prid: 100 of the 200 people that both cameras have seen (Hirzer et al., Person Re-identification by Descriptive and
    Discriminative Classification, SCIA 2011). Of the people in queries and gallery only those drawn are left in the gallery; all
    its other images are distractors of every split. Raises ReidError for fewer people.
    """
    people, generator = q_pids[(q_pids > 0) & torch.isin(q_pids, g_pids)].unique(), torch.Generator().manual_seed(0)
    if len(people) < SPLITS[protocol]:
        raise ReidError(f"--protocol {protocol}: takes {SPLITS[protocol]} people of queries and gallery, not {len(people)}")
    for _ in range(REPEATS):
        chosen = people[torch.randperm(len(people), generator=generator)[: SPLITS[protocol]]]
        yield (torch.isin(q_pids, chosen).nonzero()[:, 0],
               (torch.isin(g_pids, chosen) | ~torch.isin(g_pids, people)).nonzero()[:, 0])


def _side(name: str, device: torch.device, *labels) -> Side:
    labels = [None if values is None else torch.as_tensor(values, device=device).long() for values in labels]
    for what, values in zip(Side._fields, labels):
        if values is not None and values.shape != (len(labels[0]),):
            raise ReidError(f"{name} {what} have shape {tuple(values.shape)}: pass {len(labels[0])}, as pids")
    return Side(*labels)


class _Product:
    """Scores of embeddings. 64 MiB are multiplied together: on a CPU that takes half as long as block by block."""

    def __init__(self, q_emb, g_emb):
        self.q_emb, self.g_emb, self.where, self.scores = q_emb, g_emb, None, None

    def __call__(self, start, stop, low, high):
        if not (self.where and self.where[1:] == (low, high) and 0 <= start - self.where[0] <= len(self.scores) - (stop - start)):
            self.scores = None  # before the next one is allocated
            last = max(stop, start + (1 << 24) // max(1, high - low))
            with exact_products():
                self.where, self.scores = (start, low, high), self.q_emb[start:last] @ self.g_emb[low:high].T
        return self.scores[start - self.where[0] : stop - self.where[0]]


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
    """Yield (number of the gallery, scores [b, n], rows, cols, kind) for each block of queries and each gallery.

    A gallery is its int64 columns, ascending, without junk. rows, cols, kind [m] are the pairs of the block that are
    not plain negatives, row by row: 0 a match, else ignored: 1 the query's own camera, 2 its own file, 3 its own
    file under another id. Scores are computed once for each block.
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
