"""The search page starts, and ends by signals and with a reason."""

import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from forked import Script

pytest.importorskip("fastapi", reason="fastapi is not installed")

from page_lab import Colours, Site

from reid import ReidError
from reid.extras import server
from reid.extras.page import create_app


@pytest.mark.skipif(os.name != "posix", reason="limits as on POSIX")
@pytest.mark.parametrize("files, connections", [(256, 128), (832, 512), (1 << 20, 512), (-1, 512), (10, 8)])
def test_connections_leave_files_for_everything_else(monkeypatch, files, connections):
    monkeypatch.setattr(server.resource, "getrlimit", lambda kind: (files, files))
    assert server.connection_limit() == connections


def test_listen():
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ReidError, match=f"--port {port}: Address already in use; stop what uses it"):
            server.listen("127.0.0.1", port)
    for host, port in [("127.0.0.1", 70_000), ("256.1.1.1", 8000), ("a" * 70, 8000)]:
        with pytest.raises(ReidError, match="choose another"):
            server.listen(host, port)


TOKEN = "sixteen letters!"


def test_other_machines_need_a_token():
    short, odd = "REID_TOKEN: is too short; give", "REID_TOKEN: has characters that a header cannot carry; give"
    for host, token, refused in [("0.0.0.0", None, "--host 0.0.0.0: set REID_TOKEN to"),
                                 ("::", "", "--host ::: set REID_TOKEN to"),
                                 ("0.0.0.0", "short", short), ("127.0.0.1", "short", short),
                                 ("0.0.0.0", "geheimes Schl\xfcsselwort", odd), ("127.0.0.1", f"{TOKEN}\n", odd),
                                 ("127.0.0.1", f" {TOKEN}", odd),
                                 ("0.0.0.0", TOKEN, ""), ("127.0.0.1", TOKEN, ""), ("localhost", None, "")]:
        if refused:
            with pytest.raises(ReidError, match=f"^{refused} a secret of 16 or more ASCII characters"):
                server.listen(host, 0, token)
        else:
            server.listen(host, 0, token).close()


def test_the_token(index, crop):
    with Site(index, token=TOKEN) as site:
        for given, status in [(None, 401), (("x", "wrong"), 401), (("anyone", TOKEN), 200)]:
            for path in ("/", "/docs", "/openapi.json", "/sample", "/people", f"/image?path={index.paths[0]}"):
                answer = requests.get(site.url(path), auth=given, timeout=60)
                assert answer.status_code == status
            answer = requests.post(site.url("/search"), files={"files": crop}, auth=given, timeout=60)
            assert answer.status_code == status and ("error" in answer.json()) == (status == 401)
            assert requests.get(site.url("/healthz"), auth=given, timeout=60).status_code == 200
        for header, status in [(f"Bearer {TOKEN}", 200), (f"bearer {TOKEN}", 200), (f"Bearer {TOKEN}x", 401), ("Bearer", 401),
                               (f"Digest {TOKEN}", 401), (TOKEN, 401),
                               ("Basic !", 401), ("Basic /w==", 401), (f"Bearer {TOKEN[:-1]}", 401), ("Bearer \xe9", 401)]:
            assert site.raw("/sample", Authorization=header)[0] == status


PROGRAM = """
import resource
import sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
import torch
from page_lab import Colours, Site
from reid.data.datasets import read_folder
from reid.extras import server
from reid.extras.page import create_app
from reid.retrieval.index import GalleryIndex

listener, records = server.listen("127.0.0.1", 0), read_folder(sys.argv[1])
index = GalleryIndex(torch.eye(len(records)), records, "0" * 16, False)
server.serve(create_app(Colours(), index), listener)
print("cleaned up")
"""


@pytest.fixture
def process(gallery, tmp_path):
    """(Script, port) of a server in a process of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    script = Script(tmp_path, tmp_path / "program.py", gallery).until_prints("http://")
    port = int(re.search(r"http://\S+:(\d+)", (script.log / "out").read_text())[1])
    assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=60).status_code == 200
    yield script, port
    script.stop(signal.SIGKILL)


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stops_in_order(process, stop):
    """Also after more connections than files may be open, of which some are kept."""
    script, port = process
    connections, statuses = [], []
    for _ in range(30):
        connections += [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(10)]
        try:
            statuses.append(requests.get(f"http://127.0.0.1:{port}/healthz", timeout=60).status_code)
        except requests.ConnectionError:
            statuses.append("closed")
    assert (statuses[0], statuses[8], statuses[-1]) == (200, 503, "closed")  # by 11, 91 and 128 connections
    script.stop(stop).works()
    for connection in connections:
        connection.close()
    assert script.out.endswith("\nsearch page: stopped\ncleaned up\n") and script.err == ""


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
def test_stops_with_stalled_uploads(process):
    script, port = process
    stalled = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(20)]
    for connection in stalled:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                           b"Content-Length: 1000\r\n\r\n--b")
    assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=60).status_code == 200
    script.stop(signal.SIGTERM).works()
    assert script.out.endswith("\nsearch page: stopped\ncleaned up\n")
    assert re.fullmatch(r".*Cancel 20 running task.*\n", script.err)
    for connection in stalled:
        connection.close()


def test_stops_with_a_reason(index, tmp_path):
    file = tmp_path / "run.pt"
    file.write_bytes(b"as loaded")
    listener = server.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(server.serve, create_app(Colours(), index, index_file=file), listener)
        assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=60).status_code == 200
        file.write_bytes(b"modified")
        with pytest.raises(ReidError, match="the index file has changed while it was searched; start"):
            serving.result(60)
