"""Two and three gloo processes embed and search as one process does."""

import json
import shutil

import pytest
import torch
from forked import ranks
from tiny_network import tiny_model

from reid.checkpoint import save_checkpoint
from reid.data.datasets import read_folder, read_split
from reid.data.names import parse_name
from reid.retrieval.extract import Extractor
from reid.retrieval.index import GalleryIndex

WORK = """
import sys, torch
import torch.distributed as dist
from reid import distributed
from reid.data.datasets import read_folder
from reid.retrieval.extract import Extractor
from reid.retrieval.index import GalleryIndex

rank, world_size = distributed.start("cpu")
extractor = Extractor(sys.argv[1], "cpu", "fp32")
records, out = read_folder(sys.argv[2]), {}
for name, some in (("all", records), ("two", records.select(torch.arange(2))), ("one", records.select(torch.arange(1)))):
    index = GalleryIndex.build(extractor, some, dtype=torch.float32, progress=False, rank=rank, world_size=world_size)
    exclude = torch.arange(-1, len(index))[:3][: len(index)]
    scores, rows = index.nearest(index.embeddings[:3], 6, range(-1, 5), None, exclude, rank, world_size)
    out[name] = {"embeddings": index.embeddings, "paths": list(index.paths), "pids": index.pids, "rows": rows,
                 "bad": [str(file) for file, *_ in index.bad], "scores": scores}
    if name == "all":  # brought up to date: every second row is kept
        old = index.select(torch.arange(0, len(index), 2))
        again = GalleryIndex.build(extractor, some, False, torch.float32, False, rank, world_size, old)
        assert again.kept == len(old) and list(again.paths) == list(index.paths) and torch.equal(again.mtimes, index.mtimes)
        torch.testing.assert_close(again.embeddings, index.embeddings, atol=1e-6, rtol=0)
torch.save(out, f"{sys.argv[3]}/{rank}.pt")
distributed.stop()
"""


@pytest.fixture(scope="module")
def made(people, tmp_path_factory):
    """(checkpoint, folder of people with two files that are no images)."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    save_checkpoint(folder / "best.pth", tiny_model(), {}, {})
    gallery = folder / "gallery"
    gallery.mkdir()
    for i, file in enumerate(sorted((people / "gallery").rglob("*.jpg"))[:23]):
        (gallery / file.name).write_bytes(b"no image" if i in (3, 10) else file.read_bytes())
    for twin in ("9998_c1.jpg", "9999_c2.jpg"):  # equal scores
        (gallery / twin).write_bytes(sorted(gallery.iterdir())[0].read_bytes())
    (folder / "work.py").write_text(WORK)
    return folder / "best.pth", gallery


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_make_the_index_that_one_process_makes(made, tmp_path, world_size):
    checkpoint, gallery = made
    for rank in ranks(world_size, tmp_path, checkpoint.parent / "work.py", checkpoint, gallery, tmp_path):
        rank.works()
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]

    records, extractor = read_folder(gallery), Extractor(checkpoint, "cpu", "fp32")
    for name, some in (("all", records), ("two", records.select(torch.arange(2))), ("one", records.select(torch.arange(1)))):
        index = GalleryIndex.build(extractor, some, dtype=torch.float32, progress=False)
        queries = index.embeddings[:3]
        scores, rows = index.nearest(queries, 6, range(-1, 5), None, torch.arange(-1, len(index))[:3][: len(index)])
        for result in results:
            found = result[name]
            assert found["paths"] == list(index.paths) and torch.equal(found["pids"], index.pids)
            assert sorted(found["bad"]) == sorted(str(file) for file, *_ in index.bad)
            torch.testing.assert_close(found["embeddings"], index.embeddings, atol=1e-6, rtol=0)
            torch.testing.assert_close(found["scores"], scores, atol=1e-6, rtol=0)
            for query, ours, expected, score in zip(queries, found["rows"].tolist(), rows.tolist(), scores):
                # embeddings differ in the last bit, so images whose scores are equal to the last bit may swap their places
                count = sum(row >= 0 for row in expected)
                assert len(set(ours[:count])) == count and ours[count:] == expected[count:]
                torch.testing.assert_close(index.embeddings[ours[:count]] @ query, score[:count], atol=1e-6, rtol=0)
    assert len(index) == 1 and len(results[0]["all"]["paths"]) == 23


def test_scripts_on_three_ranks_write_and_find_what_one_finds(made, people, tmp_path):
    """eval.py keeps the index with its queries; inference.py makes one of a folder, keeps it, and searches it in three parts."""
    checkpoint = tmp_path / "models/tiny/best.pth"
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(made[0], checkpoint)
    images = sorted((people / "query").rglob("*.jpg"))[:4]
    for script, *options in (("eval.py", "--data_root", people),
                             ("inference.py", "--gallery", people / "gallery", "--topk", 7, "--query_paths", *images)):
        arguments = ["--exp_name", "tiny", "--device", "cpu", "--precision", "fp32", *options,
                     "--save_index", "--gallery_uri", f"{script}.pt", "--json", f"{script}.json"]
        out = "".join(rank.works().out for rank in ranks(3, tmp_path, script, *arguments))
        assert out.count("index saved") == 1, out

    extractor = Extractor(checkpoint, "cpu", "fp32")
    evaluated, searched = GalleryIndex.load(tmp_path / "eval.py.pt"), GalleryIndex.load(tmp_path / "inference.py.pt")
    for found, records in ((evaluated, read_split(people, "gallery")), (evaluated.queries, read_split(people, "query")),
                           (searched, read_folder(people / "gallery"))):
        index = GalleryIndex.build(extractor, records, progress=False)
        assert list(found.paths) == list(index.paths) and torch.equal(found.pids, index.pids)
        torch.testing.assert_close(found.embeddings, index.embeddings, atol=1e-3, rtol=0)
    index = index.camera_normalised()  # as inference.py does
    embeddings = index.normalise(extractor.embed(images), torch.tensor([parse_name(path.name).camid for path in images]))
    scores, row_of = index.nearest(embeddings, 7)[0], {str(people / "gallery" / path): i for i, path in enumerate(index.paths)}
    rankings = json.loads((tmp_path / "inference.py.json").read_text())["rankings"]
    for ranking, query, score in zip(rankings, embeddings, scores, strict=True):
        rows = [row_of[hit["path"]] for hit in ranking["hits"]]
        assert len(set(rows)) == 7
        torch.testing.assert_close(torch.tensor([hit["score"] for hit in ranking["hits"]]), score, atol=1e-3, rtol=0)
        torch.testing.assert_close(index.embeddings[rows].float() @ query, score, atol=1e-3, rtol=0)
