"""Make the grouped tree `{train,val,query,gallery}/<identity>/<name>` from a source of images, and check and count it.

A source is an iterator of (split, identity's folder, file name, content), the content being bytes or the path of a file:
`from_tree` here, `archives.from_archive` and `synthetic.dataset`.
"""

import csv
import hashlib
import json
import os
import shutil
from collections import defaultdict
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from reid import ReidError
from reid.data.archives import FOLDERS
from reid.data.datasets import DISTRACTOR, JUNK, UNKNOWN, folder_pid, list_images, make_records, parse_name
from reid.files import fsync_folder, locked

SPLITS = ("train", "val", "query", "gallery")
MARKET_URL = "https://www.kaggle.com/api/v1/datasets/download/pengcw1/market-1501"
MARKET = "Market-1501"
MARKET_COUNTS = {"train": 12_185, "val": 751, "query": 3_368, "gallery": 19_732, "junk": 3_819, "distractors": 2_798}
STAMP = "prepared.json"  # in the finished tree: its source and the number of images of each split
MARK = ".made-by-data_prep"  # in the unfinished tree: whatever else is there may be removed
FRAMES_PER_SECOND = 25  # of Market-1501's cameras, and so in every name
TREE_RULE = """\
rule: identities are sorted by the SHA-256 of their folder's name, and the first {share:g} of them are for training. Of
      each other identity seen by two or more cameras, one image of every camera with at least two (of one camera, where
      none has two) is a query; without cameras in the names, one image is. The rest is gallery, as is all of an identity
      with a single image or camera. Folders -1 and 0 are junk and distractors: gallery."""


@contextmanager
def building(output):
    """Yield an empty folder, which is renamed to `output` when the block ends without an exception, and else removed.

    `output` appears whole, by that rename. What a killed run leaves is `<output>.partial`, which the next run empties; one
    that data_prep.py did not make, or a link, raises ReidError.
    """
    output = Path(os.path.realpath(output))
    partial = output.with_name(f"{output.name}.partial")
    mark = partial / MARK
    if partial.is_symlink() or (partial.is_dir() and not mark.is_file() and any(partial.iterdir())):
        raise ReidError(f"{partial}: exists, but data_prep.py did not make it; move it away or choose another --output")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial, "another data_prep.py is working on it; wait until it has finished"):
        mark.touch()
        _clear(partial)
        try:
            yield partial
            fsync_folder(partial, tree=True)  # whole or absent, after a power failure as well
            if output.is_dir():
                output.rmdir()  # empty, see `finished`; Windows does not rename over a folder
            partial.rename(output)
            fsync_folder(output.parent)
        except BaseException:
            with suppress(OSError):
                _clear(partial)
                shutil.rmtree(partial)
            raise
    (output / MARK).unlink()


def _clear(folder):
    """Remove everything in `folder` but the mark, which goes last: a killed run must not leave files without it."""
    for entry in os.scandir(folder):
        if entry.name != MARK:
            shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def finished(output, source):
    """Return whether `output` is a complete tree made from `source`, False if it is empty or absent; else raise ReidError."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        stamp = json.loads((output / STAMP).read_text())
        made_from, images = stamp["source"], stamp["images"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ReidError(f"{output}: exists, but data_prep.py did not make it; choose another --output") from None
    if made_from != source:
        raise ReidError(f"{output}: holds {made_from}, not {source}; remove it or choose another --output")
    found = {split: len(list_images(output / split)) for split in SPLITS}
    if found != images:
        raise ReidError(f"{output}: holds {found} images, was made with {images}; remove it and run again")
    return True


def fill(root, images, source, counts=None):
    """Write the `images` of a source below `root`, move the validation images to val/ and write the stamp.

    counts: what a complete dataset holds (as MARKET_COUNTS), or None for any. Raises ReidError where they differ, and for
    two different files of the same name and identity.
    """
    for split in SPLITS:
        (root / split).mkdir()
    for split, person, name, content in tqdm(images, desc="grouping", unit=" images", disable=None):
        folder = root / split / person
        if not folder.is_dir():
            folder.mkdir()
        _place(content, folder / name)
    _hold_out(root)
    found = {split: len(list_images(root / split)) for split in SPLITS}
    if counts:
        special = {"junk": len(list_images(root / "gallery" / "-1")), "distractors": len(list_images(root / "gallery" / "0000"))}
        if found | special != counts:
            raise ReidError(f"found {_listing(found | special)}; Market-1501 has {_listing(counts)}: get a complete copy, "
                            "or accept another dataset of its layout with --any_counts")
    (root / STAMP).write_text(json.dumps({"source": source, "images": found}, indent=1) + "\n")


def _listing(counts):
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _place(content, target):
    if target.exists():  # archives may list a file twice; two different images of one name are an error
        if target.read_bytes() != (content.read_bytes() if isinstance(content, Path) else content):
            raise ReidError(f"{target.parent.name}/{target.name}: occurs twice with different content; correct the source")
    elif isinstance(content, bytes):
        target.write_bytes(content)
    else:
        try:
            os.link(content.resolve(), target)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(content, target)


def _hold_out(root):
    """Move one image of each training identity that has several to val/: the first one by `_order`."""
    for folder in sorted((root / "train").iterdir()):
        names = os.listdir(folder)
        if len(names) > 1:
            held = root / "val" / folder.name
            held.mkdir()
            chosen = min(names, key=_order)
            (folder / chosen).rename(held / chosen)


def _order(name):
    """A sort key that is the same everywhere and, unlike the name itself, favours no camera."""
    return hashlib.sha256(os.fsencode(name)).digest()


def table(root):
    """Return images, identities (without junk and distractors) and cameras of each split, as text."""
    lines = [f"{'split':<8}{'images':>9}{'identities':>12}{'cameras':>9}"]
    for split in SPLITS:
        records = make_records(root, [f"{split}/{path}" for path in list_images(root / split)], grouped=True)
        people, cameras = set(records.pids.tolist()) - {JUNK, DISTRACTOR}, set(records.camids.tolist()) - {UNKNOWN}
        extra = [f"{count:,} {name}" for name, pid in (("junk", JUNK), ("distractors", DISTRACTOR))
                 if (count := int((records.pids == pid).sum()))]
        note = f"   (of these {', '.join(extra)})" if extra else ""
        lines.append(f"{split:<8}{len(records):>9,}{len(people):>12,}{len(cameras) or '-':>9}{note}")
    return "\n".join(lines)


def from_tree(folder, train_share, times=None):
    """Yield the images of a tree with one folder per identity, split into train, query and gallery by `TREE_RULE`.

    times: a CSV file with the camera and time of every image (see `read_times`), which become part of its new name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReidError(f"{folder}: no such folder")
    files = {path: path for path in list_images(folder) if "/" in path and (folder / path).is_file()}  # no dangling link
    if times:
        files = _named_by(read_times(times), times, files)
    people = defaultdict(list)  # path of the identity's folder -> paths of its images
    for path in files:
        people[os.path.dirname(path)].append(path)
    if not people:
        raise ReidError(f"{folder}: no images in sub-folders; give a tree with one folder per identity")
    owners = {}  # identity -> path of its folder
    for path in sorted(people):
        name = os.path.basename(path)
        if name in FOLDERS:
            raise ReidError(f"{folder / path}: this is Market-1501's own layout; use --archive {folder}")
        other = owners.setdefault(folder_pid(name), path)
        if other != path:
            raise ReidError(f"{folder}: {other} and {path} name the same identity; give one folder per identity")
    identities = sorted((path for pid, path in owners.items() if pid not in (JUNK, DISTRACTOR)),
                        key=lambda path: _order(os.path.basename(path)))
    count = round(len(identities) * train_share)
    training, testing = set(identities[:count]), set(identities[count:])
    for person, paths in people.items():
        queries = _queries(paths) if person in testing else ()
        for path in paths:
            split = "train" if person in training else "query" if path in queries else "gallery"
            yield split, os.path.basename(person), os.path.basename(path), folder / files[path]


def _queries(paths):
    """Choose the queries among the images of one test identity, such that each has a match in the rest."""
    cameras = defaultdict(list)
    for path in sorted(paths, key=lambda path: _order(os.path.basename(path))):
        parsed = parse_name(os.path.basename(path))
        cameras[parsed.camid if parsed else UNKNOWN].append(path)
    if UNKNOWN in cameras:
        return cameras[UNKNOWN][:1] if len(paths) > 1 else []
    if len(cameras) < 2:
        return []
    return [seen[0] for seen in cameras.values() if len(seen) > 1] or min(cameras.items())[1][:1]


def read_times(file):
    """Return {path: (camera, frame)} of a CSV file with the columns path, camera and time; frame 0 is its earliest time.

    path is relative to the tree, camera a number from 0 on, time in seconds or ISO 8601 (2026-03-01T12:00:05). Raises
    ReidError with the first line for which this does not hold.
    """
    times = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            rows = csv.DictReader(text)
            for row in rows:
                path, camera, second = row["path"].replace("\\", "/"), int(row["camera"]), _seconds(row["time"])
                if path in times or not (0 <= camera < 10**9 and abs(second) < 10**12):
                    raise ValueError
                times[path] = camera, second
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, csv.Error):
        raise ReidError(f"{file}, line {rows.line_num}: give, in the columns path, camera and time, a path that occurs once, a "
                        "camera number, and a time in seconds or ISO 8601") from None
    earliest = min((second for _, second in times.values()), default=0)
    return {path: (camera, round((second - earliest) * FRAMES_PER_SECOND)) for path, (camera, second) in times.items()}


def _seconds(text):
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


def _named_by(times, source, files):
    """Return {path with a name like Market-1501's: path} for `files`, each of which must be in `times`, and vice versa."""
    if different := sorted(times.keys() ^ files.keys()):
        raise ReidError(f"{source}: {different[0]} is in the list or in the tree, not in both; list each image of the tree, by "
                        "its path in it")
    named = {}
    for number, path in enumerate(sorted(files)):
        folder, (camera, frame) = os.path.dirname(path), times[path]
        pid = folder_pid(os.path.basename(folder))
        pid = pid if pid < 10**18 else pid % 10**18  # names hold 18 digits; in the tree the folder names the identity
        named[f"{folder}/{pid:04}_c{camera}s1_{frame:06}_{number:02}{os.path.splitext(path)[1]}"] = path
    return named
