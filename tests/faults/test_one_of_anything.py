"""One query, one gallery image, one identity, one camera, one pair, an empty folder: the right answer, or one line."""

import json
from itertools import count
from pathlib import Path

import pytest
from forked import Script
from PIL import Image

COLOURS = {1: "red", 2: "blue", 3: "green", 0: "grey", -1: "white"}


def draw(people):
    """Write images of people, {split: [(identity, camera or None)]}, each identity in a colour of its own."""
    numbers = count()
    for split in ("train", "val", "query", "gallery"):
        Path("people", split).mkdir(parents=True)
        for (pid, camera), number in zip(people.get(split, ()), numbers):
            person = f"{pid:04}" if pid >= 0 else "-1"
            file = Path("people", split, person, f"{person}_c{camera}s1_{number:06}_00.png" if camera else f"{number}.png")
            file.parent.mkdir(exist_ok=True)
            picture = Image.new("RGB", (8, 16), COLOURS[pid])
            picture.paste((9 * number,) * 3, (0, 0, 3, 3))  # no two images are the same
            picture.save(file)


MANY = [(1, 1), (1, 2), (2, 1), (2, 2)]
PEOPLE = {  # kind: (images, whether the query has a match)
    "one query": ({"query": [(1, 3)], "gallery": MANY, "train": MANY}, True),
    "one gallery image": ({"query": [(1, 3), (2, 3)], "gallery": [(1, 1)], "train": MANY}, True),
    "one gallery image of somebody else": ({"query": [(1, 3)], "gallery": [(2, 1)], "train": [(1, 1)]}, False),
    "one identity": ({"query": [(1, 3)], "gallery": MANY[:2], "train": MANY[:2]}, True),
    "one camera": ({"query": [(1, 1)], "gallery": [(1, 1), (2, 1)], "train": [(1, 1), (2, 1)]}, False),
    "no camera": ({"query": [(1, None)], "gallery": [(1, None), (2, None)], "train": [(1, None)]}, True),
    "one pair": ({"query": [(1, 1)], "gallery": [(1, 2)], "train": [(1, 1), (1, 2)]}, True),
    "no person": ({"query": [(1, 1)], "gallery": [(0, 2), (-1, 2)], "train": [(0, 1)]}, False),
    "an image of each camera": ({"query": [(1, 3)], "gallery": [(1, 1), (2, 2)], "train": [(1, 1), (2, 2)]}, True),
    "no query": ({"gallery": MANY, "train": MANY}, None), "no gallery": ({"query": [(1, 1)], "train": MANY}, None),
    "no training": ({"query": [(1, 3)], "gallery": MANY}, True)}
EVAL = ["", "--save_index", *(f"--load_index {more}" for more in (
    "--report r.html", "--rerank", "--multi_query", "--spacetime", "--spacetime --rerank --no-camera_norm", "--single_shot 2",
    "--protocol nocam", "--protocol viper", "--far 1 --report r.html"))]
SEARCH = ["", "--save_index", *(f"--load_index {more}" for more in (
    "", "--rerank --output r.png", "--spacetime", "--spacetime --rerank", "--topk 1000", "--cameras 1 --frames 0 5")),
    "--gallery people/gallery --save_index --overwrite"]
MAY_FAIL = {"--spacetime", "--protocol", "--cameras"}  # which need more than one of something


@pytest.mark.parametrize("kind", PEOPLE)
def test_one_of_anything_is_evaluated_and_searched(here, kind):
    people, match = PEOPLE[kind]
    draw(people)
    for name, table in ("eval", EVAL), ("inference", SEARCH):
        for options in table:
            Path("r.json").unlink(missing_ok=True)
            files = ["--data_root", "people", "--gallery_uri", f"{name}.pt", "--json", "r.json"]
            status, out, lines = here(name, *here.network, *files, *options.split())
            what = kind, name, options, out, lines
            if status:
                assert status == 1 and lines[-1].startswith(f"{name}.py: error: ") and "Traceback" not in str(lines), what
                assert not Path("r.json").exists(), what
            may_fail = match is None or (name == "eval" and not match) or MAY_FAIL & {*options.split()}
            assert status == 0 or may_fail, what
            if status or match is None:
                continue
            document = json.loads(Path("r.json").read_text())
            assert "nan" not in (json.dumps(document) + out).lower(), what
            if name == "eval" and match:
                assert document["results"]["plain"]["mAP"] == 1, what
            if name == "inference" and match and not {"--cameras", "--save_index"} & {*options.split()}:  # --save_index: no query
                assert "/0001/" in document["rankings"][0]["hits"][0]["path"], what


def test_a_gallery_from_which_everybody_was_erased(here):
    draw({"query": [(1, 3)], "gallery": [(1, 1)], "train": [(1, 1)]})
    assert here("inference", *here.network, "--add", "people/gallery", "--gallery_uri", "x.pt")[0] == 0
    assert here("inference", *here.network, "--remove", "1", "--gallery_uri", "x.pt")[0] == 0
    for options in (["--query_paths", "people/query"], ["--group", "g"]):
        assert "holds no image" in here.refused("inference", *here.network, "--load_index", "--gallery_uri", "x.pt", *options)
    assert here("inference", *here.network, "--list", "--gallery_uri", "x.pt")[0] == 0


@pytest.mark.parametrize("people, words", [
    ({"train": MANY[:2]}, "1 identities to train on"), ({"train": [(1, 1)]}, "1 identities to train on"),
    ({"train": [(0, 1)]}, "0 identities to train on"), ({}, "no images")])
def test_training_sets_that_are_too_small(here, people, words):
    draw(people)
    assert words in here.refused("train", "--data_root", "people", "--weights", "none", "--batch_size", 4, "--num_instances", 2,
                                 "--height", 32, "--width", 32, "--train_all")
    assert "no images" in here.refused("train", "--data_root", "people")  # in val/
    assert not list(Path("models").glob("*"))


def test_the_smallest_training_set(here, database, tmp_path):
    """One image each of two identities, under one camera, and an empty val/."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    draw({"train": [(1, 1), (2, 1)]})
    (tmp_path / "mlflow.db").hardlink_to(database)
    small = ["--weights", "none", "--batch_size", 4, "--num_instances", 2, "--height", 32, "--width", 32, "--num_epochs", 1]
    Script(tmp_path, "train.py", "--data_root", "people", *small, "--exp_name", "two", "--train_all").works()
    assert Path("models/two/best.pth").exists()
    assert not EventAccumulator("runs/two").Reload().Tags()["images"]  # which takes --projector
