"""Run scripts as forks of a server process that has imported the libraries, since importing PyTorch takes seconds.

Each script is a process of its own; its command line, file, output, signals and exit status are the real ones.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = [ROOT, ROOT / "tests", ROOT / "tests/faults"]
PRELOADED = ["forked", "tiny_network", "data_prep", "train", "eval", "inference", "torch._dynamo", "torch.utils.tensorboard",
             "mlflow.store.tracking.sqlalchemy_store"]
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(map(str, TESTS)), "OMP_NUM_THREADS": "1",  # bits depend on it
               "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


@cache
def start_server():
    """Start the server process of this test process, and return the folder for the output of its scripts."""
    if not hasattr(os, "fork"):
        pytest.skip("these tests fork processes, which this system cannot do")
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    folder = tempfile.TemporaryDirectory(prefix="forked-")
    atexit.register(folder.cleanup)
    return folder.name


class Script:
    """A script in a process of its own, with its command line, in the folder `cwd`.

    name: of a script of the checkout, such as train.py, or a path. prepare: a function of a module, called in that process
    before the script. environment: added to that of the server. After `wait`, `status` is the exit status (the negative number
    of a signal), and `out` and `err` are what was written to stdout and stderr.
    """

    def __init__(self, cwd, name, *args, prepare=None, environment=None):
        self.name, self.log = Path(name).name, Path(tempfile.mkdtemp(dir=start_server()))
        arguments = (cwd, self.log, prepare, str(ROOT / name), list(map(str, args)), environment or {})
        self.process = multiprocessing.get_context("forkserver").Process(target=_run, args=arguments)
        self.process.start()

    def stop_after(self, seconds, number):
        """Send a signal that many seconds after the start, if the script still runs then."""
        while self.process.is_alive() and not (self.log / "err").exists():
            time.sleep(0.01)
        self.process.join(0.1 + seconds)  # the script is read in the first 0.1 s: there Ctrl-C ends every Python in a traceback
        return self.stop(number)

    def stop(self, number):
        """Send a signal if the script still runs, and wait for its end."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        return self.wait()

    def until_prints(self, text):
        """Wait until `text` is in the output, or the script has ended."""
        while self.process.is_alive() and not ((self.log / "out").exists() and text in (self.log / "out").read_text()):
            time.sleep(0.01)
        return self

    def wait(self, limit=500):
        self.process.join(limit)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail(f"{self.name} does not end")
        self.status = self.process.exitcode
        self.out, self.err = ((self.log / name).read_text(errors="replace") for name in ("out", "err"))
        assert "Traceback" not in self.err, self.err
        return self

    def works(self, status=0):
        assert self.wait().status == status, (self.status, self.err)
        return self

    def fails(self):
        """Require exit status 1 and one clear line, and return it."""
        self.works(1)
        line = self.err.strip().splitlines()[-1]
        assert line.startswith(f"{self.name}: error: "), self.err
        return line


def _run(cwd, log, prepare, script, args, environment):
    import resource  # not on Windows

    os.chdir(cwd)
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # a script that asks for all memory harms only itself
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout.reconfigure(errors="strict")  # as in a terminal of most languages
    sys.argv, status = [Path(script).name, *args], 0
    sys.path.insert(0, str(Path(script).parent))
    try:
        if prepare:
            prepare()
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def ranks(world_size, cwd, name, *args, prepare=None):
    """Start a script as that many processes of one group, as torchrun does, and return them, rank 0's first."""
    group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Script(cwd, name, *args, prepare=prepare, environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world_size)]
