"""Enrol and erase people of the gallery that a server searches; meanwhile searches are answered from the gallery as it was."""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from fastapi import HTTPException
from PIL import Image

from reid import BusyError, ReidError
from reid.cli import first_line
from reid.data.datasets import Records
from reid.data.names import UNKNOWN
from reid.data.paths import content_number
from reid.retrieval import enrol, stored
from reid.retrieval.index import GalleryIndex

WAITING = 16  # changes that wait; more are refused


@contextmanager
def _as_answers():
    """Answer 503 to what may pass by itself, such as another process that changes the gallery, and 409 to other weights."""
    try:
        yield
    except (BusyError, OSError) as error:  # OSError: such as a full disk
        raise HTTPException(503, first_line(error)) from error
    except ReidError as error:
        raise HTTPException(409, str(error)) from error


class Writer:
    """Change the stored gallery that a Searcher searches, one change after the other, on one thread.

    uri, open_gallery: where it is stored and what loads it, as of `enrol.changing`. prepare: turns the stored gallery into the
    one that is searched.
    """

    def __init__(self, uri, open_gallery, prepare, searcher):
        self.uri, self.open_gallery, self.prepare, self.searcher = uri, open_gallery, prepare, searcher
        self.thread, self.waiting, self.reloading = ThreadPoolExecutor(1, "write"), 0, None
        with stored.changing(uri):
            stored.delete_images(uri, open_gallery())  # what a server that was killed has left

    async def change(self, function):
        """Call `function(gallery)`, which changes it and returns text, and answer when the change is stored and searched."""
        if self.waiting >= WAITING:
            raise HTTPException(429, "too many changes at once, try again", {"Retry-After": "1"})
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, self._change, function)
        finally:
            self.waiting -= 1

    async def reload(self):
        """Search what another process has stored from now on. Requests that come meanwhile wait for the same reading."""
        if self.reloading is None or self.reloading.done():
            self.reloading = asyncio.get_running_loop().run_in_executor(self.thread, self._reload)
        await asyncio.shield(self.reloading)

    def _reload(self):
        with _as_answers(), stored.changing(self.uri):
            if self.searcher.changed():  # a change may have read it already
                self.searcher.follow(self.prepare(self.open_gallery()))

    def _change(self, function):
        searcher, before = self.searcher, self.searcher.stamp
        searcher.stamp = None  # it is this process that replaces the file
        try:
            with _as_answers(), enrol.changing(
                    self.uri, self.open_gallery, lambda gallery: searcher.follow(self.prepare(gallery))) as gallery:
                text = function(gallery)
            return {"change": text, "images": len(gallery)}
        finally:
            searcher.stamp = searcher.stamp or before

    def enrol(self, gallery, name, images, embeddings):
        """Add images with their embeddings [D] as those of a person; return text on what changed.

        Each image, uint8 [3, H, W] as the network gets it, is kept as a file, named by its content.
        """
        folder, rows = stored.images_folder(self.uri, gallery), {}
        folder.mkdir(parents=True, exist_ok=True)
        for row, pixels in enumerate(images):
            content = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(content, "PNG")
            path = f"{content_number(content.getvalue()):016x}.png"
            (folder / path).write_bytes(content.getvalue())
            rows[path] = row  # an image that is sent twice is one
        unknown = torch.full((len(rows),), UNKNOWN)
        records = Records(folder, list(rows), unknown, unknown, unknown, unknown)
        embeddings = torch.stack([embeddings[row] for row in rows.values()]).half()
        return enrol.enrol(gallery, GalleryIndex(embeddings, records, gallery.fingerprint, gallery.mirror), name)

    def erase(self, gallery, name):
        """Erase a person; return text on what changed."""
        if name not in enrol.people(gallery):
            raise HTTPException(404, f"{name}: nobody of this name in the gallery")
        return enrol.erase(gallery, name, by_name=True)
