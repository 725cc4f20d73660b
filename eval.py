"""Evaluate a run: embed query and gallery, rank, and print Rank-k, mAP and what else there is to know.

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
from reid.checkpoint import checkpoint_path, fingerprint, load_checkpoint, load_spacetime, save_spacetime, versions
from reid.cli import HelpFormatter, check_ranges, run
from reid.data.datasets import folder_pid, read_split
from reid.files import atomic_path
from reid.retrieval import gallery, metrics, spacetime
from reid.retrieval.compare import compare_table
from reid.retrieval.extract import Extractor, add_arguments
from reid.retrieval.index import GalleryIndex
from reid.retrieval.rerank import estimate_bytes, rerank


def get_args_parser():
    parser = argparse.ArgumentParser("eval.py", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--exp_name", default="masked-hog-908", help="run whose models/<run>/best.pth is evaluated")
    add("--data_root", default="data/market-1501-grouped", help="grouped dataset with query/ and gallery/")
    add("--load_index", action="store_true", help="take the embeddings from the index, embed nothing")
    add("--save_index", action="store_true", help="keep the embeddings in the index")
    add("--gallery_uri", help="the index: a file (default: index/<run>.pt), or Milvus as name.db or http://host:19530")
    add("--report", metavar="HTML", help="write a page with tables, charts, worst queries and likely label errors")
    add("--compare", nargs=2, metavar="RUN", help="two runs side by side, from their saved indexes")
    add("--json", metavar="PATH", help="write everything that was measured")
    # how to score
    add("--rerank", action="store_true", help="also with k-reciprocal re-ranking")
    add("--spacetime", action="store_true", help="also with camera and time, learnt on the training identities")
    add("--protocol", choices=["market", "nocam"], default="market", help="nocam: only the query's own file is ignored")
    add("--single_shot", type=int, metavar="N", help="also N times with one random gallery image of each person and camera")
    add("--multi_query", action="store_true", help="average all images of a query's identity from its camera")
    add("--fmr", type=float, default=1e-3, help="false-match rate of the threshold that is stored with the index")
    # how to embed
    add_arguments(parser)
    add("--strict", action="store_true", help="stop at the first image that cannot be read, instead of leaving it out")
    return parser


def main(args):
    check_ranges(args, {"fmr": (1e-9, 1), "batch_size": (1, 1 << 16), "single_shot": (1, 1000)})
    if args.compare:
        return print(compare_table(*(saved_run(args, name) for name in args.compare)))
    if args.report:
        from reid.extras import report

        report.check_path(args.report)  # before the work, not after it
    rank, world_size = distributed.start(args.device)
    checkpoint = checkpoint_path(args.exp_name)
    record = load_checkpoint(checkpoint)
    uri = args.gallery_uri or f"index/{args.exp_name}.pt"
    if args.load_index:
        index = load_index(args, uri, fingerprint(record))
        args.mirror = index.mirror
    else:
        index = build_index(args, checkpoint, rank, world_size)
    if rank:  # the other world_size have done their part of the embedding
        return distributed.stop()
    queries = index.queries
    data = gather_data(queries, index, args)
    print(f"{args.exp_name} on {args.data_root}: {len(queries):,} queries, {len(index):,} images in the gallery, "
          f"{'mirrored images averaged' if index.mirror else 'no mirrored images'}", flush=True)
    cross_domain = is_cross_domain(record, args.data_root)
    if cross_domain:
        print(f"cross-domain: {args.exp_name} was not trained on the people and cameras of this dataset")

    scorers = {"visual": None} | extra_scorers(args, checkpoint, data, queries, index)
    results = {name: metrics.evaluate(*data.values(), scores=scores, protocol=args.protocol) if scores is None else
               metrics.evaluate(None, None, *list(data.values())[2:], scores=scores, protocol=args.protocol)
               for name, scores in scorers.items()}
    intervals = {name: metrics.bootstrap(result) for name, result in results.items()}
    print_results(results, intervals)
    if args.single_shot:
        shots = metrics.single_shot(*data.values(), repeats=args.single_shot, protocol=args.protocol)
        print(f"single-shot, {args.single_shot} random galleries: " + ", ".join(
            f"{name} {100 * mean:.2f} ± {100 * deviation:.2f}" for name, (mean, deviation) in shots.items()))
    roc = metrics.roc(*data.values(), rates=sorted({1e-4, 1e-3, 1e-2, args.fmr}), protocol=args.protocol)
    index.threshold, index.false_match_rate = roc.threshold[args.fmr], args.fmr
    for rate, tpr in roc.tpr.items():
        print(f"same person found at false-match rate {rate:g}: {100 * tpr:.2f} % (cosine above {roc.threshold[rate]:.4f})")

    if args.save_index:
        gallery.save_index(index, uri, args.exp_name)
        print(f"index saved: {uri}")
    if args.json:
        write_json(args, record, results, intervals, roc, index, {
            "cross_domain": cross_domain, "single_shot": shots if args.single_shot else None,
            "cameras": metrics.camera_table(*data.values(), protocol=args.protocol)._asdict()})
    if args.report:
        title = f"{args.exp_name} on {args.data_root}"
        page = report.write_report(args.report, title, queries, index, data, results, intervals, roc, vars(args), versions())
        print(f"report written: {page}")
    left_out = len(index.bad) + len(queries.bad)
    for file, reason in queries.bad + index.bad:
        print(f"left out: {file}: {reason}", file=sys.stderr)
    if left_out:
        print(f"eval.py: {left_out} images could not be read and were left out (exit status 3)", file=sys.stderr)
    distributed.stop()
    return 3 if left_out else 0


def make_extractor(checkpoint, args):
    network = None
    if args.engine != "torch":
        from reid.extras.openvino import engine_of

        network = engine_of(args)
    return Extractor.from_args(checkpoint, args, network)


def build_index(args, checkpoint, rank, world_size):
    """Embed gallery and queries of the dataset."""
    images, queries = read_split(args.data_root, "gallery"), read_split(args.data_root, "query")
    extractor = make_extractor(checkpoint, args)
    if rank == 0:
        print(extractor.describe(), flush=True)
    options = {"strict": args.strict, "rank": rank, "world_size": world_size, "progress": rank == 0}
    index = GalleryIndex.build(extractor, images, **options)
    index.queries = GalleryIndex.build(extractor, queries, **options)
    if rank == 0 and not (len(index) and len(index.queries)):
        raise ReidError(f"{args.data_root}: not one image of its {'gallery' if not len(index) else 'query'} could be read")
    return index


def load_index(args, uri, wanted):
    """The saved index, if it is of these weights, this dataset and these settings."""
    index = gallery.load_index(uri, args.exp_name, wanted)
    again = f"make it again: python eval.py --save_index --exp_name {args.exp_name} --data_root {args.data_root}"
    if index.queries is None:
        raise ReidError(f"{uri}: has a gallery but no queries; {again}")
    if Path(index.data_root).resolve() != Path(args.data_root).resolve():
        raise ReidError(f"{uri}: made of {index.data_root}, not of {args.data_root}; {again}")
    if args.mirror not in (None, index.mirror):
        raise ReidError(f"{uri}: made {'with' if index.mirror else 'without'} mirrored images; give "
                        f"{'--mirror' if index.mirror else '--no-mirror'}, or {again}")
    return index


def saved_run(args, name):
    """(name, index, EvalResult) of a run whose index was saved with its queries."""
    path = f"index/{name}.pt"
    index = GalleryIndex.load(path, fingerprint(load_checkpoint(checkpoint_path(name))))
    if index.queries is None:
        raise ReidError(f"{path}: has a gallery but no queries; make it again: python eval.py --save_index --exp_name {name}")
    plain = argparse.Namespace(multi_query=False)
    return name, index, metrics.evaluate(*gather_data(index.queries, index, plain).values(), protocol=args.protocol)


def is_cross_domain(record, data_root):
    """Whether a network was trained on other people than those of `data_root`/train."""
    trained = record["args"].get("data_root")
    if trained:
        return Path(data_root).name not in {Path(root).name for root in ([trained] if isinstance(trained, str) else trained)}
    folder = Path(data_root) / "train"  # converted weights tell nothing but the ids of their classes
    people = {folder_pid(path.name) for path in folder.iterdir()} if folder.is_dir() else set()
    return not people or people != set(record["config"].get("classes", ()))


def gather_data(queries, index, args):
    """The arguments of reid.retrieval.metrics: embeddings, ids, cameras."""
    q_emb, q_pids, q_camids = queries.embeddings.float(), queries.pids, queries.camids
    if args.multi_query:  # the gallery's images of a query's identity and camera are never ranked for it, so they may help
        own = {pair for pair in zip(q_pids.tolist(), q_camids.tolist()) if pair[0] > 0 <= pair[1]}
        helpers = torch.tensor([pair in own for pair in zip(index.pids.tolist(), index.camids.tolist())])
        q_emb, q_pids, q_camids, _ = metrics.pool_queries(
            torch.cat([q_emb, index.embeddings[helpers].float()]), torch.cat([q_pids, index.pids[helpers]]),
            torch.cat([q_camids, index.camids[helpers]]))
    return {"q_emb": q_emb, "g_emb": index.embeddings.float(), "q_pids": q_pids, "q_camids": q_camids,
            "g_pids": index.pids, "g_camids": index.camids}


def extra_scorers(args, checkpoint, data, queries, index):
    """{"+rerank": scores, ...} as asked for; scores are callables(start, stop) -> float32 [stop - start, G]."""
    scorers, q_emb, g_emb = {}, data["q_emb"], data["g_emb"]
    if args.rerank:
        need = estimate_bytes(len(q_emb), len(g_emb), g_emb.shape[1])
        print(f"re-ranking: about {need / 2**20:,.0f} MiB of memory", flush=True)
        scorers["+rerank"] = rerank(q_emb, g_emb).scores
    if args.spacetime:
        if args.multi_query:
            raise ReidError("--spacetime needs the time of each query, which --multi_query averages over: give one of them")
        evidence = learn_spacetime(args, checkpoint)
        of_queries, of_gallery = ((part.camids, part.seqs, part.frames) for part in (queries, index))

        def fused(start, stop):
            odds = evidence.prob(*(column[start:stop] for column in of_queries), *of_gallery)
            return evidence.fuse(q_emb[start:stop] @ g_emb.T, odds)

        scorers["+spacetime"] = fused
        if args.rerank:
            bonus = evidence.bonus(*(torch.cat(columns) for columns in zip(of_queries, of_gallery)))
            scorers["+both"] = rerank(q_emb, g_emb, bonus=bonus).scores
    return scorers


def learn_spacetime(args, checkpoint):
    """models/<run>/spacetime.pt; learnt from the training identities where it is not there yet, never from the test set."""
    path = checkpoint.with_name("spacetime.pt")
    if path.exists():
        return load_spacetime(path, args.data_root)
    train = read_split(args.data_root, "train")
    print(f"camera and time: learning from {len(train.pids.unique()):,} training identities", flush=True)
    embeddings, kept, _ = make_extractor(checkpoint, args).embed_records(train.files())
    train = train.select(kept)
    columns = train.pids, train.camids, train.seqs, train.frames
    evidence = replace(spacetime.fit(*columns), weight=spacetime.fit_weight(embeddings, *columns))
    save_spacetime(path, evidence, args.data_root)
    print(f"camera and time: saved as {path}")
    return evidence


def print_results(results, intervals):
    """One row per way of scoring; match rate and Rank-k are different things and stand apart."""
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
    """Everything that was measured, and what it was measured with."""
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


if __name__ == "__main__":
    run(get_args_parser(), main)
