"""Pictures of ranked lists: verdicts, colours, numbered sheets, and input that must not break a sheet."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from reid import ReidError
from reid.data.names import UNKNOWN, UNKNOWN_PID, folder_pid
from reid.extras import pictures
from reid.extras.pictures import draw_ranking, ellipsis, identity, verdict
from reid.retrieval.ranked import Query, RankedList


class Gallery(list):
    """A list of (path, name, pid, camid)."""

    def hit(self, row):
        return self[row]


@pytest.fixture
def crop(tmp_path):
    file = tmp_path / "0002_c1s1_000451_03.jpg"
    Image.new("RGB", (64, 128), (30, 60, 200)).save(file)
    return file


def ranking(crop, pids, query_pid=2, threshold=None):
    """Scores are 0.9, 0.89, 0.88 ..."""
    gallery = Gallery((str(crop), str(pid), pid, 3) for pid in pids)
    scores = 0.9 - 0.01 * torch.arange(len(pids))
    return RankedList(Query(crop, query_pid, 1), torch.arange(len(pids)), scores, gallery, threshold)


def has_colour(picture, kind):
    """Whether a pixel has the border colour of `kind`."""
    return bool((np.asarray(picture) == ImageColor.getrgb(pictures.COLOURS[kind])).all(2).any())


def cell(picture, place):
    """The part of a one-line sheet where the hit at `place` (1-based) is drawn, without its caption."""
    left = pictures.MARGIN + pictures.CELL[0] * place + pictures.QUERY_GAP
    return picture.crop((left, pictures.MARGIN, left + pictures.FRAME[0], pictures.MARGIN + pictures.FRAME[1]))


@pytest.mark.parametrize("query_pid, pid, kind", [
    (2, 2, "right"), (2, 3, "wrong"), (2, 0, "distractor"), (2, -1, "junk"), (2, UNKNOWN_PID, "unlabelled"),
    (UNKNOWN_PID, 2, "unlabelled"), (UNKNOWN_PID, UNKNOWN_PID, "unlabelled"), (UNKNOWN_PID, -1, "junk"), (0, 0, "unlabelled"),
])
def test_verdict(query_pid, pid, kind):
    assert verdict(query_pid, pid) == kind


def test_borders_have_the_colour_of_their_verdict(crop, tmp_path):
    [file] = draw_ranking(tmp_path / "sheet.png", [ranking(crop, [2, 3, 0, UNKNOWN_PID])])
    picture = Image.open(file).convert("RGB")
    for place, kind in enumerate(["right", "wrong", "distractor", "unlabelled"], 1):
        for other in ("right", "wrong", "distractor", "unlabelled"):
            assert has_colour(cell(picture, place), other) == (kind == other), (place, other)


def test_junk_is_dashed_a_distractor_is_not(crop, tmp_path):
    [file] = draw_ranking(tmp_path / "sheet.png", [ranking(crop, [-1, 0])])
    picture = Image.open(file).convert("RGB")
    changes = [np.diff(np.asarray(cell(picture, place))[30:-20, 2, 0].astype(int)).astype(bool).sum() for place in (1, 2)]
    assert changes[0] > 20
    assert changes[1] == 0


def test_positions_pick_places(crop, tmp_path):
    one = ranking(crop, [2] * 4 + [3] + [2] * 4 + [3] + [2] * 2)
    [file] = draw_ranking(tmp_path / "strip.png", [one], positions=(1, 5, 10, 15))  # there is no 15th
    picture = Image.open(file).convert("RGB")
    assert [has_colour(cell(picture, place), "wrong") for place in (1, 2, 3)] == [False, True, True]
    assert picture.width < pictures.CELL[0] * 5


@pytest.mark.parametrize("queries, hits, files", [(0, 0, 0), (1, 1, 1), (10, 9, 1), (11, 10, 2), (6, 11, 2), (3, 50, 2)])
def test_sheets_are_numbered(crop, tmp_path, queries, hits, files):
    written = draw_ranking(tmp_path / "sheet.png", [ranking(crop, [2] * hits)] * queries)
    names = ["sheet.png"] [:files] if files < 2 else [f"sheet-{n:03d}.png" for n in range(1, files + 1)]
    assert [file.name for file in written] == names
    assert sorted(file.name for file in tmp_path.glob("*.png")) == names
    for file in written:
        assert Image.open(file).height <= pictures.CELL[1] * pictures.LINES + pictures.LEGEND + 2 * pictures.MARGIN


def test_many_hits_are_capped(crop, tmp_path):
    [file] = draw_ranking(tmp_path / "sheet.png", [ranking(crop, [2] * 1000)])
    assert Image.open(file).height < pictures.CELL[1] * 11


def test_no_input_breaks_a_sheet(crop, tmp_path):
    text, wide = tmp_path / "a\nb\udcff.jpg", tmp_path / "wide.png"
    text.write_text("not an image")
    Image.new("L", (3000, 1), 9).save(wide)
    odd = Gallery([(str(tmp_path / "gone.jpg"), "2", 2, 1), (str(text), "", UNKNOWN_PID, UNKNOWN), ("W" * 255, "", 5, 1),
                   (str(crop), "alice", folder_pid("alice"), UNKNOWN), (str(crop), "", 10**18, 10**9)])
    scores = torch.tensor([float("inf"), 0.5, 0.3, float("-inf"), float("nan")])
    lists = [RankedList(Query(crop.read_bytes(), 2), torch.arange(5), scores, odd, 0.4),
             RankedList(Query(wide), torch.arange(0), torch.zeros(0), odd, 0.4)]
    [file] = draw_ranking(tmp_path / "sheet.jpg", lists)
    picture = Image.open(file)
    assert picture.format == "JPEG"
    assert np.ptp(np.asarray(cell(picture.convert("RGB"), 1))[100:160, 20:-20]) > 100  # the word "missing"


def test_scores_below_the_threshold_are_faint(crop, tmp_path):
    def inks(threshold):
        [file] = draw_ranking(tmp_path / "sheet.png", [ranking(crop, [2, 2], threshold=threshold)])
        pixels = np.asarray(Image.open(file).convert("L"))
        top, left = pictures.MARGIN + pictures.FRAME[1] + 4, pictures.MARGIN + pictures.QUERY_GAP
        lefts = [left + pictures.CELL[0] * place for place in (1, 2)]
        return [int(pixels[top : top + 20, left : left + pictures.FRAME[0]].min()) for left in lefts]

    assert inks(None) == inks(0.5)
    match, no_match = inks(0.895)
    assert no_match > match + 40


def test_captions_are_no_wider_than_their_tile(crop, tmp_path):
    long = str(tmp_path / ("0002_c1s1_" + "W" * 200 + ".jpg"))
    ranked = RankedList(Query(long, 2, 1), torch.arange(2), torch.ones(2), Gallery([(long, "2", 2, 3)] * 2))
    [file] = draw_ranking(tmp_path / "sheet.png", [ranked])
    pixels = np.asarray(Image.open(file).convert("L"))
    captions = pixels[pictures.MARGIN + pictures.FRAME[1] + 3 : pictures.MARGIN + pictures.CELL[1] - 12]
    for place in (1, 2):
        end = pictures.MARGIN + pictures.CELL[0] * place + pictures.QUERY_GAP + pictures.FRAME[0]
        gap = captions[:, end : end + pictures.CELL[0] - pictures.FRAME[0]]  # to the next column
        assert (gap == 255).all() and (captions[:, end - 30 : end] < 255).any()


@given(st.text(max_size=300), st.integers(20, 300), st.sampled_from([12, 14, 18]))
def test_ellipsis_fits(text, width, size):
    font = pictures.font(size)
    short = ellipsis(text, font, width)
    assert font.getlength(short) <= max(width, font.getlength("…"))
    if "…" in short and "…" not in text:
        head, tail = short.split("…")
        clean = "".join(c if c.isprintable() else "?" for c in text)
        assert clean.startswith(head) and clean.endswith(tail) and len(head) - len(tail) in (0, 1)


def test_identity():
    assert [identity(pid, "gallery/x/a.jpg") for pid in (7, 0, -1, UNKNOWN_PID)] == ["id 7", "distractor", "junk", ""]
    assert identity(folder_pid("alice"), "gallery/alice/a.jpg") == "alice"


@pytest.mark.parametrize("name", ["sheet", "sheet.bmp", "sheet.tar.gz", "."])
def test_only_picture_files(crop, tmp_path, name):
    with pytest.raises(ReidError, match="give a file that ends in"):
        draw_ranking(tmp_path / name, [ranking(crop, [2])])
    assert list(tmp_path.iterdir()) == [crop]


def test_a_failed_sheet_leaves_the_old_one(crop, tmp_path, monkeypatch):
    [file] = draw_ranking(tmp_path / "sheet.png", [ranking(crop, [2])])
    before = file.read_bytes()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures.Image.Image, "save", full_disk)
    with pytest.raises(OSError):
        draw_ranking(file, [ranking(crop, [3])])
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [crop.name, file.name]
