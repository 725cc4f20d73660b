"""The search page: a local web server that searches one gallery with one Extractor.

    GET  /                      the page (reid/extras/page.html)
    POST /search?topk=&camera=  search for an image file, the body of the request; camera may be repeated
    GET  /search?row=           search for an image of the gallery
    GET  /sample                some images of the gallery, to choose a query from
    GET  /image/{row}           a gallery image as JPEG
    GET  /healthz               state of the server

Answers are JSON; an error is {"error": one line}.
"""

import asyncio
import base64
import hashlib
import io
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from PIL import Image

from reid import ReidError, images
from reid.data.names import DISTRACTOR, JUNK, UNKNOWN, UNKNOWN_PID
from reid.extras.pictures import identity, verdict

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException as AnyHTTPException
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as missing:
    raise ReidError(f"--serve needs {missing.name}: pip install -e '.[page]'") from missing

UPLOAD_LIMIT = 10 << 20  # bytes of an image file
WAITING = 256  # searches in the queue, and connections that are answered; more are refused with 503
CONNECTIONS = 512  # open connections; more are closed at once, so that the process keeps file descriptors
HEADER_SECONDS, BODY_SECONDS = 15, 120  # for the header of a request, and for its body
SAMPLE, NEIGHBOURS = 24, 50  # images to choose from; those of an engine are drawn from so many near a random direction
PICTURE = 512  # pixels, the longer side of what /image sends at most


@dataclass(eq=False)
class Job:
    """A search. query: pixels, uint8 [3, H, W], or the embedding [D] of the gallery image `row`; answer: values or an error."""

    query: torch.Tensor
    topk: int
    cameras: frozenset
    row: int = -1
    answer: dict | Exception | None = None


class Searcher:
    """Searches in batches on one thread: the searches that arrive while a batch is computed become the next batch."""

    def __init__(self, extractor, index):
        self.extractor, self.index = extractor, index
        cameras = index.cameras if hasattr(index, "cameras") else index.camids.unique().tolist()
        self.cameras = sorted(set(cameras) - {UNKNOWN})
        self.rows = index if hasattr(index, "__contains__") else range(len(index))  # an engine's rows are any 63 bits
        self.waiting, self.thread = deque(), ThreadPoolExecutor(1, "search")

    async def search(self, job):
        """Return the values of the answer to a Job."""
        started = time.perf_counter()
        if missing := sorted(job.cameras - set(self.cameras)):
            raise HTTPException(400, f"camera {missing[0]}: the gallery has {', '.join(map(str, self.cameras)) or 'none'}")
        if len(self.waiting) >= WAITING:
            raise HTTPException(503, "too many searches at once, try again")
        self.waiting.append(job)
        await asyncio.get_running_loop().run_in_executor(self.thread, self._work, job)
        if isinstance(job.answer, Exception):
            raise job.answer
        return job.answer | {"threshold": self.index.threshold, "seconds": round(time.perf_counter() - started, 4)}

    def _work(self, job):
        """Answer the jobs that wait, in batches, until `job` has its answer, which an earlier call may have given."""
        while job.answer is None:
            batch = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.extractor.batch_size))]
            try:
                self._answer(batch)
            except Exception as error:  # such as a lack of memory: these searches fail, the server goes on
                for failed in batch:
                    failed.answer = HTTPException(503, str(error)) if isinstance(error, ReidError) else error

    def _answer(self, batch):
        """Embed a batch together, and search once for each set of cameras. An image is not a result of itself."""
        pixels = [job.query for job in batch if job.row < 0]
        embedded = iter(self.index.normalise(self.extractor.embed(pixels)) if pixels else ())
        for job in batch:
            job.query = next(embedded) if job.row < 0 else job.query
        for cameras in {job.cameras for job in batch}:
            group = [job for job in batch if job.cameras == cameras]
            lists = self.index.search(torch.stack([job.query for job in group]), max(job.topk for job in group),
                                      camids=sorted(cameras) or None, exclude=torch.tensor([job.row for job in group]))
            for job, ranked in zip(group, lists):
                query = self.describe(job.row) if job.row >= 0 else None
                pid = query["pid"] if query else UNKNOWN_PID
                job.answer = {"query": query, "results": [
                    self.describe(hit.row) | {"position": hit.position, "score": hit.score, "match": hit.match,
                                              "verdict": verdict(pid, hit.pid)} for hit in islice(ranked, job.topk)]}

    def check(self, row):
        """Return `row`; raise HTTPException if the gallery does not have it."""
        if not 0 <= row < 1 << 63 or row not in self.rows:
            raise HTTPException(404, f"row {row}: not in the gallery")
        return row

    def describe(self, row):
        """A gallery image as plain values. The row is text, because JavaScript rounds numbers above 2^53."""
        path, pid = self.index.paths[row].encode("utf-8", "replace").decode(), int(self.index.pids[row])
        return {"row": str(row), "path": path, "pid": pid, "camid": int(self.index.camids[row]), "label": identity(pid, path)}

    def sample(self):
        """Up to SAMPLE different images of people to choose from; of an engine, neighbours of random directions."""
        if self.rows is self.index:
            lists = self.index.search(F.normalize(torch.randn(SAMPLE, self.extractor.dim)), NEIGHBOURS)
            rows = {int(ranked.rows[torch.randint(len(ranked), ())]) for ranked in lists if len(ranked)}
        else:
            people = ((self.index.pids != JUNK) & (self.index.pids != DISTRACTOR)).nonzero()[:, 0]
            rows = people[torch.randperm(len(people))[:SAMPLE]].tolist()
        return [self.describe(row) for row in rows]

    def picture(self, row):
        """A gallery image as JPEG, upright and no larger than PICTURE; decoded, so that no other file is ever sent."""
        path = PurePosixPath(self.index.paths[self.check(row)])
        if path.is_absolute() or ".." in path.parts:  # the index file may be of another origin
            raise HTTPException(404, f"row {row}: its file lies outside the data root")
        try:
            pixels = images.decode(Path(self.index.data_root) / path)
        except ReidError as error:
            raise HTTPException(404, f"row {row}: its file is missing or damaged") from error
        picture, out = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
        picture.thumbnail((PICTURE, PICTURE))
        picture.save(out, "JPEG", quality=92)
        return out.getvalue()


def create_app(extractor, index, allowed_hosts=(), index_file=None, topk_limit=200):
    """Create the ASGI application for an Extractor and a GalleryIndex or MilvusGallery.

    allowed_hosts: names, beside IP addresses and localhost, that requests may address the server by. index_file: the file
    that `index` maps into memory: nothing is answered after it has changed. topk_limit: highest number of results.
    """
    searcher, loaded = Searcher(extractor, index), _stamp(index_file)
    decoders = ThreadPoolExecutor(2, "decode")  # two: an image of 50 megapixels takes 300 MB
    page, policy = _page({"images": len(index), "cameras": searcher.cameras, "model": extractor.describe(),
                          "threshold": index.threshold, "topk_limit": topk_limit, "upload_limit": UPLOAD_LIMIT,
                          "version": os.urandom(4).hex()})  # browsers must not show cached images of another index

    async def run(pool, function, *args):
        return await asyncio.get_running_loop().run_in_executor(pool, function, *args)

    app = FastAPI(title="reid", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.changed = lambda: _stamp(index_file) != loaded
    _harden(app, policy, {"localhost", *(name.lower() for name in allowed_hosts)})
    topk_query, camera_query = Query(min(20, topk_limit), ge=1, le=topk_limit), Query([])

    @app.get("/")
    async def home():
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    @app.post("/search")
    async def search_image(request: Request, topk: int = topk_query, camera: list[int] = camera_query):
        body = await _read(request)
        pixels = await run(decoders, lambda: images.resize([images.decode(body)], extractor.size)[0])
        return await searcher.search(Job(pixels, topk, frozenset(camera)))

    @app.get("/search")
    async def search_row(row: int, topk: int = topk_query, camera: list[int] = camera_query):
        vector = await run(searcher.thread, lambda: index.embeddings[searcher.check(row)].float())
        return await searcher.search(Job(F.normalize(vector, dim=0), topk, frozenset(camera), row))

    @app.get("/sample")
    async def sample():
        return {"results": await run(searcher.thread, searcher.sample)}

    @app.get("/image/{row}")
    async def picture(row: int):
        jpeg = await run(decoders, searcher.picture, row)
        return Response(jpeg, headers={"Cache-Control": "private, max-age=86400"}, media_type="image/jpeg")

    @app.get("/healthz")
    def healthz():  # on a thread of its own, since an engine counts its rows
        return {"status": "ok", "images": len(index), "model": extractor.describe(), "waiting": len(searcher.waiting)}

    return app


def _harden(app, policy, names):
    """Refuse requests of other sites, answer errors as {"error": one line}, and restrict what a browser does with answers."""
    def failed(status, message, headers=None):
        return JSONResponse({"error": message}, status, headers)

    app.add_exception_handler(ReidError, lambda request, error: failed(400, str(error)))
    app.add_exception_handler(AnyHTTPException, lambda request, error: failed(error.status_code, error.detail, error.headers))
    app.add_exception_handler(RequestValidationError, lambda request, error: failed(
        400, "; ".join(f"{e['loc'][1]}: {e['msg']}" for e in error.errors())))
    app.add_exception_handler(Exception, lambda request, error: failed(500, "the server failed; its log has the reason"))

    @app.middleware("http")
    async def guard(request, call_next):
        if refusal := _refusal(request, names):
            response = failed(403, refusal)
        elif app.state.changed():
            response = failed(503, "the index file has changed; restart the search page")
        else:
            response = await call_next(request)
        response.headers.update({"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff",
                                 "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"})
        return response


def _refusal(request, names):
    """Return why a request must not be answered, or None. DNS rebinding needs a name, so all IP addresses are allowed."""
    try:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        allowed = host in names or ipaddress.ip_address(host)
    except ValueError:
        allowed = False
    if not allowed:
        return "this server has another name; --allowed_hosts adds one"
    link = request.headers.get("sec-fetch-mode") == "navigate" and request.method == "GET" and request.url.path == "/"
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not link:
        return "requests of other web pages are refused"


def _stamp(file):
    """(inode, size, modification time) of a file; None if there is none."""
    with suppress(OSError, TypeError):
        found = os.stat(file)
        return found.st_ino, found.st_size, found.st_mtime_ns


def _page(info):
    """(HTML, its Content-Security-Policy): a browser runs only the page's own style and script, by their hashes."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    style, script = (base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
                     for inside in re.findall(r"<(?:style|script)>(.*?)</", page, re.DOTALL))
    policy = (f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src 'self' blob: data:; "
              "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return page.replace("{{info}}", json.dumps(info).replace("<", "\\u003c")), policy


async def _read(request):
    """Read the body, whose size is counted because Content-Length may be wrong, within a time limit."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise HTTPException(415, "send the image file itself as the body: curl --data-binary @crop.jpg")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > UPLOAD_LIMIT:  # uvicorn reads and drops the rest
                    raise HTTPException(413, f"the image file is larger than {UPLOAD_LIMIT >> 20} MB")
    except (TimeoutError, ClientDisconnect) as error:
        raise HTTPException(408, "the upload took too long or broke off", {"Connection": "close"}) from error
    return bytes(body)


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit of connections, and a time limit for the header of a request."""

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        self.loop.call_later(HEADER_SECONDS, self.expire)

    def expire(self):
        if self.cycle is None:  # no request has arrived
            self.transport.abort()


def listen(host, port):
    """Return a bound socket for `serve`. Raises ReidError if the address is not this machine's or the port is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (")[0]
        raise ReidError(f"--host {host} --port {port}: {reason}; stop what uses it, or choose another --port") from error


def make_server(app):
    """Return a uvicorn.Server with these limits, which stops when the index file changes."""
    async def stop_if_changed():
        server.should_exit |= app.state.changed()

    server = uvicorn.Server(uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="off", log_level="error", access_log=False, server_header=False,
        backlog=64,  # asyncio accepts so many connections before `Protocol` can close one
        limit_concurrency=WAITING, timeout_graceful_shutdown=5, callback_notify=stop_if_changed, timeout_notify=1))
    logging.getLogger("uvicorn.error").addFilter(  # no tracebacks of the requests that are cancelled when the server stops
        lambda record: not record.exc_info or not isinstance(record.exc_info[1], asyncio.CancelledError))
    return server


def serve(app, listener):
    """Serve `app` on the socket of `listen` until Ctrl-C or TERM; requests in progress get five seconds to finish.

    Raises ReidError if the index file changes meanwhile.
    """
    address, port = listener.getsockname()[:2]
    address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{address}]" if ":" in address else address)
    with suppress(ValueError):  # outside of the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # TERM, too, then ends below
    print(f"search page: http://{address}:{port} (Ctrl-C stops it)", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn has shut down and passes the signal on
        make_server(app).run(sockets=[listener])
    if app.state.changed():
        raise ReidError("the index file has changed while it was searched; start the search page again")
    print("search page: stopped", flush=True)
