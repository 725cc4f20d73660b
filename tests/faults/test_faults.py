"""The fast part of benchmarks/faults.py: each fault once or twice, where no other test has it, and what was lost once."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import train
from reid import ReidError, images
from reid import files as storage
from reid.checkpoint import check_name, load_checkpoint, save_checkpoint
from reid.cli import run
from reid.model import build_model, default_config

fcntl = pytest.importorskip("fcntl")


@pytest.mark.parametrize("faults", [
    ["kill -9: eval.py", "two eval.py", "while the index is replaced"],
    ["disk full, then read-only: eval.py", "disk full, then read-only: inference.py"],
    ["fuzzing: bytes of a checkpoint", "fuzzing: contents of a checkpoint", "fuzzing: file names", "fuzzing: bytes of an index"],
], ids=["kills", "disks", "fuzzing"])
def test_nothing_is_lost(root, tmp_path, faults):
    table = tmp_path / "table.json"
    command = [sys.executable, root / "benchmarks" / "faults.py", "--tries", "1", "--json", table, "--only", *faults]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = json.loads(table.read_text())
    skipped = done.stdout.count(": skipped, ")
    assert len(rows) + skipped == len(faults), done.stdout + done.stderr
    assert done.returncode == 0 and not sum(row["lost"] for row in rows), done.stdout
    assert all(row["survived"] == row["tries"] > 0 for row in rows)


@pytest.mark.parametrize("make, reason", [
    (os.mkfifo, "not a regular file"), (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "bytes, more than"), (os.mkdir, "is a folder"),
    (lambda path: path.symlink_to(path.name), "symbolic links")], ids=["pipe", "device", "terabyte", "folder", "link to itself"])
def test_what_is_no_file_is_refused_before_it_is_read(tmp_path, make, reason):
    make(tmp_path / "x.jpg")
    with pytest.raises(ReidError, match=f"x.jpg: cannot be read as an image .*{reason}"):
        images.decode(tmp_path / "x.jpg")


@pytest.mark.skipif(not hasattr(os, "fork") or os.getuid() == 0, reason="root may read everything")
def test_an_unreadable_image(tmp_path):
    (tmp_path / "x.jpg").touch(0)
    with pytest.raises(ReidError, match="Permission denied"):
        images.decode(tmp_path / "x.jpg")


def ring():
    inner = []
    inner.append(inner)
    return inner


@pytest.mark.parametrize("value", [torch.zeros(1).expand(1 << 25, 1 << 25), torch.ones(2, 2).to_sparse(),
                                   torch.ones(2, device="meta"), ring()], ids=["expanded", "sparse", "meta", "ring"])
def test_values_that_no_file_of_ours_holds(tmp_path, value):
    torch.save({"format": "kind", "version": 1, "x": value, "sha256": ""}, tmp_path / "a.pt")
    with pytest.raises(ReidError, match="damaged or not ours"):
        storage.load(tmp_path / "a.pt", "kind", 1)


@pytest.mark.parametrize("change", [{"state_dict": {"neck.weight": 1}}, {"state_dict": {1: torch.ones(1)}}, {"config": {}},
                                    {"config": default_config([1]) | {"height": 1 << 30}}, {"config": default_config("ab")}])
def test_checkpoints_with_strange_contents(tmp_path, change):
    path = tmp_path / "best.pth"
    save_checkpoint(path, build_model(default_config([1, 2])), {}, {})
    record = {key: value for key, value in load_checkpoint(path).items() if key not in ("format", "version")}
    storage.save(path, record | change, "reid-checkpoint", 1)
    with pytest.raises(ReidError, match=r"best\.pth: ") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_name_that_the_terminal_cannot_show(root, tmp_path):
    code = ("import argparse, os, reid.cli\n"
            "reid.cli.run(argparse.ArgumentParser(), lambda args: print(os.fsdecode(b'caf\\xe9.jpg'), '\\u65e5.jpg'))")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b"caf\\udce9.jpg", b"\\u65e5.jpg"]


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX"])
def test_only_formats_of_photographs_are_opened(tmp_path, kind):
    """Whatever the suffix says: Pillow would run Ghostscript on an EPS."""
    Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", kind)
    with pytest.raises(ReidError, match="not an image"):
        images.decode(tmp_path / "x.jpg")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_only_files_are_replaced(tmp_path, make):
    """`--json /dev/null` by root must leave the device alone."""
    make(tmp_path / "x")
    with pytest.raises(ReidError, match="is not a file"), storage.atomic_path(tmp_path / "x"):
        pass
    assert not (tmp_path / "x").is_file() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/b", "a\\b", "a\nb", "-x", ".x", "x.", "x ", "con", "NUL.txt",
                                  "x" * 101])
def test_names_that_are_no_folder(name):
    with pytest.raises(ReidError, match="plain name"):
        check_name(name)


@pytest.mark.parametrize("name", ["masked-hog-908", "7", "ResNet 50", "lr=0.1,v2", "Ünal", "console"])
def test_names_of_runs(name):
    assert check_name(name) == name


@pytest.mark.parametrize("error", [IsADirectoryError(21, "Is a directory", "x"), OSError(36, "File name too long", "x"),
                                   MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, error):
    def main(args):
        raise error
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as end:
        run(argparse.ArgumentParser("x.py"), main)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("x.py: error: ")


def test_without_stdout(root):
    code = "import argparse, reid.cli; reid.cli.run(argparse.ArgumentParser(), lambda args: print('x'))"
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("change, reason", [
    ({"training": []}, "no training state"), ({"training": {"epoch": "1", "step": 0, "best": None}}, "no training state"),
    ({"args": {"lr": torch.ones(2)}}, r"wrong type \(lr\)"), ({"args": {1: 2}}, "wrong type"),
    ({"args": {"num_epochs": 10**9}}, "--num_epochs 1000000000: must lie between")])
def test_strange_checkpoints_are_not_resumed(tmp_path, monkeypatch, change, reason):
    monkeypatch.chdir(tmp_path)
    model = build_model(default_config([1, 2], height=64, width=32))
    save_checkpoint(tmp_path / "last.pth", model, {}, {}, {"epoch": 1, "step": 0, "best": None})
    record = {key: value for key, value in load_checkpoint("last.pth").items() if key not in ("format", "version")}
    storage.save("models/x/last.pth", record | change, "reid-checkpoint", 1)
    with pytest.raises(ReidError, match=reason):
        train.main(train.get_args_parser().parse_args(["--exp_name", "x", "--resume"]))
