"""Stored galleries: which one may be replaced, and whether one is still of the images that it was made of."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch

from reid import ReidError
from reid.cli import command
from reid.data.datasets import list_split
from reid.data.paths import content_number, file_stats
from reid.files import check_output, locked
from reid.retrieval.rows import erased_key

FORMAT, VERSION = "reid-index", 4
WAIT = 60  # seconds for the change of another process
KEPT_IMAGE = re.compile(r"[0-9a-f]{16}\.png")  # named by the content, see `reid.extras.writer`


def is_milvus(uri):
    """Whether a gallery's URI names a Milvus file (name.db) or server and not an index file."""
    return str(uri).endswith(".db") or "://" in str(uri)


@contextmanager
def changing(uri):
    """Keep other processes from changing the galleries of the folder of `uri`, for the time of the block."""
    folder = Path("index" if "://" in str(uri) else _real(uri).parent)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"another process has been changing galleries here for {WAIT} s; try again", WAIT):
        yield


def images_folder(uri, gallery):
    """Return the folder for enrolled images that have no file of their own. It is the same for each link to an index."""
    if not is_milvus(uri):
        return Path(f"{_real(uri)}.enrolled")
    place = uri if "://" in str(uri) else _real(uri)  # an address may have a password, which the name of a folder shows to all
    return Path("index", f"{content_number(f'{place} {gallery.run}'.encode()):016x}.enrolled")


def delete_images(uri, gallery, dropped=()):
    """Delete the images in `images_folder` that no row of a stored gallery has.

    dropped: paths of rows that are gone; those in the folder of another index, as after `mv`, are deleted, too.
    """
    if (folder := images_folder(uri, gallery)).is_dir():
        names = {path.rpartition("/")[2] for path in gallery.listing()[1]}
        for file in folder.iterdir():
            if KEPT_IMAGE.fullmatch(file.name) and file.name not in names:
                file.unlink()
    for file in (Path(gallery.data_root, path) for path in dropped):
        if file.parent.suffix == ".enrolled" and KEPT_IMAGE.fullmatch(file.name) and file.is_file() \
                and file.stem == f"{content_number(file.read_bytes()):016x}":  # no file of a user
            file.unlink()


def _real(uri):
    return Path(os.path.realpath(uri))


def same_folder(one, other):
    """Whether two data roots are one folder; "" is the root of an index that was made without images."""
    return str(one) == str(other) or Path(one).resolve() == Path(other).resolve()


def check_replaceable(path, data_root, queries, overwrite=False, listed=True):
    """Raise ReidError where `path` holds anything but an index (of any version) of the images below `data_root`.

    queries: whether the new index has queries. One with queries, of eval.py, is not replaced by one without. overwrite: any
    index may be replaced, and what else `check_output` permits. listed: whether the new index is the listing of a folder; it
    does not replace one that is not.
    """
    check_output(path, FORMAT, overwrite)
    if overwrite or not os.path.exists(path):
        return
    other = f"or name another, such as --gallery_uri {_another(path)}"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen types
        raise ReidError(f"{path}: an index that cannot be read; replace it with --overwrite, {other}") from error
    if not same_folder(found.get("data_root"), data_root):
        raise ReidError(f"{path}: the index of {found.get('data_root')} would be replaced by one of {data_root}; add "
                        f"--overwrite, {other}")
    if listed and found.get("split", "") is None:
        raise ReidError(f"{path}: an index that was changed by hand, whose people would be lost; search it with --load_index, "
                        f"replace it with --overwrite, {other}")
    if isinstance(found.get("queries"), dict) and not queries:
        raise ReidError(f"{path}: eval.py's index, whose queries would be lost; search it with --load_index, bring it up to date "
                        f"with eval.py --save_index, {other}")


def check_current(gallery, uri, data_root, args):
    """Raise ReidError where a gallery is not of the folder `data_root` and its present files, or of other --mirror than `args`.

    gallery: GalleryIndex with or without queries, or MilvusGallery, of which only the folder is compared; args: the options of
    eval.py or inference.py, for the advice.
    """
    if gallery.data_root and not same_folder(gallery.data_root, data_root):
        option = "gallery" if getattr(args, "gallery", None) else "data_root"
        raise ReidError(f"{uri}: made of {gallery.data_root}, not of {data_root}; give --{option} {gallery.data_root}, or make "
                        f"another: {save_command(args, gallery, _another(uri))}")
    if args.mirror not in (None, gallery.mirror):
        raise ReidError(f"{uri}: made {'with' if gallery.mirror else 'without'} mirrored images; give "
                        f"--{'' if gallery.mirror else 'no-'}mirror, or make it again: {save_command(args, gallery)}")
    parts = [] if is_milvus(uri) else [part for part in (gallery, gallery.queries) if part is not None]
    found = {kind: [path for part in parts for path in differences(part)[kind]] for kind in ("changed", "new", "missing")}
    if any(found.values()):
        counts = ", ".join(f"{len(paths):,} {kind}" for kind, paths in found.items() if paths)
        raise ReidError(f"{uri}: its images are not those of {data_root or 'the enrolled files'} any more ({counts}, such as "
                        f"{next(paths[0] for paths in found.values() if paths)}); "
                        + ("add them again" if gallery.split is None else f"bring it up to date: {save_command(args, gallery)}"))


def differences(index):
    """Compare the files of an index with its folder: {"changed", "new", "missing": paths}.

    All are empty if the folder is gone, since an index works without its images. Enrolled images of elsewhere do not count, nor
    do erased ones. Files that could not be read count as new once they have changed. Of an index without a listing (`split` is
    None) only the files that are there are compared.
    """
    if index.split is None:
        there = [path for path, size in zip(index.paths, index.sizes.tolist())
                 if size >= 0 and os.path.exists(os.path.join(index.data_root, path))]
        rows = find_unchanged(index, there)[0].tolist()
        return {"changed": [path for path, row in zip(there, rows) if row < 0], "new": [], "missing": []}
    if not Path(index.data_root, index.split).is_dir():
        return dict.fromkeys(("changed", "new", "missing"), ())
    prefix = f"{index.split}/" if index.split else ""
    listed = [prefix + path for path in list_split(index.data_root, index.split)[0]]
    same = dict(zip(listed, (find_unchanged(index, listed)[0] >= 0).tolist()))
    known = set(index.paths)
    left_out = {os.path.abspath(file) for file, _, size, mtime in index.bad if _stat(file) == (size, mtime)}
    erased = index.erased_keys()
    new = [path for path in listed if path not in known and not (erased and erased_key(path) in erased)]
    return {"changed": [path for path in listed if path in known and not same[path]],
            "new": [path for path in new if os.path.abspath(os.path.join(index.data_root, path)) not in left_out],
            "missing": [path for path in index.paths if path not in same and not os.path.isabs(path)]}


def find_unchanged(index, paths):
    """Find for each path the row whose file is still the same, or -1, and the file's modification time in ns: int64 [2, N].

    A file is the same by its size and time or, where only the time differs, by its content.
    """
    row_of, sizes, mtimes = {path: row for row, path in enumerate(index.paths)}, index.sizes.tolist(), index.mtimes.tolist()
    found = []
    for path in paths:
        row, file = row_of.get(path, -1), os.path.join(index.data_root, path)
        size, mtime = _stat(file) if row >= 0 else (-1, -1)
        if row >= 0 and (size != sizes[row] or (mtime != mtimes[row] and file_stats([file])[2] != index.contents[row])):
            row = -1
        found.append((row, mtime))
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2).T


def _stat(file):
    """Return size in bytes and modification time in ns, -1 for a file that is gone."""
    try:
        found = os.stat(file)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def default_uri(exp_name, gallery=None):
    """Return the index file of a run: of its dataset's gallery, or of a folder that --gallery names."""
    return f"index/{exp_name}{f'--{Path(gallery).resolve().name}' if gallery else ''}.pt"


def save_command(args, index=None, uri=None):
    """Return the command that makes the index of the options of eval.py or inference.py, or brings it up to date.

    index: what is stored, or None where that cannot be read; one that lists no folder was made by --add. uri: instead of that of
    `args`.
    """
    if not hasattr(args, "gallery") and getattr(index, "split", "") is None:  # eval.py does not replace what was enrolled
        index, uri = None, _another(uri or args.gallery_uri)
    gallery, uri, far = getattr(args, "gallery", None), uri or args.gallery_uri, getattr(index, "false_accept_rate", None)
    if hasattr(args, "gallery") and getattr(index, "split", None) == "":  # the index of a folder without splits
        gallery = gallery or index.data_root
    queries = gallery is None if index is None else not hasattr(args, "gallery") or getattr(index, "queries", None) is not None
    options = {"exp_name": None if args.network else args.exp_name, "network": args.network, "network_input": args.network_input}
    more = {"gallery_uri": None if uri == default_uri(args.exp_name, gallery) else uri,
            "no-mirror": not (getattr(index, "mirror", True) if args.mirror is None else args.mirror)}
    changes = any(getattr(args, name, None) for name in ("rename", "remove", "older_than", "list"))
    if changes or getattr(index, "split", "") is None:
        return command("inference.py", add="DIR", **options, **more)
    return command("eval.py" if queries else "inference.py", save_index=True, **options, gallery=gallery,
                   data_root=None if gallery else args.data_root or getattr(index, "data_root", None), **more,
                   far=None if far == 1e-3 else far)


def _another(uri):
    return f"{uri}-2" if is_milvus(uri) else Path(uri).with_stem(f"{Path(uri).stem}-2")
