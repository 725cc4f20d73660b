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
from reid.extras.milvus_client import BATCH, DEPTH, INDEXES, NUMBERS, VECTORS, Collection, is_file
from reid.images import PREPROCESSING
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import identity_name, ranked_lists
from reid.retrieval.search import ExactSearch

FORMAT = "reid-gallery/2"
FIELDS = ("path", "pid", "camid", "seq", "frame", "position")  # fetched with every hit
HITS = 40_000  # hits in one reply, of about 200 bytes
TIES = 8  # rows fetched beyond topk, to put equal scores at the end of a list in order
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
    again = (f"make it: python {'eval.py' if part else 'inference.py'} --save_index --gallery_uri {shlex.quote(str(uri))} "
             f"--exp_name {shlex.quote(run)}")
    if is_file(uri) and not Path(uri).exists():
        raise ReidError(f"{uri}: no such gallery; {again}")
    gallery = MilvusGallery(uri, run, part)
    if not gallery.collection.call("has_collection"):
        raise ReidError(f"{uri}: no gallery of the run {run} in it (one of an older version has to be made again); {again}")
    gallery._restore()
    if extractor is not None and not gallery._made_by(getattr(extractor, "fingerprint", extractor)):
        raise ReidError(f"{uri}: the gallery of {run} was made by other weights or another preprocessing; {again}")
    gallery.collection.call("load_collection")
    return gallery


def create_gallery(uri, run, fingerprint, mirror, dim, data_root, index_type="FLAT", part=""):
    """Open a gallery to write to it, or make an empty one.

    A gallery of the same run and `data_root` that other weights have made is dropped first: it can never be searched again.
    Another `data_root`, and another `mirror` or `dim` with the same weights, raise ReidError.
    """
    if index_type not in INDEXES:
        raise ReidError(f"--index_type {index_type}: choose one of {', '.join(INDEXES)}")
    gallery = MilvusGallery(uri, run, part)
    collection = gallery.collection
    if collection.call("has_collection"):
        gallery._restore()
        gallery._require(data_root=str(data_root))
        if gallery._made_by(fingerprint):
            gallery._require(mirror=mirror, dim=dim)
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
    """Download a gallery and its queries as one GalleryIndex: `eval.py` compares every query with every image."""
    queries = open_gallery(uri, run, fingerprint, "queries").download()  # first: if they are missing, eval.py makes both
    index = open_gallery(uri, run, fingerprint).download()
    index.queries = queries
    return index


def save_index(index, uri, run):
    """Write a GalleryIndex with its queries and its threshold; rows that are in the gallery are not written again."""
    for part, rows in (("", index), ("queries", index.queries)):
        if rows is not None:
            gallery = create_gallery(uri, run, rows.fingerprint, rows.mirror, rows.embeddings.shape[1], rows.data_root, part=part)
            gallery.write(rows.embeddings, rows.records())
            gallery.collection.set(threshold=rows.threshold, false_match_rate=rows.false_match_rate)


class MilvusGallery:
    """Embeddings and records of images in one Milvus collection; the functions above open it.

    The number of a row is its primary key, 63 bits of a hash of the image's path: an image written twice leaves one row. (Send
    it to a browser as text, which rounds numbers above 2^53.) paths, pids, camids, seqs, frames and embeddings (float32) take
    row numbers as the tensors of a GalleryIndex do; hits of the last search are in memory, other rows are fetched.
    cameras: sorted list of the camera ids, -1 (unknown) included. bad: [(file, reason)] of images left out by `add`.
    """

    queries = None

    def __init__(self, uri, run, part=""):
        self.uri, self.run, self.part, self.bad, self._hits = str(uri), run, part, [], {}
        name = re.sub("[^A-Za-z0-9]", "_", run)[:100]  # all that Milvus allows; the number keeps a-b and a_b apart
        self.collection = Collection(self.uri, f"reid_{name}_{number(json.dumps([run, part]).encode()):016x}")
        for field in FIELDS[:5]:
            setattr(self, f"{field}s", _Column(self, field))
        self.embeddings = _Column(self, "vector")

    def _restore(self):
        settings = self.collection.settings()
        if [settings.get(name) for name in ("format", "run", "part")] != [FORMAT, self.run, self.part]:
            raise ReidError(f"{self.uri}: the collection {self.collection.name} does not hold the run {self.run} in the format "
                            f"{FORMAT}; choose another --exp_name or --gallery_uri")
        for name in ("fingerprint", "preprocessing", "mirror", "dim", "data_root", "index_type", "threshold",
                     "false_match_rate", "cameras"):
            setattr(self, name, settings[name])

    def _made_by(self, fingerprint):
        return (self.fingerprint, self.preprocessing) == (fingerprint, PREPROCESSING)

    def _require(self, **settings):
        for name, value in settings.items():
            own = getattr(self, name)
            if own != value and not (name == "data_root" and Path(own).resolve() == Path(value).resolve()):
                raise ReidError(f"{self.uri}: the gallery of {self.run} was made with {name} {own}, not {value}; give what it "
                                "was made with, or another --exp_name or --gallery_uri")

    def __len__(self):
        return int(self.collection.call("query", filter="", output_fields=["count(*)"])[0]["count(*)"])

    def __contains__(self, row):
        return row in self._hits or row in self.collection.fetch([row], ["key"])

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
        scores, which for IVF_SQ8 are computed here from fetched embeddings. Where fewer than topk rows are left, and for a
        query that is NaN, score is -inf and row -1. More than 16,384 rows for a query raise ReidError.
        """
        conditions = [] if camids is None else [f"camid in {[int(camid) for camid in camids]}"]
        if frames is not None:
            conditions.append(f"frame >= {int(frames[0])} and frame <= {int(frames[1])}")
        return self._nearest(embeddings, topk, " and ".join(conditions), exclude)

    def _nearest(self, embeddings, topk, condition, exclude=None):
        exclude = exclude.tolist() if isinstance(exclude, torch.Tensor) else exclude or [[]] * len(embeddings)
        exclude = [{rows} if isinstance(rows, int) else set(rows) for rows in exclude]
        need, quantized = topk + max(map(len, exclude), default=0), self.index_type == "IVF_SQ8"
        if need > DEPTH:
            raise ReidError(f"topk {topk}: Milvus returns at most {DEPTH:,} rows for a query, {need:,} are needed")
        limit = min(10 * need if quantized else need + TIES, DEPTH)
        scores = torch.full((len(embeddings), topk), -torch.inf)
        rows = torch.full((len(embeddings), topk), -1)
        self._hits = {}  # replaced, not cleared: another thread may be reading the hits of its own search
        for part in (~embeddings.isnan().any(1)).nonzero().flatten().split(max(1, (VECTORS if quantized else HITS) // limit)):
            for i, hits in zip(part.tolist(), self._request(embeddings[part].float(), need, limit, condition)):
                kept = [(score, row) for score, _, row in sorted(hits) if row not in exclude[i]][:topk]
                for place, (score, row) in enumerate(kept):
                    scores[i, place], rows[i, place] = -score, row
        return scores, rows

    def _request(self, embeddings, need, limit, condition):
        """[(-score, position, row)] for each query, unsorted; asks for more if the list ends within equal scores."""
        fields = [*FIELDS, "vector"] if self.index_type == "IVF_SQ8" else list(FIELDS)
        parameters = INDEXES[self.index_type][1](min(10 * need, DEPTH))
        found = self.collection.call("search", data=list(embeddings.numpy()), limit=limit, filter=condition, output_fields=fields,
                                     anns_field="vector", search_params={"metric_type": "IP", "params": parameters})
        answers = []
        for query, hits in zip(embeddings, found):
            entities, scores = [{"key": hit["key"], **hit["entity"]} for hit in hits], [hit["distance"] for hit in hits]
            if hits and "vector" in fields:  # the engine's scores are those of quantized embeddings
                scores = (torch.tensor([entity.pop("vector") for entity in entities]) @ query).tolist()
            if self.index_type == "FLAT" and len(hits) == limit < DEPTH and scores[-1] == scores[need - 1]:
                answers += self._request(query[None], need, min(4 * limit, DEPTH), condition)
                continue
            self._hits |= {entity["key"]: entity for entity in entities}
            answers.append([(-score, entity["position"], entity["key"]) for score, entity in zip(scores, entities)])
        return answers

    def _lookup(self, rows, field="path"):
        """The fields of each of `rows`, from the last search or from the engine; for "vector", the embedding."""
        found = {} if field == "vector" else self._hits
        if missing := [row for row in rows if row not in found]:
            found |= self.collection.fetch(missing, ["vector"] if field == "vector" else FIELDS)
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
        self._require(mirror=extractor.mirror, dim=extractor.dim, data_root=str(records.root))
        self.bad.clear()
        start = distributed.share(self._first_position(records) if distributed.rank == 0 else None)
        mine, started = torch.arange(distributed.rank, len(records), distributed.world_size), time.monotonic()
        progress = progress and distributed.rank == 0
        written = self._write(records, mine, start, progress, lambda block, _: _batches(
            extractor.stream(block.files(), strict, False, self.bad)))
        ranks = distributed.gather_objects((written, self.bad))
        written, self.bad = sum(count for count, _ in ranks), [item for _, bad in ranks for item in bad]
        if distributed.rank == 0:
            self.collection.call("flush")
        if progress:
            seconds = time.monotonic() - started
            print(f"{self.uri}: {written:,} rows written in {seconds:.1f} s ({written / max(seconds, 1e-9):,.0f} rows/s), "
                  f"{len(records) - written:,} were there or left out", flush=True)
        return written

    def write(self, embeddings, records):
        """Write embeddings (float [N, D], norm 1) of `records`; return how many rows are new or of files with other bytes."""
        if list(embeddings.shape) != [len(records), self.dim]:
            raise ReidError(f"{self.uri}: embeddings {list(embeddings.shape)} do not fit: {len(records)} images of "
                            f"{self.dim} numbers each are expected")
        written = self._write(records, torch.arange(len(records)), self._first_position(records), False,
                              lambda _, rows: [(torch.arange(len(rows)), embeddings[rows])])
        self.collection.call("flush")
        return written

    def _first_position(self, records):
        """Position of the first of `records`, after those of earlier calls; the same list of paths gets the same again."""
        settings = self.collection.settings()
        start, listing = settings["start"], f"{number(json.dumps(list(records.paths)).encode()):x}"
        if listing != settings["listing"]:
            start, self.cameras = settings["next"], sorted({*settings["cameras"], *records.camids.unique().tolist()})
            self.collection.set(start=start, next=start + len(records), listing=listing, cameras=self.cameras)
        return start

    def _write(self, records, rows, start, progress, embed):
        """Write `rows` of `records`, as far as they are not in the gallery; return their number.

        embed(records, rows): yields (positions int64 [n], embeddings [n, D]) for records, which are `rows` of all.
        """
        written = 0
        with (tqdm(total=len(rows), unit="row", disable=not progress) as bar,
              ThreadPoolExecutor(1) as pool):  # the engine takes one batch while the next is embedded
            pending = pool.submit(int)
            for part in rows.split(BLOCK):
                block = records.select(part)
                changed, contents = self._changed(block)
                bar.update(len(block) - len(changed))
                block, part = block.select(changed), part[changed]
                for found, embeddings in embed(block, part):
                    written += pending.result()
                    pending = pool.submit(self._upsert, block.select(found), embeddings, part[found] + start, contents[found])
                    bar.update(len(found))
            return written + pending.result()

    def _changed(self, block):
        """(positions in `block` that have to be written, numbers made of the bytes of their files), int64 each."""
        keys, contents, changed = [number(os.fsencode(path)) for path in block.paths], [], []
        for file in block.files():
            try:
                contents.append(number(file.read_bytes()))
            except OSError:
                contents.append(0)
        there = self.collection.fetch(keys, ["path", "content"])
        for i, (key, path) in enumerate(zip(keys, block.paths)):
            row = there.setdefault(key, {"path": path, "content": None})
            if any("\ud800" <= letter <= "\udfff" for letter in path):
                self.bad.append((block.root / path, "its name is not UTF-8, which Milvus requires; rename it"))
            elif path != row["path"]:
                self.bad.append((block.root / path, "its path has the same 63-bit key as another; rename it"))
            elif contents[i] != row["content"]:
                changed.append(i)
        changed = torch.tensor(changed, dtype=torch.int64)
        return changed, torch.tensor(contents, dtype=torch.int64)[changed]

    def _upsert(self, records, embeddings, positions, contents):
        columns = torch.stack([records.pids, records.camids, records.seqs, records.frames, positions, contents], 1).tolist()
        vectors = embeddings.half().float().numpy()  # rounded as in the .pt index: both hold the same numbers and rank alike
        return self.collection.write([
            {"key": number(os.fsencode(path)), "path": path, "vector": vector, **dict(zip(NUMBERS, numbers))}
            for path, vector, numbers in zip(records.paths, vectors, columns)])

    def remove(self, paths):
        """Delete the images of these paths (relative to data_root); return how many there were."""
        rows = list(self.collection.fetch([number(os.fsencode(path)) for path in paths], ["key"]))
        for first in range(0, len(rows), DEPTH):
            self.collection.call("delete", ids=rows[first : first + DEPTH])
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
        """(list of {field: value}, embeddings float16 [N, D]) of the rows, in the order in which the images came."""
        rows, embeddings = [], [torch.empty(0, self.dim, dtype=torch.float16)]
        for block in self.collection.read([*FIELDS, "vector"], condition):
            embeddings.append(torch.tensor([row.pop("vector") for row in block]).half())
            rows += block
        order = sorted(range(len(rows)), key=lambda i: (rows[i]["position"], rows[i]["path"]))
        return [rows[i] for i in order], torch.cat(embeddings)[order]

    def recall(self, k=10, sample=100, limit=200_000):
        """Return (recall@k of `nearest` against exact scores, rows compared). `sample` images of the gallery are the queries;
        a gallery of more than `limit` rows is compared over its first `limit` images only."""
        condition = f"position < {limit}" if len(self) > limit else ""
        rows, embeddings = self._read(condition)
        if not rows:
            raise ReidError(f"{self.uri}: the gallery of {self.run} is empty")
        queries = embeddings[:: max(1, len(rows) // sample)][:sample].float()
        exact = ExactSearch(embeddings).search(queries, min(k, len(rows)))[1]
        keys, found = torch.tensor([row["key"] for row in rows])[exact], self._nearest(queries, exact.shape[1], condition)[1]
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
        if self.field == "vector":
            return torch.tensor(values, dtype=torch.float32).reshape(*rows.shape, self.gallery.dim)
        return torch.tensor(values, dtype=torch.int64).reshape(rows.shape)


def number(data):
    """Hash bytes to 63 bits: Milvus' integers are signed."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


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
