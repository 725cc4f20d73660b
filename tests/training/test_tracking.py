"""Runs written by reid.training.tracking, read back with MLflow's client and TensorBoard's own reader."""

import hashlib
import os
import random
import shutil
import socket
import threading
import time

import pytest
import torch
from PIL import Image

from reid import ReidError
from reid.training import tracking
from reid.training.tracking import Tracker, log_evaluation, new_run_name, open_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder whose mlflow.db the tests of this module share: creating one takes seconds."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
        patch.chdir(folder)
        open_store()
        yield folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def board(name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(f"runs/{name}").Reload()


def scalars(name, tag):
    return [(event.step, round(event.value, 4)) for event in board(name).Scalars(tag)]


def history(tracker, tag):
    return [(point.step, point.value) for point in tracker.client.get_metric_history(tracker.run_id, tag)]


def data(tracker):
    return tracker.client.get_run(tracker.run_id).data


def test_names_are_new_whatever_the_seed_and_leave_the_global_state_alone(tmp_path, monkeypatch):
    random.seed(0)
    state = random.getstate()
    names = [new_run_name(tmp_path)]
    assert random.getstate() == state
    random.seed(0)
    names += [new_run_name(tmp_path) for _ in range(20)]
    assert len(set(names)) > 15
    for name in names:
        word, noun, number = name.rsplit("-", 2)
        assert word.isalpha() and noun.isalpha() and number.isdigit() and len(name) <= 20

    (tmp_path / "shy-cat-1").mkdir()  # a name that is taken is drawn again
    draws = iter(["shy", "cat", "shy", "dog"])
    monkeypatch.setattr(random.SystemRandom, "choice", lambda self, words: next(draws))
    monkeypatch.setattr(random.SystemRandom, "randint", lambda self, low, high: 1)
    assert new_run_name(tmp_path) == "shy-dog-1"


def test_a_run_is_in_both(folder):
    random.seed(0)
    state = random.getstate(), torch.get_rng_state()
    with Tracker("one", {"lr": 0.05, "data_root": None}, tags={"exp_tag": "try"}) as tracker:
        tracker.images("train/augmented", torch.full((1, 3, 8, 16), 200.0), 0)
        tracker.log({"train/loss": 2.5, "val/mAP": 0.25}, 1)
        tracker.log({"train/loss": torch.tensor(1.5), "val/mAP": float("nan")}, 2)
        assert data(tracker).params == {"lr": "0.05", "data_root": "None"}
        assert tracker.client.get_run(tracker.run_id).info.status == "RUNNING"
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])

    run = tracker.client.get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    assert tracker.client.get_experiment(run.info.experiment_id).name == "human-reid"
    assert history(tracker, "train/loss") == [(1, 2.5), (2, 1.5)]
    assert run.data.tags["exp_tag"] == "try" and "mlflow.source.name" in run.data.tags

    assert scalars("one", "train/loss") == [(1, 2.5), (2, 1.5)]
    shown = board("one").summary_metadata
    assert {f"_hparams_/{part}" for part in ("experiment", "session_start_info", "session_end_info")} <= shown.keys()
    start = shown["_hparams_/session_start_info"].plugin_data.content
    assert b"lr" in start and b"data_root" in start and b"val/mAP" in shown["_hparams_/experiment"].plugin_data.content
    (image,) = board("one").Images("train/augmented")
    assert (image.width, image.height) == (16, 8)


def test_a_resumed_run_goes_on(folder):
    with Tracker("two", {"lr": 0.05, "num_epochs": 4}) as first:
        for step in (1, 2, 3):
            first.log({"train/loss": 10.0 + step}, step)
    time.sleep(1 - time.time() % 1)  # TensorBoard orders its files by the second in their names, then by a number as text
    with Tracker("two", {"lr": 0.05, "num_epochs": 6, "new": 1}, run_id=first.run_id) as second:
        assert second.client.get_run(second.run_id).info.status == "RUNNING"
        for step in (3, 4):
            second.log({"train/loss": 20.0 + step}, step)
    assert second.run_id == first.run_id
    assert data(second).params == {"lr": "0.05", "num_epochs": "4", "new": "1"}
    assert history(second, "train/loss")[-2:] == [(3, 23.0), (4, 24.0)]
    assert scalars("two", "train/loss") == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]


@pytest.mark.parametrize(
    "error, status", [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (ReidError, "FAILED")]
)
def test_status_is_how_the_run_ended(folder, error, status):
    try:
        with Tracker("ends", {}) as tracker:
            if error:
                raise error("stop")
    except BaseException as raised:
        assert type(raised) is error
    assert tracker.client.get_run(tracker.run_id).info.status == status


def test_a_run_that_the_store_has_lost_starts_anew(folder):
    with Tracker("lost", {"lr": 1}, run_id="0" * 32) as tracker:
        assert tracker.run_id != "0" * 32 and data(tracker).params == {"lr": "1"}
    tracker.client.delete_run(tracker.run_id)
    with Tracker("lost", {}, run_id=tracker.run_id) as again:
        assert again.run_id != tracker.run_id


def test_a_store_that_goes_away_costs_a_warning(folder, monkeypatch, capsys):
    with Tracker("gone", {"lr": 1}) as tracker:
        with monkeypatch.context() as patch:
            def unreachable(*args):
                raise OSError("no route to host")

            patch.setattr(tracker.client, "log_batch", unreachable)
            tracker.log({"train/loss": 1.0}, 1)
            tracker.log({"train/loss": 2.0}, 2)
        tracker.log({"train/loss": 3.0}, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: MLflow cannot be written (no route to host)")
    assert history(tracker, "train/loss") == [(3, 3.0)]
    assert scalars("gone", "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_folder_of_logs_that_is_removed_costs_a_warning(folder, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's writer fails in a thread of its own
    with Tracker("removed", {}) as tracker:
        tracker.log({"train/loss": 1.0}, 1)
        shutil.rmtree("runs")
        tracker.log({"train/loss": 2.0}, 2)
        tracker.log({"train/loss": 3.0}, 3)
    assert scalars("removed", "train/loss")[-1] == (3, 3.0)
    assert [value for _, value in history(tracker, "train/loss")] == [1.0, 2.0, 3.0]
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: TensorBoard cannot be written")


def test_folders_of_others_stay(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow-backup.tmp").mkdir()
    os.utime(tmp_path / "mlflow-backup.tmp", (1, 1))
    open_store()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow-backup.tmp", "mlflow.db"]


def test_projector_files(folder, monkeypatch):
    monkeypatch.setattr(tracking, "PROJECTOR_ROWS", 9)
    images = torch.zeros(12, 3, 32, 16, dtype=torch.uint8)
    with Tracker("space", {}) as tracker:
        tracker.projector(torch.eye(12) / 3, torch.arange(100, 112), images)
    (files,) = {path.parent for path in (folder / "runs" / "space").rglob("tensors.tsv")}
    rows = [line.split("\t") for line in (files / "tensors.tsv").read_text().splitlines()]
    assert len(rows) == 9 and rows[1][:3] == ["0.0", "0.3333", "0.0"]
    assert (files / "metadata.tsv").read_text().split() == [str(pid) for pid in range(100, 109)]
    with Image.open(files / "sprite.png") as sprite:
        assert sprite.size == (3 * tracking.SPRITE, 3 * tracking.SPRITE)
        white, black = sprite.getpixel((0, 32)), sprite.getpixel((32, 32))  # beside the person, and the person
    assert (white, black) == ((255, 255, 255), (0, 0, 0))
    config = (folder / "runs" / "space" / "projector_config.pbtxt").read_text()
    assert config.count("single_image_dim: 64") == 2 and "tensors.tsv" in config


def test_a_checkpoint_is_referred_to(folder):
    (folder / "best.pth").write_bytes(b"weights")
    with Tracker("points", {}) as tracker:
        tracker.artifact_reference(folder / "best.pth")
    assert data(tracker).tags["best.pth"] == str(folder / "best.pth")
    assert data(tracker).tags["best.pth.sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert not (folder / "mlruns").exists()


@pytest.mark.parametrize(
    "uri, words",
    [
        ("http://me:secret@127.0.0.1:9", "Connection refused"),
        ("http://me:secret/x@127.0.0.1:9", "MLflow at http://[*]{3}@127.0.0.1:9"),
        ("http://127.0.0.1:9?token=secret", "MLflow at http://127.0.0.1:9[?][*]{3}"),
        ("htp://me:secret@127.0.0.1", "MLflow at htp://[*]{3}@127.0.0.1"),
        ("http://no-such-host.invalid:80", "http://no-such-host.invalid:80"),
        ("nonsense://here", "nonsense"),
        ("sqlite:////dev/null/mlflow.db", "/dev/null"),
        ("sqlite:///text.db", "not a database"),
        ("sqlite:///runs", "not a file"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line(folder, monkeypatch, uri, words):
    (folder / "text.db").write_text("text")
    (folder / "runs").mkdir(exist_ok=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ReidError, match=words) as caught:
        Tracker("none", {})
    assert "\n" not in str(caught.value) and "MLFLOW_TRACKING_URI" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_silent_server_is_one_line(folder, monkeypatch, capsys):
    from mlflow import MlflowClient

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # second
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(ReidError, match=r"timed out.*MLFLOW_TRACKING_URI"):
            Tracker("none", {})
        silent_client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        with Tracker("silent", {}) as tracker:
            tracker.client = silent_client  # it falls silent while it trains
            tracker.log({"train/loss": 1.0}, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: MLflow cannot be written") and "timed out" in line
    assert scalars("silent", "train/loss") == [(1, 1.0)]


def test_a_deleted_experiment_is_one_line(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "old")
    client, _ = open_store()
    client.delete_experiment(client.create_experiment("old"))
    with pytest.raises(ReidError, match="experiment old is deleted"):
        Tracker("none", {})


def test_a_rival_that_makes_the_database_first_wins_and_any_folder_name_will_do(folder, monkeypatch):
    open_store()[0].create_experiment("rival")
    place = folder / "50%20 of #1?"
    place.mkdir()
    monkeypatch.chdir(place)
    link = tracking.Path.hardlink_to

    def late(self, fresh):
        self.write_bytes((folder / "mlflow.db").read_bytes())
        return link(self, fresh)

    monkeypatch.setattr(tracking.Path, "hardlink_to", late)
    client, _ = open_store()
    assert "rival" in {experiment.name for experiment in client.search_experiments()}
    assert [path.name for path in place.iterdir()] == ["mlflow.db"]


def test_an_evaluation_joins_the_run(folder, capsys):
    for name in ("other-run-1", "judged-run-1"):
        with Tracker(name, {}) as tracker:
            tracker.log({"loss": 1.0}, 3)
    (folder / "report.html").write_text("<!doctype html>")
    log_evaluation("judged-run-1", {"eval/here/plain/mAP": 0.25, "eval/here/rerank/Rank-1": 0.5}, "report.html")
    found = data(tracker)
    assert found.metrics == {"loss": 1.0, "eval/here/plain/mAP": 0.25, "eval/here/rerank/Rank-1": 0.5}
    assert found.tags["report"] == "report.html"
    assert [file.path for file in tracker.client.list_artifacts(tracker.run_id)] == ["report.html"]
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"
    assert scalars("judged-run-1", "eval/here/plain/mAP") == [(0, 0.25)] and scalars("judged-run-1", "loss") == [(3, 1.0)]
    assert capsys.readouterr().err == ""


def test_a_report_with_images_stays_on_this_machine(folder, capsys, monkeypatch):
    """A store of artifacts elsewhere gets the path of the report only."""
    with Tracker("remote-run-1", {}) as tracker:
        pass
    (folder / "report.html").write_text("<!doctype html>")
    search = type(tracker.client).search_runs
    sent = []
    monkeypatch.setattr(type(tracker.client), "log_artifact", lambda self, run_id, path: sent.append(path))
    for address in ("s3://bucket/1", "mlflow-artifacts:/1", "https://host/1", "dbfs:/1", "file:///tmp/1", "/tmp/1", "./mlruns/1"):
        def found(*args, address=address, **options):
            runs = search(*args, **options)
            runs[0].info._artifact_uri = address
            return runs

        monkeypatch.setattr(type(tracker.client), "search_runs", found)
        log_evaluation("remote-run-1", {"eval/here/plain/mAP": 0.25}, "report.html")
        assert bool(sent) == address.startswith(("file:", "/", "."))
        assert data(tracker).tags["report"] == "report.html"
    assert len(sent) == 3 and capsys.readouterr().err == ""


@pytest.mark.parametrize("tracked, warning", [
    (False, ""), (True, "warning: the scores of a-run are not logged in MLflow (mlflow.db is not here any more)\n")])
def test_an_evaluation_of_a_run_without_a_store_makes_none(tmp_path, monkeypatch, capsys, tracked, warning):
    monkeypatch.chdir(tmp_path)
    if tracked:
        (tmp_path / "runs" / "a-run").mkdir(parents=True)
    log_evaluation("a-run", {"eval/here/plain/mAP": 0.25})
    assert capsys.readouterr().err == warning and not (tmp_path / "mlflow.db").exists()
    assert (tmp_path / "runs").exists() == tracked


def test_an_evaluation_of_a_run_that_the_store_has_lost(folder, capsys):
    (folder / "runs" / "lost-run").mkdir(parents=True)
    log_evaluation("lost-run", {"eval/here/plain/mAP": 0.25})
    assert capsys.readouterr().err == "warning: the scores of lost-run are not logged in MLflow (it has no such run)\n"
