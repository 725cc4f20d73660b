"""train.py by its real command line, on drawn people: what it writes, how it goes on, and how it says what is wrong."""

import gc
import itertools
import re
import shutil
import signal
import sqlite3
import threading
import time
from contextlib import chdir
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import Script
from tiny_network import SIZE
from train_lab import LEVERS, TINY, fails, weights

import train
from reid import ReidError
from reid import files as storage
from reid.checkpoint import FORMAT, VERSION, load_checkpoint
from reid.model import build_model
from reid.training.run import Run, StopSignal
from reid.training.trainer import Trainer

WHOLE = ["--num_epochs", 2, "--eval_freq", 1, "--held_out", 0.3, *LEVERS, *TINY]  # two of six identities


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
    return folder, Script(folder, "train.py", "--data_root", few, "--exp_name", "whole", "--projector", *WHOLE,
                          *distilled).works().out


def test_writes_everything(undisturbed):
    folder, out = undisturbed
    last, best = weights(folder, "whole"), weights(folder, "whole", "best.pth")
    assert last["training"]["map"]["weight"].shape == (12, SIZE) and best.get("training") is None
    assert set(best["state_dict"]) == set(build_model(best["config"]).state_dict())  # the map is no part of it
    assert last["training"]["epoch"] == 2 and last["args"]["ema"] == 0.9
    assert best["state_dict"]["body.conv0.weight"].dtype == torch.float16
    assert 0 <= best["metrics"]["val/accuracy"] <= 1 and 0 < best["metrics"]["val/mAP"] <= 1
    assert len(best["config"]["classes"]) == 6  # the two that are held out, too
    assert len(list((folder / "runs" / "whole").glob("events.out.tfevents.*"))) == 1
    assert (folder / "mlflow.db").exists()
    assert "eval.py --exp_name whole" in out
    assert "25 images of 4 identities, 3 steps an epoch, 12 pairs of images of one identity in a batch, " in out
    assert "validation on 18 images of 2 held-out identities and 4 images of the others, 86 crops without identities" in out
    assert not list((folder / "models" / "whole").glob("*.tmp"))


def test_writes_down_what_happened(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = undisturbed
    board = EventAccumulator(str(folder / "runs" / "whole")).Reload()
    scalars = {"train/loss", "train/loss_id", "train/loss_triplet", "train/loss_relational", "train/loss_cosine", "train/lr",
               "train/images_per_s", "val/mAP", "val/rank1", "val/accuracy", "val/loss"}
    assert scalars <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert len(board.Images("train/augmented")) == 1
    assert list((folder / "runs" / "whole").rglob("sprite.png"))
    with sqlite3.connect(folder / "mlflow.db") as store:
        assert scalars <= {name for name, in store.execute("select key from latest_metrics")}
        assert ("jitter", "0.4") in store.execute("select key, value from params").fetchall()
        assert {"best.pth", "best.pth.sha256"} <= {name for name, in store.execute("select key from tags")}


def resumed(folder, *arguments):
    """The settings with which a run goes on."""
    gc.collect()
    with chdir(folder):
        parser = train.get_args_parser()
        return Run(parser.parse_args(["--exp_name", "whole", "--resume", *arguments]), parser, train.OPERATIONAL).args


def test_resume_takes_the_settings_of_the_run_and_refuses_others(undisturbed):
    folder = undisturbed[0]
    found = resumed(folder, "--data_root", "moved", "--eval_freq", "5", "--lr", "5e-3")  # 5 is the default; typed, it counts
    assert (found.data_root, found.eval_freq, found.lr) == (["moved"], 5, 0.005)
    with pytest.raises(ReidError, match=r"--lr 0\.005, not 0\.05; leave it out"):  # 0.05 is the default
        resumed(folder, "--lr", "0.05")


def test_logs_are_checked_before_images_are_decoded(people, database, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ImageCache", None)  # not reached
    arguments = ["--data_root", people, *TINY, "--exp_name", "logs"]
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "nonsense://here")
        assert "MLflow at nonsense://here" in fails(tmp_path, *arguments)
    shutil.copy(database, tmp_path)
    (tmp_path / "runs").write_text("a file")
    gc.collect()
    with chdir(tmp_path), pytest.raises(NotADirectoryError):
        train.main(train.get_args_parser().parse_args([str(argument) for argument in arguments]))
    gc.collect()
    assert not list((tmp_path / "models").iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(few, database, tmp_path, monkeypatch):
    shutil.copy(database, tmp_path)
    monkeypatch.setattr(train, "learning_rate", lambda step, steps, args: 1e30 if step > steps else 0.005)
    line = fails(tmp_path, "--data_root", few, *TINY, "--exp_name", "nan", "--num_epochs", 3, "--eval_freq", 1)
    expected = r"not finite at step \d+, learning rate [\de.+]+: loss .*loss_id .*loss_triplet |weights of this run: NaN"
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


def test_all_bad_images_are_named_at_once(few, database, distilled, tmp_path):
    """Those of train/, of the crops without identities and of val/."""
    shutil.copy(database, tmp_path)
    shutil.copytree(few, tmp_path / "data")
    bad = [min((tmp_path / "data" / split).rglob("*.jpg")) for split in ("train", "gallery", "val")]
    for path in bad:
        path.write_bytes(b"\xff\xd8\xff not a picture")
    line = fails(tmp_path, "--data_root", "data", *TINY, *distilled, "--unlabelled", "data/gallery", "--exp_name", "bad")
    assert line.startswith("3 images, which have to be replaced or removed: ")
    assert re.findall(r"(\w+/[-\w]+/[-\w.]+): cannot be read as an image", line) == [
        path.relative_to(tmp_path / "data").as_posix() for path in bad]
    gc.collect()
    assert not list((tmp_path / "models").iterdir()) and not list((tmp_path / "runs").iterdir())


def test_help_shows_every_default():
    for action in train.get_args_parser()._actions:
        assert action.help, action.dest
    text = train.get_args_parser().format_help()
    for group in ("run", "data", "network", "augmentation", "loss", "schedule", "machine"):
        assert f"\n{group}:\n" in text
    assert "(default: 0.3)" in text and "(default: densenet121)" in text


def stop_at_step(number, how):
    """Send this process a signal in its `number`-th training step."""
    step, calls = Trainer.step, itertools.count(1)

    def counted(*args):
        if next(calls) == number:
            while not Path("models/cut/last.pth").exists():  # of the first epoch; it is written meanwhile
                time.sleep(0.01)
            signal.raise_signal(how)
        return step(*args)

    Trainer.step = counted


@pytest.mark.parametrize("how", [signal.SIGHUP, signal.SIGKILL])
def test_resume_after_a_stop_equals_an_undisturbed_run(few, database, distilled, undisturbed, tmp_path, how):
    shutil.copy(database, tmp_path)
    start = ["--data_root", few, "--exp_name", "cut", *WHOLE, *distilled]
    script = Script(tmp_path, "train.py", *start, prepare=partial(stop_at_step, 5, how))
    script.works(-9 if how == signal.SIGKILL else 130)
    training = weights(tmp_path, "cut")["training"]
    assert (training["epoch"], training["step"]) == (1, 0 if how == signal.SIGKILL else 2)
    command = "train.py --resume --exp_name cut"
    if how == signal.SIGHUP:
        assert script.err.splitlines()[-1] == f"train.py: error: saved; go on with: python {command}"
    Script(tmp_path, *command.split()).works()
    for name in ("last.pth", "best.pth"):
        expected, found = weights(undisturbed[0], "whole", name), weights(tmp_path, "cut", name)
        assert all(torch.equal(value, found["state_dict"][key]) for key, value in expected["state_dict"].items())
        measured = [{key: value for key, value in record["metrics"].items() if key != "train/images_per_s"}
                    for record in (expected, found)]
        assert measured[0] == measured[1] and "train/loss" in measured[0] and "val/loss" in measured[0]


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a file"])
def test_a_place_that_weights_cannot_be_written_to_is_refused_before_the_training(tmp_path, kind):
    place = tmp_path / "models/mine"
    place.parent.mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    shutil.copy(tmp_path / "notes.txt", place) if kind == "file" else place.symlink_to(
        "nowhere" if kind == "link to nothing" else tmp_path / "notes.txt")
    assert "models/mine is no folder that can be written" in fails(tmp_path, "--exp_name", "mine", "--data_root", "nowhere")
    assert sorted(path.name for path in tmp_path.rglob("*") if not path.name.endswith(".lock")) == ["mine", "models", "notes.txt"]
    assert kind == "link to nothing" or place.read_text() == "mine"


def test_two_trainings_of_one_name(people, tmp_path):
    arguments = ["--data_root", people, *TINY, "--exp_name", "twice"]
    with chdir(tmp_path):
        first = Run(train.get_args_parser().parse_args([str(argument) for argument in arguments]), train.get_args_parser(), set())
    (tmp_path / "models" / "twice").rmdir()  # rm -rf of the folder must not open the way for a second run
    for more in ([], ["--resume"]):
        assert "another process is training twice" in fails(tmp_path, *arguments, *more)
    del first
    gc.collect()
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("number, then", [(signal.SIGHUP, None), (signal.SIGINT, signal.default_int_handler),
                                          (signal.SIGTERM, signal.SIG_DFL)])
def test_a_signal_asks_for_a_stop_and_a_second_one_ends(number, then):
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    try:
        stop = StopSignal(second_kills=True)
        signal.raise_signal(number)
        assert stop.asked and signal.getsignal(number) == (then if then is not None else stop.ask)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def remove_validation(train_folder):
    next((train_folder.parent / "val").rglob("*.jpg")).unlink()


def other_bytes(train_folder):
    with open(next(train_folder.rglob("*.jpg")), "ab") as file:
        file.write(b"0")


@pytest.mark.parametrize("change", [rename_identity, swap_identities, remove_half, other_bytes, remove_validation])
def test_only_the_same_images_can_be_resumed(stopped, change):
    folder, arguments = stopped
    change(folder / "data" / "train")
    assert "validated on other images" in fails(folder, *arguments)


def test_resume_takes_the_dataset_of_the_run(stopped, few, capsys):
    folder, _ = stopped
    with chdir(folder):
        train.main(train.get_args_parser().parse_args(["--exp_name", "whole", "--resume"]))
    assert f"python eval.py --exp_name whole --data_root {few} --save_index" in capsys.readouterr().out


def test_what_is_removed_while_it_trains_is_written_again(few, database, tmp_path, monkeypatch, capsys):
    shutil.copy(database, tmp_path)
    epoch_done, scores = Run.epoch_done, iter([0.9, 0.1])
    monkeypatch.setattr(train, "validate", lambda *_: {"val/mAP": next(scores)})
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's writer fails in a thread of its own

    def removing(run, trainer, epoch, *rest, **options):
        if epoch == 2:
            run.wait()
            shutil.rmtree(run.folder)
            shutil.rmtree("runs")
        return epoch_done(run, trainer, epoch, *rest, **options)

    monkeypatch.setattr(Run, "epoch_done", removing)
    with chdir(tmp_path):
        arguments = ["--data_root", few, *TINY, "--exp_name", "removed", "--num_epochs", 2, "--eval_freq", 1]
        train.main(train.get_args_parser().parse_args([str(argument) for argument in arguments]))
    assert weights(tmp_path, "removed", "best.pth")["metrics"]["epoch"] == 2 == weights(tmp_path, "removed")["training"]["epoch"]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and "models/removed/best.pth has been removed" in warnings[0] and "TensorBoard" in warnings[1]


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
    rewrite(path, lambda record: record["args"].pop("held_out"))
    found = resumed(folder)
    assert found.held_out == 0 and found.eval_freq == 1 and found.resume  # nobody was held out
    rewrite(path, lambda record: record["args"].update(mixstyle=0.5))
    assert "--mixstyle 0.5, which this version does not have" in fails(folder, *arguments)
    rewrite(path, lambda record: (record["args"].update(mixstyle=0.0, held_out=0.3), record["training"].update(step=10**6)))
    assert "stopped at step 1000000" in fails(folder, *arguments)
