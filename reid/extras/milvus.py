"""A gallery in Milvus: the interface of `GalleryIndex`, on a *.db of this machine, a server or a cluster."""

from pathlib import Path

import torch

from reid import ReidError
from reid.data.datasets import Records
from reid.extras import ingest
from reid.extras.milvus_client import INDEXES, QUANTIZED, Collection, collection_name, is_file, rebuild_command
from reid.images import PREPROCESSING
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import identity_name, ranked_lists

FORMAT = "reid-gallery/1"
FIELDS = ("path", "pid", "camid", "seq", "frame", "position")  # what is told of a hit
REPLY = 8 << 20  # bytes of vectors in one reply; gRPC ends at 64 MiB
DEPTH = 16_384  # rows that Milvus returns at most for one query
TIES = 8  # rows fetched beyond topk, so that equal scores at the end of the list can be put in order
DOWNLOAD_LIMIT = 2_000_000  # rows, 4 GiB as float16


class MilvusGallery:
    """Embeddings and what is known of each image in one Milvus collection. Make one with `open`, `create` or `build`.

    A row number (`rows` of `search`) is the primary key: 63 bits of the hash of the image's path, so writing an image twice
    leaves one row (above 2^53: send it as text to a browser). `paths[row]`, `pids[row]`, `camids[row]`, `seqs[row]`,
    `frames[row]` tell of a row, `embeddings[rows]` is float32 [n, D]; rows of the last search are in memory, others are
    fetched. cameras: sorted list of the camera ids, -1 (unknown) included. The rest is as in GalleryIndex.
    """

    queries = None

    def __init__(self, uri, run, part=""):
        self.uri, self.run, self.part, self._known, self.bad = str(uri), run, part, {}, []
        for column, field in zip(("paths", "pids", "camids", "seqs", "frames"), FIELDS):
            setattr(self, column, _Column(self, field))
        self.embeddings = _Vectors(self)
        self.engine = Collection(self.uri, collection_name(run, part))

    @classmethod
    def open(cls, uri, run, extractor_or_fingerprint=None, part=""):
        """Open a gallery that was made before; a missing one, or one of other weights, raises ReidError."""
        again = rebuild_command(uri, run, part)
        if is_file(uri) and not Path(uri).exists():
            raise ReidError(f"{uri}: no such gallery; make it: {again}")
        self = cls(uri, run, part)
        try:
            if not self.engine.call("has_collection"):
                raise ReidError(f"{uri}: no gallery of the run {run} in it; make it: {again}")
            self._restore()
            wanted = getattr(extractor_or_fingerprint, "fingerprint", extractor_or_fingerprint)
            if self._is_stale(self.fingerprint if wanted is None else wanted):
                raise ReidError(f"{uri}: the gallery of {run} was made by other weights or another preprocessing; "
                                f"make it again: {again}")
            self.engine.call("load_collection")
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def create(cls, uri, run, fingerprint, mirror, dim, data_root, index_type="FLAT", part=""):
        """Open a gallery to write to, or make an empty one. A collection of other weights is dropped and made anew: nothing
        can be searched in it. One of the same weights with another `mirror`, `dim` or `data_root` raises ReidError."""
        if index_type not in INDEXES:
            raise ReidError(f"index type {index_type!r}: choose one of {', '.join(INDEXES)}")
        self = cls(uri, run, part)
        try:
            exists = self.engine.call("has_collection")
            if exists:
                self._restore()
                exists = not self._is_stale(fingerprint) or self.engine.call("drop_collection")
            if exists:
                self._refuse_other(mirror, dim, data_root)
                self.engine.call("load_collection")
                if index_type != self.index_type:
                    self.engine.change_index(index_type)
            else:
                self.engine.make(dim, index_type, format=FORMAT, fingerprint=fingerprint, preprocessing=PREPROCESSING,
                                  mirror=bool(mirror), data_root=str(data_root), threshold=None, false_match_rate=None,
                                  cameras=[], start=0, next=0, listing="")
            self._restore()
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def build(cls, uri, run, extractor, records, strict=False, progress=True, rank=0, world_size=1, index_type="FLAT"):
        """Embed `records` into a gallery, new or there already: see reid.extras.ingest. Every rank of a torchrun calls this."""
        if world_size > 1 and is_file(uri):
            raise ReidError(f"{uri}: one process at a time can write a file; start a server for {world_size} processes")
        self = None
        if rank == 0:
            self = cls.create(uri, run, extractor.fingerprint, extractor.mirror, extractor.dim, records.root, index_type)
        ingest.gather(None, world_size)  # the others open what rank 0 has made
        self = self or cls.open(uri, run, extractor)
        self.add(extractor, records, strict, progress, rank, world_size)
        return self

    def add(self, extractor, records, strict=False, progress=True, rank=0, world_size=1):
        """Embed what is new among `records`, or changed (bytes of the file); returns how many images were embedded."""
        if self._is_stale(extractor.fingerprint):
            raise ReidError("images can only be added to a gallery by the weights that made it")
        self._refuse_other(extractor.mirror, extractor.dim, records.root)
        return ingest.add(self, extractor, records, strict, progress, rank, world_size)

    def write(self, embeddings, records):
        """Write embeddings (float [N, D], norm 1) of `records`; returns the number of rows that were new or have other bytes."""
        return ingest.write(self, embeddings, records)

    def _restore(self):
        values, self.dim = self.engine.settings()
        if values["format"] != FORMAT:
            raise ReidError(f"{self.uri}: another format ({values['format']}); make it again: "
                            + rebuild_command(self.uri, self.run, self.part))
        for name in ("fingerprint", "preprocessing", "mirror", "data_root", "index_type", "threshold", "false_match_rate",
                     "cameras"):
            setattr(self, name, values[name])

    def _is_stale(self, fingerprint):
        return (self.fingerprint, self.preprocessing) != (fingerprint, PREPROCESSING)

    def _refuse_other(self, mirror, dim, data_root):
        if dim != self.dim:
            raise ReidError(f"{self.uri}: the gallery of {self.run} holds embeddings of {self.dim} numbers, not of {dim}")
        if bool(mirror) != self.mirror:
            raise ReidError(f"{self.uri}: the gallery of {self.run} was made {'with' if self.mirror else 'without'} mirrored "
                            f"images; give {'--mirror' if self.mirror else '--no-mirror'}, or another --exp_name")
        if Path(data_root).resolve() != Path(self.data_root).resolve():
            raise ReidError(f"{self.uri}: the gallery of {self.run} holds the paths below {self.data_root}, not those below "
                            f"{data_root}; choose another --exp_name or --gallery_uri")

    def remove(self, paths):
        """Take away the images of these paths (relative to data_root); returns how many there were."""
        there = list(self.fetch([ingest.key_of(path) for path in paths], ["key"]))
        for part in _parts(there, DEPTH):
            self.engine.call("delete", ids=part)
        return len(there)

    def save(self, path=None):
        """Keep threshold and false_match_rate; the rows are in the engine already."""
        self.engine.set(threshold=self.threshold, false_match_rate=self.false_match_rate)

    def __len__(self):
        return int(self.engine.call("query", filter="", output_fields=["count(*)"])[0]["count(*)"])

    count = property(__len__)

    def __contains__(self, row):
        return row in self._known or row in self.fetch([row], ["key"])

    def hit(self, row):
        """(path, name of the identity or "" where it is unlabelled, pid, camid) of a row."""
        path, pid = self.paths[row], int(self.pids[row])
        return str(Path(self.data_root) / path), identity_name(pid, path), pid, int(self.camids[row])

    def search(self, embeddings, topk=5, camids=None, frames=None, exclude=None, queries=None):
        """A list of RankedList, one for each query; see `nearest`."""
        return ranked_lists(self, *self.nearest(embeddings, topk, camids, frames, exclude), queries)

    def nearest(self, embeddings, topk, camids=None, frames=None, exclude=None):
        """The `topk` most similar rows of each query: (scores float32 [Q, k], rows int64 [Q, k]), best first.

        embeddings: float32 [Q, D] of norm 1. camids: cameras to keep; frames: (first, last) frame to keep; both are filtered
        by the engine. exclude: row to leave out for each query, int64 [Q] (-1: none), or a list of lists. Equal scores stand
        in the order in which the images came. FLAT is exact; other indexes look at 10 x topk rows at least and score them in
        float32: the engine does, but for a quantized one, whose 10 x topk rows are fetched (4 KiB each) and scored here. Where
        fewer than topk rows are left, score is -inf and row -1. At most 16,384 rows can be asked for.
        """
        return self._top(embeddings, topk, where(camids, frames), exclude)

    def _top(self, embeddings, topk, condition, exclude=None):
        lists = exclude.tolist() if isinstance(exclude, torch.Tensor) else exclude or [()] * len(embeddings)
        excluded = [{rows} if isinstance(rows, int) else set(rows) for rows in lists]
        need = topk + max(map(len, excluded), default=0)
        if need > DEPTH:
            raise ReidError(f"topk {topk}: Milvus returns at most {DEPTH:,} rows for a query, {need:,} are needed")
        fetch = min(10 * need if self.index_type in QUANTIZED else need + TIES, DEPTH)  # the others score in float32
        scores = torch.full((len(embeddings), topk), -torch.inf)
        rows = torch.full((len(embeddings), topk), -1)
        self._known = {}  # replaced, not cleared: another thread may be reading what its own search found
        bytes_of_hit = 4 * self.dim if self.index_type in QUANTIZED else 200
        for part in torch.arange(len(embeddings)).split(max(1, REPLY // (fetch * bytes_of_hit))):
            for i, hits in zip(part.tolist(), self._search(embeddings[part].float(), need, fetch, condition)):
                kept = [(score, row) for score, _, row in sorted(hits) if row not in excluded[i]][:topk]
                for place, (score, row) in enumerate(kept):
                    scores[i, place], rows[i, place] = -score, row
        return scores, rows

    def _search(self, embeddings, need, fetch, condition):
        """[(-score, position, row)] for each query, unordered; fetches more where the list ends within equal scores."""
        quantized = self.index_type in QUANTIZED
        found = self.engine.call("search", data=list(embeddings.numpy()), limit=fetch, filter=condition, anns_field="vector",
                           output_fields=[*FIELDS, *(["vector"] if quantized else [])],
                           search_params={"metric_type": "IP", "params": INDEXES[self.index_type][1](min(10 * need, DEPTH))})
        answers = []
        for query, hits in zip(embeddings, found):
            for hit in hits:
                self._known[hit["key"]] = {field: hit["entity"][field] for field in FIELDS}
            scores = [hit["distance"] for hit in hits]
            if quantized and hits:
                scores = (torch.tensor([hit["entity"]["vector"] for hit in hits]) @ query).tolist()
            if self.index_type == "FLAT" and len(hits) == fetch < DEPTH and scores[-1] == scores[need - 1]:
                answers += self._search(query[None], need, min(4 * fetch, DEPTH), condition)
            else:
                answers.append([(-score, hit["entity"]["position"], hit["key"]) for score, hit in zip(scores, hits)])
        return answers

    def fetch(self, rows, fields=FIELDS):
        """{row: {field: value}} of the rows (a list) that are there."""
        size = DEPTH if "vector" not in fields else REPLY // (4 * self.dim)
        return {row["key"]: row for part in _parts(list(rows), size)
                for row in self.engine.call("get", ids=part, output_fields=list(fields))}

    def vectors(self, fields=("position",), condition=""):
        """Yield every row's fields and `vector`, block by block, as lists of dicts in no particular order."""
        iterator = self.engine.call("query_iterator", batch_size=min(REPLY // (4 * self.dim), DEPTH), filter=condition,
                              output_fields=["key", "vector", *fields])
        while True:
            try:
                block = iterator.next()
            except Exception as error:
                raise self.engine.failure("query_iterator", error) from None
            if not block:
                return iterator.close()
            yield block

    def download(self, limit=DOWNLOAD_LIMIT):
        """The whole gallery as a GalleryIndex (float16), rows in the order in which the images came, for `eval.py` and
        whatever needs every score. More than `limit` rows raise ReidError."""
        if (count := len(self)) > limit:
            raise ReidError(f"{self.uri}: {count:,} rows, and {limit:,} are the most that are evaluated in memory; evaluate on "
                            "a dataset of its own, and search the large gallery")
        rows, parts = [], []
        for block in self.vectors((*FIELDS, "content")):
            parts.append(torch.tensor([row.pop("vector") for row in block]).half())
            rows += block
        order = sorted(range(len(rows)), key=lambda i: (rows[i]["position"], rows[i]["path"]))
        columns = [torch.tensor([rows[i][name] for i in order], dtype=torch.int64) for name in FIELDS[1:5]]
        records = Records(Path(self.data_root), [rows[i]["path"] for i in order], *columns)
        embeddings = torch.cat(parts)[order] if parts else torch.empty(0, self.dim, dtype=torch.float16)
        index = GalleryIndex(embeddings, records, self.fingerprint, self.mirror)
        index.threshold, index.false_match_rate = self.threshold, self.false_match_rate
        return index

    def recall(self, k=10, sample=100, rows=200_000):
        """(recall@k of `search` against exact scores, rows compared): `sample` images of the gallery are the queries; in a
        larger gallery the engine is asked, and the vectors read, for its first `rows` images only."""
        condition = f"position < {rows}" if len(self) > rows else ""
        queries, best, keys, seen = None, None, None, 0
        for block in self.vectors(condition=condition):
            vectors, ids = torch.tensor([row["vector"] for row in block]), torch.tensor([row["key"] for row in block])
            queries = vectors[:sample].clone() if queries is None else queries
            scores = queries @ vectors.T
            ids = ids.expand_as(scores)
            if best is not None:
                scores, ids = torch.cat([best, scores], 1), torch.cat([keys, ids], 1)
            best, places = scores.topk(min(k, scores.shape[1]))
            keys = ids.gather(1, places)
            seen += len(block)
        if queries is None:
            raise ReidError(f"{self.uri}: the gallery of {self.run} is empty")
        hits = (self._top(queries, k, condition)[1][:, :, None] == keys[:, None]).any(1)
        return float(hits.float().mean()), seen

    def close(self):
        """Let go of the connection (the embedded engine runs until the process ends)."""
        self.engine.close()


class _Column:
    """One field of the rows, asked for by row number."""

    def __init__(self, gallery, field):
        self.gallery, self.field = gallery, field

    def __getitem__(self, row):
        row, known = int(row), self.gallery._known
        if row not in known:
            known |= self.gallery.fetch([row])
        if row not in known:
            raise ReidError(f"{self.gallery.uri}: no row {row}; it was removed")
        return known[row][self.field]


class _Vectors:
    """The embeddings of rows, asked for by row numbers: float32 [n, D] for int64 [n], float32 [D] for one."""

    def __init__(self, gallery):
        self.gallery = gallery

    def __getitem__(self, rows):
        rows = torch.as_tensor(rows)
        found = self.gallery.fetch(rows.reshape(-1).tolist(), ["vector"])
        vectors = [found[row]["vector"] for row in rows.reshape(-1).tolist()]
        return torch.tensor(vectors).reshape(*rows.shape, self.gallery.dim)


def where(camids=None, frames=None):
    """The engine's filter expression of cameras and of (first, last) frame."""
    parts = [] if camids is None else [f"camid in {[int(camid) for camid in camids]}"]
    if frames is not None:
        parts.append(f"frame >= {int(frames[0])} and frame <= {int(frames[1])}")
    return " and ".join(parts)


def _parts(items, size):
    return (items[first : first + size] for first in range(0, len(items), size))
