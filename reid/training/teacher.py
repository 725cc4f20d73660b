"""What the network follows beside its labels: the embeddings of any model from a file, or a checkpoint of this project."""

from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from reid import ReidError
from reid.checkpoint import FORMAT, load_checkpoint, load_foreign, restore_model
from reid.data.paths import Paths
from reid.model import ReidModel
from reid.training.teacher_network import TeacherNetwork

KINDS = "a checkpoint, an OpenVINO network (.xml), an index or a dict of paths and embeddings"


class Teacher(nn.Module):
    """Call `teacher(images, rows)` for the embeddings, and perhaps the logits, that a batch has to follow.

    embeddings: float [N, T], one row for each image of the training, or None where `network` computes them, a ReidModel or an
    TeacherNetwork. size: dimension D of the embeddings of the network that learns. `map` is linear, from these to the
    teacher's; it learns, too.
    """

    def __init__(self, size, embeddings=None, network=None):
        super().__init__()
        self.network = network and network.eval().requires_grad_(False)
        self.register_buffer("embeddings", embeddings)
        self.map = nn.Linear(size, embeddings.shape[1] if network is None else network.config["embedding_size"], bias=False)

    @torch.no_grad()
    def forward(self, images, rows):
        """Return embeddings [B, T], and logits [B, C] or None where the teacher has none of the same identities.

        images: float32 [B, 3, H, W], for a teacher that has a network; rows: int64 [B], the positions of the images in the
        training set.
        """
        if self.network is None:
            return self.embeddings[rows].float(), None
        if not isinstance(self.network, ReidModel):
            return self.network(images), None
        size = self.network.config["height"], self.network.config["width"]
        resized = images if images.shape[-2:] == size else F.interpolate(images, size, mode="bilinear")
        embeddings = self.network.neck(self.network.features(resized))
        return embeddings, self.network.classifier(embeddings)


def load_teacher(args, model, files, unlabelled):
    """Return the Teacher of --teacher, or None. files, unlabelled: the training images with and without identities.

    Raises ReidError for a checkpoint of other identities, and for a file that lacks an image or has several rows for one.
    """
    if not args.teacher:
        if args.unlabelled or args.unlabelled_teacher:
            raise ReidError("--unlabelled needs a --teacher: crops without identities are only distilled")
        if args.teacher_input:
            raise ReidError("--teacher_input needs a --teacher, a network (.xml)")
        return None
    name, size = f"--teacher {args.teacher}", model.config["embedding_size"]
    is_network = Path(args.teacher).suffix == ".xml"
    if is_network and not args.teacher_input:
        raise ReidError(f"{name} needs --teacher_input, the pixels that the network expects")
    if args.teacher_input and not is_network:
        raise ReidError(f"{name}: is no network (.xml), so leave --teacher_input out")
    if is_network:
        _refuse_file_of_crops(args)
        return Teacher(size, network=TeacherNetwork(args.teacher, args.teacher_input))
    record = _load(args.teacher, name)
    if record.get("format") == FORMAT:
        _refuse_file_of_crops(args)
        record = load_checkpoint(args.teacher)
        if record["config"]["classes"] != model.config["classes"]:
            raise ReidError(f"{name}: trained on other identities than this run; train it on the same --data_root")
        return Teacher(size, network=restore_model(record, args.teacher))
    parts = [match(files, *_rows(record, name), name)]
    if unlabelled:
        path = args.unlabelled_teacher or args.teacher
        name = f"--unlabelled_teacher {path}"
        parts.append(match(unlabelled, *_rows(_load(path, name), name), name))
        if parts[0].shape[1] != parts[1].shape[1]:
            raise ReidError(f"{name}: embeddings of {parts[1].shape[1]} dimensions, those of --teacher have {parts[0].shape[1]}; "
                            "both must come from one model")
    return Teacher(size, torch.cat(parts))


def _refuse_file_of_crops(args):
    if args.unlabelled_teacher:
        raise ReidError(f"--unlabelled_teacher: the network of --teacher {args.teacher} embeds the crops itself; leave it out")


def _load(path, name):
    """Return the dict in a file of tensors and plain values."""
    record = load_foreign(path, name, f"give {KINDS}")
    if not isinstance(record, dict):
        raise ReidError(f"{name}: holds a {type(record).__name__}; give {KINDS}")
    return record


def _rows(record, name):
    """Return the paths (list of N str) and the embeddings (float [N, T]) of a record.

    That is an index of this project, of which the queries count as well, or a dict of `paths` and `embeddings`. Raises ReidError
    for anything else and for embeddings that are zero or not finite.
    """
    paths, rows = [], []
    for part in (record, record.get("queries")):
        if not isinstance(part, dict):
            continue
        names, embeddings = part.get("paths"), part.get("embeddings")
        try:
            if "path_blob" in part:
                names = list(Paths(part["path_blob"], part["path_offsets"]))
            fits = embeddings.is_floating_point() and embeddings.ndim == 2 and len(embeddings) == len(names)
            fits = fits and all(isinstance(name, str) for name in names)
        except (AttributeError, KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ReidError(f"{name}: needs `paths`, a list of N file names, and `embeddings`, float [N, D]; or give an "
                            "index or a checkpoint of this project")
        paths += names
        rows.append(embeddings)
    norms = torch.cat([part.float().norm(dim=1) for part in rows])
    if bad := int((~norms.isfinite() | (norms == 0)).sum()):
        raise ReidError(f"{name}: {bad:,} of {len(norms):,} embeddings are zero or not finite; make the file again")
    return paths, torch.cat(rows)


def match(files, paths, embeddings, name):
    """Return the embedding of each of `files`, float [len(files), T]. paths: N names of the rows of `embeddings`.

    A row belongs to an image if its path, which may be a file name alone, ends that of the image (`train/0002/a.jpg` of
    `data/mine/train/0002/a.jpg`; the longest such path counts). Raises ReidError, which begins with `name`, unless every
    image has exactly one row, and no row has two images.
    """
    by_path = {}
    for row, path in enumerate(paths):
        by_path.setdefault(path.replace("\\", "/"), []).append(row)
    found = []
    for file in files:
        parts = Path(file).parts
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        found.append(next((by_path[end] for end in ends if end in by_path), []))
    advice = "embed the images with one model, and save one row for each under its path, or its file name alone"
    if missing := [file for file, rows in zip(files, found) if not rows]:
        raise ReidError(f"{name}: no embedding of {len(missing):,} of {len(files):,} images, such as {missing[0]}; {advice}")
    uses = Counter(rows[0] for rows in found)
    if unclear := [(file, rows) for file, rows in zip(files, found) if len(rows) > 1 or uses[rows[0]] > 1]:
        file, rows = unclear[0]
        reason = f"fits {len(rows)} rows" if len(rows) > 1 else f"shares the row {paths[rows[0]]} with another image"
        raise ReidError(f"{name}: {len(unclear):,} of {len(files):,} images have no row of their own, such as {file}, which "
                        f"{reason}; {advice}")
    return embeddings[[rows[0] for rows in found]]
