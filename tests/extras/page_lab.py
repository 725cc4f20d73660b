"""Shared parts of the tests of the search page: a server in a thread, and an extractor of colours."""

import http.client
import os
import socket
import threading
import time
from functools import partial

import requests
import torch
import torch.nn.functional as F

from reid import images
from reid.extras import server
from reid.extras.page import create_app
from reid.extras.writer import Writer
from reid.retrieval.index import GalleryIndex

SIZE, PRINT = (16, 8), "0" * 16  # of the images; the fingerprint of the galleries


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
        listener = server.listen(host, 0, options.get("token"))
        self.port = listener.getsockname()[1]
        self.server = server.make_server(create_app(self.extractor, index, **options))
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

    def post(self, *bodies, path="/search", **params):
        files = [("files", (f"{i}.png", body)) for i, body in enumerate(bodies)]
        return requests.post(self.url(path), files=files, params=params, timeout=60)

    def get(self, path, /, **params):
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


def writable(index, uri, prepare=lambda gallery: gallery, opened=None):
    """Options of `create_app` for a server that may change an index file with the rows of `index`, or what `opened` opens."""
    if opened is None:
        index.save(uri)
        opened = partial(GalleryIndex.load, uri, PRINT)
    return {"index": prepare(opened()), "index_file": uri if os.path.isfile(uri) else None,
            "writable": partial(Writer, str(uri), opened, prepare)}


def embedding(body):
    return Colours().embed(images.resize([images.decode(body)], SIZE))


def hits(answer):
    """The hits of the only ranking of an answer."""
    assert answer.status_code == 200, answer.text
    [ranking] = answer.json()["rankings"]
    assert [hit["position"] for hit in ranking["hits"]] == list(range(1, len(ranking["hits"]) + 1))
    return ranking["hits"]


def listed(answer):
    return [hit["path"] for hit in hits(answer)]


def paths(index, rows):
    """The paths of rows, int64 [k], without -1."""
    return [index.paths[row] for row in rows.tolist() if row >= 0]
