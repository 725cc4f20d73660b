"""Whatever outputs a command line names: files that are not its own outputs stay as they were, byte for byte."""

import os
import shutil
from contextlib import chdir
from itertools import chain, count
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from reid.files import CHECKPOINT, save

QUERY, IMAGE = "data/query/0001/0001_c3s1_000001_00.png", "data/gallery/0001/0001_c1s1_000001_00.png"


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    """A working folder with what people have in theirs, and with links to some of it."""
    folder = tmp_path_factory.mktemp("furnished")
    others = [QUERY.replace("0001", "0002"), IMAGE.replace("0001", "0002"), "photo-001.png", "photo.jpg"]
    for number, name in enumerate([QUERY, IMAGE, "photo.png", *others]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16), (30 * number, 0, 90)).save(folder / name)
    for name in ("notes.txt", "notes.json", "thesis.html", "mine.onnx", "models/run/notes.json", "models/net/best.onnx"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("reid-index reid-results, mine")
    (folder / "results").mkdir()
    torch.save({"weights": torch.ones(3)}, folder / "other.pth")
    for name in ("models/run/best.pth", "models/run/last.pth"):
        save(folder / name, {"x": torch.ones(3)}, CHECKPOINT, 1)
    for name, target in {"link.png": QUERY, "link.json": "models/run/best.pth", "link.html": "photo.png", "away": "data/gallery",
                         "link.pt": "models/run/last.pth"}.items():
        (folder / name).symlink_to(target)
    (folder / "hard.png").touch()
    (folder / "net.onnx").touch()
    return folder


def tree(folder):
    """{path: what it is}, links not followed."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_symlink() or path.is_file()}


# What is there, odd ways to write its name, and free names.
PLACES = {
    ".json": ["notes.json", "models/run/notes.json", "link.json", "new.json", "new/r.json", "r.json", "new.json/../r.json"],
    ".html": ["thesis.html", "link.html", "new.html", "r.html", "results/../r.html"],
    ".png": ["photo.png", "photo.jpg", "photo-001.png", "link.png", "hard.png", QUERY, IMAGE, f"away/0001/{Path(IMAGE).name}",
             "results/../photo.png", "new.png", "r.png", "r.webp", "new/r.jpg"],
    ".pt": ["notes.txt", "other.pth", "models/run/best.pth", "models/run/../run/last.pth", "link.pt", "net.onnx", "new.pt",
            "r.pt", "new/r.pt", "results", ".", "r.json", IMAGE]}


def output(suffix):
    """Nothing, mostly a name for this kind of output, or any other."""
    own = st.sampled_from(PLACES[suffix])
    return st.one_of(st.just(""), own, own, st.sampled_from([*chain(*PLACES.values())]))


COMMANDS = st.tuples(
    st.one_of(st.fixed_dictionaries({"--json": output(".json"), "--report": output(".html"), "--gallery_uri": output(".pt")}),
              st.fixed_dictionaries({"--json": output(".json"), "--output": output(".png"), "--gallery_uri": output(".pt")})),
    st.sampled_from(["", "", "--save_index", "--save_index", "--load_index"]), st.booleans(), st.booleans())


def check(here, commands):
    """Run command lines one after the other in the current folder, and compare with what was there before."""
    first = before = tree(".")
    for options, index, overwrite, rerank in commands:
        name = "eval" if "--report" in options else "inference"
        words = [word for option, value in options.items() if value for word in (option, value)]
        words += [index] * bool(index) + ["--overwrite"] * overwrite + ["--rerank"] * rerank
        words += ["--query_paths", QUERY, "photo.png"] if name == "inference" else []
        named = {os.path.realpath(value) for value in options.values() if value}
        status, _, lines = here(name, *here.network, "--data_root", "data", *words)
        what, after = (name, words, status, lines), tree(".")
        changed = {path for path in before if after.get(path) != before[path]}
        assert {os.path.realpath(path) for path in changed} <= named | {os.path.realpath("index/net.pt")}, what
        assert overwrite or not changed & set(first), what
        assert not changed & {QUERY, IMAGE, "models/run/best.pth", "models/run/last.pth"}, what
        assert name == "eval" or "photo.png" not in changed, what
        unreadable = status == 3 and "photo.png: cannot be read" in lines[-2]  # an earlier command has replaced it
        assert status == 0 or unreadable or lines[-1].startswith(f"{name}.py: error: "), what
        before = after


def test_random_outputs_change_nothing_that_is_not_named(here, furnished, tmp_path, request):
    folders = count()

    @settings(max_examples=40 * request.config.getoption("--tries", default=1), deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(COMMANDS, min_size=1, max_size=4))
    def run(commands):
        folder = tmp_path / str(next(folders))
        shutil.copytree(furnished, folder, symlinks=True)
        (folder / "hard.png").unlink()
        os.link(folder / IMAGE, folder / "hard.png")
        with chdir(folder):
            check(here, commands)
        shutil.rmtree(folder)

    run()


def test_outputs_that_would_not_be_written_are_refused(here):
    for mode, output in (("--serve", "--json=r.json"), ("--serve", "--output=r.png"), ("--export=onnx", "--json=r.json")):
        assert "leave them out" in here.refused("inference", mode, output)
    assert "--frames" in here.refused("inference", "--frames", 0, 1 << 70)
