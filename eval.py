"""Evaluate a run: embed query and gallery, rank, and print Rank-k, mAP, mINP and TAR@FAR (`reid/retrieval/metrics.py`).

`python eval.py --save_index` keeps the embeddings in index/<run>.pt; `python eval.py --load_index` embeds nothing.
The scores and the report are also kept in MLflow and TensorBoard with the run, if it was trained in this folder.
Several runs or datasets end in a table: eval.py --data_root data/market-1501-grouped data/viper --protocol market viper
Several GPUs: torchrun --nproc_per_node N eval.py --save_index
"""

import argparse
from itertools import product
from pathlib import Path

from reid import ReidError, distributed
from reid.checkpoint import checkpoint_path, fingerprint, load_checkpoint, versions
from reid.cli import HelpFormatter, command, left_out_status, run
from reid.files import write_json
from reid.retrieval import metrics, summary
from reid.retrieval.arguments import check_evaluation
from reid.retrieval.evaluation import gather_data, learn_spacetime, score, set_thresholds, split_index
from reid.retrieval.extract import add_arguments
from reid.retrieval.group import THRESHOLD, evaluate_groups, group_index, pick_threshold
from reid.retrieval.index import GalleryIndex
from reid.retrieval.protocol import PROTOCOLS, SPLITS
from reid.retrieval.stored import default_uri
from reid.retrieval.tracklets import evaluate_tracklets


def get_args_parser():
    parser = argparse.ArgumentParser("eval.py", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("run").add_argument
    add("--exp_name", nargs="+", default=["masked-hog-908"], help="runs whose models/<run>/best.pth is evaluated")
    add("--compare", nargs=2, metavar="RUN", help="print two runs side by side, from their saved indexes, and stop")
    add = parser.add_argument_group("data").add_argument
    add("--data_root", nargs="+", default=["data/market-1501-grouped"], help="grouped datasets with query/ and gallery/")
    add("--load_index", action="store_true", help="read the embeddings from the index, embed nothing; refused where images have "
        "changed since")
    add("--save_index", action="store_true", help="keep embeddings and threshold in the index; one that is there already, of the "
        "same network, is brought up to date: only new and changed images are embedded")
    add("--gallery_uri", help="the index: a file, or Milvus as name.db or http://host:19530 (default: index/<run>.pt)")
    add = parser.add_argument_group("protocol and scoring").add_argument
    add("--protocol", nargs="+", choices=PROTOCOLS, default=["market"], help="of all datasets, or one for each. nocam: only the "
        "query's own file is ignored; viper, prid: means over 10 random splits of 316 and of 100 people")
    add("--camera_norm", action=argparse.BooleanOptionalAction, help="take each camera's mean and deviation out of the "
        "embeddings; all further scores, thresholds and the report build on that (default: on)")
    add("--multi_query", action="store_true", help="average all images of a query's identity from its camera")
    add("--single_shot", type=int, metavar="N", help="also N times with one random gallery image of each person and camera "
        "(default: off)")
    add("--group", action="store_true", help="also group the gallery's images without their labels, and score the groups")
    add("--threshold", type=float, help="of --group: cosine that two images of one person have (default: that of --far, else "
        f"{THRESHOLD:g})")
    add("--tracklets", action="store_true", help="also rank tracklets for tracklets: the images of one identity, camera and "
        "sequence as their mean, and for comparison as their first image")
    add("--rerank", action="store_true", help="also with k-reciprocal re-ranking")
    add("--spacetime", action="store_true", help="also with camera and time, learned from the training identities")
    add("--far", type=float, default=1e-3, help="false accept rate of the threshold that is stored with the index")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="PATH", help="write everything that was measured (default: not written)")
    add("--report", metavar="HTML", help="write a page with tables, charts, worst queries and likely label errors; a copy stays "
        "with the run in MLflow, unless that is a server (default: not written)")
    add("--overwrite", action="store_true", help="replace files of other kinds, and indexes of other datasets, by these outputs")
    add_arguments(parser)
    return parser


def main(args):
    from reid.extras import galleries
    from reid.training.tracking import log_evaluation

    check_evaluation(args)
    if args.compare:
        return print(summary.compare_table(*(saved_run(name, args) for name in args.compare)))
    rank, _ = distributed.start(args.device)
    documents, status = [], 0
    for exp_name, (data_root, protocol) in product(args.exp_name, zip(args.data_root, args.protocol)):
        one = argparse.Namespace(**vars(args) | {"exp_name": exp_name, "data_root": data_root, "protocol": protocol})
        one.gallery_uri = args.gallery_uri or default_uri(exp_name)
        checkpoint, record, wanted = open_model(one)
        index = galleries.load_evaluated(one, wanted) if args.load_index else galleries.build_evaluated(one, checkpoint)
        if rank == 0:
            documents.append(evaluate(one, checkpoint, record, index))
            log_evaluation(exp_name, summary.scalars(documents[-1]), args.report)
            status = max(status, left_out_status(index.queries.bad + index.bad))
    distributed.stop()
    if rank:  # the other ranks have embedded their part
        return 0
    if len(documents) > 1:
        summary.print_matrix(documents)
    if args.json:
        write_json(args.json, documents[0] if len(documents) == 1 else {"evaluations": documents}, args.overwrite)
    return status


def evaluate(args, checkpoint, record, index):
    """Evaluate one run on one dataset: print, save and draw what is asked for; return everything that was measured."""
    from reid.extras import galleries, network

    cross_domain = None if args.network else summary.is_cross_domain(record, args.data_root)
    print(f"{args.exp_name} on {args.data_root}: {len(index.queries):,} queries, {len(index):,} images in the gallery, "
          f"{'mirrored images averaged' if index.mirror else 'no mirrored images'}", flush=True)
    if cross_domain:
        print(f"cross-domain: {args.exp_name} was not trained on the people and cameras of this dataset")
    if args.camera_norm and index.statistics is None:
        print("--camera_norm: has no effect, because the gallery's names give no camera")
    args.camera_norm = args.camera_norm is not False
    scored = index.camera_normalised() if args.camera_norm else index
    evidence = None
    if args.spacetime:
        evidence = learn_spacetime(checkpoint.with_name("spacetime.pt"), args.data_root, scored,
                                   lambda: network.make_extractor(args, checkpoint))
    found = {}
    for part in split_index(index, args.protocol):
        for name, result in score(args, part, evidence):
            found.setdefault(name, []).append(result)
    results = {name: metrics.pooled(splits) for name, splits in found.items()}
    intervals = {name: metrics.bootstrap(result) for name, result in results.items() if args.protocol not in SPLITS}
    summary.print_results(results, intervals)
    if args.protocol in SPLITS:
        summary.print_deviations(args.protocol, found)

    data = gather_data(scored, args.multi_query)
    shots = None
    if args.single_shot:
        shots = metrics.single_shot(*data.values(), repeats=args.single_shot, protocol=args.protocol)
        summary.print_single_shot(shots, args.single_shot)
    roc = set_thresholds(args, index)
    groups = None
    if args.group:
        groups = evaluate_groups(group_index(scored, pick_threshold(scored, args.threshold)), scored.pids)
    tracklets = evaluate_tracklets(scored, args.protocol) if args.tracklets else None
    if args.save_index:
        galleries.save_evaluated(index, args.gallery_uri, args.exp_name, args.overwrite)
    if args.report:
        from reid.extras.report import write_report

        page = write_report(args.report, f"{args.exp_name} on {args.data_root}", scored.queries, scored,
                            {name: value.cpu() for name, value in data.items()}, results, intervals, roc, vars(args), versions())
        print(f"report written: {page}")
    cameras = metrics.camera_table(*data.values(), protocol=args.protocol)._asdict()
    return summary.to_document(args, record, results, intervals, roc, index,
                               {"cross_domain": cross_domain, "single_shot": shots, "cameras": cameras, "groups": groups,
                                "tracklets": tracklets and {name: {"mAP": result.mAP, "rank": result.rank, "valid": result.valid}
                                                            for name, result in tracklets.items()}})


def open_model(args):
    """Return (path, record, fingerprint) of the run's checkpoint; of --network only the fingerprint is real."""
    if args.network:
        from reid.extras.network import network_fingerprint

        return Path("index", args.exp_name, "network"), {"args": {}}, network_fingerprint(args.network, args.network_input)
    path = checkpoint_path(args.exp_name)
    record = load_checkpoint(path)
    return path, record, fingerprint(record)


def saved_run(name, args):
    """Return (name, index, EvalResult) of a run or a --network, by its name, whose index was saved with its queries."""
    uri, checkpoint = default_uri(name), Path(f"models/{name}/best.pth")
    wanted = fingerprint(load_checkpoint(checkpoint_path(name))) if checkpoint.exists() or not Path(uri).exists() else None
    again = command("eval.py", save_index=True, exp_name=name)
    index = GalleryIndex.load(uri, wanted, lambda index: again)
    if index.queries is None:
        raise ReidError(f"{uri}: has a gallery but no queries; make them: {again}")
    index = index if args.camera_norm is False else index.camera_normalised()
    return name, index, metrics.evaluate(*gather_data(index).values(), protocol=args.protocol[0])


if __name__ == "__main__":
    run(get_args_parser(), main)
