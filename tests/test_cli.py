"""What users get wrong and what the system refuses ends as one line on stderr and a non-zero exit status."""

import argparse
import errno
import importlib
import os
import signal
import subprocess
import sys

import pytest

from reid import cli


@pytest.fixture
def error_of(monkeypatch, capsys):
    """Return a function that runs `main` with a command line and returns the only line of its error."""
    def call(parser, main, *args):
        monkeypatch.setattr(sys, "argv", [parser.prog, *args])
        with pytest.raises(SystemExit) as end:
            cli.run(parser, main)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 1 and line.startswith(f"{parser.prog}: error: ")
        return line
    return call


@pytest.mark.parametrize("error", [IsADirectoryError(errno.EISDIR, "Is a directory", "x"), MemoryError(),
                                   OSError(errno.ENAMETOOLONG, "File name too long", "x"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
                                   RuntimeError("could not create a primitive"), RuntimeError("can't start new thread")])
def test_errors_of_the_system_are_one_line(error_of, error):
    def main(args):
        raise error
    error_of(argparse.ArgumentParser("x.py"), main)


def test_a_thread_that_dies_for_want_of_memory_ends_the_script(capfd, monkeypatch):
    """Python would wait forever for such a thread to begin."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "__unraisablehook__", lambda caught: None)
    for kind, message in (MemoryError, "Exception ignored in thread started by"), (MemoryError, None), (ValueError, "thread"):
        cli._unraisable("x.py", argparse.Namespace(exc_type=kind, err_msg=message))
    assert ended == [1] and capfd.readouterr().err == f"x.py: error: {cli.NEED_LESS}\n"


def test_ctrl_c_after_the_end_prints_no_traceback(root):
    code = ("import argparse, atexit, os, signal, reid.cli\n"
            "atexit.register(os.kill, os.getpid(), signal.SIGINT)\nreid.cli.run(argparse.ArgumentParser(), lambda args: 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


HUGE = str(1 << 70)
NUMBERS = {
    "data_prep": {"--num_ids": ["0", "1"], "--seed": ["-1", HUGE]},
    "train": {"--batch_size": ["0", "1", HUGE], "--height": ["0", HUGE], "--width": ["0"], "--lr": ["nan", "-1", "inf"],
              "--flip": ["nan"], "--num_epochs": ["0"], "--eval_freq": ["0"], "--warmup_epochs": ["-1", "nan"], "--seed": [HUGE]},
    "eval": {"--batch_size": ["0", HUGE], "--far": ["0", "2", "nan"]},
    "inference": {"--topk": ["0", "-1", HUGE], "--positions": ["0"], "--cameras": [HUGE], "--port": ["-1", "65536"]}}


@pytest.mark.parametrize("name, option, value", [(name, option, value) for name, options in NUMBERS.items()
                                                 for option, values in options.items() for value in values])
def test_numbers_out_of_range(error_of, tmp_path, monkeypatch, name, option, value):
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)
    parser = script.get_args_parser()
    parser.prog = f"{name}.py"
    assert option in error_of(parser, script.main, *["--synthetic"] * (name == "data_prep"), f"{option}={value}")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_name_that_the_terminal_cannot_show(root):
    code = ("import argparse, os, reid.cli\n"
            "reid.cli.run(argparse.ArgumentParser(), lambda args: print(os.fsdecode(b'caf\\xe9.jpg'), '\\u65e5.jpg'))")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b"caf\\udce9.jpg", b"\\u65e5.jpg"]
