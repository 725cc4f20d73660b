"""The scripts' real command lines, one after the other, on people that the project draws: train, evaluate, query, and errors."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from reid.checkpoint import load_checkpoint, restore_model, save_checkpoint
from reid.model import build_model, default_config

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def script(root, folder, name, *args):
    command = [sys.executable, str(root / name), *map(str, args)]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def works(root, folder, name, *args, status=0):
    done = script(root, folder, name, *args)
    assert done.returncode == status, done.stderr
    return done.stdout


def fails(root, folder, name, *args):
    """The one line of an error."""
    done = script(root, folder, name, *args)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"{name}: error: ")
    return line


@pytest.fixture(scope="module")
def workplace(root, people, tmp_path_factory):
    """A folder with a trained run "small", the untrained network "blank", both evaluated with --save_index."""
    folder = tmp_path_factory.mktemp("workplace")
    default = root / "models" / "masked-hog-908" / "best.pth"
    works(root, folder, "train.py", "--data_root", people, "--exp_name", "small", "--weights", default, "--num_epochs", 4,
          "--height", 64, "--width", 32, "--batch_size", 16, "--lr", 0.01, "--warmup_epochs", 1)
    torch.manual_seed(0)
    save_checkpoint(folder / "models/blank/best.pth", build_model(default_config([1, 2], height=64, width=32)), {}, {})
    started = load_checkpoint(default)
    started["config"].update(height=64, width=32)
    save_checkpoint(folder / "models/start/best.pth", restore_model(started), {}, {})
    for run in ("small", "blank", "start"):
        works(root, folder, "eval.py", "--exp_name", run, "--data_root", people, "--save_index", "--json", f"{run}.json")
    return folder


def visual(workplace, name):
    return json.loads((workplace / f"{name}.json").read_text())["results"]["visual"]


def test_training_raises_rank_1(workplace):
    rank1 = {run: visual(workplace, run)["rank"]["1"] for run in ("small", "blank", "start")}
    assert rank1["small"] > rank1["blank"] + 0.1 and rank1["small"] > rank1["start"] + 0.1, rank1


def test_load_index_gives_the_same_without_the_images(root, people, workplace, tmp_path):
    shutil.copytree(workplace, tmp_path / "copy", symlinks=True)
    out = works(root, tmp_path / "copy", "eval.py", "--exp_name", "small", "--data_root", people, "--load_index",
                "--json", "again.json")
    assert "img/s" not in out
    again = json.loads((tmp_path / "copy" / "again.json").read_text())["results"]["visual"]
    first = visual(workplace, "small")
    assert again["rank"] == first["rank"] and again["mAP"] == pytest.approx(first["mAP"], abs=1e-4)
    assert again["valid"] > 0 and len(again["ap"]) == again["valid"] + sum(again["skipped"].values())


def test_prints_what_it_should(root, people, workplace):
    out = works(root, workplace, "eval.py", "--exp_name", "small", "--data_root", people, "--load_index", "--rerank")
    for text in ("mAP trapezoid", "Rank-1", "Rank-10", "match rate at 1 / 5 / 10", "queries valid", "+rerank",
                 "false-match rate 0.001"):
        assert text in out


def test_inference_ranks_the_gallery(root, people, workplace):
    queries = [str(path) for path in sorted((people / "query").rglob("*.jpg"))[:3]]
    out = works(root, workplace, "inference.py", "--exp_name", "small", "--data_root", people, "--load_index", "--query_paths",
                *queries, "--topk", 10, "--json", "ranking.json", "--output", "ranking.png")
    document = json.loads((workplace / "ranking.json").read_text())
    assert [item["query"] for item in document["rankings"]] == queries
    for item in document["rankings"]:
        scores = [hit["score"] for hit in item["hits"]]
        assert len(scores) == 10 and scores == sorted(scores, reverse=True)
        assert all((workplace / hit["path"]).exists() for hit in item["hits"])
    assert len(re.findall(r"^ +\d+  0\.\d{4}  .*(?:match|unknown)$", out, re.MULTILINE)) == 30
    assert (workplace / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_inference_finds_queries_and_defaults(root, people, workplace):
    options = ("--exp_name", "small", "--data_root", people, "--load_index", "--json", "found.json")

    def found(*paths):
        works(root, workplace, "inference.py", *options, *(("--query_paths", *paths) if paths else ()))
        return [item["query"] for item in json.loads((workplace / "found.json").read_text())["rankings"]]

    everything = sorted(str(path) for path in (people / "query").rglob("*.jpg"))
    assert found() == everything[:1]
    assert found(people / "query") == everything
    assert found(f"{people}/query/*/*_c1*.jpg") == [path for path in everything if "_c1" in path]


def test_inference_on_any_folder(root, people, workplace, tmp_path):
    for i, path in enumerate(sorted((people / "gallery").rglob("*.jpg"))[:6]):
        shutil.copy(path, tmp_path / f"no pattern {i}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    out = script(root, workplace, "inference.py", "--exp_name", "small", "--gallery", tmp_path, "--query_paths",
                 tmp_path / "no pattern 3.jpg", tmp_path / "broken.jpg", "--topk", 2)
    assert out.returncode == 3
    assert out.stderr.count("left out: ") == 2 and f"{tmp_path}/broken.jpg" in out.stderr  # as a query and in the gallery
    assert re.search(r"1  (?:1\.000\d|0\.999\d)  .*no pattern 3\.jpg", out.stdout)
    assert "broken.jpg" in fails(root, workplace, "inference.py", "--exp_name", "small", "--gallery", tmp_path, "--strict",
                                 "--query_paths", tmp_path / "no pattern 3.jpg")


def test_errors_of_inference(root, people, workplace, tmp_path):
    small = ("--exp_name", "small", "--data_root", people)
    assert "no such image" in fails(root, workplace, "inference.py", *small, "--load_index", "--query_paths", "nowhere.jpg")
    assert "--exp_name nobody" in fails(root, workplace, "inference.py", "--exp_name", "nobody", "--data_root", people)
    assert "no such folder" in fails(root, workplace, "inference.py", "--exp_name", "small", "--data_root", "nowhere")
    assert "index/other.pt" in fails(root, workplace, "inference.py", *small, "--load_index", "--gallery_uri", "index/other.pt")
    stale = fails(root, workplace, "inference.py", *small, "--load_index", "--gallery_uri", "index/blank.pt")
    assert "eval.py --save_index" in stale
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    assert "none of the queries" in fails(root, workplace, "inference.py", *small, "--load_index", "--query_paths", text)
    assert "--topk 0" in fails(root, workplace, "inference.py", *small, "--load_index", "--topk", 0)


def test_errors_of_eval(root, people, workplace, tmp_path):
    assert "nowhere/gallery: no such folder" in fails(root, workplace, "eval.py", "--exp_name", "small", "--data_root", "nowhere")
    for split in ("gallery", "query"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    assert "no images" in fails(root, workplace, "eval.py", "--exp_name", "small", "--data_root", tmp_path / "empty")
    assert "runs here: blank, small, start" in fails(root, workplace, "eval.py", "--exp_name", "nobody", "--data_root", people)
    small = ("--exp_name", "small", "--load_index", "--data_root")
    assert "made of" in fails(root, workplace, "eval.py", *small, tmp_path)
    assert "--mirror" in fails(root, workplace, "eval.py", *small, people, "--no-mirror")


def test_a_truncated_image_is_left_out_and_told(root, people, workplace, tmp_path):
    shutil.copytree(people, tmp_path / "data")
    victim = sorted((tmp_path / "data" / "gallery").rglob("*.jpg"))[20]
    victim.chmod(0o644)
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content[: len(content) // 2])
    done = script(root, workplace, "eval.py", "--exp_name", "small", "--data_root", tmp_path / "data")
    assert done.returncode == 3 and f"left out: {victim}" in done.stderr and "1 images could not be read" in done.stderr
    assert victim.name in fails(root, workplace, "eval.py", "--exp_name", "small", "--data_root", tmp_path / "data", "--strict")
