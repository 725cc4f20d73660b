"""Prepare a dataset: a tree {train,val,query,gallery}/<pid>/<name> that train.py and eval.py read.

    python data_prep.py                         download Market-1501 and group it
    python data_prep.py --archive FILE          group a local .zip, .tar, .tar.gz, .tar.xz or unpacked folder
    python data_prep.py --from FOLDER           copy and split your own images, one folder per identity
    python data_prep.py --synthetic             draw people, no download
    python data_prep.py --mot FILE --frames CLIP cut a tracker's boxes out of a video: a folder of crops for each track

A run that was killed can be repeated; a tree that is complete is left as it is.
"""

import argparse
import hashlib
import os
from collections import defaultdict
from pathlib import Path

from reid import ReidError
from reid.cli import HelpFormatter, check_ranges, printable, run, without_secrets
from reid.data import archives, mot, own, prepare, synthetic
from reid.data.datasets import account

MARKET_TREE = "market-1501-grouped"


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("source (one of these)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--url", default=prepare.MARKET_URL, help="address of an archive with the folders "
                        "bounding_box_train, query and bounding_box_test at any depth")
    source.add_argument("--archive", metavar="PATH", help="such an archive, or a folder, on this machine")
    source.add_argument("--from", dest="folder", metavar="DIR", help="tree with one folder of images per identity")
    source.add_argument("--synthetic", action="store_true", help="draw people instead of reading images of real ones")
    source.add_argument("--mot", metavar="TXT", help="boxes of a tracker: lines of frame, track id, left, top, width, height")
    group.add_argument("--frames", metavar="VIDEO|DIR", help="of --mot: the video, or a folder of its frames, whose names end in "
                       "their numbers; a name like cam2.mp4 or cam2 gives the camera, else it is 1")
    group.add_argument("--any_counts", action="store_true", help="accept another dataset of Market-1501's layout: do not "
                       "compare the numbers of images with those of Market-1501")
    output = parser.add_argument_group("output")
    output.add_argument("--output", "--data_root", metavar="DIR", help="the tree to make (default: "
                        "data/market-1501-grouped; data/<folder> with --from; data/synthetic with --synthetic; "
                        "<frames>-tracks with --mot)")
    output.add_argument("--link", action="store_true", help="make hard links to the images of --from or of a folder, which then "
                        "change with them, instead of copies")
    output.add_argument("--strict", action="store_true", help="fail where a file is left out, except hidden ones")
    own = parser.add_argument_group("own images, for --from")
    own.add_argument("--train_share", type=float, default=0.5, help="share of the identities to train on")
    own.add_argument("--times", metavar="CSV", help="camera and time of every image, in the columns path, camera, time "
                     "(seconds or ISO 8601); they become part of the file names, where --spacetime reads them")
    own.add_argument("--identity", metavar="REGEX", help="regular expression for the identity in the path of an image: its first "
                     "group, or all of it (default: the first folder that is not named like a camera)")
    own.add_argument("--camera", metavar="REGEX", help="regular expression for the camera in the path of an image: its first "
                     "group, or all of it, as a number or a text (default: names like those of known datasets, and cam2, c2)")
    drawn = parser.add_argument_group("drawn people, for --synthetic")
    drawn.add_argument("--num_ids", type=int, default=70, help="number of identities")
    drawn.add_argument("--seed", type=int, default=0, help="another seed draws other people")
    return parser


def main(args):
    check_ranges(args, {"train_share": (0, 1), "num_ids": (4, 1 << 20), "seed": (0, 1 << 40)})
    for option in ("times", "camera", "identity"):
        if getattr(args, option) and not args.folder:
            raise ReidError(f"--{option} needs --from: other sources have them in their file names")
    for path in filter(None, (args.archive, args.times, args.mot, args.frames)):
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise ReidError(f"{path}: is neither a file nor a folder; a pipe or a device may never end")
    if args.times and args.camera:
        raise ReidError("--times has the camera of every image: leave --camera out")
    if bool(args.mot) != bool(args.frames):
        raise ReidError("--mot needs --frames, its images" if args.mot else "--frames needs --mot, the boxes of a tracker")
    if args.mot:
        return build_tracks(args)
    output = choose_output(args)
    source = describe_source(args)
    files = [path for path in (args.folder, args.times, args.archive) if path] if source != prepare.MARKET else []
    state = prepare.source_state(*files) if files else None
    if prepare.finished(output, source, state):
        print(printable(f"{output}: is complete already"))
    else:
        build(args, output, source, state)
    print(prepare.table(output))


def build_tracks(args):
    """Make the folder of --mot: crops in a folder for each track, a gallery for inference.py."""
    output, left_out, tracks = Path(args.output or f"{args.frames.rstrip('/')}-tracks"), defaultdict(list), defaultdict(int)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ReidError(f"{output}: exists; choose another --output, or remove it")
    with prepare.building(output) as tree:
        for folder, name, content in mot.cut_tracks(args.mot, args.frames, left_out):
            (tree / folder).mkdir(exist_ok=True)
            (tree / folder / name).write_bytes(content)
            tracks[folder] += 1
        if not tracks:
            raise ReidError(f"{args.mot}: not one box could be cut out of {args.frames}")
        print(account(args.mot, sum(tracks.values()), left_out, args.strict))
    print(printable(f"{output}: complete, {len(tracks):,} tracks of {min(tracks.values()):,} to {max(tracks.values()):,} crops"))


def choose_output(args):
    """Return the tree to make, which must not lie in the tree that is read."""
    folder = args.folder and os.path.realpath(args.folder)
    name = "synthetic" if args.synthetic else os.path.basename(folder) if folder else MARKET_TREE
    output = Path(args.output or f"data/{name}")
    if folder and not args.output and name in (MARKET_TREE, "synthetic", ""):
        raise ReidError(f"--from {args.folder}: give --output; data/{name} is the name of another dataset")
    if folder and Path(folder) in (Path(os.path.realpath(output)), *Path(os.path.realpath(output)).parents):
        raise ReidError(f"--output {output}: lies in the tree of --from; choose another --output")
    return output


def describe_source(args):
    """Return what the tree is made from, which is kept in it: a later run of the same source has nothing to do."""
    if args.synthetic:
        return f"synthetic people (--num_ids {args.num_ids} --seed {args.seed})"
    if args.folder:
        more = f", times of {os.path.realpath(args.times)}" if args.times else ""
        more += "".join(f" --{name} {getattr(args, name)}" for name in ("identity", "camera") if getattr(args, name))
        return f"images of {os.path.realpath(args.folder)} (--train_share {args.train_share:g}){more}"
    if not args.any_counts:
        return prepare.MARKET
    if args.archive:
        return os.path.realpath(args.archive)
    shown = without_secrets(args.url)
    return shown if shown == args.url else f"{shown} ({download_name(args.url)})"


def download_name(url):
    return f"download-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def build(args, output, source, state):
    """Make the tree. A downloaded archive that turns out to be bad is deleted, since it would fail in every later run."""
    downloaded = None
    if not (args.archive or args.folder or args.synthetic):
        downloaded = output.parent / download_name(args.url)
        archives.download(args.url, downloaded)
    left_out = defaultdict(list)
    with prepare.building(output) as tree:
        if args.synthetic:
            images = synthetic.dataset(args.num_ids, args.seed)
        elif args.folder:
            print(own.TREE_RULE.format(share=args.train_share))
            images = own.from_tree(args.folder, args.train_share, args.times, args.camera, left_out, args.identity)
        else:
            images = archives.from_archive(downloaded or args.archive, left_out)
        try:
            counts = prepare.MARKET_COUNTS if source == prepare.MARKET else None
            taken = prepare.fill(tree, images, source, counts, state, left_out, args.link)
        except ReidError:
            if downloaded:
                downloaded.unlink(missing_ok=True)
            raise
        lines = [account(args.folder or args.archive or source, taken, left_out, args.strict), prepare.copies(tree)]
        print(*filter(None, lines), sep="\n")
    print(printable(f"{output}: complete"))
    if downloaded:
        print(printable(f"{downloaded}: no longer needed"))


if __name__ == "__main__":
    run(get_args_parser(), main)
