"""Pictures of ranked lists: each query with what the gallery answered. Pillow only, no display and no font file needed."""

import math
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from reid import ReidError, images
from reid.data.datasets import DISTRACTOR, JUNK, UNKNOWN, UNKNOWN_PID
from reid.files import atomic_path

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_HITS = 100  # drawn of one query; the picture says so where there are more
PER_LINE, LINES = 10, 10  # hits beside each other; lines of one sheet (a query takes one for each PER_LINE hits)

WIDTH, HEIGHT, BORDER = 128, 256, 5  # pixels: a crop is fitted into WIDTH x HEIGHT
FRAME = (WIDTH + 2 * BORDER, HEIGHT + 2 * BORDER)
CELL = (FRAME[0] + 14, FRAME[1] + 76)  # with the caption below
MARGIN, QUERY_GAP, LEGEND = 28, 26, 30

INK, FAINT, PAPER, LETTERBOX = "#1f2328", "#6e7781", "#ffffff", "#eef0f2"
# Okabe and Ito's green and vermilion, apart for every kind of colour vision; the badges tell the same without colour.
COLOURS = {"query": INK, "right": "#009e73", "wrong": "#d55e00", "distractor": "#8c959f", "junk": "#8c959f", "unknown": "#c8ced4"}
MEANING = {"right": "same person", "wrong": "another person", "distractor": "distractor (counts as wrong)",
           "junk": "junk (does not count)", "unknown": "identity not known"}


class Hit(NamedTuple):
    """One gallery image of an answer. file: what `images.decode` reads; name: text to show; score: a cosine, or a distance's
    negative. pid and camid as in `reid.data.datasets` (UNKNOWN_PID, UNKNOWN where they are not known)."""

    file: object
    name: str
    pid: int
    camid: int
    score: float


class Ranking(NamedTuple):
    """A query and its hits, best first."""

    query_file: object
    query_name: str
    query_pid: int
    query_camid: int
    hits: list


def verdict(query_pid, pid):
    """What a hit is for a query: right, wrong, distractor, junk or unknown."""
    if pid == JUNK:
        return "junk"
    if query_pid <= 0 or pid == UNKNOWN_PID:
        return "unknown"
    if pid == DISTRACTOR:
        return "distractor"
    return "right" if pid == query_pid else "wrong"


def picture_format(path):
    """Pillow's name of the format that the suffix of `path` asks for. Raises ReidError for others, and for a folder."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() not in FORMATS:
        raise ReidError(f"--output {path}: give a file that ends in {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def draw_ranking(output, rankings, positions=None, threshold=None):
    """Draw ranked lists into picture files; returns the paths written.

    output: .png, .jpg or .webp. A sheet holds LINES lines; what does not fit goes on numbered sheets (out-001.png,
    out-002.png ...). rankings: list of Ranking. positions: draw these places only, such as (1, 5, 10, 15); else all up to
    MAX_HITS. threshold: scores above it are marked as a match. An image that cannot be read is a tile that says so.
    """
    kind, output = picture_format(output), Path(output)
    sheets, written = _sheets(rankings, positions), []
    for number, sheet in enumerate(sheets, 1):
        file = output.with_stem(f"{output.stem}-{number:03d}") if len(sheets) > 1 else output
        picture = _draw_sheet(sheet, threshold)
        with atomic_path(file) as temporary:
            picture.save(temporary, kind, **({"compress_level": 3} if kind == "PNG" else {"quality": 92}))
        written.append(file)
    return written


def _sheets(rankings, positions):
    """Lists of (Ranking, [(position, Hit)]), each of at most LINES lines."""
    sheets, room = [], 0
    for ranking in rankings:
        places = positions or range(1, MAX_HITS + 1)
        shown = [(place, ranking.hits[place - 1]) for place in places if 0 < place <= len(ranking.hits)]
        lines = _lines(shown)
        if lines > room:
            sheets.append([])
            room = LINES
        sheets[-1].append((ranking, shown))
        room -= lines
    return sheets


def _lines(shown):
    return max(1, math.ceil(len(shown) / PER_LINE))


def _draw_sheet(sheet, threshold):
    columns = max(1, min(PER_LINE, max(len(shown) for _, shown in sheet)))
    width = 2 * MARGIN + CELL[0] * (1 + columns) + QUERY_GAP
    present = {verdict(ranking.query_pid, hit.pid) for ranking, shown in sheet for _, hit in shown}
    legend = _flow([kind for kind in MEANING if kind in present], width)
    below = MARGIN + CELL[1] * sum(_lines(shown) for _, shown in sheet)
    picture = Image.new("RGB", (width, below + LEGEND * len({y for _, y, _ in legend}) + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(picture)
    top = MARGIN
    for ranking, shown in sheet:
        if top > MARGIN:
            draw.line([MARGIN, top - 10, width - MARGIN, top - 10], fill="#d8dee4")
        _draw_query(picture, draw, top, ranking)
        for i, (place, hit) in enumerate(shown):
            line, column = divmod(i, PER_LINE)
            left = MARGIN + CELL[0] * (1 + column) + QUERY_GAP
            _draw_hit(picture, draw, left, top + line * CELL[1], ranking, place, hit, threshold)
        top += CELL[1] * _lines(shown)
    for x, y, kind in legend:
        picture.paste(_badge(kind), (x, below + y), _badge(kind))
        draw.text((x + 30, below + y + 11), MEANING[kind], FAINT, _font(14), "lm")
    return picture


def _flow(kinds, width):
    """(x, y, kind) of the legend's entries, on as many lines as they need."""
    places, x, y = [], MARGIN, 0
    for kind in kinds:
        step = 30 + round(_font(14).getlength(MEANING[kind])) + 28
        if x > MARGIN and x + step > width:
            x, y = MARGIN, y + LEGEND
        places.append((x, y, kind))
        x += step
    return places


def _draw_query(picture, draw, top, ranking):
    _tile(picture, (MARGIN, top), ranking.query_file, "query", "query")
    left = MARGIN + CELL[0] + QUERY_GAP // 2 - 7
    draw.line([left, top, left, top + FRAME[1]], fill="#d8dee4", width=2)
    capped = f"{MAX_HITS} of {len(ranking.hits):,}" if len(ranking.hits) > MAX_HITS else ""
    _caption(draw, (MARGIN, top), capped, INK, ranking.query_pid, ranking.query_camid, ranking.query_name)


def _draw_hit(picture, draw, left, top, ranking, place, hit, threshold):
    _tile(picture, (left, top), hit.file, verdict(ranking.query_pid, hit.pid), str(place))
    match = threshold is not None and hit.score > threshold
    score = f"{hit.score:.3f}" + (" match" if match else "")
    _caption(draw, (left, top), score, INK if match or threshold is None else FAINT, hit.pid, hit.camid, hit.name)


def _caption(draw, corner, headline, ink, pid, camid, name):
    """Score, then identity and camera, then the file's stem: three lines below a tile, each as wide as the tile at most."""
    x, y = corner[0] + 2, corner[1] + FRAME[1] + 4
    facts = [who(pid, name)] if who(pid, name) else []
    facts += [f"cam {camid}"] if camid != UNKNOWN else []
    lines = [(headline, 18, ink, 22), (" · ".join(facts), 14, INK, 18), (Path(name).stem, 12, FAINT, 0)]
    for text, size, colour, step in lines:
        if text:
            draw.text((x, y), ellipsis(text, _font(size), FRAME[0] - 4), colour, _font(size))
            y += step


def who(pid, name):
    """An identity for people: its number, the folder's name where that is no number, "" where it is not known."""
    if pid in (JUNK, DISTRACTOR):
        return "junk" if pid == JUNK else "distractor"
    if pid == UNKNOWN_PID:
        return ""
    return f"id {pid}" if pid < 1 << 61 else Path(name).parent.name  # from there on `folder_pid` makes up numbers


def ellipsis(text, font, width):
    """`text`, cut in the middle so that it is at most `width` pixels wide."""
    text = "".join(c if c.isprintable() else "?" for c in text)  # line breaks and bytes that are no text break the font
    if font.getlength(text) <= width:
        return text

    def cut(kept):
        return text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]

    return cut(max(0, bisect_right(range(len(text)), width, key=lambda kept: font.getlength(cut(kept))) - 1))


def _tile(picture, corner, file, kind, label):
    """A framed crop with its badge, and a label (position or `query`) in the corner."""
    x, y = corner
    picture.paste(crop(file), (x + BORDER, y + BORDER))
    frame = _frame(kind)
    picture.paste(frame, corner, frame)
    if kind not in ("query", "unknown"):
        badge = _badge(kind)
        picture.paste(badge, (x + FRAME[0] - badge.width + 7, y - 7), badge)
    pill = _pill(label)
    picture.paste(pill, (x, y), pill)


def crop(file):
    """The image fitted into a WIDTH x HEIGHT tile, or what is wrong with it."""
    tile = Image.new("RGB", (WIDTH, HEIGHT), LETTERBOX)
    try:
        crop = Image.fromarray(images.decode(file).permute(1, 2, 0).contiguous().numpy())
    except ReidError:
        gone = isinstance(file, (str, Path)) and not Path(file).exists()
        ImageDraw.Draw(tile).text((WIDTH / 2, HEIGHT / 2), "missing" if gone else "unreadable", FAINT, _font(16), "mm")
        return tile
    scale = min(WIDTH / crop.width, HEIGHT / crop.height)
    crop = crop.resize((max(1, round(crop.width * scale)), max(1, round(crop.height * scale))), Image.Resampling.BICUBIC)
    tile.paste(crop, ((WIDTH - crop.width) // 2, (HEIGHT - crop.height) // 2))
    return tile


@lru_cache
def _font(size):
    return ImageFont.load_default(size)


def _smooth(size, paint, scale=4):
    """A picture that `paint(draw, scale)` draws larger: Pillow's shapes have no antialiasing of their own."""
    large = Image.new("RGBA", (size[0] * scale, size[1] * scale), (255, 255, 255, 0))
    paint(ImageDraw.Draw(large), scale)
    return large.resize(size, Image.Resampling.BOX)


@lru_cache
def _frame(kind):
    """Border with white outside its rounded corners; junk has a dashed one."""
    def paint(draw, s):
        w, h = FRAME[0] * s - 1, FRAME[1] * s - 1
        draw.rectangle([0, 0, w, h], fill=PAPER)
        draw.rounded_rectangle([0, 0, w, h], 9 * s, fill=COLOURS[kind])
        if kind == "junk":
            for at in range(10 * s, h - 12 * s, 14 * s):
                draw.rectangle([0, at, w, at + 6 * s], fill=PAPER)
            for at in range(10 * s, w - 12 * s, 14 * s):
                draw.rectangle([at, 0, at + 6 * s, BORDER * s], fill=PAPER)
                draw.rectangle([at, h - BORDER * s, at + 6 * s, h], fill=PAPER)
        inset = (BORDER if kind != "unknown" else 3) * s
        draw.rounded_rectangle([inset, inset, w - inset, h - inset], 5 * s, fill=(255, 255, 255, 0))
    return _smooth(FRAME, paint)


@lru_cache
def _badge(kind):
    """Right: a tick. Wrong: a cross; a distractor has a grey one. Junk: a bar. Unknown: a ring."""
    def paint(draw, s):
        draw.ellipse([0, 0, 24 * s - 1, 24 * s - 1], fill=PAPER)
        draw.ellipse([2 * s, 2 * s, 22 * s - 1, 22 * s - 1], fill=COLOURS[kind])
        strokes = {"right": [[(7, 12.5), (10.5, 16), (17, 8.5)]], "junk": [[(7, 12), (17, 12)]], "unknown": []}
        for stroke in strokes.get(kind, [[(8, 8), (16, 16)], [(8, 16), (16, 8)]]):
            points = [(x * s, y * s) for x, y in stroke]
            draw.line(points, PAPER, round(2.4 * s), "curve")
            for x, y in (points[0], points[-1]):
                draw.ellipse([x - 1.2 * s, y - 1.2 * s, x + 1.2 * s, y + 1.2 * s], fill=PAPER)
        if kind == "unknown":
            draw.ellipse([7 * s, 7 * s, 17 * s, 17 * s], fill=PAPER)
    return _smooth((24, 24), paint)


@lru_cache
def _pill(label):
    """White text on a dark rounded box."""
    font = _font(15)
    size = (max(26, round(font.getlength(label)) + 16), 24)
    box = _smooth(size, lambda draw, s: draw.rounded_rectangle([0, 0, size[0] * s - 1, size[1] * s - 1], 8 * s, fill=INK))
    ImageDraw.Draw(box).text((size[0] / 2, size[1] / 2), label, PAPER, font, "mm")
    return box
