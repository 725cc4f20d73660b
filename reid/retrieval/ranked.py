"""The result type of retrieval: search returns ranked lists, re-ranking and camera + time reorder them, extras draw them."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from reid.data.names import UNKNOWN, UNKNOWN_PID, identity_name
from reid.retrieval.rerank import rerank


class Query(NamedTuple):
    """A query image. file: what `images.decode` reads, or None; pid, camid, seq, frame as in `reid.data.datasets`."""

    file: object = None
    pid: int = UNKNOWN_PID
    camid: int = UNKNOWN
    seq: int = UNKNOWN
    frame: int = UNKNOWN


class Hit(NamedTuple):
    """One gallery image of a ranked list. match: whether the score exceeds the threshold, None without a threshold."""

    position: int  # from 1
    row: int  # of the gallery
    path: str
    name: str  # of the identity, "" where it is not known
    pid: int
    camid: int
    score: float
    match: bool | None


@dataclass(frozen=True)
class RankedList:
    """The gallery images found for one query, best first.

    rows: int64 [K], rows of `gallery`; scores: float32 [K], descending; threshold: score above which a hit is a match, or
    None. gallery: a GalleryIndex, or any object whose `hit(row)` returns (path, name, pid, camid) of a row.
    """

    query: Query
    rows: torch.Tensor
    scores: torch.Tensor
    gallery: object
    threshold: float | None = None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        """Return the hit at index i (from 0)."""
        i = range(len(self))[i]
        row, score = int(self.rows[i]), float(self.scores[i])
        return Hit(i + 1, row, *self.gallery.hit(row), score, None if self.threshold is None else score > self.threshold)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    @property
    def names(self):
        """Identity names of the hits, best first."""
        return [hit.name for hit in self]

    @property
    def matches(self):
        """bool [K]: whether each score exceeds the threshold; None without a threshold."""
        return None if self.threshold is None else self.scores > self.threshold

    def reordered(self, scores, topk=None):
        """Sort the hits by other scores, float32 [K] (stable), and cut the list to `topk`; the threshold goes."""
        order = scores.sort(descending=True, stable=True).indices[:topk]
        return replace(self, rows=self.rows[order], scores=scores[order], threshold=None)

    def to_dict(self):
        """Return the query (file, identity, name, camera) and the hits as plain values for JSON. An identity is text or None."""
        query, ids = self.query, {UNKNOWN_PID: None}
        file = None if query.file is None else str(query.file)
        return {"query": file, "pid": ids.get(query.pid, str(query.pid)), "name": identity_name(query.pid, file or ""),
                "camid": query.camid, "hits": [hit._asdict() | {"pid": ids.get(hit.pid, str(hit.pid))} for hit in self]}


def ranked_lists(gallery, scores, rows, queries=None):
    """Make one RankedList for each query from the tensors of an exact search.

    scores: float32 [Q, k], best first; rows: int64 [Q, k], -1 where there is none, which is left out. queries: Q values of
    Query, or None. The lists get the gallery's threshold.
    """
    if queries is None:
        queries = [Query()] * len(rows)
    return [RankedList(query, found[found >= 0], score[found >= 0], gallery, gallery.threshold)
            for query, score, found in zip(queries, scores, rows, strict=True)]


def rerank_lists(lists, embeddings, topk=None, evidence=None):
    """Re-rank the hits of each list by k-reciprocal encoding (`reid.retrieval.rerank`) and cut it to `topk`.

    lists: Q RankedList of a gallery with `embeddings`; embeddings: float32 [Q, D], of the queries. evidence: a SpaceTime
    whose evidence is added to the similarities, or None.
    """
    reordered = []
    for ranked, query in zip(lists, embeddings, strict=True):
        if len(ranked):
            bonus = evidence and evidence.bonus(*_sightings(ranked))
            scores = rerank(query[None], ranked.gallery.embeddings[ranked.rows].float(), bonus=bonus).scores(0, 1)[0]
            ranked = ranked.reordered(scores, topk)
        reordered.append(ranked)
    return reordered


def weigh_lists(lists, evidence, topk=None):
    """Add the evidence of camera and time (a SpaceTime) to the score of each hit, sort again and cut each list to `topk`."""
    reordered = []
    for ranked in lists:
        query, hits = zip(*((column[:1], column[1:]) for column in _sightings(ranked)))
        scores = evidence.fuse(ranked.scores[None], evidence.prob(*query, *hits))[0]
        reordered.append(ranked.reordered(scores, topk))
    return reordered


def _sightings(ranked):
    """Return camids, seqs, frames, int64 [1 + K] each: the query first, then its hits."""
    gallery, rows = ranked.gallery, ranked.rows.tolist()
    return [torch.tensor([value, *(int(column[row]) for row in rows)]) for value, column in
            zip(ranked.query[2:], (gallery.camids, gallery.seqs, gallery.frames))]
