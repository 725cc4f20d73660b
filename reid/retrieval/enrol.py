"""A stored gallery that changes: enrol, rename, erase and expire people, in an index file and in Milvus alike.

Each change is whole or did not happen, and those of several processes follow each other. Images of the gallery's own folder
keep their paths relative to it; others are stored with their absolute paths.
"""

import os
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import torch

from reid import ReidError
from reid.cli import printable
from reid.data.datasets import Records
from reid.data.names import folder_pid, identity_name
from reid.retrieval import stored
from reid.retrieval.index import GalleryIndex
from reid.retrieval.stored import is_milvus

NOBODY = "neither a person nor an image of the gallery; --list prints its people, and a path has a /, such as ./crops"
DAY = 86400 * 10**9  # ns


@contextmanager
def changing(uri, open_gallery, saved=None):
    """Yield the gallery that `open_gallery()` returns, to be changed; at the end an index file is saved.

    Enrolled images without a file of their own are deleted with the last row that has them, also where the change failed.
    saved: called with the changed gallery, before another process may change it.
    """
    with stored.changing(uri):
        gallery = open_gallery()
        before = set(gallery.listing()[1])
        try:
            yield gallery
            if not is_milvus(uri):
                gallery.save(uri)
        except BaseException:
            with suppress(ReidError, OSError):  # the cause is what counts
                stored.delete_images(uri, open_gallery())
            raise
        stored.delete_images(uri, gallery, before - {*gallery.listing()[1]})
        if saved:
            saved(gallery)


def enrol(gallery, new, name=None):
    """Add the images of the GalleryIndex `new`, as the person `name`, or as the people whom their folders and names give.

    An image that is there already is replaced. Returns text on what changed.
    """
    root = os.path.join(os.path.realpath(gallery.data_root), "") if gallery.data_root else None
    paths = [os.path.realpath(file) for file in new.records().files()]
    paths = [path.removeprefix(root).replace(os.sep, "/") for path in paths] if root else paths
    pids = new.pids if name is None else torch.full_like(new.pids, folder_pid(name))
    records = Records(Path(gallery.data_root), paths, pids, new.camids, new.seqs, new.frames)
    more = GalleryIndex(new.embeddings, records, new.fingerprint, new.mirror, torch.stack([new.sizes, new.mtimes, new.contents]))
    more.names = {} if name is None else {folder_pid(name): name}
    wanted, (_, there, before, _) = dict(zip(paths, pids.tolist())), gallery.listing()
    known, like = len(wanted.keys() & {*there}), _likeness(gallery, more)
    taken = Counter(person(gallery, path, pid) for path, pid in zip(there, before) if 0 < pid != wanted.get(path, pid))
    gallery.replace(more)
    who = _some(sorted({more.hit(row)[1] or "unlabelled" for row in range(len(more))}))
    lost = f" ({_some([f'{count:,} taken from {name}' for name, count in sorted(taken.items())])})" * bool(taken)
    return (f"{len(paths) - known:,} images enrolled and {known:,} replaced{lost}: {who}{like}; {len(gallery):,} images in the "
            "gallery")


def _some(texts):
    return ", ".join(texts[:5]) + f" and {len(texts) - 5:,} more" * (len(texts) > 5)


def _likeness(gallery, more):
    """Text on whom the images of one person resemble, where the gallery has a threshold."""
    pids = more.pids.unique()
    if gallery.threshold is None or len(pids) > 1 or not len(gallery):
        return ""
    hits = [hit for ranked in gallery.search(more.embeddings.float(), min(20, len(gallery))) for hit in ranked]
    best = max((hit for hit in hits if hit.match and hit.path not in more.paths), key=lambda hit: hit.score, default=None)
    if best is None:
        return ", a new person"
    return "" if best.pid == int(pids[0]) else f", who resembles {best.name or best.path} ({best.score:.4f})"


def erase(gallery, what=None, days=None, by_name=False):
    """Erase the person or the path `what`, or the images whose files were modified more than `days` ago; return text.

    The queries that an evaluation has stored with the gallery go, too. by_name: `what` is one of `people`, never a path.
    """
    parts = [part for part in (gallery, getattr(gallery, "queries", None)) if part is not None]
    found = [(part, _older(part, days) if what is None else people(part).get(what, []) if by_name else find(part, what))
             for part in parts]
    if what is not None and not any(rows for _, rows in found):
        raise ReidError(f"{what}: {NOBODY}")
    for part, rows in found:
        if rows:
            part.erase(rows)
    count, queries = len(found[0][1]), sum(len(rows) for _, rows in found[1:])
    more = f" and {queries:,} queries" * (queries > 0)
    what, unknown = what or f"older than {days:g} days", sum(written < 0 for written in gallery.listing()[3])
    kept = f" ({unknown:,} of unknown age)" * (days is not None and unknown > 0)
    return f"{what}: {count:,} images{more} erased, {len(gallery):,} left{kept}"


def _older(gallery, days):
    rows, _, _, times = gallery.listing()
    return [row for row, written in zip(rows, times) if 0 <= written < time.time_ns() - int(days * DAY)]


def rename(gallery, old, new):
    """Give the images of the person or path `old` to the person `new`, who may be in the gallery already; return text."""
    if not (rows := find(gallery, old)):
        raise ReidError(f"{old}: {NOBODY}")
    gallery.relabel(rows, folder_pid(new), new)
    return f"{old}: {len(rows):,} images are now of {new}, who has {len(find(gallery, new)):,}"


def find(gallery, what):
    """Return the rows of the person of a name, as `table` has it, or those of the images at a path, which has a /, or below."""
    rows, paths, pids, _ = gallery.listing()
    number, shown = folder_pid(what), printable(what)  # 0007 is the number 7
    found = [row for row, path, pid in zip(rows, paths, pids) if pid == number or person(gallery, path, pid) == shown]
    if not found and "/" in what:  # the name of nobody, such as "" or ".", must not mean a folder that happens to be there
        wanted = {os.path.abspath(what), os.path.realpath(what), os.path.abspath(os.path.join(gallery.data_root, what))}
        root = os.path.abspath(gallery.data_root)
        files = [os.path.join(root, path) if path else "" for path in paths]
        found = [row for row, file in zip(rows, files)
                 if any(file == place or file.startswith(os.path.join(place, "")) for place in wanted)]
    return found


def person(gallery, path, pid):
    """Name the person of an image as `table` prints it."""
    return printable(gallery.names.get(pid) or identity_name(pid, path) or "(unlabelled)")


def people(gallery):
    """Return {name: rows}, sorted; junk, distractors and unlabelled images are of nobody."""
    found = defaultdict(list)
    for row, path, pid, _ in zip(*gallery.listing()):
        if pid > 0:
            found[person(gallery, path, pid)].append(row)
    return dict(sorted(found.items()))


def table(gallery):
    """Return text: a line for each person, with the number of images and the dates of the oldest and the newest."""
    listed = defaultdict(list)
    for _, path, pid, written in zip(*gallery.listing()):
        listed[person(gallery, path, pid)].append(written)
    lines = [f"{'person':<24}{'images':>8}  {'oldest':<10}  newest"]
    for name, times in sorted(listed.items()):
        oldest, newest = (f"{datetime.fromtimestamp(found / 1e9):%Y-%m-%d}" if found >= 0 else "-"
                          for found in (min(times), max(times)))
        lines.append(f"{name:<24}{len(times):>8,}  {oldest:<10}  {newest}")
    return "\n".join(lines)
