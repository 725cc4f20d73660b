"""`eval.py --report`: one folder with a page that opens from disk, its charts and crops."""

import base64
import hashlib
import importlib.util
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from string import Template

import torch

from reid import ReidError, __version__
from reid.extras import pictures as viz
from reid.extras import reasons
from reid.files import fcntl
from reid.retrieval import metrics

PAGE = "report.html"
MARK = '<meta name="generator" content="human re-identification report">'  # what tells a report from a user's folder
WORST, SHOWN, IGNORED, CARDS, NAMED = 20, 10, 3, 12, 20  # queries; hits of one; pairs of a kind; files named of a kind
BADGES = {"right": "✓", "wrong": "×", "distractor": "×", "junk": "–"}


def check_folder(folder):
    """Raises ReidError where `write_report` would: say so before the evaluation, not after it."""
    folder = Path(folder)
    if importlib.util.find_spec("matplotlib") is None:
        raise ReidError("--report draws with matplotlib, which is not here: pip install matplotlib")
    page = folder / PAGE
    ours = page.is_file() and MARK in page.read_text("utf-8", "replace")[:2000]
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.is_symlink() or (folder.exists() and not ours and not empty):
        raise ReidError(f"--report {folder}: exists and is not a report; give a new folder")


def write_report(folder, title, queries, gallery, data, results, roc, arguments, versions):
    """Write `folder`/report.html with its pictures, whole or not at all; an older report there is replaced.

    queries, gallery: GalleryIndex, for names and files. data: the arguments of `metrics.evaluate` in their order, by name
    (with --multi_query its queries are tracklets). results: {way of scoring: EvalResult}, the first one with cosines; lists,
    pairs and charts of scores are of that one. roc: RocResult with the rates 1e-4, 1e-2 and arguments["fmr"]. arguments:
    the command line's, by name. versions: {library: version}. Returns the path of the page.
    """
    check_folder(folder)
    from reid.extras.charts import draw_charts

    options = {"protocol": arguments["protocol"]}
    result = next(iter(results.values()))
    cameras = metrics.camera_table(*data.values(), **options)
    cameras = cameras if len(cameras.cameras) > 1 else None
    found = reasons.extremes(*data.values(), **options)
    with _new_folder(folder) as new:
        draw_charts(new, results, roc, cameras, roc.threshold[arguments["fmr"]])
        crops = Crops(new, queries, gallery, data, arguments)
        sections = {
            "Results": _results(results),
            "Charts": _charts(roc, cameras, arguments["fmr"]),
            "Worst queries": _worst(crops, results, found),
            "Confused people": _confused(crops, result, found),
            "Likely label errors": _suspects(crops, result, found, roc),
            "Left out": _left_out(crops, result, queries, gallery),
            "Made with": _made_with(queries, gallery, arguments, versions),
        }
        (new / PAGE).write_bytes(_page(title, result, gallery, sections).encode("utf-8", "replace"))
    return Path(folder) / PAGE


@contextmanager
def _new_folder(folder):
    """Yield an empty folder that takes the place of `folder` when the block ends; those of killed runs are removed."""
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
        with suppress(OSError):  # its writer lives, and holds the lock
            os.close(_lock(stale))
            shutil.rmtree(stale)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    held = _lock(new) if fcntl else None
    try:
        yield new
        umask = os.umask(0)
        os.umask(umask)
        new.chmod(0o777 & ~umask)
        old = new.with_suffix(".old.tmp")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if held is not None:
            os.close(held)


def _lock(folder):
    if not fcntl:
        raise OSError("folders have no locks here")
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


class Crops:
    """The images of a report: each drawn once, as a file of the folder, and shown as tiles of HTML."""

    def __init__(self, folder, queries, gallery, data, arguments):
        self.folder, self.sides, self.data, self.names = folder, {"query": queries, "gallery": gallery}, data, {}
        self.own_camera = arguments["protocol"] == "market"
        self.rows = range(len(queries))
        if arguments.get("multi_query"):  # a tracklet is shown by its first image
            group = metrics.pool_queries(queries.embeddings.float(), queries.pids, queries.camids)[3]
            first = torch.full((len(data["q_pids"]),), len(group))
            self.rows = first.scatter_reduce(0, group, torch.arange(len(group)), "amin").tolist()
        (folder / "crops").mkdir()

    def counts(self, row):
        """bool [G]: the gallery images that count for a query."""
        pids, camids, camid = self.data["g_pids"], self.data["g_camids"], self.data["q_camids"][row]
        own = (pids == self.data["q_pids"][row]) & (camids == camid) & (camids >= 0)
        return (pids >= 0) & ~(own & self.own_camera)

    def who(self, side, row):
        """Path and ["id 12", "cam 3"] (what is known of them) of a query or a gallery image."""
        index, row = self.sides[side], self.rows[row] if side == "query" else row
        path, pid, camid = index.paths[row], int(index.pids[row]), int(index.camids[row])
        return path, [part for part in (viz.who(pid, path), f"cam {camid}" if camid >= 0 else "") if part]

    def query(self, row):
        return self._tile("query", row, "query", "query")

    def hit(self, query, row, label, score, counts=True):
        kind = viz.verdict(int(self.data["q_pids"][query]), int(self.data["g_pids"][row])) if counts else "junk"
        return self._tile("gallery", row, kind, label, f"<strong>{score:.3f}</strong>")

    def _tile(self, side, row, kind, label, headline=""):
        path, facts = self.who(side, row)
        if (side, path) not in self.names:
            self.names[side, path] = name = f"crops/{len(self.names):04d}.jpg"
            viz.crop(Path(self.sides[side].data_root) / path).save(self.folder / name, "JPEG", quality=85)
        badge = f"<i>{BADGES[kind]}</i>" if kind in BADGES else ""
        return (f'<figure class="tile {kind}"><div><img src="{self.names[side, path]}" alt="{kind}" title="{escape(path)}" '
                f'width="128" height="256">{f"<b>{label}</b>" * bool(label)}{badge}</div>'
                f'<figcaption>{headline}{"<br>".join(map(escape, facts))}</figcaption></figure>')


def _results(results):
    """Ways of scoring beside each other, a figure a line: four columns fit a phone."""
    spans = {name: metrics.bootstrap(result) for name, result in results.items()}

    def interval(key):
        return {name: f"<small>{100 * span[key].low:.1f}–{100 * span[key].high:.1f}</small>" for name, span in spans.items()}

    lines = [("mAP", lambda r: r.mAP, interval("mAP")), ("mAP (trapezoid)", lambda r: r.mAP_trapezoid, {}),
             *((f"Rank-{k}", lambda r, k=k: r.rank[k], interval("rank1") if k == 1 else {}) for k in (1, 5, 10, 20)),
             ("mINP", lambda r: r.mINP, {}), None,
             *((f"at {k}", lambda r, k=k: float(r.match_rate[k - 1]), {}) for k in (1, 5, 10, 15))]
    rows = []
    for line in lines:
        if line is None:
            rows.append(f'<tr class="group"><th colspan="{1 + len(results)}">Match rate: the k-th entry is right</th></tr>')
            continue
        head, value, small = line
        cells = "".join(f"<td>{100 * value(result):.2f}{small.get(name, '')}</td>" for name, result in results.items())
        rows.append(f'<tr><th scope="row">{head}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in results)
    return ("<p>In percent. Small: 95 % bootstrap interval over the queries. Rank-k counts a query whose first k entries hold a "
            "match; the match rate at k looks at the k-th entry alone.</p>"
            f'<table class="results"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>')


def _charts(roc, cameras, rate):
    charts = [("cmc", "Cumulative matching: queries with a match within the first k entries."),
              ("roc", f"Is it one person? Over {roc.same_pairs:,} pairs of one person and {roc.different_pairs:,} of two."),
              ("scores", f"Cosines of both kinds of pairs. The threshold {roc.threshold[rate]:.4f} lets {rate:g} of the pairs of "
               f"two people pass, and {100 * roc.tpr[rate]:.1f} % of the pairs of one.")]
    pairs = [("cameras-rank1", "Rank-1 (%) by camera pair; grey where no query has a match there."),
             ("cameras-map", "mAP (%) by camera pair.")] if cameras is not None else []
    return "".join('<div class="charts">' + "".join(
        f'<figure><img src="{name}.png" alt="{name}"><figcaption>{text}</figcaption></figure>' for name, text in row) + "</div>"
        for row in (charts, pairs) if row)


def _worst(crops, results, found):
    name, result = next(iter(results.items()))
    meaning = {"query": "the query", **{kind: viz.MEANING[kind] for kind in ("right", "wrong", "distractor")},
               "junk": "does not count: junk, or the query's own camera"}
    lists = []
    for query in reasons.worst_queries(result, WORST):
        scores = crops.data["g_emb"] @ crops.data["q_emb"][query]
        counts, place, tiles, first = crops.counts(query), 0, [crops.query(query)], int(result.first_rank[query])
        for row in reasons.ranked_rows(scores, counts, SHOWN, IGNORED):
            place += int(counts[row])
            tiles.append(crops.hit(query, row, str(place) if counts[row] else "", float(scores[row]), bool(counts[row])))
        if first > place:
            match = int(found.right_row[query])
            tiles.append(crops.hit(query, match, f"{first:,}", float(scores[match])))
        values = " · ".join(f"{escape(other)} AP {100 * float(r.ap[query]):.1f} %" for other, r in results.items())
        heading = escape(" · ".join(crops.who("query", query)[1]))
        lists.append(f'<div class="list"><h3>{heading}</h3><p class="faint">{values}; first match at rank {first:,}</p>'
                     f'<div class="strip">{"".join(tiles)}</div></div>')
    legend = "".join(f'<span class="{kind}">{text}</span>' for kind, text in meaning.items())
    return (f"<p>The {len(lists)} queries with the lowest AP, ranked by {escape(name)}: the first {SHOWN} entries, the most "
            f'alike images that do not count, and the first match. Below each: cosine, identity, camera.</p>'
            f'<div class="legend">{legend}</div>' + "".join(lists))


def _confused(crops, result, found):
    pairs, wrong, distractors = reasons.confusions(found, result, crops.data["q_pids"], crops.data["g_pids"])
    cards = []
    for pair in pairs[:CARDS]:
        one, other = (viz.who(pid, crops.who(*place)[0]) for pid, place in
                      ((pair.pid, ("query", pair.query)), (pair.taken_for, ("gallery", pair.image))))
        back = f", {pair.back:,} the other way round" if pair.back else ""
        cards.append(_card(f"{one} taken for {other}", f"{pair.count:,} of {pair.queries:,} queries{back}",
                           [crops.query(pair.query), crops.hit(pair.query, pair.image, "", float(found.wrong[pair.query]))]))
    return (f"<p>{wrong:,} of {result.valid:,} queries have another person in the first place; {distractors:,} of these a "
            f"distractor. {len(pairs):,} pairs of identities are confused; the most frequent, with the most alike "
            f"example:</p>{_cards(cards)}")


def _suspects(crops, result, found, roc):
    alike, all_alike, margin = reasons.alike_strangers(found, result, roc, CARDS)
    unlike, all_unlike, limit = reasons.unlike_images(found, roc, CARDS)
    top = [_card("Two ids, one look?", f"cosine {s.score:.3f}; best true match {s.best_score:.3f}",
                 [crops.query(s.query), crops.hit(s.query, s.image, "", s.score), crops.hit(s.query, s.best, "", s.best_score)])
           for s in alike]
    low = [_card("One id, two looks?", f"highest cosine within its identity {s.score:.3f}",
                 [crops.query(s.query), crops.hit(s.query, s.image, "", s.score)]) for s in unlike]
    return (f"<p><strong>Two ids, one look: {all_alike:,} queries.</strong> Their most alike image of another identity has a "
            f"cosine above {roc.threshold[1e-4]:.3f} (false-match rate 0.0001) and is more alike than their best true match by "
            f"over {margin:.3f} (the distance from there to the threshold at 0.01). A label may be wrong, or two people dress "
            f"alike.</p>{_cards(top)}<p><strong>One id, two looks: {all_unlike:,} gallery images.</strong> At least two queries "
            f"of their identity stand in other cameras, and to none of these is the cosine above {limit:.2f}, which "
            f"{100 * reasons.UNLIKE:.0f} % of the strangers exceed. A label may be wrong, or the box shows too little.</p>"
            f"{_cards(low)}")


def _card(title, text, tiles):
    return f'<div class="card"><h3>{escape(title)}</h3><p class="faint">{text}</p><div class="strip">{"".join(tiles)}</div></div>'


def _cards(cards):
    return f'<div class="cards">{"".join(cards)}</div><p></p>' if cards else "<p>None.</p>"


def _left_out(crops, result, queries, gallery):
    """Skipped queries by reason and images that could not be read, some of each by name."""
    rows = []
    for text, count in result.skipped.items():
        skipped = (result.reason == metrics.REASONS.index(text)).nonzero()[:NAMED, 0].tolist()
        rows.append((f"{count:,} queries", text, [crops.who("query", row)[0] for row in skipped], count))
    bad = queries.bad + gallery.bad
    if bad:
        rows.append((f"{len(bad):,} images", "cannot be read", [f"{file}: {why}" for file, why in bad[:NAMED]], len(bad)))
    lines = {f"{what}": f"{text}: " + ", ".join(names) + (f" … {count - len(names):,} more" if count > len(names) else "")
             for what, text, names, count in rows}
    return _table(lines) if lines else "<p>Nothing: every image was read and every query has a match in the gallery.</p>"


def _made_with(queries, gallery, arguments, versions):
    people = gallery.pids[gallery.pids > 0]
    counts = {"Queries": f"{len(queries):,} images of {len(queries.pids[queries.pids > 0].unique()):,} identities",
              "Gallery": f"{len(gallery):,} images: {len(people):,} of {len(people.unique()):,} identities, "
                         f"{int((gallery.pids == 0).sum()):,} distractors, {int((gallery.pids < 0).sum()):,} junk",
              "Weights": gallery.fingerprint, "Preprocessing": gallery.preprocessing,
              "Mirrored images": "averaged in" if gallery.mirror else "no", "Code": __version__}
    return _table(counts | versions) + "<h3>Arguments</h3>" + _table(arguments)


def _table(lines):
    return '<table class="facts">' + "".join(f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(str(value))}</td></tr>'
                                             for key, value in lines.items()) + "</table>"


def _page(title, result, gallery, sections):
    here = Path(__file__).parent
    style = (here / "report.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    return Template((here / PAGE).read_text("utf-8")).substitute(
        title=escape(title), style=style, style_hash=f"sha256-{digest}",
        subtitle=f"{result.valid:,} valid queries against {len(gallery):,} images · mAP {100 * result.mAP:.2f} % · "
                 f"Rank-1 {100 * result.rank[1]:.2f} %",
        links="".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors.items()),
        sections="\n".join(f'<section id="{anchors[name]}"><h2>{name}</h2>{body}</section>' for name, body in sections.items()))
