"""Shared parts of the fault tests: the scripts as forked processes on small data, whole files compared, hostile values.

A script is a fork of a server process that has imported the libraries: it starts at once, and a kill at a random moment hits
its work and not the imports. Its command line and its file are the real ones.
"""

import atexit
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import cached_property
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch

from reid.checkpoint import save_checkpoint
from reid.files import checksum
from reid.model import build_model, default_config

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ["fault_lab", "data_prep", "train", "eval", "inference", "torch._dynamo", "torch.utils.tensorboard",
             "mlflow.store.tracking.sqlalchemy_store"]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1",  # bits depend on it
               "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
TRAIN = ["--height", 64, "--width", 32, "--batch_size", 8, "--lr", 0.005, "--weights", "none", "--precision", "fp32",
         "--num_epochs", 2, "--warmup_epochs", 1, "--eval_freq", 1, "--num_data_loaders", 1, "--exp_name", "cut"]


class Script:
    """One of the four scripts in a process of its own, with its command line, in the folder `cwd`.

    log: folder for its output. prepare: a function of a module, called in that process before the script. After `wait`,
    `status` is the exit status (the negative number of a signal) and `err` what was written to stderr.
    """

    def __init__(self, log, cwd, name, *args, prepare=None):
        self.name, self.log = name, Path(tempfile.mkdtemp(dir=log))
        arguments = (cwd, self.log, prepare, f"{name}.py", list(map(str, args)))
        self.process = multiprocessing.get_context("forkserver").Process(target=_run, args=arguments)
        self.process.start()

    def stop_after(self, seconds, signal):
        """Send a signal that many seconds after the start, if the script still runs then."""
        while self.process.is_alive() and not (self.log / "err").exists():
            time.sleep(0.01)
        self.process.join(0.1 + seconds)  # the script is read in the first 0.1 s: there Ctrl-C ends every Python in a traceback
        if self.process.is_alive():
            os.kill(self.process.pid, signal)
        return self.wait()

    def wait(self, limit=500):
        self.process.join(limit)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail(f"{self.name}.py does not end")
        self.status, self.err = self.process.exitcode, (self.log / "err").read_text(errors="replace")
        assert "Traceback" not in self.err, self.err
        return self

    def works(self, status=0):
        assert self.wait().status == status, self.err
        return self

    def fails(self):
        """Require exit status 1 and one clear line."""
        self.works(1)
        assert self.err.strip().splitlines()[-1].startswith(f"{self.name}.py: error: "), self.err


def _run(cwd, log, prepare, script, args):
    import resource  # not on Windows

    os.chdir(cwd)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # a script that asks for all memory harms only itself
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout.reconfigure(errors="strict")  # as in a terminal of most languages
    sys.argv, status = [script, *args], 0
    try:
        if prepare:
            prepare()
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    atexit._run_exitfuncs()
    os._exit(status)


class Lab:
    """Working folders, and what the faults are tried on, made when first needed."""

    def __init__(self, root):
        self.root, self.undisturbed = root, {}
        with mock.patch.dict(os.environ, ENVIRONMENT):
            forkserver.set_forkserver_preload(PRELOADED)
            forkserver.ensure_running()

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
        return Script(self.root, folder, *args, prepare=prepare)

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
    save_checkpoint(path, build_model(default_config([1, 2], height=64, width=32)), {}, {"batch_size": 8}, training)
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
