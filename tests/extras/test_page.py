"""The search page: answers, refusals, limits, many clients at once, and the page itself in a headless Chromium."""

import base64
import http.client
import io
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")

from reid import ReidError, images
from reid.data.datasets import read_folder
from reid.extras import page
from reid.extras.pictures import verdict
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import ranked_lists

SIZE = (16, 8)


class Colours:
    """In place of the Extractor: embeds an image as its pixels at 16 x 8. Counts its batches, waits at `gate`, may fail."""

    size, batch_size, dim = SIZE, 32, 3 * SIZE[0] * SIZE[1]

    def __init__(self):
        self.batches, self.gate, self.entered, self.failure = [], threading.Event(), threading.Event(), None
        self.gate.set()

    def describe(self):
        return "colours 16x8"

    def embed(self, pixels):
        self.entered.set()
        self.gate.wait(60)
        self.batches.append(len(pixels))
        if self.failure:
            raise self.failure
        return F.normalize(torch.stack(list(pixels)).flatten(1).float() - 128)


class Site:
    """A server in a thread, on a port of its own."""

    def __init__(self, index, host="127.0.0.1", **options):
        self.index, self.extractor = index, Colours()
        listener = page.listen(host, 0)
        self.port = listener.getsockname()[1]
        self.server = page.make_server(page.create_app(self.extractor, index, **options))
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.extractor.gate.set()
        self.server.should_exit = True
        self.thread.join()

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"

    def post(self, body, **params):
        return requests.post(self.url("/search"), data=body, params=params, timeout=60)

    def get(self, path, **params):
        return requests.get(self.url(path), params=params, timeout=60)

    def until_waiting(self, count):
        """Return as soon as so many searches are in the queue."""
        for _ in range(6000):
            if self.get("/healthz").json()["waiting"] >= count:
                return
            time.sleep(0.01)
        raise AssertionError(f"never were {count} searches waiting")

    def raw(self, path, host=None, method="GET", **headers):
        """(status, body) of a request whose path and Host are sent unchanged; requests would normalise them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": f"127.0.0.1:{self.port}" if host is None else host, **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Six people, two images by each of three cameras, and one junk image: blocks of colour with noise."""
    root, rng = tmp_path_factory.mktemp("gallery"), np.random.default_rng(1)
    for pid in [*range(1, 7), -1]:
        blocks = rng.integers(0, 256, (4, 2, 3))
        for camera in (1, 2, 3) if pid > 0 else (1,):
            for frame in (0, 1) if pid > 0 else (0,):
                noisy = np.kron(blocks, np.ones((16, 16, 1))) + rng.normal(0, 25, (64, 32, 3))
                name = f"{pid:04d}" if pid > 0 else "-1"
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / f"{name}_c{camera}s1_{frame:06d}_00.png")
    return root


@pytest.fixture(scope="module")
def index(gallery):
    records = read_folder(gallery)
    pixels = images.resize([images.decode(file) for file in records.files()], SIZE)
    made = GalleryIndex(Colours().embed(pixels), records, "0" * 16, False)
    made.threshold = 0.8
    return made


@pytest.fixture(scope="module")
def site(index):
    with Site(index, topk_limit=15, allowed_hosts=["Crops.example"]) as running:
        yield running


@pytest.fixture(scope="module")
def crop(gallery):
    """A query: the bytes of another image of person 3."""
    image = np.asarray(Image.open(gallery / "0003_c2s1_000000_00.png")).astype(int)
    noisy = image + np.random.default_rng(2).normal(0, 20, image.shape)
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def embedding(body):
    return Colours().embed(images.resize([images.decode(body)], SIZE))


def listed(answer):
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [r["position"] for r in results] == list(range(1, len(results) + 1))
    return [int(r["row"]) for r in results]


# ---- Answers --------------------------------------------------------------------------------------------------------

def test_an_image_is_answered_as_by_the_index(site, index, crop):
    answer = site.post(crop, topk=10)
    scores, rows = index.nearest(embedding(crop), 10)
    assert listed(answer) == rows[0].tolist()
    assert [r["score"] for r in answer.json()["results"]] == pytest.approx(scores[0].tolist(), abs=1e-6)
    best = answer.json()["results"][0]
    assert (best["pid"], best["path"], best["match"]) == (3, index.paths[int(best["row"])], True)
    assert [r["match"] for r in answer.json()["results"]] == [s > 0.8 for s in scores[0].tolist()]


def test_a_gallery_image_is_answered_without_itself(site, index):
    answer = site.get("/search", row=8, topk=15)
    _, rows = index.nearest(index.embeddings[8:9].float(), 15, exclude=torch.tensor([8]))
    assert listed(answer) == rows[0].tolist()
    assert 8 not in listed(answer)
    assert answer.json()["query"]["row"] == "8"
    pid = int(index.pids[8])
    for r in answer.json()["results"]:
        assert r["verdict"] == ("junk" if r["pid"] == -1 else "right" if r["pid"] == pid else "wrong")


@pytest.mark.parametrize("cameras", [[1], [2, 3], [3, 3]])
def test_cameras(site, index, crop, cameras):
    answer = site.post(crop, topk=15, camera=cameras)
    assert listed(answer) == index.nearest(embedding(crop), 15, camids=cameras)[1][0].tolist()[: len(listed(answer))]
    assert {r["camid"] for r in answer.json()["results"]} == set(cameras)


def test_defaults_and_health(site, crop):
    assert len(listed(site.post(crop))) == 15
    assert site.get("/healthz").json() == {"status": "ok", "images": 37, "model": "colours 16x8", "waiting": 0}


def test_sample(site, index):
    picked = [site.get("/sample").json()["results"] for _ in range(4)]
    for some in picked:
        rows = [int(hit["row"]) for hit in some]
        assert len(set(rows)) == page.SAMPLE and not any(hit["pid"] == -1 for hit in some)
        assert [hit["path"] for hit in some] == [index.paths[row] for row in rows]
    assert len({str(some) for some in picked}) > 1


def test_a_gallery_in_an_engine(index, crop):
    """Row numbers of 63 bits, columns that are looked up, its own list of cameras, and a server that may be down."""
    offset = (1 << 62) + 1  # no float has it

    class Column:
        def __init__(self, values):
            self.values = values

        def __getitem__(self, row):
            return self.values[row - offset]

    class Engine:
        threshold, data_root, cameras, down = None, index.data_root, [-1, 1, 2, 3], False
        normalised, normalise = False, GalleryIndex.normalise
        paths, pids, camids, embeddings = map(Column, (index.paths, index.pids, index.camids, index.embeddings))

        def __len__(self):
            return len(index)

        def __contains__(self, row):
            return offset <= row < offset + len(index)

        def hit(self, row):
            return index.hit(row - offset)

        def search(self, embeddings, topk, camids=None, exclude=None):
            if self.down:
                raise ReidError("milvus: no answer")
            exclude = exclude - offset if exclude is not None else None
            scores, rows = index.nearest(embeddings, topk, camids, exclude=exclude)
            return ranked_lists(self, scores, torch.where(rows >= 0, rows + offset, rows))

    with Site(Engine()) as running:
        expected = [row + offset for row in index.nearest(embedding(crop), 5)[1][0].tolist()]
        assert listed(running.post(crop, topk=5)) == expected
        assert listed(running.get("/search", row=expected[0], topk=3, camera=2))
        assert running.get(f"/image/{expected[0]}").status_code == 200
        assert [running.get("/search", row=row).status_code for row in (0, offset - 1, 1 << 63)] == [404] * 3
        assert all(int(hit["row"]) >= offset for hit in running.get("/sample").json()["results"])
        running.index.down = True
        assert (running.post(crop).status_code, running.post(crop).json()) == (503, {"error": "milvus: no answer"})


def test_pictures(site, gallery, index):
    answer = site.get("/image/5")
    assert answer.headers["content-type"] == "image/jpeg"
    shown, stored = (np.asarray(Image.open(file)).reshape(4, 16, 2, 16, 3).mean((1, 3))  # the blocks of colour
                     for file in (io.BytesIO(answer.content), gallery / index.paths[5]))
    assert np.abs(shown - stored).max() < 15
    for header in ("content-security-policy", "x-content-type-options"):
        assert header in answer.headers and header in site.get("/").headers


# ---- What is refused ------------------------------------------------------------------------------------------------

def png_header(width, height):
    """A PNG that claims a size, with hardly any data."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("body, reason", [
    (b"", "not an image"), (b"hello", "not an image"), (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    (os.urandom(100_000), "not an image"), (b"\xff\xd8\xff\xe0" + b"\0" * 50, "image"), ("truncated", "image"),
    (png_header(50_000, 50_000), "more than 50,000,000 pixels"), (png_header(0, 5), "image"),
    (png_header(2**31 - 1, 2**31 - 1), "pixels"),
], ids=["empty", "text", "svg", "noise", "jpeg head", "truncated", "bomb", "no width", "huge bomb"])
def test_bad_images(site, crop, body, reason):
    answer = site.post(crop[: len(crop) // 2] if body == "truncated" else body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"] and "\n" not in answer.json()["error"]


def test_a_form_upload_is_refused_with_advice(site, crop):
    answer = requests.post(site.url("/search"), files={"file": crop}, timeout=30)
    assert answer.status_code == 415
    assert "--data-binary" in answer.json()["error"]


def test_too_large(site, crop):
    assert site.post(b"\0" * (page.UPLOAD_LIMIT + 1)).status_code == 413
    answer = site.post(b"\0" * 2**20 for _ in range(100))  # no Content-Length
    assert answer.status_code == 413
    assert answer.json() == {"error": "the image file is larger than 10 MB"}
    assert site.post(crop).status_code == 200


def test_content_length_that_lies(site, crop):
    for length in (5, 10**12):
        with socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection:
            connection.sendall(f"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode() + crop)
    assert site.post(crop).status_code == 200


@pytest.mark.parametrize("path, status", [
    ("/image/../../etc/passwd", 404), ("/image/..%2f..%2fetc%2fpasswd", 404), ("/image//etc/passwd", 404), ("/image/-1", 404),
    ("/image/99999999", 404), (f"/image/{10**30}", 404), ("/image/0x5", 400), ("/image/5%00", 400), ("/image/", 404),
    ("/search?row=-1", 404), ("/search?row=37", 404), ("/search?row=a", 400), ("/search", 400), ("/search?row=1&topk=0", 400),
    ("/search?row=1&topk=16", 400), ("/search?row=1&camera=9", 400), ("/search?row=1&camera=x", 400), ("/docs", 404),
    ("/openapi.json", 404), ("/page.html", 404), (f"/search?row=1&camera={10**30}", 400),
])
def test_addresses_from_outside(site, path, status):
    found, body = site.raw(path)
    assert found == status
    assert b'{"error":"' in body and b"root:" not in body


@pytest.mark.parametrize("host, allowed", [
    ("evil.example", False), ("evil.example:8000", False), ("127.0.0.1.evil.example", False), ("", False), ("[::1", False),
    ("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1", True), ("127.1.2.3:80", True), ("192.168.1.5:8000", True),
    ("[::1]", True), ("[::1]:8000", True), ("[fe80::1]:8000", True), ("crops.example:8000", True), ("localhost.", False),
])
def test_only_addresses_and_allowed_names_are_served(site, host, allowed):
    """DNS rebinding: a web page of evil.example resolves its name to this server's address and reads the gallery."""
    for path in ("/", "/image/3", "/healthz"):
        status, body = site.raw(path, host=host)
        assert status == (200 if allowed else 403), body
    assert allowed or b"--allowed_hosts" in body


def test_other_web_pages_are_refused(site, crop):
    for origin in ("cross-site", "same-site"):
        assert site.raw("/search?row=1", Sec_Fetch_Site=origin)[0] == 403
        assert site.raw("/image/1", Sec_Fetch_Site=origin, Sec_Fetch_Mode="navigate")[0] == 403
        assert site.raw("/", Sec_Fetch_Site=origin, Sec_Fetch_Mode="no-cors")[0] == 403
        assert site.raw("/", Sec_Fetch_Site=origin, Sec_Fetch_Mode="navigate")[0] == 200  # a link to the page
        assert site.raw("/", Sec_Fetch_Site=origin, Sec_Fetch_Mode="navigate", method="POST")[0] == 403
        batches = len(site.extractor.batches)
        answer = requests.post(site.url("/search"), data=crop, headers={"Sec-Fetch-Site": origin, "Content-Type": "text/plain"})
        assert answer.status_code == 403 and len(site.extractor.batches) == batches
    for own in ("same-origin", "none"):
        assert site.raw("/search?row=1", Sec_Fetch_Site=own)[0] == 200


@pytest.mark.parametrize("host", ["::1", "0.0.0.0"])
def test_other_addresses_to_listen_on(index, host):
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 on this machine")
    with Site(index, host=host) as running:
        address = f"http://{'[::1]' if host == '::1' else '127.0.0.1'}:{running.port}/healthz"
        assert requests.get(address, timeout=60).status_code == 200
        assert requests.get(address, headers={"Host": "evil.example"}, timeout=60).status_code == 403


def test_names_that_are_not_utf8(tmp_path, gallery, index):
    name = os.fsdecode(b"0001_c1s1_\xe9.png")
    (tmp_path / name).write_bytes((gallery / index.paths[1]).read_bytes())
    records = read_folder(tmp_path)
    assert records.paths == [name]
    with Site(GalleryIndex(index.embeddings[1:2], records, "0" * 16, False)) as running:
        [found] = running.post((tmp_path / name).read_bytes()).json()["results"]
        assert found["path"] == "0001_c1s1_?.png"
        assert running.get("/sample").json()["results"][0]["path"] == "0001_c1s1_?.png"
        assert running.get("/image/0").status_code == 200


# ---- Limits ---------------------------------------------------------------------------------------------------------

def closed(connection):
    """Wait until the server closes a connection; returns what it has sent."""
    sent = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            sent += chunk
    return sent


def test_connections_without_a_request_are_closed(index, monkeypatch):
    monkeypatch.setattr(page, "HEADER_SECONDS", 0.3)
    with Site(index) as running:
        silent, slow = running.connect(), running.connect()
        slow.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
        stop = threading.Event()

        def trickle():
            with suppress(OSError):
                while not stop.wait(0.05):
                    slow.sendall(b"x")

        sender = threading.Thread(target=trickle)
        sender.start()
        assert closed(silent) == b"" and closed(slow) == b""
        stop.set()
        sender.join()
        assert running.get("/healthz").status_code == 200


def test_an_idle_connection_serves_a_second_request(index, monkeypatch):
    monkeypatch.setattr(page, "HEADER_SECONDS", 2)
    with Site(index) as running, requests.Session() as session:
        for _ in range(4):
            assert session.get(running.url("/healthz"), timeout=30).status_code == 200
            time.sleep(0.6)


def test_connections_beyond_the_limit_are_closed(index, monkeypatch):
    monkeypatch.setattr(page, "CONNECTIONS", 5)
    with Site(index) as running:
        kept = [running.connect() for _ in range(5)]
        while len(running.server.server_state.connections) < 5:
            time.sleep(0.01)
        assert [closed(running.connect()) for _ in range(20)] == [b""] * 20
        kept[0].sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert closed(kept[0]).startswith(b"HTTP/1.1 200")
        for connection in kept:
            connection.close()


def test_a_body_that_stalls_is_cut(index, crop, monkeypatch):
    monkeypatch.setattr(page, "BODY_SECONDS", 0.3)
    with Site(index) as running:
        with running.connect() as connection:
            connection.sendall(b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n" + crop[:500])
            sent = closed(connection)
        assert sent.startswith(b"HTTP/1.1 408") and b"the upload took too long" in sent
        assert running.post(crop).status_code == 200


def test_a_body_that_trickles_is_cut(index, monkeypatch):
    monkeypatch.setattr(page, "BODY_SECONDS", 0.5)
    with Site(index) as running, running.connect() as connection:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n")
        with suppress(OSError):
            for _ in range(200):
                connection.sendall(b"x")
                connection.setblocking(False)
                with suppress(BlockingIOError):
                    if sent := connection.recv(1 << 16):
                        break
                connection.setblocking(True)
                time.sleep(0.02)
        assert sent.startswith(b"HTTP/1.1 408")


def test_a_header_that_is_too_long_is_refused(site):
    with site.connect() as connection, suppress(OSError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 50_000 + b"\r\n")
        assert closed(connection).startswith(b"HTTP/1.1 4")
    assert site.get("/healthz").status_code == 200


def test_pictures_are_decoded_by_two_threads(index, monkeypatch):
    running, most, lock, decode = 0, 0, threading.Lock(), images.decode

    def counted(source):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return decode(source)

    monkeypatch.setattr(images, "decode", counted)
    with Site(index) as site, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda row: site.get(f"/image/{row}").status_code, range(20)))
    assert answers == [200] * 20 and most == 2


@pytest.mark.parametrize("change", ["replace", "modify", "remove"])
def test_a_changed_index_file_stops_the_server(index, crop, tmp_path, change):
    file = tmp_path / "run.pt"
    file.write_bytes(b"as loaded")
    with Site(index, index_file=file) as running:
        assert running.post(crop).status_code == 200
        if change == "replace":
            (tmp_path / "new.pt").write_bytes(b"as loaded")
            (tmp_path / "new.pt").replace(file)
        elif change == "modify":
            file.write_bytes(b"modified!")
        else:
            file.unlink()
        with suppress(requests.ConnectionError):  # the server may have stopped already
            answer = running.post(crop)
            assert answer.status_code == 503
            assert answer.json() == {"error": "the index file has changed; restart the search page"}
        running.thread.join(60)
        assert not running.thread.is_alive()


def test_files_that_are_gone_or_outside(tmp_path, gallery, index):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes((gallery / index.paths[0]).read_bytes())
    (root / "text.png").write_text("not an image")
    records = read_folder(gallery).select(torch.arange(4))
    records = type(records)(root, ["../secret.png", str(tmp_path / "secret.png"), "gone.png", "text.png"], records.pids,
                            records.camids, records.seqs, records.frames)
    with Site(GalleryIndex(index.embeddings[:4], records, "0" * 16, False)) as running:
        assert [running.get(f"/image/{row}").status_code for row in range(4)] == [404] * 4
        assert len(listed(running.get("/search", row=2))) == 3


# ---- Many at once ---------------------------------------------------------------------------------------------------

def test_64_clients(site, gallery, index):
    bodies = [(gallery / path).read_bytes() for path in index.paths]
    site.extractor.batches.clear()
    site.extractor.gate.clear()

    def ask(client):
        if client % 4 == 3:
            row = client % len(index)
            return listed(site.get("/search", row=row, topk=3)), index.nearest(
                index.embeddings[row : row + 1].float(), 3, exclude=torch.tensor([row]))[1][0].tolist()
        body, cameras = bodies[client % len(bodies)], [client % 3 + 1] if client % 2 else []
        return listed(site.post(body, topk=3, camera=cameras)), index.nearest(
            embedding(body), 3, camids=cameras or None)[1][0].tolist()

    with ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(ask, client) for client in range(64)]
        site.until_waiting(20)
        site.extractor.gate.set()
        for answer in answers:
            found, expected = answer.result()
            assert found == expected
    assert sum(site.extractor.batches) == 48
    assert max(site.extractor.batches) > 5  # they were embedded together


def test_one_search_too_many_is_refused(index, crop, monkeypatch):
    with Site(index) as running, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(page, "WAITING", 1)
        running.extractor.gate.clear()
        first = pool.submit(running.post, crop)  # is being embedded
        assert running.extractor.entered.wait(60)
        answers = [first, pool.submit(running.post, crop)]
        running.until_waiting(1)
        refused = running.post(crop)
        assert (refused.status_code, refused.json()) == (503, {"error": "too many searches at once, try again"})
        running.extractor.gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]


def test_a_failure_is_one_answer_and_not_the_end(site, crop):
    site.extractor.failure = RuntimeError("out of memory")
    answer = site.post(crop)
    site.extractor.failure = None
    assert (answer.status_code, answer.json()) == (500, {"error": "the server failed; its log has the reason"})
    assert site.post(crop).status_code == 200


# ---- Start and stop -------------------------------------------------------------------------------------------------

def test_listen():
    with page.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ReidError, match=f"--port {port}: Address already in use; stop what uses it"):
            page.listen("127.0.0.1", port)
    for host, port in [("127.0.0.1", 70_000), ("256.1.1.1", 8000), ("a" * 70, 8000)]:
        with pytest.raises(ReidError, match="choose another"):
            page.listen(host, port)


@pytest.fixture
def process(root, gallery, tmp_path):
    """(Popen, port) of a server in a process of its own."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom test_page import *\nlistener = page.listen('127.0.0.1', 0)\nrecords = read_folder(sys.argv[1])\n"
        "index = GalleryIndex(torch.eye(len(records)), records, '0' * 16, False)\n"
        "page.serve(page.create_app(Colours(), index), listener)\nprint('cleaned up')\n")
    paths = os.pathsep.join([str(root), str(root / "tests" / "extras")])
    with subprocess.Popen([sys.executable, program, gallery], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": paths}) as started:
        address = re.search(r"http://\S+", started.stdout.readline())[0]
        assert requests.get(f"{address}/healthz", timeout=60).status_code == 200
        yield started, int(address.rsplit(":", 1)[1])
        started.kill()


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stops_in_order(process, stop):
    started, _ = process
    started.send_signal(stop)
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out, err) == (0, "search page: stopped\ncleaned up\n", "")


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
def test_stops_with_stalled_uploads(process):
    started, port = process
    stalled = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(20)]
    for connection in stalled:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nx")
    assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=60).status_code == 200
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out) == (0, "search page: stopped\ncleaned up\n")
    assert re.fullmatch(r".*Cancel 20 running task.*\n", err)
    for connection in stalled:
        connection.close()


def test_stops_with_a_reason(index, tmp_path):
    file = tmp_path / "run.pt"
    file.write_bytes(b"as loaded")
    listener = page.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(page.serve, page.create_app(Colours(), index, index_file=file), listener)
        assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=60).status_code == 200
        file.write_bytes(b"modified")
        with pytest.raises(ReidError, match="the index file has changed while it was searched; start"):
            serving.result(60)


# ---- The page in a browser ------------------------------------------------------------------------------------------

class Browser:
    """A few commands of the WebDriver protocol (https://www.w3.org/TR/webdriver2/) to chromedriver."""

    def __init__(self, port, chromium, profile):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
                 f"--user-data-dir={profile}"]
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"goog:chromeOptions": {"args": flags, "binary": chromium}}
        self.base += "/" + self("POST", "", capabilities={"alwaysMatch": options})["sessionId"]

    def __call__(self, method, path, **body):
        answer = requests.request(method, self.base + path, json=body if method == "POST" else None, timeout=120).json()
        assert not (isinstance(answer["value"], dict) and "stacktrace" in answer["value"]), answer["value"]
        return answer["value"]

    def open(self, url):
        self("POST", "/url", url=url)

    def js(self, script, *arguments):
        return self("POST", "/execute/sync", script=script, args=arguments)

    def wait(self, script):
        """The value of an expression as soon as it is true."""
        for _ in range(600):
            if value := self.js(f"return {script}"):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never came true: {script}\n" + self.js("return document.body.innerText"))

    def upload(self, file):
        [element] = self("POST", "/element", using="css selector", value="#file").values()
        self("POST", f"/element/{element}/value", text=str(file))

    def click(self, selector):
        self.js("document.querySelector(arguments[0]).click()", selector)

    def rows(self):
        """The rows of the results, once the page has them."""
        self.wait("!document.body.classList.contains('busy') && document.querySelector('#title').textContent == 'Results'")
        return self.js("return Array.from(document.querySelectorAll('.card'), (c) => Number(c.dataset.row))")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("chromium and chromedriver are not installed")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            port = next(m[1] for line in process.stdout if (m := re.search(r"successfully on port (\d+)", line)))
            running = Browser(port, chromium, tmp_path_factory.mktemp("profile"))
            yield running
            running("DELETE", "")
        finally:
            process.terminate()


def test_page_search_by_upload(browser, site, index, crop, tmp_path):
    file = tmp_path / "crop.png"
    file.write_bytes(crop)
    browser.open(site.url("/"))
    browser.wait("document.querySelectorAll('.card img').length > 5 &&"
                 " Array.from(document.querySelectorAll('.card img')).slice(0, 4).every((image) => image.naturalWidth == 32)")
    browser.upload(file)
    expected = index.nearest(embedding(crop), 15)[1][0].tolist()
    assert browser.rows() == expected
    text = browser.js("return document.querySelector('.card').innerText")
    assert "match" in text and "id 3" in text
    browser.wait("document.querySelector('#preview').naturalWidth == 32")

    browser.js("const k = document.querySelector('#topk'); k.value = 4; k.dispatchEvent(new Event('change'))")
    browser.wait("document.querySelectorAll('.card').length == 4")
    assert browser.rows() == expected[:4]
    browser.click("#cameras input[value='2']")
    within = index.nearest(embedding(crop), 4, camids=[2])[1][0].tolist()
    browser.wait(f"document.querySelector('.card').dataset.row == '{within[0]}'")
    assert browser.rows() == within


def test_page_click_and_back(browser, site, index):
    browser.open(site.url("/"))
    browser.wait("document.querySelector('.card')")
    browser.click(".card")
    first = browser.rows()
    browser.click(f".card[data-row='{first[0]}']")
    browser.wait(f"document.querySelector('#preview').src.includes('image/{first[0]}?')")
    again = browser.rows()
    assert again == index.nearest(index.embeddings[first[0]][None].float(), 15, exclude=torch.tensor([first[0]]))[1][0].tolist()
    marks = browser.js("return Array.from(document.querySelectorAll('.card'), (c) => c.className.split(' ')[1])")
    pid = int(index.pids[first[0]])
    assert marks == [verdict(pid, int(index.pids[row])) for row in again]
    browser("POST", "/back")
    browser.wait(f"document.querySelector('.card').dataset.row == '{first[0]}'")
    assert browser.rows() == first


def test_page_shows_errors(browser, site, tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "large.jpg").write_bytes(b"\0" * (page.UPLOAD_LIMIT + 1))
    browser.open(site.url("/"))
    for name, message in [("text.jpg", "not an image"), ("large.jpg", "larger than 10 MB")]:
        browser.upload(tmp_path / name)
        assert message in browser.wait("document.querySelector('#error:not([hidden])')?.textContent")
        assert browser.js("return document.querySelectorAll('.card').length") == 0
    browser.click("#pick")
    browser.wait("document.querySelector('#error').hidden && document.querySelectorAll('.card').length > 5")


def test_page_takes_a_pasted_and_a_dropped_image(browser, site, index, crop):
    expected = index.nearest(embedding(crop), 15)[1][0].tolist()
    for kind in ("paste", "drop"):
        browser.open(site.url("/"))
        browser.js("""
            const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0)), data = new DataTransfer();
            data.items.add(new File([bytes], "crop.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data};
            document.body.dispatchEvent(arguments[1] == "paste" ? new ClipboardEvent("paste", options)
                                                                : new DragEvent("drop", options));
            """, base64.b64encode(crop).decode(), kind)
        assert browser.rows() == expected


def test_page_obeys_its_own_policy(browser, site):
    """No script, style or address from elsewhere, and nothing in the page that its policy blocks."""
    browser.open(site.url("/"))
    browser.wait("document.querySelector('.card')")
    browser.click(".card")
    browser.rows()
    page = site.get("/").text
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert browser.js("return getComputedStyle(document.querySelector('.grid')).display") == "grid"
    log = browser("POST", "/se/log", type="browser")
    assert [line for line in log if "Content Security Policy" in line["message"]] == []
