"""The gallery index: one matrix of embeddings with what is known of each image, on disk, and its exact search."""

import os
from pathlib import Path

import torch

from reid import ReidError, storage
from reid.data import Records
from reid.images import PREPROCESSING

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
        return (os.fsdecode(blob[start:stop]) for start, stop in zip(ends, ends[1:]))


class GalleryIndex:
    """Embeddings [N, D] with pids, camids, seqs, frames (int64 [N]) and paths relative to `data_root`.

    threshold: the cosine above which two images count as one person, at `false_match_rate` (None: not measured).
    queries: a second GalleryIndex with the queries' part, or None. bad: [(file, reason)] of images left out by `build`.
    """

    def __init__(self, embeddings, records, fingerprint, mirror, stats=None):
        self.embeddings = embeddings
        self.paths = records.paths if isinstance(records.paths, Paths) else Paths.of(records.paths)
        self.pids, self.camids, self.seqs, self.frames = records.pids, records.camids, records.seqs, records.frames
        self.sizes, self.mtimes = stats if stats is not None else file_stats(records.files())
        self.data_root = str(records.root)
        self.fingerprint, self.preprocessing, self.mirror = fingerprint, PREPROCESSING, mirror
        self.threshold = self.false_match_rate = self.queries = None
        self.bad = []

    @classmethod
    def build(cls, extractor, records, strict=False, dtype=torch.float16, progress=True, rank=0, world=1):
        """Embed `records` into an index. Images that cannot be read are left out and stand in `.bad` (`strict` raises)."""
        files = records.files()
        embeddings = torch.empty(len(files), extractor.dim, dtype=dtype)
        kept, bad, count = torch.empty(len(files), dtype=torch.int64), [], 0
        for positions, rows in extractor.stream(files, strict, progress, bad):
            embeddings[count : count + len(rows)] = rows
            kept[count : count + len(rows)] = positions
            count += len(rows)
        index = cls(embeddings[:count], records.select(kept[:count]), extractor.fingerprint, extractor.mirror)
        index.bad = bad
        return index

    def __len__(self):
        return len(self.embeddings)

    count = property(__len__)

    def records(self):
        """The images as reid.data.Records."""
        return Records(Path(self.data_root), list(self.paths), self.pids, self.camids, self.seqs, self.frames)

    def close(self):
        """Nothing to let go of; other stores have a connection here."""

    def save(self, path):
        """Write the index, whole or not at all."""
        storage.save(path, self._part(), FORMAT, VERSION)

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
        """Open an index. With an Extractor (or a fingerprint) an index of other weights raises ReidError."""
        return cls._restore(storage.load(path, FORMAT, VERSION, mmap=True), path)

    @classmethod
    def _restore(cls, part, path):
        paths = Paths(part["path_blob"], part["path_offsets"])
        records = Records(Path(part["data_root"]), paths, *(part[name] for name in COLUMNS[:4]))
        index = cls(part["embeddings"], records, part["fingerprint"], part["mirror"], (part["sizes"], part["mtimes"]))
        index.preprocessing, index.threshold = part["preprocessing"], part["threshold"]
        index.false_match_rate = part["false_match_rate"]
        if "queries" in part:
            index.queries = cls._restore(part["queries"], path)
        return index

    def search(self, embeddings, topk, camids=None, exclude=None):
        """The `topk` most similar rows of each query, exact: (scores float32 [Q, k], rows int64 [Q, k]), best first.

        embeddings: float32 [Q, D] of norm 1. camids: cameras to keep. exclude: row to leave out for each query, int64 [Q]
        (-1: none), or a list of lists of rows. Equal scores stand in the order of their rows. Where fewer than topk rows
        are left, score is -inf and row -1.
        """
        scores = embeddings.float() @ self.embeddings.float().T
        if camids is not None:
            scores[:, ~torch.isin(self.camids, torch.tensor(list(camids)))] = -torch.inf
        if exclude is not None:
            for query, rows in enumerate(exclude.tolist() if isinstance(exclude, torch.Tensor) else exclude):
                rows = [rows] if isinstance(rows, int) else rows
                scores[query, [row for row in rows if row >= 0]] = -torch.inf
        scores, rows = scores.sort(dim=1, descending=True, stable=True)
        scores, rows = scores[:, :topk], rows[:, :topk]
        return scores, rows.masked_fill(scores == -torch.inf, -1)


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
        raise ReidError(f"{path}: {reason}")
