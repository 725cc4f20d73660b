"""Two gloo processes on the CPU train like one."""

import os
import subprocess
import sys

import pytest
import torch

from reid.checkpoint import load_checkpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def train(root, folder, people, name, ranks, *args):
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    options = ["--data_root", people, "--exp_name", name, "--height", 64, "--width", 32, "--batch_size", 16, "--weights", "none",
               "--precision", "fp32", "--lr", 0.005, "--warmup_epochs", 1, "--device", "cpu", *args]
    done = subprocess.run([*start, str(root / "train.py"), *map(str, options)], cwd=folder, env=ENVIRONMENT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return load_checkpoint(folder / "models" / name / "last.pth"), done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


def test_frozen_statistics_give_the_same_weights(root, people, folder):
    one, _ = train(root, folder, people, "one", 1, "--num_epochs", 1, "--freeze_bn")
    two, out = train(root, folder, people, "two", 2, "--num_epochs", 1, "--freeze_bn")
    assert "2 ranks" in out and out.count("epoch 1/1") == 1
    for key, value in one["state_dict"].items():
        assert torch.allclose(value.float(), two["state_dict"][key].float(), rtol=1e-3, atol=2e-5), key
    for key, value in one["metrics"].items():
        if "per_s" not in key:
            assert two["metrics"][key] == pytest.approx(value, rel=1e-3), key


def test_live_statistics_converge_the_same_and_resume_under_another_size(root, people, folder):
    one, _ = train(root, folder, people, "live-one", 1, "--num_epochs", 2)
    two, _ = train(root, folder, people, "live-two", 2, "--num_epochs", 2)
    assert two["metrics"]["train/loss_id"] == pytest.approx(one["metrics"]["train/loss_id"], rel=0.1)
    assert two["metrics"]["train/loss_triplet"] == pytest.approx(one["metrics"]["train/loss_triplet"], rel=0.3)
    again = [sys.executable, str(root / "train.py"), "--data_root", str(people), "--exp_name", "live-two", "--resume"]
    done = subprocess.run(again, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)  # nothing is left to do
    assert done.returncode == 0, done.stderr
