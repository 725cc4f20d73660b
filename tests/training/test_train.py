"""train.py by its real command line, on synthetic people: it learns, survives, resumes exactly, and says what is wrong."""

import gc
import itertools
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import chdir, nullcontext
from functools import cache, partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from forked import Script

import train
from reid import ReidError, distributed
from reid import files as storage
from reid.checkpoint import FORMAT, VERSION, load_checkpoint, save_checkpoint
from reid.model import build_model, default_config
from reid.training import augment
from reid.training.cache import ImageCache
from reid.training.run import Run
from reid.training.teacher import Teacher, load_teacher
from reid.training.trainer import Trainer

TINY = ["--height", "64", "--width", "32", "--batch_size", "8", "--lr", "0.005", "--weights", "none", "--precision", "fp32",
        "--warmup_epochs", "1"]
LEVERS = ["--ema", "0.9", "--jitter", "0.4", "--tint", "0.3", "--gray", "0.2", "--blur", "0.3", "--clip", "5"]


@pytest.fixture(scope="module")
def distilled(people, tmp_path_factory):
    """The settings of a teacher, whose embeddings of the training images are random, and of crops without identities."""
    path, names = tmp_path_factory.mktemp("teacher") / "teacher.pt", sorted(file.name for file in people.rglob("*.jpg"))
    embeddings = torch.randn(len(names), 12, generator=torch.Generator().manual_seed(0)).half()
    torch.save({"paths": names, "embeddings": embeddings}, path)
    return ["--teacher", path, "--unlabelled", people / "gallery", "--unlabelled_batch", 4]


@pytest.fixture(scope="module")
def undisturbed(few, distilled, tmp_path_factory):
    """A run of two epochs with every setting switched on; its folder and output."""
    folder = tmp_path_factory.mktemp("undisturbed")
    args = ["--data_root", few, "--exp_name", "whole", "--num_epochs", 2, "--eval_freq", 1, *LEVERS, *distilled,
            *TINY]
    return folder, Script(folder, "train.py", *args).works().out


def weights(folder, run, name="last.pth"):
    return load_checkpoint(folder / "models" / run / name)


def test_writes_everything(undisturbed):
    folder, out = undisturbed
    last, best = weights(folder, "whole"), weights(folder, "whole", "best.pth")
    assert last["training"]["map"]["weight"].shape == (12, 1024) and best.get("training") is None
    assert set(best["state_dict"]) == set(build_model(best["config"]).state_dict())  # the map is no part of it
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
    scalars = {"train/loss", "train/loss_id", "train/loss_pair", "train/loss_relational", "train/loss_cosine", "train/lr",
               "train/images_per_s", "val/accuracy", "val/loss"}
    assert scalars <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert len(board.Images("train/augmented")) == 1
    assert list((folder / "runs" / "whole").rglob("sprite.png"))
    with sqlite3.connect(folder / "mlflow.db") as store:
        assert scalars <= {name for name, in store.execute("select key from latest_metrics")}
        assert ("jitter", "0.4") in store.execute("select key, value from params").fetchall()
        assert {"best.pth", "best.pth.sha256"} <= {name for name, in store.execute("select key from tags")}


def stop_at_step(number, how):
    """Send this process a signal in its `number`-th training step."""
    step, calls = Trainer.step, itertools.count(1)

    def counted(*args):
        if next(calls) == number:
            signal.raise_signal(how)
        return step(*args)

    Trainer.step = counted


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_resume_after_a_stop_equals_an_undisturbed_run(few, database, distilled, undisturbed, tmp_path, how):
    shutil.copy(database, tmp_path)
    args = ["--data_root", few, "--exp_name", "cut"]
    start = [*args, "--num_epochs", 2, "--eval_freq", 1, *LEVERS, *distilled, *TINY]
    Script(tmp_path, "train.py", *start, prepare=partial(stop_at_step, 6, how)).works(-9 if how == signal.SIGKILL else 130)
    training = weights(tmp_path, "cut")["training"]
    assert (training["epoch"], training["step"]) == (1, 0 if how == signal.SIGKILL else 2)
    Script(tmp_path, "train.py", *args, "--resume").works()
    for name in ("last.pth", "best.pth"):
        expected, found = weights(undisturbed[0], "whole", name), weights(tmp_path, "cut", name)
        assert all(torch.equal(value, found["state_dict"][key]) for key, value in expected["state_dict"].items())
        measured = [{key: value for key, value in record["metrics"].items() if key != "train/images_per_s"}
                    for record in (expected, found)]
        assert measured[0] == measured[1] and "train/loss" in measured[0] and "val/loss" in measured[0]


def fails(folder, *args):
    """The error of a run in this process."""
    gc.collect()  # the traceback of an earlier failure keeps its run alive, and so its lock
    with chdir(folder), pytest.raises(ReidError) as caught:
        train.main(train.get_args_parser().parse_args([str(arg) for arg in args]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_are_one_line_without_traceback(root, tmp_path):
    command = [sys.executable, root / "train.py", "--data_root", "nowhere", *TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: error: nowhere/train: no such folder") and done.stderr.count("\n") == 1


def test_what_users_get_wrong(people, undisturbed, tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "no images" in fails(tmp_path, "--data_root", "empty", *TINY)
    assert "--batch_size 6" in fails(tmp_path, "--data_root", people, *TINY, "--batch_size", 6)
    assert "nothing.pth: no such file" in fails(tmp_path, "--data_root", people, *TINY, "--weights", "nothing.pth")
    assert "--resume needs" in fails(tmp_path, "--resume")
    assert "last.pth; runs that can go on: none" in fails(tmp_path, "--data_root", people, "--exp_name", "new", "--resume")
    folder = undisturbed[0]
    assert "add --resume" in fails(folder, "--data_root", people, *TINY, "--exp_name", "whole")
    assert "--lr 0.005, not 0.1" in fails(folder, "--data_root", people, "--exp_name", "whole", "--resume", "--lr", 0.1)


def test_a_loss_that_is_not_finite_stops_the_run(few, database, tmp_path, monkeypatch):
    shutil.copy(database, tmp_path)
    monkeypatch.setattr(train, "learning_rate", lambda step, steps, args: 1e30 if step > steps else 0.005)
    line = fails(tmp_path, "--data_root", few, *TINY, "--exp_name", "nan", "--num_epochs", 3, "--eval_freq", 1)
    expected = r"not finite at step \d+, learning rate [\de.+]+: loss .*loss_id .*loss_pair |weights of this run: NaN"
    assert re.search(expected, line), line
    for name in ("best.pth", "last.pth"):
        record = weights(tmp_path, "nan", name)
        assert record["metrics"]["train/loss"] > 0 and all(value.isfinite().all() for value in record["state_dict"].values())
    assert record["training"]["epoch"] == 1


def test_a_full_gpu_names_the_setting_to_lower(few, database, tmp_path, monkeypatch):
    shutil.copy(database, tmp_path)

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "train_step", no_room)
    line = fails(tmp_path, "--data_root", few, *TINY, "--exp_name", "full")
    assert "memory is full" in line and "lower --batch_size 8" in line
    gc.collect()
    assert not list((tmp_path / "models").iterdir())  # neither a lock nor an empty folder


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

    assert train.learning_rate(0, 10, args) == pytest.approx(0.001)
    assert train.learning_rate(5, 10, args) == pytest.approx(0.1 * (0.01 + 0.99 / 2))
    assert train.learning_rate(10, 10, args) == pytest.approx(0.1)
    assert train.learning_rate(30, 10, args) == pytest.approx(0.05)
    assert train.learning_rate(50, 10, args) == pytest.approx(0)


def test_help_shows_every_default():
    for action in train.get_args_parser()._actions:
        assert action.help, action.dest
    text = train.get_args_parser().format_help()
    for group in ("run", "data", "network", "augmentation", "loss", "schedule", "machine"):
        assert f"\n{group}:\n" in text
    assert "(default: 0.3)" in text and "(default: densenet121)" in text


def tiny_trainer(*options, steps=1, targets=None):
    """A Trainer of a small network of two identities, as train.py makes it. targets: embeddings of a teacher."""
    torch.manual_seed(0)
    args = train.get_args_parser().parse_args([*TINY, *options])
    model = build_model(default_config([1, 2], height=64, width=32))
    teacher = load_teacher(args, model, [], []) if targets is None else Teacher(1024, targets)
    parameters = [*model.parameters(), *(teacher.parameters() if teacher else [])]
    optimizer = torch.optim.SGD([parameter for parameter in parameters if parameter.requires_grad], args.lr, momentum=0.9,
                                nesterov=True, weight_decay=args.weight_decay, fused=True)
    trainer = Trainer(model, optimizer, train.train_step, args, steps, torch.device("cpu"), teacher)
    trainer.train()
    return trainer


def tiny_batches(steps, crops=0):
    """Images, numbers, labels and rows of batches of eight images of two identities and of `crops` without identities."""
    generator, count = torch.Generator().manual_seed(0), 8 + crops
    images = torch.randint(256, (steps, count, 3, 64, 32), dtype=torch.uint8, generator=generator)
    return images, augment.draw(steps, count, 0, 0), torch.arange(8) // 4, torch.arange(count)


def random_targets(count, dimension=6):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(1))


def test_the_loss_is_the_sum_of_its_parts():
    trainer = tiny_trainer("--pair_weight", "0.5", "--distill", "0.7", "--cosine", "3", targets=random_targets(12))
    images, numbers, labels, rows = tiny_batches(1, crops=4)
    logged = {name: value.item() for name, value in train.train_step(trainer, images[0], numbers[0], labels, rows).items()}
    expected = logged["loss_id"] + 0.5 * logged["loss_pair"] + 0.7 * (logged["loss_relational"] + 3 * logged["loss_cosine"])
    assert logged["loss"] == pytest.approx(expected, rel=1e-5)


def freeze(trainer):
    """Keep the batch-norm layers from mixing the images of a batch."""
    trainer.model.eval()
    trainer.model.training = True  # forward returns what the losses need
    return trainer


def test_the_losses_are_those_of_the_output_of_the_neck():
    trainer = freeze(tiny_trainer(targets=(targets := random_targets(20))))
    images, numbers, labels, _ = tiny_batches(1, crops=4)
    rows = torch.arange(12) + 5
    with torch.no_grad():
        neck = trainer.model.neck(trainer.model.features(augment.apply(images[0], numbers[0])))
        ours, theirs, mapped = map(F.normalize, (neck, targets[rows], neck @ trainer.teacher.map.weight.T))
        expected = [12 * (ours @ ours.T - theirs @ theirs.T).square().mean().item(), 1 - (mapped * theirs).sum(1).mean().item()]
    logged = train.train_step(trainer, images[0], numbers[0], labels, rows)
    assert [logged[name].item() for name in ("loss_relational", "loss_cosine")] == pytest.approx(expected, rel=1e-4)


def test_crops_without_identities_are_only_distilled():
    images, numbers, labels, rows = tiny_batches(1, crops=4)
    logged, weights = [], []
    for change in (0, 100):
        images[0, 8:] = images[0, 8:] // 2 + change
        trainer = freeze(tiny_trainer(targets=random_targets(12)))
        logged.append(train.train_step(trainer, images[0], numbers[0], labels, rows))
        weights.append(trainer.model.body.conv0.weight.detach().clone())
    for name in ("loss_id", "loss_pair", "accuracy"):
        assert logged[0][name].item() == pytest.approx(logged[1][name].item(), rel=1e-5), name
    assert logged[0]["loss_relational"] != logged[1]["loss_relational"]
    assert (weights[0] - weights[1]).abs().max() > 1e-6


def test_the_norm_of_the_gradient_is_clipped():
    images, numbers, labels, rows = tiny_batches(1, crops=4)
    steps = []
    for clip in ("0", "0.5"):
        trainer = freeze(tiny_trainer("--clip", clip, "--weight_decay", "0", targets=random_targets(12)))
        train.train_step(trainer, images[0], numbers[0], labels, rows)
        steps.append(torch.cat([parameter.grad.flatten() for parameter in trainer.parameters]))
    assert steps[0].norm() > 0.6 and steps[1].norm().item() == pytest.approx(0.5, rel=1e-3)
    assert torch.allclose(steps[1], steps[0] * 0.5 / steps[0].norm(), atol=1e-4)


def test_averaged_weights_and_their_statistics():
    trainer = tiny_trainer("--ema", "0.9")
    conv, averaged = trainer.model.body.conv0.weight, trainer.averaged
    before = averaged.body.conv0.weight.clone()
    with torch.no_grad():
        conv += torch.randn(conv.shape) / 10
    trainer.average_weights(0.9)
    assert torch.allclose(averaged.body.conv0.weight, 0.9 * before + 0.1 * conv, atol=1e-6)
    images = [augment.apply(*batch) for batch in zip(*tiny_batches(2)[:2])]
    trainer.refresh_norms(images)
    means = [averaged.body.conv0((x - averaged.mean) / averaged.std).mean((0, 2, 3)) for x in images]
    assert torch.allclose(averaged.body.norm0.running_mean, torch.stack(means).mean(0), atol=1e-4)
    assert not averaged.training and trainer.best_model is averaged


def test_freezing_keeps_the_statistics_of_the_backbone_and_not_of_the_neck():
    trainer = tiny_trainer("--freeze_bn", "--ema", "0.9")
    images, numbers, labels, rows = tiny_batches(1)
    trainer.step(images[0], numbers[0], labels, rows, 0.01)
    trainer.refresh_norms([augment.apply(images[0], numbers[0])])
    for model in (trainer.model, trainer.averaged):
        assert torch.equal(model.body.norm0.running_mean, torch.zeros(64))
        assert not torch.equal(model.neck.running_mean, torch.zeros(1024))


def test_a_first_step_that_fp16_skips_leaves_no_memory_that_was_never_written():
    trainer = tiny_trainer(steps=2)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))  # overflows, as on a GPU in fp16
    trainer.scaler.scale(torch.zeros(()))
    images, numbers, labels, rows = tiny_batches(2)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.step(images[0], numbers[0], labels, rows, 0.01)
    assert all(torch.equal(*pair) for pair in zip(before, trainer.parameters, strict=True)), "the step was not skipped"
    for state in trainer.optimizer.state.values():
        assert torch.equal(state["momentum_buffer"], torch.zeros_like(state["momentum_buffer"]))


def test_a_teacher_of_another_backbone_and_size(tmp_path):
    path = tmp_path / "teacher.pth"
    save_checkpoint(path, build_model(default_config([1, 2], "resnet50", height=96, width=48)), {}, {})
    images, numbers, labels, rows = tiny_batches(1, crops=4)
    found = {}
    for weight in (0, 1):
        pupil = tiny_trainer("--teacher", str(path), "--distill", str(weight))
        pupil.step(images[0], numbers[0], labels, rows, 0.01)
        found[weight] = pupil.end_epoch(1)
    assert found[1]["train/loss"] > found[0]["train/loss"] and found[1]["train/loss_id"] == found[0]["train/loss_id"]
    parts = [found[1][f"train/loss_{name}"] for name in ("id", "pair", "relational", "soft")]
    assert found[1]["train/loss"] == pytest.approx(sum(parts) + 5 * found[1]["train/loss_cosine"], rel=1e-5)
    network = pupil.teacher.network
    assert not network.training and all(parameter.grad is None for parameter in network.parameters())
    pupil.model.config["classes"] = [1, 3]
    with pytest.raises(ReidError, match="trained on other identities"):
        load_teacher(pupil.args, pupil.model, [], [])


class PretendGraph:
    """Of a CUDA graph what a CPU can have: the recorded step runs again on what is in the static inputs."""

    def __init__(self, trainer):
        self.trainer = trainer

    def replay(self):
        self.trainer.scalars = train.train_step(self.trainer, *self.trainer.inputs)


class EmptyGraph(PretendGraph):
    """What CUDA records on the wrong stream."""

    def replay(self):
        pass


def no_graph(_):
    raise RuntimeError("no driver\nno more")


def no_compiler(_):
    raise RuntimeError("no compiler")


def pretend_cuda(monkeypatch, graph, trainer):
    for name in ("Stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", partial(graph, trainer))
    trainer.graph_wanted = True


def states_after_three_steps(trainer):
    images, numbers, labels, rows = tiny_batches(3, crops=4)
    for step in range(3):
        trainer.step(images[step], numbers[step], labels, rows, 0.01 * (step + 1))
    return [*trainer._state_tensors(), *trainer.logged]


@cache
def eager_states():
    trainer = tiny_trainer(*LEVERS, steps=3, targets=random_targets(12))
    states = states_after_three_steps(trainer)
    assert trainer.graph is None
    return states


@pytest.mark.parametrize("graph, compiler, lines", [
    (PretendGraph, None, []),
    (no_graph, None, ["no CUDA graph here (no driver)"]),
    (EmptyGraph, None, ["no CUDA graph here (a replay changes no weight)"]),
    (PretendGraph, no_compiler, ["no compiled network here (no compiler)"]),
    (no_graph, no_compiler, ["no compiled network here (no compiler)", "no CUDA graph here (no driver)"]),
])
def test_choosing_the_way_of_the_step_changes_nothing(monkeypatch, capsys, graph, compiler, lines):
    """Warm-up, recording and replay are undone to the last bit, and so is an attempt that fails."""
    expected, trainer = eager_states(), tiny_trainer(*LEVERS, steps=3, targets=random_targets(12))
    pretend_cuda(monkeypatch, graph, trainer)
    if compiler:
        trainer.compile_wanted = True
        monkeypatch.setattr(torch, "compile", lambda model: lambda images: compiler(images))
    states = states_after_three_steps(trainer)
    assert (trainer.graph is not None) == (graph is PretendGraph)
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(lines) and all(line in found for line, found in zip(lines, printed))
    trainer.close()
    assert trainer.graph is None


def test_ranks_share_an_epoch_without_overlap(monkeypatch):
    args = train.get_args_parser().parse_args([*TINY])
    labels = torch.arange(64) // 8
    rows, numbers = train.plan_epoch(args, labels, 0, 3)
    monkeypatch.setattr(distributed, "world_size", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", rank)
        shares.append(train.plan_epoch(args, labels, 0, 3))
    assert torch.equal(torch.cat([part for part, _ in shares], 1), rows)
    assert torch.equal(torch.cat([part for _, part in shares], 1), numbers)
    for batch in rows:  # two identities, four images of each: a rank has one of them
        assert len(labels[batch].unique()) == 2 and (labels[batch].view(2, 4) == labels[batch].view(2, 4)[:, :1]).all()


def test_ranks_share_the_crops_without_identities(monkeypatch):
    args = train.get_args_parser().parse_args([*TINY, "--unlabelled_batch", "12"])
    labels = torch.arange(64) // 8
    rows, numbers = train.plan_epoch(args, labels, 30, 3)
    assert rows.shape == (8, 20) and numbers.shape[:2] == (8, 20)
    assert (rows[:, :8] < 64).all() and (rows[:, 8:] >= 64).all() and set(rows[:, 8:].flatten().tolist()) == set(range(64, 94))
    assert torch.equal(rows[:, :8], train.plan_epoch(args, labels, 0, 3)[0])
    monkeypatch.setattr(distributed, "world_size", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", rank)
        shares.append(train.plan_epoch(args, labels, 30, 3))
    for whole, (first, second) in zip((rows, numbers), zip(*shares)):
        assert torch.equal(torch.cat([first[:, :4], second[:, :4], first[:, 4:], second[:, 4:]], 1), whole)


def test_a_batch_that_the_ranks_cannot_share(people, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "start", lambda device: (0, 3))
    assert "must be a multiple of the 3 processes" in fails(tmp_path, "--data_root", people, *TINY)
    more = ["--batch_size", 12, "--unlabelled", people / "gallery", "--unlabelled_batch", 8]
    assert "--unlabelled_batch 8: must be a multiple of the 3" in fails(tmp_path, "--data_root", people, *TINY, *more)


@pytest.mark.parametrize("count, ranks, shards", [(5, 2, [[0, 2, 4], [1, 3]]), (1, 3, [[0], [], []])])
def test_shards_of_few_rows(monkeypatch, count, ranks, shards):
    monkeypatch.setattr(distributed, "world_size", ranks)
    for rank, rows in enumerate(shards):
        monkeypatch.setattr(distributed, "rank", rank)
        assert distributed.shard(count).tolist() == rows


def test_validation_by_a_rank_without_images(people, monkeypatch):
    trainer = tiny_trainer()
    monkeypatch.setattr(distributed, "shard", lambda count: torch.arange(0))
    monkeypatch.setattr(distributed, "total", lambda sums: sums + 3)  # what the other ranks have
    cache = ImageCache(sorted(people.rglob("*.jpg"))[:3], (64, 32), torch.device("cpu"))
    assert train.validate(trainer, cache, torch.zeros(3, dtype=torch.int64)) == {"val/accuracy": 1, "val/loss": 1}


def test_two_trainings_of_one_name(people, tmp_path):
    arguments = ["--data_root", people, *TINY, "--exp_name", "twice"]
    with chdir(tmp_path):
        first = Run(train.get_args_parser().parse_args([str(argument) for argument in arguments]), train.get_args_parser(), set())
    (tmp_path / "models" / "twice").mkdir()
    (tmp_path / "models" / "twice").rmdir()  # rm -rf of the folder must not open the way for a second run
    for more in ([], ["--resume"]):
        assert "another process is training twice" in fails(tmp_path, *arguments, *more)
    del first
    gc.collect()
    assert not list((tmp_path / "models").iterdir())


@pytest.fixture
def stopped(few, undisturbed, database, tmp_path):
    """Copies of a dataset and of the run that was trained on it, and the arguments of --resume."""
    shutil.copy(database, tmp_path)
    shutil.copytree(few, tmp_path / "data")
    shutil.copytree(undisturbed[0] / "models", tmp_path / "models")
    return tmp_path, ["--data_root", "data", "--exp_name", "whole", "--resume"]


def rename_identity(train_folder):
    first = sorted(train_folder.iterdir())[0]
    first.rename(train_folder / "7777")
    (train_folder.parent / "val" / first.name).rename(train_folder.parent / "val" / "7777")


def swap_identities(train_folder):
    first, second, *_ = sorted(train_folder.iterdir())
    first.rename(train_folder / "swap")
    second.rename(first)
    (train_folder / "swap").rename(second)


def remove_half(train_folder):
    for folder in train_folder.iterdir():
        for file in sorted(folder.iterdir())[::2]:
            file.unlink()


@pytest.mark.parametrize("change", [rename_identity, swap_identities, remove_half])
def test_only_the_same_images_can_be_resumed(stopped, change):
    folder, arguments = stopped
    change(folder / "data" / "train")
    assert "other images" in fails(folder, *arguments)


def test_resume_takes_the_dataset_of_the_run(stopped, few, capsys):
    folder, _ = stopped
    with chdir(folder):
        train.main(train.get_args_parser().parse_args(["--exp_name", "whole", "--resume"]))
    assert f"python eval.py --exp_name whole --data_root {few} --save_index" in capsys.readouterr().out


def rewrite(path, change):
    record = load_checkpoint(path)
    change(record)
    storage.save(path, {key: value for key, value in record.items() if key not in ("format", "version")}, FORMAT, VERSION)


def test_runs_of_earlier_versions(stopped, capsys):
    folder, arguments = stopped
    path = folder / "models" / "whole" / "last.pth"

    def as_before(record):
        record["args"] |= {"pair_loss": "triplet", "mixstyle": 0.0, "ibn": False, "grid": 0.0, "swa": 0, "pool": "avg",
                           "last_stride": 1}
        record["config"] |= {"last_stride": 1, "pool": "avg", "ibn": False}
        for key in ("images", "rates", "logged"):
            record["training"].pop(key)

    rewrite(path, as_before)
    with chdir(folder):
        train.main(train.get_args_parser().parse_args(arguments))
    assert "done: models/whole/best.pth" in capsys.readouterr().out
    rewrite(path, lambda record: record["args"].update(mixstyle=0.5))
    assert "--mixstyle 0.5, which this version does not have" in fails(folder, *arguments)
    rewrite(path, lambda record: (record["args"].update(mixstyle=0.0), record["training"].update(step=10**6)))
    assert "stopped at step 1000000" in fails(folder, *arguments)
