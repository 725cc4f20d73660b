"""The search page: its answers, to one client and to many at once."""

import io
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")

from page_lab import SIZE, Site, embedding, hits, listed, paths

from reid import ReidError, images
from reid.data.paths import content_number
from reid.extras import searcher
from reid.extras.page import _decode
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import Query, ranked_lists, rerank_lists


def test_an_image_is_answered_as_by_the_index(site, index, crop):
    answer = site.post(crop, topk=10)
    scores, rows = index.nearest(embedding(crop), 10)
    assert listed(answer) == paths(index, rows[0])
    assert [hit["score"] for hit in hits(answer)] == pytest.approx(scores[0].tolist(), abs=1e-6)
    best = hits(answer)[0]
    assert (best["pid"], best["label"], best["match"], best["verdict"]) == (3, "id 3", True, "unlabelled")
    assert [hit["match"] for hit in hits(answer)] == [score > 0.8 for score in scores[0].tolist()]
    assert answer.json()["threshold"] == 0.8 and answer.json()["rankings"][0]["query"]["path"] == ""


def test_many_images_are_answered_in_their_order(site, gallery, index, crop):
    bodies = [crop, *((gallery / path).read_bytes() for path in list(index.paths)[:5])]
    found = site.post(*bodies, topk=4).json()["rankings"]
    assert [[hit["path"] for hit in ranking["hits"]] for ranking in found] == [
        paths(index, index.nearest(embedding(body), 4)[1][0]) for body in bodies]
    assert "3.png: cannot be read" in site.post(crop, crop, crop, b"no").json()["error"]


def test_boxes_of_a_frame(site, index, gallery):
    crops = [np.asarray(Image.open(gallery / index.paths[row])) for row in (3, 20)]
    frame, out = np.zeros((120, 200, 3), np.uint8), io.BytesIO()
    frame[10:74, 20:52], frame[50:114, 150:182] = crops
    Image.fromarray(frame).save(out, "PNG")
    boxes = ["20,10,52,74", "150,50.9,182.5,114"]
    found = site.post(out.getvalue(), box=boxes, topk=1).json()["rankings"]
    assert [ranking["hits"][0]["path"] for ranking in found] == [index.paths[3], index.paths[20]]
    embedded = torch.tensor(site.post(out.getvalue(), path="/embed", box=boxes).json()["embeddings"])
    assert torch.allclose(embedded, index.embeddings[[3, 20]].float(), atol=1e-3)


def test_large_boxes_are_resized_one_by_one(monkeypatch):
    """Else 64 boxes of 48 MB each wait in memory."""
    out, resize, most = io.BytesIO(), images.resize, []
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)).save(out, "PNG")
    expected = resize([images.decode(out.getvalue())] * 3, SIZE)
    monkeypatch.setattr(images, "resize", lambda batch, size: most.append(sum(map(torch.numel, batch))) or resize(batch, size))
    assert torch.equal(_decode("a.png", out.getvalue(), ["0,0,800,600"] * 3, SIZE), expected)
    assert max(most) == 3 * 600 * 800


def test_embed(site, crop, gallery, index):
    other = (gallery / index.paths[0]).read_bytes()
    answer = site.post(crop, other, path="/embed").json()
    assert answer["model"] == "colours 16x8"
    assert torch.allclose(torch.tensor(answer["embeddings"]), torch.cat([embedding(crop), embedding(other)]), atol=1e-6)


def test_a_gallery_image_is_answered_without_itself(site, index):
    answer = site.get("/search", path=index.paths[8], topk=15)
    _, rows = index.nearest(index.embeddings[8:9].float(), 15, exclude=torch.tensor([8]))
    assert listed(answer) == paths(index, rows[0]) and index.paths[8] not in listed(answer)
    pid = int(index.pids[8])
    query = answer.json()["rankings"][0]["query"]
    assert query == {"path": index.paths[8], "pid": pid, "camid": int(index.camids[8]), "frame": int(index.frames[8]),
                     "label": f"id {pid}", "name": str(pid)}
    assert {hit["name"] for hit in hits(answer)} <= {"", *map(str, range(1, 7))}
    for hit in hits(answer):
        assert hit["verdict"] == ("junk" if hit["pid"] == -1 else "right" if hit["pid"] == pid else "wrong")


@pytest.mark.parametrize("filters, kept", [
    ({"camera": [1]}, {"camids": [1]}), ({"camera": [2, 3]}, {"camids": [2, 3]}), ({"camera": [3, 3]}, {"camids": [3]}),
    ({"first_frame": 1}, {"frames": (1, 1)}), ({"last_frame": 0}, {"frames": (0, 0)}),
    ({"camera": 2, "first_frame": 0, "last_frame": 0}, {"camids": [2], "frames": (0, 0)}),
    ({"first_frame": 7}, {"frames": (7, 8)}),
])
def test_filters(site, index, crop, filters, kept):
    answer = site.post(crop, topk=15, **filters)
    assert listed(answer) == paths(index, index.nearest(embedding(crop), 15, **kept)[1][0])


def test_rerank(site, index, crop):
    answer = site.post(crop, topk=6, rerank=True)
    [expected] = rerank_lists(index.search(embedding(crop), len(index), queries=[Query()]), embedding(crop), 6)
    assert listed(answer) == paths(index, expected.rows)
    assert answer.json()["threshold"] is None and {hit["match"] for hit in hits(answer)} == {None}


def test_defaults_and_health(site, crop):
    assert len(listed(site.post(crop))) == 15
    assert site.get("/healthz").json() == {"status": "ok", "images": 37, "model": "colours 16x8", "waiting": 0}


def test_sample(site, index):
    picked = [site.get("/sample").json()["images"] for _ in range(4)]
    for some in picked:
        found = [image["path"] for image in some]
        assert len(set(found)) == searcher.SAMPLE and not any(image["pid"] == -1 for image in some)
        assert set(found) <= set(index.paths)
    assert len({str(some) for some in picked}) > 1


def test_a_gallery_in_an_engine(index, crop):
    """Row numbers of 63 bits, columns that are looked up, its own list of cameras, and a server that may be down."""
    keys = {content_number(path.encode()): row for row, path in enumerate(index.paths)}
    key_of = list(keys)

    class Column:
        def __init__(self, values):
            self.values = values

        def __getitem__(self, key):
            return self.values[keys[int(key)]]

    class Engine:
        threshold, data_root, cameras, down, names = None, index.data_root, [-1, 1, 2, 3], False, {}
        normalised, normalise = False, GalleryIndex.normalise
        paths, pids, camids, frames, embeddings = map(
            Column, (index.paths, index.pids, index.camids, index.frames, index.embeddings))

        def __len__(self):
            return len(index)

        def __contains__(self, key):
            return key in keys

        def hit(self, key):
            return index.hit(keys[key])

        def search(self, embeddings, topk, camids=None, frames=None, exclude=None):
            if self.down:
                raise ReidError("milvus: no answer")
            exclude = exclude if exclude is None else torch.tensor([keys.get(key, -1) for key in exclude.tolist()])
            scores, rows = index.nearest(embeddings, topk, camids, frames, exclude=exclude)
            return ranked_lists(self, scores, torch.tensor([[key_of[row] if row >= 0 else -1 for row in found]
                                                            for found in rows.tolist()]))

    with Site(Engine()) as running:
        expected = paths(index, index.nearest(embedding(crop), 5)[1][0])
        assert listed(running.post(crop, topk=5)) == expected
        assert listed(running.get("/search", path=expected[0], topk=3, camera=2))
        assert running.get("/image", path=expected[0]).status_code == 200
        assert [running.get(path, path="gone.png").status_code for path in ("/search", "/image")] == [404] * 2
        assert {image["path"] for image in running.get("/sample").json()["images"]} <= set(index.paths)
        running.index.down = True
        assert (running.post(crop).status_code, running.post(crop).json()) == (503, {"error": "milvus: no answer"})


def test_pictures(site, gallery, index):
    answer = site.get("/image", path=index.paths[5])
    assert answer.headers["content-type"] == "image/jpeg"
    shown, stored = (np.asarray(Image.open(file)).reshape(4, 16, 2, 16, 3).mean((1, 3))  # the blocks of colour
                     for file in (io.BytesIO(answer.content), gallery / index.paths[5]))
    assert np.abs(shown - stored).max() < 15
    for header in ("content-security-policy", "x-content-type-options"):
        assert header in answer.headers and header in site.get("/").headers


def test_64_clients(site, gallery, index):
    bodies = [(gallery / path).read_bytes() for path in index.paths]
    site.extractor.batches.clear()
    site.extractor.gate.clear()

    def ask(client):
        if client % 4 == 3:
            row = client % len(index)
            return listed(site.get("/search", path=index.paths[row], topk=3)), paths(index, index.nearest(
                index.embeddings[row : row + 1].float(), 3, exclude=torch.tensor([row]))[1][0])
        body, cameras = bodies[client % len(bodies)], [client % 3 + 1] if client % 2 else []
        return listed(site.post(body, topk=3, camera=cameras)), paths(index, index.nearest(
            embedding(body), 3, camids=cameras or None)[1][0])

    with ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(ask, client) for client in range(64)]
        site.until_waiting(20)
        site.extractor.gate.set()
        for answer in answers:
            found, expected = answer.result()
            assert found == expected
    assert sum(site.extractor.batches) == 48
    assert max(site.extractor.batches) > 5  # they were embedded together


def test_one_search_too_many_is_refused(index, crop, monkeypatch):
    with Site(index) as running, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(searcher, "WAITING", 1)
        running.extractor.gate.clear()
        first = pool.submit(running.post, crop)  # is being embedded
        assert running.extractor.entered.wait(60)
        answers = [first, pool.submit(running.post, crop)]
        running.until_waiting(1)
        refused = running.post(crop)
        assert (refused.status_code, refused.json()) == (429, {"error": "too many searches at once, try again"})
        running.extractor.gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]


def test_a_failure_is_one_answer_and_not_the_end(site, crop, caplog):
    site.extractor.failure = RuntimeError("out of memory")
    answer = site.post(crop)
    site.extractor.failure = None
    assert (answer.status_code, answer.json()) == (500, {"error": "the server failed; its log has the reason"})
    assert site.post(crop).status_code == 200
    assert "RuntimeError: out of memory" in caplog.text


def test_the_operations_are_listed_without_other_servers(site):
    page = site.get("/docs")
    assert page.status_code == 200 and "style-src 'sha256-" in page.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["'](https?:)?//|<script""", page.text)
    described = site.get("/openapi.json").json()["paths"]
    assert set(described) == {"/search", "/embed", "/people", "/people/{name}", "/sample", "/image", "/healthz"}
    for path, methods in described.items():
        for method in methods:
            assert f"{method.upper()} {path}" in page.text
    for text in ("camera", "first_frame", "x1,y1,x2,y2", "multipart/form-data", "list of list of number", "image/jpeg"):
        assert text in page.text
