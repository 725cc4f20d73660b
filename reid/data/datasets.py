"""Folders of person crops: names, listings and the training set."""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from reid import ReidError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
JUNK, DISTRACTOR = -1, 0  # Market-1501's reserved ids: ignored; kept and always wrong
UNKNOWN = -1  # camera, sequence or frame that a name does not tell
UNKNOWN_PID = -2  # identity that neither name nor folder tells

# Market-1501 0002_c1s1_000451_03.jpg, DukeMTMC 0005_c2_f0046985.jpg, plain 0007_c3.png; "-1" is junk, ".jpg.jpg" occurs.
_NAME = re.compile(r"(-?\d{1,18})_c(\d{1,9})(?:s(\d{1,9}))?(?:_f?(\d{1,15}))?(?:_\d{1,15})?(?:\.\w{1,8}){0,2}", re.ASCII)
_INTEGER = re.compile(r"-?\d{1,18}", re.ASCII)


class Name(NamedTuple):
    """What a file name tells: identity, camera, sequence, frame (UNKNOWN where it does not)."""

    pid: int
    camid: int
    seq: int = UNKNOWN
    frame: int = UNKNOWN


def parse_name(name):
    """`<pid>_c<camera>[s<sequence>][_<frame>][_<box>][.ext]` -> Name, anything else -> None."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    pid, *rest = match.groups()
    return Name(int(pid), *(UNKNOWN if part is None else int(part) for part in rest))


def folder_pid(folder):
    """Identity of a folder: its number, or a stable number of 2^62 made from a name (the same in every split and run)."""
    if _INTEGER.fullmatch(folder):
        return int(folder)
    digest = hashlib.blake2b(folder.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 2) | (1 << 61)  # far away from any number that a person would choose


@dataclass(frozen=True)
class Records:
    """A list of images: N paths (POSIX, relative to `root`) and int64 tensors [N] of what is known of each."""

    root: Path
    paths: list
    pids: torch.Tensor
    camids: torch.Tensor
    seqs: torch.Tensor
    frames: torch.Tensor

    def __len__(self):
        return len(self.paths)

    def select(self, keep):
        """The records at the positions `keep` (int64 or bool tensor), in that order."""
        keep = torch.as_tensor(keep)
        keep = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
        columns = {name: getattr(self, name)[keep] for name in ("pids", "camids", "seqs", "frames")}
        return replace(self, paths=[self.paths[i] for i in keep.tolist()], **columns)

    def files(self):
        """Absolute path of every image."""
        return [self.root / path for path in self.paths]


def make_records(root, paths, grouped):
    """Records of `paths` below `root`. `grouped`: the folder names the identity, else the name, then the folder."""
    rows = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        parsed = parse_name(name)
        folder = folder.rpartition("/")[2]
        if grouped or (parsed is None and folder):
            pid = folder_pid(folder)
        else:
            pid = parsed.pid if parsed else UNKNOWN_PID
        rows.append((pid, *(parsed[1:] if parsed else (UNKNOWN,) * 3)))
    columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).T.contiguous()
    return Records(Path(root), list(paths), *columns)


def read_split(data_root, split):
    """The images of `data_root/split/<pid>/`, sorted by path; raises ReidError where there are none."""
    folder = Path(data_root) / split
    if not folder.is_dir():
        raise ReidError(f"{folder}: no such folder; make it with data_prep.py or give another --data_root")
    paths = [f"{split}/{path}" for path in list_images(folder) if "/" in path]
    if not paths:
        raise ReidError(f"{folder}: no images in sub-folders named by identity; make them with data_prep.py")
    return make_records(data_root, paths, grouped=True)


def read_folder(folder):
    """Every image below any folder, sorted by path; raises ReidError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReidError(f"{folder}: no such folder")
    paths = list_images(folder)
    if not paths:
        raise ReidError(f"{folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in it or below it")
    return make_records(folder, paths, grouped=False)


def list_images(folder):
    """Sorted POSIX paths, relative to `folder`, of the files with an image suffix; hidden ones are left out."""
    found = []
    for where, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(where).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        found += [prefix + name for name in names
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return sorted(found)


class LabelledImages(NamedTuple):
    files: list
    labels: torch.Tensor  # int64 [N], positions in the sorted list of classes


def load_training_set(roots, train_all):
    """(train, val or None, classes) of one or several grouped datasets.

    classes: the sorted ids, or "<root's name>/<id>" of several roots, whose ids are kept apart. Ids -1 and 0 are nobody's.
    """
    def read(split):
        files, names = [], []
        for root in roots:
            records = read_split(root, split)
            records = records.select(records.pids > DISTRACTOR)
            files += records.files()
            names += [pid if len(roots) == 1 else f"{Path(root).name}/{pid}" for pid in records.pids.tolist()]
        return files, names

    if len({Path(root).name for root in roots}) < len(roots):
        raise ReidError(f"--data_root {' '.join(roots)}: two roots with the same name; their ids could not be told apart")
    files, names = read("train")
    if all((Path(root) / "val").is_dir() for root in roots):
        val_files, val_names = read("val")
    elif train_all:
        val_files, val_names = [], []
    else:
        missing = next(Path(root) / "val" for root in roots if not (Path(root) / "val").is_dir())
        raise ReidError(f"{missing}: no such folder; make it with data_prep.py, or train without it with --train_all")
    if train_all:
        files, names, val_files, val_names = files + val_files, names + val_names, [], []
    classes = sorted(set(names))
    label = {name: i for i, name in enumerate(classes)}
    strangers = sorted(set(val_names) - set(classes), key=str)
    if strangers:
        raise ReidError(f"val/ has identities that train/ has not: {strangers[:3]}; make both with data_prep.py")
    train = LabelledImages(files, torch.tensor([label[name] for name in names]))
    val = LabelledImages(val_files, torch.tensor([label[name] for name in val_names])) if val_files else None
    return train, val, classes
