"""Two gloo processes on the CPU train like one, agree on the way of the step, and leave the process group."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from forked import Script, ranks
from tiny_network import SMALL

from reid.checkpoint import load_checkpoint
from reid.model import build_model

FROZEN = ["--freeze_bn", "--lr", "0.0005"]  # small steps: rounding decides which triplet is the hardest
STEPS = 3  # of an epoch

# --freeze_bn leaves the neck its statistics, and each rank has half a batch to make them from: freeze the neck as well.
# With STOP_AT, rank 0 sends SIGTERM in that step to its launcher, or without one to itself, and waits until it is stopped.
FROZEN_NECK = """
import itertools
import os
import signal
import sys
import time
import tiny_network
import train
from reid import cli, distributed
from reid.training.trainer import Trainer

def freeze(self):
    self.model.eval()
    self.model.training = True  # forward returns features and logits

class StopSignal(train.StopSignal):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        signals.append(self)

def counted(*args):
    if next(calls) == int(os.environ.get("STOP_AT", 0)) and distributed.rank == 0:
        os.kill(os.getppid() if distributed.world_size > 1 else os.getpid(), signal.SIGTERM)
        while not signals[0].asked:
            time.sleep(0.01)
    return step(*args)

signals, calls, step = [], itertools.count(1), Trainer.step
train.StopSignal, Trainer.train, Trainer.step = StopSignal, freeze, counted
sys.argv[0] = "train.py"
cli.run(train.get_args_parser(), train.main)
"""
# rank 1 has no compiler; both have what stands for a CUDA graph, and leave the process group after it
FALLBACK = """
import contextlib
import sys
import weakref
from unittest import mock
import torch
import torch.distributed
import train
from reid import cli, distributed
from reid.training.trainer import Trainer

graphs = []

class Graph:
    def __init__(self):
        graphs.append(weakref.ref(self))

    def replay(self):
        trainer = trainers[0]()
        trainer.scalars = train.train_step(trainer, *trainer.inputs)

def compiled(model):
    def call(images):
        if distributed.rank == 1:
            raise RuntimeError("no compiler")
        return model(images)
    return call

trainers, prepare, leave = [], Trainer._prepare, torch.distributed.destroy_process_group

def prepare_with_graph(self, batch):
    trainers.append(weakref.ref(self))
    self.graph_wanted = True
    prepare(self, batch)
    print(f"rank {distributed.rank}: compiled {self.network is not self.model}, graph {self.graph is not None}", flush=True)

def leave_after_the_graph():
    assert [graph() for graph in graphs] == [None], "the process group is left while a graph exists"
    leave()

for name in ("Stream", "current_stream", "synchronize"):
    setattr(torch.cuda, name, mock.MagicMock())
torch.cuda.stream = lambda _: contextlib.nullcontext()
torch.cuda.graph = lambda *_, **__: contextlib.nullcontext()
torch.cuda.CUDAGraph, torch.compile, Trainer._prepare = Graph, compiled, prepare_with_graph
torch.distributed.destroy_process_group = leave_after_the_graph
sys.argv[0] = "train.py"
cli.run(train.get_args_parser(), train.main)
"""


def settings(people, name, *args):
    """The command line of a run that follows the file of a teacher, on crops without identities, too."""
    teacher = people.parent / "teacher.pt"
    if not teacher.exists():
        names = sorted(file.name for file in people.rglob("*.jpg"))
        embeddings = torch.randn(len(names), 12, generator=torch.Generator().manual_seed(0))
        torch.save({"paths": names, "embeddings": embeddings}, teacher)
    args = ["--teacher", teacher, "--unlabelled", people / "gallery", "--unlabelled_batch", 4, *args]
    return ["--data_root", people, "--exp_name", name, *SMALL, "--batch_size", 8, "--lr", 0.005, "--warmup_epochs", 1,
            "--device", "cpu", "--num_epochs", 2, "--held_out", 0.3, *args]


def flat(state):
    return torch.cat([value.float().flatten() for value in state.values()])


def run(world_size, folder, script, *args):
    """Run a script as `world_size` processes; return their output, rank 0's first."""
    scripts = ranks(world_size, folder, script, *args) if world_size > 1 else [Script(folder, script, *args)]
    return "".join(script.works().out for script in scripts)


def last(folder, name):
    return load_checkpoint(folder / "models" / name / "last.pth")


def losses(out):
    """The losses of the first epoch as printed; the line comes once, whatever the number of ranks."""
    (line,) = re.findall(r"^epoch 1/2: .*", out, re.MULTILINE)
    return [float(value) for value in re.findall(r"loss\w* ([\d.]+)", line)]


@pytest.fixture(scope="module")
def folder(database, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    shutil.copy(database, folder)
    (folder / "frozen_neck.py").write_text(FROZEN_NECK)
    (folder / "fallback.py").write_text(FALLBACK)
    return folder


@pytest.fixture(scope="module")
def one(few, folder):
    """One process, batch-norm statistics frozen: where it started, how far it moved, its first losses, its last metrics."""
    out = run(1, folder, folder / "frozen_neck.py", *settings(few, "one", *FROZEN))
    record = last(folder, "one")
    torch.manual_seed(0)
    start = flat(build_model(record["config"]).state_dict())
    return start, flat(record["state_dict"]) - start, losses(out), record["metrics"]


def stopped_by_torchrun(root, folder, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "frozen_neck.py", *args]
    path = os.pathsep.join([str(root), str(root / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "STOP_AT": str(STEPS + 2)}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode != 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_frozen_statistics_give_the_same_weights_whoever_goes_on(root, few, folder, one, first, then):
    """Of two ranks each has images of one identity: every negative of the triplet loss is the other rank's."""
    start, way, expected, metrics = one
    name = f"from-{first}"
    options = settings(few, name, *FROZEN)
    if first == 2:  # a signal to torchrun reaches its processes
        out = stopped_by_torchrun(root, folder, *options)
    else:
        script = Script(folder, folder / "frozen_neck.py", *options, environment={"STOP_AT": str(STEPS + 2)})
        out = script.works(130).out
    stopped = last(folder, name)["training"]
    assert (stopped["epoch"], stopped["step"]) == (1, 2)
    assert losses(out) == pytest.approx(expected, rel=2e-3)
    assert (f"{first} ranks" in out) == (first > 1)
    run(then, folder, folder / "frozen_neck.py", "--data_root", few, "--exp_name", name, "--resume", "--device", "cpu")
    record = last(folder, name)
    for key in ("val/mAP", "val/loss", "val/accuracy"):  # of an odd number of images, which two ranks cannot share evenly
        assert record["metrics"][key] == pytest.approx(metrics[key], rel=0.1 if key == "val/mAP" else 1e-3)  # ranks may swap
    missed = flat(record["state_dict"]) - start - way
    assert missed.norm() < 0.005 * way.norm(), missed.norm() / way.norm()


def test_live_statistics_converge_the_same(people, folder):
    for name, world_size in (("live-one", 1), ("live-two", 2)):
        run(world_size, folder, "train.py", *settings(people, name, "--batch_size", 16))
    one, two = last(folder, "live-one")["metrics"], last(folder, "live-two")["metrics"]
    assert two["train/loss_id"] == pytest.approx(one["train/loss_id"], rel=0.1)
    assert two["train/loss_triplet"] == pytest.approx(one["train/loss_triplet"], rel=0.3)


def test_ranks_agree_on_the_way_of_the_step_and_leave_after_the_graph(few, folder):
    out = run(2, folder, folder / "fallback.py", *settings(few, "fallback", "--num_epochs", 1, "--compile", "on"))
    assert len(re.findall("no compiled network here .no compiler.; going on without", out)) == 1
    for rank in (0, 1):
        assert f"rank {rank}: compiled False, graph True" in out
    assert "done: models/fallback/best.pth" in out
