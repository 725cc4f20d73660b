"""Pictures of ranked lists: each query beside its hits. Drawn with Pillow; needs no display and no font file."""

import math
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from reid import ReidError, images
from reid.data.names import DISTRACTOR, JUNK, UNKNOWN, UNKNOWN_PID, identity_name
from reid.files import PICTURE, atomic_path, check_outputs

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SOFTWARE = 0x0131  # EXIF tag, which holds the mark of our pictures
MAX_HITS = 100  # hits drawn for one query; the caption of the query shows how many there are
PER_LINE, LINES = 10, 10  # hits on a line; lines of a sheet (a query takes one for each PER_LINE hits)

WIDTH, HEIGHT, BORDER = 128, 256, 5  # pixels: a crop is fitted into WIDTH x HEIGHT
FRAME = (WIDTH + 2 * BORDER, HEIGHT + 2 * BORDER)
CELL = (FRAME[0] + 14, FRAME[1] + 76)  # with the caption below
MARGIN, QUERY_GAP, LEGEND = 28, 26, 30

INK, FAINT, RULE, PAPER, LETTERBOX = "#1f2328", "#6e7781", "#d8dee4", "#ffffff", "#eef0f2"
# Okabe and Ito's green and vermilion, distinct for every kind of colour vision; the badges show the same without colour.
COLOURS = {"query": INK, "right": "#009e73", "wrong": "#d55e00", "distractor": "#8c959f", "junk": "#8c959f",
           "unlabelled": "#c8ced4"}
MEANING = {"right": "same person", "wrong": "another person", "distractor": "distractor (counts as wrong)",
           "junk": "junk (does not count)", "unlabelled": "unlabelled"}


def verdict(query_pid, pid):
    """Compare the labels of a query and a hit: right, wrong, distractor, junk or unlabelled."""
    if pid == JUNK:
        return "junk"
    if query_pid <= 0 or pid == UNKNOWN_PID:
        return "unlabelled"
    if pid == DISTRACTOR:
        return "distractor"
    return "right" if pid == query_pid else "wrong"


def identity(pid, path):
    """Return text for an identity: "id 12", the name of its folder, "junk", "distractor", or "" for an unlabelled image."""
    if pid in (JUNK, DISTRACTOR):
        return "junk" if pid == JUNK else "distractor"
    name = identity_name(pid, path)
    return f"id {name}" if name.isdecimal() else name


def draw_ranking(output, ranked_lists, positions=None, overwrite=False):
    """Draw ranked lists into picture files and return the paths written.

    output: .png, .jpg or .webp. A sheet holds LINES lines; more go on numbered sheets (out-001.png, out-002.png ...).
    ranked_lists: list of RankedList; with a threshold each hit is marked as match or no match. positions: draw only these
    ranks, such as (1, 5, 10, 15); default: all up to MAX_HITS. An image that cannot be read becomes a tile that says so.
    overwrite: replace other files than our pictures, too; see `reid.files.check_output`.
    """
    output, sheets, written, room = Path(output), [], [], 0
    check_outputs([("output", output, PICTURE)], overwrite=overwrite)
    for ranked in ranked_lists:
        shown = [ranked[p - 1] for p in positions or range(1, MAX_HITS + 1) if 0 < p <= len(ranked)]
        if _lines(shown) > room:
            sheets.append([])
            room = LINES
        sheets[-1].append((ranked, shown))
        room -= _lines(shown)
    for number, sheet in enumerate(sheets, 1):
        file = output.with_stem(f"{output.stem}-{number:03d}") if len(sheets) > 1 else output
        picture = _draw_sheet(sheet)
        save(picture, file, overwrite)
        written.append(file)
    return written


def save(picture, file, overwrite=False):
    """Write a picture with the mark of ours, whole or not at all; see `reid.files.check_output`."""
    mark = Image.Exif()
    mark[SOFTWARE] = PICTURE
    with atomic_path(file, PICTURE, overwrite) as temporary:  # level of PNG, quality of the others
        picture.save(temporary, FORMATS[file.suffix.lower()], exif=mark, compress_level=3, quality=92)


def _lines(shown):
    return max(1, math.ceil(len(shown) / PER_LINE))


def _draw_sheet(sheet):
    """Draw one picture of [(RankedList, its hits that are shown)], with a legend of the badges that occur."""
    columns = max(1, min(PER_LINE, max(len(shown) for _, shown in sheet)))
    width = 2 * MARGIN + CELL[0] * (1 + columns) + QUERY_GAP
    present = {verdict(ranked.query.pid, hit.pid) for ranked, shown in sheet for hit in shown}
    legend = [kind for kind in MEANING if kind in present]
    bottom = MARGIN + CELL[1] * sum(_lines(shown) for _, shown in sheet)
    picture = Image.new("RGB", (width, bottom + LEGEND * len(legend) + MARGIN // 2), PAPER)
    draw, top = ImageDraw.Draw(picture), MARGIN
    for ranked, shown in sheet:
        if top > MARGIN:
            draw.line([MARGIN, top - 10, width - MARGIN, top - 10], fill=RULE)
        query, left = ranked.query, MARGIN + CELL[0] + QUERY_GAP
        draw.line([left - QUERY_GAP // 2 - 7, top, left - QUERY_GAP // 2 - 7, top + FRAME[1]], fill=RULE, width=2)
        _tile(picture, MARGIN, top, query.file, "query", "query")
        path = query.file if isinstance(query.file, (str, Path)) else ""
        headline = f"{MAX_HITS} of {len(ranked):,}" if len(ranked) > MAX_HITS else ""
        _caption(draw, MARGIN, top, headline, INK, query.pid, query.camid, path)
        for i, hit in enumerate(shown):
            line, column = divmod(i, PER_LINE)
            x, y = left + CELL[0] * column, top + CELL[1] * line
            _tile(picture, x, y, hit.path, verdict(query.pid, hit.pid), str(hit.position))
            match = {True: " match", False: " no match", None: ""}[hit.match]
            _caption(draw, x, y, f"{hit.score:.3f}{match}", FAINT if hit.match is False else INK, hit.pid, hit.camid, hit.path)
        top += CELL[1] * _lines(shown)
    for i, kind in enumerate(legend):
        picture.paste(_badge(kind), (MARGIN, bottom + LEGEND * i), _badge(kind))
        draw.text((MARGIN + 30, bottom + LEGEND * i + 11), MEANING[kind], FAINT, font(14), "lm")
    return picture


def _caption(draw, x, y, headline, ink, pid, camid, path):
    """Score, then identity and camera, then the name of the file: up to three lines below a tile, no wider than it."""
    facts = " · ".join(fact for fact in (identity(pid, path), f"cam {camid}" if camid != UNKNOWN else "") if fact)
    y += FRAME[1] + 4
    for text, size, colour, step in ((headline, 18, ink, 22), (facts, 14, INK, 18), (Path(path).stem, 12, FAINT, 0)):
        if text:
            draw.text((x + 2, y), ellipsis(text, font(size), FRAME[0] - 4), colour, font(size))
            y += step


def ellipsis(text, font, width):
    """Cut `text` in the middle so that it is at most `width` pixels wide."""
    text = short = "".join(c if c.isprintable() else "?" for c in text)  # Pillow fails on line breaks and surrogates
    kept = len(text)
    while kept and font.getlength(short) > width:
        kept -= 1
        short = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
    return short


def _tile(picture, x, y, file, kind, label):
    """Paste a framed crop with its badge, and a label (rank or "query") in the corner."""
    picture.paste(crop(file), (x + BORDER, y + BORDER))
    picture.paste(_frame(kind), (x, y), _frame(kind))
    if kind not in ("query", "unlabelled"):
        picture.paste(_badge(kind), (x + FRAME[0] - 17, y - 7), _badge(kind))
    picture.paste(_pill(label), (x, y), _pill(label))


def crop(file):
    """Return the image fitted into a WIDTH x HEIGHT tile, or a tile that says "missing" or "unreadable"."""
    tile = Image.new("RGB", (WIDTH, HEIGHT), LETTERBOX)
    try:
        image = Image.fromarray(images.decode(file).permute(1, 2, 0).contiguous().numpy())
    except ReidError:
        missing = isinstance(file, (str, Path)) and not Path(file).exists()
        ImageDraw.Draw(tile).text((WIDTH / 2, HEIGHT / 2), "missing" if missing else "unreadable", FAINT, font(16), "mm")
        return tile
    scale = min(WIDTH / image.width, HEIGHT / image.height)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    tile.paste(image, ((WIDTH - image.width) // 2, (HEIGHT - image.height) // 2))
    return tile


@lru_cache
def font(size):
    return ImageFont.load_default(size)


def _smooth(size, paint):
    """Call `paint(draw, scale)` on a larger picture and shrink it: Pillow's shapes have no antialiasing."""
    scale = 4
    large = Image.new("RGBA", (size[0] * scale, size[1] * scale), (255, 255, 255, 0))
    paint(ImageDraw.Draw(large), scale)
    return large.resize(size, Image.Resampling.BOX)


@lru_cache
def _frame(kind):
    """Draw a border with rounded corners, white outside of them; junk has a dashed one."""
    def paint(draw, s):
        w, h = FRAME[0] * s - 1, FRAME[1] * s - 1
        draw.rectangle([0, 0, w, h], fill=PAPER)
        draw.rounded_rectangle([0, 0, w, h], 9 * s, fill=COLOURS[kind])
        if kind == "junk":
            for at in range(10 * s, h - 12 * s, 14 * s):
                draw.rectangle([0, at, w, at + 6 * s], fill=PAPER)
            for at in range(10 * s, w - 12 * s, 14 * s):
                draw.rectangle([at, 0, at + 6 * s, h], fill=PAPER)
        inset = (BORDER if kind != "unlabelled" else 3) * s
        draw.rounded_rectangle([inset, inset, w - inset, h - inset], 5 * s, fill=(255, 255, 255, 0))
    return _smooth(FRAME, paint)


@lru_cache
def _badge(kind):
    """Draw a disc with a tick (right), a cross (wrong, distractor) or a bar (junk)."""
    cross, bar, tick = [[(8, 8), (16, 16)], [(8, 16), (16, 8)]], [[(7, 12), (17, 12)]], [[(7, 12.5), (10.5, 16), (17, 8.5)]]
    strokes = {"right": tick, "wrong": cross, "distractor": cross, "junk": bar, "unlabelled": []}[kind]

    def paint(draw, s):
        draw.ellipse([0, 0, 24 * s - 1, 24 * s - 1], fill=PAPER)
        draw.ellipse([2 * s, 2 * s, 22 * s - 1, 22 * s - 1], fill=COLOURS[kind])
        for stroke in strokes:
            draw.line([(x * s, y * s) for x, y in stroke], PAPER, round(2.4 * s), "curve")
    return _smooth((24, 24), paint)


@lru_cache
def _pill(label):
    """Draw white text on a dark rounded box."""
    size = (max(26, round(font(15).getlength(label)) + 16), 24)
    box = _smooth(size, lambda draw, s: draw.rounded_rectangle([0, 0, size[0] * s - 1, size[1] * s - 1], 8 * s, fill=INK))
    ImageDraw.Draw(box).text((size[0] / 2, size[1] / 2), label, PAPER, font(15), "mm")
    return box
