"""What the search page and the HTTP API answer from: one gallery, searched in batches with one Extractor."""

import asyncio
import io
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from fastapi import HTTPException
from PIL import Image

from reid import ReidError, images
from reid.data.names import DISTRACTOR, JUNK, UNKNOWN, UNKNOWN_PID
from reid.data.paths import content_number
from reid.extras.pictures import identity, verdict
from reid.retrieval import enrol
from reid.retrieval.ranked import rerank_lists

WAITING = 256  # images in the queue; more are refused
CANDIDATES = 200  # hits that re-ranking reorders
SAMPLE, NEIGHBOURS = 24, 50  # images to choose from; those of an engine are drawn from so many near a random direction
PICTURE = 512  # pixels, the longer side of the pictures that are sent


class Gallery:
    """A GalleryIndex or a MilvusGallery as the page shows it: images are named by their paths, which stay when rows move."""

    def __init__(self, index):
        self.index = index
        cameras = index.cameras if hasattr(index, "cameras") else index.camids.unique().tolist()
        self.cameras = sorted(set(cameras) - {UNKNOWN})
        self.engine = hasattr(index, "__contains__")  # whose row numbers are `_key` of the paths
        self.version = os.urandom(4).hex()  # browsers must not show cached images of another gallery
        self.keys = None if self.engine else torch.tensor([_key(_text(path)) for path in index.paths], dtype=torch.int64)

    def row(self, path):
        """The row of an image; raises HTTPException if the gallery does not have it."""
        key = _key(path)
        rows = [key] * (key in self.index) if self.engine else (self.keys == key).nonzero()[:1, 0].tolist()
        if not rows:
            raise HTTPException(404, f"{path}: not in the gallery")
        return rows[0]

    def describe(self, row):
        """A gallery image as plain values."""
        path, pid = self.index.paths[row], int(self.index.pids[row])
        name = _text(enrol.person(self.index, path, pid)) if pid > 0 else ""
        label = self.index.names.get(pid) or identity(pid, path)
        return {"path": _text(path), "pid": pid, "camid": int(self.index.camids[row]), "frame": int(self.index.frames[row]),
                "label": label, "name": name}

    def sample(self, dim):
        """Up to SAMPLE different images of people to choose from; of an engine, neighbours of random directions [dim]."""
        if self.engine:
            lists = self.index.search(F.normalize(torch.randn(SAMPLE, dim)), NEIGHBOURS)
            rows = {int(ranked.rows[torch.randint(len(ranked), ())]) for ranked in lists if len(ranked)}
        else:
            people = ((self.index.pids != JUNK) & (self.index.pids != DISTRACTOR)).nonzero()[:, 0]
            rows = people[torch.randperm(len(people))[:SAMPLE]].tolist()
        return [self.describe(row) for row in rows]

    def picture(self, path):
        """An image as JPEG, upright and no larger than PICTURE; decoded, so that no other file is ever sent.

        Enrolled images of elsewhere have absolute paths; no others are read than those that the index has.
        """
        stored = PurePosixPath(self.index.paths[self.row(path)])
        if ".." in stored.parts:  # the index file may be of another origin
            raise HTTPException(404, f"{path}: lies outside the data root")
        try:
            pixels = images.decode(Path(self.index.data_root) / stored)
        except ReidError as error:
            raise HTTPException(404, f"{path}: the file is missing or damaged") from error
        picture, out = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
        picture.thumbnail((PICTURE, PICTURE))
        picture.save(out, "JPEG", quality=92)
        return out.getvalue()


def _text(path):
    return path.encode("utf-8", "replace").decode()  # names that are not UTF-8


def _key(path):
    """63 bits of a hash of a path, as the primary key in Milvus."""
    return content_number(path.encode("utf-8", "replace"))


def _stamp(file):
    """(inode, size, modification time) of a file; None if there is none."""
    with suppress(OSError, TypeError):
        found = os.stat(file)
        return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(eq=False)
class Job:
    """What is asked about one image.

    image: pixels, uint8 [3, H, W], or the path of a gallery image. topk: hits to find; 0 asks for the embedding only. cameras,
    frames (first, last): where to search. answer: the hits as plain values, the embedding, or an error.
    """

    image: torch.Tensor | str
    topk: int = 0
    cameras: frozenset = frozenset()
    frames: tuple | None = None
    rerank: bool = False
    answer: object = None


class Searcher:
    """Searches in batches on one thread: the images that arrive while a batch is computed become the next batch.

    file: of the index, or None; `changed` is whether it is another one since `follow`.
    """

    def __init__(self, extractor, index, file=None):
        self.extractor, self.file = extractor, file
        self.waiting, self.thread = deque(), ThreadPoolExecutor(1, "search")
        self.follow(index)

    def follow(self, index):
        """Search in `index` from the next batch on."""
        self.gallery, self.stamp = Gallery(index), _stamp(self.file)

    def changed(self):
        return self.stamp is not None and _stamp(self.file) != self.stamp

    async def ask(self, jobs):
        """Return the answers to some Jobs, in their order."""
        for camera in {camera for job in jobs for camera in job.cameras}.difference(self.gallery.cameras):
            raise HTTPException(400, f"camera {camera}: the gallery has {', '.join(map(str, self.gallery.cameras)) or 'none'}")
        if len(self.waiting) + len(jobs) > WAITING:
            raise HTTPException(429, "too many searches at once, try again", {"Retry-After": "1"})
        self.waiting.extend(jobs)
        await asyncio.get_running_loop().run_in_executor(self.thread, self._work, jobs[-1])
        for job in jobs:
            if isinstance(job.answer, Exception):
                raise job.answer
        return [job.answer for job in jobs]

    def _work(self, last):
        """Answer the jobs that wait, in batches, until `last` has its answer, which an earlier call may have given."""
        while last.answer is None:
            batch = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.extractor.batch_size))]
            try:
                self._answer(batch, self.gallery)
            except Exception as error:  # such as a lack of memory: these searches fail, the server goes on
                for failed in batch:
                    failed.answer = HTTPException(503, str(error)) if isinstance(error, ReidError) else error

    def _answer(self, batch, gallery):
        """Embed a batch together, and search once for each filter. An image is not a result of itself."""
        index, wanted = gallery.index, {}
        new = [job for job in batch if not isinstance(job.image, str)]
        embedded = self.extractor.embed([job.image for job in new]) if new else ()
        for job, embedding, query in zip(new, embedded, index.normalise(embedded)):
            if job.topk:
                wanted.setdefault((job.cameras, job.frames, job.rerank), []).append((job, query, -1))
            else:
                job.answer = embedding
        for job in batch:
            if isinstance(job.image, str):
                try:
                    row = gallery.row(job.image)
                except HTTPException as error:
                    job.answer = error
                    continue
                query = F.normalize(index.embeddings[row].float(), dim=0)
                wanted.setdefault((job.cameras, job.frames, job.rerank), []).append((job, query, row))
        for (cameras, frames, reorder), group in wanted.items():
            jobs, queries, rows = zip(*group)
            queries, topk = torch.stack(queries), max(job.topk for job in jobs)
            lists = index.search(queries, max(topk, CANDIDATES) if reorder else topk, camids=sorted(cameras) or None,
                                 frames=frames, exclude=torch.tensor(rows))
            for job, row, ranked in zip(jobs, rows, rerank_lists(lists, queries) if reorder else lists):
                job.answer = self._ranking(gallery, row, islice(ranked, job.topk))

    @staticmethod
    def _ranking(gallery, row, hits):
        query = {"path": "", "pid": UNKNOWN_PID, "camid": UNKNOWN, "frame": UNKNOWN, "label": "", "name": ""}
        query = gallery.describe(row) if row >= 0 else query
        return {"query": query, "hits": [
            {"position": hit.position, "score": hit.score, "match": hit.match, **gallery.describe(hit.row),
             "verdict": verdict(query["pid"], hit.pid)} for hit in hits]}
