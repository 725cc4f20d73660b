"""Files that are either whole or absent: checkpoints, indexes and everything else a run leaves behind."""

import ctypes
import hashlib
import os
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from reid import ReidError

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed processes are then not swept
    fcntl = None

VERIFY_LIMIT = 256 << 20  # bytes up to which a file's checksum is compared on every load (about 0.2 s)


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`, which replaces `path` when the block ends without an exception.

    The data and the folder entry are on disk before the old file goes, so a crash leaves the old file or the new one.
    Temporary files of processes that were killed are removed: a live writer holds a lock on its own.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # the rename would put a file in the place of /dev/null, if root asks for it
        raise ReidError(f"{path}: is not a file that can be written; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}."
    for stale in path.parent.glob(f"{prefix}*.tmp"):
        _remove_if_abandoned(stale)
    fd, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
    lock = os.fdopen(fd)
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX)
        else:
            lock.close()  # Windows cannot replace an open file
        yield Path(name)
        with open(name, "rb") as written:  # the block may have replaced the file we opened
            os.fsync(written.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        fsync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    finally:
        lock.close()


def _remove_if_abandoned(path):
    if not fcntl:
        return
    try:
        if time.time() - path.stat().st_mtime < 5:  # its writer may not hold the lock yet
            return
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except OSError:
        pass  # somebody is writing it, or has just finished


@contextmanager
def locked(path, message):
    """Keep other processes away from `path`: a folder, or a file, which is made if it is not there.

    The lock dies with its process, however that ends, so none is ever stale. One held by another raises ReidError.
    """
    path = Path(path)
    if not fcntl:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and os.path.samestat(os.fstat(fd), path.stat())  # else its owner has just moved it away
        except BlockingIOError:
            mine = False
        except OSError:
            mine = True  # some network file systems lock no folders: do without
        if not mine:
            raise ReidError(f"{path}: {message}")
        yield
    finally:
        os.close(fd)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync_folder(folder):
    """Until the names in `folder` are on disk."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def fsync_tree(folder):
    """Until everything written to the file system of `folder` is on disk: one call where a tree has 36,000 files.

    Linux waits for that file system alone, and an error that came when it wrote is raised here.
    """
    if hasattr(libc := ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None, "syncfs"):
        fd = os.open(folder, os.O_RDONLY)
        try:
            if libc.syncfs(fd):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        finally:
            os.close(fd)
    elif hasattr(os, "sync"):
        os.sync()


def checksum(obj):
    """sha256 (hex) over a tree of dicts, lists, tensors and plain values: a flipped bit in a tensor loads silently."""
    digest = hashlib.sha256()

    def visit(node):
        if isinstance(node, torch.Tensor):
            digest.update(f"tensor {node.dtype} {tuple(node.shape)}".encode())
            digest.update(node.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
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
    """Raise ValueError for what `save` never writes: other types, lists that hold themselves, tensors without their bytes.

    A strided view of one stored number can claim petabytes, which the first copy of it would ask for.
    """
    if depth > 50:
        raise ValueError("nested too deeply")
    if isinstance(node, torch.Tensor):
        if node.layout != torch.strided or node.device.type != "cpu" or node.is_quantized \
                or node.numel() * node.element_size() > node.untyped_storage().nbytes():
            raise ValueError("a tensor without its bytes")
    elif isinstance(node, dict):
        for key, value in node.items():
            _check_plain(key, depth + 1)
            _check_plain(value, depth + 1)
    elif isinstance(node, (list, tuple, set)):
        for value in node:
            _check_plain(value, depth + 1)


def save(path, payload, kind, version):
    """Write `payload` (a dict of tensors and plain values) as a file of format `kind`, whole or not at all."""
    record = {"format": kind, "version": version, **payload}
    record["sha256"] = checksum(record)
    with atomic_path(path) as temporary:
        try:
            torch.save(record, temporary)
        except RuntimeError as error:  # torch's zip writer hides the errno of a full disk
            raise ReidError(f"{path}: could not be written ({str(error).splitlines()[0]}); is the disk full?") from error


def load(path, kind, version, mmap=False, verify=None):
    """Read a file written by `save` and return its dict. Raises ReidError for anything else.

    `verify` compares the checksum; None does so for files up to VERIFY_LIMIT bytes, so that huge indexes open at once.
    """
    path = Path(path)
    if not path.is_file():
        raise ReidError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # on what damaged bytes look like
            # torch opens a memory-mapped file twice: by this name it gets the same one, should `path` be replaced meanwhile
            held = f"/proc/self/fd/{file.fileno()}"
            record = torch.load(held if os.path.exists(held) else path, map_location="cpu", weights_only=True, mmap=mmap)
        _check_plain(record)
    except Exception as error:  # torch answers damage with half a dozen types, text files with KeyError
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ReidError(f"{path}: not a readable {kind} file ({reason}); it is damaged or not ours") from error
    if not isinstance(record, dict) or record.get("format") != kind:
        found = record.get("format", "a plain dict") if isinstance(record, dict) else type(record).__name__
        raise ReidError(f"{path}: expected a {kind} file, found {found!r:.60}")
    if record.get("version") != version:
        found = record.get("version")
        raise ReidError(f"{path}: {kind} version {found!r:.20}, this code reads version {version}; make it again")
    stored = record.pop("sha256", None)
    if verify or (verify is None and path.stat().st_size <= VERIFY_LIMIT):
        if stored != checksum(record):
            raise ReidError(f"{path}: checksum differs, the file is damaged; restore it or make it again")
    return record
