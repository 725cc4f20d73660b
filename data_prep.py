"""Prepare a dataset: a tree {train,val,query,gallery}/<pid>/<name> that train.py and eval.py read.

    python data_prep.py                         download Market-1501 and group it
    python data_prep.py --archive FILE          the same from a local .zip, .tar, .tar.gz, .tar.xz or unpacked folder
    python data_prep.py --from FOLDER           your own images, one folder per identity
    python data_prep.py --synthetic             draw people, no download

It can be killed and run again at any moment; what is complete is left as it is.
"""

import argparse
import hashlib
import os
from pathlib import Path

from reid import ReidError
from reid.cli import HelpFormatter, check_ranges, run
from reid.data import prepare, sources, synthetic
from reid.data.download import download, without_password


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--archive", metavar="PATH", help="archive or folder with bounding_box_train, query and "
                        "bounding_box_test at any depth, instead of a download")
    source.add_argument("--url", default=prepare.MARKET_URL, help="address of such an archive")
    source.add_argument("--from", dest="folder", metavar="DIR", help="tree with one folder of images per identity")
    source.add_argument("--synthetic", action="store_true", help="draw people instead of reading images of real ones")
    parser.add_argument("--output", "--data_root", metavar="DIR", help="the tree to make (default: "
                        "data/market-1501-grouped; data/synthetic with --synthetic)")
    parser.add_argument("--any_counts", action="store_true", help="accept an archive that has not the image counts of "
                        "Market-1501: another dataset of its layout")
    parser.add_argument("--train_share", type=float, default=0.5, help="share of identities that --from trains on")
    parser.add_argument("--times", metavar="CSV", help="for --from: camera and time of every image, in the columns path, camera, "
                        "time (seconds or ISO 8601); then the file names tell them, for --spacetime")
    parser.add_argument("--num_ids", type=int, default=70, help="identities that --synthetic draws")
    parser.add_argument("--seed", type=int, default=0, help="of --synthetic: another seed, other people")
    return parser


def main(args):
    check_ranges(args, {"train_share": (0, 1), "num_ids": (1, 1 << 20), "seed": (0, 1 << 40)})
    output = Path(args.output or f"data/{'synthetic' if args.synthetic else 'market-1501-grouped'}")
    counts = None
    if args.times and not args.folder:
        raise ReidError("--times goes with --from: other sources have camera and time in their names")
    if args.synthetic:
        source = f"synthetic people (--num_ids {args.num_ids} --seed {args.seed})"
    elif args.folder:
        source = f"images of {os.path.realpath(args.folder)} (--train_share {args.train_share:g})"
        source += f", times of {os.path.realpath(args.times)}" if args.times else ""
    elif args.any_counts:
        source = os.path.realpath(args.archive) if args.archive else without_password(args.url)
    else:
        source, counts = "Market-1501", prepare.MARKET_COUNTS

    if prepare.finished(output, source):
        print(f"{output}: is complete already")
    else:
        build(args, output, source, counts)
    print(prepare.table(output))


def build(args, output, source, counts):
    archive = args.archive
    if not (archive or args.folder or args.synthetic):
        archive = output.parent / f"download-{hashlib.sha256(args.url.encode()).hexdigest()[:8]}"
        download(args.url, archive)
    with prepare.building(output) as tree:
        if args.synthetic:
            images = synthetic.dataset(args.num_ids, args.seed)
        elif args.folder:
            print(sources.TREE_RULE.format(share=args.train_share))
            images = sources.from_tree(args.folder, args.train_share, args.times)
        else:
            images = sources.from_archive(archive)
        try:
            prepare.fill(tree, images, source, counts)
        except ReidError:
            if archive != args.archive:  # a bad download would fail again in every run
                archive.unlink(missing_ok=True)
            raise
    print(f"{output}: complete")
    if archive != args.archive:
        print(f"{archive}: no longer needed")


if __name__ == "__main__":
    run(get_args_parser(), main)
