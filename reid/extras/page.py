"""The search page: a small local server that answers from one Extractor and one gallery index.

    GET  /                     the page (reid/extras/page.html)
    POST /search?topk=&camera= image file as the body -> JSON; camera may be given several times
    GET  /search?row=          the same for an image of the gallery, by its number
    GET  /sample               some images of the gallery, to pick a query from
    GET  /image/{row}          a picture of a gallery image, by its number
    GET  /healthz              whether it lives, and what it serves
"""

import asyncio
import base64
import hashlib
import io
import json
import queue
import random
import re
import secrets
import signal
import socket
import threading
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from reid import ReidError, images
from reid.data.datasets import DISTRACTOR, JUNK, UNKNOWN, UNKNOWN_PID
from reid.extras.pictures import identity, verdict

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException as AnyHTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
except ImportError as missing:
    raise ReidError(f"--serve needs {missing.name}: pip install fastapi uvicorn") from missing

UPLOAD_LIMIT = 10 << 20  # bytes of an image file
DRAIN_LIMIT = 256 << 20  # a larger body is read (and forgotten) up to here, since a client still sending misses the answer
WAITING = 256  # requests in the queue, and connections; more are sent away with 503
SAMPLE, NEIGHBOURS = 24, 50  # images to pick from; how many lie around each of their random directions
PICTURE = 512  # pixels, the longer side of what /image serves at most
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Job(NamedTuple):
    query: torch.Tensor | int | None  # pixels uint8 [3, H, W], a row of the gallery, or None for images to pick from
    topk: int
    cameras: tuple
    future: Future


class Searcher:
    """Answers on a thread of its own: what has come in while a batch was computed becomes the next batch."""

    def __init__(self, extractor, index):
        self.extractor, self.index = extractor, index
        cameras = index.cameras if hasattr(index, "cameras") else index.camids.unique().tolist()
        self.cameras = sorted(set(cameras) - {UNKNOWN})
        self.rows = index if hasattr(index, "__contains__") else range(len(index))  # those of an engine are any 63 bits
        self.jobs = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._work, name="search", daemon=True)

    async def answer(self, query, topk, cameras=()):
        """The JSON of a search: what is known of the query, and its results, best first. An image does not find itself."""
        started = time.perf_counter()
        if strange := sorted(set(cameras) - set(self.cameras)):
            raise HTTPException(400, f"camera {strange[0]}: the gallery knows {', '.join(map(str, self.cameras)) or 'none'}")
        job = Job(query, topk, tuple(sorted(set(cameras))), Future())
        try:
            self.jobs.put_nowait(job)
        except queue.Full as error:
            raise HTTPException(503, "too many searches at once, try again", {"Retry-After": "2"}) from error
        answer = await asyncio.wrap_future(job.future)
        return answer | {"threshold": self.index.threshold, "seconds": round(time.perf_counter() - started, 4)}

    def check(self, row):
        """`row`, if the gallery has it."""
        if not 0 <= row < 1 << 63 or row not in self.rows:
            raise HTTPException(404, f"row {row}: not in the gallery")
        return row

    def describe(self, row):
        """What is known of a gallery image, as plain values; the row as text, since browsers round above 2^53."""
        path, pid = self.index.paths[row], int(self.index.pids[row])
        return {"row": str(row), "path": path, "pid": pid, "camid": int(self.index.camids[row]), "label": identity(pid, path)}

    def _work(self):
        while (job := self.jobs.get()) is not None:
            batch = [job]
            while len(batch) < self.extractor.batch_size and self.jobs.queue and self.jobs.queue[0] is not None:
                batch.append(self.jobs.get())  # this thread alone takes jobs out, so there is one
            batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
            try:
                self._answer(batch)
            except BaseException as error:  # such as too little memory: these requests fail, the server stays
                for job in (job for job in batch if not job.future.done()):
                    job.future.set_exception(HTTPException(503, str(error)) if isinstance(error, ReidError) else error)

    def _answer(self, batch):
        pixels = [job.query for job in batch if isinstance(job.query, torch.Tensor)]
        embedded = iter(self.extractor.embed(pixels) if pixels else ())
        groups = defaultdict(list)  # one search for each set of cameras
        for job in batch:
            try:
                if job.query is None:
                    job.future.set_result({"query": None, "results": self._anybody(job.topk)})
                elif isinstance(job.query, torch.Tensor):
                    groups[job.cameras].append((job, next(embedded), -1))
                else:
                    vector = self.index.embeddings[self.check(job.query)].float()
                    groups[job.cameras].append((job, F.normalize(vector, dim=0), job.query))
            except HTTPException as error:  # no such row: the others go on
                job.future.set_exception(error)
        for cameras, group in groups.items():
            jobs, vectors, own = zip(*group)
            scores, rows = self.index.nearest(torch.stack(vectors), max(job.topk for job in jobs),
                                             camids=list(cameras) or None, exclude=torch.tensor(own))
            for job, row, found, hits in zip(jobs, own, scores.tolist(), rows.tolist()):
                job.future.set_result(self._result(row, [hit for hit in zip(found, hits) if hit[1] >= 0][: job.topk]))

    def _result(self, row, found):
        """row: of the query, or -1. found: [(score, row)], best first."""
        query, threshold = self.describe(row) if row >= 0 else None, self.index.threshold
        results = []
        for position, (score, row) in enumerate(found, 1):
            hit = {"position": position, "score": score, **self.describe(row)}
            hit["verdict"] = verdict(query["pid"] if query else UNKNOWN_PID, hit["pid"])
            results.append(hit | {"match": None if threshold is None else score > threshold})
        return {"query": query, "results": results}

    def _anybody(self, count):
        """Up to `count` different images to pick from: of people, or an engine's neighbours of random directions."""
        if self.rows is self.index:
            _, found = self.index.nearest(F.normalize(torch.randn(count, self.extractor.dim)), NEIGHBOURS)
            picked = {random.choice(near) for near in ([row for row in rows if row >= 0] for rows in found.tolist()) if near}
        else:
            people = ((self.index.pids != JUNK) & (self.index.pids != DISTRACTOR)).nonzero()[:, 0]
            picked = people[torch.randperm(len(people))[:count]].tolist()
        return [self.describe(row) for row in picked]


def create_app(extractor, index, host="127.0.0.1", topk_limit=200):
    """The ASGI application.

    extractor: Extractor. index: GalleryIndex or MilvusGallery. host: the address it will listen on; on this machine's own,
    requests under other names are refused (DNS rebinding). topk_limit: most results of one answer.
    """
    searcher, decoders = Searcher(extractor, index), ThreadPoolExecutor(2, "decode")  # two: 50 megapixels are 300 MB
    page, policy = _page({"images": len(index), "cameras": searcher.cameras, "model": extractor.describe(),
                          "threshold": index.threshold, "topk_limit": topk_limit, "upload_limit": UPLOAD_LIMIT,
                          "version": secrets.token_hex(4)})  # row numbers mean other images after a restart

    @asynccontextmanager
    async def lifespan(app):
        searcher.thread.start()
        yield
        searcher.jobs.put(None)  # after what is in the queue
        searcher.thread.join()
        decoders.shutdown(cancel_futures=True)

    app = FastAPI(title="reid", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _harden(app, policy, host)
    topk_query, camera_query = Query(min(20, topk_limit), ge=1, le=topk_limit), Query([])

    @app.get("/")
    async def home():
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    @app.post("/search")
    async def search_image(request: Request, topk: int = topk_query, camera: list[int] = camera_query):
        body = await _read(request)
        pixels = await asyncio.get_running_loop().run_in_executor(
            decoders, lambda: images.resize([images.decode(body)], extractor.size)[0])
        return await searcher.answer(pixels, topk, camera)

    @app.get("/search")
    async def search_row(row: int, topk: int = topk_query, camera: list[int] = camera_query):
        return await searcher.answer(row, topk, camera)

    @app.get("/sample")
    async def sample():
        return await searcher.answer(None, SAMPLE)

    @app.get("/image/{row}")
    def picture(row: int):
        return Response(_picture(searcher, row), 200, {"Cache-Control": "private, max-age=86400"}, "image/jpeg")

    @app.get("/healthz")
    def healthz():
        alive = searcher.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped", "images": len(index), "model": extractor.describe(),
                             "waiting": searcher.jobs.qsize()}, 200 if alive else 503)

    return app


def _harden(app, policy, host):
    """Errors as {"error": one line}, headers that keep a browser from doing anything but showing the page."""
    def failed(status, message, headers=None):
        return JSONResponse({"error": message}, status, headers)

    app.add_exception_handler(ReidError, lambda request, error: failed(400, str(error)))
    app.add_exception_handler(AnyHTTPException, lambda request, error: failed(error.status_code, error.detail, error.headers))
    app.add_exception_handler(RequestValidationError, lambda request, error: failed(
        400, "; ".join(f"{e['loc'][1]}: {e['msg']}" for e in error.errors())))
    app.add_exception_handler(Exception, lambda request, error: failed(500, "the server failed, its log says why"))

    @app.middleware("http")
    async def headers(request, call_next):
        response = await call_next(request)
        response.headers.update({"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff",
                                 "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"})
        return response

    if host in LOOPBACK or host.startswith("127."):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, host], www_redirect=False)


def _page(info):
    """(HTML, its Content-Security-Policy): only the page's own style and script run, by their hashes."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def source(tag):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    policy = (f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; img-src 'self' blob: data:; "
              "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return page.replace("{{info}}", json.dumps(info).replace("<", "\\u003c")), policy


async def _read(request):
    """The body, counted as it comes: Content-Length may lie."""
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise HTTPException(415, "send the image file itself as the body: curl --data-binary @crop.jpg")
    body, size = bytearray(), 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= UPLOAD_LIMIT:
                body += chunk
            elif size > DRAIN_LIMIT:
                break
    except ClientDisconnect as error:
        raise HTTPException(400, "the upload broke off") from error
    if size > UPLOAD_LIMIT:
        raise HTTPException(413, f"the image file is larger than {UPLOAD_LIMIT >> 20} MB")
    return bytes(body)


def _picture(searcher, row):
    """JPEG bytes of a gallery image: through our own decoder, so nothing but an image ever leaves, upright and small."""
    path = PurePosixPath(searcher.index.paths[searcher.check(row)])
    if path.is_absolute() or ".." in path.parts:  # an index may come from anybody
        raise HTTPException(404, f"row {row}: its file lies outside the data root")
    try:
        picture = Image.fromarray(images.decode(Path(searcher.index.data_root) / path).permute(1, 2, 0).contiguous().numpy())
    except ReidError as error:
        raise HTTPException(404, f"row {row}: its file is missing or damaged") from error
    picture.thumbnail((PICTURE, PICTURE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=92)
    return out.getvalue()


def listen(host, port):
    """A bound socket for `serve`, taken before anything is loaded. Raises ReidError where the port is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (")[0]
        raise ReidError(f"--host {host} --port {port}: {reason}; stop what uses it, or choose another --port") from error


def serve(app, listener):
    """Serve `app` on the socket of `listen` until Ctrl-C or TERM; requests that are being answered get five seconds."""
    address, port = listener.getsockname()[:2]
    name = f"[{address}]" if ":" in address else "127.0.0.1" if address == "0.0.0.0" else address
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="on",
                            limit_concurrency=WAITING, timeout_graceful_shutdown=5)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that TERM, too, ends in the lines below
    print(f"search page: http://{name}:{port} (Ctrl-C stops it)", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn has stopped in order and passes the signal on
        uvicorn.Server(config).run(sockets=[listener])
    print("search page: stopped", flush=True)
