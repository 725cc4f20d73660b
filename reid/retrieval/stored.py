"""Stored galleries: which one may be replaced, and whether one is still of the images that it was made of."""

import os
from pathlib import Path

import torch

from reid import ReidError
from reid.files import check_output

FORMAT, VERSION = "reid-index", 3


def is_milvus(uri):
    """Whether a gallery's URI names a Milvus file (name.db) or server and not an index file."""
    return str(uri).endswith(".db") or "://" in str(uri)


def same_folder(one, other):
    """Whether two data roots are one folder; "" is the root of an index that was made without images."""
    return str(one) == str(other) or Path(one).resolve() == Path(other).resolve()


def check_replaceable(path, data_root, queries, overwrite=False):
    """Raise ReidError where `path` holds anything but an index (of any version) of the images below `data_root`.

    queries: whether the new index has queries. One with queries, of eval.py, is not replaced by one without. overwrite: any
    index may be replaced, and what else `check_output` permits.
    """
    check_output(path, FORMAT, overwrite)
    if overwrite or not os.path.exists(path):
        return
    other = f"or name another, such as --gallery_uri {Path(path).with_stem(Path(path).stem + '-2')}"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen types
        raise ReidError(f"{path}: an index that cannot be read; replace it with --overwrite, {other}") from error
    if not same_folder(found.get("data_root"), data_root):
        raise ReidError(f"{path}: the index of {found.get('data_root')} would be replaced by one of {data_root}; add "
                        f"--overwrite, {other}")
    if isinstance(found.get("queries"), dict) and not queries:
        raise ReidError(f"{path}: eval.py's index, whose queries would be lost; search it with --load_index, {other}")


def check_made_of(gallery, uri, data_root, again):
    """Raise ReidError where a gallery is of another folder than `data_root`, or of files whose content has changed since.

    gallery: GalleryIndex or MilvusGallery; again: the advice for changed files.
    """
    if gallery.data_root and not same_folder(gallery.data_root, data_root):
        raise ReidError(f"{uri}: made of {gallery.data_root}, not of {data_root}; give that folder, or {again}")
    changed = gallery.changed() if hasattr(gallery, "changed") else []
    if changed:
        raise ReidError(f"{uri}: {len(changed):,} images have changed since, such as {changed[0]}; {again}")
