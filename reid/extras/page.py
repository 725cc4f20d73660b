"""The search page and the HTTP API over one gallery; docs/api.md describes the API, and /docs of a server lists it."""

import asyncio
import base64
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import AfterValidator, BaseModel, WithJsonSchema

from reid import ReidError, __version__, images
from reid.cli import printable
from reid.data.names import PERSON, check_person
from reid.extras.searcher import Job, Searcher
from reid.extras.server import IMAGES, UPLOAD_LIMIT, Uploads, harden
from reid.retrieval import enrol
from reid.retrieval.crops import cut, load_batch

LAST = 1 << 62  # frame number above all others
NUMBER = r"-?[0-9]{1,6}(\.[0-9]{1,6})?"
BOX = f"^{NUMBER}(,{NUMBER}){{3}}$"
ImagePath = Annotated[str, Query(min_length=1, max_length=4096, description="of an image, as in the answers of a search")]


def _check_box(text):
    if not re.fullmatch(BOX, text):
        raise ValueError("give x1,y1,x2,y2 in pixels")
    return text


Box = Annotated[str, AfterValidator(_check_box), WithJsonSchema({"type": "string", "pattern": BOX})]


def _form(**properties):
    """The description of a multipart form with images and these properties, for OpenAPI."""
    properties["files"] = {"type": "array", "minItems": 1, "maxItems": IMAGES, "items": {"type": "string", "format": "binary"},
                           "description": f"images, of at most {UPLOAD_LIMIT >> 20} MB each"}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
        "type": "object", "required": list(properties), "properties": properties}}}}}


FORM = _form()
ENROL_FORM = _form(name={"type": "string", "minLength": 1, "maxLength": PERSON, "description": "of the person"})


class Error(BaseModel):
    error: str


class Picture(BaseModel):
    """An image of the gallery, or one that was sent, whose path is "". The name is that of GET /people, "" of nobody."""

    path: str
    pid: int
    camid: int
    frame: int
    label: str
    name: str


class Hit(Picture):
    position: int
    score: float
    match: bool | None
    verdict: str


class Ranking(BaseModel):
    query: Picture
    hits: list[Hit]


class Found(BaseModel):
    threshold: float | None
    rankings: list[Ranking]


class Sample(BaseModel):
    images: list[Picture]


class Embedded(BaseModel):
    model: str
    embeddings: list[list[float]]


class Person(BaseModel):
    name: str
    images: int


class People(BaseModel):
    people: list[Person]


class Change(BaseModel):
    """What changed, and the number of images that the gallery has now."""

    change: str
    images: int


class Health(BaseModel):
    status: str
    images: int
    model: str
    waiting: int


def create_app(extractor, index, allowed_hosts=(), index_file=None, topk_limit=200, token=None, writable=None):
    """Create the ASGI application for an Extractor and a GalleryIndex or MilvusGallery.

    allowed_hosts: names, beside IP addresses and localhost, that requests may address the server by. index_file: the file
    that `index` maps into memory: after another process has changed it, a Writer reads it again, and without one nothing is
    answered. topk_limit: highest number of results. token: what clients must give, or None. writable: None, or what makes a
    Writer of a Searcher, to change people.
    """
    searcher, decoders = Searcher(extractor, index, index_file), ThreadPoolExecutor(2, "decode")  # 50 megapixels: up to 0.75 GB
    writer = writable and writable(searcher)

    async def current():
        if searcher.changed() and not writer:
            raise HTTPException(503, "the index file has changed; restart the search page")
        if searcher.changed():
            await writer.reload()

    app = FastAPI(title="Human Re-Identification", version=__version__, docs_url=None, redoc_url=None,
                  dependencies=[Depends(_check_parameters), Depends(current)],
                  responses={"4XX": {"model": Error, "description": "one line of what is wrong"},
                             "503": {"model": Error, "description": "one line of why not now"}})
    harden(app, "default-src 'none'; frame-ancestors 'none'", {"localhost", *(name.lower() for name in allowed_hosts)}, token)
    app.state.outdated = lambda: not writer and searcher.changed()
    crops = _crops(extractor, decoders)
    _add_search(app, searcher, crops, topk_limit)
    _add_people(app, searcher, crops, writer)
    _add_pages(app, searcher, decoders, topk_limit, writer)
    return app


def _check_parameters(request: Request):
    """Refuse parameters that an operation does not have, such as a misspelt filter. Those of the page are its own."""
    operations = request.app.openapi()["paths"].get(request.scope["route"].path_format)
    if operations:
        parameters = operations[request.method.lower()].get("parameters", ())
        known = [parameter["name"] for parameter in parameters if parameter["in"] == "query"]
        if unknown := sorted({*request.query_params}.difference(known)):
            raise HTTPException(400, f"{printable(unknown[0])}: no parameter of this operation, which has "
                                f"{', '.join(known) or 'none'}")


def _crops(extractor, decoders):
    """Return what reads the images of a form, or the boxes of one, as [uint8 [3, H, W]]; the name is in `request.state`."""
    uploads = Uploads()

    async def crops(request: Request, box: Annotated[list[Box], Query(
            max_length=IMAGES, description="x1,y1,x2,y2 in pixels: this part of the only image sent; may be repeated")] = ()):
        async with uploads.files(request) as files:
            if box and len(files) > 1:
                raise HTTPException(400, f"box: of one image, but {len(files)} were sent")
            return [pixels for file in files for pixels in await _run(decoders, _decode, *file, box, extractor.size)]

    return crops


def _add_search(app, searcher, crops, topk_limit):
    """Add what embeds and searches."""
    def filters(topk: Annotated[int, Query(ge=1, le=topk_limit, description="hits for each query")] = min(20, topk_limit),
                camera: Annotated[list[int], Query(max_length=1000, description="only of this camera; may be repeated")] = (),
                first_frame: Annotated[int, Query(ge=0, le=LAST, description="only from this frame number on")] = 0,
                last_frame: Annotated[int, Query(ge=0, le=LAST, description="only up to this frame number")] = LAST,
                rerank: Annotated[bool, Query(description="reorder the best 200 by k-reciprocal encoding")] = False):
        if first_frame > last_frame:
            raise HTTPException(400, f"first_frame {first_frame}: after last_frame {last_frame}")
        frames = None if (first_frame, last_frame) == (0, LAST) else (first_frame, last_frame)
        return topk, frozenset(camera), frames, rerank

    async def found(queries, wanted):
        rankings = await searcher.ask([Job(image, *wanted) for image in queries])
        return {"threshold": None if wanted[-1] else searcher.gallery.index.threshold, "rankings": rankings}

    @app.post("/search", openapi_extra=FORM)
    async def search_images(queries: Annotated[list, Depends(crops)], wanted: Annotated[tuple, Depends(filters)]) -> Found:
        """Search for images, or for boxes of one image."""
        return await found(queries, wanted)

    @app.get("/search")
    async def search_path(path: ImagePath, wanted: Annotated[tuple, Depends(filters)]) -> Found:
        """Search for an image of the gallery, without itself."""
        return await found([path], wanted)

    @app.post("/embed", openapi_extra=FORM)
    async def embed(queries: Annotated[list, Depends(crops)]) -> Embedded:
        """Embed images, or boxes of one image: a list of numbers each, of norm 1."""
        embeddings = await searcher.ask([Job(image) for image in queries])
        return {"model": searcher.extractor.describe(), "embeddings": [embedding.tolist() for embedding in embeddings]}


def _add_people(app, searcher, crops, writer):
    """Add what lists, enrols and erases people. writer: a Writer, or None."""
    @app.get("/people")
    def people() -> People:  # on a thread of its own, as an engine reads all its rows
        """The people of the gallery, and how many images it has of each."""
        return {"people": [{"name": name, "images": len(rows)} for name, rows in enrol.people(searcher.gallery.index).items()]}

    def writing():
        if writer is None:
            raise HTTPException(403, "this server changes no gallery; start it with --writable")

    @app.post("/people", openapi_extra=ENROL_FORM, dependencies=[Depends(writing)])
    async def enrol_person(request: Request, queries: Annotated[list, Depends(crops)]) -> Change:
        """Enrol images, or boxes of one image, as those of a person."""
        try:
            name = check_person(request.state.name if isinstance(request.state.name, str) else "", "name")
        except ReidError as error:
            raise HTTPException(400, str(error)) from error
        embeddings = await searcher.ask([Job(image) for image in queries])
        return await writer.change(lambda gallery: writer.enrol(gallery, name, queries, embeddings))

    @app.delete("/people/{name:path}", dependencies=[Depends(writing)])
    async def erase_person(name: Annotated[str, Path(max_length=4096, description="as in the list of people")]) -> Change:
        """Erase all images of a person."""
        return await writer.change(lambda gallery: writer.erase(gallery, name))


def _add_pages(app, searcher, decoders, topk_limit, writer):
    """Add the search page with what it shows, the list of operations, and the state of the server."""
    folder = files("reid.extras")
    page = (folder / "page.html").read_text("utf-8")
    for name in ("page.css", "page.js"):
        page = page.replace("{{" + name + "}}", (folder / name).read_text("utf-8"))
    policy = _policy(page)

    @app.get("/", include_in_schema=False)
    async def home():
        gallery = searcher.gallery
        info = {"images": len(gallery.index), "cameras": gallery.cameras, "model": searcher.extractor.describe(),
                "threshold": gallery.index.threshold, "topk_limit": topk_limit, "upload_limit": UPLOAD_LIMIT,
                "version": gallery.version, "writable": writer is not None}
        return _html(page.replace("{{info}}", json.dumps(info).replace("<", "\\u003c")), policy)

    @app.get("/docs", include_in_schema=False)
    def operations():
        from reid.extras.report import render

        html = render("api.html", title=app.title, api=app.openapi()).decode()
        return _html(html, _policy(html))

    @app.get("/sample")
    async def sample() -> Sample:
        """Some images of the gallery, to choose a query from."""
        return {"images": await _run(searcher.thread, lambda: searcher.gallery.sample(searcher.extractor.dim))}

    @app.get("/image", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def picture(path: ImagePath, v: Annotated[str, Query(
            max_length=100, description="has no effect; another value is another image for the cache of a browser")] = ""):
        """An image of the gallery as JPEG."""
        jpeg = await _run(decoders, lambda: searcher.gallery.picture(path))
        return Response(jpeg, headers={"Cache-Control": "private, max-age=86400"}, media_type="image/jpeg")

    @app.get("/healthz")
    def healthz() -> Health:  # on a thread of its own, since an engine counts its rows
        """State of the server, also without a token."""
        return {"status": "ok", "images": len(searcher.gallery.index), "model": searcher.extractor.describe(),
                "waiting": len(searcher.waiting)}


async def _run(pool, function, *args):
    return await asyncio.get_running_loop().run_in_executor(pool, function, *args)


def _decode(name, content, boxes, size):
    """Decode an image, or some boxes of it: uint8 [n, 3, H, W]."""
    try:
        corners = [[float(number) for number in box.split(",")] for box in boxes]
        crops = cut(content, corners) if boxes else [images.decode(content)]
    except ReidError as error:
        raise HTTPException(400, f"{printable(name)}: {str(error).removeprefix('image: ')}") from error
    for box, crop in zip(boxes, crops):
        if not crop.numel():
            raise HTTPException(400, f"box {box}: empty, or outside of the image")
    return load_batch(crops, range(len(crops)), size)[0]  # large boxes one by one


def _html(text, policy):
    return HTMLResponse(text, headers={"Cache-Control": "no-store", "Content-Security-Policy": policy})


def _policy(html):
    """The Content-Security-Policy of a page: a browser runs only its own style and script, by their hashes."""
    style, script = (" ".join(f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
                              for inside in re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)) or "'none'"
                     for tag in ("style", "script"))
    return (f"default-src 'none'; script-src {script}; style-src {style}; img-src 'self' blob: data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
