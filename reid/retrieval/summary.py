"""The results of evaluations as tables and as plain values, and two evaluations compared."""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from reid import ReidError, __version__
from reid.checkpoint import versions
from reid.data.names import folder_pid
from reid.retrieval import metrics
from reid.retrieval.protocol import SPLITS


def is_cross_domain(record, data_root):
    """Whether a network was trained on other people than those of `data_root`/train.

    The identities that the checkpoint holds decide; without that folder, the name of the data set that it was trained on.
    """
    folder, trained = Path(data_root) / "train", defaultdict(set)  # identities of each root
    for identity in record["config"].get("classes", ()):
        root, _, pid = str(identity).rpartition("/")
        trained[root].add(pid)
    if folder.is_dir():
        return {str(folder_pid(path.name)) for path in folder.iterdir() if path.is_dir()} not in trained.values()
    roots = record["args"].get("data_root") or []
    return Path(data_root).name not in {Path(root).name for root in ([roots] if isinstance(roots, str) else roots)}


def print_results(results, intervals):
    """Print one row for each way of scoring; the match rate at k is not Rank-k and has its own column."""
    heads = ["mAP", "mAP trapezoid", "Rank-1", "Rank-5", "Rank-10", "Rank-20", "mINP", "match rate at 1 / 5 / 10"]
    width = max(len(name) for name in results) + 2
    print(" " * width + "  ".join(heads))
    for name, result in results.items():
        values = [result.mAP, result.mAP_trapezoid, *(result.rank[k] for k in (1, 5, 10, 20)), result.mINP]
        cells = [f"{100 * value:{len(head)}.2f}" for value, head in zip(values, heads)]
        print(name.ljust(width) + "  ".join([*cells, " / ".join(f"{100 * result.match_rate[k - 1]:.2f}" for k in (1, 5, 10))]))
    for name, spans in intervals.items():
        print(f"95 % interval over the queries, {name}: " + ", ".join(
            f"{head} {100 * span.low:.2f} to {100 * span.high:.2f}" for head, span in zip(("mAP", "Rank-1"), spans.values())))
    result = next(iter(results.values()))
    print(f"{result.valid:,} queries valid, {sum(result.skipped.values()):,} skipped"
          + "".join(f"; {count:,}: {reason}" for reason, count in result.skipped.items()))


def print_deviations(protocol, found):
    """Print the standard deviation over the splits of a published protocol."""
    for name, splits in found.items():
        values = torch.tensor([[split.mAP, split.rank[1]] for split in splits])
        mAP, rank1 = (100 * values.std(0)).tolist()
        print(f"{len(splits)} random splits of {SPLITS[protocol]} people, standard deviation, {name}: "
              f"mAP {mAP:.2f}, Rank-1 {rank1:.2f}")


def print_single_shot(shots, repeats):
    """Print means and standard deviations over random galleries."""
    print(f"single-shot, {repeats} random galleries: " + ", ".join(
        f"{name} {100 * mean:.2f} ± {100 * deviation:.2f}" for name, (mean, deviation) in shots.items()))


def print_matrix(documents):
    """Print Rank-1 and mAP of every run on every dataset."""
    rows = {}
    for document in documents:
        dataset = f"{Path(document['arguments']['data_root']).name} ({document['arguments']['protocol']})"
        for name, result in document["results"].items():
            cell = f"{100 * result['rank']['1']:.1f} / {100 * result['mAP']:.1f}"
            rows.setdefault((document["exp_name"], name), {})[dataset] = cell
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    width = max(len(f"{run}, {name}") for run, name in rows)
    print("\n" + "Rank-1 / mAP".ljust(width) + "".join(f"  {head:>13}" for head in heads))
    for (run, how), row in rows.items():
        print(f"{run}, {how}".ljust(width) + "".join(f"  {row.get(head, ''):>{max(13, len(head))}}" for head in heads))


def to_document(args, record, results, intervals, roc, index, more):
    """Return everything that was measured, and what it was measured with, as plain values for JSON (NaN is None)."""
    def plain(value):
        if isinstance(value, torch.Tensor):
            value = value.tolist()
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, float) and value != value:
            return None
        return {str(key): plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    return {
        "exp_name": args.exp_name, "version": __version__, "fingerprint": index.fingerprint, "versions": versions(),
        "arguments": vars(args), "training_arguments": record["args"],
        "counts": {"queries": len(index.queries), "gallery": len(index), "left_out": len(index.bad) + len(index.queries.bad)},
        "results": {name: plain(vars(result) | {"interval": {head: list(span) for head, span in intervals.get(name, {}).items()}})
                    for name, result in results.items()},
        "roc": roc and {"tpr": plain(roc.tpr), "threshold": plain(roc.threshold)},
    } | plain(more)


def scalars(document):
    """Return {name: float} of an evaluation, from `to_document`, for MLflow and TensorBoard, such as eval/viper/plain/mAP."""
    where = "/".join(["eval", Path(document["arguments"]["data_root"]).name, *{document["arguments"]["protocol"]} - {"market"}])
    found = {}
    for way, result in document["results"].items():
        values = {"mAP": result["mAP"], "mINP": result["mINP"], **{f"Rank-{k}": result["rank"][k] for k in ("1", "5", "10")}}
        found |= {re.sub(r"[^\w./ -]", "", f"{where}/{way}/{name}"): value for name, value in values.items()}
    return found


def compare_table(a, b):
    """Compare two runs over the queries valid in both, with the paired bootstrap difference; return the table as text.

    a, b: (name, GalleryIndex with queries, its EvalResult with one row for each query). Queries are paired by path. Raises
    ReidError where the galleries differ or no query is in both.
    """
    (name_a, index_a, result_a), (name_b, index_b, result_b) = a, b
    if name_a == name_b:
        raise ReidError(f"--compare {name_a} {name_b}: give two different runs")
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
    spans = {"mAP": spans["mAP"], "Rank-1": spans["rank1"]}
    values = {"mAP": lambda r: r.ap, "mINP": lambda r: r.inp,
              **{f"Rank-{k}": lambda r, k=k: (r.first_rank <= k).double() for k in (1, 5, 10, 20)}}
    widths = [max(8, len(name_a)), max(8, len(name_b))]
    lines = [f"{'':10}{name_a:>{widths[0]}}  {name_b:>{widths[1]}}  difference   95 % interval"]
    for head, value in values.items():
        one, other = 100 * float(value(result_a).mean()), 100 * float(value(result_b).mean())
        interval = f"{100 * spans[head].low:+8.2f} to {100 * spans[head].high:+.2f}" if head in spans else ""
        lines.append(f"{head:10}{one:{widths[0]}.2f}  {other:{widths[1]}.2f}  {other - one:+10.2f}{interval}".rstrip())
    better, worse = int((result_b.ap > result_a.ap).sum()), int((result_b.ap < result_a.ap).sum())
    lines.append(f"{len(pairs):,} queries valid in both: {better:,} better with {name_b}, {worse:,} worse, "
                 f"{len(pairs) - better - worse:,} equal")
    lines.append("; ".join(f"{head}: " + (f"{name_b if span.low > 0 else name_a} is better" if span.low > 0 or span.high < 0
                                          else "no clear difference") for head, span in spans.items()))
    return "\n".join(lines)
