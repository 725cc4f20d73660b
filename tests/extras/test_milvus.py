"""The gallery in Milvus beside the .pt index: the same answers, or a refusal in one line."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import inference
from reid import ReidError
from reid.data.datasets import Records
from reid.retrieval import metrics
from reid.retrieval.gallery import load_index, open_gallery, save_index
from reid.retrieval.index import GalleryIndex

REASON = "pymilvus and milvus-lite are not installed (extra milvus)"
pytest.importorskip("pymilvus", reason=REASON)
pytest.importorskip("milvus_lite", reason=REASON)
from test_ingest import DIM, PRINT, RUN, server  # noqa: E402, F401

from reid.extras.milvus import MilvusGallery  # noqa: E402


def synthetic(size, people=20, seed=0, prefix="g", root="nowhere"):
    """GalleryIndex of random people seen by six cameras; every tenth embedding is that of the image before (ties)."""
    generator = torch.Generator().manual_seed(seed)
    pids = torch.randint(-1, people, (size,), generator=generator)
    camids = torch.randint(1, 7, (size,), generator=generator)
    centres = torch.randn(people + 1, DIM, generator=torch.Generator().manual_seed(9))
    rows = F.normalize(centres[pids] + 1.5 * torch.randn(size, DIM, generator=generator), dim=1)
    rows[10::10] = rows[9 : size - 1 : 10]
    paths = [f"{prefix}/{i % 7}_{i:05d}.jpg" for i in range(size)]
    records = Records(Path(root), paths, pids, camids, torch.ones(size, dtype=torch.int64), torch.arange(size) * 25)
    return GalleryIndex(rows.half(), records, PRINT, True)


def paths_of(gallery, rows):
    return [[gallery.paths[row] if row >= 0 else None for row in line] for line in rows.tolist()]


def make(uri, index, index_type="FLAT"):
    gallery = MilvusGallery.create(uri, RUN, PRINT, True, DIM, index.data_root, index_type)
    gallery.write(index.embeddings, index.records())
    return gallery


@pytest.mark.parametrize("where", ["file", "server"])
def test_same_answers_as_the_index(where, tmp_path, request):
    uri = str(tmp_path / "milvus.db") if where == "file" else request.getfixturevalue("server").uri
    index, queries = synthetic(1000), synthetic(40, seed=1, prefix="q").embeddings.float()
    gallery = make(uri, index)
    queries[:5] = index.embeddings[9:50:10].float()  # each is there twice: ties on top, and at the end of top 1
    assert len(gallery) == gallery.count == 1000
    for topk in (1, 10):
        for only in ({}, {"camids": [1, 4]}, {"camids": [99]}, {"frames": (1000, 2000)}, {"camids": [2], "frames": (0, 9000)}):
            scores, rows = gallery.nearest(queries, topk, **only)
            expected, places = index.nearest(queries, topk, **only)
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
            assert paths_of(gallery, rows) == paths_of(index, places)
    _, rows = gallery.nearest(queries, 3)
    _, places = index.nearest(queries, 3)
    for excluded in (rows[:, 0], rows[:, :2].tolist()):
        found = gallery.nearest(queries, 5, exclude=excluded)[1]
        same = places[:, 0] if isinstance(excluded, torch.Tensor) else places[:, :2].tolist()
        assert paths_of(gallery, found) == paths_of(index, index.nearest(queries, 5, exclude=same)[1])
    first, place = int(rows[0, 0]), int(places[0, 0])
    assert (gallery.pids[first], gallery.camids[first], gallery.frames[first]) == (
        int(index.pids[place]), int(index.camids[place]), int(index.frames[place]))
    torch.testing.assert_close(gallery.embeddings[rows[0]], index.embeddings[places[0]].float())
    assert gallery.cameras == [1, 2, 3, 4, 5, 6] and first in gallery and -1 not in gallery
    torch.testing.assert_close(gallery.embeddings[first], index.embeddings[place].float())
    gallery.close()


def test_equal_scores_beyond_the_margin_stand_in_order(tmp_path):
    index = synthetic(100)
    index.embeddings[21:90] = index.embeddings[21]
    gallery = make(str(tmp_path / "milvus.db"), index)
    _, rows = gallery.nearest(index.embeddings[21:22].float(), 5)
    assert paths_of(gallery, rows) == [list(index.paths)[21:26]]


def test_evaluation_is_the_same(tmp_path):
    index = synthetic(800, seed=3)
    index.queries = synthetic(60, seed=4, prefix="q")
    index.threshold, index.false_match_rate = 0.625, 1e-3
    uri = str(tmp_path / "milvus.db")
    save_index(index, uri, RUN)
    loaded = load_index(uri, RUN, PRINT)
    assert list(loaded.paths) == list(index.paths) and torch.equal(loaded.embeddings, index.embeddings)
    assert (loaded.threshold, loaded.false_match_rate, loaded.mirror) == (0.625, 1e-3, True)
    expected, result = (metrics.evaluate(x.queries.embeddings.float(), x.embeddings.float(), x.queries.pids, x.queries.camids,
                                         x.pids, x.camids) for x in (index, loaded))
    assert result.mAP == pytest.approx(expected.mAP, abs=1e-3) and result.rank[1] == pytest.approx(expected.rank[1], abs=1e-3)
    assert open_gallery(uri, RUN, PRINT).threshold == 0.625
    with pytest.raises(ReidError, match="800 rows"):
        open_gallery(uri, RUN, PRINT).download(limit=10)


def test_approximate_indexes_are_scored_again(tmp_path):
    index, uri = synthetic(600), str(tmp_path / "milvus.db")
    make(uri, index).close()
    for index_type in ("HNSW", "IVF_FLAT", "IVF_SQ8"):  # each over the rows that are there
        gallery = MilvusGallery.create(uri, RUN, PRINT, True, DIM, index.data_root, index_type)
        assert gallery.index_type == index_type and len(gallery) == 600
        scores, rows = gallery.nearest(index.embeddings[:10].float(), 10)
        exact = torch.stack([gallery.embeddings[line] @ query for line, query in zip(rows, index.embeddings[:10].float())])
        torch.testing.assert_close(scores, exact, atol=1e-5, rtol=0)
        recall, compared = gallery.recall(sample=20)
        assert recall > 0.9 and compared == 600
    assert gallery.recall(sample=20, rows=200)[1] == 200


@pytest.mark.parametrize("uri, message", [
    ("http://127.0.0.1:1", "no Milvus engine"), ("ftp://host:1", "give index/<run>.pt"), ("http://", "give index/<run>.pt"),
    ("http://root:s3cret@127.0.0.1:1", "MILVUS_TOKEN"), ("missing.db", "no such gallery; make it: python inference.py"),
])
def test_wrong_uri(uri, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILVUS_TOKEN", "root:s3cret")
    with pytest.raises(ReidError, match=message) as caught:
        open_gallery(uri, RUN, PRINT)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_missing_package_names_the_requirements(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ReidError, match=r"\.\[milvus\]"):
        open_gallery("http://127.0.0.1:1", RUN, PRINT)


def test_refused_galleries(tmp_path):
    uri, index = str(tmp_path / "milvus.db"), synthetic(30)
    gallery = make(uri, index)
    with pytest.raises(ReidError, match="30 images of 64 numbers"):
        gallery.write(torch.ones(30, 32), index.records())
    with pytest.raises(ReidError, match=r"failed.*[dD]im"):
        gallery.nearest(torch.ones(1, 32), 1)
    with pytest.raises(ReidError, match="16,384"):
        gallery.nearest(torch.ones(1, DIM), 20_000)
    with pytest.raises(ReidError, match=r"other weights.*--save_index --gallery_uri"):
        open_gallery(uri, RUN, "1" * 32)
    with pytest.raises(ReidError, match=r"no gallery of the run other.*inference\.py"):
        open_gallery(uri, "other", PRINT)
    with pytest.raises(ReidError, match=r"python eval\.py --save_index"):
        load_index(uri, RUN, PRINT)  # it has no queries
    for mirror, dim, data_root, message in ((True, 32, "nowhere", "64 numbers"), (False, DIM, "nowhere", "--mirror"),
                                            (True, DIM, "elsewhere", "elsewhere")):
        with pytest.raises(ReidError, match=message):
            MilvusGallery.create(uri, RUN, PRINT, mirror, dim, data_root)
    with pytest.raises(ReidError, match="choose one of FLAT"):
        MilvusGallery.create(uri, RUN, PRINT, True, DIM, "nowhere", "FLATTER")
    assert len(gallery) == 30
    gallery.engine.set(fingerprint="1" * 32)
    assert len(make(uri, synthetic(20))) == 20  # a stale one is made anew
    (tmp_path / "plain.db").write_text("not a folder")
    with pytest.raises(ReidError, match="is a file"):
        open_gallery(str(tmp_path / "plain.db"), RUN, PRINT)


def test_a_file_belongs_to_one_process(tmp_path):
    uri = str(tmp_path / "milvus.db")
    make(uri, synthetic(10))
    code = (f"from reid import ReidError\nfrom reid.extras.milvus_client import connect\n"
            f"try: connect({uri!r})\nexcept ReidError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "another process" in done.stdout and not done.stderr


def test_walk_through(root, people, tmp_path, monkeypatch, capsys):
    """docs/scale.md from a folder to answers, as it is written there, on drawn people."""
    images = sorted((people / "gallery").rglob("*.jpg"))[:9]
    (tmp_path / "my/crops").mkdir(parents=True)
    (tmp_path / "models").symlink_to(root / "models")
    for place, image in zip(["query.jpg", *(f"crops/{image.name}" for image in images[1:])], images):
        (tmp_path / "my" / place).write_bytes(image.read_bytes())
    monkeypatch.chdir(tmp_path)
    section = (root / "docs/scale.md").read_text().split("## From a folder to answers")[1].split("```bash")[1].split("```")[0]
    answers = []
    for arguments in re.findall(r"^python inference\.py (.*)", section, re.MULTILINE):
        assert not inference.main(inference.get_args_parser().parse_args(shlex.split(arguments)))
        answers.append(capsys.readouterr().out.split("query my/query.jpg")[1])
    assert len(answers) == 4 and (tmp_path / "milvus.db").is_dir() and (tmp_path / "index/masked-hog-908.pt").is_file()
    assert len(set(answers)) == 1 and answers[0].count("my/crops/") == 5
