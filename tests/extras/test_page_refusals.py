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

from page_lab import Site, listed

from reid import images
from reid.data.datasets import read_folder
from reid.extras import page
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
