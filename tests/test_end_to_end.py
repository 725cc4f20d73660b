"""train.py, eval.py and inference.py one after the other with the real network, on drawn people. Some are started by a shell."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from forked import Script

from reid.checkpoint import load_checkpoint, restore_model, save_checkpoint
from reid.retrieval.index import GalleryIndex


def works(folder, name, *args):
    return Script(folder, name, *args).works().out


@pytest.fixture(scope="module")
def workplace(root, people, tmp_path_factory):
    """A folder with the run "small", trained from "start", the default model with noise on its weights, and both evaluations."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    started = load_checkpoint(root / "models" / "masked-hog-908" / "best.pth")
    started["config"].update(height=64, width=32)
    started["state_dict"] = {name: weight.float() + 4 * weight.float().std() * torch.randn(weight.shape)
                             if weight.ndim == 4 else weight for name, weight in started["state_dict"].items()}
    save_checkpoint(folder / "models/start/best.pth", restore_model(started), {}, {})
    works(folder, "train.py", "--data_root", people, "--exp_name", "small", "--weights", folder / "models/start/best.pth",
          "--num_epochs", 6, "--height", 64, "--width", 32, "--batch_size", 16, "--lr", 0.05, "--warmup_epochs", 1)
    for run in ("small", "start"):
        works(folder, "eval.py", "--exp_name", run, "--data_root", people, "--save_index", "--json", f"{run}.json", "--far", 0.01)
    return folder


def plain(workplace, name):
    return json.loads((workplace / f"{name}.json").read_text())["results"]["plain"]


def test_training_raises_rank_1_and_map(workplace):
    before, after = (plain(workplace, run) for run in ("start", "small"))
    assert after["rank"]["1"] > before["rank"]["1"] + 0.1 and after["mAP"] > before["mAP"] + 0.1


def test_scores_are_in_the_run_of_mlflow(people, workplace):
    from reid.training.tracking import _mlflow

    client = _mlflow().MlflowClient(f"sqlite:///{workplace}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.run_name == "small" and run.data.metrics["eval/synthetic/plain/mAP"] == plain(workplace, "small")["mAP"]
    assert not (workplace / "runs/start").exists()  # was not trained here


def test_load_index_gives_the_same_without_the_images(people, workplace):
    away = people.with_name("away")
    people.rename(away)
    try:
        out = works(workplace, "eval.py", "--exp_name", "small", "--data_root", people, "--load_index", "--json",
                    "again.json", "--far", 0.01)
    finally:
        away.rename(people)
    assert "img/s" not in out
    again, first = (json.loads((workplace / name).read_text()) for name in ("again.json", "small.json"))
    assert again["results"] == first["results"] and again["roc"] == first["roc"] and again["cameras"] == first["cameras"]


def by_hand(index):
    """{what eval.py prints: percent}, from a loop written from the protocol; every drawn query is valid and nothing is tied."""
    queries = index.queries
    scores = (queries.embeddings.double() @ index.embeddings.double().T).numpy()
    g_pids, g_camids = index.pids.numpy(), index.camids.numpy()
    values, same, different = [], [], []
    for score, pid, camid in zip(scores, queries.pids.tolist(), queries.camids.tolist()):
        counts = (g_pids >= 0) & ~((g_pids == pid) & (g_camids == camid))
        same += score[counts & (g_pids == pid)].tolist()
        different += score[counts & (g_pids != pid)].tolist()
        right = (g_pids == pid)[counts][np.argsort(-score[counts], kind="stable")]
        ranks = np.flatnonzero(right) + 1
        nth = np.arange(1, len(ranks) + 1)
        before = np.where(ranks > 1, (nth - 1) / np.maximum(ranks - 1, 1), 1)
        values.append([(nth / ranks).mean(), ((nth / ranks + before) / 2).mean(), *(ranks[0] <= k for k in (1, 5, 10, 20)),
                       len(ranks) / ranks[-1], *(right[k - 1] for k in (1, 5, 10))])
    row, tar = 100 * np.mean(values, 0), {}
    different = sorted(different, reverse=True)
    for far in [far for far in (1e-4, 1e-3, 1e-2) if far * len(different) >= 10]:
        threshold = different[int(far * len(different))]
        tar[far] = 100 * np.mean(np.array(same) > threshold), threshold
    return row, tar, len(queries), len(index)


def test_eval_prints_the_numbers(people, workplace):
    out = works(workplace, "eval.py", "--exp_name", "small", "--data_root", people, "--load_index", "--rerank",
                "--no-camera_norm", "--far", "0.01")
    lines = out.splitlines()
    row, tar, queries, images = by_hand(GalleryIndex.load(workplace / "index" / "small.pt"))
    assert lines[0] == f"small on {people}: {queries} queries, {images} images in the gallery, mirrored images averaged"
    heads = ["mAP", "mAP trapezoid", "Rank-1", "Rank-5", "Rank-10", "Rank-20", "mINP", "match rate at 1 / 5 / 10"]
    (table,) = (i for i, line in enumerate(lines) if line.split() == "  ".join(heads).split())
    number = r"(\d+\.\d\d)"
    for name, line in zip(("plain", r"\+rerank"), lines[table + 1 : table + 3], strict=True):
        found = re.fullmatch(rf"{name} +{r' +'.join([number] * 7)} +{' / '.join([number] * 3)}", line)
        assert found, line
        if name == "plain":
            assert [float(value) for value in found.groups()] == pytest.approx(row, abs=0.006)
    intervals = [line for line in lines if line.startswith("95 % interval")]
    for name, line in zip(("plain", "+rerank"), intervals, strict=True):
        spans = re.fullmatch(rf"95 % interval over the queries, {re.escape(name)}: mAP {number} to {number}, "
                             rf"Rank-1 {number} to {number}", line)
        low, high, low1, high1 = map(float, spans.groups())
        assert name != "plain" or (low < row[0] < high and low1 <= row[2] <= high1)
    assert f"{queries} queries valid, 0 skipped" in lines
    printed = [line for line in lines if line.startswith("TAR@FAR")]
    for far, line in zip(tar, printed, strict=True):
        share, threshold = map(float, re.fullmatch(rf"TAR@FAR {far:g}: {number} % \(cosine above (\d\.\d{{4}})\)", line).groups())
        assert (share, threshold) == (pytest.approx(tar[far][0], abs=0.006), pytest.approx(tar[far][1], abs=6e-5))


def test_inference_ranks_the_gallery(root, people, workplace):
    queries = [str(path) for path in sorted((people / "query").rglob("*.jpg"))[:3]]
    command = [sys.executable, root / "inference.py", "--exp_name", "small", "--data_root", people, "--load_index",
               "--query_paths", *queries, "--topk", "10", "--json", "ranking.json", "--output", "ranking.png"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads((workplace / "ranking.json").read_text())
    assert [item["query"] for item in document["rankings"]] == queries
    for item in document["rankings"]:
        scores = [hit["score"] for hit in item["hits"]]
        assert len(scores) == 10 and scores == sorted(scores, reverse=True)
        assert all((workplace / hit["path"]).exists() for hit in item["hits"])
    assert len(re.findall(r"^ +\d+  0\.\d{4}  .*(?:  match|no match)$", done.stdout, re.MULTILINE)) == 30
    assert (workplace / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_is_one_line_on_a_terminal(root, workplace):
    command = [sys.executable, root / "eval.py", "--exp_name", "small", "--data_root", "nowhere"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch("eval.py: error: nowhere/gallery: no such folder.*\n", done.stderr), done.stderr
