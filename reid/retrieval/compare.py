"""`eval.py --compare`: two runs side by side."""

from dataclasses import replace

import torch

from reid import ReidError
from reid.retrieval import metrics


def compare_table(a, b):
    """Two runs side by side over the queries valid in both, with the paired bootstrap difference, as text.

    a, b: (name, GalleryIndex with queries, its EvalResult by `metrics.evaluate`, one row a query). Queries are paired by
    path. Raises ReidError where the galleries differ or no query is in both.
    """
    (name_a, index_a, result_a), (name_b, index_b, result_b) = a, b
    if set(index_a.paths) != set(index_b.paths):
        raise ReidError(f"{name_a} and {name_b} were evaluated on different galleries ({len(index_a):,} and {len(index_b):,} "
                        "images): make both indexes of one dataset with eval.py --save_index")
    row_b = {path: row for row, path in enumerate(index_b.queries.paths)}
    pairs = [(row, row_b[path]) for row, path in enumerate(index_a.queries.paths) if path in row_b]
    pairs = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    pairs = pairs[result_a.ap[pairs[:, 0]].isfinite() & result_b.ap[pairs[:, 1]].isfinite()]
    if not len(pairs):
        raise ReidError(f"{name_a} and {name_b}: no query is valid in both, nothing to compare")
    result_a, result_b = (replace(r, **{name: getattr(r, name)[rows] for name in ("ap", "inp", "first_rank")})
                          for r, rows in ((result_a, pairs[:, 0]), (result_b, pairs[:, 1])))
    spans = metrics.bootstrap(result_b, result_a)
    figures = {"mAP": lambda r: r.ap, "mINP": lambda r: r.inp,
               **{f"Rank-{k}": lambda r, k=k: (r.first_rank <= k).double() for k in (1, 5, 10, 20)}}
    widths = [max(8, len(name_a)), max(8, len(name_b))]
    lines = [f"{'':10}{name_a:>{widths[0]}}  {name_b:>{widths[1]}}  difference   95 % interval"]
    for head, figure in figures.items():
        one, other = 100 * float(figure(result_a).mean()), 100 * float(figure(result_b).mean())
        span = spans.get({"Rank-1": "rank1"}.get(head, head))
        interval = f"{100 * span.low:+8.2f} to {100 * span.high:+.2f}" if span else ""
        lines.append(f"{head:10}{one:{widths[0]}.2f}  {other:{widths[1]}.2f}  {other - one:+10.2f}{interval}".rstrip())
    better, worse = int((result_b.ap > result_a.ap).sum()), int((result_b.ap < result_a.ap).sum())
    clear = {"mAP": spans["mAP"], "Rank-1": spans["rank1"]}
    verdicts = [f"{head}: " + (f"{name_b if span.low > 0 else name_a} is better" if span.low > 0 or span.high < 0 else
                               "no clear difference") for head, span in clear.items()]
    lines.append(f"{len(pairs):,} queries valid in both: {better:,} better with {name_b}, {worse:,} worse, "
                 f"{len(pairs) - better - worse:,} equal")
    return "\n".join([*lines, "; ".join(verdicts)])
