"""Checkpoints, indexes, images, names and numbers as accidents and attackers make them: one clear line, and no code runs."""

import os
import pickle
import re
from random import Random

import pytest
import torch
from fault_lab import TRAIN, contents, raw, tiny_checkpoint
from PIL import Image

from reid import ReidError, images
from reid import files as storage
from reid.checkpoint import check_name, fingerprint, load_checkpoint
from reid.data.datasets import make_records
from reid.model import default_config
from reid.retrieval.index import GalleryIndex


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "best.pth", {"epoch": 1, "step": 0, "best": None})


@pytest.fixture(scope="module")
def index(tiny):
    """An index of eight embeddings of the tiny network; its images are not there."""
    names = [f"{pid:04}/{pid:04}_c{camera}s1_000001_00.jpg" for pid in (1, 2) for camera in (1, 2, 3, 4)]
    embeddings = torch.nn.functional.normalize(torch.randn(8, 1024)).half()
    made = GalleryIndex(embeddings, make_records(tiny.parent, names, grouped=True), fingerprint(load_checkpoint(tiny)), True)
    made.save(tiny.with_name("index.pt"))
    return tiny.with_name("index.pt")


@pytest.fixture
def refused(here):
    """Run a script's command line in this process, in an empty folder; require one line of error and return it."""
    return here.refused


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def huge(*shape):
    """A tensor of petabytes that takes one number in a file."""
    return torch.zeros(1).expand(*shape)


def flipped(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def ring():
    inner = []
    inner.append(inner)
    return inner


BYTES = {"empty": lambda data: b"", "truncated": lambda data: data[: len(data) // 3], "last byte missing": lambda data: data[:-1],
         "bit flipped": flipped, "text": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
         "code in a pickle": lambda data: pickle.dumps(Hostile(), 2)}
RECORDS = {"code in a value": lambda r: {"x": Hostile()}, "another version": lambda r: {"version": 99},
           "another kind": lambda r: {"format": "reid-other"}, "a list that holds itself": lambda r: {"x": ring()},
           "sparse": lambda r: {"x": torch.ones(2, 2).to_sparse()}, "meta": lambda r: {"x": torch.ones(2, device="meta")}}
CHECKPOINTS = RECORDS | {
    "petabytes": lambda r: {"state_dict": {"x": huge(1 << 25, 1 << 25)}}, "no configuration": lambda r: {"config": {}},
    "a weight is missing": lambda r: {"state_dict": dict(list(r["state_dict"].items())[1:])},
    "a weight of another shape": lambda r: {"state_dict": r["state_dict"] | {"body.conv0.weight": torch.ones(3)}},
    "a weight is NaN": lambda r: {"state_dict": r["state_dict"] | {"body.conv0.weight": torch.full((64, 3, 7, 7), torch.nan)}},
    "a weight is text": lambda r: {"state_dict": r["state_dict"] | {"body.conv0.weight": "x"}},
    "another backbone": lambda r: {"config": r["config"] | {"backbone": "resnet50"}},
    "images of a billion pixels": lambda r: {"config": r["config"] | {"height": 1 << 30, "width": 1 << 30}}}
INDEXES = RECORDS | {
    "petabytes": lambda r: {"embeddings": huge(1 << 25, 1 << 25)},
    "embeddings are NaN": lambda r: {"embeddings": r["embeddings"] * torch.nan},
    "embeddings of another size": lambda r: {"embeddings": r["embeddings"][:, :7].contiguous()},
    "rows are missing": lambda r: {"embeddings": r["embeddings"][:-1].clone()},
    "ids are missing": lambda r: {"pids": r["pids"][1:].clone()},
    "ids are decimals": lambda r: {"pids": r["pids"].float()}, "another model": lambda r: {"fingerprint": "0" * 16},
    "another preprocessing": lambda r: {"preprocessing": "rgb-u8/nearest/1"},
    "paths out of bounds": lambda r: {"path_offsets": r["path_offsets"] + (1 << 40)},
    "no split": lambda r: {"split": ...}, "paths backwards": lambda r: {"path_offsets": r["path_offsets"].flip(0)}}


def write_hostile(source, target, kind, records):
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind in BYTES:
        target.write_bytes(BYTES[kind](source.read_bytes()))
    else:
        record = torch.load(source, weights_only=True)
        record |= records[kind](record)
        raw(target, {key: value for key, value in record.items() if value is not ...})


def workplace(folder, tiny):
    """Put the run `tiny` and a dataset of two identities, all in black, into `folder`."""
    (folder / "models/tiny").mkdir(parents=True)
    os.link(tiny, folder / "models/tiny/best.pth")
    for split in ("train", "val", "query", "gallery"):
        for pid in ("0001", "0002"):
            (folder / "people" / split / pid).mkdir(parents=True)
            for camera in range(4):
                Image.new("RGB", (32, 64)).save(folder / "people" / split / pid / f"{pid}_c{camera}s1_000001_00.jpg")


@pytest.mark.parametrize("kind", [*BYTES, *CHECKPOINTS])
def test_hostile_checkpoint(tiny, refused, tmp_path, kind):
    write_hostile(tiny, tmp_path / "models/bad/best.pth", kind, CHECKPOINTS)
    os.link(tmp_path / "models/bad/best.pth", tmp_path / "models/bad/last.pth")
    workplace(tmp_path, tiny)
    for name, *options in (["eval"], ["inference"], ["train", "--resume"]):
        assert "models/bad/" in refused(name, "--data_root", "people", "--exp_name", "bad", *options)
    if kind in BYTES:  # --weights takes what fits from any other file
        refused("train", "--data_root", "people", *TRAIN, "--weights", "models/bad/best.pth")
        assert not list((tmp_path / "models").glob("cut/*.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("command", [
    "data_prep --archive pipe --any_counts", "data_prep --from folder --times pipe", "data_prep --mot pipe --frames folder",
    "train --weights pipe", "train --weights none --teacher pipe", "eval --load_index --gallery_uri pipe",
    "inference --network pipe --network_input rgb255", "inference --gallery pipe --save_index", "inference --add pipe"])
def test_a_pipe_that_nobody_writes_to_is_refused(tiny, refused, tmp_path, command):
    """To open it would wait forever."""
    workplace(tmp_path, tiny)
    os.mkfifo("pipe")
    os.mkdir("folder")
    name, *options = command.split()
    model = {"train": ["--data_root", "people", *TRAIN], "eval": ["--exp_name", "tiny", "--data_root", "people"],
             "inference": ["--exp_name", "tiny"]}
    assert "pipe" in refused(name, *model.get(name, ()), *options)


@pytest.mark.parametrize("kind", [*BYTES, *INDEXES])
def test_hostile_index(tiny, index, refused, tmp_path, kind):
    workplace(tmp_path, tiny)
    write_hostile(index, tmp_path / "index/tiny.pt", kind, INDEXES)
    for name in ("eval", "inference"):
        refused(name, "--exp_name", "tiny", "--data_root", "people", "--load_index")
    assert not (tmp_path / "ran").exists()


STRANGE = [None, True, -1, 0, 1 << 70, float("nan"), float("inf"), "", "\ud800", "../../x", "a\nb", b"bytes", [], {}, [[]],
           {1: 2}, ring(), torch.tensor(1), torch.empty(0), torch.ones(2, 3), torch.full((3, 4), torch.nan), torch.ones(3).bool(),
           torch.ones(3, dtype=torch.complex64), torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta"),
           huge(1 << 25, 1 << 25), torch.full((5,), 1 << 62), torch.nn.Parameter(torch.ones(2))]


def strange(node, rng):
    """Return a copy of a dict in which one value, at any depth, is another, of another type or shape, or missing."""
    key = rng.choice(sorted(node, key=str))
    value = node[key]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        return node | {key: strange(value, rng)}
    if rng.random() < 0.1:
        return {name: other for name, other in node.items() if name != key}
    if isinstance(value, torch.Tensor) and value.ndim and rng.random() < 0.5:
        return node | {key: rng.choice([value.double, value.short, lambda: torch.cat([value, value]), lambda: value[None],
                                        lambda: value[:-1], lambda: value.flip(0), lambda: -value.long(),
                                        lambda: value * torch.nan, lambda: value[:1].expand(1 << 40, *value.shape[1:])])()}
    return node | {key: rng.choice(STRANGE)}


def damaged(data, rng):
    """Return `data` with up to 8 bytes changed, cut off in one case of three."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return data[: rng.randrange(len(data))] if rng.random() < 1 / 3 else data


@pytest.mark.long
@pytest.mark.parametrize("what", ["bytes", "contents"])
@pytest.mark.parametrize("kind", ["checkpoint", "index"])
def test_fuzzing(tiny, index, tmp_path, kind, what, moment):
    """30 damaged files: each is read, or refused in one line; no other error, no crash."""
    path, record = tmp_path / "fuzz", contents(tiny if kind == "checkpoint" else index)
    if kind == "checkpoint":
        record["state_dict"] = {key: record["state_dict"][key] for key in ("neck.weight", "body.norm0.running_mean")}
    raw(path, record)
    head = {key: record.pop(key) for key in ("format", "version")}
    data, rng = path.read_bytes(), Random(moment)
    for _ in range(30):
        if what == "bytes":
            path.write_bytes(damaged(data, rng))
        else:
            raw(path, head | strange(record, rng))
        try:
            if kind == "checkpoint":
                fingerprint(load_checkpoint(path))
            else:
                loaded = GalleryIndex.load(path, record["fingerprint"])
                loaded.search(torch.ones(1, 1024) / 32, 3, camids=[1])
                assert len(list(loaded.paths)) == len(loaded.records()) == len(loaded)
        except ReidError as error:
            assert "\n" not in str(error)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read every file")
def test_an_unreadable_image(tmp_path):
    (tmp_path / "x.jpg").touch(0)
    with pytest.raises(ReidError, match="Permission denied"):
        images.decode(tmp_path / "x.jpg")


@pytest.mark.parametrize("change, reason", [
    ({"training": []}, "no training state"), ({"training": {"epoch": "1", "step": 0, "best": None}}, "no training state"),
    ({"args": {"lr": torch.ones(2)}}, r"wrong type \(lr\)"), ({"args": {1: 2}}, "wrong type"),
    ({"args": {"num_epochs": 10**9}}, "--num_epochs 1000000000: must lie between"),
    ({"config": default_config("ab")}, "last.pth"), ({"state_dict": {1: torch.ones(1)}}, "last.pth")])
def test_strange_checkpoints_are_not_resumed(tiny, refused, tmp_path, change, reason):
    workplace(tmp_path, tiny)
    raw(tmp_path / "models/tiny/last.pth", torch.load(tiny, weights_only=True) | change)
    assert re.search(reason, refused("train", "--exp_name", "tiny", "--resume", "--data_root", "people"))


NAMES = ["", ".", "..", "../x", "/x", "a/b", "a\\b", "a\nb", "-x", ".x", "x.", "x ", "con", "NUL.txt", "x" * 101]


def test_names_of_runs_are_plain():
    for name in NAMES:
        with pytest.raises(ReidError, match="plain name"):
            check_name(name)
    for name in ("masked-hog-908", "7", "ResNet 50", "lr=0.1,v2", "Ünal", "console"):
        assert check_name(name) == name


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_only_files_are_replaced(tmp_path, make):
    """`--json /dev/null` by root must leave the device alone."""
    make(tmp_path / "x")
    with pytest.raises(ReidError, match="is not a file"), storage.atomic_path(tmp_path / "x", "kind"):
        pass
    assert not (tmp_path / "x").is_file() and len(list(tmp_path.iterdir())) == 1
