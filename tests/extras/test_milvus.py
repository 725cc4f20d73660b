"""A gallery in Milvus: the answers of the .pt index, or one line that says what is wrong."""

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
from reid.retrieval.index import COLUMNS, GalleryIndex

REASON = "pymilvus and milvus-lite are not installed: pip install -e '.[milvus]'"
pytest.importorskip("pymilvus", reason=REASON)
pytest.importorskip("milvus_lite", reason=REASON)
from test_ingest import DIM, PRINT, RUN, server  # noqa: E402, F401

from reid.extras.milvus import create_gallery, load_index, open_gallery, save_index  # noqa: E402


def random_index(size, people=20, seed=0, prefix="g", root="nowhere"):
    """GalleryIndex of random people in six cameras; every tenth embedding equals the one before it (a tie)."""
    generator = torch.Generator().manual_seed(seed)
    pids = torch.randint(-1, people, (size,), generator=generator)
    camids = torch.randint(1, 7, (size,), generator=generator)
    centres = torch.randn(people + 1, DIM, generator=torch.Generator().manual_seed(9))
    rows = F.normalize(centres[pids] + 1.5 * torch.randn(size, DIM, generator=generator), dim=1)
    rows[10::10] = rows[9 : size - 1 : 10]
    paths = [f"{prefix}/{i:05d}.jpg" for i in range(size)]
    records = Records(Path(root), paths, pids, camids, torch.ones(size, dtype=torch.int64), torch.arange(size) * 25)
    return GalleryIndex(rows.half(), records, PRINT, True)


def make(uri, index, index_type="FLAT", run=RUN, fingerprint=PRINT):
    gallery = create_gallery(uri, run, fingerprint, True, DIM, index.data_root, index_type)
    gallery.write(index.embeddings, index.records())
    return gallery


def hits(ranked):
    """What a RankedList says of its images, without the numbers of the rows."""
    return [(hit.path, hit.name, hit.pid, hit.camid, hit.match) for hit in ranked]


@pytest.mark.parametrize("where", ["file", "server"])
def test_same_ranked_lists_as_the_index(where, tmp_path, request):
    uri = str(tmp_path / "milvus.db") if where == "file" else request.getfixturevalue("server").uri
    index, queries = random_index(1000), random_index(40, seed=1, prefix="q").embeddings.float()
    gallery = make(uri, index)
    gallery.threshold = index.threshold = 0.3
    queries[:5] = index.embeddings[9:50:10].float()  # two images have each: ties at the top, and at the end of a top 1
    queries[7] = torch.nan

    def compare(topk, exclude=None, same=None, **filters):
        found = gallery.search(queries, topk, exclude=exclude, **filters)
        expected = index.search(queries, topk, exclude=same, **filters)
        assert list(map(hits, found)) == list(map(hits, expected))
        for one, other in zip(found, expected):
            torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=0)
        return found, expected

    for topk in (1, 10):
        for filters in ({"camids": [1, 4]}, {"camids": [99]}, {"frames": (1000, 2000)}, {"camids": [2], "frames": (0, 9000)}):
            compare(topk, **filters)
        found, expected = compare(topk)
    compare(5, gallery.nearest(queries, 1)[1][:, 0], index.nearest(queries, 1)[1][:, 0])
    assert len(gallery) == 1000 and gallery.cameras == [1, 2, 3, 4, 5, 6]
    rows, places = found[0].rows, expected[0].rows
    for name in ("pids", "camids", "seqs", "frames"):
        assert torch.equal(getattr(gallery, name)[rows], getattr(index, name)[places])
    assert torch.equal(gallery.embeddings[rows], index.embeddings[places].float())
    row, place = int(rows[0]), int(places[0])
    assert torch.equal(gallery.embeddings[row], index.embeddings[place].float())
    assert gallery.paths[row] == index.paths[place] and row in gallery and -1 not in gallery
    with pytest.raises(ReidError, match="no row 5"):
        gallery.hit(5)


def test_a_search_is_one_request(tmp_path, monkeypatch):
    gallery = make(str(tmp_path / "milvus.db"), random_index(100))
    calls, call = [], gallery.collection.call
    monkeypatch.setattr(gallery.collection, "call", lambda method, **options: calls.append(method) or call(method, **options))
    ranked = gallery.search(random_index(3, seed=1).embeddings.float(), 10)
    assert sum(len(hits(one)) for one in ranked) == 30 and calls == ["search"]
    none = torch.full((2, gallery.dim), torch.nan)
    assert gallery.search(none[:0], 10) == [] and [len(one) for one in gallery.search(none, 10)] == [0, 0] and calls == ["search"]


def test_more_equal_scores_than_are_fetched_stay_in_order(tmp_path):
    index = random_index(100)
    index.embeddings[21:90] = index.embeddings[21]
    gallery = make(str(tmp_path / "milvus.db"), index)
    [ranked] = gallery.search(index.embeddings[21:22].float(), 5)
    assert [gallery.paths[row] for row in ranked.rows] == list(index.paths)[21:26]


def test_evaluation_is_the_same(tmp_path):
    index = random_index(800, seed=3)
    index.queries = random_index(60, seed=4, prefix="q")
    index.threshold, index.false_accept_rate = 0.625, 1e-3
    index.sizes, index.mtimes, index.contents = torch.arange(2400).reshape(3, 800)
    uri = str(tmp_path / "milvus.db")
    save_index(index, uri, RUN)
    loaded = load_index(uri, RUN, PRINT)
    assert list(loaded.paths) == list(index.paths) and torch.equal(loaded.embeddings, index.embeddings)
    for name in COLUMNS:
        assert torch.equal(getattr(loaded, name), getattr(index, name))
    assert (loaded.threshold, loaded.false_accept_rate, loaded.mirror) == (0.625, 1e-3, True)
    expected, result = (metrics.evaluate(x.queries.embeddings.float(), x.embeddings.float(), x.queries.pids, x.queries.camids,
                                         x.pids, x.camids) for x in (index, loaded))
    assert result.mAP == pytest.approx(expected.mAP, abs=1e-3) and result.rank[1] == pytest.approx(expected.rank[1], abs=1e-3)
    assert open_gallery(uri, RUN, PRINT).threshold == 0.625
    with pytest.raises(ReidError, match="800 rows"):
        open_gallery(uri, RUN, PRINT).download(limit=10)


def test_approximate_indexes(tmp_path):
    index, uri = random_index(600), str(tmp_path / "milvus.db")
    make(uri, index)
    for index_type in ("HNSW", "IVF_SQ8"):  # each over the rows that are in the gallery
        gallery = create_gallery(uri, RUN, PRINT, True, DIM, index.data_root, index_type)
        assert gallery.index_type == index_type and len(gallery) == 600
        queries = index.embeddings[:10].float()
        for query, ranked in zip(queries, gallery.search(queries, 10)):
            torch.testing.assert_close(ranked.scores, gallery.embeddings[ranked.rows] @ query, rtol=0,
                                       atol=1e-5 if index_type == "HNSW" else 1e-2)
        recall, compared = gallery.recall(sample=20)
        assert 0.9 < recall <= 1 and compared == 600
    recall, compared = gallery.recall(sample=20, limit=200)
    assert 0.9 < recall <= 1 and 150 < compared < 250


@pytest.mark.parametrize("uri, message", [
    ("http://127.0.0.1:1", "no Milvus engine"), ("ftp://host:1", "give index/<run>.pt"), ("http://", "give index/<run>.pt"),
    ("http://root:s3cret@127.0.0.1:1", "MILVUS_TOKEN"), ("http://root:s3cret/x@h", "MILVUS_TOKEN"),
    ("http://h/?token=s3cret", "MILVUS_TOKEN"), ("missing.db", "no gallery of the run .* make it: python inference.py"),
])
def test_wrong_uri(uri, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILVUS_TOKEN", "root:s3cret")
    with pytest.raises(ReidError, match=message) as caught:
        open_gallery(uri, RUN, PRINT)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ReidError, match=r"pip install -e '\.\[milvus\]'"):
        open_gallery("http://127.0.0.1:1", RUN, PRINT)


def test_refused_galleries(tmp_path):
    uri, index = str(tmp_path / "milvus.db"), random_index(30)
    gallery = make(uri, index)
    with pytest.raises(ReidError, match=r"upsert failed.*dim.*acknowledged row is kept"):
        gallery.write(torch.ones(30, 32), random_index(30, prefix="new").records())
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
    for mirror, dim, data_root, message in ((True, 32, "nowhere", "dim 64, not 32"), (False, DIM, "nowhere", "mirror True"),
                                            (True, DIM, "elsewhere", "elsewhere")):
        with pytest.raises(ReidError, match=message):
            create_gallery(uri, RUN, PRINT, mirror, dim, data_root)
    with pytest.raises(ReidError, match="choose one of FLAT"):
        create_gallery(uri, RUN, PRINT, True, DIM, "nowhere", "FLATTER")
    (tmp_path / "plain.db").write_text("not a folder")
    with pytest.raises(ReidError, match="is no gallery of Milvus"):
        open_gallery(str(tmp_path / "plain.db"), RUN, PRINT)


def test_other_weights_replace_a_gallery_of_their_run_and_data_only(tmp_path):
    uri, index = str(tmp_path / "milvus.db"), random_index(30)
    make(uri, index)
    with pytest.raises(ReidError, match="elsewhere"):
        make(uri, random_index(10, root="elsewhere"), fingerprint="1" * 32)
    assert len(open_gallery(uri, RUN, PRINT)) == 30
    assert len(make(uri, random_index(20), fingerprint="1" * 32)) == 20


def test_runs_never_share_a_collection(tmp_path):
    uri, names = str(tmp_path / "milvus.db"), ("a-b", "a_b", "a.b", "a-b_queries", "é" * 300, "ö" * 300)
    for i, run in enumerate(names):
        index = random_index(10 + i, seed=i)
        index.fingerprint, index.queries = str(i) * 32, random_index(3, seed=100 + i, prefix="q")
        save_index(index, uri, run)
    for i, run in enumerate(names):
        assert len(open_gallery(uri, run, str(i) * 32)) == 10 + i
        assert torch.equal(open_gallery(uri, run, part="queries").download().embeddings,
                           random_index(3, seed=100 + i, prefix="q").embeddings)


def test_a_file_belongs_to_one_process(tmp_path):
    uri = str(tmp_path / "milvus.db")
    make(uri, random_index(10))
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
    assert len(answers) == 4 and (tmp_path / "milvus.db").is_dir() and (tmp_path / "index/masked-hog-908--crops.pt").is_file()
    assert len(set(answers)) == 1 and answers[0].count("my/crops/") == 5


def test_files_and_folders_of_others_are_not_written_into(tmp_path):
    (tmp_path / "mine.db").write_bytes(b"SQLite format 3\0")
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "folder.db/notes.txt").touch()
    for name in "mine.db", "folder.db":
        with pytest.raises(ReidError, match="exists, and is no gallery of Milvus"):
            create_gallery(str(tmp_path / name), RUN, PRINT, True, DIM, "")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder.db", "mine.db", "notes.txt"]
