"""The search page: its answers, to one client and to many at once."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")

from page_lab import Site, embedding, listed

from reid import ReidError
from reid.extras import page
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import ranked_lists


def test_an_image_is_answered_as_by_the_index(site, index, crop):
    answer = site.post(crop, topk=10)
    scores, rows = index.nearest(embedding(crop), 10)
    assert listed(answer) == rows[0].tolist()
    assert [r["score"] for r in answer.json()["results"]] == pytest.approx(scores[0].tolist(), abs=1e-6)
    best = answer.json()["results"][0]
    assert (best["pid"], best["path"], best["match"]) == (3, index.paths[int(best["row"])], True)
    assert [r["match"] for r in answer.json()["results"]] == [s > 0.8 for s in scores[0].tolist()]


def test_a_gallery_image_is_answered_without_itself(site, index):
    answer = site.get("/search", row=8, topk=15)
    _, rows = index.nearest(index.embeddings[8:9].float(), 15, exclude=torch.tensor([8]))
    assert listed(answer) == rows[0].tolist()
    assert 8 not in listed(answer)
    assert answer.json()["query"]["row"] == "8"
    pid = int(index.pids[8])
    for r in answer.json()["results"]:
        assert r["verdict"] == ("junk" if r["pid"] == -1 else "right" if r["pid"] == pid else "wrong")


@pytest.mark.parametrize("cameras", [[1], [2, 3], [3, 3]])
def test_cameras(site, index, crop, cameras):
    answer = site.post(crop, topk=15, camera=cameras)
    assert listed(answer) == index.nearest(embedding(crop), 15, camids=cameras)[1][0].tolist()[: len(listed(answer))]
    assert {r["camid"] for r in answer.json()["results"]} == set(cameras)


def test_defaults_and_health(site, crop):
    assert len(listed(site.post(crop))) == 15
    assert site.get("/healthz").json() == {"status": "ok", "images": 37, "model": "colours 16x8", "waiting": 0}


def test_sample(site, index):
    picked = [site.get("/sample").json()["results"] for _ in range(4)]
    for some in picked:
        rows = [int(hit["row"]) for hit in some]
        assert len(set(rows)) == page.SAMPLE and not any(hit["pid"] == -1 for hit in some)
        assert [hit["path"] for hit in some] == [index.paths[row] for row in rows]
    assert len({str(some) for some in picked}) > 1


def test_a_gallery_in_an_engine(index, crop):
    """Row numbers of 63 bits, columns that are looked up, its own list of cameras, and a server that may be down."""
    offset = (1 << 62) + 1  # no float has it

    class Column:
        def __init__(self, values):
            self.values = values

        def __getitem__(self, row):
            return self.values[row - offset]

    class Engine:
        threshold, data_root, cameras, down = None, index.data_root, [-1, 1, 2, 3], False
        normalised, normalise = False, GalleryIndex.normalise
        paths, pids, camids, embeddings = map(Column, (index.paths, index.pids, index.camids, index.embeddings))

        def __len__(self):
            return len(index)

        def __contains__(self, row):
            return offset <= row < offset + len(index)

        def hit(self, row):
            return index.hit(row - offset)

        def search(self, embeddings, topk, camids=None, exclude=None):
            if self.down:
                raise ReidError("milvus: no answer")
            exclude = exclude - offset if exclude is not None else None
            scores, rows = index.nearest(embeddings, topk, camids, exclude=exclude)
            return ranked_lists(self, scores, torch.where(rows >= 0, rows + offset, rows))

    with Site(Engine()) as running:
        expected = [row + offset for row in index.nearest(embedding(crop), 5)[1][0].tolist()]
        assert listed(running.post(crop, topk=5)) == expected
        assert listed(running.get("/search", row=expected[0], topk=3, camera=2))
        assert running.get(f"/image/{expected[0]}").status_code == 200
        assert [running.get("/search", row=row).status_code for row in (0, offset - 1, 1 << 63)] == [404] * 3
        assert all(int(hit["row"]) >= offset for hit in running.get("/sample").json()["results"])
        running.index.down = True
        assert (running.post(crop).status_code, running.post(crop).json()) == (503, {"error": "milvus: no answer"})


def test_pictures(site, gallery, index):
    answer = site.get("/image/5")
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
            return listed(site.get("/search", row=row, topk=3)), index.nearest(
                index.embeddings[row : row + 1].float(), 3, exclude=torch.tensor([row]))[1][0].tolist()
        body, cameras = bodies[client % len(bodies)], [client % 3 + 1] if client % 2 else []
        return listed(site.post(body, topk=3, camera=cameras)), index.nearest(
            embedding(body), 3, camids=cameras or None)[1][0].tolist()

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
        monkeypatch.setattr(page, "WAITING", 1)
        running.extractor.gate.clear()
        first = pool.submit(running.post, crop)  # is being embedded
        assert running.extractor.entered.wait(60)
        answers = [first, pool.submit(running.post, crop)]
        running.until_waiting(1)
        refused = running.post(crop)
        assert (refused.status_code, refused.json()) == (503, {"error": "too many searches at once, try again"})
        running.extractor.gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]


def test_a_failure_is_one_answer_and_not_the_end(site, crop):
    site.extractor.failure = RuntimeError("out of memory")
    answer = site.post(crop)
    site.extractor.failure = None
    assert (answer.status_code, answer.json()) == (500, {"error": "the server failed; its log has the reason"})
    assert site.post(crop).status_code == 200
