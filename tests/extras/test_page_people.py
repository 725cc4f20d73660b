"""POST /people and DELETE /people/{name}: what is enrolled and erased is stored and searched, and nothing else may change."""

import errno
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import requests
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")

from page_lab import PRINT, Colours, Site, embedding, hits, writable

from reid import images
from reid.extras import writer
from reid.retrieval import enrol
from reid.retrieval.index import GalleryIndex
from reid.retrieval.stored import changing


def picture(number):
    """The bytes of an image of blocks of colour, like those of the gallery."""
    out = io.BytesIO()
    blocks = np.random.default_rng(1000 + number).integers(0, 256, (4, 2, 3)).astype(np.uint8)
    Image.fromarray(np.kron(blocks, np.ones((16, 16, 1), np.uint8))).save(out, "PNG")
    return out.getvalue()


def enrolled(site, name, *bodies, **params):
    files = [("files", (f"{i}.png", body)) for i, body in enumerate(bodies)]
    return requests.post(site.url("/people"), files=files, data={"name": name}, params=params, timeout=60)


def erased(site, name):
    return requests.delete(site.url(f"/people/{name}"), timeout=60)


def people(site):
    answer = site.get("/people")
    assert answer.status_code == 200
    return {person["name"]: person["images"] for person in answer.json()["people"]}


def stored(uri):
    return {name: len(rows) for name, rows in enrol.people(GalleryIndex.load(uri, PRINT)).items()}


GALLERY = {str(pid): 6 for pid in range(1, 7)}


@pytest.mark.parametrize("kind", ["file", "milvus"])
def test_enrol_and_erase(index, tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "file":
        uri, opened = "door.pt", None
    else:
        pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: pip install -e '.[milvus]'")
        from reid.extras import milvus

        uri = str(tmp_path / "door.db")
        made = milvus.create_gallery(uri, "calm-fox-1", PRINT, False, Colours.dim, index.data_root)
        made.write(index.embeddings, index.records())
        made.collection.set(threshold=index.threshold)
        opened = partial(milvus.open_gallery, uri, "calm-fox-1", PRINT)
    with Site(**writable(index, uri, opened=opened)) as site:
        assert people(site) == GALLERY
        answer = enrolled(site, " anna b ", picture(1), picture(2), picture(1))
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"images": 39, "change": "2 images enrolled and 0 replaced: anna b, a new person; 39 images in "
                                 "the gallery"}
        assert people(site) == GALLERY | {"anna b": 2} and site.get("/healthz").json()["images"] == 39
        found = hits(site.post(picture(2), topk=5))[0]
        assert (found["label"], found["match"], found["camid"]) == ("anna b", True, -1) and found["score"] > 0.99
        shown = site.get("/image", path=found["path"])  # of an absolute path, which the index has
        assert shown.status_code == 200 and os.path.isabs(found["path"])
        assert torch.allclose(Colours().embed([images.decode(found["path"])]), embedding(picture(2)), atol=1e-6)

        assert "0 images enrolled and 1 replaced (1 taken from anna b): ben" in enrolled(site, "ben", picture(2)).json()["change"]
        assert people(site) == GALLERY | {"anna b": 1, "ben": 1}
        answer = erased(site, "ben")
        assert answer.json() == {"change": "ben: 1 images erased, 38 left", "images": 38}
        assert not os.path.exists(found["path"]) and site.get("/image", path=found["path"]).status_code == 404
        assert "ben" not in {hit["label"] for hit in hits(site.post(picture(2), topk=40))}
        assert erased(site, "6").json()["images"] == 32
        left = {name: count for name, count in GALLERY.items() if name != "6"} | {"anna b": 1}
        assert people(site) == left
        assert {name: len(rows) for name, rows in enrol.people((opened or partial(GalleryIndex.load, uri))()).items()} == left
        for name in left:
            assert erased(site, name).status_code == 200
        assert people(site) == {} and [hit["pid"] for hit in hits(site.post(picture(2)))] == [-1]


def test_boxes_of_a_frame_are_enrolled(door, crop, uri):
    frame, out = Image.new("RGB", (200, 120)), io.BytesIO()
    frame.paste(Image.open(io.BytesIO(crop)), (20, 10))
    frame.save(out, "PNG")
    assert enrolled(door, "carl", out.getvalue(), box=["20,10,52,74", "100,0,150,100"]).json()["images"] == 39
    assert hits(door.post(crop))[0]["label"] == "carl" and stored(uri)["carl"] == 2


def test_a_server_that_may_not_write(site, crop, index):
    for answer in (enrolled(site, "anna", crop), erased(site, "1"), requests.post(site.url("/people"), timeout=60)):
        assert (answer.status_code, answer.json()) == (403, {"error": "this server changes no gallery; start it with --writable"})
    assert people(site) == GALLERY and '"writable": false' in site.get("/").text


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", "a\x1b[1m", "x" * 101, "0", "-1", "an\u200bna", None])
def test_bad_names(door, crop, name):
    answer = enrolled(door, name, crop)
    assert answer.status_code == 400 and answer.json()["error"].startswith("name: give the person's name")
    assert people(door) == GALLERY


def test_only_people_are_erased(door, index):
    """Neither junk nor the images at a path, which --remove erases."""
    for name in ("nobody", "-1", "01", "(unlabelled)", index.paths[0], index.data_root.lstrip("/"), ".", "x" * 5000):
        answer = erased(door, name.replace("/", "%2F"))
        assert answer.status_code in (400, 404, 405) and "\n" not in answer.json()["error"], name
    assert erased(door, "nobody").json() == {"error": "nobody: nobody of this name in the gallery"}
    assert len(door.get("/search", path=index.paths[0], topk=50).json()["rankings"][0]["hits"]) == 36


def test_bad_images_are_not_enrolled(door, crop, uri):
    assert enrolled(door, "anna", crop, b"no").status_code == 400
    assert requests.post(door.url("/people"), data={"name": "anna"}, timeout=60).status_code == 415
    assert not os.path.exists(f"{uri}.enrolled") and stored(uri) == GALLERY


def test_web_pages_and_clients_without_the_token_change_nothing(index, uri, crop):
    token = {"Authorization": "Bearer sixteen letters!"}
    with Site(**writable(index, uri), token="sixteen letters!") as site:
        for headers, status in [
                ({}, 401), (token | {"Sec-Fetch-Site": "cross-site"}, 403), (token | {"Origin": "http://evil.example"}, 403),
                (token | {"Origin": "null"}, 403), (token | {"Origin": "http://["}, 403), (token | {"Origin": site.url("")}, 200),
                (token | {"Origin": "https://proxy.example", "Sec-Fetch-Site": "same-origin"}, 200)]:
            answer = requests.post(site.url("/people"), files={"files": crop}, data={"name": "anna"}, headers=headers, timeout=60)
            assert answer.status_code == status, answer.text
            assert requests.delete(site.url("/people/anna"), headers=headers, timeout=60).status_code == status


def test_scores_follow_the_camera_statistics(index, uri, crop):
    with Site(**writable(index, uri, GalleryIndex.camera_normalised)) as site:
        for change in (lambda: enrolled(site, "anna", picture(1), picture(2)), lambda: erased(site, "2")):
            assert change().status_code == 200
            now = GalleryIndex.load(uri, PRINT).camera_normalised()
            assert now.normalised
            expected = now.search(now.normalise(embedding(crop)), 9)[0].scores
            assert [hit["score"] for hit in hits(site.post(crop, topk=9))] == pytest.approx(expected, abs=1e-6)


def test_changes_of_another_process(door, index, uri, crop, monkeypatch):
    """They are kept by a change; a process that does not end is an error, and the server goes on."""
    monkeypatch.setattr("reid.retrieval.stored.WAIT", 0)
    before = door.index
    with enrol.changing(uri, partial(GalleryIndex.load, uri, PRINT)) as gallery:
        answer = enrolled(door, "anna", crop)
        assert answer.status_code == 503 and "another process has been changing" in answer.json()["error"]
        assert hits(door.post(crop)) and people(door) == GALLERY
        enrol.erase(gallery, "1")
    assert stored(uri).keys() == GALLERY.keys() - {"1"} and len(before) == 37


def test_a_change_includes_that_of_another_process(door, uri, crop):
    with enrol.changing(uri, partial(GalleryIndex.load, uri, PRINT)) as gallery:
        enrol.erase(gallery, "1")
    assert enrolled(door, "anna", crop).status_code == 200
    assert people(door) == stored(uri) == {name: 6 for name in GALLERY if name != "1"} | {"anna": 1}


def test_what_another_process_changes_is_read_again(door, uri, crop, index):
    """By a server that may write; one without --writable stops. An index of other weights is refused, until it is replaced."""
    with enrol.changing(uri, partial(GalleryIndex.load, uri, PRINT)) as gallery:
        enrol.erase(gallery, "3")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: hits(door.post(crop, topk=50)), range(8)))
    assert all(len(found) == 31 and "id 3" not in {hit["label"] for hit in found} for found in answers)
    assert people(door) == {name: 6 for name in GALLERY if name != "3"} == stored(uri)
    before, other = uri.read_bytes(), GalleryIndex(index.embeddings, index.records(), "1" * 16, False)
    uri.unlink()
    other.save(uri)
    for answer in (door.post(crop), enrolled(door, "anna", crop), erased(door, "1")):
        assert answer.status_code == 409 and "made by other weights" in answer.json()["error"]
    uri.write_bytes(before)
    assert enrolled(door, "anna", crop).status_code == 200 and stored(uri)["anna"] == 1


def test_a_change_while_the_server_stops(door, uri, crop, monkeypatch, capsys):
    """One that takes longer than a stop waits for is answered, and stored all the same."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(_, gallery, *__):
        begun.set()
        go_on.wait(60)
        return enrol.erase(gallery, "1")

    monkeypatch.setattr(writer.Writer, "enrol", slow)
    door.server.config.timeout_graceful_shutdown = 0.1
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(enrolled, door, "anna", crop)
        begun.wait(60)
        door.server.should_exit = True
        answer = answer.result(60)
    door.thread.join(60)
    go_on.set()
    with changing(uri):  # when the change has ended
        assert "1" not in stored(uri)
    assert "Traceback" not in capsys.readouterr().err and answer.status_code == 503
    assert answer.json() == {"error": "the server stops; a change that was asked for may have been stored"}


def test_a_change_that_fails_changes_nothing(door, uri, crop, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left", "door.pt")

    enrolled(door, "anna", crop)
    with monkeypatch.context() as patch:
        patch.setattr(GalleryIndex, "save", full)
        for answer in (enrolled(door, "ben", picture(3)), erased(door, "anna")):
            assert (answer.status_code, answer.json()) == (503, {"error": "[Errno 28] no space left: 'door.pt'"})
    assert people(door) == stored(uri) == GALLERY | {"anna": 1}
    assert len(os.listdir(f"{uri}.enrolled")) == 1  # the image of the failed change is gone
    assert hits(door.post(crop))[0]["label"] == "anna"
    assert enrolled(door, "ben", picture(4)).status_code == 200
    assert len(os.listdir(f"{uri}.enrolled")) == 2


def test_a_server_that_starts_deletes_what_a_killed_one_has_left(index, uri):
    """Images are written before the index that has them, so that nobody is enrolled without."""
    folder = uri.with_name("door.pt.enrolled")
    folder.mkdir(parents=True)
    for name in ("0123456789abcdef.png", "mine.png"):
        (folder / name).write_bytes(picture(1))
    options = writable(index, uri)
    options["writable"](None)
    assert os.listdir(folder) == ["mine.png"]


def test_one_change_too_many_is_refused(door, crop, monkeypatch):
    monkeypatch.setattr(writer, "WAITING", 0)
    answer = enrolled(door, "anna", crop)
    assert (answer.status_code, answer.json()) == (429, {"error": "too many changes at once, try again"})
    assert answer.headers["retry-after"] == "1"


def test_nothing_is_lost_under_64_clients_with_writers(door, index, uri, gallery):
    """64 clients search while four writers enrol 24 people and erase every second one."""
    bodies = [(gallery / path).read_bytes() for path in list(index.paths)[:6]]
    labels = {f"p{number}" for number in range(24)} | {"junk", *(f"id {pid}" for pid in range(1, 7))}

    def write(first):
        for number in range(first, 24, 4):
            name, images = f"p{number}", [picture(100 + 2 * number), picture(101 + 2 * number)]
            assert enrolled(door, name, *images).status_code == 200
            assert {hit["label"] for hit in hits(door.post(images[0], topk=2))} >= {name}
            if number % 2:
                assert erased(door, name).status_code == 200
                assert name not in {hit["label"] for hit in hits(door.post(images[0], topk=100))}

    def search(client):
        for turn in range(4):
            answer = (door.get("/search", path=index.paths[client % len(index)], topk=100) if (client + turn) % 4 == 0
                      else door.post(bodies[(client + turn) % 6], topk=100, camera=[[], [1]][turn % 2]))
            assert answer.status_code in (200, 429, 503), answer.text
            if answer.status_code == 200:
                found = hits(answer)
                scores, paths = [hit["score"] for hit in found], {hit["path"] for hit in found}
                assert scores == sorted(scores, reverse=True) and len(paths) == len(found) > 10
                assert {hit["label"] for hit in found} <= labels

    with ThreadPoolExecutor(68) as pool:
        for done in [*[pool.submit(write, first) for first in range(4)], *[pool.submit(search, client) for client in range(64)]]:
            done.result()
    assert people(door) == stored(uri) == GALLERY | {f"p{number}": 2 for number in range(0, 24, 2)}
    assert len(os.listdir(f"{uri}.enrolled")) == 24
