"""The report and its error analysis, and the comparison of two runs."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from reid import ReidError
from reid.data.datasets import Records
from reid.extras import analysis, report
from reid.retrieval import metrics
from reid.retrieval.index import GalleryIndex

ARGUMENTS = {"protocol": "market", "far": 1e-3, "exp_name": "calm-fox-1"}


def make_index(root, rows, fingerprint="f" * 64):
    """rows: (path, pid, camid, embedding)."""
    paths, pids, camids, emb = zip(*rows)
    unknown = torch.full((len(rows),), -1)
    records = Records(root, list(paths), torch.tensor(pids), torch.tensor(camids), unknown, unknown)
    return GalleryIndex(torch.nn.functional.normalize(torch.tensor(emb), dim=1), records, fingerprint, True)


def arguments_of(queries, gallery):
    return {"q_emb": queries.embeddings, "g_emb": gallery.embeddings, "q_pids": queries.pids, "q_camids": queries.camids,
            "g_pids": gallery.pids, "g_camids": gallery.camids}


@pytest.fixture
def run(tmp_path):
    """(queries, gallery): 1 looks like 2 and is taken for 2; 3 is found; 4 is skipped; 5 meets a distractor."""
    root = tmp_path / "data"
    gallery = [
        ("g/<script>alert(1)<.jpg", 2, 2, (1.0, 0, 0, 0)), ("g/1a.jpg", 1, 2, (0.5, 1, 0, 0)),
        ("g/own.jpg", 1, 1, (1.0, 0, 0, 0)),
        ("g/junk.jpg", -1, 2, (1.0, 0.01, 0, 0)), ("g/3.jpg", 3, 2, (0, 0, 1.0, 0)), ("g/0.jpg", 0, 3, (0, 0, 0, 1.0)),
        ("g/5.jpg", 5, 2, (0, 0, 0.3, 1.0)),
    ]
    queries = [("q/1.jpg", 1, 1, (1.0, 0, 0, 0)), ("q/1b.jpg", 1, 3, (1.0, 0.1, 0, 0)), ("q/3.jpg", 3, 1, (0, 0, 1.0, 0.1)),
               ("q/4\udce9.jpg", 4, 1, (1.0, 1, 1, 1)), ("q/5.jpg", 5, 1, (0, 0, 0.01, 1.0))]
    for number, (path, *_) in enumerate(gallery + queries):
        if path != "g/3.jpg" and "\udce9" not in path:  # a missing file is a tile that says so
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 40), (20 * number, 80, 120)).save(root / path)
    return make_index(root, queries), make_index(root, gallery)


def write(path, run, title="calm-fox-1", with_roc=True, **changed):
    """Evaluate `run` as eval.py does and write its report; returns the text of the page."""
    queries, gallery = run
    data = arguments_of(*run)
    if changed.get("multi_query"):
        pooled = metrics.pool_queries(queries.embeddings, queries.pids, queries.camids)
        data |= zip(("q_emb", "q_pids", "q_camids"), pooled)
    result = metrics.evaluate(*data.values())
    roc = metrics.roc(*data.values(), rates=(1e-4, 1e-3, 1e-2)) if with_roc else None
    results = {"plain": result, "+rerank": result}
    intervals = {name: metrics.bootstrap(result) for name, result in results.items()}
    written = report.write_report(path, title, queries, gallery, data, results, intervals, roc, ARGUMENTS | changed,
                                  {"torch": "2"})
    assert written == path
    return path.read_text("utf-8")


class Page(HTMLParser):
    """Collects (tag, attributes) and the text of headings; fails for a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.headings = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_page_is_complete_and_self_contained(run, tmp_path):
    text = write(tmp_path / "report.html", run, title="<b>a & b</b> {{ body }}")
    page = Page(text)
    assert page.headings == ["Results", "Charts", "Worst queries", "Confused people", "Likely label errors", "Left out",
                             "Made with"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "report.html"]
    tags = {tag for tag, _ in page.tags}
    assert not {"script", "link", "iframe", "b "} & tags
    assert sum(tag == "svg" for tag, _ in page.tags) == 5  # CMC, ROC, scores, Rank-1 and mAP by camera
    assert not any(name == "style" or name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "http" not in text.replace("http-equiv", "")
    assert "<script>" not in text and "g/&lt;script&gt;alert(1)&lt;.jpg" in text
    assert "&lt;b&gt;a &amp; b&lt;/b&gt; {{ body }}" in text
    anchors = [attrs["href"][1:] for tag, attrs in page.tags if tag == "a"]
    assert anchors == [attrs["id"] for tag, attrs in page.tags if tag == "section"]


def test_pictures_are_data_uris(run, tmp_path):
    page = Page(write(tmp_path / "report.html", run))
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) > 20
    for source in sources:
        head, body = source.split(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(body))).size == (128, 256)


def test_charts_lie_within_their_frame(run, tmp_path):
    text = write(tmp_path / "report.html", run)
    points = [point.split(",") for line in re.findall(r'points="([^"]*)"', text) for point in line.split()]
    assert len(points) > 60
    assert all(54 <= float(x) <= 488 and 40 <= float(y) <= 290 for x, y in points)


def test_only_this_style_is_allowed(run, tmp_path):
    text = write(tmp_path / "report.html", run)
    style = re.search(r"<style>(.*)</style>", text, re.S)[1]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")


def test_extremes_leave_out_what_does_not_count(run):
    found = analysis.extremes(*arguments_of(*run).values())
    assert found.wrong_row.tolist()[:3] == [0, 0, 6]  # not the junk, not the own camera
    assert found.right_row[0] == 1 and found.right_row[2] == 4
    assert found.right_row[1] == 2, "camera 1 is another one for a query of camera 3"
    assert found.right[3] == -torch.inf
    assert found.own_pairs.tolist() == [0, 2, 1, 0, 1, 0, 1]
    assert found.own_row[1] == 1
    nocam = analysis.extremes(*arguments_of(*run).values(), protocol="nocam")
    assert nocam.right_row[0] == 2


def test_confusions_count_first_ranks(run):
    data = arguments_of(*run)
    result, found = metrics.evaluate(*data.values()), analysis.extremes(*data.values())
    pairs, wrong, distractors = analysis.confusions(found, result, data["q_pids"], data["g_pids"])
    assert (wrong, distractors) == (3 - int(result.first_rank[1] == 1), 1)
    assert (pairs[0].pid, pairs[0].taken_for, pairs[0].queries, pairs[0].back) == (1, 2, 2, 0)
    assert pairs[0].image == 0


def labelled(wrong=None):
    """40 people in their own directions, three queries and images each. Person 5's images in the gallery ("gallery") or one
    of the queries ("query") get the id of the person least like 5."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator), dim=1)

    def images():
        return torch.nn.functional.normalize(centres.repeat(3, 1) + 0.05 * torch.randn(120, 64, generator=generator), dim=1)

    pids = torch.arange(1, 41).repeat(3)
    g_pids = pids.clone()
    unlike = int((centres @ centres[4]).argmin()) + 1
    if wrong == "gallery":
        g_pids[[4, 44, 84]] = unlike
    q_pids = pids.clone()
    if wrong == "query":
        q_pids[4] = unlike
    return images(), images(), q_pids, torch.ones(120).long(), g_pids, torch.full((120,), 2)


def suspects(data):
    """The rows of similar strangers and of dissimilar matches."""
    result, found, roc = metrics.evaluate(*data), analysis.extremes(*data), metrics.roc(*data)
    similar, margin = analysis.similar_strangers(found, result, roc)
    dissimilar, limit = analysis.dissimilar_matches(found, roc)
    assert all(found.wrong[row] > found.right[row] + margin for row in similar)
    assert all(found.own[row] < limit for row in dissimilar)
    return similar.tolist(), sorted(dissimilar.tolist())


def test_only_wrong_labels_are_suspected():
    assert suspects(labelled()) == ([], [])
    assert suspects(labelled("gallery"))[1] == [4, 44, 84]
    assert suspects(labelled("query"))[0] == [4]


def test_label_errors_have_cards(tmp_path):
    q_emb, g_emb, q_pids, q_camids, g_pids, g_camids = labelled("query")
    run = [make_index(tmp_path, list(zip(map(str, range(120)), pids.tolist(), camids.tolist(), emb.tolist())))
           for emb, pids, camids in ((q_emb, q_pids, q_camids), (g_emb, g_pids, g_camids))]
    text = write(tmp_path / "report.html", run)
    assert "one appearance (queries: 1)" in text and f"<h3>id {int(q_pids[4])} like id 5</h3>" in text


def test_level_is_the_share_of_strangers_above():
    data = labelled()
    roc = metrics.roc(*data)
    scores = (data[0] @ data[1].T)[data[2][:, None] != data[4]]
    for share in (0.5, 0.1, 0.01):
        assert abs(analysis.level(roc, share) - float(scores.quantile(1 - share))) <= 0.011


def test_ranked_rows_caps_both_kinds():
    scores = torch.tensor([0.5, 0.8, 0.7, 0.6, 0.9, 0.4])
    counts = torch.tensor([True, False, True, False, False, True])
    assert analysis.ranked_rows(scores, counts, 2, 1).tolist() == [4, 2, 0]


def test_worst_first_and_never_a_skipped_one(run):
    result = metrics.evaluate(*arguments_of(*run).values())
    worst = analysis.worst_queries(result, 9)
    assert 3 not in worst and len(worst) == result.valid
    assert result.ap[worst].tolist() == sorted(result.ap[worst].tolist())


def test_skipped_queries_and_unreadable_images_are_named(run, tmp_path):
    run[1].bad = [("g/broken<.jpg", "not an image")]
    text = write(tmp_path / "report.html", run)
    assert "no image of its id in the gallery: q/4\\udce9.jpg" in text
    assert "g/broken&lt;.jpg: not an image" in text


def test_tracklets_are_shown_by_their_first_image(run, tmp_path):
    assert "q/1b.jpg" in write(tmp_path / "report.html", run, multi_query=True)


def test_without_a_roc_the_rest_is_written(run, tmp_path):
    page = Page(write(tmp_path / "report.html", run, with_roc=False))
    assert sum(tag == "svg" for tag, _ in page.tags) == 3  # CMC, Rank-1 and mAP by camera
    assert "Not examined: a ROC needs pairs" in (tmp_path / "report.html").read_text()


def test_the_querys_own_file_does_not_count(run):
    """By content, as in `metrics.evaluate`: also under another id and another camera."""
    queries, gallery = run
    data = arguments_of(queries, gallery)
    tiles = report.Tiles(queries, gallery, data, ARGUMENTS)
    assert tiles.counts(0).tolist() == [True, True, False, False, True, True, True]
    assert report.Tiles(queries, gallery, data, ARGUMENTS | {"protocol": "nocam"}).counts(0)[2]
    data |= {"q_ids": torch.tensor([7, 8, 9, 10, 11]), "g_ids": torch.tensor([7, 7, 3, 4, 5, 6, 1])}
    assert tiles.counts(0).tolist() == [False, False, False, False, True, True, True]


def test_passwords_and_tokens_are_masked(run, tmp_path):
    text = write(tmp_path / "report.html", run, gallery_uri="http://me:s3cret@host:19530/?token=t0ken")
    assert "http://***@host:19530/?***" in text and "s3cret" not in text and "t0ken" not in text


def test_replaces_a_report_and_nothing_else(run, tmp_path):
    path = tmp_path / "report.html"
    write(path, run, title="first")
    assert "second" in write(path, run, title="second")
    other = tmp_path / "thesis.html"
    other.write_text("mine")
    with pytest.raises(ReidError, match="is not a human re-identification report file; choose another"):
        write(other, run)
    assert other.read_text() == "mine"
    assert "second" in write(other, run, title="second", overwrite=True)


def test_a_failure_leaves_the_old_report(run, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write(path, run, title="first")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError):
        write(path, run, title="second")
    assert "first" in path.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "report.html"]
