"""Pictures of ranked lists: what a hit is called, where its colours stand, how sheets are numbered, what never crashes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from reid import ReidError
from reid.data.datasets import UNKNOWN, UNKNOWN_PID, folder_pid
from reid.extras import pictures as viz
from reid.extras.pictures import Hit, Ranking, draw_ranking, ellipsis, verdict, who


@pytest.fixture
def crop(tmp_path):
    file = tmp_path / "0002_c1s1_000451_03.jpg"
    Image.new("RGB", (64, 128), (30, 60, 200)).save(file)
    return file


def ranking(crop, pids, query_pid=2):
    hits = [Hit(crop, f"gallery/{pid}/{crop.name}", pid, 3, 0.9 - 0.01 * i) for i, pid in enumerate(pids)]
    return Ranking(crop, f"query/{crop.name}", query_pid, 1, hits)


def has_colour(picture, kind):
    """Whether each of the places shows the border colour of `kind` somewhere."""
    return bool((np.asarray(picture) == ImageColor.getrgb(viz.COLOURS[kind])).all(2).any())


def cell(picture, place):
    """The part of a one-line sheet where the hit at `place` (1-based) is drawn, without its caption."""
    left = viz.MARGIN + viz.CELL[0] * place + viz.QUERY_GAP
    return picture.crop((left, viz.MARGIN, left + viz.FRAME[0], viz.MARGIN + viz.FRAME[1]))


@pytest.mark.parametrize("query_pid, pid, kind", [
    (2, 2, "right"), (2, 3, "wrong"), (2, 0, "distractor"), (2, -1, "junk"), (2, UNKNOWN_PID, "unknown"),
    (UNKNOWN_PID, 2, "unknown"), (UNKNOWN_PID, UNKNOWN_PID, "unknown"), (UNKNOWN_PID, -1, "junk"), (0, 0, "unknown"),
])
def test_verdict(query_pid, pid, kind):
    assert verdict(query_pid, pid) == kind


def test_borders_stand_at_their_hits(crop, tmp_path):
    [file] = draw_ranking(tmp_path / "sheet.png", [ranking(crop, [2, 3, 0, UNKNOWN_PID])])
    picture = Image.open(file).convert("RGB")
    for place, kind in enumerate(["right", "wrong", "distractor", "unknown"], 1):
        for other in ("right", "wrong", "distractor", "unknown"):
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
    assert picture.width < viz.CELL[0] * 5


@pytest.mark.parametrize("queries, hits, files", [(0, 0, 0), (1, 1, 1), (10, 9, 1), (11, 10, 2), (6, 11, 2), (3, 50, 2)])
def test_sheets_are_numbered(crop, tmp_path, queries, hits, files):
    written = draw_ranking(tmp_path / "sheet.png", [ranking(crop, [2] * hits)] * queries)
    names = ["sheet.png"] [:files] if files < 2 else [f"sheet-{n:03d}.png" for n in range(1, files + 1)]
    assert [file.name for file in written] == names
    assert sorted(file.name for file in tmp_path.glob("*.png")) == names
    for file in written:
        assert Image.open(file).height <= viz.CELL[1] * viz.LINES + 3 * viz.LEGEND + 2 * viz.MARGIN


def test_many_hits_are_capped(crop, tmp_path):
    [file] = draw_ranking(tmp_path / "sheet.png", [ranking(crop, [2] * 1000)])
    assert Image.open(file).height < viz.CELL[1] * 11


def test_nothing_about_a_hit_can_break_the_sheet(crop, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    odd = [Hit(tmp_path / "gone.jpg", "gone.jpg", 2, 1, 0.5), Hit(text, "a\nb\udcff\0.jpg", UNKNOWN_PID, UNKNOWN, float("-inf")),
           Hit(crop.read_bytes(), "W" * 255, folder_pid("alice"), UNKNOWN, -1.0), Hit(str(crop), "", 10**18, 10**9, float("nan"))]
    wide = tmp_path / "wide.png"
    Image.new("L", (3000, 1), 9).save(wide)
    [file] = draw_ranking(tmp_path / "sheet.jpg", [ranking(crop, [])._replace(hits=odd), ranking(wide, [])], threshold=0.4)
    assert Image.open(file).format == "JPEG"
    picture = Image.open(file).convert("RGB")
    assert np.ptp(np.asarray(cell(picture, 1))[100:160, 20:-20]) > 100  # the word "missing"


def test_captions_stay_below_their_tile(crop, tmp_path):
    long = "0002_c1s1_" + "W" * 200 + ".jpg"
    hits = [Hit(crop, long, 2, 3, 0.5)] * 2
    [file] = draw_ranking(tmp_path / "sheet.png", [Ranking(crop, long, 2, 1, hits)])
    pixels = np.asarray(Image.open(file).convert("L"))
    captions = pixels[viz.MARGIN + viz.FRAME[1] + 3 : viz.MARGIN + viz.CELL[1] - 12]
    for place in (1, 2):
        end = viz.MARGIN + viz.CELL[0] * place + viz.QUERY_GAP + viz.FRAME[0]
        assert (captions[:, end : end + viz.CELL[0] - viz.FRAME[0]] == 255).all()  # the gap to the next column is blank


@given(st.text(max_size=300), st.integers(20, 300), st.sampled_from([12, 14, 18]))
def test_ellipsis_fits(text, width, size):
    font = viz._font(size)
    short = ellipsis(text, font, width)
    assert font.getlength(short) <= max(width, font.getlength("…"))
    if "…" in short and "…" not in text:
        head, tail = short.split("…")
        clean = "".join(c if c.isprintable() else "?" for c in text)
        assert clean.startswith(head) and clean.endswith(tail) and len(head) - len(tail) in (0, 1)


def test_who():
    assert [who(pid, "gallery/x/a.jpg") for pid in (7, 0, -1, UNKNOWN_PID)] == ["id 7", "distractor", "junk", ""]
    assert who(folder_pid("alice"), "gallery/alice/a.jpg") == "alice"


@pytest.mark.parametrize("name", ["sheet", "sheet.bmp", "sheet.tar.gz", "."])
def test_only_picture_files(crop, tmp_path, name):
    with pytest.raises(ReidError, match="give a file that ends in"):
        draw_ranking(tmp_path / name, [ranking(crop, [2])])
    assert list(tmp_path.iterdir()) == [crop]


def test_a_failed_sheet_leaves_the_old_one(crop, tmp_path, monkeypatch):
    [file] = draw_ranking(tmp_path / "sheet.png", [ranking(crop, [2])])
    before = file.read_bytes()
    monkeypatch.setattr(viz.Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        draw_ranking(file, [ranking(crop, [3])])
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [crop.name, file.name]
