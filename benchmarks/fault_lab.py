"""What benchmarks/faults.py works with: the scripts as forked processes, small data, a faulty server, a small disk."""

import importlib
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork may not inherit threads, and bits depend on their number

import torch

import data_prep
import eval as evaluate
import inference
import train
from reid import ReidError, checkpoint
from reid import files as storage
from reid.cli import run
from reid.data import archives
from reid.model import build_model, default_config
from reid.retrieval import index as index_module
from reid.training import tracking

SCRIPTS = {"data_prep": data_prep, "train": train, "eval": evaluate, "inference": inference}
FORK = multiprocessing.get_context("fork")
NOBODY = 65534  # user id: root reads what nobody may
TINY = ["--height", 64, "--width", 32, "--batch_size", 8, "--lr", 0.005, "--weights", "none", "--precision", "fp32",
        "--num_epochs", 2, "--warmup_epochs", 1, "--eval_freq", 1, "--num_data_loaders", 1]
storage.fsync_tree = lambda folder: None  # a killed process loses nothing that the kernel has; waiting for the disk takes longest
archives.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 20))  # back-off, shortened


FAULTS = {}  # name -> generator function(lab, tries): yields "" for a try that lost nothing, else what was lost


def fault(name):
    return lambda function: FAULTS.setdefault(name, function)


class Skip(Exception):
    """This machine cannot try that."""


class Child:
    """A function in a forked process, in the folder `cwd`, its output in files; `wait` fills status, out and err."""

    def __init__(self, cwd, function, *args, user=None):
        self.log = tempfile.mkdtemp(prefix="reid-log-")
        for name in ("out", "err"):
            (Path(self.log) / name).touch()  # it may be killed before it begins
        sys.stdout.flush()
        self.process = FORK.Process(target=self._run, args=(cwd, user, function, args))
        self.process.start()

    def _run(self, cwd, user, function, args):
        os.chdir(cwd)
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # what asks for everything harms only itself
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{self.log}/{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.stdout.reconfigure(errors="strict")  # as in a terminal of most languages
        if user:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        function(*args)

    def wait(self, limit=180):
        self.process.join(limit)
        hangs = self.process.is_alive()
        if hangs:
            self.process.kill()
            self.process.join()
        self.status = f"hangs for {limit} s" if hangs else self.process.exitcode
        self.out, self.err = ((Path(self.log) / name).read_text(errors="replace") for name in ("out", "err"))
        shutil.rmtree(self.log)
        return self

    def kill_after(self, seconds):
        self.process.join(seconds)
        self.process.kill()
        return self.wait()


class Script(Child):
    """One of the four scripts with its command line."""

    def __init__(self, cwd, name, *args, user=None):
        self.name = name
        super().__init__(cwd, self._main, name, [str(arg) for arg in args], user=user)

    @staticmethod
    def _main(name, args):
        sys.argv = [f"{name}.py", *args]
        run(SCRIPTS[name].get_args_parser(), SCRIPTS[name].main)

    def fails(self, *words, limit=180):
        """Wait for a failure with one clear line; what was wrong with it instead, or ""."""
        self.wait(limit)
        line = (self.err.strip().splitlines() or [""])[-1]
        clear = self.status == 1 and "Traceback" not in self.err and line.startswith(f"{self.name}.py: error: ")
        return "" if clear and all(word in line for word in words) else self.told()

    def works(self, status=0):
        return "" if self.wait().status == status and "Traceback" not in self.err else self.told()

    def told(self):
        return f"{self.name}.py: status {self.status}, {' | '.join(self.err.strip().splitlines()[-2:])[-300:]}"


class Lab:
    """A working folder and, made when first needed, what the faults are tried on."""

    def __init__(self, root, seed):
        self.root, self.seed, self.rng, self.count = Path(root), seed, random.Random(seed), 0
        self.root.chmod(0o755)

    def fresh(self, model=False):
        """A new working folder that any user may write to, with the untrained run `tiny` if `model`."""
        self.count += 1
        folder = self.root / f"try-{self.count}"
        folder.mkdir()
        folder.chmod(0o777)
        if model:
            (folder / "models/tiny").mkdir(parents=True)
            os.link(self.tiny, folder / "models/tiny/best.pth")
        return folder

    def make(self, script, *args, cwd=None):
        problem = Script(cwd or self.root, script, *args).works()
        if problem:
            raise SystemExit(f"undisturbed, it does not work either: {problem}")

    @cached_property
    def data(self):
        self.make("data_prep", "--synthetic", "--num_ids", 12, "--output", "people")
        return self.root / "people"

    @cached_property
    def query(self):
        return sorted((self.data / "query").rglob("*.jpg"))[0]

    @cached_property
    def tiny(self):
        """Checkpoint of an untrained network for images of 64 x 32."""
        torch.manual_seed(0)
        path = self.root / "tiny.pth"
        checkpoint.save_checkpoint(path, build_model(default_config([1, 2], height=64, width=32)), {}, {})
        return path

    @cached_property
    def index(self):
        """An index of the whole dataset made by eval.py."""
        folder = self.fresh(model=True)
        self.make(*self.eval(), cwd=folder)
        return folder / "index/tiny.pt"

    @cached_property
    def archive(self):
        """5,000 small files as a zip in Market-1501's layout."""
        path = self.root / "market.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(5000):
                archive.writestr(f"m/bounding_box_train/{i // 10:04d}_c1s1_{i % 10:06d}_00.jpg", random.Random(i).randbytes(300))
        return path

    @cached_property
    def trained(self):
        """Folder of an undisturbed training of two epochs, the run `cut`."""
        folder = self.fresh()
        self.make(*self.train(folder), cwd=folder)
        return folder

    def train(self, folder):
        tracking._mlflow()  # imported before the fork, too: most of a small training would be its import
        for name in ("mlflow.store.tracking.sqlalchemy_store", "torch.utils.tensorboard"):
            importlib.import_module(name)
        resume = ["--resume"] if (Path(folder) / "models/cut/last.pth").exists() else []
        return ["train", "--data_root", self.data, "--exp_name", "cut", *TINY, *resume]

    def eval(self):
        return ["eval", "--exp_name", "tiny", "--data_root", self.data, "--save_index", "--json", "result.json"]


# ---- What must be equal ---------------------------------------------------------------------------------------------

def tree_of(folder):
    """The images that data_prep.py has prepared: {path: content}; {} while the tree does not exist."""
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "out").rglob("*.jpg")}


def weights_of(folder):
    """Checksums of the weights of a training; a half file under a final name raises ReidError."""
    found = [folder / "models/cut" / name for name in ("last.pth", "best.pth")]
    return {path.name: storage.checksum(checkpoint.load_checkpoint(path)["state_dict"]) for path in found if path.exists()}


def files_of(*names):
    """Function(folder): the contents of these files; an index without its checksum of the whole raises ReidError."""
    def contents(folder):
        for path in folder.glob("index/*.pt"):
            storage.load(path, index_module.FORMAT, index_module.VERSION, verify=True)
        return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    return contents


def index_of(folder):
    """Checksum of what is in the index, which must be whole."""
    path = folder / "index/tiny.pt"
    return storage.checksum(storage.load(path, index_module.FORMAT, index_module.VERSION, verify=True)) if path.exists() else None


def compare(state, folder, *allowed):
    """"" where state(folder) is one of those allowed (any whole one, where none is given)."""
    try:
        found = state(folder)
    except ReidError as error:
        return f"half file: {error}"
    return "" if not allowed or found in allowed else "another result than the undisturbed run's"


def contents(path, module):
    """What was given to storage.save."""
    record = storage.load(path, module.FORMAT, module.VERSION)
    return {key: value for key, value in record.items() if key not in ("format", "version")}


# ---- Surroundings ------------------------------------------------------------------------------------------------------

@contextmanager
def server(data, script=(), nap=0):
    """A web server in a process of its own that misbehaves as the words of `script` say, one a request; yields its address."""
    script = list(script)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            word, asked = script.pop(0) if script else "", self.headers.get("Range")
            start = int(asked[6:-1]) if asked else 0
            body = bytes(len(data) - start) if word == "wrong bytes" else data[start:]
            length = len(body) + {"too short": -1000, "too long": 1000}.get(word, 0)
            self.send_response(int(word) if word.isdecimal() else 206 if asked else 200)
            if word.isdecimal():
                body, length = b"", 0
            elif asked:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(length))
            self.end_headers()
            for at in range(0, len(body) // (2 if word == "closing" else 1), 1 << 14):
                self.wfile.write(body[at : at + (1 << 14)])
                time.sleep(nap)
            self.close_connection = True

        def handle(self):
            try:
                super().handle()
            except OSError:  # the client was killed
                pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    process = FORK.Process(target=http.serve_forever, daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/market"
    finally:
        process.kill()
        process.join()
        http.server_close()


@contextmanager
def small_disk(lab, megabytes=256):
    folder = lab.fresh()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=777", "tmpfs", folder], check=True,
                       capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise Skip("needs root and the right to mount a tmpfs") from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
