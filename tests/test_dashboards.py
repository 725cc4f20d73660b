"""dashboards.sh: pages, host names, passwords, signals, deaths, taken ports; no process may stay.

Where only the script's care for its processes matters, a small server stands in for MLflow, which takes ten seconds to start.
"""

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from reid.training.tracking import Tracker

bash = shutil.which("bash")
modern = bash and subprocess.run([bash, "-c", "((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404))"]).returncode == 0
pytestmark = [
    pytest.mark.skipif(not modern, reason="bash >= 4.4 is needed"),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc"),
]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def until(found, what, seconds=90):
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.05)
    return result


MLFLOW = """#!/usr/bin/env python3
import http.server, subprocess, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"experiment_id": "1"}')

subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "worker"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


class Dashboards:
    """The script on a terminal of its own. A mark in their environment finds its processes, whatever their parents are."""

    def __init__(self, folder, **settings):
        self.mark = f"DASHBOARDS_TEST={uuid.uuid4().hex}"
        settings = {"TENSORBOARD_PORT": str(free_port()), "MLFLOW_PORT": str(free_port())} | settings
        self.ports = {name: port for name, port in settings.items() if name.endswith("_PORT")}
        name, value = self.mark.split("=")
        path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {name: value for name, value in os.environ.items() if name not in ("HOST", "MLFLOW_TRACKING_URI")}
        env |= settings | {name: value, "PATH": path, "TMPDIR": str(folder), "CDPATH": "/"}
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir("/")
            os.execve(bash, [bash, str(folder / "dashboards.sh")], env)
        self.text = ""

    def processes(self):
        """{pid: command line} of the script and of all that descends from it."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def find(self, *words):
        """The pid of the process whose command line has all the words, None if there is none."""
        return next((pid for pid, line in self.processes().items() if all(word in line for word in words)), None)

    def read(self, last=None):
        """Collect what it prints, up to the word `last` or the end."""
        with contextlib.suppress(OSError):  # EIO: everyone has closed the terminal
            while (last is None or last not in self.text) and (chunk := os.read(self.terminal, 4096)):
                self.text += chunk.decode().replace("\r\n", "\n")

    def page(self, name, path="/", host="localhost"):
        request = Request(f"http://127.0.0.1:{self.ports[name]}{path}", headers={"Host": host})
        with urlopen(request, timeout=90) as answer:
            return answer.read().decode()

    def _reaped(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return (pid, status) if pid else None

    def ended(self):
        """Exit status; asserts that no process is left. A closed terminal (None) is not read to its end."""
        if self.terminal is not None:
            self.read()
            os.close(self.terminal)
        status = os.waitstatus_to_exitcode(until(self._reaped, "end of the script", 60)[1])
        until(lambda: not self.processes(), "end of all processes", 5)
        return status


@pytest.fixture
def start(tmp_path, root, database):
    folder = tmp_path / "my dash boards"
    folder.mkdir()
    shutil.copy(root / "dashboards.sh", folder)
    (folder / "reid").symlink_to(root / "reid")
    started = []

    def start(real=False, **settings):
        if not real:
            shutil.copy(database, folder)
            (folder / "bin").mkdir()
            (folder / "bin/mlflow").write_text(MLFLOW)
            (folder / "bin/mlflow").chmod(0o755)
        started.append(Dashboards(folder, **settings))
        return started[-1]

    yield start
    for dashboards in started:  # after a failure
        for pid in dashboards.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_both_pages_show_a_run_while_it_trains_and_the_end_of_the_terminal_ends_all(start, tmp_path, monkeypatch):
    dashboards = start(real=True)
    dashboards.read("learning\n")
    for name, path in ("TENSORBOARD_PORT", "\n"), ("MLFLOW_PORT", "/#/experiments/1/runs?workflowType=machine_learning\n"):
        assert f"http://127.0.0.1:{dashboards.ports[name]}{path}" in dashboards.text
    assert "TensorBoard" in dashboards.page("TENSORBOARD_PORT") and "MLflow" in dashboards.page("MLFLOW_PORT")
    assert len(dashboards.processes()) <= 6  # bash, tensorboard and its data server, mlflow and its one worker

    for name in dashboards.ports:  # any web page could read the images under a name of its own (DNS rebinding)
        port = dashboards.ports[name]
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example"):
            with pytest.raises(HTTPError) as refused:
                dashboards.page(name, "/data/logdir", host)
            assert refused.value.code == 403
    for host in ("127.0.0.1", f"localhost:{dashboards.ports['TENSORBOARD_PORT']}", "[::1]:6006"):
        assert "logdir" in dashboards.page("TENSORBOARD_PORT", "/data/environment", host)

    monkeypatch.chdir(tmp_path / "my dash boards")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Tracker("masked-hog-1", {"lr": 0.05}) as tracker:
        tracker.log({"train/loss": 1.5}, 1)
        run = json.loads(dashboards.page("MLFLOW_PORT", f"/api/2.0/mlflow/runs/get?run_id={tracker.run_id}"))["run"]
        until(lambda: "masked-hog-1" in dashboards.page("TENSORBOARD_PORT", "/data/plugin/scalars/tags"), "run")
    assert (run["info"]["run_name"], run["info"]["status"]) == ("masked-hog-1", "RUNNING")
    assert [(metric["key"], metric["value"]) for metric in run["data"]["metrics"]] == [("train/loss", 1.5)]

    os.close(dashboards.terminal)
    dashboards.terminal = None
    assert dashboards.ended() == 129
    assert not list(Path().glob("tmp*"))  # the servers' logs are gone as well


def test_the_death_of_mlflow_ends_all_its_workers_too(start):
    dashboards = start()
    dashboards.read("learning\n")
    assert dashboards.find("worker")
    os.kill(dashboards.find("mlflow server"), signal.SIGKILL)
    assert dashboards.ended() == 1
    assert dashboards.text.splitlines()[-1].startswith("dashboards.sh: error: mlflow has stopped")


def test_the_death_of_tensorboard_ends_mlflow(start):
    dashboards = start()
    os.kill(until(lambda: dashboards.find("--logdir"), "tensorboard"), signal.SIGKILL)
    assert dashboards.ended() == 1
    assert dashboards.text.splitlines()[-1].startswith("dashboards.sh: error: tensorboard has stopped")


@pytest.mark.parametrize("stop, status", [("\x03", 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_also_while_it_is_starting(start, stop, status):
    dashboards = start()
    until(lambda: dashboards.find("mlflow server") and dashboards.find("tensorboard_data_server"), "servers")
    if stop == "\x03":
        os.write(dashboards.terminal, b"\x03")  # the Ctrl-C of a keyboard
    else:
        os.kill(dashboards.pid, stop)
    assert dashboards.ended() == status
    assert "error" not in dashboards.text


@pytest.mark.parametrize("name", ["TENSORBOARD_PORT", "MLFLOW_PORT"])
def test_a_taken_port_is_one_line_before_anything_starts(start, name):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        dashboards = start(**{name: str(port)})
        assert dashboards.ended() == 1
    (line,) = dashboards.text.splitlines()
    assert line.startswith("dashboards.sh: error") and str(port) in line and name in line and "in use" in line


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"MLFLOW_PORT": "many"}, "MLFLOW_PORT"),
        ({"MLFLOW_PORT": "70000"}, "70000"),
        ({"MLFLOW_PORT": "5000", "TENSORBOARD_PORT": "5000"}, "5000"),
        ({"TENSORBOARD_PORT": "1=2"}, "TENSORBOARD_PORT"),
    ],
)
def test_a_wrong_port_is_one_line(start, settings, words):
    dashboards = start(**settings)
    assert dashboards.ended() == 1
    (line,) = dashboards.text.splitlines()
    assert line.startswith("dashboards.sh: error") and words in line


def test_a_tracking_server_is_refused_without_its_password(start):
    dashboards = start(MLFLOW_TRACKING_URI="http://user:s3cret@host")
    assert dashboards.ended() == 1
    (line,) = dashboards.text.splitlines()
    assert line.startswith("dashboards.sh: error: MLFLOW_TRACKING_URI") and "s3cret" not in line


def test_the_password_of_a_store_is_neither_printed_nor_a_process_argument(start):
    # No such kind of database: MLflow quotes the address.
    dashboards = start(real=True, MLFLOW_TRACKING_URI="s3cret://user:s3cret@host/s3cret?password=hushed")
    server = until(lambda: dashboards.find("mlflow server"), "mlflow")
    seen = dashboards.processes()
    assert server in seen and not any(secret in line for line in seen.values() for secret in ("s3cret", "hushed"))
    assert dashboards.ended() == 1
    assert "dashboards.sh: error: mlflow has stopped" in dashboards.text and "***" in dashboards.text
    assert "s3cret" not in dashboards.text and "hushed" not in dashboards.text
