"""Path names as tensors, and the numbers by which the files behind them are recognised."""

import hashlib
import itertools
import os
import stat
from pathlib import Path

import torch

from reid.images import MAX_BYTES


class Paths:
    """N path names as one uint8 blob and N + 1 offsets: a million of them load at once and are decoded on access."""

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


def file_stats(files):
    """Return size in bytes, modification time in ns and a 63-bit hash of the content of each file, int64 [3, N].

    All three are -1 for a file that cannot be read, the hash also for what is no file or too large for an image.
    """
    stats = []
    for file in files:
        try:
            found, content = os.stat(file), -1
            if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_BYTES:  # a pipe would wait, a device never end
                content = content_number(Path(file).read_bytes())
            stats.append((found.st_size, found.st_mtime_ns, content))
        except OSError:
            stats.append((-1, -1, -1))
    return torch.tensor(stats, dtype=torch.int64).reshape(-1, 3).T.contiguous()


def content_number(data):
    """Return 63 bits of a hash of bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
