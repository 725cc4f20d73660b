"""The scripts one after the other on drawn people: train, evaluate, query, and errors. Some are started as a shell does."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from forked import Script
from PIL import Image

from reid import ReidError
from reid.checkpoint import load_checkpoint, restore_model, save_checkpoint
from reid.model import build_model, default_config
from reid.retrieval.index import GalleryIndex


def works(folder, name, *args, status=0):
    return Script(folder, name, *args).works(status).out


def fails(folder, name, *args):
    """The one line of an error."""
    return Script(folder, name, *args).fails()


@pytest.fixture(scope="module")
def workplace(root, people, tmp_path_factory):
    """A folder with the run "small", trained from "start" (the default model with noise on its weights), and the untrained
    network "blank". All are evaluated with --save_index."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    save_checkpoint(folder / "models/blank/best.pth", build_model(default_config([1, 2], height=64, width=32)), {}, {})
    started = load_checkpoint(root / "models" / "masked-hog-908" / "best.pth")
    started["config"].update(height=64, width=32)
    started["state_dict"] = {name: weight.float() + 1.5 * weight.float().std() * torch.randn(weight.shape)
                             if weight.ndim == 4 else weight for name, weight in started["state_dict"].items()}
    save_checkpoint(folder / "models/start/best.pth", restore_model(started), {}, {})
    works(folder, "train.py", "--data_root", people, "--exp_name", "small", "--weights", folder / "models/start/best.pth",
          "--num_epochs", 8, "--height", 64, "--width", 32, "--batch_size", 16, "--lr", 0.01, "--warmup_epochs", 1)
    for run in ("small", "blank", "start"):
        works(folder, "eval.py", "--exp_name", run, "--data_root", people, "--save_index", "--json", f"{run}.json", "--far", 0.01)
    return folder


def plain(workplace, name):
    return json.loads((workplace / f"{name}.json").read_text())["results"]["plain"]


def test_training_raises_rank_1_and_map(workplace):
    results = {run: plain(workplace, run) for run in ("small", "blank", "start")}
    for before in ("blank", "start"):
        assert results["small"]["rank"]["1"] > results[before]["rank"]["1"] + 0.1
        assert results["small"]["mAP"] > results[before]["mAP"] + 0.1


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


def test_inference_finds_queries_and_defaults(people, workplace):
    options = ("--exp_name", "small", "--data_root", people, "--load_index", "--json", "found.json")

    def found(*paths):
        works(workplace, "inference.py", *options, *(("--query_paths", *paths) if paths else ()))
        return [item["query"] for item in json.loads((workplace / "found.json").read_text())["rankings"]]

    everything = sorted(str(path) for path in (people / "query").rglob("*.jpg"))
    assert found() == everything[:1]
    assert found(people / "query") == everything
    assert found(f"{people}/query/*/*_c1*.jpg") == [path for path in everything if "_c1" in path]


def test_inference_on_any_folder(people, workplace, tmp_path):
    for i, path in enumerate(sorted((people / "gallery").rglob("*.jpg"))[:6]):
        shutil.copy(path, tmp_path / f"no pattern {i}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    own = ("--exp_name", "small", "--gallery", tmp_path, "--gallery_uri", "index/own.pt")
    search = (*own, "--query_paths", tmp_path / "no pattern 3.jpg", tmp_path / "broken.jpg", "--topk", 2)
    done = Script(workplace, "inference.py", *search, "--save_index").works(3)
    again = Script(workplace, "inference.py", *search, "--load_index").works(3)
    assert again.err.splitlines() == [line for line in done.err.splitlines() if "left out" in line]
    assert again.out.partition("\nquery")[2] == done.out.partition("\nquery")[2]
    assert done.err.count("left out: ") == 2 and f"{tmp_path}/broken.jpg" in done.err  # as a query and in the gallery
    assert re.search(r"1  (?:1\.000\d|0\.999\d)  .*no pattern 3\.jpg", done.out)
    assert "broken.jpg" in fails(workplace, "inference.py", "--exp_name", "small", "--gallery", tmp_path, "--strict",
                                 "--query_paths", tmp_path / "no pattern 3.jpg")


def test_errors_of_inference(people, workplace, tmp_path):
    small = ("--exp_name", "small", "--data_root", people)
    assert "no such image" in fails(workplace, "inference.py", *small, "--load_index", "--query_paths", "nowhere.jpg")
    assert "--exp_name nobody" in fails(workplace, "inference.py", "--exp_name", "nobody", "--data_root", people)
    assert "no such folder" in fails(workplace, "inference.py", "--exp_name", "small", "--data_root", "nowhere")
    assert "index/other.pt" in fails(workplace, "inference.py", *small, "--load_index", "--gallery_uri", "index/other.pt")
    stale = fails(workplace, "inference.py", *small, "--load_index", "--gallery_uri", "index/blank.pt")
    assert "eval.py --save_index" in stale and "--exp_name blank" not in stale  # the name of a file is not that of its run
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    assert "none of the queries" in fails(workplace, "inference.py", *small, "--load_index", "--query_paths", text)
    assert "--topk 0" in fails(workplace, "inference.py", *small, "--load_index", "--topk", 0)
    assert "text.jpg: is a file; give a folder" in fails(workplace, "inference.py", *small, "--gallery", text)
    assert fails(workplace, "inference.py", *small, "--load_index", "--gallery_uri", text).endswith(
        "text.jpg: not a readable reid-index file; it is damaged or not ours")


def test_queries_are_read_before_the_gallery_is_embedded(people, workplace, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    script = Script(workplace, "inference.py", "--exp_name", "small", "--data_root", people,
                    "--query_paths", tmp_path / "text.jpg")
    assert "none of the queries" in script.fails() and "img/s" not in script.err  # no progress bar


def test_errors_of_eval(root, people, workplace, tmp_path):
    command = [sys.executable, root / "eval.py", "--exp_name", "small", "--data_root", "nowhere"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch("eval.py: error: nowhere/gallery: no such folder.*\n", done.stderr), done.stderr
    for split in ("gallery", "query"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    assert "no images" in fails(workplace, "eval.py", "--exp_name", "small", "--data_root", tmp_path / "empty")
    assert "runs here: blank, small" in fails(workplace, "eval.py", "--exp_name", "nobody", "--data_root", people)
    small = ("--exp_name", "small", "--load_index", "--data_root")
    assert "made of" in fails(workplace, "eval.py", *small, tmp_path)
    assert "--mirror" in fails(workplace, "eval.py", *small, people, "--no-mirror")
    assert "--multi_query" in fails(workplace, "eval.py", *small, people, "--multi_query", "--spacetime")
    assert "--multi_query" in fails(workplace, "eval.py", *small, people, "--multi_query", "--protocol", "nocam")


def test_an_index_of_another_folder_is_refused(people, workplace, tmp_path):
    """--load_index reads, and --save_index replaces, only the index of the folder that is asked for."""
    shutil.copytree(people, tmp_path / "data")
    index = (workplace / "index" / "small.pt").read_bytes()
    own = ("--gallery", tmp_path / "data" / "gallery")
    for name, *options in (("eval.py", "--data_root", tmp_path / "data"), ("inference.py", "--data_root", tmp_path / "data"),
                           ("inference.py", "--data_root", people, *own, "--gallery_uri", "index/small.pt")):
        assert "index/small.pt: made of" in fails(workplace, name, "--exp_name", "small", *options, "--load_index")
        line = fails(workplace, name, "--exp_name", "small", *options, "--save_index")
        assert "name another, such as --gallery_uri" in line
    line = fails(workplace, "inference.py", "--exp_name", "small", *own, "--load_index", "--query_paths", people / "query")
    assert "index/small--gallery.pt: no such index" in line
    assert "give one of them" in fails(workplace, "inference.py", "--exp_name", "small", "--data_root", people,
                                       "--load_index", "--save_index")
    victim = sorted((people / "gallery").rglob("*.jpg"))[0]
    content, mode = victim.read_bytes(), victim.stat().st_mode
    try:
        victim.unlink()
        victim.write_bytes(content + b"x")
        for name in ("eval.py", "inference.py"):
            line = fails(workplace, name, "--exp_name", "small", "--data_root", people, "--load_index")
            assert f"(1 changed, such as gallery/{victim.parent.name}/{victim.name}); bring it up to date: python eval.py" in line
        assert (workplace / "index" / "small.pt").read_bytes() == index
        command = shlex.split(line.partition("python ")[2])
        out = works(workplace, *command)
        assert re.search(r"small.pt: gallery \d+ images kept, 1 embedded, 0 dropped; queries \d+ images kept, 0 embedded, 0", out)
    finally:
        victim.write_bytes(content)
        victim.chmod(mode)
    assert "1 embedded" in works(workplace, *command)


def test_outputs_never_replace_inputs(people, workplace, tmp_path):
    query = tmp_path / "q-001.png"
    Image.new("RGB", (32, 64), "red").save(query)
    shutil.copy(query, tmp_path / "q.png")
    (tmp_path / "link.png").symlink_to(query)
    kept = [query, workplace / "models/small/best.pth", workplace / "models/small/last.pth", workplace / "index/small.pt"]
    before = [path.read_bytes() for path in kept]
    small = ("--exp_name", "small", "--data_root", people, "--load_index", "--query_paths", query)
    for output in (query, tmp_path / "x" / ".." / "q-001.png", tmp_path / "q.png", tmp_path / "link.png"):  # q.png: sheet 1
        (tmp_path / "x").mkdir(exist_ok=True)
        for more in ([], ["--overwrite"]):
            assert "is read by the same command" in fails(workplace, "inference.py", *small, "--output", output, *more)
    image = next((people / "gallery").rglob("*.jpg"))
    assert "is read by" in fails(workplace, "inference.py", *small, "--output", image)
    for path in kept:
        assert f"--json {path}: give a file that ends in .json" in fails(workplace, "inference.py", *small, "--json", path)
        assert "ends in .json" in fails(workplace, "eval.py", "--exp_name", "small", "--data_root", people, "--json", path)
        uri = ("--save_index", "--gallery_uri", path)
        if path.suffix != ".pt":
            for name in ("eval.py", "inference.py"):
                assert f"{path}: " in fails(workplace, name, "--exp_name", "small", "--data_root", people, *uri)
    assert [path.read_bytes() for path in kept] == before


def test_an_index_of_one_image(people, workplace, tmp_path):
    shutil.copy(next((people / "gallery").rglob("*.jpg")), tmp_path / "one.jpg")
    one = ("--exp_name", "small", "--gallery", tmp_path, "--query_paths", tmp_path / "one.jpg", "--gallery_uri", "index/one.pt")
    assert "index saved: index/one.pt" in works(workplace, "inference.py", *one, "--save_index")
    assert len(GalleryIndex.load(workplace / "index/one.pt")) == 1
    out = works(workplace, "inference.py", *one, "--load_index", "--rerank")
    assert re.search(rf"^   1  \d\.\d{{4}}  {re.escape(str(tmp_path))}/one\.jpg$", out, re.MULTILINE)


def test_python_api(people, workplace, monkeypatch):
    """The lines of the README: boxes of a frame, a gallery with names, its file, a search."""
    monkeypatch.chdir(workplace)
    crops = [Image.open(next((people / "gallery" / pid).glob("*.jpg"))) for pid in sorted(os.listdir(people / "gallery"))[1:3]]
    frame = np.full((300, 400, 3), 128, np.uint8)
    boxes = []
    for number, crop in enumerate(crops):
        left = 10 + 150 * number
        frame[20 : 20 + crop.height, left : left + crop.width] = np.asarray(crop.convert("RGB"))
        boxes.append((left, 20, left + crop.width, 20 + crop.height))
    boxes.append((50, 60, 50, 80))  # empty

    from reid import Extractor, GalleryIndex

    extractor = Extractor("small")
    with pytest.warns(UserWarning):
        embeddings = extractor.embed(frame, boxes=boxes)
    gallery = GalleryIndex.empty(extractor, threshold=0.99)
    with pytest.warns(UserWarning, match="1 of 3 embeddings are not finite"):
        assert gallery.add(embeddings, names=["anna", "ben", "nobody"]) == 2
    gallery.save("index/door.pt")
    for index in (gallery, GalleryIndex.load("index/door.pt", extractor)):
        anna, ben, empty = index.search(embeddings, topk=5)
        assert (anna.names, ben.names, len(empty)) == (["anna", "ben"], ["ben", "anna"], 0)
        assert anna.scores[0] == pytest.approx(1, abs=1e-3) and anna.matches.tolist() == [True, False]
    with pytest.raises(ReidError, match="other weights"):
        GalleryIndex.load("index/door.pt", Extractor("blank"))


def test_names_of_the_python_api():
    import reid

    assert sorted(reid.__all__) == ["Extractor", "GalleryIndex", "ReidError", "__version__", "evaluate"]
    assert {*reid.__all__} <= {*dir(reid)}
    assert reid.evaluate.__module__ == "reid.retrieval.metrics"


def test_a_truncated_image_is_left_out_and_named(people, workplace, tmp_path):
    shutil.copytree(people, tmp_path / "data")
    victim = sorted((tmp_path / "data" / "gallery").rglob("*.jpg"))[20]
    victim.chmod(0o644)
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content[: len(content) // 2])
    done = Script(workplace, "eval.py", "--exp_name", "small", "--data_root", tmp_path / "data").works(3)
    assert f"left out: {victim}" in done.err and "1 images could not be read" in done.err
    assert victim.name in fails(workplace, "eval.py", "--exp_name", "small", "--data_root", tmp_path / "data", "--strict")
