"""The documents: their commands and Python blocks run as written, on drawn people; links, paths and options exist.

A mark in a line before a block says what the block is: `<!-- quickstart command -->`, `<!-- test command -->` (`.ci/run` runs
that one in a new environment), or `<!-- not tested: reason -->`. Other marks are free text.
"""

import contextlib
import http.server
import itertools
import re
import shutil
import signal
import subprocess
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from tiny_network import tiny_model

import data_prep
import eval as evaluate
import inference
import train
from reid.checkpoint import save_checkpoint
from reid.data import prepare, synthetic
from reid.training import tracking

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "EXPERIMENTS.md"))]
LINKED += (ROOT / "models").glob("*/README.md")
SCRIPTS = {"train.py": train, "eval.py": evaluate, "inference.py": inference, "data_prep.py": data_prep}
MOST_WORDS = 1300  # of README.md
# options of Docker, pip, pytest and torchrun
FOREIGN = {"--tries", "--build-arg", "--extra-index-url", "--gpus", "--nproc_per_node", "--user"}

# Settings that turn hours into seconds; everything else of a command line stays as it is.
SMALL = {"num_epochs": 1, "warmup_epochs": 0.0, "height": 64, "width": 32, "batch_size": 16, "weights": "none",
         "backbone": "tiny"}
DRAWN = [*range(1, 9), *range(41, 47)]  # of the 70 people of data_prep.py --synthetic: to train on, and to find
ELSEWHERE = {"./dashboards.sh": "test_dashboards.py", "torchrun": "training/test_distributed.py"}  # the test that runs it
MARKET_FOLDERS = {"train": "bounding_box_train", "val": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(text):
    """(mark, language, code) of every fenced block; the mark is the comment in a line before it, or ""."""
    return re.findall(r"(?:^<!-- ([^\n]*) -->\n\s*)?^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def is_tested(mark):
    return not re.fullmatch(r"not tested: .+", mark)


def commands(code):
    """The lines of a shell script, continued ones joined, without comments and empty ones."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def words(line, folder):
    """A command line as bash splits it in `folder`: quotes, patterns, braces, comments."""
    show = f"show() {{ printf '%s\\0' \"$@\"; }}; show {line}"
    return subprocess.run(["bash", "-c", show], cwd=folder, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


class Shell:
    """A working copy of the project that runs command lines in this process, since importing PyTorch takes seconds.

    A small network has the name of the default model.
    """

    def __init__(self, folder):
        self.folder = folder
        save_checkpoint(folder / "models/masked-hog-908/best.pth", tiny_model(), {}, {"data_root": ["data/market-1501-grouped"]})

    def run(self, lines):
        for line in lines:
            program, *arguments = words(line, self.folder)
            if program in ELSEWHERE:
                assert (ROOT / "tests" / ELSEWHERE[program]).exists()
            elif program == "python":
                self.python(*arguments)
            else:
                assert program in ("set", "cd", "rm"), f"{line}: this test cannot run it; mark its block as not tested"

    def python(self, script, *arguments):
        if script == "data_prep.py" and "--from" in arguments and "--output" not in arguments:
            arguments += ("--output", "data/mine")
        args = SCRIPTS[script].get_args_parser().parse_args(arguments)
        if script == "train.py" and not args.resume:
            vars(args).update(SMALL)
        assert not SCRIPTS[script].main(args), f"{script} {arguments}"
        if script == "data_prep.py" and args.synthetic:
            for identity in Path("data/synthetic").glob("*/*/"):
                if int(identity.name) > 0 and int(identity.name) not in DRAWN:
                    shutil.rmtree(identity)
        for name in ("output", "json"):
            written = getattr(args, name, None)
            assert not written or (self.folder / written).exists()

    def start_anew(self, run):
        """Make the next training without --exp_name train `run`."""
        path = self.folder / "models" / run
        if path.is_symlink():
            path.unlink()
        names = itertools.chain([run], (f"other-run-{number}" for number in itertools.count()))
        pytest.MonkeyPatch().setattr(tracking, "new_run_name", lambda *_: next(names))


@pytest.fixture(scope="module")
def shell(people, database, tmp_path_factory):
    """The working copy, with crops and people of one's own, and a small Market-1501 to unpack or to download."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(database, folder)
    (folder / "my/crops").mkdir(parents=True)
    for image in itertools.islice((people / "gallery").glob("00*/*.jpg"), 6):
        shutil.copy(image, folder / "my/crops")
    for name in ("my/query.jpg", "query.jpg", "crop.jpg"):
        shutil.copy(image, folder / name)
    frame = Image.new("RGB", (640, 360))
    frame.paste(Image.open(image).resize((80, 210)), (10, 20))
    frame.save(folder / "frame.jpg")
    (folder / "my/people").symlink_to(people / "train")
    with zipfile.ZipFile(folder / "Market-1501-v15.09.15.zip", "w") as archive:
        for split, name in MARKET_FOLDERS.items():
            for image in (people / split).rglob("*.jpg"):
                archive.write(image, f"Market-1501-v15.09.15/{name}/{image.name}")
    (folder / "data").mkdir()
    (folder / "data/other").symlink_to(people)
    signals = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, served(folder) as address:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(prepare, "MARKET_URL", f"{address}/Market-1501-v15.09.15.zip")
        patch.setattr(prepare, "MARKET_COUNTS", None)
        draw, blank = synthetic.draw_crop, Image.new("RGB", (64, 128))
        patch.setattr(synthetic, "draw_crop", lambda person, *args, **options: draw(person, *args, **options)
                      if person and person.pid in DRAWN else blank)
        patch.setattr(tracking, "new_run_name", tracking.new_run_name)  # undone at the end, whatever start_anew() sets
        yield Shell(folder)
    for number, handler in signals.items():  # training replaces them
        signal.signal(number, handler)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run_python(code, page, namespace):
    exec(compile(code, f"a block of {name_of(page)}", "exec"), namespace)


def test_every_block_of_the_readme_runs_in_order(shell):
    namespace, tested = {"__name__": "__main__"}, 0
    for mark, language, code in blocks(PAGES[0].read_text()):
        if language not in ("bash", "python") or mark == "test command" or not is_tested(mark):
            continue
        if language == "python":
            run_python(code, PAGES[0], namespace)
            tested += 1
            continue
        lines = commands(code)
        if mark == "quickstart command":
            assert lines[0].endswith("bash quickstart.sh")
            lines = commands((ROOT / "quickstart.sh").read_text())
        resumed = [line for line in lines if line.startswith("python train.py") and "--resume" in line]
        if resumed:  # of the run that the first line of the block starts
            shell.start_anew(re.search(r"--exp_name (\S+)", resumed[0])[1])
        shell.run(lines)
        tested += len(lines)
    assert tested >= 10
    assert list((shell.folder / "models").glob("*/last.pth"))


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_every_python_block_of_a_page_runs(page, request):
    codes = [code for mark, language, code in blocks(page.read_text()) if language == "python" and is_tested(mark)]
    namespace = {"__name__": "__main__"}
    if codes:
        request.getfixturevalue("shell")
    for code in codes:
        run_python(code, page, namespace)


def test_every_command_of_the_page_on_people_runs(shell, people):
    """A tracker's boxes in a video of two frames that is drawn here; the same crops are anna's."""
    av = pytest.importorskip("av", reason="av is not installed: pip install -e '.[video]'")
    image, folder = next((people / "gallery").glob("00*/*.jpg")), shell.folder
    (folder / "my/anna").mkdir()
    shutil.copy(image, folder / "my/anna")
    with av.open(folder / "cam2.mp4", "w") as video:
        stream = video.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for number in (1, 2):
            frame = Image.new("RGB", (320, 180))
            frame.paste(Image.open(image).resize((60, 120)), (10 * number, 20))
            video.mux(stream.encode(av.VideoFrame.from_image(frame)))
        video.mux(stream.encode(None))
    (folder / "det.txt").write_text("1,7,10,20,60,120,0.9\n2,7,20,20,60,120,0.9\n")
    if not (folder / "data/market-1501-grouped").exists():  # the test of README.md makes it
        (folder / "data/market-1501-grouped").symlink_to(people)
    for mark, language, code in blocks((ROOT / "docs/people.md").read_text()):
        if language == "bash" and is_tested(mark):
            shell.run(commands(code))
    found = {path.parent.name for path in (folder / "people").glob("*/*.jpg")}
    assert "sheets" in found and found & {"0001", "singles"}
    assert len(list((folder / "tracks/track_c2_0007").iterdir())) == 2 and (folder / "index/door.pt").exists()


def options(module):
    return {option for action in module.get_args_parser()._actions for option in action.option_strings}


def named_options(text):
    """Yield (script or None, option) for each option that a shell block or a `code span` of a page names.

    Commands of other programs do not count. A benchmark counts as a script, given by its path.
    """
    spans = [line for _, language, code in blocks(text) if language == "bash" for line in commands(code)]
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    spans += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    for span in spans:
        if re.match(r"--\w", span):
            yield None, re.split(r"[\s=]", span)[0]
        for command in re.split(r"[;|&]+|#", span):
            found = re.search(r"(?:^|\s|/)((?:benchmarks/)?\w+\.py)\b(.*)", command)
            if found and not command.startswith("docker"):
                yield from ((found[1], option) for option in re.findall(r"(?<=\s)--\w[\w-]*", found[2]))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_every_option_exists(page):
    known = {script: options(module) for script, module in SCRIPTS.items()}
    benchmarks = {path.name: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    for script, option in set(named_options(page.read_text())) - {(None, option) for option in FOREIGN}:
        if script in known:
            assert option in known[script], f"{script} has no option {option}"
        else:  # a benchmark may pass options on to a script
            texts = benchmarks.values() if script is None else [benchmarks[Path(script).name], benchmarks["common.py"]]
            found = any(f'"{option}"' in text for text in texts) or any(option in found for found in known.values())
            assert found, f"{script or 'no script'}: {option} does not exist"


def test_named_options_are_found():
    text = "Use `--topk 3`, `eval.py --report DIR`.\n```bash\npython train.py --lr 1 | cat --x # --y\ndocker run a.py --z\n```\n"
    assert set(named_options(text)) == {(None, "--topk"), ("eval.py", "--report"), ("train.py", "--lr")}


def test_every_line_of_the_experiments_is_understood():
    text = (ROOT / "EXPERIMENTS.md").read_text().replace("$lr", "0.1").replace("$wd", "1e-4").replace("$seed", "1")
    lines = [line for _, language, code in blocks(text) if language == "bash" for line in commands(code)]
    found = [match for line in lines for match in re.findall(r"python (\w+\.py)([^;&|#]*)", line)]
    assert found
    for script, rest in found:
        SCRIPTS[script].get_args_parser().parse_args(rest.split())


def anchors(text):
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_and_paths_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<(?:img|a) [^>]*(?:src|href)=\"([^\"]+)\"", text)
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    for path in re.findall(r"`((?:reid|benchmarks|docs|assets|models|tests)/[\w./-]+\.\w+)`", text):
        if page.name != "CHANGELOG.md":  # which names what is gone
            assert (ROOT / path).exists(), path


def test_the_two_commands():
    found = {mark: commands(code) for mark, _, code in blocks(PAGES[0].read_text())}
    for name, end in ("quickstart command", "bash quickstart.sh"), ("test command", "python -m pytest -q -n auto"):
        (line,) = found[name]
        assert line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install ") and line.endswith(end)


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().split()) <= MOST_WORDS
