"""train.py by its real command line, on synthetic people: it learns, survives, resumes exactly, and says what is wrong."""

import gc
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import chdir, nullcontext
from functools import partial
from unittest import mock

import pytest
import torch

import train
from reid import ReidError, distributed
from reid import files as storage
from reid.checkpoint import load_checkpoint, save_checkpoint
from reid.model import build_model, default_config
from reid.training import augment
from reid.training import trainer as engine
from reid.training.trainer import Engine, learning_rate

TINY = ["--height", "64", "--width", "32", "--batch_size", "8", "--lr", "0.005", "--weights", "none", "--precision", "fp32",
        "--warmup_epochs", "1"]
LEVERS = ["--ema", "0.9", "--jitter", "0.4", "--gray", "0.2", "--blur", "0.3",
          "--jpeg", "0.3", "--grid", "0.3", "--pair_loss", "circle", "--pair_weight", "0.1"]


def command(root, *args):
    return [sys.executable, str(root / "train.py"), *map(str, args)]


@pytest.fixture(scope="module")
def environment():
    """Two threads are slower than one where several tests share the cores, and sums depend on their number."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def undisturbed(root, people, environment, tmp_path_factory):
    """A run of two epochs with every setting switched on, that nobody disturbs; its folder and output."""
    folder = tmp_path_factory.mktemp("undisturbed")
    args = command(root, "--data_root", people, "--exp_name", "whole", "--num_epochs", 2, "--eval_freq", 1, *LEVERS, *TINY)
    done = subprocess.run(args, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def weights(folder, run, name="last.pth"):
    return load_checkpoint(folder / "models" / run / name)


def test_writes_everything(undisturbed):
    folder, out = undisturbed
    last, best = weights(folder, "whole"), weights(folder, "whole", "best.pth")
    assert last["training"]["epoch"] == 2 and last["args"]["ema"] == 0.9
    assert best["state_dict"]["body.conv0.weight"].dtype == torch.float16
    assert 0 <= best["metrics"]["val/accuracy"] <= 1
    assert len(list((folder / "runs" / "whole").glob("events.out.tfevents.*"))) == 1
    assert (folder / "mlflow.db").exists()
    assert "eval.py --exp_name whole" in out
    assert not list((folder / "models" / "whole").glob("*.tmp"))


def test_writes_down_what_happened(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = undisturbed
    board = EventAccumulator(str(folder / "runs" / "whole")).Reload()
    scalars = {"train/loss", "train/loss_id", "train/loss_pair", "train/lr", "train/images_per_s", "val/accuracy", "val/loss"}
    assert scalars <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert len(board.Images("train/augmented")) == 1
    assert list((folder / "runs" / "whole").rglob("sprite.png"))
    with sqlite3.connect(folder / "mlflow.db") as store:
        assert scalars <= {name for name, in store.execute("select key from latest_metrics")}
        assert ("jitter", "0.4") in store.execute("select key, value from params").fetchall()
        assert {"best.pth", "best.pth.sha256"} <= {name for name, in store.execute("select key from tags")}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_resume_after_a_stop_equals_an_undisturbed_run(root, people, environment, undisturbed, tmp_path, how):
    args = ["--data_root", people, "--exp_name", "cut"]
    start = command(root, *args, "--num_epochs", 2, "--eval_freq", 1, *LEVERS, *TINY)
    process = subprocess.Popen(start, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    time.sleep(0.5)  # somewhere in the second epoch
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), errors
    assert "Traceback" not in errors
    assert weights(tmp_path, "cut")["training"]["epoch"] < 2
    again = subprocess.run(command(root, *args, "--resume"), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    for name in ("last.pth", "best.pth"):
        expected, found = weights(undisturbed[0], "whole", name), weights(tmp_path, "cut", name)
        assert all(torch.equal(value, found["state_dict"][key]) for key, value in expected["state_dict"].items())
        assert expected["metrics"].keys() == found["metrics"].keys()


def fails(folder, *args):
    """The error of a run in this process, which must have left no weights behind."""
    with chdir(folder), pytest.raises(ReidError) as caught:
        train.main(train.get_args_parser().parse_args([str(arg) for arg in args]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_are_one_line_without_traceback(root, tmp_path):
    done = subprocess.run(command(root, "--data_root", "nowhere", *TINY), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: error: nowhere/train: no such folder") and done.stderr.count("\n") == 1


def test_what_users_get_wrong(people, undisturbed, tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "no images" in fails(tmp_path, "--data_root", "empty", *TINY)
    assert "--batch_size 6" in fails(tmp_path, "--data_root", people, *TINY, "--batch_size", 6)
    assert "nothing.pth: no such file" in fails(tmp_path, "--data_root", people, *TINY, "--weights", "nothing.pth")
    assert "--resume needs" in fails(tmp_path, "--resume")
    folder = undisturbed[0]
    assert "add --resume" in fails(folder, "--data_root", people, *TINY, "--exp_name", "whole")
    assert "not together with --ema" in fails(tmp_path, "--data_root", people, *TINY, "--swa", 3, "--ema", 0.9)
    assert "at most --num_epochs 4" in fails(tmp_path, "--data_root", people, *TINY, "--swa", 5, "--num_epochs", 4)
    assert "--lr 0.005, not 0.1" in fails(folder, "--data_root", people, "--exp_name", "whole", "--resume", "--lr", 0.1)


def test_a_loss_that_is_not_finite_stops_the_run(people, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "learning_rate", lambda step, steps, args: 1e30 if step > steps else 0.005)
    line = fails(tmp_path, "--data_root", people, *TINY, "--exp_name", "nan", "--num_epochs", 3, "--eval_freq", 1)
    assert re.search(r"not finite at step \d+, learning rate [\de.+]+: loss .*loss_id .*loss_pair ", line), line
    for name in ("best.pth", "last.pth"):
        record = weights(tmp_path, "nan", name)
        assert record["metrics"]["train/loss"] > 0 and all(value.isfinite().all() for value in record["state_dict"].values())
    assert record["training"]["epoch"] == 1


def test_a_full_gpu_names_the_setting_to_lower(people, tmp_path, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Engine, "_update", no_room)
    line = fails(tmp_path, "--data_root", people, *TINY, "--exp_name", "full")
    assert "memory is full at step 0" in line and "lower --batch_size 8" in line
    gc.collect()
    assert not (tmp_path / "models" / "full").exists()  # neither a lock nor an empty folder


def test_a_bad_image_is_named(people, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(people / split, tmp_path / "data" / split)
    bad = tmp_path / "data" / "train" / "0009" / "0009_c1s1_000001_01.jpg"
    bad.parent.mkdir(exist_ok=True)
    bad.write_bytes(b"\xff\xd8\xff not a picture")
    assert "0009_c1s1_000001_01.jpg: cannot be read" in fails(tmp_path, "--data_root", "data", *TINY, "--train_all")


def test_learning_rate_by_hand():
    class args:
        lr, warmup_epochs, num_epochs, swa = 0.1, 1, 5, 0

    assert learning_rate(0, 10, args) == pytest.approx(0.001)
    assert learning_rate(5, 10, args) == pytest.approx(0.1 * (0.01 + 0.99 / 2))
    assert learning_rate(10, 10, args) == pytest.approx(0.1)
    assert learning_rate(30, 10, args) == pytest.approx(0.05)
    assert learning_rate(50, 10, args) == pytest.approx(0)
    args.swa = 2
    assert learning_rate(20, 10, args) > learning_rate(30, 10, args) == learning_rate(49, 10, args) == pytest.approx(0.05)


def test_the_weights_of_the_last_epochs_are_averaged():
    args = train.get_args_parser().parse_args([*TINY, "--num_epochs", "3", "--swa", "2"])
    trained = Engine(build_model(default_config([1, 2], height=64, width=32)), args, 1, torch.device("cpu"))
    conv, averaged, seen = trained.model.body.conv0.weight, trained.averaged, []
    for epoch in (1, 2, 3):
        with torch.no_grad():
            conv += torch.randn(conv.shape) / 10
        seen.append(conv.detach().clone())
        trained.average_epoch(epoch)
        if epoch < 3:
            assert torch.equal(averaged.body.conv0.weight, conv)  # the mean of one
    assert torch.allclose(averaged.body.conv0.weight, (seen[1] + seen[2]) / 2, atol=1e-6)
    images = torch.randint(256, (2, 8, 3, 64, 32), dtype=torch.uint8)
    params = augment.draw(16, (64, 32), torch.Generator().manual_seed(0)).view(2, 8, -1)
    trained.refresh_norms(images, params)
    means = []
    for batch, drawn in zip(images, params):
        x = (augment.apply(batch, drawn, ()) - averaged.mean) / averaged.std
        means.append(averaged.body.conv0(x).mean((0, 2, 3)))
    assert torch.allclose(averaged.body.norm0.running_mean, torch.stack(means).mean(0), atol=1e-4)
    assert not averaged.training and trained.best_model is averaged


def test_a_teacher_of_another_backbone_and_size(tmp_path):
    path = tmp_path / "teacher.pth"
    save_checkpoint(path, build_model(default_config([1, 2], "resnet50", height=96, width=48)), {}, {})
    images, labels = torch.randint(256, (8, 3, 64, 32), dtype=torch.uint8), torch.arange(8) // 4
    params = augment.draw(8, (64, 32), torch.Generator().manual_seed(0))
    found = {}
    for weight in (0, 1):
        torch.manual_seed(0)
        args = train.get_args_parser().parse_args([*TINY, "--teacher", str(path), "--distill", str(weight)])
        pupil = Engine(build_model(default_config([1, 2], height=64, width=32)), args, 1, torch.device("cpu"))
        pupil.train()
        pupil.step(images, params, labels, 0)
        found[weight] = pupil.end_epoch(0)
    assert found[1]["train/loss"] > found[0]["train/loss"] and found[1]["train/loss_id"] == found[0]["train/loss_id"]
    assert not pupil.teacher.training and all(parameter.grad is None for parameter in pupil.teacher.parameters())
    with pytest.raises(ReidError, match="trained on other identities"):
        Engine(build_model(default_config([1, 3], height=64, width=32)), args, 1, torch.device("cpu"))


class PretendGraph:
    """Of a CUDA graph what a CPU can have: the recorded step runs again on what stands in the static inputs."""

    def __init__(self, trained):
        self.replay = lambda: trained._update(*trained.inputs)


def no_graph(_):
    raise RuntimeError("no driver\nno more")


@pytest.mark.parametrize("graph", [PretendGraph, no_graph])
def test_recording_a_step_changes_nothing(monkeypatch, capsys, graph):
    """Warm-up and recording are undone to the last bit, and so is an attempt that fails."""
    args = train.get_args_parser().parse_args([*TINY, *LEVERS])
    images, labels = torch.randint(256, (3, 8, 3, 64, 32), dtype=torch.uint8), torch.arange(8) // 4
    params = augment.draw(24, (64, 32), torch.Generator().manual_seed(0), mixstyle=0.5).view(3, 8, -1)
    states = []
    for wanted in (False, True):
        torch.manual_seed(0)
        trained = Engine(build_model(default_config([1, 2], height=64, width=32)), args, 3, torch.device("cpu"))
        trained.graph_wanted = wanted
        for name in ("Stream", "current_stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", partial(graph, trained))
        trained.train()
        for step in range(3):
            trained.step(images[step], params[step], labels, step)
        assert bool(trained.graph) == (wanted and graph is PretendGraph)
        states.append([*trained._tensors(), trained.losses])
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))
    assert ("no CUDA graph of the eager step here (no driver)" in capsys.readouterr().out) == (graph is no_graph)


def test_ranks_share_an_epoch_without_overlap(monkeypatch):
    args = train.get_args_parser().parse_args([*TINY])
    labels = torch.arange(64) // 8
    rows, params = train.plan_epoch(args, labels, 3)
    monkeypatch.setattr(distributed, "world_size", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", rank)
        shares.append(train.plan_epoch(args, labels, 3))
    assert torch.equal(torch.cat([part for part, _ in shares], 1), rows)
    assert torch.equal(torch.cat([part for _, part in shares], 1), params)
    for batch in rows:  # two identities, four images of each: a rank has one of them
        assert len(labels[batch].unique()) == 2 and (labels[batch].view(2, 4) == labels[batch].view(2, 4)[:, :1]).all()
    with pytest.raises(ReidError, match="choose a multiple of 3"):
        train.check_settings(args, 3)


def test_two_trainings_of_one_name(people, tmp_path):
    with storage.locked(tmp_path / "models" / "twice" / ".lock", ""):
        assert "another process is training twice" in fails(tmp_path, "--data_root", people, *TINY, "--exp_name", "twice")
