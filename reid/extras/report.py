"""`eval.py --report`: the results of an evaluation as one HTML file, which needs no network and no other file."""

import base64
import hashlib
import io
import math
from functools import lru_cache
from pathlib import Path

import torch

from reid import __version__
from reid.cli import ERASED, printable, without_secrets
from reid.extras import analysis, pictures
from reid.files import REPORT, atomic_path
from reid.retrieval import metrics
from reid.retrieval.protocol import blocks, make_task

QUERIES, SHOWN, IGNORED = 20, 10, 3  # worst queries; hits of each that count; hits of each that do not count
CARDS, NAMED = 12, 20  # examples of a kind; files named of a kind
BADGES = {"right": "✓", "wrong": "×", "distractor": "×", "junk": "–"}
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # Okabe and Ito's, distinct for every kind of colour vision


def write_report(path, title, queries, gallery, data, results, intervals, roc, arguments, versions):
    """Write the report to the file `path`, whole or not at all; an older report there is replaced.

    queries, gallery: GalleryIndex, for names and files. data: the arguments of `metrics.evaluate` in their order, by name
    (with --multi_query its queries are tracklets). results: {name of the scoring: EvalResult}; the first one ranks by
    cosine, and worst queries, confused people, label errors and score charts are its. intervals: {name: result of
    `metrics.bootstrap`}. roc: RocResult with the rates 1e-4, 1e-2 and arguments["far"], or None. arguments: the command
    line's, by name. versions: {library: version}.
    """
    protocol, result = arguments["protocol"], next(iter(results.values()))
    found = analysis.extremes(*data.values(), protocol=protocol)
    tiles = Tiles(queries, gallery, data, arguments)
    html = render(
        "report.html", title=printable(title), badges=BADGES, gallery=gallery, result=result, results=results, roc=roc,
        arguments={name: printable(without_secrets(str(value))) for name, value in arguments.items()},
        intervals=intervals, far=arguments["far"], cmc=_cmc_chart(results), curve=roc and _roc_chart(roc),
        scores=roc and _score_chart(roc, arguments["far"]),
        cameras=metrics.camera_table(*data.values(), protocol=protocol), tiles=tiles, found=found,
        worst=[_worst_query(tiles, query, result, found) for query in analysis.worst_queries(result, QUERIES)],
        confused=analysis.confusions(found, result, data["q_pids"], data["g_pids"]),
        similar=roc and analysis.similar_strangers(found, result, roc),
        dissimilar=roc and analysis.dissimilar_matches(found, roc),
        left_out=_left_out(tiles, result, queries.bad + gallery.bad), queries=queries, versions=versions, code=__version__,
        meaning=pictures.MEANING, shown=SHOWN, card_count=CARDS, unlike=analysis.UNLIKE)
    with atomic_path(path, REPORT, arguments.get("overwrite", False)) as temporary:
        temporary.write_bytes(html)
    return Path(path)


def render(template, **values):
    """Fill a template of this folder; return bytes of HTML with the style of a report, its hash and the mark of our pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    style = (folder / "report.css").read_text("utf-8")
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    html = environment.get_template(template).render(style=Markup(style), digest=digest, mark=REPORT, **values)
    return html.encode("utf-8", "replace")


class Tiles:
    """The crops of a report, as dicts. Rows are those of `data`: with --multi_query a tracklet is shown by its first image."""

    def __init__(self, queries, gallery, data, arguments):
        self.queries, self.gallery, self.data = queries, gallery, data
        self.protocol = arguments["protocol"]
        self.first = range(len(queries))
        if arguments.get("multi_query"):
            group = metrics.pool_queries(queries.embeddings.float(), queries.pids, queries.camids)[3]
            first = torch.full((len(data["q_pids"]),), len(group))
            self.first = first.scatter_reduce(0, group, torch.arange(len(group)), "amin").tolist()

    def counts(self, query):
        """Return bool [G]: the gallery images that count for a query."""
        one = {name: values[query : query + 1] if name.startswith("q_") else values for name, values in self.data.items()}
        task = make_task(**one, protocol=self.protocol)
        counts = task.g.pids >= 0
        _, _, _, cols, kind = next(blocks(task, [task.gallery()]))
        counts[task.gallery()[cols[kind > 0]]] = False
        return counts.cpu()

    def query(self, query):
        return self._tile(self.queries, self.first[query], "query", "query", None)

    def hit(self, query, row, score, label="", counts=True):
        kind = pictures.verdict(int(self.data["q_pids"][query]), int(self.data["g_pids"][row])) if counts else "junk"
        return self._tile(self.gallery, row, kind, label, float(score))

    @staticmethod
    def _tile(index, row, kind, label, score):
        file, pid, camid = index.paths[row], int(index.pids[row]), int(index.camids[row])
        identity = printable(pictures.identity(pid, file))
        facts = [fact for fact in (identity, f"cam {camid}" if camid >= 0 else "") if fact]
        return {"kind": kind, "label": label, "score": score, "path": printable(file), "identity": identity, "facts": facts,
                "source": _data_uri(Path(index.data_root) / file)}


@lru_cache(1024)
def _data_uri(file):
    out = io.BytesIO()
    pictures.crop(file).save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _worst_query(tiles, query, result, found):
    """Return (row of the query, tiles of its hits): the best ones, and the first match where it ranks below them."""
    scores, counts = tiles.data["g_emb"] @ tiles.data["q_emb"][query], tiles.counts(query)
    rank, hits, first = 0, [], int(result.first_rank[query])
    for row in analysis.ranked_rows(scores, counts, SHOWN, IGNORED).tolist():
        rank += int(counts[row])
        hits.append(tiles.hit(query, row, scores[row], str(rank) if counts[row] else "", bool(counts[row])))
    if first > rank:
        match = int(found.right_row[query])
        hits.append(tiles.hit(query, match, scores[match], f"{first:,}"))
    return query, hits


def _left_out(tiles, result, unreadable):
    """List skipped queries by reason, and unreadable images: [(what, why, some names, number of all)]."""
    rows = []
    for why, count in result.skipped.items():
        skipped = (result.reason == metrics.REASONS.index(why)).nonzero()[:NAMED, 0].tolist()
        rows.append(("queries", why, [printable(tiles.queries.paths[tiles.first[row]]) for row in skipped], count))
    if unreadable := [row for row in unreadable if row[1] != ERASED]:
        named = [printable(f"{file}: {why}") for file, why, *_ in unreadable[:NAMED]]
        rows.append(("images", "cannot be read", named, len(unreadable)))
    return rows


# A chart for the template: {"x" and "y": (label, lowest, highest, [(value, text) of the ticks]), "series"}, each
# series (name, colour, kind, [(x, y)]) with the kind "line", "dots", "area" or "rule" (vertical).

def _cmc_chart(results):
    series = [(name, SERIES[i % len(SERIES)], "line", list(enumerate((100 * result.cmc[:20]).tolist(), 1)))
              for i, (name, result) in enumerate(results.items())]
    low = min(90, math.floor(min(points[0][1] for *_, points in series) / 10) * 10)
    step = 2 if low == 90 else 10 if low >= 40 else 20
    return {"series": series,
            "x": ("rank k", 0.5, 20.5, [(k, k) for k in (1, 5, 10, 15, 20)]),
            "y": ("queries (%)", low, 100, [(y, y) for y in range(100, low - 1, -step)])}


def _roc_chart(roc):
    """Draw rates on a logarithmic scale; the dots are the rates that were computed exactly."""
    low = math.floor(math.log10(max(min(roc.tpr) / 10, 1 / roc.different_pairs)))
    rates, shares = ((histogram.flip(0).cumsum(0) / histogram.sum()).tolist()
                     for histogram in (roc.different_histogram, roc.same_histogram))
    dots = [(math.log10(rate), 100 * share) for rate, share in roc.tpr.items() if rate >= 10**low]
    curve = sorted([(math.log10(rate), 100 * share) for rate, share in zip(rates, shares) if rate >= 10**low] + dots)
    return {"series": [("", SERIES[0], "line", curve), ("", SERIES[0], "dots", dots)],
            "x": ("false accept rate", low, 0, [(power, f"{10.0**power:g}") for power in range(low, 1)]),
            "y": ("true-match rate (%)", 0, 100, [(y, y) for y in range(0, 101, 20)])}


def _score_chart(roc, rate):
    used = (roc.different_histogram + roc.same_histogram).nonzero()[:, 0].tolist()
    bins = slice(used[0], used[-1] + 1)
    starts, ends, threshold = roc.edges[:-1][bins].tolist(), roc.edges[1:][bins].tolist(), roc.threshold[rate]
    low, high, series = starts[0], ends[-1], []
    for name, kind, histogram in (("different people", "wrong", roc.different_histogram),
                                  ("same person", "right", roc.same_histogram)):
        shares = (histogram / histogram.sum())[bins].tolist()
        steps = [(x, share) for start, end, share in zip(starts, ends, shares) for x in (start, end)]
        series.append((name, pictures.COLOURS[kind], "area", [(low, 0), *steps, (high, 0)]))
    top = max(y for *_, points in series for _, y in points)
    series.append((f"threshold {threshold:.3f}", pictures.INK, "rule", [(min(max(threshold, low), high), 0)]))
    tenths = range(-10, 11, 1 if high - low < 0.9 else 2)
    return {"series": series,
            "x": ("cosine", low, high, [(t / 10, f"{t / 10:g}") for t in tenths if low <= t / 10 <= high]),
            "y": ("share of the pairs", 0, 1.05 * top, [])}
