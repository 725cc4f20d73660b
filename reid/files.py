"""Which files may be written; write them whole or not at all, verify what is read, and keep other processes away."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from reid import BusyError, ReidError
from reid.cli import first_line, lacks_memory, printable

try:
    import fcntl
except ImportError:  # Windows: no locks, and leftovers of killed processes are not removed
    fcntl = None

TEMPORARY = re.compile(r"\.reid-[0-9a-f]{32}\.tmp")
VERIFY_LIMIT = 256 << 20  # bytes up to which a file's checksum is compared on every load (about 0.2 s)
# Kinds of files that scripts write. The kind is a mark inside of the file, by which `check_output` recognises it.
CHECKPOINT, RESULTS, PICTURE, ONNX, PEOPLE = "reid-checkpoint", "reid-results", "reid-picture", "reid-onnx", "reid-people"
REPORT = "human re-identification report"
SUFFIXES = {RESULTS: (".json",), REPORT: (".html", ".htm"), PICTURE: (".png", ".jpg", ".jpeg", ".webp")}
BEFORE_MARK = {**dict.fromkeys((RESULTS, PEOPLE), rb'\{\s*"format": "'), REPORT: rb"\s*<!doctype html>.*",
               PICTURE: rb"(\x89PNG|\xff\xd8|RIFF).*", ONNX: rb"\x08.*"}
BEFORE_FORMAT = rb"PK.{,300}?/data\.pkl.{,200}?format.{,12}?"  # in a file that `save` has written


def is_ours(path, kind):
    """Whether a file has the mark of `kind` where our files have it: in its first or, of some kinds, its last 4 kB."""
    with open(path, "rb") as file:
        ends = file.read(4096)
        file.seek(max(file.tell(), os.path.getsize(path) - 4096))
        ends += file.read(4096)
    return bool(re.match(BEFORE_MARK.get(kind, BEFORE_FORMAT) + re.escape(kind).encode(), ends, re.DOTALL))


def check_output(path, kind, overwrite=False):
    """Raise ReidError where `path` must not be written: it holds anything but an earlier output of the same kind.

    overwrite: any other file may be replaced, except checkpoints. Folders, devices and read-only files never are.
    """
    if not os.path.exists(path):
        return
    if not (os.path.isfile(path) and os.access(path, os.W_OK)):  # root could replace /dev/null
        raise ReidError(f"{path}: is not a file, or is read-only; choose another name")
    if is_ours(path, kind):
        return
    if is_ours(path, CHECKPOINT):
        raise ReidError(f"{path}: is a checkpoint; choose another name")
    if not overwrite:
        raise ReidError(f"{path}: exists and is not a {kind} file; choose another name, or replace it with --overwrite")


def check_outputs(outputs, inputs=(), overwrite=False):
    """Check all outputs of a command: each as in `check_output`, none is an input, and no two are the same file.

    outputs: [(name of the option, path or false, kind)]; a picture may become numbered sheets (out-001.png). inputs: files
    that are read, and folders all of whose images are.
    """
    read, taken = set(map(_identity, filter(None, inputs))) - {None}, set()
    for option, path, kind in outputs:
        if path is None or path is False:
            continue
        path, name = Path(path), f"--{option} {path}"
        if path.is_dir() or path.suffix.lower() not in SUFFIXES.get(kind, (path.suffix.lower(),)):
            raise ReidError(f"{name}: give a file that ends in {', '.join(SUFFIXES.get(kind, ['.pt']))}")
        if os.path.realpath(path) in taken:
            raise ReidError(f"{name}: two outputs of this command have this name; choose another for one of them")
        taken.add(os.path.realpath(path))
        sheet = re.compile(re.escape(path.stem) + r"(-\d{3,})?" * (kind == PICTURE) + re.escape(path.suffix))
        for old in path.parent.iterdir() if path.parent.is_dir() else ():
            if sheet.fullmatch(old.name):
                both = Path(os.path.realpath(old)), Path(os.path.realpath(old.parent), old.name)  # the file, and a link to it
                places = {_identity(place) for file in both for place in (file, *file.parents)}
                if read & places and (kind == PICTURE or not is_ours(old, kind)):
                    raise ReidError(f"{name}: {old} is read by the same command; choose another name")
                check_output(old, kind, overwrite)
        if kind == PICTURE and read & set(map(_identity, path.resolve().parents)):
            raise ReidError(f"{name}: lies in a folder whose images are read, and would be one of them; choose another folder")


def _identity(path):
    """Return what is the same for all names of one file or folder; None where there is none."""
    with suppress(OSError, TypeError, ValueError):
        found = os.stat(path)
        return found.st_dev, found.st_ino


@contextmanager
def atomic_path(path, kind, overwrite=False):
    """Yield a temporary path, whose file replaces `path` when the block ends without an exception.

    The data and the folder entry are on disk before the old file is gone, so a crash leaves the old file or the new one. A
    symbolic link stays one, and the new file has the owner and permissions of the old. Temporary files of killed processes
    are removed. Raises ReidError as `check_output` does.
    """
    check_output(path, kind, overwrite)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    temporary = target.with_name(f".reid-{uuid.uuid4().hex}.tmp")  # never part of a pattern: the name that the user chose
    with open(temporary, "xb") as file:
        try:
            _lock(file.fileno())
            if not fcntl:
                file.close()  # Windows cannot replace an open file
            if target.exists():
                old = target.stat()
                with suppress(OSError, AttributeError):  # only root may give files away; Windows
                    os.chown(temporary, old.st_uid, old.st_gid)
                with suppress(OSError):  # not every file system has permissions
                    temporary.chmod(old.st_mode & 0o7777)
            yield temporary
            with open(temporary, "rb") as written:  # the block may have replaced the file
                os.fsync(written.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    fsync_folder(target.parent)


def write_json(path, document, overwrite=False):
    """Write the results of a script, whole or not at all, and print where they are."""
    with atomic_path(path, RESULTS, overwrite) as temporary:
        temporary.write_text(json.dumps({"format": RESULTS, **document}, indent=1, default=str))
    print(f"results written: {path}")


def _remove_abandoned(folder):
    """Remove the temporary files of `atomic_path` in `folder` that no living process has locked."""
    for path in folder.glob(".reid-*.tmp"):
        if not TEMPORARY.fullmatch(path.name) or path.is_symlink():
            continue
        with suppress(OSError):  # another process may remove it, too
            if time.time() - path.lstat().st_mtime > 5:  # a new one may not be locked yet
                with open(path, "rb") as file:
                    if _lock(file.fileno()):
                        path.unlink()


def copy(source, target):
    """Copy a file with its permissions; its blocks are shared where the file system can (`copy_file_range`)."""
    with open(source, "rb") as old, open(target, "xb") as new:
        with suppress(OSError, AttributeError):  # another file system; not Linux
            while os.copy_file_range(old.fileno(), new.fileno(), 1 << 30):
                pass
        shutil.copyfileobj(old, new)  # the rest
    with suppress(OSError):  # not every file system has permissions
        shutil.copymode(source, target)


@contextmanager
def locked(path, message, wait=0):
    """Lock `path`, an existing folder or a file, which is created, for the time of the block.

    The lock ends with its process, so it is never stale. If another process holds it for more than `wait` seconds, BusyError is
    raised with `message`. On a file system without locks, the block runs without one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not fcntl:
        yield
        return
    with _opened(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT) as fd:
        end = time.monotonic() + wait
        if (taken := _lock(fd)) is False and wait:
            print(printable(f"{path}: another process has locked it; waiting for {wait} s at most"), file=sys.stderr, flush=True)
        while taken is False and time.monotonic() < end:
            time.sleep(0.05)
            taken = _lock(fd)
        if taken is False or not (path.exists() and os.path.samestat(os.fstat(fd), path.stat())):  # just moved away
            raise BusyError(f"{path}: {message}")
        yield


@contextmanager
def _opened(path, flags=os.O_RDONLY):
    """Yield a file descriptor, of a folder as well."""
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def _lock(fd):
    """Lock an open file or folder without waiting. Returns False if another process holds it, None if there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # some network file systems; Windows
        return None
    return True


def fsync_folder(folder, tree=False):
    """Wait until the names in `folder` are on disk, where the file system has such an operation.

    tree: wait for everything in its file system, where there is `syncfs` (Linux): one call for a tree of 36,000 files.
    """
    if os.name != "posix":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with _opened(folder) as fd:
        try:
            os.fsync(fd)
            if tree and hasattr(libc, "syncfs") and libc.syncfs(fd):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # a broken or full disk
                raise


def checksum(obj):
    """Return the SHA-256 (hex) of a tree of dicts, lists, tensors and plain values; `torch.load` itself misses a flipped bit."""
    digest = hashlib.sha256()

    def visit(node):
        if isinstance(node, torch.Tensor):
            digest.update(f"tensor {node.dtype} {tuple(node.shape)}".encode())
            flat = node.detach().cpu().contiguous().reshape(-1)
            flat = flat.as_strided(flat.shape, (1,))  # a single element may have another stride, which `view` refuses
            digest.update(flat.view(torch.uint8).numpy())
        elif isinstance(node, dict):
            digest.update(f"dict {len(node)}".encode())
            for key, value in node.items():
                digest.update(repr(key).encode())
                visit(value)
        elif isinstance(node, (list, tuple)):
            digest.update(f"list {len(node)}".encode())
            for value in node:
                visit(value)
        else:
            digest.update(f"{type(node).__name__} {node!r}".encode())

    visit(obj)
    return digest.hexdigest()


def _check_plain(node, depth=0):
    """Raise ValueError for what `save` never writes: lists that contain themselves and tensors larger than their storage.

    A strided view of one stored number can have a size of petabytes, which its first copy would allocate.
    """
    if depth > 50:
        raise ValueError("nested too deeply")
    if isinstance(node, torch.Tensor):
        if node.layout != torch.strided or node.device.type != "cpu" or node.is_quantized \
                or node.numel() * node.element_size() > node.untyped_storage().nbytes():
            raise ValueError("a tensor without its bytes")
    elif isinstance(node, (dict, list, tuple, set)):
        for value in (*node, *node.values()) if isinstance(node, dict) else node:
            _check_plain(value, depth + 1)


def save(path, payload, kind, version, overwrite=False):
    """Write `payload`, a dict of tensors and plain values, as a file of format `kind`, whole or not at all."""
    record = {"format": kind, "version": version, **payload}
    record["sha256"] = checksum(record)
    with atomic_path(path, kind, overwrite) as temporary:
        try:
            torch.save(record, temporary)
        except RuntimeError as error:  # torch's zip writer hides the errno of a full disk
            raise ReidError(f"{path}: could not be written ({first_line(error)}); is the disk full?") from error


def load(path, kind, version, mmap=False, verify=None):
    """Return the dict that `save` wrote to `path`, without its checksum. Raises ReidError for any other file.

    mmap: map the tensors of a file of more than VERIFY_LIMIT bytes into memory instead of reading them. verify: compare the
    checksum; None does so for files of up to VERIFY_LIMIT bytes, so that large indexes open at once.
    """
    path = Path(path)
    if not path.is_file():
        raise ReidError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # about damaged bytes
            # torch opens a memory-mapped file twice: under this name it is the same file even if `path` is replaced meanwhile
            held = f"/proc/self/fd/{file.fileno()}"
            # A file that is mapped may be truncated meanwhile, which ends the process (SIGBUS): small ones are read.
            mmap = mmap and os.fstat(file.fileno()).st_size > VERIFY_LIMIT
            record = torch.load(held if os.path.exists(held) else path, map_location="cpu", weights_only=True, mmap=mmap)
        _check_plain(record)
    except Exception as error:  # torch raises half a dozen types for damaged files, KeyError for text files
        if lacks_memory(error):
            raise
        raise ReidError(f"{path}: not a readable {kind} file; it is damaged or not ours") from error
    found = record.get("format", "a plain dict") if isinstance(record, dict) else type(record).__name__
    if not isinstance(record, dict) or found != kind:
        raise ReidError(f"{path}: expected a {kind} file, found {found!r:.60}")
    found = record.get("version")
    if not isinstance(found, int) or found != version:  # a tensor would raise in the comparison
        raise ReidError(f"{path}: {kind} version {found!r:.20}, this code reads version {version}; make it again")
    stored = record.pop("sha256", None)
    verify = path.stat().st_size <= VERIFY_LIMIT if verify is None else verify
    if verify and stored != checksum(record):
        raise ReidError(f"{path}: checksum differs, the file is damaged; restore it or make it again")
    return record
