"""The gallery index: one matrix of embeddings with what is known of each image, on disk, and its exact search."""

import itertools
import os
from pathlib import Path

import torch

from reid import ReidError
from reid.data.datasets import Records
from reid.files import VERIFY_LIMIT, load, save
from reid.images import PREPROCESSING
from reid.retrieval.ranked import identity_name, ranked_lists
from reid.retrieval.search import ExactSearch

FORMAT, VERSION = "reid-index", 1
COLUMNS = ("pids", "camids", "seqs", "frames", "sizes", "mtimes")  # int64 [N] each


class Paths:
    """N path names as one uint8 blob and N + 1 offsets: a million of them open at once and are decoded when asked for."""

    def __init__(self, blob, offsets):
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, names):
        encoded = [os.fsencode(name) for name in names]
        sizes = torch.tensor([0] + [len(name) for name in encoded], dtype=torch.int64)
        return cls(torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8), sizes.cumsum(0))

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, row):
        start, stop = self.offsets[row : row + 2].tolist()
        return os.fsdecode(self.blob[start:stop].numpy().tobytes())

    def __iter__(self):
        blob, ends = self.blob.numpy().tobytes(), self.offsets.tolist()
        return (os.fsdecode(blob[start:stop]) for start, stop in itertools.pairwise(ends))


class GalleryIndex:
    """Embeddings [N, D] with pids, camids, seqs, frames (int64 [N]) and paths relative to `data_root`.

    threshold: the cosine above which two images count as one person, at `false_match_rate` (None: not measured).
    queries: a second GalleryIndex with the queries' part, or None. bad: [(file, reason)] of images left out by `build`.
    device: where it is searched, that of the Extractor which built it or which it was loaded with.
    """

    def __init__(self, embeddings, records, fingerprint, mirror, stats=None):
        self.embeddings = embeddings
        self.paths = records.paths if isinstance(records.paths, Paths) else Paths.of(records.paths)
        self.pids, self.camids, self.seqs, self.frames = records.pids, records.camids, records.seqs, records.frames
        self.sizes, self.mtimes = stats if stats is not None else file_stats(records.files())
        self.data_root = str(records.root)
        self.fingerprint, self.preprocessing, self.mirror = fingerprint, PREPROCESSING, mirror
        self.threshold = self.false_match_rate = self.queries = None
        self.bad, self.device, self._search = [], "cpu", {}

    @classmethod
    def build(cls, extractor, records, strict=False, dtype=torch.float16, progress=True, rank=0, world_size=1):
        """Embed `records` into an index. Images that cannot be read are left out and stand in `.bad` (`strict` raises)."""
        own = torch.arange(rank, len(records), world_size)  # torchrun: each rank embeds its share
        files = records.select(own).files()
        embeddings = torch.empty(len(files), extractor.dim, dtype=dtype)
        kept, bad, count = torch.empty(len(files), dtype=torch.int64), [], 0
        for positions, rows in extractor.stream(files, strict, progress, bad):
            embeddings[count : count + len(rows)] = rows
            kept[count : count + len(rows)] = positions
            count += len(rows)
        embeddings, kept = embeddings[:count], own[kept[:count]]
        if world_size > 1:
            embeddings, kept, bad = _gather(embeddings, kept, bad, rank, world_size)
        index = cls(embeddings, records.select(kept), extractor.fingerprint, extractor.mirror)
        index.bad, index.device = bad, getattr(extractor, "device", "cpu")
        return index

    def __len__(self):
        return len(self.embeddings)

    count = property(__len__)

    def records(self):
        """The images as reid.data.datasets.Records."""
        return Records(Path(self.data_root), list(self.paths), self.pids, self.camids, self.seqs, self.frames)

    def close(self):
        """Nothing to let go of; other stores have a connection here."""

    def save(self, path):
        """Write the index, whole or not at all."""
        save(path, self._part(), FORMAT, VERSION)

    def _part(self):
        part = {"embeddings": self.embeddings, **{name: getattr(self, name) for name in COLUMNS},
                "path_blob": self.paths.blob, "path_offsets": self.paths.offsets, "data_root": self.data_root,
                "fingerprint": self.fingerprint, "preprocessing": self.preprocessing, "mirror": self.mirror,
                "threshold": self.threshold, "false_match_rate": self.false_match_rate}
        if self.queries is not None:
            part["queries"] = self.queries._part()
        return part

    @classmethod
    def load(cls, path, extractor_or_fingerprint=None):
        """Open an index, memory-mapped. With an Extractor (or a fingerprint) one of other weights raises ReidError."""
        if not Path(path).is_file():
            raise ReidError(f"{path}: no such index; make it: python eval.py --save_index --exp_name {Path(path).stem}")
        index = cls._restore(load(path, FORMAT, VERSION, mmap=True), path)
        wanted = getattr(extractor_or_fingerprint, "fingerprint", extractor_or_fingerprint)
        index.device = getattr(extractor_or_fingerprint, "device", "cpu")
        if index.preprocessing != PREPROCESSING or (wanted is not None and index.fingerprint != wanted):
            raise ReidError(f"{path}: made by other weights or another preprocessing; make it again: "
                            f"python eval.py --save_index --exp_name {Path(path).stem}")
        return index

    @classmethod
    def _restore(cls, part, path):
        columns = {name: part.get(name) for name in (*COLUMNS, "path_offsets")}
        embeddings, blob, count = part.get("embeddings"), part.get("path_blob"), 0
        require(isinstance(embeddings, torch.Tensor) and embeddings.ndim == 2, path, "has no embeddings [N, D]")
        require(embeddings.dtype in (torch.float16, torch.float32), path, f"embeddings are {embeddings.dtype}")
        for name, column in columns.items():
            count = len(embeddings) + (name == "path_offsets")
            require(isinstance(column, torch.Tensor) and column.dtype == torch.int64 and column.shape == (count,), path,
                    f"{name} is not int64 [{count}]")
        require(isinstance(blob, torch.Tensor) and blob.dtype == torch.uint8 and blob.ndim == 1, path, "has no paths")
        ends = columns["path_offsets"]
        require(ends[0] >= 0 and ends[-1] <= len(blob) and bool((ends.diff() >= 0).all()), path, "its paths do not add up")
        for name in ("data_root", "fingerprint", "preprocessing"):
            require(isinstance(part.get(name), str), path, f"has no {name}")
        require(isinstance(part.get("mirror"), bool), path, "does not say whether it was mirrored")
        for name in ("threshold", "false_match_rate"):
            require(part.get(name) is None or isinstance(part[name], (int, float)), path, f"{name} is no number")
        # NaN anywhere makes a sum NaN; a matrix too large to verify is looked at where it is searched
        small = embeddings.numel() * embeddings.element_size() <= VERIFY_LIMIT
        require(not small or not embeddings.numel() or bool(torch.isfinite(embeddings.float().sum())), path,
                "embeddings hold NaN or infinite values")
        records = Records(Path(part["data_root"]), Paths(blob, ends), *(part[name] for name in COLUMNS[:4]))
        index = cls(embeddings, records, part["fingerprint"], part["mirror"], (part["sizes"], part["mtimes"]))
        index.preprocessing, index.threshold = part["preprocessing"], part.get("threshold")
        index.false_match_rate = part.get("false_match_rate")
        if isinstance(part.get("queries"), dict):
            index.queries = cls._restore(part["queries"], path)
        return index

    def hit(self, row):
        """(path, name of the identity or "" where it is unlabelled, pid, camid) of a row."""
        path, pid = self.paths[row], int(self.pids[row])
        return str(Path(self.data_root) / path), identity_name(pid, path), pid, int(self.camids[row])

    def search(self, embeddings, topk=5, camids=None, frames=None, exclude=None, queries=None, rank=0, world_size=1):
        """The `topk` most similar images of each query: a list of RankedList, one for each of the Q embeddings.

        queries: Q values of `reid.retrieval.ranked.Query`, or None. The rest is as in `nearest`.
        """
        return ranked_lists(self, *self.nearest(embeddings, topk, camids, frames, exclude, rank, world_size), queries)

    def nearest(self, embeddings, topk, camids=None, frames=None, exclude=None, rank=0, world_size=1):
        """The `topk` most similar rows of each query, exact: (scores float32 [Q, k], rows int64 [Q, k]), best first.

        embeddings: float32 [Q, D] of norm 1. camids: cameras to keep. frames: (first, last) frame to keep. exclude: row to
        leave out for each query, int64 [Q] (-1: none), or a list of lists of rows. Equal scores are ordered by row. Where
        fewer than topk rows are left, and for a query that is NaN, score is -inf and row -1. Under torchrun each rank searches
        its stretch of the rows, and all get the whole answer.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embeddings.shape[1]:
            raise ReidError(f"queries of shape {tuple(embeddings.shape)} in a gallery of {self.embeddings.shape[1]} dimensions")
        no_crop = embeddings.isnan().any(1)  # as `Extractor.embed` marks an empty box: nothing is found for it
        start, stop = len(self) * rank // world_size, len(self) * (rank + 1) // world_size
        keep = None if camids is None else torch.isin(self.camids[start:stop], torch.tensor(list(camids), dtype=torch.int64))
        if frames is not None:
            within = (self.frames[start:stop] >= frames[0]) & (self.frames[start:stop] <= frames[1])
            keep = within if keep is None else keep & within
        if exclude is not None:
            exclude = exclude.tolist() if isinstance(exclude, torch.Tensor) else exclude
            exclude = [[row - start for row in ([rows] if isinstance(rows, int) else rows) if start <= row < stop]
                       for rows in exclude]
        if (start, stop) not in self._search:
            self._search = {(start, stop): self._exact(self.embeddings[start:stop])}
        scores, rows = self._search[start, stop].search(embeddings.nan_to_num(), topk, keep, exclude)
        scores[no_crop], rows[no_crop] = -torch.inf, -1
        if world_size == 1:
            return scores, rows
        import torch.distributed as dist

        parts = [None] * world_size
        dist.all_gather_object(parts, (scores, torch.where(rows < 0, rows, rows + start)))
        return merge_shards(parts, topk)

    def _exact(self, embeddings):
        try:
            return ExactSearch(embeddings, self.device)
        except torch.OutOfMemoryError:  # larger than the GPU: main memory has it anyway
            return ExactSearch(embeddings)

    def add(self, extractor, records, strict=False, progress=True):
        """Embed what is new among `records`, or changed (size or time of the file); returns how many images were embedded."""
        if extractor.fingerprint != self.fingerprint or extractor.mirror != self.mirror:
            raise ReidError("images can only be added to an index by the weights and the mirroring that made it")
        if Path(records.root).resolve() != Path(self.data_root).resolve():
            raise ReidError(f"{records.root}: the index is of {self.data_root}; only images below it can be added")
        known = {path: stat for path, *stat in zip(self.paths, self.sizes.tolist(), self.mtimes.tolist())}
        sizes, mtimes = file_stats(records.files())
        fresh = [i for i, path in enumerate(records.paths) if known.get(path) != [sizes[i].item(), mtimes[i].item()]]
        if not fresh:
            return 0
        new = GalleryIndex.build(extractor, records.select(torch.tensor(fresh)), strict, self.embeddings.dtype, progress)
        self.remove([path for path in new.paths if path in known])
        self.embeddings = torch.cat([self.embeddings, new.embeddings])
        for name in COLUMNS:
            setattr(self, name, torch.cat([getattr(self, name), getattr(new, name)]))
        self.paths, self._search = Paths.of([*self.paths, *new.paths]), {}
        self.bad += new.bad
        return len(new)

    def remove(self, paths):
        """Leave out the images of these paths (relative to data_root); returns how many there were."""
        gone = set(paths)
        keep = torch.tensor([path not in gone for path in self.paths], dtype=torch.bool)
        removed = int((~keep).sum())
        if removed:
            self.paths = Paths.of([path for path in self.paths if path not in gone])
            self.embeddings, self._search = self.embeddings[keep], {}
            for name in COLUMNS:
                setattr(self, name, getattr(self, name)[keep])
        return removed

    def verify(self):
        """Paths whose image is gone or has changed since it was embedded."""
        sizes, mtimes = file_stats([Path(self.data_root) / path for path in self.paths])
        changed = (sizes != self.sizes) | (mtimes != self.mtimes)
        return [self.paths[row] for row in changed.nonzero().flatten().tolist()]


def merge_shards(parts, topk):
    """One ranking of several shards' searches. parts: [(scores [Q, k], rows [Q, k]), ...], rows numbered over all shards in
    order, -1 for none. Exact, equal scores by row."""
    scores, rows = (torch.cat(columns, 1) for columns in zip(*parts))
    by_row = rows.masked_fill(rows < 0, torch.iinfo(torch.int64).max).argsort(1)
    scores, rows = scores.gather(1, by_row), rows.gather(1, by_row)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :topk], rows.gather(1, order)[:, :topk]


def _gather(embeddings, kept, bad, rank, world_size):
    """Every rank's part on every rank, in the order of the files: one copy of the whole and one part are in memory."""
    import torch.distributed as dist

    told = [None] * world_size
    dist.all_gather_object(told, (kept, bad))
    positions = torch.cat([kept for kept, _ in told]).sort()[0]
    whole = embeddings.new_empty(len(positions), embeddings.shape[1])
    for source, (kept, _) in enumerate(told):
        part = embeddings if source == rank else embeddings.new_empty(len(kept), embeddings.shape[1])
        part = part.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(part, source)
        whole[torch.searchsorted(positions, kept)] = part.cpu()
    return whole, positions, [item for _, bad in told for item in bad]


def file_stats(files):
    """(sizes in bytes, modification times in ns), int64 [N]; -1 where a file is not there."""
    stats = []
    for file in files:
        try:
            found = os.stat(file)
            stats.append((found.st_size, found.st_mtime_ns))
        except OSError:
            stats.append((-1, -1))
    return torch.tensor(stats, dtype=torch.int64).reshape(-1, 2).T.contiguous()


def require(condition, path, reason):
    if not condition:
        raise ReidError(f"{path}: {reason}; the index is damaged, make it again with python eval.py --save_index")
