"""data_prep.py: the download from a faulty server."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from prep_lab import clean, content, expected, members, pack, refused, tree

import data_prep
from reid.data import prepare

pytest.importorskip("fcntl")


@contextmanager
def server(data, script):
    """A web server that serves `data` and misbehaves as the `script` says, a word per request; then it is good.

    Yields (url, list of the requests' Range headers).
    """
    ranges = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, code, body, length=None, **headers):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def do_GET(self):
            asked = self.headers.get("Range")
            ranges.append(asked)
            word = script.pop(0) if script else "good"
            start = int(asked[6:-1]) if asked else 0
            part, span = data[start:], f"bytes {start}-{len(data) - 1}/{len(data)}"
            if word.isdecimal():
                self.answer(int(word), b"busy", Retry_After="7" if word == "429" else "soon")
            elif word == "html":
                self.answer(200, b"<html>Sign in</html>", Content_Type="text/html; charset=utf-8")
            elif word == "sneaky html":
                self.answer(200, b"<html>Sign in</html>" * 200, Content_Type="application/zip")
            elif word == "other file":
                self.answer(416, b"", Content_Range="bytes */17")
            elif word == "wrong range":
                self.answer(206, data, Content_Range=f"bytes 0-{len(data) - 1}/{len(data)}")
            elif word == "piece":
                end = start + len(part) // 2
                self.answer(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}")
            elif word == "no ranges":
                self.answer(200, data)
            elif word == "cut, no ranges":
                self.answer(200, data[: len(data) // 2], len(data))
            elif word == "claims too little":
                self.answer(200, data, len(data) // 2)
            elif word == "claims too much":
                self.answer(200, data, len(data) + 1000)
            elif word == "wrong bytes":
                self.answer(200, bytes(len(data)))
            elif word == "hang":
                self.answer(200, data[: len(data) // 2], len(data))
                time.sleep(30)
            elif start >= len(data):
                self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
            else:
                code, headers = (206, {"Content_Range": span}) if asked else (200, {})
                self.answer(code, part[: len(part) // 2] if word == "cut" else part, len(part), **headers)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads, http.block_on_close = True, False
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/market", ranges
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture(scope="module")
def big_zip(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("zip") / "m.zip", members() | {"readme": content("readme", 300_000)}).read_bytes()


@pytest.fixture
def naps(monkeypatch):
    slept = []
    monkeypatch.setattr("reid.data.archives.time", SimpleNamespace(sleep=slept.append))
    return slept


@pytest.mark.parametrize("script", [
    [], ["cut"], ["cut"] * 4, ["500"], ["429"], ["503", "cut", "500", "cut"], ["cut", "no ranges"], ["cut", "other file"],
    ["cut", "wrong range"], ["cut", "piece", "piece"], ["cut, no ranges", "cut, no ranges", "no ranges"], ["claims too much"],
    ["cut", "wrong range", "cut", "429"]], ids=",".join)
def test_download_survives(tmp_path, prep, naps, big_zip, script):
    with server(big_zip, list(script)) as (url, ranges):
        status, _, stderr = prep("--url", url, "--any_counts")
    assert status == 0, stderr
    assert tree(tmp_path / "out") == expected()
    assert next(tmp_path.glob("download-*")).read_bytes() == big_zip
    assert len(naps) == len([word for word in script if word != "no ranges"])  # no fault costs a second request
    if script[:1] == ["cut"]:  # what was there is asked for only once
        assert ranges[0] is None and 0 < int(ranges[1][6:-1]) <= len(big_zip) // 2
    if script == ["429"]:
        assert naps == [7]
    if script == ["500"]:
        assert naps == [2]


@pytest.mark.parametrize("script, words", [
    (["404"], ["404", "--archive"]), (["403"], ["403"]), (["html"], ["web page"]), (["500"] * 6, ["6 times", "500", "run again"]),
    (["sneaky html"], ["cannot be unpacked"]), (["wrong bytes"], ["no image named like"]),
    (["claims too little"], ["cannot be unpacked"]), (["cut", "cut", "404"], ["404"]), (["cut", "html"], ["web page"])],
    ids=lambda value: ",".join(value))
def test_download_fails_with_one_line_and_recovers(tmp_path, prep, naps, big_zip, script, words):
    script = list(script)
    with server(big_zip, script) as (url, ranges):
        refused(prep("--url", url, "--any_counts"), *words)
        clean(tmp_path)
        before = len(ranges)
        assert prep("--url", url, "--any_counts")[0] == 0
    assert tree(tmp_path / "out") == expected()
    if before > 1 and "500" not in words:  # the second run went on where the first had stopped
        assert ranges[before] is not None


def test_back_off_grows_and_progress_resets_it(tmp_path, prep, naps, big_zip):
    with server(big_zip, ["500", "500", "500", "cut", "500", "500"]) as (url, _):
        assert prep("--url", url, "--any_counts")[0] == 0
    assert naps == [2, 4, 8, 1, 2, 4]


def test_download_killed_and_run_again(tmp_path, prep, naps, big_zip):
    args = data_prep.get_args_parser().parse_args(["--any_counts", "--output", str(tmp_path / "out")])
    with server(big_zip, ["hang"]) as (args.url, ranges):
        if not (pid := os.fork()):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                data_prep.main(args)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 20
        while not any(part.stat().st_size > 50_000 for part in tmp_path.glob("*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        part = next(tmp_path.glob("*.part"))
        have = part.stat().st_size
        assert part.read_bytes() == big_zip[:have]
        assert prep("--url", args.url, "--any_counts")[0] == 0
    assert ranges == [None, f"bytes={have}-"]
    assert tree(tmp_path / "out") == expected() and not list(tmp_path.glob("*.part"))


def test_no_server_and_no_address(tmp_path, prep, naps):
    result = prep("--url", "http://127.0.0.1:9/x")
    refused(result, "6 times", "Connection refused", "--archive")
    refused(prep("--url", "nonsense"), "nonsense", "is not an address")


def test_endless_answers_end(tmp_path, prep, naps, big_zip, monkeypatch):
    with server(big_zip, []) as (url, _):
        with monkeypatch.context() as patch:
            patch.setattr("reid.data.archives.MAX_SIZE", 100_000)
            refused(prep("--url", url, "--any_counts"), "more than 0 GB")
        assert not any(part.stat().st_size for part in tmp_path.glob("*.part"))
        assert prep("--url", url, "--any_counts")[0] == 0
    assert tree(tmp_path / "out") == expected()


def test_secrets_in_an_address_are_neither_shown_nor_stored(tmp_path, prep, naps, big_zip):
    with server(big_zip, ["500", "cut"]) as (url, _):
        url = url.replace("//", "//user:s3cret@") + "?token=s3cret"
        results = [prep("--url", url, "--any_counts"), prep("--url", url, "--any_counts")]
        stamp = (tmp_path / "out" / prepare.STAMP).read_text()
        assert "complete already" in results[1][1] and tree(tmp_path / "out") == expected()
        refused(prep("--url", url.replace("token", "other"), "--any_counts"), "choose another --output")  # another file
    for bad in ("http://u:s3cret/x@127.0.0.1:9/m.zip?a=s3cret", "htp://u:s3cret@127.0.0.1", "http://127.0.0.1:9/m.zip?a=s3cret b",
                "http://[s3cret@127.0.0.1", "http://127.0.0.1:9/?s3cret"):
        results.append(prep("--url", bad, "--any_counts", output=tmp_path / "other"))
        refused(results[-1], "127.0.0.1")
    assert "s3cret" not in f"{results} {stamp}"


@pytest.mark.parametrize("header", ["Retry_After", "Content_Length", "Content_Range"])
def test_headers_of_a_hostile_server(tmp_path, prep, naps, header):
    """Numbers of 5,000 digits, and control characters in the reason, end in one line."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response({"Retry_After": 503, "Content_Length": 200, "Content_Range": 206}[header], "a\x1b]0;b")
            self.send_header(header.replace("_", "-"), {"Content_Range": "bytes 0-9/"}.get(header, "") + "9" * 5000)
            self.end_headers()
            self.wfile.write(b"short")
            self.close_connection = True

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads, http.block_on_close = True, False
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        result = prep("--url", f"http://127.0.0.1:{http.server_address[1]}/x", "--any_counts")
    finally:
        http.shutdown()
        http.server_close()
    refused(result)
    assert "\x1b" not in result[1] + result[2] and max(naps, default=0) <= 300
