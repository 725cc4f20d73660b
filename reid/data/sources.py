"""Where images come from: archives and folders in Market-1501's layout, and folders with one identity each.

Every source is an iterator of (split, folder of the identity, file name, content), the content being bytes or the path
of a file. Names inside archives never become paths: of those only file names that `parse_name` accepts are taken.
"""

import bz2
import csv
import gzip
import hashlib
import lzma
import os
import stat
import tarfile
import zipfile
from collections import defaultdict
from datetime import datetime
from pathlib import Path

from reid import ReidError
from reid.data.datasets import DISTRACTOR, IMAGE_SUFFIXES, JUNK, UNKNOWN, folder_pid, list_images, parse_name

FOLDERS = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}  # Market-1501's own names
DECOMPRESS = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open, b"BZ": bz2.open}  # by a file's first two bytes
FRAMES_PER_SECOND = 25  # of Market-1501's cameras, and so in every name
MAX_MEMBER = 50 << 20  # bytes of one image; a crop of a person has a few thousand
MAX_EXPANSION, FREE_EXPANSION = 20, 100 << 20  # an archive may unpack to 20 times its size + 100 MiB: photos hardly shrink


def from_archive(path):
    """Yield the images of a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz file, or of a folder, that has Market-1501's folders.

    The folders may lie at any depth. Left out: every other folder, links, devices, and names that are not an image's.
    Raises ReidError for what cannot be read, is encrypted, or unpacks to more than photographs can.
    """
    path, empty = Path(path), True
    if not path.exists():
        raise ReidError(f"{path}: no such file or folder")
    try:
        for image in _folder_images(path) if path.is_dir() else _archive_images(path):
            empty = False
            yield image
    except ReidError:
        raise
    except Exception as error:  # the archive readers raise a dozen types, among them MemoryError and struct.error
        raise ReidError(f"{path}: cannot be unpacked ({str(error) or type(error).__name__}); not a whole "
                        ".zip, .tar, .tar.gz or .tar.xz archive, get it again") from error
    if empty:
        raise ReidError(f"{path}: no image named like 0002_c1s1_000451_03.jpg in a folder {' or '.join(FOLDERS)}")


def _folder_images(path):
    for where, folders, names in os.walk(path.resolve()):
        folders.sort()
        for file in (Path(where, name) for name in sorted(names)):
            if (wanted := _wanted(f"{file.parent.name}/{file.name}")) and file.is_file():  # not a dangling link
                yield *wanted, file


def _archive_images(path):
    with open(path, "rb") as file:
        magic = file.read(2)  # the name says nothing about a download, and lies about a web page
    return _zip_images(path) if magic == b"PK" else _tar_images(path, DECOMPRESS.get(magic, open))


def _wanted(member):
    """(split, identity, file name) of an archive member that is an image of the dataset, else None."""
    folder, _, name = member.replace("\\", "/").rpartition("/")
    split = FOLDERS.get(folder.rpartition("/")[2])
    if split is None or os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES or parse_name(name) is None:
        return None
    return split, name.partition("_")[0], name


class _Budget:
    """Counts the bytes that an archive unpacks to, and stops it long before it fills memory or disk."""

    def __init__(self, path):
        self.path, self.limit, self.spent = path, path.stat().st_size * MAX_EXPANSION + FREE_EXPANSION, 0

    def check(self, total, single=0):
        if single > MAX_MEMBER or total > self.limit:
            raise ReidError(f"{self.path}: unpacks to far more than images of people would; not a dataset, or a trap")

    def spend(self, size):
        self.spent += size
        self.check(self.spent, size)


class _Stream:
    """A decompressed tar as a file for `tarfile`, with a budget: headers and skipped members count as well."""

    def __init__(self, file, budget):
        self.file, self.budget, self.tell, self.close = file, budget, file.tell, file.close

    def read(self, size):
        self.budget.check(self.file.tell() + size, size)
        return self.file.read(size)

    def seek(self, position):
        self.budget.check(position)
        return self.file.seek(position)


def _tar_images(path, opener):
    budget = _Budget(path)
    with opener(path, "rb") as file, tarfile.open(fileobj=(stream := _Stream(file, budget)), mode="r:") as tar:
        for member in tar:
            if member.isreg() and not member.issparse() and (wanted := _wanted(member.name)):
                budget.spend(member.size)
                yield *wanted, tar.extractfile(member).read()
        stream.seek(tar.offset)  # tarfile takes a damaged header, or none, for the end
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it breaks off")
        while stream.read(1 << 20):  # a checksum stands at the very end
            pass


def _zip_images(path):
    budget = _Budget(path)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind in (0, stat.S_IFREG) and (wanted := _wanted(member.filename)):
                if member.flag_bits & 1:
                    raise ReidError(f"{path}: is encrypted; unpack it yourself and give the folder to --archive")
                budget.spend(member.file_size)
                yield *wanted, archive.read(member)


def from_tree(folder, train_share, times=None):
    """Yield the images of any folder-per-identity tree, split into train, query and gallery by `TREE_RULE`.

    times: a CSV file with the camera and the time of every image (see `read_times`), which its new name then tells.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReidError(f"{folder}: no such folder")
    files = {path: path for path in list_images(folder) if "/" in path and (folder / path).is_file()}  # no dangling link
    if times:
        files = _named_by(read_times(times), times, files)
    people = defaultdict(list)  # name of the identity's folder -> paths of its images
    for path in files:
        people[path.rpartition("/")[0]].append(path)
    if not people:
        raise ReidError(f"{folder}: no images in sub-folders; give a tree with one folder per identity")
    owners = {}
    for path in sorted(people):
        name = path.rpartition("/")[2]
        if name in FOLDERS:
            raise ReidError(f"{folder / path}: this is Market-1501's own layout; use --archive {folder}")
        other = owners.setdefault(folder_pid(name), path)
        if other != path:
            raise ReidError(f"{folder}: {other} and {path} name the same identity; give one folder per identity")
    known = sorted((path for pid, path in owners.items() if pid not in (JUNK, DISTRACTOR)),
                   key=lambda path: lot(path.rpartition("/")[2]))
    count = round(len(known) * train_share)
    training, testing = set(known[:count]), set(known[count:])
    for person, paths in people.items():
        queries = _queries(paths) if person in testing else ()
        for path in paths:
            split = "train" if person in training else "query" if path in queries else "gallery"
            yield split, person.rpartition("/")[2], path.rpartition("/")[2], folder / files[path]


def read_times(file):
    """{path: (camera, frame)} of a CSV file with the columns path, camera and time; frame 0 is the earliest time in it.

    path is relative to the tree, camera a number from 0 on, time in seconds or ISO 8601 (2026-03-01T12:00:05). Raises ReidError
    with the line that is not so.
    """
    seen = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            rows = csv.DictReader(text)
            if missing := {"path", "camera", "time"} - set(rows.fieldnames or ()):
                raise ReidError(f"{file}: no column {', '.join(sorted(missing))}; its first line must name path, camera, time")
            for row in rows:
                try:
                    path, camera, second = row["path"].replace("\\", "/"), int(row["camera"]), _seconds(row["time"])
                    if not (0 <= camera < 10**9 and abs(second) < 10**12):
                        raise ValueError
                except (ValueError, TypeError, AttributeError, OverflowError):
                    raise ReidError(f"{file}, line {rows.line_num}: not a path, a camera number and a time in seconds or "
                                    "ISO 8601") from None
                if path in seen:
                    raise ReidError(f"{file}, line {rows.line_num}: {path} for the second time")
                seen[path] = camera, second
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ReidError(f"{file}: cannot be read as CSV ({reason}); give one with the columns path, camera, time") from None
    earliest = min((second for _, second in seen.values()), default=0)
    return {path: (camera, round((second - earliest) * FRAMES_PER_SECOND)) for path, (camera, second) in seen.items()}


def _seconds(text):
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


def _named_by(times, source, files):
    """{path with a name in Market-1501's manner: path} for the paths of `files`, each of which must be in `times`."""
    for path in files:
        if path not in times:
            raise ReidError(f"{source}: has no line for {path}; list every image")
    if strange := next((path for path in times if path not in files), None):
        raise ReidError(f"{source}: {strange} is no image of the tree; paths are relative to it")
    named = {}
    for number, path in enumerate(sorted(files)):
        folder, _, name = path.rpartition("/")
        camera, frame = times[path]
        pid = folder_pid(folder.rpartition("/")[2])
        pid = pid if pid < 10**18 else pid % 10**18  # names hold 18 digits; in a tree the folder tells the identity
        named[f"{folder}/{pid:04}_c{camera}s1_{frame:06}_{number:02}{os.path.splitext(name)[1]}"] = path
    return named


TREE_RULE = """\
rule: identities stand in the order of the SHA-256 of their folder's name, and the first {share:g} of them are for training.
      Of each other identity seen by two or more cameras, one image of every camera with at least two (of one camera,
      where none has two) is a query; without cameras in the names, one image is. The rest is gallery, as is all of an
      identity with a single image or camera. Folders -1 and 0 are junk and distractors: gallery."""


def _queries(paths):
    """The query images among one test identity's `paths`, such that each has a match in what is left."""
    cameras = defaultdict(list)
    for path in sorted(paths, key=lambda path: lot(path.rpartition("/")[2])):
        parsed = parse_name(path.rpartition("/")[2])
        cameras[parsed.camid if parsed else UNKNOWN].append(path)
    if UNKNOWN in cameras:
        return cameras[UNKNOWN][:1] if len(paths) > 1 else []
    if len(cameras) < 2:
        return []
    return [seen[0] for seen in cameras.values() if len(seen) > 1] or min(cameras.items())[1][:1]


def lot(name):
    """A sort key that is the same everywhere and, unlike the name itself, favours no camera."""
    return hashlib.sha256(os.fsencode(name)).digest()
