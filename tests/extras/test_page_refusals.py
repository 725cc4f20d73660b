"""What the search page refuses: bad images, addresses, hosts and web pages, and clients that are slow or too many."""

import os
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import requests
import torch

pytest.importorskip("fastapi", reason="fastapi is not installed")

from page_lab import Site, hits, listed

from reid import images
from reid.data.datasets import read_folder
from reid.extras import server
from reid.retrieval.index import GalleryIndex


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


FORM = {"Content-Type": "multipart/form-data; boundary=b"}
PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'


@pytest.mark.parametrize("body, headers, status, reason", [
    ("crop", {}, 415, "curl -F files=@crop.jpg"), ("crop", {"Content-Type": "image/png"}, 415, "curl -F"),
    (b"", FORM, 400, "no image"), (b"hello", FORM, 400, "files:"), (b"--b--\r\n", FORM, 400, "no image"),
    (PART, FORM, 400, ""), (PART + b"\r\n--b--\r\n", FORM, 400, "not an image"),
    (PART.replace(b"files", b"file") + b"x\r\n--b--\r\n", FORM, 400, "no image"),
    (PART.replace(b'; filename="a"', b"") + b"x\r\n--b--\r\n", FORM, 400, "no image"),
    (PART.replace(b"name", b"nope") + b"x\r\n--b--\r\n", FORM, 400, "files:"),
    (PART + b"x", {"Content-Type": "multipart/form-data"}, 400, "boundary"),
    ((PART + b"x\r\n") * 65 + b"--b--\r\n", FORM, 400, "Maximum number of files is 64"),
    (PART.replace(b'"a"', b'"a\x1b[31m"') + b"x\r\n--b--\r\n", FORM, 400, "not an image"),
], ids=range(13))
def test_what_is_no_form_with_images(site, crop, body, headers, status, reason):
    answer = requests.post(site.url("/search"), data=crop if body == "crop" else body, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"] and answer.json()["error"].isprintable()


@pytest.mark.parametrize("box, reason", [
    *((box, "box: give x1,y1,x2,y2 in pixels")
      for box in ("1,2,3", "a,b,c,d", "1,2,3,4,5", "nan,0,1,1", "0,0,1e9,1", "", "1,2,3,4\n")),
    ("5,5,5,9", "empty"), ("100,0,200,50", "outside of the image"), ("-9,-9,-1,-1", "outside"), ("9,9,2,2", "empty"),
    (["0,0,9,9"] * 65, "box"),
])
def test_boxes_that_hold_nothing(site, crop, box, reason):
    answer = site.post(crop, box=box)
    assert answer.status_code == 400 and reason in answer.json()["error"] and "\n" not in answer.json()["error"]


def test_boxes_are_of_one_image(site, crop):
    answer = site.post(crop, crop, box="0,0,9,9")
    assert (answer.status_code, answer.json()) == (400, {"error": "box: of one image, but 2 were sent"})


def test_too_large(site, crop):
    answer = site.post(crop, b"\0" * (server.UPLOAD_LIMIT + 1))
    assert (answer.status_code, answer.json()) == (413, {"error": "1.png: the image file is larger than 10 MB"})
    answer = requests.post(site.url("/search"), data=(b"\0" * 2**20 for _ in range(100)), headers=FORM, timeout=60)
    assert answer.status_code in (400, 413)  # no Content-Length
    answer = requests.post(site.url("/search"), data=(PART + b"\0" * 2**20 for _ in range(100)), headers=FORM, timeout=60)
    assert (answer.status_code, answer.json()) == (413, {"error": "the request is larger than 64 MB"})
    assert site.post(crop).status_code == 200


def test_too_much_at_once(index, crop, monkeypatch):
    monkeypatch.setattr(server, "BODIES_LIMIT", 1000)
    with Site(index) as running:
        answer = running.post(crop)
        assert (answer.status_code, answer.json()) == (429, {"error": "too many uploads at once, try again"})
        monkeypatch.setattr(server, "BODIES_LIMIT", len(crop) + 1000)
        assert [running.post(crop).status_code for _ in range(3)] == [200] * 3  # what was read is given back


def test_content_length_that_lies(site, crop):
    for length in (5, 10**12):
        with socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection:
            connection.sendall(f"{START}Content-Length: {length}\r\n\r\n".encode() + PART + crop)
    assert site.post(crop).status_code == 200


ROW = "/search?path=0001_c1s1_000000_00.png"
START = "POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"


@pytest.mark.parametrize("path, status", [
    ("/image?path=../../etc/passwd", 404), ("/image?path=..%2f..%2fetc%2fpasswd", 404), ("/image?path=/etc/passwd", 404),
    ("/image", 400), ("/image?path=", 400), ("/image?path=%00", 404), ("/image?path=" + "a" * 5000, 400),
    ("/image/etc/passwd", 404),
    ("/search?path=none.png", 404), ("/search", 400), (f"{ROW}&topk=0", 400), (f"{ROW}&topk=16", 400), (f"{ROW}&topk=a", 400),
    (f"{ROW}&camera=9", 400), (f"{ROW}&camera=x", 400), (f"{ROW}&camera={10**30}", 400), (f"{ROW}&first_frame=-1", 400),
    (f"{ROW}&last_frame={10**30}", 400), (f"{ROW}&first_frame=2&last_frame=1", 400), (f"{ROW}&rerank=perhaps", 400),
    ("/redoc", 404), ("/page.html", 404), ("/page.js", 404), ("/person", 404),
])
def test_addresses_from_outside(site, path, status):
    found, body = site.raw(path)
    assert found == status
    assert b'{"error":"' in body and b"root:" not in body


@pytest.mark.parametrize("path, error", [
    ("/search?path=x.png&cameras=1", "cameras: no parameter of this operation, which has path, topk, camera, first_frame, "
     "last_frame, rerank"),
    ("/people?topk=1", "topk: no parameter of this operation, which has none"),
    ("/healthz?%0a=1", "\\n: no parameter of this operation, which has none"),
    ("/people/a%0Ab", "no such address; /docs lists all"), ("/embed", "no such method here; /docs lists all"),
])
def test_what_no_operation_has(site, path, error):
    answer = requests.get(site.url(path), timeout=60)
    assert answer.status_code in (400, 404, 405) and answer.json() == {"error": error}


@pytest.mark.parametrize("host, allowed", [
    ("evil.example", False), ("evil.example:8000", False), ("127.0.0.1.evil.example", False), ("", False), ("[::1", False),
    ("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1", True), ("127.1.2.3:80", True), ("192.168.1.5:8000", True),
    ("[::1]", True), ("[::1]:8000", True), ("[fe80::1]:8000", True), ("crops.example:8000", True), ("localhost.", False),
])
def test_only_addresses_and_allowed_names_are_served(site, host, allowed):
    """DNS rebinding: a web page of evil.example resolves its name to this server's address and reads the gallery."""
    for path in ("/", ROW, "/docs", "/healthz"):
        status, body = site.raw(path, host=host)
        assert status == (200 if allowed else 403), body
    assert allowed or b"--allowed_hosts" in body


def test_other_web_pages_are_refused(site, crop):
    for origin in ("cross-site", "same-site"):
        assert site.raw(ROW, Sec_Fetch_Site=origin)[0] == 403
        assert site.raw(ROW, Sec_Fetch_Site=origin, Sec_Fetch_Mode="navigate")[0] == 403
        assert site.raw("/", Sec_Fetch_Site=origin, Sec_Fetch_Mode="no-cors")[0] == 403
        assert site.raw("/", Sec_Fetch_Site=origin, Sec_Fetch_Mode="navigate")[0] == 200  # a link to the page
        assert site.raw("/", Sec_Fetch_Site=origin, Sec_Fetch_Mode="navigate", method="POST")[0] == 403
        batches = len(site.extractor.batches)
        answer = requests.post(site.url("/search"), files={"files": crop}, headers={"Sec-Fetch-Site": origin})
        assert answer.status_code == 403 and len(site.extractor.batches) == batches
    for own in ("same-origin", "none"):
        assert site.raw(ROW, Sec_Fetch_Site=own)[0] == 200


@pytest.mark.parametrize("host", ["::1", "0.0.0.0"])
def test_other_addresses_to_listen_on(index, host):
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 on this machine")
    with Site(index, host=host, token="sixteen letters!") as running:
        address = f"http://{'[::1]' if host == '::1' else '127.0.0.1'}:{running.port}/healthz"
        assert requests.get(address, timeout=60).status_code == 200
        assert requests.get(address, headers={"Host": "evil.example"}, timeout=60).status_code == 403


def test_names_that_are_not_utf8(tmp_path, gallery, index):
    name = os.fsdecode(b"0001_c1s1_\xe9.png")
    (tmp_path / name).write_bytes((gallery / index.paths[1]).read_bytes())
    records = read_folder(tmp_path)
    assert records.paths == [name]
    with Site(GalleryIndex(index.embeddings[1:2], records, "0" * 16, False)) as running:
        [found] = hits(running.post((tmp_path / name).read_bytes()))
        assert found["path"] == "0001_c1s1_?.png"
        assert running.get("/sample").json()["images"][0]["path"] == "0001_c1s1_?.png"
        assert running.get("/image", path="0001_c1s1_?.png").status_code == 200


def closed(connection):
    """Wait until the server closes a connection; returns what it has sent."""
    sent = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            sent += chunk
    return sent


def test_connections_without_a_request_are_closed(index, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.3)
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


@pytest.mark.parametrize("first, status", [
    (b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"200"),
    (b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n", b"401"),
], ids=["answered", "refused before its body"])
def test_connections_without_a_further_request_are_closed(index, monkeypatch, first, status):
    monkeypatch.setattr(server, "HEADER_SECONDS", 1)
    with Site(index, token="sixteen letters!") as running, running.connect() as connection:
        connection.sendall(first)
        sent = connection.recv(1 << 16)
        connection.sendall(b"GET /hea")  # which ends uvicorn's own limit; for the second request, a part of its body
        sent += closed(connection)
        assert sent.startswith(b"HTTP/1.1 " + status) and sent.count(b"HTTP/1.1") == 1


def test_answers_that_are_not_read_end(index, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.3)
    with Site(index) as running, running.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 500)  # more than the buffers of the system hold
        assert connection.recv(1) == b"H"
        for _ in range(1000):
            if not running.server.server_state.connections:
                break
            time.sleep(0.01)
        else:
            raise AssertionError("the connection is still open")


def test_an_idle_connection_serves_a_second_request(index, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 2)
    with Site(index) as running, requests.Session() as session:
        for _ in range(4):
            assert session.get(running.url("/healthz"), timeout=30).status_code == 200
            time.sleep(0.6)


def test_connections_beyond_the_limit_are_closed(index, monkeypatch):
    monkeypatch.setattr(server, "CONNECTIONS", 5)
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
    monkeypatch.setattr(server, "BODY_SECONDS", 0.3)
    with Site(index) as running:
        with running.connect() as connection:
            connection.sendall(START.encode() + b"Content-Length: 1000\r\n\r\n" + PART + crop[:500])
            sent = closed(connection)
        assert sent.startswith(b"HTTP/1.1 408") and b"the upload took too long" in sent
        assert running.post(crop).status_code == 200


def test_a_body_that_trickles_is_cut(index, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.5)
    with Site(index) as running, running.connect() as connection:
        connection.sendall(START.encode() + b"Content-Length: 100000\r\n\r\n" + PART)
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
        answers = list(pool.map(lambda path: site.get("/image", path=path).status_code, list(index.paths)[:20]))
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
    """Of absolute paths, only those of the index are shown, which are enrolled images; links and other names of them are not."""
    root, other = tmp_path / "root", str(tmp_path / "enrolled.png")
    root.mkdir()
    for name in ("enrolled.png", "secret.png"):
        (tmp_path / name).write_bytes((gallery / index.paths[0]).read_bytes())
    (root / "text.png").write_text("not an image")
    records = read_folder(gallery).select(torch.arange(4))
    records = type(records)(root, ["../secret.png", other, "gone.png", "text.png"], records.pids, records.camids, records.seqs,
                            records.frames)
    with Site(GalleryIndex(index.embeddings[:4], records, "0" * 16, False)) as running:
        assert [running.get("/image", path=path).status_code for path in records.paths] == [404, 200, 404, 404]
        for path in (tmp_path / "secret.png", f"{tmp_path}/./enrolled.png", f"{tmp_path}//enrolled.png", other[1:],
                     "enrolled.png", f"{root}/../enrolled.png", f"{root}/text.png", "/etc/passwd", tmp_path):
            assert running.get("/image", path=str(path)).status_code == 404
        assert len(listed(running.get("/search", path="gone.png"))) == 3
