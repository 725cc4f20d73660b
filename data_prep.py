"""Prepare a dataset: a tree {train,val,query,gallery}/<pid>/<name> that train.py and eval.py read.

    python data_prep.py                         download Market-1501 and group it
    python data_prep.py --archive FILE          group a local .zip, .tar, .tar.gz, .tar.xz or unpacked folder
    python data_prep.py --from FOLDER           split your own images, one folder per identity
    python data_prep.py --synthetic             draw people, no download

A run that was killed can be repeated; a tree that is complete is left as it is.
"""

import argparse
import hashlib
import os
from pathlib import Path

from reid import ReidError
from reid.cli import HelpFormatter, check_ranges, printable, run, without_secrets
from reid.data import archives, prepare, synthetic


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("source (one of these)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--url", default=prepare.MARKET_URL, help="address of an archive with the folders "
                        "bounding_box_train, query and bounding_box_test at any depth")
    source.add_argument("--archive", metavar="PATH", help="such an archive, or a folder, on this machine")
    source.add_argument("--from", dest="folder", metavar="DIR", help="tree with one folder of images per identity")
    source.add_argument("--synthetic", action="store_true", help="draw people instead of reading images of real ones")
    group.add_argument("--any_counts", action="store_true", help="accept another dataset of Market-1501's layout: do not "
                       "compare the numbers of images with those of Market-1501")
    output = parser.add_argument_group("output")
    output.add_argument("--output", "--data_root", metavar="DIR", help="the tree to make (default: "
                        "data/market-1501-grouped; data/synthetic with --synthetic)")
    own = parser.add_argument_group("own images, for --from")
    own.add_argument("--train_share", type=float, default=0.5, help="share of the identities to train on")
    own.add_argument("--times", metavar="CSV", help="camera and time of every image, in the columns path, camera, time "
                     "(seconds or ISO 8601); they become part of the file names, where --spacetime reads them")
    drawn = parser.add_argument_group("drawn people, for --synthetic")
    drawn.add_argument("--num_ids", type=int, default=70, help="number of identities")
    drawn.add_argument("--seed", type=int, default=0, help="another seed draws other people")
    return parser


def main(args):
    check_ranges(args, {"train_share": (0, 1), "num_ids": (1, 1 << 20), "seed": (0, 1 << 40)})
    output = Path(args.output or f"data/{'synthetic' if args.synthetic else 'market-1501-grouped'}")
    if args.times and not args.folder:
        raise ReidError("--times needs --from: other sources have camera and time in their file names")
    source = describe_source(args)
    if prepare.finished(output, source):
        print(printable(f"{output}: is complete already"))
    else:
        build(args, output, source)
    print(prepare.table(output))


def describe_source(args):
    """Return what the tree is made from, which is kept in it: a later run of the same source has nothing to do."""
    if args.synthetic:
        return f"synthetic people (--num_ids {args.num_ids} --seed {args.seed})"
    if args.folder:
        times = f", times of {os.path.realpath(args.times)}" if args.times else ""
        return f"images of {os.path.realpath(args.folder)} (--train_share {args.train_share:g}){times}"
    if not args.any_counts:
        return prepare.MARKET
    if args.archive:
        return os.path.realpath(args.archive)
    shown = without_secrets(args.url)
    return shown if shown == args.url else f"{shown} ({download_name(args.url)})"


def download_name(url):
    return f"download-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def build(args, output, source):
    """Make the tree. A downloaded archive that turns out to be bad is deleted, since it would fail in every later run."""
    downloaded = None
    if not (args.archive or args.folder or args.synthetic):
        downloaded = output.parent / download_name(args.url)
        archives.download(args.url, downloaded)
    with prepare.building(output) as tree:
        if args.synthetic:
            images = synthetic.dataset(args.num_ids, args.seed)
        elif args.folder:
            print(prepare.TREE_RULE.format(share=args.train_share))
            images = prepare.from_tree(args.folder, args.train_share, args.times)
        else:
            images = archives.from_archive(downloaded or args.archive)
        try:
            prepare.fill(tree, images, source, prepare.MARKET_COUNTS if source == prepare.MARKET else None)
        except ReidError:
            if downloaded:
                downloaded.unlink(missing_ok=True)
            raise
    print(printable(f"{output}: complete"))
    if downloaded:
        print(printable(f"{downloaded}: no longer needed"))


if __name__ == "__main__":
    run(get_args_parser(), main)
