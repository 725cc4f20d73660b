"""README.md: its command blocks run as they are written, on drawn people, and its links lead somewhere.

What cannot run: blocks that make an environment (.ci/run runs the tests' one), and those marked `<!-- not tested: ... -->`.
"""

import http.server
import re
import shutil
import signal
import subprocess
import threading
import zipfile
from contextlib import contextmanager
from functools import partial
from itertools import islice

import pytest

import data_prep
import eval as evaluate
import inference
import train
from reid.data import prepare
from reid.training import tracking

SCRIPTS = {"train.py": train, "eval.py": evaluate, "inference.py": inference, "data_prep.py": data_prep}
# Hours become seconds; everything else of a line stays as it is.
SMALL = {"num_epochs": 1, "warmup_epochs": 0.0, "height": 64, "width": 32, "batch_size": 16, "weights": "none"}
ELSEWHERE = {"./dashboards.sh": "test_dashboards.py", "torchrun": "test_distributed.py"}  # which test starts it for real
MARKET_FOLDERS = {"train": "bounding_box_train", "val": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def blocks(text):
    """(mark, lines) of every bash block: the comment before it or "", and its commands, one a line."""
    for mark, block in re.findall(r"(?:<!-- (.*?) -->\n)?```bash\n(.*?)```", text, re.DOTALL):
        yield mark, commands(block)


def commands(script):
    """The lines of a shell script, continued ones as one, without comments and empty ones."""
    lines = script.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def words(line, folder):
    """A command line as bash reads it in `folder`: quotes, patterns, braces, comments."""
    show = f"show() {{ printf '%s\\0' \"$@\"; }}; show {line}"
    return subprocess.run(["bash", "-c", show], cwd=folder, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


class Shell:
    """A working copy of the project in which command lines run, in this process: each would import PyTorch anew."""

    def __init__(self, root, folder):
        self.root, self.folder = root, folder
        (folder / "models").mkdir()
        (folder / "models/masked-hog-908").symlink_to(root / "models/masked-hog-908")

    def run(self, lines):
        for line in lines:
            program, *arguments = words(line, self.folder)
            if program in ELSEWHERE:
                assert (self.root / "tests" / ELSEWHERE[program]).exists()
            elif program == "python":
                self.python(*arguments)
            else:
                assert program in ("set", "cd", "rm"), f"{line}: nothing runs this; mark its block as not tested"

    def python(self, script, *arguments):
        if script == "data_prep.py" and "--from" in arguments and "--output" not in arguments:
            arguments += ("--output", "data/mine")
        args = SCRIPTS[script].get_args_parser().parse_args(arguments)
        if script == "train.py" and not args.resume:
            vars(args).update(SMALL)
        assert not SCRIPTS[script].main(args), f"{script} {arguments}"
        for name in ("output", "json"):
            written = getattr(args, name, None)
            assert not written or (self.folder / written).exists()


@pytest.fixture(scope="module")
def shell(root, people, tmp_path_factory):
    """The working copy, with crops and people of one's own, and a Market-1501 that is small enough, to download or at hand."""
    folder = tmp_path_factory.mktemp("copy")
    (folder / "my/crops").mkdir(parents=True)
    for image in islice((people / "gallery").glob("00*/*.jpg"), 6):
        shutil.copy(image, folder / "my/crops")
    shutil.copy(image, folder / "my/query.jpg")
    (folder / "my/people").symlink_to(people / "train")
    with zipfile.ZipFile(folder / "Market-1501-v15.09.15.zip", "w") as archive:
        for split, name in MARKET_FOLDERS.items():
            for image in (people / split).rglob("*.jpg"):
                archive.write(image, f"Market-1501-v15.09.15/{name}/{image.name}")
    (folder / "data").mkdir()
    (folder / "data/other").symlink_to(people)
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, served(folder) as address:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(prepare, "MARKET_URL", f"{address}/Market-1501-v15.09.15.zip")
        patch.setattr(prepare, "MARKET_COUNTS", None)
        yield Shell(root, folder)
    for number, handler in signals.items():  # training takes them
        signal.signal(number, handler)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_block_runs_in_the_order_of_the_page(readme, root, shell, monkeypatch):
    assert sum(len(lines) for _, lines in blocks(readme)) >= 20
    names = iter(["masked-hog-908", "scratch-1", "joint-2"])
    for mark, lines in blocks(readme):
        if mark == "test command" or re.match("not tested: needs docker", mark):
            continue
        if mark == "quickstart command":
            assert lines[0].endswith("bash quickstart.sh")
            lines = commands((root / "quickstart.sh").read_text())
        if any("--resume" in line for line in lines):
            # what is resumed is the run that the block's first line starts
            (shell.folder / "models/masked-hog-908").unlink()
            monkeypatch.setattr(tracking, "new_run_name", lambda: next(names))
        shell.run(lines)
    assert len(list((shell.folder / "models").glob("*/last.pth"))) >= 4


def test_every_line_of_the_experiments_is_understood(root):
    text = (root / "EXPERIMENTS.md").read_text().replace("$lr", "0.1").replace("$wd", "1e-4").replace("$seed", "1")
    lines = [match for _, lines in blocks(text) for line in lines for match in re.findall(r"python (\w+\.py)([^;&|#]*)", line)]
    assert len(lines) >= 10
    for script, rest in lines:
        SCRIPTS[script].get_args_parser().parse_args(rest.split())


def test_links_and_pictures_are_there(readme, root):
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert target.startswith("http") or (root / target).exists(), target
    for path in re.findall(r"`((?:reid|benchmarks|docs|assets|models|tests)/[\w./-]+\.\w+)`", readme):
        if "<" not in path and "*" not in path:
            assert (root / path).exists(), path


def test_the_two_commands(readme):
    for name in ("quickstart command", "test command"):
        (lines,) = (lines for mark, lines in blocks(readme) if mark == name)
        assert len(lines) == 1 and "python3 -m venv" in lines[0]
