"""Download an archive, and read the images of Market-1501's layout from an archive or an unpacked folder.

Names inside archives never become paths: only file names in which `parse_name` finds an identity are taken from them.
"""

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import requests
from tqdm import tqdm

from reid import ReidError
from reid.cli import first_line, printable, root_cause, without_secrets
from reid.data.datasets import ELSEWHERE, HIDDEN, IMAGE_SUFFIXES, SYSTEM_FILES, list_files
from reid.data.names import UNKNOWN_PID, parse_name
from reid.files import locked
from reid.images import is_image

FOLDERS = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}  # Market-1501's own names
SPECIAL, NO_IMAGE = "link or device", "file that is no image"  # reasons
DECOMPRESS = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open, b"BZ": bz2.open}  # by the first two bytes of a file
MAX_MEMBER = 50 << 20  # bytes of one image; a crop of a person has a few thousand
MAX_EXPANSION, FREE_EXPANSION = 20, 100 << 20  # an archive may unpack to 20 times its size + 100 MiB: photographs hardly shrink
TRIES = 6  # failures in a row, without one byte gained, before a download is given up
MAX_SIZE = 50 << 30  # bytes of a download; an endless answer would fill the disk
MAX_WAIT = 300  # seconds, whatever a server's Retry-After says


def download(url, path):
    """Download `url` to `path`, which may exist. An interrupted download goes on where `<path>.part` ends.

    Raises ReidError for an address that does not answer with a file, and after TRIES failures in a row without progress.
    """
    if path.exists():
        return
    shown = without_secrets(url)
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    print(printable(f"downloading {shown} to {path}"), flush=True)
    with open(part, "ab") as file, locked(part, "another data_prep.py is downloading it; wait for it"):
        failures, best = 0, file.tell()
        while True:
            try:
                _fetch(url, shown, file)
                break
            except ValueError as error:  # of requests, for an address that is none
                raise ReidError(f"--url {shown}: is not an address; give one that begins with http:// or https://") from error
            except requests.RequestException as error:
                failures = 0 if file.tell() > best else failures + 1
                best = max(best, file.tell())
                reason = first_line(root_cause(error))  # what is raised later has the address in it, with its secrets
                if failures == TRIES:
                    raise ReidError(f"{shown}: download failed {TRIES} times ({reason}); run again to continue, or get the "
                                    "archive another way and give it to --archive") from error
                asked = error.response.headers.get("Retry-After", "") if error.response is not None else ""
                wait = min(int(asked[:9]), MAX_WAIT) if asked.isdecimal() else 2**failures
                print(printable(f"{reason}; continuing in {wait} s"), flush=True)
                time.sleep(wait)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _fetch(url, shown, file):
    """Append the missing part of `url` to `file`; raises requests.RequestException for a failure that may pass."""
    have = file.tell()
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
        code, span = answer.status_code, answer.headers.get("Content-Range", "")
        if code == 416 and span == f"bytes */{have}":
            return  # complete
        if code in (408, 425, 429) or code >= 500:
            raise requests.HTTPError(f"the server answered {code} {answer.reason}", response=answer)
        page = code in (200, 206) and "html" in answer.headers.get("Content-Type", "")
        if page or code not in (200, 206, 416):
            raise ReidError(f"{shown}: the server answered {'with a web page' if page else f'{code} {answer.reason}'}; download "
                            "the archive in a browser and give it to --archive, or give another --url")
        continues = code == 206 and span.startswith(f"bytes {have}-")
        if not continues:
            file.seek(0)
            file.truncate()
            if code != 200:
                raise requests.HTTPError("the server has another file than the part that is here; starting over")
        size = span.rpartition("/")[2] if continues else answer.headers.get("Content-Length", "")
        size = int(size) if size.isdecimal() and len(size) < 16 else None
        with tqdm(total=size, initial=file.tell(), unit="B", unit_scale=True, disable=None) as bar:
            for chunk in answer.iter_content(1 << 14):
                bar.update(file.write(chunk))
                if file.tell() > MAX_SIZE:
                    file.seek(0)
                    file.truncate()
                    raise ReidError(f"{shown}: more than {MAX_SIZE >> 30} GB is no dataset of people; give another --url")
        if size is not None and file.tell() != size:
            raise requests.ConnectionError(f"the connection closed after {file.tell():,} of {size:,} bytes")


def from_archive(path, left_out=None):
    """Yield (split, identity's folder, file name, content) of the images of an archive or folder in Market-1501's layout.

    path: a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz file, or a folder, with the folders of FOLDERS at any depth. content is
    bytes, or the path of a file. left_out: {reason: files} (a defaultdict), to which all other files are added: those of
    other folders, links, devices, no images, and names without an identity. Raises ReidError for what cannot be read, is
    encrypted, or unpacks to more than photographs do.
    """
    path, empty, left_out = Path(path), True, defaultdict(list) if left_out is None else left_out
    try:
        for member, content in (_folder_files if path.is_dir() else _archive_files)(path, left_out):
            split, person, name = _place(member)
            if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES and not is_image(content):
                left_out[NO_IMAGE].append(member)
                continue
            empty = False
            yield split, person, name, content
    except (ReidError, FileNotFoundError):
        raise
    except Exception as error:  # the archive readers raise a dozen types, among them MemoryError and struct.error
        raise ReidError(f"{path}: cannot be unpacked ({first_line(error)}); it is not a whole .zip, .tar, .tar.gz or .tar.xz "
                        "archive; get it again") from error
    if empty:
        raise ReidError(f"{path}: no image named like 0002_c1s1_000451_03.jpg in a folder {' or '.join(FOLDERS)}")


def _place(member):
    """Return (split, identity's folder, file name) of an archive member, each None where there is none."""
    folder, _, name = member.replace("\\", "/").rpartition("/")
    parsed = parse_name(name)
    person = None if parsed is None or parsed.pid == UNKNOWN_PID else str(parsed.pid) if parsed.pid < 0 else f"{parsed.pid:04}"
    above = folder.split("/")[:-3:-1]  # a folder for each identity may lie between
    return next((FOLDERS[part] for part in above if part in FOLDERS), None), person, name


def _is_wanted(member, left_out):
    """Whether a member is in one of FOLDERS and its name has an identity; else add it to `left_out`."""
    split, person, name = _place(member)
    if name.startswith(".") or name.lower() in SYSTEM_FILES:
        left_out[HIDDEN].append(member)
    elif split is None:
        left_out[ELSEWHERE].append(member)
    elif person is None:
        left_out["file whose name has no identity, unlike 0002_c1s1_000451_03.jpg"].append(member)
    else:
        return True
    return False


def _folder_files(path, left_out):
    images, others = list_files(path, regular=True)
    for reason, names in others.items():
        for name in names:
            left_out[reason if _place(str(path.resolve() / name))[0] else ELSEWHERE].append(name)
    for name in images:
        if _is_wanted(str(path.resolve() / name), left_out):
            yield str(path.resolve() / name), path.resolve() / name


def _archive_files(path, left_out):
    with open(path, "rb") as file:
        magic = file.read(2)  # a downloaded file may have any name
    return _zip_files(path, left_out) if magic == b"PK" else _tar_files(path, DECOMPRESS.get(magic, open), left_out)


def _check_size(path, total, member=0):
    """Raise ReidError long before an archive that unpacks to `total` bytes, or a member of it, fills memory or disk."""
    if not 0 <= member <= MAX_MEMBER or total > path.stat().st_size * MAX_EXPANSION + FREE_EXPANSION:
        raise ReidError(f"{path}: unpacks to far more than images of people would; it is not a dataset, or a trap")


class _Stream:
    """A decompressed tar as a file for `tarfile`, of limited size: headers and skipped members count as well."""

    def __init__(self, file, path):
        self.file, self.path, self.tell = file, path, file.tell

    def read(self, size):
        _check_size(self.path, self.tell() + size, size)
        return self.file.read(size)

    def seek(self, position):
        _check_size(self.path, position)
        return self.file.seek(position)


def _tar_files(path, opener, left_out):
    with opener(path, "rb") as file, tarfile.open(fileobj=(stream := _Stream(file, path)), mode="r:") as tar:
        for member in tar:
            if tar.offset <= member.offset:  # a negative size: tarfile would read it again for ever
                raise tarfile.ReadError("a member ends before it begins")
            if not member.isreg() or member.issparse():
                left_out[SPECIAL].extend([] if member.isdir() else [member.name])
            elif _is_wanted(member.name, left_out):
                _check_size(path, stream.tell(), member.size)
                yield member.name, tar.extractfile(member).read()
        stream.seek(tar.offset)  # tarfile takes a damaged or missing header for the end
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it breaks off")
        while stream.read(1 << 20):  # to the checksum at the very end
            pass


def _zip_files(path, left_out):
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG) or member.is_dir():
                left_out[SPECIAL].extend([] if member.is_dir() else [member.filename])
            elif _is_wanted(member.filename, left_out):
                if member.flag_bits & 1:
                    raise ReidError(f"{path}: is encrypted; unpack it yourself and give the folder to --archive")
                total += member.file_size
                _check_size(path, total, member.file_size)
                yield member.filename, archive.read(member)
