"""Folders of person crops: listings that account for every file, records and the training set."""

import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from reid import ReidError
from reid.cli import printable
from reid.data.names import DISTRACTOR, UNKNOWN, UNKNOWN_PID, Name, describe, order, read_folders, read_path
from reid.images import is_image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif"}
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
HIDDEN, ELSEWHERE = "hidden, or of the operating system", "in other folders"  # the only reasons that --strict accepts
BESIDE = "beside the identity folders"
MOST_HELD_OUT = 100  # identities: enough to compare epochs, and cheap to embed
NO_CAMERA = ("NO CAMERA was read: images from the query's own camera count in the evaluation, which makes it too good; name "
             "cameras as in anna_c2_7.jpg or anna/cam2/7.jpg, or prepare the images with data_prep.py --from DIR --camera REGEX")


@dataclass(frozen=True)
class Records:
    """A list of N images: POSIX paths relative to `root`, and identity, camera, sequence and frame as int64 tensors [N].

    left_out: {reason: paths} of the other files that were there. split: folder of `root` that was listed, "" for `root` itself.
    """

    root: Path
    paths: list[str]
    pids: torch.Tensor
    camids: torch.Tensor
    seqs: torch.Tensor
    frames: torch.Tensor
    left_out: dict = field(default_factory=dict)
    split: str = ""

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

    def account(self, name, strict=False):
        """Return text on which files were taken and left out, and how identity and camera were read, with an example.

        name: of the folder, for the text. strict: raise ReidError where a file was left out.
        """
        return "\n".join([account(name, len(self), self.left_out, strict), self.reading()])

    def reading(self):
        """Return text on how identity and camera were read, with an example; in capitals where no camera was."""
        labelled, seen = self.pids != UNKNOWN_PID, self.camids != UNKNOWN
        row = int((2 * (self.pids > DISTRACTOR) + seen.int()).argmax())
        path, values = self.paths[row], Name(int(self.pids[row]), int(self.camids[row]))
        text = (f"  identity of {int(labelled.sum()):,} and camera of {int(seen.sum()):,} of {len(self):,} images, such as "
                f"{printable(describe(path, values))}")
        return text if seen.any() or not labelled.any() else f"{text}\n  {NO_CAMERA}"


def account(name, taken, left_out, strict=False):
    """Return text on `taken` images and on files that were left out ({reason: paths}), with two examples of each reason.

    strict: raise ReidError for a reason other than HIDDEN and ELSEWHERE.
    """
    lines = [f"{len(paths):,} {reason}: {printable(', '.join(paths[:2]))}{', ...' * (len(paths) > 2)}"
             for reason, paths in sorted(left_out.items())]
    if strict and (bad := [line for line, reason in zip(lines, sorted(left_out)) if reason not in (HIDDEN, ELSEWHERE)]):
        raise ReidError(f"{name}: --strict, and files were left out: {'; '.join(bad)}")
    there = taken + sum(map(len, left_out.values()))
    head = f"{printable(name)}: {there:,} files, {taken:,} images taken, {there - taken:,} left out"
    return "\n".join([head, *(f"  {line}" for line in lines)])


def make_records(root, paths, grouped, split="", left_out=None):
    """Make the Records of images at `paths`, relative to the folder `split` of `root`.

    grouped: the identity is that of the folder; otherwise that of the file name or, where it has none, of the folder. Raises
    ReidError for folders that are ambiguous (`names.read_folders`).
    """
    columns = torch.tensor([read_path(path, grouped) for path in paths], dtype=torch.int64).reshape(-1, 4).T.contiguous()
    prefix = f"{split}/" if split else ""
    return Records(Path(root), [prefix + path for path in paths], *columns, left_out or {}, split)


def read_split(data_root, split):
    """Return the Records of the images `data_root/split/<identity>/**`, sorted by path. Raises ReidError if there are none."""
    folder = Path(data_root) / split
    if not folder.is_dir():
        raise ReidError(f"{folder}: no such folder; make it with data_prep.py or give another --data_root")
    paths, left_out = list_split(data_root, split)
    if not paths:
        raise ReidError(f"{folder}: no images in sub-folders named by identity; make them with data_prep.py")
    return make_records(data_root, paths, True, split, left_out)


def list_split(data_root, split):
    """`list_files` of `data_root/split`, where only images in identity folders are taken; without a split, of `data_root`."""
    found, left_out = list_files(Path(data_root) / split)
    paths = [path for path in found if not split or ("/" in path and read_folders(path)[0])]
    if beside := sorted(set(found) - set(paths)):
        left_out[BESIDE] = beside
    return paths, left_out


def read_folder(folder):
    """Return the Records of every image below `folder`, sorted by path. Raises ReidError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReidError(f"{folder}: {'is a file; give a folder of images' if folder.exists() else 'no such folder'}")
    paths, left_out = list_files(folder)
    if not paths:
        raise ReidError(f"{folder}: no image in it or below it; {account('there', 0, left_out)}")
    return make_records(folder, paths, False, left_out=left_out)


def list_images(folder):
    """Return the sorted POSIX paths, relative to `folder`, of the images in it and below it."""
    return list_files(folder)[0]


def list_files(folder, regular=False):
    """Return (sorted POSIX paths of the images below `folder`, {reason: sorted paths} of all other files).

    Images are the files with a suffix of IMAGE_SUFFIXES and those whose content Pillow reads. Links are followed; a folder
    that is reached twice, or a link to a folder that holds it, is left out. regular: leave out links to nothing and devices
    with such a suffix, too, which are otherwise an error when they are read.
    """
    images, left_out, root = [], defaultdict(list), os.path.realpath(folder)
    seen, folders = set(), [("", root)]
    while folders:
        prefix, real = folders.pop()
        if real in seen or root.startswith(os.path.join(real, "")):
            left_out["folder that is linked a second time, or holds its own link"].append(prefix)
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(real), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            left_out[f"folder that cannot be read ({error.strerror})"].append(prefix)
            continue
        for entry in entries:
            path = prefix + entry.name
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                left_out[HIDDEN].append(path)
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # a link to itself would raise
                folders.append((f"{path}/", os.path.realpath(entry.path) if entry.is_symlink() else entry.path))
            elif reason := _not_an_image(entry, regular):
                left_out[reason].append(path)
            else:
                images.append(path)
    return sorted(images), {reason: sorted(paths) for reason, paths in left_out.items()}


def _not_an_image(entry, regular):
    """Return why a file is left out, or None for an image."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if not regular and suffix in IMAGE_SUFFIXES:
        return None
    if not os.path.isfile(entry.path):
        return "link to nothing" if entry.is_symlink() and not os.path.exists(entry.path) else "no regular file"
    if suffix in IMAGE_SUFFIXES or is_image(entry.path):
        return None
    if suffix in (".heic", ".heif"):
        return f"{suffix} file, which Pillow does not read (convert it to JPEG)"
    return f"{suffix or 'suffix-less'} file that is no image"


class LabelledImages(NamedTuple):
    """Images of a training set or of its validation: N files, labels int64 [N], cameras int64 [N] and held_out bool [N].

    A label is the position of the identity in the sorted list of classes. held_out: whether its identity is not trained on.
    """

    files: list[Path]
    labels: torch.Tensor
    camids: torch.Tensor
    held_out: torch.Tensor


def load_training_set(roots, train_all=False, held_out=0.1):
    """Return (train, val or None, classes) of one or several grouped datasets: LabelledImages and the sorted classes.

    train_all: train on all images of train/ and val/, without a validation. Otherwise validate on the images of val/ and on
    all those of a share `held_out` of the identities (`_hold_out`), which are classes without training images: so the
    classifier fits a checkpoint that was trained on all of them.
    classes: the ids or, for several roots, whose ids are kept apart, "<name of the root>/<id>". Junk and distractors are
    left out. Raises ReidError for roots of the same name, for identities in val/ that train/ does not have, and where there
    is nothing to validate on.
    """
    if len({Path(root).name for root in roots}) < len(roots):
        raise ReidError(f"--data_root {' '.join(roots)}: two roots with the same name; their ids could not be kept apart")
    images = {"train": [], "val": []}  # split -> [(file, identity, camera)]
    for split in images:
        for root in roots:
            if split == "val" and not list_images(Path(root) / split):
                continue
            records = read_split(root, split)
            records = records.select(records.pids > DISTRACTOR)
            names = [pid if len(roots) == 1 else f"{Path(root).name}/{pid}" for pid in records.pids.tolist()]
            images[split] += zip(records.files(), names, records.camids.tolist())
    if train_all:
        images = {"train": images["train"] + images["val"], "val": []}
    people = {name for _, name, _ in images["train"]}
    if strangers := sorted({name for _, name, _ in images["val"]} - people, key=str):
        raise ReidError(f"val/ has identities that train/ has not: {strangers[:3]}; make both with data_prep.py")
    held = set() if train_all else _hold_out(images["train"], held_out)
    if not (train_all or held or images["val"]):
        raise ReidError(f"{Path(roots[0]) / 'val'}: no images to validate on; train without validation with --train_all")
    label = {name: i for i, name in enumerate(sorted(people))}

    def labelled(part):
        rows = [(label[name], camid, name in held) for _, name, camid in part]
        labels, camids, unseen = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).T
        return LabelledImages([file for file, *_ in part], labels, camids, unseen.bool())
    train = labelled([row for row in images["train"] if row[1] not in held])
    val = images["val"] + [row for row in images["train"] if row[1] in held]
    return train, labelled(val) if val else None, sorted(people)


def _hold_out(images, share):
    """Choose the identities to validate on by retrieval: a share, MOST_HELD_OUT at most, in the order of a hash of their names.

    images: [(file, identity, camera)]. Chosen are identities that two cameras have seen or, without cameras in the names,
    that have two images. None, if that gives fewer than two identities.
    """
    cameras = defaultdict(list)
    for _, name, camid in images:
        cameras[name].append(camid)
    able = [name for name, seen in cameras.items() if len(set(seen)) > 1 or (UNKNOWN in seen and len(seen) > 1)]
    chosen = sorted(able, key=order)[: min(MOST_HELD_OUT, round(share * len(cameras)))]
    return set(chosen) if len(chosen) > 1 else set()
