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
from reid.data.paths import content_number, file_stats
from reid.extras.milvus_client import BATCH, DEPTH, FIELDS, INDEXES, NUMBERS, Collection, Column, batches, is_file
from reid.images import PREPROCESSING
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import ranked_lists

FORMAT = "reid-gallery/3"
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
    if not exists(uri, run, part):
        raise ReidError(f"{uri}: no gallery of the run {run} in it, or one of an older version; make it: {command}")
    gallery = MilvusGallery(uri, run, part)
    gallery._restore()
    if extractor is not None and not gallery._made_by(getattr(extractor, "fingerprint", extractor)):
        raise ReidError(f"{uri}: the gallery of {run} was made by other weights or preprocessing; make it again: {command}")
    gallery.collection.call("load_collection")
    return gallery


def exists(uri, run, part=""):
    """Whether there is a gallery of the run, of this version."""
    return not (is_file(uri) and not Path(uri).exists()) and MilvusGallery(uri, run, part).collection.call("has_collection")


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
    gallery.collection.create(dim, index_type, fingerprint=fingerprint, preprocessing=PREPROCESSING, mirror=mirror,
                              data_root=str(data_root), threshold=None, false_accept_rate=None, cameras=[])
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
    normalised, space, normalise = False, GalleryIndex.space, GalleryIndex.normalise  # camera statistics stay in

    def __init__(self, uri, run, part=""):
        self.uri, self.run, self.bad, self._hits = str(uri), run, [], {}
        name = re.sub("[^A-Za-z0-9]", "_", run)[:100]  # all that Milvus allows; the number keeps a-b and a_b apart
        self.collection = Collection(self.uri, f"reid_{name}_{key_of(json.dumps([FORMAT, run, part])):016x}")
        for field in FIELDS:
            setattr(self, f"{field}s", Column(self, field))
        self.embeddings = Column(self, "vector")

    def _restore(self):
        vars(self).update(self.collection.settings())
        self.names = {int(pid): name for pid, name in self.names.items()}

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

    def nearest(self, embeddings, topk, camids=None, frames=None, exclude=None, condition=""):
        """Find the `topk` most similar rows of each query: (scores float32 [Q, k], rows int64 [Q, k]), best first.

        The arguments are those of `GalleryIndex.nearest`, and a condition in Milvus' language; the engine applies it, camids
        and frames. Equal scores are ordered by path. FLAT is exact. More than 16,384 rows for a query raise ReidError.
        """
        conditions = [condition] if condition else []
        if camids is not None:
            conditions.append(f"camid in {[int(camid) for camid in camids]}")
        if frames is not None:
            conditions.append(f"frame >= {int(frames[0])} and frame <= {int(frames[1])}")
        exclude = [-1] * len(embeddings) if exclude is None else exclude.tolist()
        need = topk + any(row >= 0 for row in exclude)
        if need > DEPTH:
            raise ReidError(f"topk {topk}: Milvus returns at most {DEPTH:,} rows for a query, {need:,} are needed")
        limit = min(need + TIES, DEPTH)
        scores, rows = torch.full((len(embeddings), topk), -torch.inf), torch.full((len(embeddings), topk), -1)
        self._hits = {}  # replaced, not cleared: another thread may be reading the hits of its own search
        valid = (~embeddings.isnan().any(1)).nonzero().flatten()
        for part in valid.split(max(1, HITS // limit)) if len(valid) else ():
            for i, hits in zip(part.tolist(), self._request(embeddings[part].float(), need, limit, " and ".join(conditions))):
                kept = [(score, row) for score, _, row in sorted(hits) if row != exclude[i]][:topk]
                for place, (score, row) in enumerate(kept):
                    scores[i, place], rows[i, place] = -score, row
        return scores, rows

    def _request(self, embeddings, need, limit, condition):
        """Return [(-score, path, row)] for each query, unsorted; ask for more if the list ends within equal scores."""
        parameters = INDEXES[self.index_type][1](min(10 * need, DEPTH))
        found = self.collection.call("search", data=list(embeddings.numpy()), limit=limit, filter=condition,
                                     output_fields=list(FIELDS), anns_field="vector",
                                     search_params={"metric_type": "IP", "params": parameters})
        answers = []
        for query, hits in zip(embeddings, found):
            if len(hits) == limit < DEPTH and hits[-1]["distance"] == hits[need - 1]["distance"]:
                answers += self._request(query[None], need, min(4 * limit, DEPTH), condition)
                continue
            self._hits |= {hit["key"]: hit["entity"] for hit in hits}
            answers.append([(-hit["distance"], hit["entity"]["path"], hit["key"]) for hit in hits])
        return answers

    def add(self, extractor, records, strict=False, progress=True):
        """Embed the images of `records` that are new, or whose bytes have changed; return how many rows all ranks have written.

        Each rank embeds and writes every world_size-th image. Batches are acknowledged, and the row number is a hash of the
        path: killed at any moment, the same call goes on after the last acknowledged batch and ends with the same rows.
        Images that cannot be read are left out and listed in `bad` (`strict` raises ReidError).
        """
        self._require(fingerprint=extractor.fingerprint, preprocessing=PREPROCESSING, mirror=extractor.mirror,
                      dim=extractor.dim, data_root=str(records.root))
        self.bad, started, written, progress = [], time.monotonic(), 0, progress and distributed.rank == 0
        if distributed.rank == 0:
            self._add_cameras(records)
        mine = torch.arange(distributed.rank, len(records), distributed.world_size)
        with (tqdm(total=len(mine), unit="row", disable=not progress) as bar,
              ThreadPoolExecutor(1) as pool):  # the engine takes one batch while the next is embedded
            pending = pool.submit(int)
            for part in mine.split(BLOCK):
                block = records.select(part)
                stats = file_stats(block.files())
                new = self._new(block, stats)
                bar.update(len(part) - len(new))
                block, stats = block.select(new), stats[:, new]
                for found, embeddings in batches(extractor.stream(block.files(), strict, False, self.bad)):
                    written += pending.result()
                    pending = pool.submit(self._upsert, embeddings, block.select(found), stats[:, found])
                    bar.update(len(found))
            written += pending.result()
        ranks = distributed.gather_objects((written, self.bad))
        written, self.bad = sum(count for count, _ in ranks), [item for _, bad in ranks for item in bad]
        if distributed.rank == 0:
            self.collection.call("flush")
        distributed.gather_objects(None)  # a rank that counts rows during the flush may see none
        if progress:
            seconds = time.monotonic() - started
            print(f"{self.uri}: {written:,} rows written in {seconds:.1f} s ({written / max(seconds, 1e-9):,.0f} rows/s), "
                  f"{len(records) - written:,} were there or left out", flush=True)
        return written

    def write(self, embeddings, records, stats=None):
        """Write embeddings (float [N, D], norm 1) of `records`; return how many rows are new or of files with other bytes.

        stats: int64 [3, N] as `reid.data.paths.file_stats` returns, or None to read the files.
        """
        stats = file_stats(records.files()) if stats is None else stats
        new = self._new(records, stats)
        self._add_cameras(records)
        for rows in new.split(BATCH):
            self._upsert(embeddings[rows], records.select(rows), stats[:, rows])
        self.collection.call("flush")
        return len(new)

    def _new(self, records, stats):
        """Return positions in `records` of the images that are not in the gallery, or with other contents: int64 [n]."""
        keys, new = [key_of(path) for path in records.paths], []
        there = self.collection.fetch(keys, ["content"])
        for i, (key, path, content) in enumerate(zip(keys, records.paths, stats[2].tolist())):
            if any("\ud800" <= letter <= "\udfff" for letter in path):
                self.bad.append((records.root / path, "its name is not UTF-8, which Milvus requires; rename it"))
            elif key not in there or there[key]["content"] != content:
                new.append(i)
        return torch.tensor(new, dtype=torch.int64)

    def _upsert(self, embeddings, records, stats):
        columns = torch.stack([records.pids, records.camids, records.seqs, records.frames, *stats], 1).tolist()
        vectors = embeddings.half().float().numpy()  # rounded as in the .pt index: both hold the same numbers and rank alike
        self.collection.call("upsert", data=[{"key": key_of(path), "path": path, "vector": vector, **dict(zip(NUMBERS, numbers))}
                                             for path, vector, numbers in zip(records.paths, vectors, columns)])
        return len(vectors)

    def _add_cameras(self, records):
        self.cameras = sorted({*self.collection.settings()["cameras"], *records.camids.unique().tolist()})
        self.collection.set(cameras=self.cameras)

    def listing(self):
        """Return row, path, identity and modification time of every image, as `GalleryIndex.listing`."""
        found = [row for block in self.collection.read(["path", "pid", "mtime"]) for row in block]
        return tuple([row[name] for row in found] for name in ("key", "path", "pid", "mtime"))

    def replace(self, other):
        """Write the rows of a GalleryIndex, in the place of those of the same paths."""
        stats, records = torch.stack([other.sizes, other.mtimes, other.contents]), other.records()
        self._add_cameras(records)
        self._set_names(self.names | other.names)  # first: a name without rows does no harm
        for rows in torch.arange(len(other)).split(BATCH):
            self._upsert(other.embeddings[rows], records.select(rows), stats[:, rows])
        self.collection.call("flush")

    def erase(self, rows):
        """Delete some rows, and names that no row has any more."""
        for first in range(0, len(rows), BATCH):
            self.collection.call("delete", ids=rows[first : first + BATCH])
        self.collection.call("flush")
        self._forget_names()

    def relabel(self, rows, pid, name):
        """Give some rows another identity, under a name."""
        self._set_names(self.names | {pid: name})
        for first in range(0, len(rows), BATCH):
            found = self.collection.fetch(rows[first : first + BATCH], ["path", "vector", *NUMBERS])
            self.collection.call("upsert", data=[{**row, "vector": torch.tensor(row["vector"]).numpy(), "pid": pid}
                                                 for row in found.values()])
        self.collection.call("flush")
        self._forget_names()

    def _forget_names(self):
        present = set(self.listing()[2])
        self._set_names({pid: name for pid, name in self.names.items() if pid in present})

    def _set_names(self, names):
        self.names = names
        self.collection.set(names={str(pid): name for pid, name in names.items()})

    def download(self, limit=2_000_000, condition=""):
        """Return the rows that meet `condition` as a GalleryIndex, sorted by path. `limit` is that of a whole gallery: 2 million
        embeddings of 1,024 numbers are 4 GiB as float16."""
        if not condition and (count := len(self)) > limit:
            raise ReidError(f"{self.uri}: {count:,} rows, but at most {limit:,} are evaluated in memory; evaluate on a dataset "
                            "of its own, and search the large gallery")
        rows, embeddings = [], [torch.empty(0, self.dim, dtype=torch.float16)]
        for block in self.collection.read(["path", *NUMBERS, "vector"], condition):
            embeddings.append(torch.tensor([row.pop("vector") for row in block]).half())
            rows += block
        order = sorted(range(len(rows)), key=lambda i: rows[i]["path"])
        pids, camids, seqs, frames, *stats = (torch.tensor([rows[i][name] for i in order], dtype=torch.int64) for name in NUMBERS)
        records = Records(Path(self.data_root), [rows[i]["path"] for i in order], pids, camids, seqs, frames)
        index = GalleryIndex(torch.cat(embeddings)[order], records, self.fingerprint, self.mirror, stats)
        index.threshold, index.false_accept_rate = self.threshold, self.false_accept_rate
        index.data_root = self.data_root  # "" stays: of an index without a folder
        return index

    def recall(self, k=10, sample=100, limit=200_000):
        """Return (recall@k of `nearest` against exact search, rows compared). `sample` images of the gallery are the queries; of
        a gallery with more than `limit` rows, about so many are compared: keys are hashes, so low keys are a random part."""
        size = max(len(self), 1)
        condition = f"key <= {(2**63 - 1) * min(limit, size) // size}"
        index = self.download(condition=condition)
        queries = index.embeddings[:: max(1, len(index) // sample)][:sample].float()
        exact = index.nearest(queries, min(k, len(index)))[1]
        keys = torch.tensor([key_of(path) for path in index.paths])[exact]
        found = self.nearest(queries, exact.shape[1], condition=condition)[1]
        return float((found[:, :, None] == keys[:, None]).any(1).float().mean()), len(index)


def key_of(path):
    """Return the primary key of a path below the data root."""
    return content_number(os.fsencode(path))
