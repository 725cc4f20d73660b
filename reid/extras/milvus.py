"""A gallery in Milvus, with the interface of `GalleryIndex`: in a *.db folder of this machine, a server or a cluster."""

import hashlib
import json
import os
import re
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from reid import ReidError, distributed
from reid.data.datasets import Records
from reid.extras.milvus_client import INDEXES, NUMBERS, QUANTIZED, SAFE, Collection, is_file
from reid.images import PREPROCESSING
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import identity_name, ranked_lists
from reid.retrieval.search import ExactSearch

FORMAT = "reid-gallery/2"
FIELDS = ("path", "pid", "camid", "seq", "frame", "position")  # fetched with every hit
DEPTH = 16_384  # rows that Milvus returns at most for one query
TIES = 8  # rows fetched beyond topk, to put equal scores at the end of a list in order
REPLY = 8 << 20  # bytes of embeddings in one reply; gRPC ends at 64 MiB
BATCH = 1024  # rows of one write: 4 MiB, acknowledged as a whole
BLOCK = 4 * BATCH  # images that are looked up at once
DOWNLOAD_LIMIT = 2_000_000  # rows, 4 GiB as float16


def is_uri(text):
    """Whether `text` is the address of a Milvus engine (name.db, http://host:19530) and not the path of an index file."""
    return is_file(text) or "://" in str(text)


def open_gallery(uri, run, extractor=None, part=""):
    """Open a gallery to search in it.

    extractor: an Extractor, or the fingerprint of weights and preprocessing. part: "queries" for those that `eval.py` keeps.
    A gallery that is missing or was made by other weights raises ReidError with the command that makes it.
    """
    command = f"python {'eval.py' if part else 'inference.py'} --save_index --gallery_uri {shlex.quote(str(uri))} " \
              f"--exp_name {shlex.quote(run)}"
    if is_file(uri) and not Path(uri).exists():
        raise ReidError(f"{uri}: no such gallery; make it: {command}")
    gallery = MilvusGallery(uri, run, part)
    if not gallery.collection.call("has_collection"):
        raise ReidError(f"{uri}: no gallery of the run {run} in it, or one of an older version; make it again: {command}")
    gallery._restore()
    if extractor is not None and not gallery._made_by(getattr(extractor, "fingerprint", extractor)):
        raise ReidError(f"{uri}: the gallery of {run} was made by other weights or another preprocessing; make it again: {command}")
    gallery.collection.call("load_collection")
    return gallery


def create_gallery(uri, run, fingerprint, mirror, dim, data_root, index_type="FLAT", part=""):
    """Open a gallery to write to it, or make an empty one.

    A gallery that other weights of the run have made from the same `data_root` is dropped first: it cannot be searched any
    more. Another `data_root`, and another `mirror` or `dim` with the same weights, raise ReidError.
    """
    if index_type not in INDEXES:
        raise ReidError(f"--index_type {index_type}: choose one of {', '.join(INDEXES)}")
    gallery = MilvusGallery(uri, run, part)
    collection = gallery.collection
    if collection.call("has_collection"):
        gallery._restore()
        gallery._require_root(data_root)
        if gallery._made_by(fingerprint):
            gallery._require(mirror, dim)
            collection.call("load_collection")
            if index_type != gallery.index_type:
                collection.change_index(index_type)
                gallery.index_type = index_type
            return gallery
        collection.call("drop_collection")
    collection.create(dim, index_type, format=FORMAT, run=run, part=part, fingerprint=fingerprint, preprocessing=PREPROCESSING,
                      mirror=mirror, data_root=str(data_root), threshold=None, false_match_rate=None, cameras=[], start=0,
                      next=0, listing="")
    gallery._restore()
    return gallery


def build_gallery(uri, run, extractor, records, index_type="FLAT", strict=False, progress=True):
    """Embed `records` into a gallery, new or not, and return it. Every rank of a torchrun calls this; see MilvusGallery.add."""
    if distributed.world_size > 1 and is_file(uri):
        raise ReidError(f"{uri}: only one process can write a file; start a server for {distributed.world_size} processes")
    gallery = None
    if distributed.rank == 0:
        gallery = create_gallery(uri, run, extractor.fingerprint, extractor.mirror, extractor.dim, records.root, index_type)
    distributed.gather_objects(None)  # the other ranks open what rank 0 has made
    gallery = gallery or open_gallery(uri, run, extractor)
    gallery.add(extractor, records, strict, progress)
    return gallery


def load_index(uri, run, fingerprint):
    """Download a gallery and its queries into one GalleryIndex, as `eval.py` needs them: it ranks the whole gallery."""
    queries = open_gallery(uri, run, fingerprint, "queries").download()  # first: if they are missing, eval.py makes both
    index = open_gallery(uri, run, fingerprint).download()
    index.queries = queries
    return index


def save_index(index, uri, run):
    """Write a GalleryIndex with its queries and its threshold; rows that are there already are not written again."""
    for part, rows in (("", index), ("queries", index.queries)):
        if rows is not None:
            gallery = create_gallery(uri, run, rows.fingerprint, rows.mirror, rows.embeddings.shape[1], rows.data_root, part=part)
            gallery.write(rows.embeddings, rows.records())
            gallery.collection.set(threshold=rows.threshold, false_match_rate=rows.false_match_rate)


class MilvusGallery:
    """Embeddings of images, and the records of the images, in one Milvus collection; made by the functions above.

    The number of a row is its primary key, 63 bits of a hash of the image's path: an image written twice leaves one row. (Send
    it to a browser as text, where numbers above 2^53 are rounded.) paths, pids, camids, seqs, frames and embeddings (float32)
    take row numbers as the tensors of a GalleryIndex do; hits of the last search are in memory, other rows are fetched.
    cameras: sorted list of the camera ids, -1 (unknown) included. bad: [(file, reason)] of images left out by `add`.
    """

    queries = None

    def __init__(self, uri, run, part=""):
        self.uri, self.run, self.part, self.bad, self._hits = str(uri), run, part, [], {}
        name = re.sub("[^A-Za-z0-9]", "_", run)[:100]  # Milvus allows no other letters; the hash keeps a-b and a_b apart
        self.collection = Collection(self.uri, f"reid_{name}_{number(json.dumps([run, part]).encode()):016x}")
        for field in FIELDS[:5]:
            setattr(self, f"{field}s", _Column(self, field))
        self.embeddings = _Column(self, "vector")

    def _restore(self):
        settings, self.dim = self.collection.settings()
        if [settings.get(name) for name in ("format", "run", "part")] != [FORMAT, self.run, self.part]:
            raise ReidError(f"{self.uri}: the collection {self.collection.name} holds {settings.get('run', 'something else')}, "
                            f"not the run {self.run} in the format {FORMAT}; choose another --exp_name or --gallery_uri")
        for name in ("fingerprint", "preprocessing", "mirror", "data_root", "index_type", "threshold", "false_match_rate",
                     "cameras"):
            setattr(self, name, settings[name])

    def _made_by(self, fingerprint):
        return (self.fingerprint, self.preprocessing) == (fingerprint, PREPROCESSING)

    def _require(self, mirror, dim):
        if dim != self.dim:
            raise ReidError(f"{self.uri}: the gallery of {self.run} holds embeddings of {self.dim} numbers, not of {dim}")
        if mirror != self.mirror:
            raise ReidError(f"{self.uri}: the gallery of {self.run} was made {'with' if self.mirror else 'without'} mirrored "
                            f"images; give {'--mirror' if self.mirror else '--no-mirror'}, or another --exp_name")

    def _require_root(self, data_root):
        if Path(data_root).resolve() != Path(self.data_root).resolve():
            raise ReidError(f"{self.uri}: the gallery of {self.run} holds the images below {self.data_root}, not those below "
                            f"{data_root}; choose another --exp_name or --gallery_uri")

    def __len__(self):
        return int(self.collection.call("query", filter="", output_fields=["count(*)"])[0]["count(*)"])

    def __contains__(self, row):
        return row in self._hits or row in self._fetch([row], ["key"])

    def hit(self, row):
        """Return (path, name of the identity or "" if it is unlabelled, pid, camid) of a row."""
        found = self._lookup([row])[0]
        path, pid = found["path"], found["pid"]
        return str(Path(self.data_root) / path), identity_name(pid, path), pid, found["camid"]

    def search(self, embeddings, topk=5, camids=None, frames=None, exclude=None, queries=None):
        """The `topk` most similar images of each query: a list of RankedList, one for each of the Q embeddings.

        queries: Q values of `reid.retrieval.ranked.Query`, or None. The rest is as in `nearest`.
        """
        return ranked_lists(self, *self.nearest(embeddings, topk, camids, frames, exclude), queries)

    def nearest(self, embeddings, topk, camids=None, frames=None, exclude=None):
        """The `topk` most similar rows of each query: (scores float32 [Q, k], rows int64 [Q, k]), best first.

        embeddings: float32 [Q, D] of norm 1. camids: cameras to keep; frames: (first, last) frame to keep; the engine filters
        both. exclude: row to leave out for each query, int64 [Q] (-1: none), or a list of lists of rows. Equal scores are in
        the order in which the images came. FLAT is exact. HNSW and IVF_SQ8 look at 10 x topk rows at least and return float32
        scores: IVF_SQ8's are computed here from fetched embeddings (4 KiB each). Where fewer than topk rows are left, and for
        a query that is NaN, score is -inf and row -1. More than 16,384 rows for a query raise ReidError.
        """
        conditions = [] if camids is None else [f"camid in {[int(camid) for camid in camids]}"]
        if frames is not None:
            conditions.append(f"frame >= {int(frames[0])} and frame <= {int(frames[1])}")
        return self._nearest(embeddings, topk, " and ".join(conditions), exclude)

    def _nearest(self, embeddings, topk, condition, exclude=None):
        exclude = exclude.tolist() if isinstance(exclude, torch.Tensor) else exclude or [[]] * len(embeddings)
        exclude = [{rows} if isinstance(rows, int) else set(rows) for rows in exclude]
        need = topk + max(map(len, exclude), default=0)
        if need > DEPTH:
            raise ReidError(f"topk {topk}: Milvus returns at most {DEPTH:,} rows for a query, {need:,} are needed")
        fetch = min(10 * need if self.index_type in QUANTIZED else need + TIES, DEPTH)
        bytes_of_hit = 4 * self.dim if self.index_type in QUANTIZED else 200
        scores = torch.full((len(embeddings), topk), -torch.inf)
        rows = torch.full((len(embeddings), topk), -1)
        self._hits = {}  # replaced, not cleared: another thread may be reading the hits of its own search
        for part in (~embeddings.isnan().any(1)).nonzero().flatten().split(max(1, REPLY // (fetch * bytes_of_hit))):
            for i, hits in zip(part.tolist(), self._request(embeddings[part].float(), need, fetch, condition)):
                kept = [(score, row) for score, _, row in sorted(hits) if row not in exclude[i]][:topk]
                for place, (score, row) in enumerate(kept):
                    scores[i, place], rows[i, place] = -score, row
        return scores, rows

    def _request(self, embeddings, need, fetch, condition):
        """[(-score, position, row)] for each query, unsorted; fetches more if the list ends within equal scores."""
        quantized = self.index_type in QUANTIZED
        found = self.collection.call(
            "search", data=list(embeddings.numpy()), limit=fetch, filter=condition, anns_field="vector",
            output_fields=[*FIELDS, *(["vector"] if quantized else [])],
            search_params={"metric_type": "IP", "params": INDEXES[self.index_type][1](min(10 * need, DEPTH))})
        answers = []
        for query, hits in zip(embeddings, found):
            self._hits |= {hit["key"]: {field: hit["entity"][field] for field in FIELDS} for hit in hits}
            scores = [hit["distance"] for hit in hits]
            if quantized and hits:
                scores = (torch.tensor([hit["entity"]["vector"] for hit in hits]) @ query).tolist()
            if self.index_type == "FLAT" and len(hits) == fetch < DEPTH and scores[-1] == scores[need - 1]:
                answers += self._request(query[None], need, min(4 * fetch, DEPTH), condition)
            else:
                answers.append([(-score, hit["entity"]["position"], hit["key"]) for score, hit in zip(scores, hits)])
        return answers

    def _fetch(self, rows, fields):
        """{row: {field: value}} of those of `rows` (a list) that exist."""
        size = REPLY // (4 * self.dim) if "vector" in fields else DEPTH
        return {row["key"]: row for part in _parts(rows, size)
                for row in self.collection.call("get", ids=part, output_fields=list(fields))}

    def _lookup(self, rows, field="path"):
        """The fields of each of `rows`, from the last search or from the engine; of `field` "vector", the embedding alone."""
        found = {} if field == "vector" else self._hits
        if missing := [row for row in rows if row not in found]:
            found |= self._fetch(missing, ["vector"] if field == "vector" else FIELDS)
        if gone := [row for row in rows if row not in found]:
            raise ReidError(f"{self.uri}: no row {gone[0]}; it was removed")
        return [found[row] for row in rows]

    def add(self, extractor, records, strict=False, progress=True):
        """Embed the images of `records` that are new, or whose bytes have changed; return how many rows all ranks have written.

        Each rank embeds and writes every world_size-th image. Batches are acknowledged, and the row number is a hash of the
        path: killed at any moment, the same call goes on after the last acknowledged batch and ends with the same rows.
        Images that cannot be read are left out and listed in `bad` (`strict` raises ReidError).
        """
        if not self._made_by(extractor.fingerprint):
            raise ReidError("images can only be added to a gallery by the weights that made it")
        self._require(extractor.mirror, extractor.dim)
        self._require_root(records.root)
        self.bad.clear()
        start = distributed.share(self._first_position(records) if distributed.rank == 0 else None)
        progress, started, written = progress and distributed.rank == 0, time.monotonic(), 0
        mine = torch.arange(distributed.rank, len(records), distributed.world_size)
        with (tqdm(total=len(mine), unit="row", disable=not progress) as bar,
              ThreadPoolExecutor(1) as pool):  # the engine takes one batch while the next is embedded
            pending = pool.submit(int)
            for part in mine.split(BLOCK):
                block = records.select(part)
                new, contents = self._changed(block)
                bar.update(len(block) - len(new))
                for found, rows in _batches(extractor.stream(block.select(new).files(), strict, False, self.bad)):
                    kept = new[found]
                    written += pending.result()
                    pending = pool.submit(self._upsert, block.select(kept), rows, part[kept] + start, contents[kept])
                    bar.update(len(rows))
            written += pending.result()
        parts = distributed.gather_objects((written, self.bad))
        written, self.bad = sum(count for count, _ in parts), [item for _, bad in parts for item in bad]
        if distributed.rank == 0:
            self.collection.call("flush")
        if progress:
            seconds = time.monotonic() - started
            print(f"{self.uri}: {written:,} rows written in {seconds:.1f} s ({written / max(seconds, 1e-9):,.0f} rows/s), "
                  f"{len(records) - written:,} were there or left out", flush=True)
        return written

    def write(self, embeddings, records):
        """Write embeddings (float [N, D], norm 1) of `records`; return how many rows were new or of other bytes."""
        if list(embeddings.shape) != [len(records), self.dim]:
            raise ReidError(f"{self.uri}: embeddings {list(embeddings.shape)} do not fit: {len(records)} images of "
                            f"{self.dim} numbers each are expected")
        start, written = self._first_position(records), 0
        for part in torch.arange(len(records)).split(BLOCK):
            block = records.select(part)
            new, contents = self._changed(block, embeddings[part])
            written += self._upsert(block.select(new), embeddings[part[new]], part[new] + start, contents[new])
        self.collection.call("flush")
        return written

    def _first_position(self, records):
        """The position of the first of `records`, after those of earlier calls; the same list of paths gets the same again."""
        settings, _ = self.collection.settings()
        listing = f"{number(json.dumps(list(records.paths)).encode()):x}"
        if listing != settings["listing"]:
            self.cameras = sorted({*settings["cameras"], *records.camids.unique().tolist()})
            settings["start"] = settings["next"]
            self.collection.set(start=settings["start"], next=settings["start"] + len(records), listing=listing,
                                cameras=self.cameras)
        return settings["start"]

    def _changed(self, block, embeddings=None):
        """(positions in `block` that have to be written, a number made of every file's bytes or embedding), int64 each."""
        contents = []
        for i, file in enumerate(block.files()):
            try:
                contents.append(number(file.read_bytes()))
            except OSError:
                contents.append(0 if embeddings is None else number(embeddings[i].half().numpy().tobytes()))
        keys = [number(os.fsencode(path)) for path in block.paths]
        there, new = self._fetch(keys, ["path", "content"]), []
        for i, (key, path) in enumerate(zip(keys, block.paths)):
            row = there.setdefault(key, {"path": path, "content": None})
            if any("\ud800" <= letter <= "\udfff" for letter in path):
                self.bad.append((block.root / path, "its name is not UTF-8, which Milvus requires; rename it"))
            elif path != row["path"]:
                self.bad.append((block.root / path, "its path has the same 63-bit key as another; rename it"))
            elif contents[i] != row["content"]:
                new.append(i)
        return torch.tensor(new, dtype=torch.int64), torch.tensor(contents, dtype=torch.int64)

    def _upsert(self, records, embeddings, positions, contents):
        """Write rows in batches that the engine acknowledges; return their number."""
        columns = torch.stack([records.pids, records.camids, records.seqs, records.frames, positions, contents], 1).tolist()
        vectors = embeddings.half().float().numpy()  # rounded as in the .pt index: both hold the same numbers and rank alike
        rows = [{"key": number(os.fsencode(path)), "path": path, "vector": vector, **dict(zip(NUMBERS, numbers))}
                for path, vector, numbers in zip(records.paths, vectors, columns)]
        for batch in _parts(rows, BATCH):
            if (count := self.collection.call("upsert", data=batch)["upsert_count"]) != len(batch):
                raise ReidError(f"{self.uri}: {count} of {len(batch)} rows were acknowledged; {SAFE}")
        return len(rows)

    def remove(self, paths):
        """Delete the images of these paths (relative to data_root); return how many there were."""
        rows = list(self._fetch([number(os.fsencode(path)) for path in paths], ["key"]))
        for part in _parts(rows, DEPTH):
            self.collection.call("delete", ids=part)
        return len(rows)

    def download(self, limit=DOWNLOAD_LIMIT):
        """Return the whole gallery as a GalleryIndex (float16), its rows in the order in which the images came."""
        if (count := len(self)) > limit:
            raise ReidError(f"{self.uri}: {count:,} rows, but at most {limit:,} are evaluated in memory; evaluate on a dataset "
                            "of its own, and search the large gallery")
        rows, embeddings = self._read()
        columns = [torch.tensor([row[name] for row in rows], dtype=torch.int64) for name in FIELDS[1:5]]
        records = Records(Path(self.data_root), [row["path"] for row in rows], *columns)
        index = GalleryIndex(embeddings, records, self.fingerprint, self.mirror)
        index.threshold, index.false_match_rate = self.threshold, self.false_match_rate
        return index

    def _read(self, condition=""):
        """(rows as dicts of FIELDS and key, embeddings float16 [N, D]) of all rows, in the order in which the images came."""
        iterator = self.collection.call("query_iterator", batch_size=min(REPLY // (4 * self.dim), DEPTH), filter=condition,
                                        output_fields=["key", "vector", *FIELDS])
        rows, parts = [], [torch.empty(0, self.dim, dtype=torch.float16)]
        while block := self.collection.guard("query_iterator", iterator.next):
            parts.append(torch.tensor([row.pop("vector") for row in block]).half())
            rows += block
        iterator.close()
        order = sorted(range(len(rows)), key=lambda i: (rows[i]["position"], rows[i]["path"]))
        return [rows[i] for i in order], torch.cat(parts)[order]

    def recall(self, k=10, sample=100, limit=200_000):
        """Return (recall@k of `nearest` against exact scores, rows compared). `sample` images of the gallery are the queries;
        a gallery of more than `limit` rows is compared over its first `limit` images only."""
        condition = f"position < {limit}" if len(self) > limit else ""
        rows, embeddings = self._read(condition)
        if not rows:
            raise ReidError(f"{self.uri}: the gallery of {self.run} is empty")
        k, queries = min(k, len(rows)), embeddings[:: max(1, len(rows) // sample)][:sample].float()
        keys = torch.tensor([row["key"] for row in rows])[ExactSearch(embeddings).search(queries, k)[1]]
        found = self._nearest(queries, k, condition)[1]
        return float((found[:, :, None] == keys[:, None]).any(1).float().mean()), len(rows)


class _Column:
    """One field of the rows of a gallery, indexed by row numbers: int64 [n], a list, or one number."""

    def __init__(self, gallery, field):
        self.gallery, self.field = gallery, field

    def __getitem__(self, rows):
        rows = torch.as_tensor(rows, dtype=torch.int64)
        values = [row[self.field] for row in self.gallery._lookup(rows.flatten().tolist(), self.field)]
        if self.field == "path":
            return values if rows.ndim else values[0]
        vectors = self.field == "vector"
        return torch.tensor(values, dtype=torch.float32 if vectors else torch.int64).reshape(
            *rows.shape, *([self.gallery.dim] if vectors else []))


def number(data):
    """Hash bytes to 63 bits: Milvus' integers are signed."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def _parts(items, size):
    return (items[first : first + size] for first in range(0, len(items), size))


def _batches(stream):
    """Join what Extractor.stream yields to batches of BATCH rows or a little more."""
    found, rows = [], []
    for positions, embeddings in stream:
        found.append(positions)
        rows.append(embeddings)
        if sum(map(len, rows)) >= BATCH:
            yield torch.cat(found), torch.cat(rows)
            found, rows = [], []
    if rows:
        yield torch.cat(found), torch.cat(rows)
