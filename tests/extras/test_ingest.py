"""Writing a gallery into Milvus: nothing twice, and nothing lost when a process or the server dies in the middle."""

import hashlib
import itertools
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from reid import ReidError
from reid.data.datasets import Records
from reid.extras import ingest, milvus_client
from reid.retrieval.gallery import build_gallery, open_gallery

REASON = "pymilvus and milvus-lite are not installed (extra milvus)"
pytest.importorskip("pymilvus", reason=REASON)
pytest.importorskip("milvus_lite", reason=REASON)
from grpc import StatusCode  # noqa: E402

from reid.extras.milvus import MilvusGallery  # noqa: E402

RUN, PRINT, DIM = "masked-hog-908", "0" * 32, 64


class FakeExtractor:
    """A file's embedding is drawn from its bytes; `wait` seconds a batch."""

    mirror, dim = True, DIM

    def __init__(self, fingerprint=PRINT, wait=0.0):
        self.fingerprint, self.wait, self.embedded = fingerprint, wait, 0

    def stream(self, files, strict=False, progress=False, bad=None):
        for first in range(0, len(files), 16):
            time.sleep(self.wait)
            part = files[first : first + 16]
            self.embedded += len(part)
            yield torch.arange(first, first + len(part)), torch.stack([embedding(file.read_bytes()) for file in part])


def embedding(data):
    seed = int.from_bytes(hashlib.sha256(data).digest()[:6], "big")
    return F.normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(seed)), dim=0)


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


@pytest.mark.parametrize("name", ["index.pt", "milvus.db"])
def test_one_interface(name, tmp_path):
    records, extractor, uri = folder(tmp_path / "data", 50), FakeExtractor(), str(tmp_path / name)
    build_gallery(uri, RUN, extractor, records, save=True, progress=False).close()
    gallery = open_gallery(uri, RUN, extractor)
    records.files()[7].write_bytes(b"another image")
    assert gallery.add(extractor, records, progress=False) == 1 and extractor.embedded == 51
    scores, rows = gallery.nearest(embedding(b"another image")[None], 2, camids=[1])
    assert gallery.paths[int(rows[0, 0])] == "g/0007.jpg" and scores[0, 0] > 0.999
    assert gallery.nearest(embedding(b"another image")[None], 1, exclude=rows[:, 0])[1][0, 0] != rows[0, 0]
    assert gallery.remove(["g/0007.jpg", "g/none.jpg"]) == 1 and gallery.count == len(gallery) == 49
    with pytest.raises(ReidError, match="weights"):
        gallery.add(FakeExtractor("1" * 32), records)
    assert gallery.fingerprint == PRINT and gallery.mirror
    gallery.close()


def test_ingest_writes_what_is_new_or_changed(tmp_path, capsys):
    records, uri, extractor = folder(tmp_path / "data", 50), str(tmp_path / "milvus.db"), FakeExtractor()
    for change, embedded in ((b"image 7", 50), (b"image 7", 0), (b"another image", 1)):
        records.files()[7].write_bytes(change)
        extractor.embedded = 0
        gallery = build_gallery(uri, RUN, extractor, records, save=True)
        assert extractor.embedded == embedded and f"{embedded} rows written" in capsys.readouterr().out
    assert list(gallery.download().paths) == records.paths
    odd = Records(records.root, ["g/\udce9.jpg"], *(torch.tensor([1]) for _ in range(4)))
    assert gallery.write(torch.ones(1, DIM), odd) == 0 and "UTF-8" in gallery.bad[0][1]
    with pytest.raises(ReidError, match="--save_index and --gallery_uri"):
        build_gallery(str(tmp_path / "index.pt"), RUN, extractor, records, save=True, index_type="HNSW")


def test_ranks_write_their_parts(tmp_path, monkeypatch):
    records, extractor = folder(tmp_path / "data", 50), FakeExtractor()
    gallery = MilvusGallery.create(str(tmp_path / "milvus.db"), RUN, PRINT, True, DIM, records.root)
    monkeypatch.setattr(ingest.distributed, "share", lambda obj: 0)
    monkeypatch.setattr(ingest, "gather", lambda obj, ranks: [obj])
    assert [ingest.add(gallery, extractor, records, progress=False, rank=rank, world_size=3) for rank in range(3)] == [17, 17, 16]
    assert extractor.embedded == 50 and list(gallery.download().paths) == records.paths
    with pytest.raises(ReidError, match="one process at a time"):
        MilvusGallery.build(gallery.uri, RUN, extractor, records, world_size=2)


CHILD = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from reid.extras import ingest
from test_ingest import FakeExtractor, MilvusGallery, Records, torch
ingest.WRITE, ingest.BLOCK = 16, 64
where, uri, size = Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
n = torch.arange(size)
records = Records(where, [f"g/{i:04d}.jpg" for i in range(size)], n % 9, n % 6, n * 0, n)
upsert = ingest.upsert
ingest.upsert = lambda *args: print(upsert(*args), flush=True) or 0
MilvusGallery.build(uri, "masked-hog-908", FakeExtractor(wait=0.02), records, progress=False)
"""


def test_killed_client_goes_on(tmp_path, root):
    size, uri = 240, str(tmp_path / "milvus.db")
    records = folder(tmp_path / "data", size)
    command = [sys.executable, "-c", CHILD, str(root), str(root / "tests" / "extras"), str(records.root), uri, str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        acknowledged = sum(int(child.stdout.readline()) for _ in range(5))
        child.kill()
    extractor = FakeExtractor()
    gallery = build_gallery(uri, RUN, extractor, records, save=True, progress=False)
    assert acknowledged == 80 and extractor.embedded <= size - acknowledged  # what was acknowledged is still there
    assert len(gallery) == size and list(gallery.download().paths) == records.paths


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Records of 320 files that are written in batches of 16."""
    monkeypatch.setattr(ingest, "WRITE", 16)
    return folder(tmp_path / "data", 320)


@pytest.fixture
def at_batch(monkeypatch):
    """Function (number, action): do something when so many batches have been acknowledged."""
    def plan(number, action):
        upsert, calls = ingest.upsert, itertools.count(1)

        def counted(*args):
            written = upsert(*args)
            if next(calls) == number:
                action()
            return written

        monkeypatch.setattr(ingest, "upsert", counted)

    return plan


def test_server_killed_and_started_again(files, server, at_batch):
    starter = threading.Timer(0.5, server.start)
    at_batch(7, lambda: (server.kill(), starter.start()))
    gallery = build_gallery(server.uri, RUN, FakeExtractor(), files, save=True, progress=False)
    assert starter.finished.is_set() and len(gallery) == 320 and list(gallery.download().paths) == files.paths
    starter.join()


def test_dead_server_is_one_error_that_says_what_is_safe(files, server, at_batch, monkeypatch):
    monkeypatch.setenv("MILVUS_TOKEN", "root:s3cret")
    at_batch(7, lambda: (server.kill(), monkeypatch.setattr(milvus_client, "TIMEOUT", 2)))
    with pytest.raises(ReidError, match="run again goes on") as caught:
        build_gallery(server.uri, RUN, FakeExtractor(), files, save=True, progress=False)
    assert "\n" not in str(caught.value) and "s3cret" not in str(caught.value)
    server.start()
    monkeypatch.setattr(milvus_client, "TIMEOUT", 60)
    extractor = FakeExtractor()
    gallery = build_gallery(server.uri, RUN, extractor, files, save=True, progress=False)
    assert extractor.embedded == 320 - 7 * 16 and list(gallery.download().paths) == files.paths


class Failing(Exception):
    """A client whose every call fails as gRPC's do."""

    def __init__(self, code):
        self.code, self.details = (lambda: code), (lambda: "the details\nand more")

    def __getattr__(self, method):
        def call(*args, **options):
            raise self
        return call


def test_calls_are_repeated_after_an_outage_only(tmp_path):
    gallery = build_gallery(str(tmp_path / "milvus.db"), RUN, FakeExtractor(), folder(tmp_path / "data", 5), save=True)
    for code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED):
        gallery.engine._client = Failing(code)
        assert len(gallery) == 5
    gallery.engine._client = Failing(StatusCode.INTERNAL)
    with pytest.raises(ReidError, match=r"query failed \(the details\); the rows are as they were"):
        len(gallery)


def test_readers_while_ingesting(files, server):
    expected = torch.stack([embedding(b"image %d" % i) for i in range(320)])
    MilvusGallery.create(server.uri, RUN, PRINT, True, DIM, files.root).close()
    done, sizes, errors = threading.Event(), [], []

    def read():
        gallery = open_gallery(server.uri, RUN, PRINT)
        while not done.is_set():
            scores, rows = gallery.nearest(expected[:3], 5)
            for query, line, scored in zip(expected, rows.tolist(), scores.tolist()):
                found = [(row, score) for row, score in zip(line, scored) if row >= 0]
                for row, score in found:
                    right = float(query @ expected[int(gallery.paths[row][2:6])])
                    errors.extend([(row, score, right)] if abs(score - right) > 1e-3 else [])
            sizes.append(len(gallery))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    gallery = build_gallery(server.uri, RUN, FakeExtractor(wait=0.05), files, save=True, progress=False)
    done.set()
    for reader in readers:
        reader.join()
    assert not errors and len(set(sizes)) > 2 and len(gallery) == 320
