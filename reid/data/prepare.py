"""Make the grouped tree `{train,val,query,gallery}/<identity>/<name>` from a source of images, and check and count it.

A source is an iterator of (split, identity's folder, file name, content), the content being bytes or the path of a file:
`own.from_tree`, `archives.from_archive` and `synthetic.dataset`. The name may have folders.
"""

import functools
import hashlib
import json
import operator
import os
import shutil
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from reid import ReidError
from reid.cli import printable
from reid.data.datasets import list_files, list_images, make_records
from reid.data.names import DISTRACTOR, JUNK, UNKNOWN, order
from reid.files import copy, fsync_folder, locked

SPLITS = ("train", "val", "query", "gallery")
MARKET_URL = "https://www.kaggle.com/api/v1/datasets/download/pengcw1/market-1501"
MARKET = "Market-1501"
MARKET_COUNTS = {"train": 12_188, "val": 748, "query": 3_368, "gallery": 19_732, "junk": 3_819, "distractors": 2_798}
STAMP = "prepared.json"  # in the finished tree: its source and the number of images of each split
MARK = ".made-by-data_prep"  # in the unfinished tree: whatever else is there may be removed


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
    made = [parent for parent in partial.parents if not parent.exists()]
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
                for parent in made:
                    parent.rmdir()
            raise
    (output / MARK).unlink()


def _clear(folder):
    """Remove everything in `folder` but the mark, which goes last: a killed run must not leave files without it."""
    for entry in os.scandir(folder):
        if entry.name != MARK:
            shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def finished(output, source, state=None):
    """Return whether `output` is a complete tree made from `source`, False if it is empty or absent; else raise ReidError.

    state: of the source's files (`source_state`), which must be as it was.
    """
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
    if stamp.get("state") != state:
        raise ReidError(f"{output}: made from {source}, whose files have changed since it was made; remove it and run again")
    return True


def source_state(*paths):
    """Return a checksum of the names, sizes and times of files and of the files below folders."""
    digest = hashlib.sha256()
    for path in paths:
        images, left_out = list_files(path) if os.path.isdir(path) else ([""], {})
        for name in sorted([*images, *(name for names in left_out.values() for name in names)]):
            with suppress(OSError):  # a link to nothing
                found = os.stat(os.path.join(path, name) if name else path)
                digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def fill(root, images, source, counts=None, state=None, left_out=None, link=False):
    """Write the `images` of a source below `root`, move the validation images to val/, write the stamp and return their number.

    counts: what a complete dataset holds (as MARKET_COUNTS), or None for any. state: of the source's files, kept in the
    stamp. left_out: {reason: files} (a defaultdict), to which files that occur twice are added. link: make hard links to the
    source's files where the file system can, instead of copies. Nobody may read the tree who could not read a folder of the
    source. Raises ReidError where the counts differ, and for two different files of the same name and identity.
    """
    for split in SPLITS:
        (root / split).mkdir()
    folders = set()
    for split, person, name, content in tqdm(images, desc="grouping", unit=" images", disable=None):
        target = root / split / person / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _place(content, target, link):
            left_out["same file a second time"].append(f"{person}/{name}")
        if isinstance(content, Path):
            folders.add(content.parent)
    if folders:
        with suppress(OSError):  # not every file system has permissions
            root.chmod(0o700 | functools.reduce(operator.and_, (folder.stat().st_mode for folder in folders), 0o777))
    _hold_out(root)
    found = {split: len(list_images(root / split)) for split in SPLITS}
    if counts:
        special = {"junk": len(list_images(root / "gallery" / "-1")), "distractors": len(list_images(root / "gallery" / "0000"))}
        if found | special != counts:
            raise ReidError(f"found {_listing(found | special)}; Market-1501 has {_listing(counts)}: get a complete copy, "
                            "or accept another dataset of its layout with --any_counts")
    (root / STAMP).write_text(json.dumps({"source": source, "images": found, "state": state}, indent=1) + "\n")
    return sum(found.values())


def copies(root):
    """Return text on images of the tree that are the same byte for byte, those under several identities first; "" for none."""
    sizes, same = defaultdict(list), defaultdict(list)
    for path in (f"{split}/{path}" for split in SPLITS for path in list_images(root / split)):
        sizes[os.path.getsize(root / path)].append(path)
    for path in (path for paths in sizes.values() if len(paths) > 1 for path in paths):
        same[hashlib.sha256((root / path).read_bytes()).digest()].append(path)
    groups = [(len({path.split("/")[1] for path in paths}) == 1, paths) for paths in same.values() if len(paths) > 1]
    if not groups:
        return ""
    shown = "; ".join(" = ".join(paths[:3]) for _, paths in sorted(groups)[:2])
    several = sum(not one for one, _ in groups)
    return (f"  {len(groups):,} photographs are there more than once, {several:,} of them under several identities: "
            f"{printable(shown)}{'; ...' * (len(groups) > 2)}")


def _listing(counts):
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _place(content, target, link):
    """Write one image; return False where it is there already. Two different images of one name are an error."""
    if target.exists():
        if target.read_bytes() != (content.read_bytes() if isinstance(content, Path) else content):
            raise ReidError(f"{target.parent.name}/{target.name}: occurs twice with different content; correct the source")
        return False
    if isinstance(content, bytes):
        target.write_bytes(content)
        return True
    if link:
        with suppress(OSError):  # another file system, or one without hard links
            os.link(content.resolve(), target)
            return True
    copy(content, target)
    return True


def _hold_out(root):
    """Move one image of each training identity that has three or more to val/: the first one by `order`.

    Of two, both stay: the triplet loss needs pairs.
    """
    for folder in sorted((root / "train").iterdir()):
        paths = list_images(folder)
        if len(paths) > 2:
            chosen = min(paths, key=lambda path: order(os.path.basename(path)))
            held = root / "val" / folder.name / chosen
            held.parent.mkdir(parents=True)
            (folder / chosen).rename(held)


def table(root):
    """Return images, identities (without junk and distractors) and cameras of each split, as text, and what is wrong with it."""
    lines, parts = [f"{'split':<8}{'images':>9}{'identities':>12}{'cameras':>9}"], {}
    for split in SPLITS:
        records = parts[split] = make_records(root, list_images(root / split), True, split)
        people, cameras = set(records.pids.tolist()) - {JUNK, DISTRACTOR}, set(records.camids.tolist()) - {UNKNOWN}
        extra = [f"{count:,} {name}" for name, pid in (("junk", JUNK), ("distractors", DISTRACTOR))
                 if (count := int((records.pids == pid).sum()))]
        note = f"   (of these {', '.join(extra)})" if extra else ""
        lines.append(f"{split:<8}{len(records):>9,}{len(people):>12,}{len(cameras) or '-':>9}{note}")
    example = next((part for part in (parts["gallery"], parts["train"]) if len(part)), None)
    lines = [example.reading(), *lines] if example else lines
    queries, alone = len(parts["query"]), _without_match(parts["query"], parts["gallery"])
    if not queries:
        lines.append("WARNING: query/ is empty, so eval.py has nothing to evaluate: no test identity has a second image, from "
                     "another camera where names give cameras")
    elif queries == alone:
        lines.append("WARNING: no query can be right: no test identity was seen by two cameras, and images of the query's own "
                     "camera are ignored; evaluate with --protocol nocam, which counts them")
    elif alone:
        lines.append(f"{alone:,} queries have no match under another camera and will be skipped")
    if queries and len(parts["gallery"].pids.unique()) == 1:
        lines.append("WARNING: gallery/ has one identity, so that no result of eval.py can be wrong")
    if (people := len(parts["train"].pids.unique())) < 2:
        lines.append(f"train/ has {people} identities, too few for train.py; this tree is for eval.py alone")
    return "\n".join(lines)


def _without_match(queries, gallery):
    """Count the queries whose identity the gallery has under no other camera, and not without one."""
    cameras = defaultdict(set)
    for pid, camid in zip(gallery.pids.tolist(), gallery.camids.tolist()):
        cameras[pid].add(camid)
    return sum(not cameras[pid] - {camid} - {UNKNOWN} and UNKNOWN not in cameras[pid]
               for pid, camid in zip(queries.pids.tolist(), queries.camids.tolist()))

