"""The gallery in Milvus beside the .pt index: the same answers, and nothing lost when a process or the server dies."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from reid import ReidError, ingest, metrics, milvus_client
from reid.data import Records
from reid.gallery import build_gallery, load_index, open_gallery, save_index
from reid.index import GalleryIndex

REASON = "pymilvus and milvus-lite are not installed (requirements-scale.txt)"
pytest.importorskip("pymilvus", reason=REASON)
pytest.importorskip("milvus_lite", reason=REASON)
from reid.milvus import MilvusGallery  # noqa: E402

os.environ.setdefault("OMP_NUM_THREADS", "1")
RUN, PRINT, DIM = "masked-hog-908", "0" * 32, 64


class FakeExtractor:
    """A file's embedding is drawn from its bytes; `wait` seconds a batch."""

    fingerprint, mirror, dim = PRINT, True, DIM

    def __init__(self, wait=0.0):
        self.wait, self.embedded = wait, 0

    def stream(self, files, strict=False, progress=False, bad=None):
        for first in range(0, len(files), 16):
            time.sleep(self.wait)
            part = files[first : first + 16]
            self.embedded += len(part)
            yield torch.arange(first, first + len(part)), torch.stack([embedding(file.read_bytes()) for file in part])


def embedding(data):
    seed = int.from_bytes(hashlib.sha256(data).digest()[:6], "big")
    return F.normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(seed)), dim=0)


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
    gallery.add(index.embeddings, index.records())
    return gallery


def folder(where, size):
    """Records of `size` files below `where`, each with bytes of its own."""
    (where / "g").mkdir(parents=True)
    for i in range(size):
        (where / f"g/{i:04d}.jpg").write_bytes(b"image %d" % i)
    numbers = torch.arange(size)
    return Records(where, [f"g/{i:04d}.jpg" for i in range(size)], numbers % 9, numbers % 6, numbers * 0, numbers)


class Server:
    """`milvus-lite server` on a free port of the loopback interface."""

    def __init__(self, data):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.data, self.uri = data, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(self.data), "--host", "127.0.0.1",
                   "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                return socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.1)
        raise AssertionError("the server does not listen")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "server")
    yield server
    server.kill()


@pytest.mark.parametrize("where", ["file", "server"])
def test_same_answers_as_the_index(where, tmp_path, request):
    uri = str(tmp_path / "milvus.db") if where == "file" else request.getfixturevalue("server").uri
    index, queries = synthetic(1000), synthetic(40, seed=1, prefix="q").embeddings.float()
    gallery = make(uri, index)
    queries[:5] = index.embeddings[9:50:10].float()  # each is there twice: ties on top, and at the end of top 1
    assert len(gallery) == gallery.count == 1000
    for topk in (1, 10):
        for camids in (None, [1, 4], [99]):
            scores, rows = gallery.search(queries, topk, camids=camids)
            expected, places = index.search(queries, topk, camids=camids)
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
            assert paths_of(gallery, rows) == paths_of(index, places)
    _, rows = gallery.search(queries, 3)
    _, places = index.search(queries, 3)
    for excluded in (rows[:, 0], rows[:, :2].tolist()):
        found = gallery.search(queries, 5, exclude=excluded)[1]
        same = places[:, 0] if isinstance(excluded, torch.Tensor) else places[:, :2].tolist()
        assert paths_of(gallery, found) == paths_of(index, index.search(queries, 5, exclude=same)[1])
    first, place = int(rows[0, 0]), int(places[0, 0])
    assert (gallery.pids[first], gallery.camids[first], gallery.frames[first]) == (
        int(index.pids[place]), int(index.camids[place]), int(index.frames[place]))
    torch.testing.assert_close(gallery.embeddings[rows[0]], index.embeddings[places[0]].float())
    _, rows = gallery.search(queries, 4, frames=(1000, 2000))
    assert all(1000 <= gallery.frames[row] <= 2000 for row in rows.flatten().tolist())
    assert gallery.cameras == [1, 2, 3, 4, 5, 6] and first in gallery and -1 not in gallery
    torch.testing.assert_close(gallery.embeddings[first], index.embeddings[place].float())
    assert gallery.remove(rows[0]) == 4 and gallery.remove(rows[0]) == 0 and len(gallery) == 996
    gallery.close()


def test_equal_scores_beyond_the_margin_stand_in_order(tmp_path):
    index = synthetic(100)
    index.embeddings[21:90] = index.embeddings[21]
    gallery = make(str(tmp_path / "milvus.db"), index)
    _, rows = gallery.search(index.embeddings[21:22].float(), 5)
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


def test_ingest_writes_what_is_new_or_changed(tmp_path, capsys):
    records, uri, extractor = folder(tmp_path / "data", 50), str(tmp_path / "milvus.db"), FakeExtractor()
    gallery = build_gallery(uri, RUN, extractor, records, save=True)
    assert extractor.embedded == len(gallery) == 50 and "50 rows written" in capsys.readouterr().out
    records.files()[7].write_bytes(b"another image")
    extractor.embedded = 0
    gallery = build_gallery(uri, RUN, extractor, records, save=True, progress=False)
    assert extractor.embedded == 1 and len(gallery) == 50
    scores, rows = gallery.search(embedding(b"another image")[None], 1)
    assert paths_of(gallery, rows) == [["g/0007.jpg"]] and scores[0, 0] > 0.999
    assert list(gallery.download().paths) == records.paths
    odd = Records(records.root, ["g/\udce9.jpg"], *(torch.tensor([1]) for _ in range(4)))
    assert gallery.add(torch.ones(1, DIM), odd) == 0 and "UTF-8" in gallery.bad[0][1]


def test_ranks_write_their_parts(tmp_path, monkeypatch):
    records, extractor = folder(tmp_path / "data", 50), FakeExtractor()
    gallery = MilvusGallery.create(str(tmp_path / "milvus.db"), RUN, PRINT, True, DIM, records.root)
    monkeypatch.setattr(ingest.world, "share", lambda obj: 0)
    monkeypatch.setattr(ingest, "gather", lambda obj, ranks: [obj])
    assert [ingest.embed(gallery, extractor, records, progress=False, rank=rank, ranks=3) for rank in range(3)] == [17, 17, 16]
    assert extractor.embedded == 50 and list(gallery.download().paths) == records.paths
    with pytest.raises(ReidError, match="one process at a time"):
        MilvusGallery.build(gallery.uri, RUN, extractor, records, world=2)


CHILD = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from reid import ingest
from test_milvus import FakeExtractor, MilvusGallery, Records, torch
ingest.WRITE, ingest.BLOCK = 16, 64
where, uri, size = Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
n = torch.arange(size)
records = Records(where, [f"g/{i:04d}.jpg" for i in range(size)], n % 9, n % 6, n * 0, n)
write = ingest.write
ingest.write = lambda *args: print(write(*args), flush=True)  or 0
MilvusGallery.build(uri, "masked-hog-908", FakeExtractor(0.02), records, progress=False)
"""


def test_killed_client_goes_on(tmp_path, root):
    size, uri = 240, str(tmp_path / "milvus.db")
    records = folder(tmp_path / "data", size)
    command = [sys.executable, "-c", CHILD, str(root), str(root / "tests"), str(records.root), uri, str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        acknowledged = sum(int(child.stdout.readline()) for _ in range(5))
        child.kill()
    extractor = FakeExtractor()
    gallery = build_gallery(uri, RUN, extractor, records, save=True, progress=False)
    assert acknowledged == 80 and extractor.embedded <= size - acknowledged  # what was acknowledged is still there
    assert len(gallery) == size and list(gallery.download().paths) == records.paths


def test_server_killed_and_started_again(tmp_path, server, monkeypatch):
    monkeypatch.setattr(ingest, "WRITE", 16)
    records = folder(tmp_path / "data", 320)
    result = []
    worker = threading.Thread(target=lambda: result.append(
        build_gallery(server.uri, RUN, FakeExtractor(0.1), records, save=True, progress=False)))
    worker.start()
    time.sleep(1.2)
    server.kill()
    time.sleep(0.5)
    server.start()
    worker.join()
    assert len(result[0]) == 320 and list(result[0].download().paths) == records.paths


def test_dead_server_is_one_error_that_says_what_is_safe(tmp_path, server, monkeypatch):
    monkeypatch.setattr(ingest, "WRITE", 16)
    monkeypatch.setattr(milvus_client, "TIMEOUT", 2)
    monkeypatch.setenv("MILVUS_TOKEN", "root:s3cret")
    records = folder(tmp_path / "data", 320)
    killer = threading.Timer(1.2, server.kill)
    killer.start()
    with pytest.raises(ReidError, match="run again goes on") as caught:
        build_gallery(server.uri, RUN, FakeExtractor(0.2), records, save=True, progress=False)
    killer.join()
    assert "\n" not in str(caught.value) and "s3cret" not in str(caught.value)
    server.start()
    monkeypatch.setattr(milvus_client, "TIMEOUT", 30)
    extractor = FakeExtractor()
    gallery = build_gallery(server.uri, RUN, extractor, records, save=True, progress=False)
    assert extractor.embedded < 320 and list(gallery.download().paths) == records.paths


def test_readers_while_ingesting(tmp_path, server, monkeypatch):
    monkeypatch.setattr(ingest, "WRITE", 16)
    records = folder(tmp_path / "data", 320)
    expected = torch.stack([embedding(b"image %d" % i) for i in range(320)])
    MilvusGallery.create(server.uri, RUN, PRINT, True, DIM, records.root).close()
    done, sizes, errors = threading.Event(), [], []

    def read():
        gallery = open_gallery(server.uri, RUN, PRINT)
        while not done.is_set():
            scores, rows = gallery.search(expected[:3], 5)
            for query, line, scored in zip(expected, rows.tolist(), scores.tolist()):
                found = [(row, score) for row, score in zip(line, scored) if row >= 0]
                for row, score in found:
                    right = float(query @ expected[int(gallery.paths[row][2:6])])
                    errors.extend([(row, score, right)] if abs(score - right) > 1e-3 else [])
            sizes.append(len(gallery))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    gallery = build_gallery(server.uri, RUN, FakeExtractor(0.05), records, save=True, progress=False)
    done.set()
    for reader in readers:
        reader.join()
    assert not errors and len(set(sizes)) > 2 and len(gallery) == 320


def test_approximate_indexes_are_scored_again(tmp_path):
    index, uri = synthetic(600), str(tmp_path / "milvus.db")
    make(uri, index).close()
    for index_type in ("HNSW", "IVF_FLAT", "IVF_SQ8"):  # each over the rows that are there
        gallery = MilvusGallery.create(uri, RUN, PRINT, True, DIM, index.data_root, index_type)
        assert gallery.index_type == index_type and len(gallery) == 600
        scores, rows = gallery.search(index.embeddings[:10].float(), 10)
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
    with pytest.raises(ReidError, match=r"requirements-scale\.txt"):
        open_gallery("http://127.0.0.1:1", RUN, PRINT)


def test_refused_galleries(tmp_path):
    uri, index = str(tmp_path / "milvus.db"), synthetic(30)
    gallery = make(uri, index)
    with pytest.raises(ReidError, match="30 images of 64 numbers"):
        gallery.add(torch.ones(30, 32), index.records())
    with pytest.raises(ReidError, match=r"failed.*[dD]im"):
        gallery.search(torch.ones(1, 32), 1)
    with pytest.raises(ReidError, match="16,384"):
        gallery.search(torch.ones(1, DIM), 20_000)
    with pytest.raises(ReidError, match=r"other weights.*--save_index --gallery_uri"):
        open_gallery(uri, RUN, "1" * 32)
    with pytest.raises(ReidError, match="no gallery of the run other"):
        open_gallery(uri, "other", PRINT)
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
    code = (f"from reid import ReidError\nfrom reid.milvus_client import connect\n"
            f"try: connect({uri!r})\nexcept ReidError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "another process" in done.stdout and not done.stderr
