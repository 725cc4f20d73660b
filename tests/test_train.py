"""train.py by its real command line, on synthetic people: it learns, survives, resumes exactly, and says what is wrong."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir

import pytest
import torch

import train
from reid import ReidError, storage
from reid.checkpoint import load_checkpoint
from reid.engine import learning_rate
from reid.runs import load_training_set

TINY = ["--height", "64", "--width", "32", "--batch_size", "8", "--lr", "0.005", "--weights", "none", "--precision", "fp32",
        "--warmup_epochs", "1"]


def command(root, *args):
    return [sys.executable, str(root / "train.py"), *map(str, args)]


@pytest.fixture(scope="module")
def environment():
    """Two threads are slower than one where several tests share the cores, and sums depend on their number."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def undisturbed(root, people, environment, tmp_path_factory):
    """A run of two epochs that nobody disturbs; its folder and output."""
    folder = tmp_path_factory.mktemp("undisturbed")
    args = command(root, "--data_root", people, "--exp_name", "whole", "--num_epochs", 2, "--eval_freq", 1, "--ema", 0.9, *TINY)
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


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_resume_after_a_stop_equals_an_undisturbed_run(root, people, environment, undisturbed, tmp_path, how):
    args = ["--data_root", people, "--exp_name", "cut"]
    start = command(root, *args, "--num_epochs", 2, "--eval_freq", 1, "--ema", 0.9, *TINY)
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
    assert "--lr 0.005, not 0.1" in fails(folder, "--data_root", people, "--exp_name", "whole", "--resume", "--lr", 0.1)


def test_a_loss_that_is_not_finite_stops_the_run(people, tmp_path):
    line = fails(tmp_path, "--data_root", people, *TINY, "--exp_name", "nan", "--lr", "1e30", "--num_epochs", 1)
    assert re.search(r"not finite at step \d+, learning rate [\de.+]+: loss", line), line
    assert not list((tmp_path / "models" / "nan").glob("*.pth"))


def test_a_bad_image_is_named(people, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(people / split, tmp_path / "data" / split)
    bad = tmp_path / "data" / "train" / "0009" / "0009_c1s1_000001_01.jpg"
    bad.parent.mkdir(exist_ok=True)
    bad.write_bytes(b"\xff\xd8\xff not a picture")
    assert "0009_c1s1_000001_01.jpg: cannot be read" in fails(tmp_path, "--data_root", "data", *TINY, "--train_all")


def test_learning_rate_by_hand():
    class args:
        lr, warmup_epochs, num_epochs = 0.1, 1, 5

    assert learning_rate(0, 10, args) == pytest.approx(0.001)
    assert learning_rate(5, 10, args) == pytest.approx(0.1 * (0.01 + 0.99 / 2))
    assert learning_rate(10, 10, args) == pytest.approx(0.1)
    assert learning_rate(30, 10, args) == pytest.approx(0.05)
    assert learning_rate(50, 10, args) == pytest.approx(0)


def test_two_trainings_of_one_name(people, tmp_path):
    held = storage.lock(tmp_path / "models" / "twice" / ".lock", "")
    assert "another process is training twice" in fails(tmp_path, "--data_root", people, *TINY, "--exp_name", "twice")
    held.close()


def test_joint_training_keeps_ids_apart(people, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(people)
    train, val, classes = load_training_set([str(people), str(other)], train_all=False)
    alone, _, once = load_training_set([str(people)], train_all=False)
    assert len(classes) == 2 * len(once) and len(train.files) == 2 * len(alone.files)
    assert len(train.labels.unique()) == len(classes) and val.labels.max() < len(classes)
    with pytest.raises(ReidError, match="same name"):
        load_training_set([str(people), str(people)], train_all=False)
