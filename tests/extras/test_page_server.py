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

from page_lab import Colours

from reid import ReidError
from reid.extras import page


def test_listen():
    with page.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ReidError, match=f"--port {port}: Address already in use; stop what uses it"):
            page.listen("127.0.0.1", port)
    for host, port in [("127.0.0.1", 70_000), ("256.1.1.1", 8000), ("a" * 70, 8000)]:
        with pytest.raises(ReidError, match="choose another"):
            page.listen(host, port)


PROGRAM = """
import sys
import torch
from page_lab import Colours
from reid.data.datasets import read_folder
from reid.extras import page
from reid.retrieval.index import GalleryIndex

listener, records = page.listen("127.0.0.1", 0), read_folder(sys.argv[1])
index = GalleryIndex(torch.eye(len(records)), records, "0" * 16, False)
page.serve(page.create_app(Colours(), index), listener)
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
    script, _ = process
    script.stop(stop).works()
    assert script.out.endswith("\nsearch page: stopped\ncleaned up\n") and script.err == ""


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
def test_stops_with_stalled_uploads(process):
    script, port = process
    stalled = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(20)]
    for connection in stalled:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nx")
    assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=60).status_code == 200
    script.stop(signal.SIGTERM).works()
    assert script.out.endswith("\nsearch page: stopped\ncleaned up\n")
    assert re.fullmatch(r".*Cancel 20 running task.*\n", script.err)
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
