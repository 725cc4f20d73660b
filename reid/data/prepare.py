"""The grouped tree `{train,val,query,gallery}/<pid>/<name>`: made from a source of images, checked, counted."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from reid import ReidError
from reid.data.datasets import DISTRACTOR, JUNK, UNKNOWN, list_images, make_records
from reid.data.sources import lot
from reid.files import fsync_folder, fsync_tree, locked

SPLITS = ("train", "val", "query", "gallery")
MARKET_URL = "https://www.kaggle.com/api/v1/datasets/download/pengcw1/market-1501"
MARKET_COUNTS = {"train": 12_185, "val": 751, "query": 3_368, "gallery": 19_732, "junk": 3_819, "distractors": 2_798}
STAMP = "prepared.json"  # in the finished tree: what it was made from, and how many images each split has


@contextmanager
def building(output):
    """Yield an empty folder that becomes `output` when the block ends well, and goes when it does not.

    The rename is the only moment at which `output` comes to be, so a killed run leaves nothing that looks finished; its
    remains, `<output>.partial`, are cleared by the next one.
    """
    output = Path(os.path.realpath(output))
    partial = output.with_name(f"{output.name}.partial")
    make_folder(partial)
    with locked(partial, "another data_prep.py is at work on it; wait until it has finished"):
        for entry in os.scandir(partial):
            shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
        try:
            yield partial
            fsync_tree(partial)  # after a power cut, too, the tree is whole or absent
            if output.is_dir():
                output.rmdir()  # empty, or `finished` had refused; Windows does not rename over it
            partial.rename(output)
            fsync_folder(output.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ReidError(f"{path}: a file is in the way; choose another --output") from None


def finished(output, source):
    """Whether `output` is a whole tree made from `source`. Raises ReidError where it is anything but that or empty."""
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
    """Write the images of a source (see reid.data.sources) below `root`, take out the validation images and stamp the tree.

    counts: what a complete dataset holds (as MARKET_COUNTS), None for any. Raises ReidError where they differ, and where
    two different files have the same place.
    """
    folders = set()
    for split, person, name, content in tqdm(images, desc="grouping", unit=" images", disable=None):
        folder = root / split / person
        if folder not in folders:
            folder.mkdir(parents=True, exist_ok=True)
            folders.add(folder)
        _place(content, folder / name)
    _hold_out(root)
    found = {split: len(list_images(root / split)) for split in SPLITS}
    if counts:
        special = {"junk": len(list_images(root / "gallery" / "-1")),
                   "distractors": len(list_images(root / "gallery" / "0000"))}
        if found | special != counts:
            raise ReidError(f"found {_listing(found | special)}; Market-1501 has {_listing(counts)}: get a complete copy, "
                            "or accept another dataset of its layout with --any_counts")
    for split in SPLITS:
        (root / split).mkdir(exist_ok=True)
    (root / STAMP).write_text(json.dumps({"source": source, "images": found}, indent=1) + "\n")


def _listing(counts):
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _place(content, target):
    if target.exists():  # archives may list a file twice; two different images under one name are a mistake
        if target.read_bytes() != (content.read_bytes() if isinstance(content, Path) else content):
            raise ReidError(f"{target.parent.name}/{target.name}: occurs twice with different content; mend the source")
        return
    if isinstance(content, bytes):
        target.write_bytes(content)
        return
    try:
        os.link(content.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(content, target)


def _hold_out(root):
    """Move one image of each training identity to val: the one whose name has the least SHA-256. A single image stays."""
    train = root / "train"
    for folder in sorted(train.iterdir()) if train.is_dir() else ():
        names = os.listdir(folder)
        if len(names) > 1:
            chosen = min(names, key=lot)
            held = root / "val" / folder.name
            held.mkdir(parents=True)
            (folder / chosen).rename(held / chosen)


def table(root):
    """Images, identities (junk and distractors are none) and cameras of each split, as text."""
    lines = [f"{'split':<8}{'images':>9}{'identities':>12}{'cameras':>9}"]
    for split in SPLITS:
        records = make_records(root, [f"{split}/{path}" for path in list_images(root / split)], grouped=True)
        people = {pid for pid in records.pids.tolist() if pid not in (JUNK, DISTRACTOR)}
        cameras = set(records.camids.tolist()) - {UNKNOWN}
        extra = [f"{count:,} {name}" for name, pid in (("junk", JUNK), ("distractors", DISTRACTOR))
                 if (count := int((records.pids == pid).sum()))]
        note = f"   (of these {', '.join(extra)})" if extra else ""
        lines.append(f"{split:<8}{len(records):>9,}{len(people):>12,}{len(cameras) or '-':>9}{note}")
    return "\n".join(lines)
