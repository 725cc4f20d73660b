"""Shared parts of the fault tests: the scripts on small data, whole files compared, hostile values.

The scripts are forks of a process that has imported the libraries, so a kill at a random moment hits their work.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import pytest
import torch
from forked import Script
from in_process import Here
from tiny_network import SMALL, tiny_model

from reid.checkpoint import save_checkpoint
from reid.extras import network
from reid.files import checksum
from reid.retrieval.extract import Extractor

TRAIN = [*SMALL, "--batch_size", 8, "--lr", 0.005, "--num_epochs", 2, "--warmup_epochs", 1, "--eval_freq", 1,
         "--num_data_loaders", 1, "--exp_name", "cut"]


class Lab:
    """Working folders, and what the faults are tried on, made when first needed."""

    def __init__(self, root):
        self.root, self.undisturbed = root, {}

    def folder(self, name=None):
        """Return a new working folder. name: a command; the folder then holds the model that it reads."""
        folder = Path(tempfile.mkdtemp(dir=self.root))
        if name in ("eval", "inference"):
            (folder / "models/tiny").mkdir(parents=True)
            os.link(self.tiny, folder / "models/tiny/best.pth")
        if name == "train" and (self.root / "mlflow.db").exists():  # making it takes longer than the training
            shutil.copy(self.root / "mlflow.db", folder)
        return folder

    def command(self, name, folder):
        """Return the command line of `name`. Training is resumed where `folder` has a checkpoint."""
        if name == "data_prep":
            return [name, "--synthetic", "--num_ids", 6, "--output", "out"]
        if name == "train":
            resume = ["--resume"] if (folder / "models/cut/last.pth").exists() else []
            return [name, "--data_root", self.people, *TRAIN, *resume]
        model = [name, "--exp_name", "tiny", "--data_root", self.people, "--json", "r.json"]
        if name == "eval":
            return [*model, "--save_index"]
        query = sorted((self.people / "query").rglob("*.jpg"))[0]
        return [*model, "--load_index", "--gallery_uri", self.index, "--query_paths", query, "--topk", 5, "--output", "r.png"]

    def start(self, name, folder, prepare=None):
        return self.script(folder, *self.command(name, folder), prepare=prepare)

    def script(self, folder, *args, prepare=None):
        name, *options = args
        return Script(folder, f"{name}.py", *options, prepare=prepare)

    def expected(self, name):
        """Return (seconds, state of the folder) of an undisturbed run of `name`."""
        if name not in self.undisturbed:
            folder, _, started = self.folder(name), self.command(name, self.root), time.perf_counter()  # makes its input
            self.start(name, folder).works()
            self.undisturbed[name] = time.perf_counter() - started, state(folder)
            if name == "train":
                shutil.copy(folder / "mlflow.db", self.root)
        return self.undisturbed[name]

    @cached_property
    def people(self):
        folder = self.folder()
        self.start("data_prep", folder).works()
        return folder / "out"

    @cached_property
    def tiny(self):
        return tiny_checkpoint(self.root / "tiny.pth")

    @cached_property
    def index(self):
        folder = self.folder("eval")
        self.start("eval", folder).works()
        return folder / "index/tiny.pt"


def tiny_checkpoint(path, training=None):
    """Save an untrained network for images of 64 x 32."""
    torch.manual_seed(0)
    save_checkpoint(path, tiny_model(), {}, {"batch_size": 8}, training)
    return path


def contents(path):
    """Return the record in a checkpoint or an index without its checksum, which must fit: the file is whole."""
    record = torch.load(path, weights_only=True)
    assert record.pop("sha256") == checksum(record), path
    return record


def raw(path, record):
    """Write `record` with a checksum that fits, whatever it contains."""
    record = {key: value for key, value in record.items() if key != "sha256"}
    try:
        record["sha256"] = checksum(record)
    except (RuntimeError, NotImplementedError, TypeError, RecursionError):
        record["sha256"] = ""
    torch.save(record, path)


def state(folder):
    """Return {name: content or checksum} of what scripts leave in `folder`; a file that is not whole fails the test.

    A dataset counts as one thing, which is there or not. Of a checkpoint the weights count: two runs differ in the rest.
    """
    found = {name: (folder / name).read_bytes() for name in ("r.json", "r.png") if (folder / name).exists()}
    found |= {path.name: checksum(contents(path)) for path in folder.glob("index/*.pt")}
    found |= {path.name: checksum(contents(path)["state_dict"]) for path in folder.glob("models/cut/*.pth")}
    if (folder / "out").exists():
        found["out"] = {path.relative_to(folder): path.read_bytes() for path in (folder / "out").rglob("*.jpg")}
    return found


@contextmanager
def small_disk(folder, megabytes=256):
    """Mount a file system in memory, or skip the test."""
    if sys.platform != "linux" or os.getuid():
        pytest.skip("mounting a small file system needs Linux and root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


class TinyNetwork(Extractor):
    """In place of the network of --network: the pixels of an image, shrunk to 8 x 4, as its features."""

    config, size, dim, engine = {"backbone": "tiny"}, (8, 4), 3 * 8 * 4, "torch"

    def __init__(self, args, checkpoint=None):
        self.fingerprint = network.network_fingerprint(args.network, args.network_input)
        self._start("cpu", "fp32", args.mirror is not False, None)
        self._features, self._neck = lambda images: images.flatten(1).float() - 128, torch.nn.Identity()


class TinyHere(Here):
    """The scripts in this process, in the current folder, with a TinyNetwork."""

    def __init__(self, monkeypatch, capsys):
        super().__init__(monkeypatch, capsys)
        self.network = ["--network", "net.onnx", "--network_input", "rgb255"]
        make = network.make_extractor
        monkeypatch.setattr(network, "make_extractor", lambda args, *more: (TinyNetwork if args.network else make)(args, *more))
