"""A gallery in Milvus, with the interface of `GalleryIndex`: in a *.db folder of this machine, a server or a cluster."""

import json
import os
import re
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch
from tqdm import tqdm

from reid import ReidError, distributed
from reid.data.datasets import Records
from reid.extras.milvus_client import BATCH, DEPTH, INDEXES, NUMBERS, VECTORS, Collection, batches, is_file
from reid.images import PREPROCESSING
from reid.retrieval.index import GalleryIndex, content_number, file_stats
from reid.retrieval.ranked import ranked_lists

FORMAT = "reid-gallery/2"
FIELDS = ("path", "pid", "camid", "seq", "frame", "position")  # fetched with every hit
HITS = 40_000  # hits in one reply, of about 200 bytes
TIES = 8  # rows fetched beyond topk, to put equal scores at the end of a list in order
BLOCK = 4 * BATCH  # images that are looked up at once


def open_gallery(uri, run, extractor=None, part=""):
    """Open a gallery to search in it.

    extractor: an Extractor, or the fingerprint of weights and preprocessing. part: "queries" for those that `eval.py` keeps.
    A gallery that is missing or was made by other weights raises ReidError with the command that makes it.
    """
    command = (f"python {'eval.py' if part else 'inference.py'} --save_index --gallery_uri {shlex.quote(str(uri))} "
               f"--exp_name {shlex.quote(run)}")
    if is_file(uri) and not Path(uri).exists():
        raise ReidError(f"{uri}: no such gallery; make it: {command}")
    gallery = MilvusGallery(uri, run, part)
    if not gallery.collection.call("has_collection"):
        raise ReidError(f"{uri}: no gallery of the run {run} in it, or one of an older version; make it again: {command}")
    gallery._restore()
    if extractor is not None and not gallery._made_by(getattr(extractor, "fingerprint", extractor)):
        raise ReidError(f"{uri}: the gallery of {run} was made by other weights or preprocessing; make it again: {command}")
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
    if gallery.collection.call("has_collection"):
        gallery._restore()
        gallery._require(data_root=str(data_root))
        if gallery._made_by(fingerprint):
            gallery._require(mirror=mirror, dim=dim)
            gallery.collection.call("load_collection")
            if index_type != gallery.index_type:
                gallery.collection.change_index(index_type)
                gallery.index_type = index_type
            return gallery
        gallery.collection.call("drop_collection")
    gallery.collection.create(dim, index_type, format=FORMAT, run=run, part=part, fingerprint=fingerprint, mirror=mirror,
                              preprocessing=PREPROCESSING, data_root=str(data_root), threshold=None, false_accept_rate=None,
                              cameras=[], start=0, next=0, listing="")
    gallery._restore()
    return gallery


def build_gallery(uri, run, extractor, records, index_type="FLAT", strict=False, progress=True):
    """Embed `records` into a gallery, new or not, and return it. Every rank of a torchrun calls this; see MilvusGallery.add."""
    if distributed.world_size > 1 and is_file(uri):
        raise ReidError(f"{uri}: only one process can write a file; start a server for {distributed.world_size} processes")
    made_by = extractor.fingerprint, extractor.mirror, extractor.dim, records.root
    gallery = create_gallery(uri, run, *made_by, index_type) if distributed.rank == 0 else None
    distributed.gather_objects(None)  # the other ranks open what rank 0 has made
    gallery = gallery if gallery is not None else open_gallery(uri, run, extractor)
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
            gallery.write(rows.embeddings, rows.records(), torch.stack([rows.sizes, rows.mtimes, rows.contents]))
            gallery.collection.set(threshold=rows.threshold, false_accept_rate=rows.false_accept_rate)


class MilvusGallery:
    """Embeddings and records of images in one Milvus collection; the functions above open it.

    The number of a row is its primary key, 63 bits of a hash of the image's path: an image written twice leaves one row. (Send
    it to a browser as text, which rounds numbers above 2^53.) paths, pids, camids, seqs, frames and embeddings (float32) take
    row numbers as the tensors of a GalleryIndex do; hits of the last search are in memory, other rows are fetched.
    cameras: sorted list of the camera ids, -1 (unknown) included. bad: [(file, reason)] of images left out by `add`.
    """

    names = MappingProxyType({})
    hit = GalleryIndex.hit  # which reads paths, pids, camids, names and data_root

    def __init__(self, uri, run, part=""):
        self.uri, self.run, self.part, self.bad, self._hits = str(uri), run, part, [], {}
        name = re.sub("[^A-Za-z0-9]", "_", run)[:100]  # all that Milvus allows; the number keeps a-b and a_b apart
        self.collection = Collection(self.uri, f"reid_{name}_{content_number(json.dumps([run, part]).encode()):016x}")
        for field in FIELDS[:5]:
            setattr(self, f"{field}s", _Column(self, field))
        self.embeddings = _Column(self, "vector")

    def _restore(self):
        settings = self.collection.settings()
        if [settings.get(name) for name in ("format", "run", "part")] != [FORMAT, self.run, self.part]:
            raise ReidError(f"{self.uri}: the collection {self.collection.name} does not hold the run {self.run} in the format "
                            "of this version; choose another --exp_name or --gallery_uri")
        vars(self).update(settings)

    def _made_by(self, fingerprint):
        return (self.fingerprint, self.preprocessing) == (fingerprint, PREPROCESSING)

    def _require(self, **settings):
        for name, value in settings.items():
            own = getattr(self, name)
            if own != value and not (name == "data_root" and Path(own).resolve() == Path(value).resolve()):
                raise ReidError(f"{self.uri}: the gallery of {self.run} was made with {name} {own}, not {value}; "
                                "choose another --exp_name or --gallery_uri")

    def __len__(self):
        return int(self.collection.call("query", filter="", output_fields=["count(*)"])[0]["count(*)"])

    def __contains__(self, row):
        return row in self._hits or row in self.collection.fetch([row], ["key"])

    def search(self, embeddings, topk=5, camids=None, frames=None, exclude=None, queries=None):
        """Search as `nearest` does; return one RankedList for each query. queries: Q values of `ranked.Query`, or None."""
        return ranked_lists(self, *self.nearest(embeddings, topk, camids, frames, exclude), queries)

    def nearest(self, embeddings, topk, camids=None, frames=None, exclude=None):
        """The `topk` most similar rows of each query: (scores float32 [Q, k], rows int64 [Q, k]), best first.

        The arguments are those of `GalleryIndex.nearest`; the engine applies camids and frames. Equal scores are in the order
        in which the images came. FLAT is exact. HNSW and IVF_SQ8 look at 10 x topk rows at least and return float32 scores,
        which for IVF_SQ8 are computed here from fetched embeddings. More than 16,384 rows for a query raise ReidError.
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
        scores, rows = torch.full((len(embeddings), topk), -torch.inf), torch.full((len(embeddings), topk), -1)
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

    def add(self, extractor, records, strict=False, progress=True):
        """Embed the images of `records` that are new, or whose bytes have changed; return how many rows all ranks have written.

        Each rank embeds and writes every world_size-th image. Batches are acknowledged, and the row number is a hash of the
        path: killed at any moment, the same call goes on after the last acknowledged batch and ends with the same rows.
        Images that cannot be read are left out and listed in `bad` (`strict` raises ReidError).
        """
        if not self._made_by(extractor.fingerprint):
            raise ReidError("images can only be added to a gallery by the weights that made it")
        self._require(mirror=extractor.mirror, dim=extractor.dim, data_root=str(records.root))
        self.bad, started, progress = [], time.monotonic(), progress and distributed.rank == 0
        start = distributed.share(self._first_position(records) if distributed.rank == 0 else None)
        mine = torch.arange(distributed.rank, len(records), distributed.world_size)

        written = self._write(records, mine, start, lambda block, _: batches(
            extractor.stream(block.files(), strict, False, self.bad)), progress=progress)
        ranks = distributed.gather_objects((written, self.bad))
        written, self.bad = sum(count for count, _ in ranks), [item for _, bad in ranks for item in bad]
        if distributed.rank == 0:
            self.collection.call("flush")
        if progress:
            seconds = time.monotonic() - started
            print(f"{self.uri}: {written:,} rows written in {seconds:.1f} s ({written / max(seconds, 1e-9):,.0f} rows/s), "
                  f"{len(records) - written:,} were there or left out", flush=True)
        return written

    def write(self, embeddings, records, stats=None):
        """Write embeddings (float [N, D], norm 1) of `records`; return how many rows are new or of files with other bytes.

        stats: int64 [3, N] as `reid.retrieval.index.file_stats` returns, or None to read the files.
        """
        written = self._write(records, torch.arange(len(records)), self._first_position(records),
                              lambda block, rows: [(torch.arange(len(rows)), embeddings[rows])], stats)
        self.collection.call("flush")
        return written

    def _first_position(self, records):
        """Position of the first of `records`, after those of earlier calls; the same list of paths gets the same again."""
        settings = self.collection.settings()
        start, listing = settings["start"], content_number(json.dumps(list(records.paths)).encode())
        if listing != settings["listing"]:
            start, self.cameras = settings["next"], sorted({*settings["cameras"], *records.camids.unique().tolist()})
            self.collection.set(start=start, next=start + len(records), listing=listing, cameras=self.cameras)
        return start

    def _write(self, records, rows, start, embed, stats=None, progress=False):
        """Write those of `rows` of `records` that are not in the gallery; return their number.

        embed(block, rows) yields (positions in `block` int64 [n], embeddings [n, D]); `block` has the records of `rows`.
        """
        written = 0
        with (tqdm(total=len(rows), unit="row", disable=not progress) as bar,
              ThreadPoolExecutor(1) as pool):  # the engine takes one batch while the next is embedded
            pending = pool.submit(int)
            for part in rows.split(BLOCK):
                block = records.select(part)
                files = file_stats(block.files()) if stats is None else stats[:, part]
                changed = self._changed(block, files[2].tolist())
                bar.update(len(part) - len(changed))
                part, block, files = part[changed], block.select(changed), files[:, changed]
                for found, embeddings in embed(block, part):
                    written += pending.result()
                    pending = pool.submit(self._upsert, block.select(found), embeddings, part[found] + start, files[:, found])
                    bar.update(len(found))
            return written + pending.result()

    def _changed(self, block, contents):
        """Positions in `block` of the images that are not in the gallery, or with other contents: int64 [n]."""
        keys, changed = [key_of(path) for path in block.paths], []
        there = self.collection.fetch(keys, ["path", "content"])
        for i, (key, path, content) in enumerate(zip(keys, block.paths, contents)):
            row = there.setdefault(key, {"path": path, "content": None})
            if any("\ud800" <= letter <= "\udfff" for letter in path):
                self.bad.append((block.root / path, "its name is not UTF-8, which Milvus requires; rename it"))
            elif path != row["path"]:
                self.bad.append((block.root / path, "its path has the same 63-bit key as another; rename it"))
            elif content != row["content"]:
                changed.append(i)
        return torch.tensor(changed, dtype=torch.int64)

    def _upsert(self, records, embeddings, positions, files):
        columns = torch.stack([records.pids, records.camids, records.seqs, records.frames, positions, *files], 1).tolist()
        vectors = embeddings.half().float().numpy()  # rounded as in the .pt index: both hold the same numbers and rank alike
        return self.collection.write([{"key": key_of(path), "path": path, "vector": vector, **dict(zip(NUMBERS, numbers))}
                                      for path, vector, numbers in zip(records.paths, vectors, columns)])

    def remove(self, paths):
        """Delete the images of these paths (relative to data_root); return how many there were."""
        rows = list(self.collection.fetch([key_of(path) for path in paths], ["key"]))
        if rows:
            self.collection.call("delete", ids=rows)
        return len(rows)

    def download(self, limit=2_000_000, condition=""):
        """Return the rows that meet `condition` as a GalleryIndex, in the order in which the images came. `limit` is that of a
        whole gallery: 2 million embeddings of 1,024 numbers are 4 GiB as float16."""
        if not condition and (count := len(self)) > limit:
            raise ReidError(f"{self.uri}: {count:,} rows, but at most {limit:,} are evaluated in memory; evaluate on a dataset "
                            "of its own, and search the large gallery")
        rows, embeddings = [], [torch.empty(0, self.dim, dtype=torch.float16)]
        for block in self.collection.read(["path", *NUMBERS, "vector"], condition):
            embeddings.append(torch.tensor([row.pop("vector") for row in block]).half())
            rows += block
        order = sorted(range(len(rows)), key=lambda i: (rows[i]["position"], rows[i]["path"]))
        rows = [rows[i] for i in order]
        numbers = {name: torch.tensor([row[name] for row in rows], dtype=torch.int64) for name in NUMBERS}
        records = Records(Path(self.data_root), [row["path"] for row in rows], *(numbers[name] for name in FIELDS[1:5]))
        index = GalleryIndex(torch.cat(embeddings)[order], records, self.fingerprint, self.mirror,
                             [numbers[name] for name in ("size", "mtime", "content")])
        index.threshold, index.false_accept_rate = self.threshold, self.false_accept_rate
        return index

    def recall(self, k=10, sample=100, limit=200_000):
        """Return (recall@k of `nearest` against exact search, rows compared). `sample` images of the gallery are the queries; of
        a gallery with more than `limit` rows, the first `limit` images are searched."""
        condition = f"position < {limit}" if len(self) > limit else ""
        index = self.download(condition=condition)
        if not len(index):
            raise ReidError(f"{self.uri}: the gallery of {self.run} is empty")
        queries = index.embeddings[:: max(1, len(index) // sample)][:sample].float()
        exact = index.nearest(queries, min(k, len(index)))[1]
        keys = torch.tensor([[key_of(index.paths[row]) for row in rows] for rows in exact.tolist()])
        found = self._nearest(queries, exact.shape[1], condition)[1]
        return float((found[:, :, None] == keys[:, None]).any(1).float().mean()), len(index)


class _Column:
    """One field of the rows of a gallery, indexed by row numbers: int64 [n], a list, or one number."""

    def __init__(self, gallery, field):
        self.gallery, self.field = gallery, field

    def __getitem__(self, rows):
        rows, vectors = torch.as_tensor(rows, dtype=torch.int64), self.field == "vector"
        keys, found = rows.flatten().tolist(), {} if vectors else self.gallery._hits
        if missing := [key for key in keys if key not in found]:
            found |= self.gallery.collection.fetch(missing, ["vector"] if vectors else FIELDS)
        if gone := [key for key in keys if key not in found]:
            raise ReidError(f"{self.gallery.uri}: no row {gone[0]}; it was removed")
        values = [found[key][self.field] for key in keys]
        if self.field == "path":
            return values if rows.ndim else values[0]
        shape = (*rows.shape, self.gallery.dim) if vectors else rows.shape
        return torch.tensor(values, dtype=torch.float32 if vectors else torch.int64).reshape(shape)


def key_of(path):
    """Primary key of a path below the data root."""
    return content_number(os.fsencode(path))
