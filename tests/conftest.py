"""Fixtures: the checkout, drawn people, and the real datasets, without which their tests are skipped."""

import gc
import os
import signal
from pathlib import Path

import pytest
from forked import Script

# The tests run in parallel; more threads than cores would slow them all down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the tests import gRPC before reid.extras.milvus_client sets this

# Children inherit ignored signals, as of nohup, and a shell cannot reset them; the tests stop their children by signals.
for name in ("SIGHUP", "SIGINT", "SIGTERM"):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


# These files take the longest. They start first, so that the workers of a parallel run end at about the same time.
SLOW = ["test_end_to_end.py", "test_dashboards.py", "test_scripts_under_faults.py", "test_distributed.py", "test_train.py",
        "test_data_prep.py", "test_networks.py", "test_milvus.py", "test_ingest.py", "test_checkpoint.py", "test_readme.py",
        "test_cuda.py", "test_extract.py", "test_law.py", "test_onnx.py"]


def pytest_collection_finish():
    gc.freeze()  # what the test modules have imported; each full collection of it takes a second


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def shared():
    """The folder with the real datasets and the reference weights; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("real data (../shared) is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """A small grouped dataset of drawn people."""
    folder = tmp_path_factory.mktemp("people") / "synthetic"
    Script(folder.parent, "data_prep.py", "--synthetic", "--num_ids", 16, "--output", folder).works()
    return folder


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An empty MLflow database; to create one takes seconds."""
    from reid.training.tracking import open_store

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(tmp_path_factory.mktemp("database"))
        open_store()
        return Path("mlflow.db").resolve()


@pytest.fixture
def here(monkeypatch, capsys):
    """Return a function that runs a script in this process: see in_process.py."""
    from in_process import Here  # not above: PyTorch reads the environment when it is imported

    return Here(monkeypatch, capsys)


@pytest.fixture
def prep(tmp_path, monkeypatch, here):
    """Return a function that runs data_prep.py in this process, with --output, and returns (exit status, stdout, stderr)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def call(*args, output=tmp_path / "out"):
        status, out, lines = here("data_prep", *args, "--output", output)
        return status, out, "".join(f"{line}\n" for line in lines)
    return call
