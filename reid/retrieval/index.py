"""The gallery index: one matrix of embeddings with the labels of each image, its file, and exact search."""

import copy
import os
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from reid import ReidError, distributed
from reid.data.datasets import Records
from reid.data.names import UNKNOWN, UNKNOWN_PID, folder_pid, identity_name
from reid.data.paths import Paths, file_stats
from reid.files import VERIFY_LIMIT, load, save
from reid.images import PREPROCESSING
from reid.retrieval.camera import CameraStatistics
from reid.retrieval.ranked import ranked_lists
from reid.retrieval.rows import COLUMNS, STATS, Rows, erased_key
from reid.retrieval.search import ExactSearch, merge_shards
from reid.retrieval.stored import FORMAT, VERSION, changing, check_replaceable, delete_images, find_unchanged, same_folder

PLAIN = {"data_root": str, "split": (str, type(None)), "bad": list, "fingerprint": str, "preprocessing": str, "mirror": bool,
         "names": dict, **dict.fromkeys(("threshold", "camera_threshold", "false_accept_rate"), (int, float, type(None)))}


class GalleryIndex(Rows):
    """Embeddings [N, D] with pids, camids, seqs, frames (int64 [N]) and paths relative to `data_root`.

    Make one with `build` (from images), with `empty` and `add` (from embeddings), or with `load` (from a file).
    threshold: cosine above which two images are a match, at `false_accept_rate` (None: not measured); camera_threshold: the
    same for `camera_normalised`. names: {pid: name} of identities added by name. queries: a second GalleryIndex with the queries
    of an evaluation, or None. bad: [(file, reason, size, time)] of images that `build` left out; of erased ones the
    `erased_key`. split: folder of `data_root`
    that was listed, "" for `data_root` itself, None once rows are added, erased or renamed, since it is no listing then.
    kept: rows that `build` took over. device: where it is searched, that of the Extractor.
    """

    def __init__(self, embeddings, records, fingerprint, mirror, stats=None):
        self.embeddings = embeddings
        self.paths = records.paths if isinstance(records.paths, Paths) else Paths.of(records.paths)
        self.pids, self.camids, self.seqs, self.frames = records.pids, records.camids, records.seqs, records.frames
        self.sizes, self.mtimes, self.contents = file_stats(records.files()) if stats is None else stats
        self.data_root, self.split, self.names = str(records.root), records.split, {}
        self.fingerprint, self.preprocessing, self.mirror = fingerprint, PREPROCESSING, mirror
        self.normalised = False  # whether camera statistics are taken out
        self.threshold = self.camera_threshold = self.false_accept_rate = self.queries = None
        self.bad, self.kept, self.device, self._search, self._statistics = [], 0, "cpu", {}, None
        self._copy = None  # without camera statistics, made once

    @classmethod
    def build(cls, extractor, records, strict=False, dtype=torch.float16, progress=True, rank=0, world_size=1, old=None):
        """Embed `records` into an index. Images that cannot be read are left out and listed in `.bad` (`strict` raises).

        old: an index of the same folder by the same network; its rows of files that have not changed are taken over, and those of
        images of elsewhere that were enrolled; what was erased from it is left out.
        """
        if old is not None and (erased := old.erased_keys()):
            records = records.select(torch.tensor([erased_key(path) not in erased for path in records.paths]))
        rows, mtimes = torch.full((2, len(records)), -1) if old is None else find_unchanged(old, records.paths)
        own = (rows < 0).nonzero()[:, 0][rank::world_size]  # under torchrun each rank embeds its share, which may be empty
        files = records.select(own).files()
        stats = file_stats(files)  # first: an image that is replaced while it is embedded must count as changed
        embeddings, kept, bad = extractor.embed_records(files, strict, progress, dtype)
        found = dict(zip(map(str, files), stats[:2].T.tolist())) if bad else {}
        bad = [(str(file), str(reason), *found[str(file)]) for file, reason in bad]
        stats, kept = stats[:, kept], own[kept]
        if world_size > 1:
            embeddings, kept, order, parts = distributed.gather_rows(embeddings, kept, (stats, bad))
            stats, bad = torch.cat([part for part, _ in parts], 1)[:, order], [row for _, rows in parts for row in rows]
        taken, embedded = (rows >= 0).nonzero()[:, 0], len(kept)
        if len(taken):
            there = rows[taken]
            kept, order = torch.cat([kept, taken]).sort()
            embeddings = torch.cat([embeddings, old.embeddings[there].to(dtype)])[order]
            stats = torch.cat([stats, torch.stack([old.sizes[there], mtimes[taken], old.contents[there]])], 1)[:, order]
        index = cls(embeddings, records.select(kept), extractor.fingerprint, extractor.mirror, stats)
        index.bad, index.device = bad, getattr(extractor, "device", "cpu")
        if old is not None:
            index.take_changes(old)
        index.kept = len(index) - embedded
        return index

    @classmethod
    def empty(cls, extractor, threshold=None):
        """Make an index without images, for `add`. threshold: cosine above which a hit is a match."""
        none = torch.empty(0, dtype=torch.int64)
        index = cls(torch.empty(0, extractor.dim, dtype=torch.float16), Records(Path(), [], none, none, none, none),
                    extractor.fingerprint, extractor.mirror)
        index.data_root, index.split, index.threshold, index.device = "", None, threshold, getattr(extractor, "device", "cpu")
        return index

    def add(self, embeddings, names=None, pids=None, camids=None, paths=None):
        """Append embeddings of the Extractor that the index was made for; return how many rows were added.

        embeddings: float [n, D] of norm 1; rows of NaN (empty boxes) are skipped with a warning. names: n names of
        identities; pids: n integers (default: a number derived from the name, or unlabelled); camids: n integers; paths: n
        image files, relative to `data_root`. Raises ReidError where numbers or dimensions differ.
        """
        self._require_plain("add")
        count, columns = len(embeddings), {"names": names, "pids": pids, "camids": camids, "paths": paths}
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embeddings.shape[1]:
            raise ReidError(f"embeddings of shape {tuple(embeddings.shape)} do not fit an index of {self.embeddings.shape[1]} "
                            "dimensions")
        for name, values in columns.items():
            if values is not None and len(values) != count:
                raise ReidError(f"{count} embeddings but {len(values)} {name}: give one for each")
        if pids is None:
            pids = [UNKNOWN_PID] * count if names is None else [folder_pid(name) for name in names]
        unknown = torch.full((count,), UNKNOWN)
        keep = embeddings.isfinite().all(1)
        if skipped := count - int(keep.sum()):
            warnings.warn(f"{skipped} of {count} embeddings are not finite (empty boxes?) and were not added", stacklevel=2)
        records = Records(Path(self.data_root), [str(path) for path in paths or [""] * count], torch.as_tensor(pids).long(),
                          unknown if camids is None else torch.as_tensor(camids).long(), unknown, unknown).select(keep)
        new = GalleryIndex(embeddings[keep].to(self.embeddings), records, self.fingerprint, self.mirror)
        self.names |= {int(pid): str(name) for pid, name, kept in zip(pids, names or (), keep) if kept}
        self.extend(new)
        self.split = None
        return len(new)

    def __len__(self):
        return len(self.embeddings)

    def records(self):
        """Return the images as reid.data.datasets.Records."""
        columns = self.pids, self.camids, self.seqs, self.frames
        return Records(Path(self.data_root), list(self.paths), *columns, split=self.split)

    def select(self, rows):
        """Return an index of some rows, int64 [n] or bool [N], without names, thresholds and queries."""
        self._require_plain("select")
        stats = [getattr(self, name)[rows] for name in STATS]
        index = GalleryIndex(self.embeddings[rows], self.records().select(rows), self.fingerprint, self.mirror, stats)
        index.device, index.data_root = self.device, self.data_root  # "" stays: of an index without a folder
        return index

    @property
    def scoring_device(self):
        """`device`, or the CPU if that is a GPU without room for the metrics and re-ranking of this gallery."""
        device = torch.device(self.device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of what embedding has left
            needed = (4 << 30) + 24 * self.embeddings.numel()  # copies in float32, and blocks of scores
            device = device if torch.cuda.mem_get_info(device)[0] > needed else torch.device("cpu")
        return device

    @property
    def statistics(self):
        """The CameraStatistics of the gallery, or None where no camera is known."""
        if self._statistics is None and bool((self.camids != UNKNOWN).any()):
            self._statistics = CameraStatistics.fit(self.embeddings, self.camids)
        return self._statistics

    @property
    def space(self):
        """Name what the scores depend on: the weights, and whether camera statistics are taken out."""
        return self.fingerprint + "+camera_norm" * self.normalised

    def camera_normalised(self):
        """Return a copy with each camera's statistics taken out of the embeddings, also of `queries`; without cameras, itself."""
        if self.statistics is None or self.normalised:
            return self
        if self._copy is not None:
            return self._copy
        self._copy = index = copy.copy(self)
        index.normalised, index.threshold, index._search = True, self.camera_threshold, {}
        index.embeddings = self.statistics.apply(self.embeddings, self.camids, self.embeddings.dtype)
        if self.queries is not None:
            index.queries = copy.copy(self.queries)
            index.queries.embeddings = index.normalise(self.queries.embeddings, self.queries.camids)
        return index

    def normalise(self, embeddings, camids=None):
        """Take the statistics of their cameras out of queries, float [Q, D], if they are taken out of this index.

        camids: int64 [Q] (default: unknown). Unknown cameras get the statistics of the whole gallery, and a camera without images
        in the gallery those of its queries.
        """
        if not self.normalised or not len(embeddings):
            return embeddings
        camids = torch.full((len(embeddings),), UNKNOWN) if camids is None else camids
        return self.statistics.joined(embeddings, camids).apply(embeddings, camids)

    def hit(self, row):
        """Return (path, name of the identity or "" where it is unlabelled, pid, camid) of a row."""
        path, pid = self.paths[row], int(self.pids[row])
        name = self.names.get(pid) or identity_name(pid, path)
        return str(Path(self.data_root) / path) if path else "", name, pid, int(self.camids[row])

    def search(self, embeddings, topk=5, camids=None, frames=None, exclude=None, queries=None, rank=0, world_size=1):
        """Find the `topk` most similar images of each query: a list of RankedList, one for each of the Q embeddings.

        queries: Q values of `reid.retrieval.ranked.Query`, or None. The rest is as in `nearest`.
        """
        return ranked_lists(self, *self.nearest(embeddings, topk, camids, frames, exclude, rank, world_size), queries)

    def nearest(self, embeddings, topk, camids=None, frames=None, exclude=None, rank=0, world_size=1):
        """Find the `topk` most similar rows of each query, exact: (scores float32 [Q, k], rows int64 [Q, k]), best first.

        embeddings: float32 [Q, D] of norm 1. camids: cameras to keep. frames: (first, last) frame to keep. exclude: row to
        leave out for each query, int64 [Q] (-1: none). Equal scores are ordered by row. Where fewer than topk rows are left,
        and for a query that is NaN, score is -inf and row -1. Under torchrun each rank searches its stretch of the rows, and
        all get the whole answer.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embeddings.shape[1]:
            raise ReidError(f"queries of shape {tuple(embeddings.shape)} in a gallery of {self.embeddings.shape[1]} dimensions")
        if topk < 1:
            raise ReidError(f"topk {topk}: give the number of images to find, from 1")
        no_crop = embeddings.isnan().any(1)  # as `Extractor.embed` marks an empty box
        start, stop = len(self) * rank // world_size, len(self) * (rank + 1) // world_size
        keep = None if camids is None else torch.isin(self.camids[start:stop], torch.tensor(list(camids), dtype=torch.int64))
        if frames is not None:
            within = (self.frames[start:stop] >= frames[0]) & (self.frames[start:stop] <= frames[1])
            keep = within if keep is None else keep & within
        if exclude is not None:
            exclude = torch.where((exclude >= start) & (exclude < stop), exclude - start, -1)
        if (start, stop) not in self._search:
            self._search = {(start, stop): ExactSearch(self.embeddings[start:stop], self.device)}
        scores, rows = self._search[start, stop].search(embeddings.nan_to_num(), topk, keep, exclude)
        scores[no_crop], rows[no_crop] = -torch.inf, -1
        if world_size == 1:
            return scores, rows
        return merge_shards(distributed.gather_objects((scores, torch.where(rows < 0, rows, rows + start))), topk)

    def save(self, path, overwrite=False):
        """Write the index, whole or not at all. An index of another folder, or any other file there, raises ReidError.

        overwrite: replace these, too.
        """
        self._require_plain("save")
        check_replaceable(path, self.data_root, self.queries is not None, overwrite, self.split is not None)
        save(path, self._part(), FORMAT, VERSION, overwrite)

    def save_built(self, path, overwrite=False):
        """Write an index that `build` has made, with what other processes have enrolled and erased in the stored one since."""
        with changing(path):
            stored = self.reusable(path, self, self.data_root, overwrite, verbose=False)
            for part, other in ((self, stored), (self.queries, stored and stored.queries)):
                if part is not None and other is not None:
                    part.take_changes(other)
            self.save(path, overwrite)
            delete_images(path, self)

    def _part(self):
        columns = {name: getattr(self, name).clone(memory_format=torch.contiguous_format) for name in COLUMNS}
        part = {"embeddings": self.embeddings, "path_blob": self.paths.blob, "path_offsets": self.paths.offsets, **columns,
                **{name: getattr(self, name) for name in PLAIN}, "bad": [list(row) for row in self.bad]}
        if self.statistics is not None:
            part["statistics"] = self.statistics._asdict()
        return part if self.queries is None else part | {"queries": self.queries._part()}

    @classmethod
    def load(cls, path, extractor_or_fingerprint=None, command=lambda index: "python eval.py --save_index"):
        """Open an index, memory-mapped. With an Extractor (or a fingerprint) one of other weights raises ReidError.

        command: for the advice, a function of the stored index, or None where that cannot be read.
        """
        if not Path(path).is_file():
            raise ReidError(f"{path}: no such index; make it: {command(None)}")
        try:
            index = cls._restore(load(path, FORMAT, VERSION, mmap=True), path)
        except ReidError as error:
            raise ReidError(f"{error}: {command(None)}" if str(error).endswith("make it again") else error) from error
        wanted = getattr(extractor_or_fingerprint, "fingerprint", extractor_or_fingerprint)
        index.device = getattr(extractor_or_fingerprint, "device", "cpu")
        if index.preprocessing != PREPROCESSING or (wanted is not None and index.fingerprint != wanted):
            raise ReidError(f"{path}: made by other weights or another preprocessing; make it again: {command(index)}")
        return index

    @classmethod
    def reusable(cls, path, extractor, data_root, overwrite=False, verbose=True):
        """Open the index whose rows a new one of `data_root` may take over: of the same network, mirror images and folder.

        extractor: an Extractor, or another index of it. Without such an index, return None. One that was changed by hand and
        cannot be taken over raises ReidError, unless `overwrite`.
        """
        changed = 0
        with suppress(ReidError):  # missing, or damaged
            index = cls.load(path)
            index.device = getattr(extractor, "device", "cpu")
            settings = index.fingerprint, index.preprocessing, index.mirror
            if settings == (extractor.fingerprint, PREPROCESSING, extractor.mirror) and index.split is not None \
                    and same_folder(index.data_root, data_root):
                return index
            changed = sum(map(os.path.isabs, index.paths)) + len(index.erased_keys())
        if changed and not overwrite:
            raise ReidError(f"{path}: of another network or other settings, and {changed:,} images were enrolled or erased by "
                            "hand, which would be forgotten; give another --gallery_uri, or replace it with --overwrite")
        if verbose and Path(path).exists() and distributed.rank == 0:
            print(f"{path}: of another network, of other settings or damaged, so it is made anew", flush=True)
        return None

    def update(self, old):
        """Return text on how many rows `build` has taken over from `old`, embedded, and dropped."""
        dropped = len(set(old.paths) - set(self.paths))
        erased = len(self.erased_keys())
        return (f"{self.kept:,} images kept, {len(self) - self.kept:,} embedded, {dropped:,} dropped"
                + f", {erased:,} erased ones left out; --add enrols them again" * bool(erased))

    @classmethod
    def _restore(cls, part, path):
        """Make the index of a dict that `_part` made; raise ReidError for one that contradicts itself."""
        def require(condition, reason):
            if not condition:
                raise ReidError(f"{path}: {reason}; the index is damaged, remove it and make it again")

        embeddings, blob, ends = (part.get(name) for name in ("embeddings", "path_blob", "path_offsets"))
        require(isinstance(embeddings, torch.Tensor) and embeddings.ndim == 2, "has no embeddings [N, D]")
        require(embeddings.dtype in (torch.float16, torch.float32), f"embeddings are {embeddings.dtype}")
        for name in (*COLUMNS, "path_offsets"):
            column, count = part.get(name), len(embeddings) + (name == "path_offsets")
            require(isinstance(column, torch.Tensor) and column.dtype == torch.int64 and column.shape == (count,),
                    f"{name} is not int64 [{count}]")
        require(isinstance(blob, torch.Tensor) and blob.dtype == torch.uint8 and blob.ndim == 1, "has no paths")
        require(ends[0] >= 0 and ends[-1] <= len(blob) and bool((ends.diff() >= 0).all()), "its paths do not add up")
        for name, kind in PLAIN.items():
            require(isinstance(part.get(name), kind), f"its {name} is missing or of a wrong type")
        require(all(isinstance(pid, int) and isinstance(name, str) for pid, name in part["names"].items()), "its names are wrong")
        # NaN anywhere makes a sum NaN; a matrix too large to verify here is checked where it is searched
        small = embeddings.numel() * embeddings.element_size() <= VERIFY_LIMIT
        require(not small or not embeddings.numel() or bool(torch.isfinite(embeddings.float().sum())),
                "embeddings hold NaN or infinite values")
        require(part.get("split", ...) in (None, "", "gallery", "query", "train", "val"), "its split is wrong")
        require(all(isinstance(row, list) and [type(value) for value in row] == [str, str, int, int] for row in part["bad"]),
                "its list of unreadable images is wrong")
        records = Records(Path(part["data_root"]), Paths(blob, ends), *(part[name] for name in COLUMNS[:4]))
        index = cls(embeddings, records, part["fingerprint"], part["mirror"], [part[name] for name in STATS])
        for name in PLAIN:
            setattr(index, name, part.get(name))
        if "statistics" in part:
            index._statistics = CameraStatistics.checked(part["statistics"], embeddings.shape[1])
            require(index._statistics is not None, "its camera statistics are damaged")
        if isinstance(part.get("queries"), dict):
            index.queries = cls._restore(part["queries"], path)
        return index
