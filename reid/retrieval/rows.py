"""The rows of a gallery index, and how they change in place."""

import os

import torch

from reid import ReidError
from reid.cli import ERASED
from reid.data.paths import Paths, content_number

STATS = ("sizes", "mtimes", "contents")  # of the image files, see `reid.data.paths.file_stats`
COLUMNS = ("pids", "camids", "seqs", "frames", *STATS)  # int64 [N] each


def erased_key(path):
    """Return what an index keeps of the path of an erased image, lest `build` takes it in again: a hash."""
    return f"{content_number(os.fsencode(path)):016x}"


class Rows:
    """What GalleryIndex is made of: embeddings [N, D], paths, COLUMNS and names of identities."""

    def extend(self, other):
        """Append the rows of an index of the same network and `data_root`."""
        self._set_rows([*self.paths, *other.paths], lambda name: torch.cat([getattr(self, name), getattr(other, name)]))
        self.names |= other.names

    def listing(self):
        """Row, path, identity and modification time (ns, -1 for unknown) of every image, as lists."""
        return list(range(len(self))), list(self.paths), self.pids.tolist(), self.mtimes.tolist()

    def replace(self, other):
        """Append the rows of another index, in the place of those of the same paths."""
        new = set(other.paths)
        keys = {erased_key(path) for path in new}
        bad = [row for row in self.bad if row[0] not in keys and os.path.relpath(row[0], self.data_root or ".") not in new]
        self.erase([row for row, path in enumerate(self.paths) if path in new])
        self.bad = bad
        self.extend(other)

    def erase(self, rows):
        """Drop some rows, and names that no row has any more. Files of the index's own folder are not taken again."""
        self._require_plain("erase")
        paths = [self.paths[row] for row in rows]
        self.bad += [(erased_key(path), ERASED, -1, -1) for path in paths if path and not os.path.isabs(path)]
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[rows] = False
        self._set_rows([path for path, stays in zip(self.paths, kept.tolist()) if stays], lambda name: getattr(self, name)[kept])
        self.forget_names()

    def take_changes(self, other):
        """Take over what was changed by hand in another index of the same folder: images of elsewhere, and those erased."""
        elsewhere, erased = [os.path.isabs(path) for path in other.paths], other.erased_keys()
        rows = [row for row, path in enumerate(self.paths) if os.path.isabs(path) or (erased and erased_key(path) in erased)]
        if rows:
            self.erase(rows)
        self.bad = [row for row in self.bad if row[1] != ERASED] + [row for row in other.bad if row[1] == ERASED]
        if any(elsewhere):
            enrolled = other.select(torch.tensor(elsewhere))
            enrolled.names, enrolled.embeddings = other.names, enrolled.embeddings.to(self.embeddings)
            self.extend(enrolled)
            self.forget_names()

    def relabel(self, rows, pid, name):
        """Give some rows another identity, under a name."""
        self.pids = self.pids.index_fill(0, torch.tensor(rows), pid)
        self.names = {**self.names, pid: name}
        self.forget_names()

    def erased_keys(self):
        """Return the `erased_key` of each image of the index's own folder that was erased."""
        return {key for key, reason, *_ in self.bad if reason == ERASED}

    def forget_names(self):
        present = set(self.pids.tolist())
        self.names = {pid: name for pid, name in self.names.items() if pid in present}

    def _set_rows(self, paths, column):
        self.paths = Paths.of(paths)
        for name in ("embeddings", *COLUMNS):
            setattr(self, name, column(name))
        self._search, self._statistics, self._copy = {}, None, None

    def _require_plain(self, method):
        if self.normalised:
            raise ReidError(f"{method}: not of a copy without camera statistics; use the index that it was made of")
