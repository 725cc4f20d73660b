"""eval.py and inference.py by their command lines, in this process, with a network of four layers."""

import json
import os
import re
import shlex
import shutil
import threading
from contextlib import chdir

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from tiny_network import tiny_model

import eval as evaluate
from reid import ReidError
from reid.checkpoint import save_checkpoint
from reid.images import decode, resize
from reid.retrieval.index import GalleryIndex


@pytest.fixture(scope="module")
def trained(people, tmp_path_factory):
    """A folder with the networks "small" and "blank", evaluated with --save_index."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    crops = resize([decode(file) for file in sorted(people.rglob("*.jpg"))[::8]], (64, 32))
    for run in ("small", "blank"):
        model = tiny_model()
        model.neck.momentum = None  # its statistics are those of one batch: then the embeddings of people differ
        model(crops)
        save_checkpoint(folder / "models" / run / "best.pth", model, {}, {})
        with chdir(folder):
            arguments = ["--exp_name", run, "--data_root", str(people), "--save_index", "--far", "0.01"]
            evaluate.main(evaluate.get_args_parser().parse_args(arguments))
    return folder


@pytest.fixture
def workplace(trained, monkeypatch):
    """That folder as the working folder."""
    monkeypatch.chdir(trained)
    return trained


def test_inference_finds_queries_and_defaults(here, people, workplace):
    options = ("--exp_name", "small", "--data_root", people, "--load_index", "--json", "found.json")

    def found(*paths):
        here.works("inference", *options, *(("--query_paths", *paths) if paths else ()))
        return [item["query"] for item in json.loads((workplace / "found.json").read_text())["rankings"]]

    everything = sorted(str(path) for path in (people / "query").rglob("*.jpg"))
    assert found() == everything[:1]
    assert found(people / "query") == everything
    assert found(f"{people}/query/*/*_c1*.jpg") == [path for path in everything if "_c1" in path]


def test_inference_on_any_folder(here, people, workplace, tmp_path):
    for i, path in enumerate(sorted((people / "gallery").rglob("*.jpg"))[:6]):
        shutil.copy(path, tmp_path / f"no pattern {i}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    own = ("--exp_name", "small", "--gallery", tmp_path, "--gallery_uri", "index/own.pt")
    search = (*own, "--query_paths", tmp_path / "no pattern 3.jpg", tmp_path / "broken.jpg", "--topk", 2)
    out, err = here.works("inference", *search, "--save_index", status=3)
    found, left_out = here.works("inference", *search, "--load_index", status=3)
    assert left_out == [line for line in err if "left out" in line]
    assert found.partition("\nquery")[2] == out.partition("\nquery")[2]
    assert len(left_out) == 3 and f"{tmp_path}/broken.jpg" in left_out[0]  # as a query, in the gallery, and their number
    assert re.search(r"1  (?:1\.000\d|0\.999\d)  .*no pattern 3\.jpg", out)
    assert "broken.jpg" in here.refused("inference", "--exp_name", "small", "--gallery", tmp_path, "--strict",
                                 "--query_paths", tmp_path / "no pattern 3.jpg")


def test_an_index_of_other_weights(here, people, workplace):
    small = ("--exp_name", "small", "--data_root", people, "--load_index")
    line = here.refused("inference", *small, "--gallery_uri", "index/blank.pt")
    assert "eval.py --save_index" in line and "--exp_name blank" not in line  # the name of a file is not that of its run


def test_queries_are_read_before_the_gallery_is_embedded(here, people, workplace, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    status, _, lines = here("inference", "--exp_name", "small", "--data_root", people, "--query_paths", tmp_path / "text.jpg")
    assert status == 1 and "none of the queries" in lines[0] and len(lines) == 1  # no progress bar


def test_an_index_of_another_folder_is_refused(here, people, workplace, tmp_path):
    """--load_index reads, and --save_index replaces, only the index of the folder that is asked for."""
    shutil.copytree(people, tmp_path / "data")
    index = (workplace / "index" / "small.pt").read_bytes()
    own = ("--gallery", tmp_path / "data" / "gallery")
    for name, *options in (("eval", "--data_root", tmp_path / "data"), ("inference", "--data_root", tmp_path / "data"),
                           ("inference", "--data_root", people, *own, "--gallery_uri", "index/small.pt")):
        assert "index/small.pt: made of" in here.refused(name, "--exp_name", "small", *options, "--load_index")
        line = here.refused(name, "--exp_name", "small", *options, "--save_index")
        assert "name another, such as --gallery_uri" in line
    line = here.refused("inference", "--exp_name", "small", *own, "--load_index", "--query_paths", people / "query")
    assert "index/small--gallery.pt: no such index" in line
    assert "give one of them" in here.refused("inference", "--exp_name", "small", "--data_root", people,
                                       "--load_index", "--save_index")
    victim = sorted((people / "gallery").rglob("*.jpg"))[0]
    content, mode = victim.read_bytes(), victim.stat().st_mode
    try:
        victim.unlink()
        victim.write_bytes(content + b"x")
        for name in ("eval", "inference"):
            line = here.refused(name, "--exp_name", "small", "--data_root", people, "--load_index")
            assert f"(1 changed, such as gallery/{victim.parent.name}/{victim.name}); bring it up to date: python eval.py" in line
        assert (workplace / "index" / "small.pt").read_bytes() == index
        _, *command = shlex.split(line.partition("python ")[2])
        out, _ = here.works("eval", *command)
        assert re.search(r"small.pt: gallery \d+ images kept, 1 embedded, 0 dropped; queries \d+ images kept, 0 embedded, 0", out)
    finally:
        victim.write_bytes(content)
        victim.chmod(mode)
    assert "1 embedded" in here.works("eval", *command)[0]


def test_outputs_never_replace_inputs(here, people, workplace, tmp_path):
    query = tmp_path / "q-001.png"
    Image.new("RGB", (32, 64), "red").save(query)
    shutil.copy(query, tmp_path / "q.png")
    (tmp_path / "link.png").symlink_to(query)
    kept = [query, workplace / "models/small/best.pth", workplace / "index/small.pt"]
    before = [path.read_bytes() for path in kept]
    small = ("--exp_name", "small", "--data_root", people, "--load_index", "--query_paths", query)
    for output in (query, tmp_path / "x" / ".." / "q-001.png", tmp_path / "q.png", tmp_path / "link.png"):  # q.png: sheet 1
        (tmp_path / "x").mkdir(exist_ok=True)
        for more in ([], ["--overwrite"]):
            assert "is read by the same command" in here.refused("inference", *small, "--output", output, *more)
    image = next((people / "gallery").rglob("*.jpg"))
    assert "is read by" in here.refused("inference", *small, "--output", image)
    for path in kept:
        assert f"--json {path}: give a file that ends in .json" in here.refused("inference", *small, "--json", path)
        assert "ends in .json" in here.refused("eval", "--exp_name", "small", "--data_root", people, "--json", path)
        uri = ("--save_index", "--gallery_uri", path)
        if path.suffix != ".pt":
            for name in ("eval", "inference"):
                assert f"{path}: " in here.refused(name, "--exp_name", "small", "--data_root", people, *uri)
    assert [path.read_bytes() for path in kept] == before


def test_an_index_of_one_image(here, people, workplace, tmp_path):
    shutil.copy(next((people / "gallery").rglob("*.jpg")), tmp_path / "one.jpg")
    one = ("--exp_name", "small", "--gallery", tmp_path, "--query_paths", tmp_path / "one.jpg", "--gallery_uri", "index/one.pt")
    assert "index saved: index/one.pt" in here.works("inference", *one, "--save_index")[0]
    assert len(GalleryIndex.load(workplace / "index/one.pt")) == 1
    out, _ = here.works("inference", *one, "--load_index", "--rerank")
    assert re.search(rf"^   1  \d\.\d{{4}}  {re.escape(str(tmp_path))}/one\.jpg$", out, re.MULTILINE)


def test_a_server_that_may_write(here, people, workplace, tmp_path, monkeypatch):
    """Into the index that it searches, and with camera statistics and tracklets as they are searched."""
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    from reid.extras import server

    file, query, found = shutil.copy("index/small.pt", tmp_path), next((people / "query").rglob("*.jpg")).read_bytes(), []

    def serve(app, listener):
        running, address = server.make_server(app), f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            requests.post(f"{address}/people", files={"files": query}, data={"name": "anna"}, timeout=60)
            answer = requests.post(f"{address}/search", files={"files": query}, timeout=60).json()
            found.extend((hit["name"], round(hit["score"], 2)) for hit in answer["rankings"][0]["hits"][:1])
        finally:
            running.should_exit = True
            thread.join()

    monkeypatch.setattr(server, "serve", serve)
    options = ("inference", "--exp_name", "small", "--data_root", people, "--gallery_uri", file, "--serve", "--port", 0)
    before = len(GalleryIndex.load(file))
    here.works(*options, "--load_index", "--writable")
    here.works(*options, "--load_index", "--writable", "--tracklets")
    assert found == [("anna", 1.0)] * 2 and len(GalleryIndex.load(file)) == before + 1
    assert "--writable needs --load_index" in here.refused(*options, "--writable")


def test_python_api(people, workplace):
    """The lines of the README: boxes of a frame, a gallery with names, its file, a search."""
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


def test_a_truncated_image_is_left_out_and_named(here, people, workplace, tmp_path):
    shutil.copytree(people, tmp_path / "data")
    victim = sorted((tmp_path / "data" / "gallery").rglob("*.jpg"))[20]
    victim.chmod(0o644)
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content[: len(content) // 2])
    _, err = here.works("eval", "--exp_name", "small", "--data_root", tmp_path / "data", status=3)
    assert f"left out: {victim}: " in err[-2] and "1 images could not be read" in err[-1]
    assert victim.name in here.refused("eval", "--exp_name", "small", "--data_root", tmp_path / "data", "--strict")
