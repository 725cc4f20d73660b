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
UNKNOWN = -1  # camera, sequence or frame that is not part of a name
UNKNOWN_PID = -2  # unlabelled: neither name nor folder gives an identity

# Market-1501 0002_c1s1_000451_03.jpg, DukeMTMC 0005_c2_f0046985.jpg, plain 0007_c3.png; "-1" is junk, ".jpg.jpg" occurs.
_NAME = re.compile(r"(-?\d{1,18})_c(\d{1,9})(?:s(\d{1,9}))?(?:_f?(\d{1,15}))?(?:_\d{1,15})?(?:\.\w{1,8}){0,2}", re.ASCII)
_INTEGER = re.compile(r"-?\d{1,18}", re.ASCII)


class Name(NamedTuple):
    """The parts of a file name: identity, camera, sequence and frame (UNKNOWN where there is none)."""

    pid: int
    camid: int
    seq: int = UNKNOWN
    frame: int = UNKNOWN


def parse_name(name):
    """Parse `<pid>_c<camera>[s<sequence>][_<frame>][_<box>][.ext]` into a Name; return None for any other name."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    pid, *rest = match.groups()
    return Name(int(pid), *(UNKNOWN if part is None else int(part) for part in rest))


def folder_pid(folder):
    """Return the identity of a folder: its number, or a hash of its name, the same in every split and run.

    Hashes lie between 2^61 and 2^62, far away from any number that a person would choose.
    """
    if _INTEGER.fullmatch(folder):
        return int(folder)
    digest = hashlib.blake2b(folder.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 2) | (1 << 61)


@dataclass(frozen=True)
class Records:
    """A list of N images: POSIX paths relative to `root`, and identity, camera, sequence and frame as int64 tensors [N]."""

    root: Path
    paths: list[str]
    pids: torch.Tensor
    camids: torch.Tensor
    seqs: torch.Tensor
    frames: torch.Tensor

    def __len__(self):
        return len(self.paths)

    def select(self, keep):
        """Return the records at the positions `keep` (int64 or bool tensor), in that order."""
        keep = torch.as_tensor(keep)
        keep = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
        columns = {name: getattr(self, name)[keep] for name in ("pids", "camids", "seqs", "frames")}
        return replace(self, paths=[self.paths[i] for i in keep.tolist()], **columns)

    def files(self):
        """Return the path of every image."""
        return [self.root / path for path in self.paths]


def make_records(root, paths, grouped):
    """Make the Records of `paths` below `root`.

    grouped: the identity is that of the folder; otherwise that of the file name or, where it has none, of the folder.
    """
    rows = []
    for path in paths:
        folder, name = os.path.split(path)
        parsed = parse_name(name) or Name(UNKNOWN_PID, UNKNOWN)
        from_folder = grouped or (parsed.pid == UNKNOWN_PID and folder)
        rows.append((folder_pid(os.path.basename(folder)) if from_folder else parsed.pid, *parsed[1:]))
    columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).T.contiguous()
    return Records(Path(root), list(paths), *columns)


def read_split(data_root, split):
    """Return the Records of the images `data_root/split/<pid>/*`, sorted by path. Raises ReidError if there are none."""
    folder = Path(data_root) / split
    if not folder.is_dir():
        raise ReidError(f"{folder}: no such folder; make it with data_prep.py or give another --data_root")
    paths = [f"{split}/{path}" for path in list_images(folder) if "/" in path]
    if not paths:
        raise ReidError(f"{folder}: no images in sub-folders named by identity; make them with data_prep.py")
    return make_records(data_root, paths, grouped=True)


def read_folder(folder):
    """Return the Records of every image below `folder`, sorted by path. Raises ReidError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReidError(f"{folder}: {'is a file; give a folder of images' if folder.exists() else 'no such folder'}")
    paths = list_images(folder)
    if not paths:
        raise ReidError(f"{folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in it or below it")
    return make_records(folder, paths, grouped=False)


def list_images(folder):
    """Return the sorted POSIX paths, relative to `folder`, of the files with an image suffix that are not hidden."""
    found = []
    for where, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(where).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        found += [prefix + name for name in names
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return sorted(found)


class LabelledImages(NamedTuple):
    """Images of a training set."""

    files: list[Path]
    labels: torch.Tensor  # int64 [N], positions in the sorted list of classes


def load_training_set(roots, train_all):
    """Return (train, val or None, classes) of one or several grouped datasets: LabelledImages and the sorted classes.

    classes: the ids or, for several roots, whose ids are kept apart, "<name of the root>/<id>". Junk and distractors are
    left out. train_all: train on the images of val/ as well. Raises ReidError for roots of the same name, and for
    identities in val/ that train/ does not have.
    """
    if len({Path(root).name for root in roots}) < len(roots):
        raise ReidError(f"--data_root {' '.join(roots)}: two roots with the same name; their ids could not be kept apart")
    missing = [Path(root) / "val" for root in roots if not (Path(root) / "val").is_dir()]
    images = {"train": [], "val": []}  # split -> [(file, class)]
    for split in ("train",) if missing else ("train", "val"):
        for root in roots:
            records = read_split(root, split)
            records = records.select(records.pids > DISTRACTOR)
            names = [pid if len(roots) == 1 else f"{Path(root).name}/{pid}" for pid in records.pids.tolist()]
            images["train" if train_all else split] += zip(records.files(), names)
    if missing and not train_all:
        raise ReidError(f"{missing[0]}: no such folder; make it with data_prep.py, or train without it with --train_all")
    classes = sorted({name for _, name in images["train"]})
    label = {name: i for i, name in enumerate(classes)}
    if strangers := sorted({name for _, name in images["val"]} - set(classes), key=str):
        raise ReidError(f"val/ has identities that train/ has not: {strangers[:3]}; make both with data_prep.py")

    def labelled(part):
        return LabelledImages([file for file, _ in part], torch.tensor([label[name] for _, name in part], dtype=torch.int64))
    return labelled(images["train"]), labelled(images["val"]) if images["val"] else None, classes
