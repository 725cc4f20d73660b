"""Two gloo processes on the CPU train like one."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from reid.checkpoint import load_checkpoint
from reid.model import build_model

FROZEN = ["--freeze_bn", "--lr", "0.0005"]  # small steps: rounding decides which triplet is the hardest
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(root, ranks, *args):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks > 1 else []
    return [sys.executable, *map(str, [*launcher, root / "train.py", *args])]


def settings(people, name, *args):
    return ["--data_root", people, "--exp_name", name, "--height", 64, "--width", 32, "--batch_size", 8, "--weights", "none",
            "--precision", "fp32", "--lr", 0.005, "--warmup_epochs", 1, "--device", "cpu", "--num_epochs", 2, *args]


def flat(state):
    return torch.cat([value.float().flatten() for value in state.values()])


def run(folder, start):
    done = subprocess.run(start, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def last(folder, name):
    return load_checkpoint(folder / "models" / name / "last.pth")


def losses(out):
    """The losses of the first epoch as printed; the line comes once, whatever the number of ranks."""
    (line,) = re.findall(r"^epoch 1/2: .*", out, re.MULTILINE)
    return [float(value) for value in re.findall(r"loss\w* ([\d.]+)", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one(root, people, folder):
    """One process, batch-norm statistics frozen: where it started, how far it moved, its first losses, its last metrics."""
    out = run(folder, command(root, 1, *settings(people, "one", *FROZEN)))
    record = last(folder, "one")
    torch.manual_seed(0)
    start = flat(build_model(record["config"]).state_dict())
    return start, flat(record["state_dict"]) - start, losses(out), record["metrics"]


@pytest.mark.parametrize("ranks, then", [(2, 1), (1, 2)])
def test_frozen_statistics_give_the_same_weights_whoever_goes_on(root, people, folder, one, ranks, then):
    """Of two ranks each has images of one identity: every negative of the triplet loss is the other rank's."""
    start, way, first, metrics = one
    name = f"from-{ranks}"
    process = subprocess.Popen(command(root, ranks, *settings(people, name, *FROZEN)), cwd=folder, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out = ""
    for line in process.stdout:
        out += line
        if line.startswith("epoch 1/"):
            break
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0, errors
    stopped = last(folder, name)["training"]
    assert stopped["epoch"] == 1 and stopped["step"] > 0, "not stopped in the middle of the second epoch"
    assert losses(out) == pytest.approx(first, rel=2e-3)
    assert (f"{ranks} ranks" in out) == (ranks > 1)
    run(folder, command(root, then, "--data_root", people, "--exp_name", name, "--resume", "--device", "cpu"))
    record = last(folder, name)
    for key in ("val/loss", "val/accuracy"):  # of an odd number of images, which two ranks cannot share evenly
        assert record["metrics"][key] == pytest.approx(metrics[key], rel=1e-3)
    missed = flat(record["state_dict"]) - start - way
    assert missed.norm() < 0.005 * way.norm(), missed.norm() / way.norm()


def test_live_statistics_converge_the_same(root, people, folder):
    for name, ranks in (("live-one", 1), ("live-two", 2)):
        run(folder, command(root, ranks, *settings(people, name, "--batch_size", 16)))
    one, two = last(folder, "live-one")["metrics"], last(folder, "live-two")["metrics"]
    assert two["train/loss_id"] == pytest.approx(one["train/loss_id"], rel=0.1)
    assert two["train/loss_pair"] == pytest.approx(one["train/loss_pair"], rel=0.3)
