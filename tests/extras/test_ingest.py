"""Writing a gallery into Milvus: no image twice, and no row lost when a process or the server dies."""

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
from forked import ranks

from reid import ReidError
from reid.data.datasets import Records
from reid.extras import milvus, milvus_client
from reid.extras.milvus import MilvusGallery, build_gallery, create_gallery, open_gallery
from reid.retrieval.extract import Extractor

REASON = "pymilvus and milvus-lite are not installed: pip install -e '.[milvus]'"
pytest.importorskip("pymilvus", reason=REASON)
pytest.importorskip("milvus_lite", reason=REASON)
from grpc import StatusCode  # noqa: E402

RUN, PRINT, DIM = "masked-hog-908", "0" * 32, 64


class FakeExtractor:
    """Draw the embedding of a file from its bytes; a batch takes `wait` seconds."""

    mirror, dim = True, DIM

    def __init__(self, fingerprint=PRINT, wait=0.0):
        self.fingerprint, self.wait, self.embedded = fingerprint, wait, 0

    embed_records = Extractor.embed_records

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
    """Records of `size` different files below `where`."""
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


def build(uri, extractor, records):
    return build_gallery(uri, RUN, extractor, records, progress=False)


def test_build_add_and_search(tmp_path):
    records, extractor, uri = folder(tmp_path / "data", 50), FakeExtractor(), str(tmp_path / "milvus.db")
    build(uri, extractor, records)
    gallery = open_gallery(uri, RUN, extractor)
    records.files()[7].write_bytes(b"another image")
    assert gallery.add(extractor, records, progress=False) == 1 and extractor.embedded == 51
    [ranked] = gallery.search(embedding(b"another image")[None], 2, camids=[1])
    assert ranked[0].path == str(tmp_path / "data/g/0007.jpg") and ranked[0].score > 0.999
    [other] = gallery.search(embedding(b"another image")[None], 1, exclude=ranked.rows[:1])
    assert other[0].row != ranked[0].row
    with pytest.raises(ReidError, match=r"made with fingerprint 0{32}, not 1{32}"):
        gallery.add(FakeExtractor("1" * 32), records)
    gallery.collection.call("delete", filter="path == 'g/0007.jpg'")  # as docs/scale.md says
    assert len(gallery) == 49 and extractor.embedded == 51
    assert gallery.fingerprint == PRINT and gallery.mirror


def test_new_and_changed_images_are_written(tmp_path, capsys):
    records, uri, extractor = folder(tmp_path / "data", 50), str(tmp_path / "milvus.db"), FakeExtractor()
    for change, embedded in ((b"image 7", 50), (b"image 7", 0), (b"another image", 1)):
        records.files()[7].write_bytes(change)
        extractor.embedded = 0
        gallery = build_gallery(uri, RUN, extractor, records)
        assert extractor.embedded == embedded and f"{embedded} rows written" in capsys.readouterr().out
    assert list(gallery.download().paths) == records.paths
    odd = Records(records.root, ["g/\udce9.jpg"], *(torch.tensor([1]) for _ in range(4)))
    assert gallery.write(torch.ones(1, DIM), odd) == 0 and "UTF-8" in gallery.bad[0][1]


CHILD = """
import sys
sys.path[:0] = [*sys.argv[1:3], f"{sys.argv[1]}/tests"]
from pathlib import Path
from reid import distributed
from reid.extras import milvus, milvus_client
from test_ingest import FakeExtractor, MilvusGallery, Records, build, torch
milvus_client.BATCH, milvus.BLOCK = 16, 64
where, uri, size = Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
n = torch.arange(size)
records = Records(where, [f"g/{i:04d}.jpg" for i in range(size)], n % 9, n % 6, n * 0, n)
upsert = MilvusGallery._upsert
MilvusGallery._upsert = lambda *args: (count := upsert(*args), print(count, flush=True))[0]
distributed.start("cpu")
extractor = FakeExtractor(wait=0.02)
gallery = build(uri, extractor, records)
print("embedded", extractor.embedded, "rows", len(gallery), flush=True)
distributed.stop()
"""


def child(root, *args):
    return ["-c", CHILD, str(root), str(root / "tests" / "extras"), *map(str, args)]


def test_ranks_write_their_parts(tmp_path, root, server):
    records = folder(tmp_path / "data", 250)
    (tmp_path / "child.py").write_text(CHILD)
    processes = ranks(3, tmp_path, tmp_path / "child.py", *child(root, records.root, server.uri, 250)[2:])
    assert sorted(line for process in processes for line in process.works().out.splitlines() if "rows" in line) == [
        "embedded 83 rows 250", "embedded 83 rows 250", "embedded 84 rows 250"]
    assert list(open_gallery(server.uri, RUN, PRINT).download().paths) == records.paths


def test_ranks_cannot_write_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(milvus.distributed, "world_size", 2)
    with pytest.raises(ReidError, match="only one process can write a file"):
        build(str(tmp_path / "milvus.db"), FakeExtractor(), folder(tmp_path / "data", 2))


def test_killed_client_goes_on(tmp_path, root):
    size, uri = 240, str(tmp_path / "milvus.db")
    records = folder(tmp_path / "data", size)
    with subprocess.Popen([sys.executable, *child(root, records.root, uri, size)], stdout=subprocess.PIPE, text=True) as process:
        acknowledged = sum(int(process.stdout.readline()) for _ in range(5))
        process.kill()
    extractor = FakeExtractor()
    gallery = build(uri, extractor, records)
    assert acknowledged == 80 and extractor.embedded <= size - acknowledged  # what was acknowledged is kept
    assert len(gallery) == size and list(gallery.download().paths) == records.paths


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Records of 320 files that are written in batches of 16."""
    monkeypatch.setattr(milvus_client, "BATCH", 16)
    return folder(tmp_path / "data", 320)


@pytest.fixture
def at_batch(monkeypatch):
    """Function (number, action): call `action` when that many batches have been acknowledged."""
    def plan(number, action):
        upsert, calls = MilvusGallery._upsert, itertools.count(1)

        def counted(*args):
            written = upsert(*args)
            if next(calls) == number:
                action()
            return written

        monkeypatch.setattr(MilvusGallery, "_upsert", counted)

    return plan


def test_server_killed_and_started_again(files, server, at_batch):
    starter = threading.Timer(0.5, server.start)
    at_batch(7, lambda: (server.kill(), starter.start()))
    gallery = build(server.uri, FakeExtractor(), files)
    assert starter.finished.is_set() and len(gallery) == 320 and list(gallery.download().paths) == files.paths
    starter.join()


def test_dead_server_is_one_error_that_says_what_is_safe(files, server, at_batch, monkeypatch):
    monkeypatch.setenv("MILVUS_TOKEN", "root:s3cret")
    at_batch(7, lambda: (server.kill(), monkeypatch.setattr(milvus_client, "TIMEOUT", 2)))
    with pytest.raises(ReidError, match="the same command goes on") as caught:
        build(server.uri, FakeExtractor(), files)
    assert "\n" not in str(caught.value) and "s3cret" not in str(caught.value)
    server.start()
    monkeypatch.setattr(milvus_client, "TIMEOUT", 60)
    extractor = FakeExtractor()
    gallery = build(server.uri, extractor, files)
    assert extractor.embedded == 320 - 7 * 16 and list(gallery.download().paths) == files.paths


class Failing(Exception):
    """A client every call of which fails like those of gRPC."""

    def __init__(self, code):
        self.code, self.details = (lambda: code), (lambda: "the details\nand more")

    def __getattr__(self, method):
        def call(*args, **options):
            raise self
        return call


def test_calls_are_repeated_after_an_outage_only(tmp_path):
    gallery = build(str(tmp_path / "milvus.db"), FakeExtractor(), folder(tmp_path / "data", 5))
    for code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED):
        gallery.collection.client = Failing(code)
        assert len(gallery) == 5
    gallery.collection.client = Failing(StatusCode.INTERNAL)
    with pytest.raises(ReidError, match=r"query failed \(the details\); every acknowledged row is kept"):
        len(gallery)


def test_readers_while_ingesting(files, server):
    expected = torch.stack([embedding(b"image %d" % i) for i in range(320)])
    create_gallery(server.uri, RUN, PRINT, True, DIM, files.root)
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
    gallery = build(server.uri, FakeExtractor(wait=0.05), files)
    done.set()
    for reader in readers:
        reader.join()
    assert not errors and len(set(sizes)) > 2 and len(gallery) == 320
