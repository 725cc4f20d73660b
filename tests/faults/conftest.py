"""Repetition of the fault tests: `pytest -m long tests/faults --tries 100`."""

import os
from pathlib import Path

import pytest
from fault_lab import Lab, TinyHere


def pytest_addoption(parser):
    parser.addoption("--tries", type=int, default=1, help="repetitions of each fault at a random moment")


def pytest_generate_tests(metafunc):
    if "moment" in metafunc.fixturenames:  # the option is missing where this folder is not on the command line
        tries = metafunc.config.getoption("--tries", default=1)
        metafunc.parametrize("moment", range(tries), indirect=True)


@pytest.fixture
def moment(request):
    """A random number in [0, 1); those of all repetitions are spread evenly."""
    tries = request.config.getoption("--tries", default=1)
    return (request.param + int.from_bytes(os.urandom(4)) / 2**32) / tries


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def here(monkeypatch, capsys, tmp_path):
    """The scripts in this process, in an empty folder but for net.onnx."""
    monkeypatch.chdir(tmp_path)
    Path("net.onnx").touch()
    return TinyHere(monkeypatch, capsys)
