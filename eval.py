"""Evaluate a run: embed query and gallery, rank, and print Rank-k, mAP, mINP and TAR@FAR.

`python eval.py --save_index` keeps the embeddings in index/<run>.pt; `python eval.py --load_index` embeds nothing.
Several GPUs: torchrun --nproc_per_node N eval.py --save_index
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from reid import ReidError, __version__, distributed
from reid.checkpoint import checkpoint_path, fingerprint, load_checkpoint, versions
from reid.cli import HelpFormatter, check_network, check_outputs, check_ranges, printable, run
from reid.data.datasets import folder_pid, read_split
from reid.files import atomic_path
from reid.retrieval import metrics, spacetime
from reid.retrieval.extract import add_arguments
from reid.retrieval.index import GalleryIndex, check_made_of, check_replaceable, is_milvus
from reid.retrieval.protocol import PROTOCOLS
from reid.retrieval.rerank import estimate_bytes, rerank


def get_args_parser():
    parser = argparse.ArgumentParser("eval.py", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("run").add_argument
    add("--exp_name", default="masked-hog-908", help="run whose models/<run>/best.pth is evaluated")
    add("--compare", nargs=2, metavar="RUN", help="print two runs side by side, from their saved indexes, and stop")
    add = parser.add_argument_group("data").add_argument
    add("--data_root", default="data/market-1501-grouped", help="grouped dataset with query/ and gallery/")
    add("--load_index", action="store_true", help="read the embeddings from the index, embed nothing")
    add("--save_index", action="store_true", help="keep the embeddings and the threshold in the index")
    add("--gallery_uri", help="the index: a file, or Milvus as name.db or http://host:19530 (default: index/<run>.pt)")
    add = parser.add_argument_group("protocol and scoring").add_argument
    add("--protocol", choices=PROTOCOLS, default="market", help="nocam: only the query's own file is ignored")
    add("--multi_query", action="store_true", help="average all images of a query's identity from its camera")
    add("--single_shot", type=int, metavar="N", help="also N times with one random gallery image of each person and camera "
        "(default: off)")
    add("--rerank", action="store_true", help="also with k-reciprocal re-ranking")
    add("--spacetime", action="store_true", help="also with camera and time, learned from the training identities")
    add("--far", type=float, default=1e-3, help="false accept rate of the threshold that is stored with the index")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="PATH", help="write everything that was measured (default: not written)")
    add("--report", metavar="HTML", help="write a page with tables, charts, worst queries and likely label errors (default: "
        "not written)")
    add_arguments(parser)
    return parser


def main(args):
    uri = check_arguments(args)
    if args.compare:
        return print(compare_table(*(saved_run(name, args.protocol) for name in args.compare)))
    rank, world_size = distributed.start(args.device)
    checkpoint, record, wanted = open_model(args)
    if args.load_index:
        index = load_index(args, uri, wanted)
    else:
        index = build_index(args, checkpoint, rank, world_size)
    if rank:  # the other ranks have embedded their part
        return distributed.stop()

    data = gather_data(args, index)
    cross_domain = None if args.network else is_cross_domain(record, args.data_root)
    print(f"{args.exp_name} on {args.data_root}: {len(index.queries):,} queries, {len(index):,} images in the gallery, "
          f"{'mirrored images averaged' if index.mirror else 'no mirrored images'}", flush=True)
    if cross_domain:
        print(f"cross-domain: {args.exp_name} was not trained on the people and cameras of this dataset")
    results = {"visual": metrics.evaluate(*data.values(), protocol=args.protocol)}
    for name, scores in extra_scores(args, checkpoint, data, index):
        results[name] = metrics.evaluate(*(data | {"q_emb": None, "g_emb": None}).values(), scores=scores, protocol=args.protocol)
    intervals = {name: metrics.bootstrap(result) for name, result in results.items()}
    print_results(results, intervals)
    shots = single_shot(args, data) if args.single_shot else None
    roc = metrics.roc(*data.values(), rates=sorted({1e-4, 1e-3, 1e-2, args.far}), protocol=args.protocol)
    index.threshold, index.false_accept_rate = roc.threshold[args.far], args.far
    for rate, share in roc.tpr.items():
        print(f"TAR@FAR {rate:g}: {100 * share:.2f} % (cosine above {roc.threshold[rate]:.4f})")

    if args.save_index:
        save_index(index, uri, args.exp_name)
    if args.json:
        cameras = metrics.camera_table(*data.values(), protocol=args.protocol)._asdict()
        write_json(args, record, results, intervals, roc, index,
                   {"cross_domain": cross_domain, "single_shot": shots, "cameras": cameras})
    if args.report:
        from reid.extras.report import write_report

        page = write_report(args.report, f"{args.exp_name} on {args.data_root}", index.queries, index, data, results,
                            intervals, roc, vars(args), versions())
        print(f"report written: {page}")
    distributed.stop()
    return say_left_out(index)


def check_arguments(args):
    """Raise ReidError for arguments that cannot work, before any work is done; return the URI of the index."""
    check_ranges(args, {"far": (1e-9, 1), "batch_size": (1, 1 << 16), "single_shot": (1, 1000)})
    check_outputs([("json", args.json, (".json",))])
    check_network(args)
    if args.multi_query and args.spacetime:
        raise ReidError("--spacetime needs the time of each query, which --multi_query averages over: give one of them")
    if args.multi_query and args.protocol == "nocam":
        raise ReidError("--multi_query averages the images of one camera, which --protocol nocam ignores: give one of them")
    uri = args.gallery_uri or f"index/{args.exp_name}.pt"
    if args.save_index and not is_milvus(uri):
        check_replaceable(uri, args.data_root)
    if args.report:
        from reid.extras.report import check_path

        check_path(args.report)
    return uri


def open_model(args):
    """Return (path, record, fingerprint) of the run's checkpoint; of --network only the fingerprint is real."""
    if args.network:
        from reid.extras.network import network_fingerprint

        return Path("index", args.exp_name, "network"), {"args": {}}, network_fingerprint(args.network, args.network_input)
    path = checkpoint_path(args.exp_name)
    record = load_checkpoint(path)
    return path, record, fingerprint(record)


def build_index(args, checkpoint, rank, world_size):
    """Embed gallery and queries of the dataset."""
    from reid.extras.network import make_extractor

    images, queries = read_split(args.data_root, "gallery"), read_split(args.data_root, "query")
    extractor = make_extractor(args, checkpoint)
    if rank == 0:
        print(extractor.describe(), flush=True)
    accounts = [images.account(f"{args.data_root}/gallery", args.strict), queries.account(f"{args.data_root}/query", args.strict)]
    if rank == 0:
        print(*accounts, sep="\n")
    options = {"strict": args.strict, "rank": rank, "world_size": world_size, "progress": rank == 0}
    index = GalleryIndex.build(extractor, images, **options)
    index.queries = GalleryIndex.build(extractor, queries, **options)
    if rank == 0 and not (len(index) and len(index.queries)):
        raise ReidError(f"{args.data_root}: not one image of its {'gallery' if not len(index) else 'query'} could be read")
    return index


def load_index(args, uri, wanted):
    """Read the saved index with its queries; raises ReidError where weights, dataset, images or settings differ."""
    if is_milvus(uri):
        from reid.extras import milvus

        index = milvus.load_index(uri, args.exp_name, wanted)
    else:
        index = GalleryIndex.load(uri, wanted)
    again = f"make it again: python eval.py --save_index --exp_name {args.exp_name} --data_root {args.data_root}"
    if index.queries is None:
        raise ReidError(f"{uri}: has a gallery but no queries; {again}")
    check_made_of(index, uri, args.data_root, again)
    if args.mirror not in (None, index.mirror):
        raise ReidError(f"{uri}: made {'with' if index.mirror else 'without'} mirrored images; give "
                        f"{'--mirror' if index.mirror else '--no-mirror'}, or {again}")
    args.mirror = index.mirror
    return index


def save_index(index, uri, exp_name):
    """Keep an index with its queries and its threshold."""
    if is_milvus(uri):
        from reid.extras import milvus

        milvus.save_index(index, uri, exp_name)
    else:
        index.save(uri)
    print(f"index saved: {uri}")


def is_cross_domain(record, data_root):
    """Whether a network was trained on other people than those of `data_root`/train."""
    trained = record["args"].get("data_root")
    if trained:
        return Path(data_root).name not in {Path(root).name for root in ([trained] if isinstance(trained, str) else trained)}
    folder = Path(data_root) / "train"  # of converted weights only the ids of their classes are recorded
    people = {folder_pid(path.name) for path in folder.iterdir()} if folder.is_dir() else set()
    return not people or people != set(record["config"].get("classes", ()))


def gather_data(args, index):
    """The arguments of `metrics.evaluate`, by name and in order: embeddings, identities, cameras and files."""
    queries = index.queries
    q_emb, q_pids, q_camids, q_ids = queries.embeddings.float(), queries.pids, queries.camids, queries.contents
    if args.multi_query:  # gallery images of a query's identity and camera are never ranked for it, so they join the average
        own = {pair for pair in zip(q_pids.tolist(), q_camids.tolist()) if pair[0] > 0 <= pair[1]}
        more = torch.tensor([pair in own for pair in zip(index.pids.tolist(), index.camids.tolist())])
        q_emb, q_pids, q_camids, group = metrics.pool_queries(
            torch.cat([q_emb, index.embeddings[more].float()]), torch.cat([q_pids, index.pids[more]]),
            torch.cat([q_camids, index.camids[more]]))
        q_ids = torch.full_like(q_pids, -1).index_put_((group,), torch.cat([q_ids, index.contents[more]]))
    g_ids = index.contents.where(index.contents >= 0, -2)  # unknown files differ from each other
    return {"q_emb": q_emb, "g_emb": index.embeddings.float(), "q_pids": q_pids, "q_camids": q_camids,
            "g_pids": index.pids, "g_camids": index.camids, "q_ids": q_ids, "g_ids": g_ids}


def extra_scores(args, checkpoint, data, index):
    """Yield (name, scores as `metrics.evaluate` takes them) of the other ways of scoring that are asked for."""
    q_emb, g_emb = data["q_emb"], data["g_emb"]
    if args.rerank:
        need = estimate_bytes(len(q_emb), len(g_emb), g_emb.shape[1])
        print(f"re-ranking: about {need / 2**20:,.0f} MiB of memory", flush=True)
        yield "+rerank", rerank(q_emb, g_emb).scores
    if args.spacetime:
        evidence = learn_spacetime(args, checkpoint, index.fingerprint)
        of_queries, of_gallery = ((part.camids, part.seqs, part.frames) for part in (index.queries, index))

        def fused(start, stop):
            odds = evidence.prob(*(column[start:stop] for column in of_queries), *of_gallery)
            return evidence.fuse(q_emb[start:stop] @ g_emb.T, odds)

        yield "+spacetime", fused
        if args.rerank:
            bonus = evidence.bonus(*(torch.cat(columns) for columns in zip(of_queries, of_gallery)))
            yield "+both", rerank(q_emb, g_emb, bonus=bonus).scores


def learn_spacetime(args, checkpoint, wanted):
    """Read models/<run>/spacetime.pt, or learn it from the training identities, never from the test set."""
    from reid.extras.network import make_extractor

    path = checkpoint.with_name("spacetime.pt")
    if path.exists():
        return spacetime.SpaceTime.load(path, wanted, args.data_root)
    train = read_split(args.data_root, "train")
    print(f"camera and time: learning from {len(train.pids.unique()):,} training identities", flush=True)
    embeddings, kept, _ = make_extractor(args, checkpoint).embed_records(train.files())
    train = train.select(kept)
    columns = train.pids, train.camids, train.seqs, train.frames
    evidence = replace(spacetime.fit(*columns), weight=spacetime.fit_weight(embeddings, *columns))
    evidence.save(path, wanted, args.data_root)
    print(f"camera and time: saved as {path}")
    return evidence


def single_shot(args, data):
    """Print and return means and standard deviations over random galleries."""
    shots = metrics.single_shot(*data.values(), repeats=args.single_shot, protocol=args.protocol)
    print(f"single-shot, {args.single_shot} random galleries: " + ", ".join(
        f"{name} {100 * mean:.2f} ± {100 * deviation:.2f}" for name, (mean, deviation) in shots.items()))
    return shots


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


def write_json(args, record, results, intervals, roc, index, more):
    """Write everything that was measured, and what it was measured with, as strict JSON (NaN is null)."""
    def plain(value):
        if isinstance(value, torch.Tensor):
            value = value.tolist()
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, float) and value != value:
            return None
        return {str(key): plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    document = {
        "exp_name": args.exp_name, "version": __version__, "fingerprint": index.fingerprint, "versions": versions(),
        "arguments": vars(args), "training_arguments": record["args"],
        "counts": {"queries": len(index.queries), "gallery": len(index), "left_out": len(index.bad) + len(index.queries.bad)},
        "results": {name: plain(vars(result) | {"interval": {head: list(span) for head, span in intervals[name].items()}})
                    for name, result in results.items()},
        "roc": {"tpr": plain(roc.tpr), "threshold": plain(roc.threshold)},
    } | plain(more)
    with atomic_path(args.json) as temporary:
        temporary.write_text(json.dumps(document, indent=1, default=str))
    print(f"results written: {args.json}")


def say_left_out(index):
    """Print the images that could not be read; return the exit status."""
    bad = index.queries.bad + index.bad
    for file, reason in bad:
        print(f"left out: {printable(file)}: {printable(reason)}", file=sys.stderr)
    if bad:
        print(f"eval.py: {len(bad)} images could not be read and were left out (exit status 3)", file=sys.stderr)
    return 3 if bad else 0


def saved_run(name, protocol):
    """(name, index, EvalResult) of a run, or of a --network by its name, whose index was saved with its queries."""
    uri, checkpoint = f"index/{name}.pt", Path(f"models/{name}/best.pth")
    wanted = fingerprint(load_checkpoint(checkpoint_path(name))) if checkpoint.exists() or not Path(uri).exists() else None
    index = GalleryIndex.load(uri, wanted)
    if index.queries is None:
        raise ReidError(f"{uri}: has a gallery but no queries; make it again: python eval.py --save_index --exp_name {name}")
    data = gather_data(argparse.Namespace(multi_query=False), index)
    return name, index, metrics.evaluate(*data.values(), protocol=protocol)


def compare_table(a, b):
    """Compare two runs over the queries valid in both, with the paired bootstrap difference; return the table as text.

    a, b: (name, GalleryIndex with queries, its EvalResult with one row for each query). Queries are paired by path. Raises
    ReidError where the galleries differ or no query is in both.
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


if __name__ == "__main__":
    run(get_args_parser(), main)
