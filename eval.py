"""Evaluate a run: embed query and gallery, rank, and print Rank-k, mAP, mINP and TAR@FAR (`reid/retrieval/metrics.py`).

`python eval.py --save_index` keeps the embeddings in index/<run>.pt; `python eval.py --load_index` embeds nothing.
The scores and the report are also kept in MLflow and TensorBoard with the run, if it was trained in this folder.
Several runs or datasets end in a table: eval.py --data_root data/market-1501-grouped data/viper --protocol market viper
Several GPUs: torchrun --nproc_per_node N eval.py --save_index
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path

from reid import ReidError, distributed
from reid.checkpoint import checkpoint_path, fingerprint, load_checkpoint, versions
from reid.cli import HelpFormatter, check_network, check_ranges, command, left_out_status, run
from reid.data.datasets import read_split
from reid.files import REPORT, RESULTS, check_outputs, write_json
from reid.model import pick_device
from reid.retrieval import metrics, summary
from reid.retrieval.evaluation import gather_data, learn_spacetime, score, set_thresholds, split_index
from reid.retrieval.extract import add_arguments
from reid.retrieval.group import THRESHOLD, evaluate_groups, group_index
from reid.retrieval.index import GalleryIndex
from reid.retrieval.protocol import PROTOCOLS, SPLITS, random_splits
from reid.retrieval.stored import FORMAT, changing, check_current, check_replaceable, default_uri, is_milvus, save_command
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
    from reid.training.tracking import log_evaluation

    check_arguments(args)
    if args.compare:
        return print(summary.compare_table(*(saved_run(name, args) for name in args.compare)))
    rank, world_size = distributed.start(args.device)
    documents, status = [], 0
    for exp_name, (data_root, protocol) in product(args.exp_name, zip(args.data_root, args.protocol)):
        one = argparse.Namespace(**vars(args) | {"exp_name": exp_name, "data_root": data_root, "protocol": protocol})
        one.gallery_uri = args.gallery_uri or default_uri(exp_name)
        checkpoint, record, wanted = open_model(one)
        index = load_index(one, one.gallery_uri, wanted) if args.load_index else build_index(one, checkpoint, rank, world_size)
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


def check_arguments(args):
    """Raise ReidError for arguments that cannot work, before any work is done; one protocol for each dataset."""
    check_ranges(args, {"far": (1e-9, 1), "batch_size": (1, 1 << 16), "single_shot": (1, 1000)})
    check_network(args)
    if args.network:
        args.exp_name = [args.exp_name]
    if len(args.protocol) == 1:
        args.protocol *= len(args.data_root)
    if len(args.protocol) != len(args.data_root):
        raise ReidError(f"{len(args.data_root)} --data_root but {len(args.protocol)} --protocol: give one for all or for each")
    roots, evaluations = len(args.data_root), len(args.data_root) * len(args.exp_name)
    if (roots > 1 and (args.load_index or args.save_index or args.spacetime)) or (
            evaluations > 1 and (args.gallery_uri or args.report)):
        raise ReidError("several --data_root have no one index and no common clocks for --spacetime, several evaluations no one "
                        "--gallery_uri or --report: evaluate them one by one")
    if set(args.protocol) & set(SPLITS) and (args.report or args.compare or args.single_shot):
        raise ReidError("--report, --compare and --single_shot are of one gallery, but --protocol viper and prid draw ten: use "
                        "--protocol market")
    if args.load_index and args.save_index:
        raise ReidError("--load_index and --save_index: give one of them; --save_index alone embeds only what has changed")
    extra = ("json", "load_index", "save_index", "gallery_uri", "multi_query", "rerank", "spacetime", "network")
    if args.compare and (unused := [f"--{name}" for name in extra if getattr(args, name)]):
        raise ReidError(f"--compare prints two runs from their saved indexes; leave out {', '.join(unused)}")
    if args.multi_query and args.spacetime:
        raise ReidError("--spacetime needs the time of each query, which --multi_query averages over: give one of them")
    if args.multi_query and "nocam" in args.protocol:
        raise ReidError("--multi_query averages the images of one camera, which --protocol nocam ignores: give one of them")
    uris = [uri for exp_name in args.exp_name if not is_milvus(uri := args.gallery_uri or default_uri(exp_name))]
    saved, loaded = (uris, []) if args.save_index else ([], uris)
    folders = [Path(root, split) for root in args.data_root for split in ("gallery", "query", "train")]
    check_outputs([("json", args.json, RESULTS), ("report", args.report, REPORT),
                   *(("gallery_uri", uri, FORMAT) for uri in saved)], [*folders, *loaded], args.overwrite)
    for uri in saved:
        check_replaceable(uri, args.data_root[0], queries=True, overwrite=args.overwrite)


def evaluate(args, checkpoint, record, index):
    """Evaluate one run on one dataset: print, save and draw what is asked for; return everything that was measured."""
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
        from reid.extras.network import make_extractor

        evidence = learn_spacetime(checkpoint.with_name("spacetime.pt"), args.data_root, scored,
                                   lambda: make_extractor(args, checkpoint))
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
        stored = index.camera_threshold if scored.normalised else index.threshold
        threshold = next(value for value in (args.threshold, stored, THRESHOLD) if value is not None)
        groups = evaluate_groups(group_index(scored, threshold), scored.pids)
    tracklets = evaluate_tracklets(scored, args.protocol) if args.tracklets else None
    if args.save_index:
        save_index(index, args.gallery_uri, args.exp_name, args.overwrite)
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


def build_index(args, checkpoint, rank, world_size):
    """Embed gallery and queries of the dataset; with --save_index only what is new or has changed since."""
    from reid.extras.network import make_extractor

    images, queries = read_split(args.data_root, "gallery"), read_split(args.data_root, "query")
    if args.protocol in SPLITS:
        next(random_splits(args.protocol, queries.pids, images.pids))  # too few people: refused before they are embedded
    extractor = make_extractor(args, checkpoint)
    old = None
    if args.save_index and not is_milvus(args.gallery_uri):
        old = GalleryIndex.reusable(args.gallery_uri, extractor, args.data_root)
    accounts = [images.account(f"{args.data_root}/gallery", args.strict), queries.account(f"{args.data_root}/query", args.strict)]
    if rank == 0:
        print(extractor.describe(), *accounts, sep="\n", flush=True)
    options = {"strict": args.strict, "rank": rank, "world_size": world_size, "progress": rank == 0}
    index = GalleryIndex.build(extractor, images, old=old, **options)
    index.queries = GalleryIndex.build(extractor, queries, old=None if old is None else old.queries, **options)
    if rank == 0 and old is not None:
        print(f"{args.gallery_uri}: gallery {index.update(old)}"
              + (f"; queries {index.queries.update(old.queries)}" if old.queries is not None else ""))
    if rank == 0 and not (len(index) and len(index.queries)):
        raise ReidError(f"{args.data_root}: not one image of its {'gallery' if not len(index) else 'query'} could be read")
    return index


def load_index(args, uri, wanted):
    """Read the saved index with its queries; raises ReidError where weights, dataset, images or settings differ."""
    if is_milvus(uri):
        from reid.extras import milvus

        index = milvus.load_index(uri, args.exp_name, wanted)
    else:
        index = GalleryIndex.load(uri, wanted, partial(save_command, args))
    if index.queries is None:
        raise ReidError(f"{uri}: has a gallery but no queries; make them: {save_command(args, index)}")
    check_current(index, uri, args.data_root, args)
    args.mirror, index.device = index.mirror, distributed.device or pick_device(args.device)
    return index


def save_index(index, uri, exp_name, overwrite=False):
    """Keep an index with its queries and its threshold."""
    if is_milvus(uri):
        from reid.extras import milvus

        with changing(uri):
            milvus.save_index(index, uri, exp_name)
    else:
        index.save_built(uri, overwrite)
    print(f"index saved: {uri}")


def saved_run(name, args):
    """(name, index, EvalResult) of a run, or of a --network by its name, whose index was saved with its queries."""
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
