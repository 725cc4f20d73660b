"""Find people: rank a gallery of person crops by similarity to query crops.

python inference.py --query_paths crop.jpg --topk 10
python inference.py --gallery my/crops --query_paths 'my/queries/*.png' --output ranking.png
"""

import argparse
import glob
import os
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from reid import ReidError, distributed
from reid.checkpoint import checkpoint_path
from reid.cli import HelpFormatter, left_out_status, printable, run
from reid.data import synthetic
from reid.data.datasets import list_images, read_folder, read_split
from reid.data.names import UNKNOWN, read_file
from reid.files import PICTURE, RESULTS, check_outputs, write_json
from reid.retrieval import enrol, tracklets
from reid.retrieval.arguments import CHANGES, DATA_ROOT, check_search
from reid.retrieval.extract import add_arguments
from reid.retrieval.group import THRESHOLD
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import Query, rerank_lists, weigh_lists
from reid.retrieval.spacetime import SpaceTime
from reid.retrieval.stored import FORMAT, is_milvus

STAYS = "the image files stay, and what --group has made of them until it runs again"  # of erased images
CANDIDATES = 200  # hits that re-ranking and camera + time reorder


def get_args_parser():
    parser = argparse.ArgumentParser("inference.py", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("run").add_argument
    add("--exp_name", default="masked-hog-908", help="run whose models/<run>/best.pth embeds")
    add("--query_paths", nargs="+", help="images, folders or globs (default: the first query of --data_root; with "
        "--save_index none)")
    add("--group", metavar="DIR", help="sort the gallery's crops into people instead: a folder of links for each in DIR; merge "
        "and rename them by hand before the next run (default: off)")
    add("--serve", action="store_true", help="open a search page and an HTTP API instead of printing ranked lists")
    add("--host", default="127.0.0.1", help="address of the search page; another than this machine's own 127.0.0.1 needs a "
        "secret in REID_TOKEN")
    add("--port", type=int, default=8000, help="port of the search page")
    add("--allowed_hosts", nargs="+", default=[], metavar="NAME", help="names of this machine that browsers may open the search "
        "page by, beside its IP addresses and localhost")
    add("--writable", action="store_true", default=None, help="of --serve with --load_index: let everyone who may ask enrol "
        "people in the index, and erase them")
    add("--export", choices=["onnx"], help="write models/<run>/best.onnx instead, checked against PyTorch (default: off)")
    add("--onnx_input", choices=["uint8", "float"], help="of the export: bytes (default), or for trackers float RGB, "
        "normalised, to models/<run>/best.float.onnx")
    add = parser.add_argument_group("gallery").add_argument
    add("--data_root", help=f"grouped dataset whose gallery/ is searched (default: that of the index, else {DATA_ROOT})")
    add("--gallery", metavar="DIR", help="search any folder of images instead (default: off)")
    add("--load_index", action="store_true", help="read the gallery from the index, embed only the queries; refused where images "
        "have changed since")
    add("--save_index", action="store_true", help="keep the gallery's embeddings in the index; one that is there already, of the "
        "same network, is brought up to date: only new and changed images are embedded")
    add("--gallery_uri", help="the index: a file, or Milvus as name.db or http://host:19530 (default: index/<run>.pt, "
        "of a --gallery index/<run>--<its folder>.pt)")
    add("--index_type", default="FLAT", help="of a Milvus gallery that is saved: FLAT is exact; HNSW and IVF_SQ8 "
        "search a part of it, and their recall is printed")
    add("--cameras", type=int, nargs="+", help="search these cameras only (default: all)")
    add("--frames", type=int, nargs=2, metavar=("FIRST", "LAST"), help="search these frame numbers only (default: all)")
    add = parser.add_argument_group("changes of the index, instead of a search").add_argument
    add("--add", metavar="DIR", help="enrol the images of a folder, also into an index that is not there yet")
    add("--name", help="of --add: the person whom they show (default: as their folders and names give it)")
    add("--rename", nargs=2, metavar=("OLD", "NEW"), help="give a person another name; one who has it already is the same person")
    add("--remove", metavar="NAME|PATH", help="erase a person, or an image or the images below a folder, whose path has a "
        "/ (./crops), from the index")
    add("--older_than", type=float, metavar="DAYS", help="erase the images whose files were modified longer ago")
    add("--list", action="store_true", help="print the people of the index")
    add = parser.add_argument_group("scoring").add_argument
    add("--topk", type=int, default=5, help="hits for each query")
    add("--camera_norm", action=argparse.BooleanOptionalAction, help="take each camera's mean and deviation in the gallery out "
        "of the embeddings (default: on where names give cameras; never in Milvus)")
    add("--tracklets", action="store_true", help="a tracklet is one query or one entry of the gallery, the mean of its images: "
        "those of one folder, camera and sequence, or with one track id in their names (track_7, t7)")
    add("--threshold", type=float, help="of --group: cosine that two crops of one person have (default: that of the index, "
        f"else {THRESHOLD:g})")
    add("--rerank", action="store_true", help=f"re-rank the best {CANDIDATES} (k-reciprocal encoding)")
    add("--spacetime", action="store_true", help="also weigh camera and time, as learned by eval.py --spacetime")
    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="PNG", help="draw the ranked lists; more queries than fit go on numbered sheets (default: off)")
    add("--positions", type=int, nargs="+", metavar="K", help="draw these positions only, such as 1 5 10 15 (default: all)")
    add("--json", metavar="PATH", help="write the ranked lists (default: not written)")
    add("--overwrite", action="store_true", help="replace files of other kinds, and indexes of other galleries, by these outputs")
    add_arguments(parser)
    return parser


def main(args):
    check_search(args)
    checkpoint = Path("index", args.exp_name, "network") if args.network else checkpoint_path(args.exp_name)
    if args.export:
        return export(args, checkpoint)
    if any(getattr(args, option) for option in CHANGES):
        return change_gallery(args, checkpoint)
    return (group if args.group else serve if args.serve else search)(args, checkpoint)


def search(args, checkpoint):
    """Rank the gallery for each query; print, draw and write the ranked lists. Under torchrun each rank embeds its part."""
    from reid.extras import galleries, network

    rank, world_size = distributed.start(args.device)
    extractor = network.make_extractor(args, checkpoint)
    index = galleries.load(args, extractor)
    files = find_queries(args)
    check_written(args, files)
    embeddings, kept, bad = extractor.embed_records(files, strict=args.strict, progress=False)
    if bad and not len(kept):  # before the gallery is embedded
        raise ReidError("none of the queries could be read ({}: {}); give images such as JPEG or PNG".format(*bad[0]))
    index = galleries.prepare(args, galleries.build(args, extractor) if index is None else index, extractor)
    if rank and not isinstance(index, GalleryIndex):
        return distributed.stop()

    evidence = SpaceTime.load(checkpoint.with_name("spacetime.pt"), index.space, args.data_root) if args.spacetime else None
    queries = [Query(files[i], *read_file(files[i], args.data_root)) for i in kept.tolist()]
    if evidence and queries and all(UNKNOWN in (query.camid, query.frame) for query in queries):
        raise ReidError("--spacetime: no query's name gives camera and time, as 0007_c2s1_000451_03.jpg does; leave it out")
    embeddings = index.normalise(embeddings, torch.tensor([query.camid for query in queries]))
    if args.tracklets:
        queries, embeddings = tracklets.pool_queries(queries, embeddings)
    topk = max(args.topk, CANDIDATES) if args.rerank or args.spacetime else args.topk
    ranks = {"rank": rank, "world_size": world_size} if isinstance(index, GalleryIndex) else {}
    lists = index.search(embeddings, max(1, min(topk, len(index))), camids=args.cameras, frames=args.frames, queries=queries,
                         **ranks)
    distributed.stop()
    if rank:
        return 0
    if lists and not any(map(len, lists)):
        raise ReidError("no gallery image fits --cameras and --frames; the gallery's names may hold neither")
    if args.rerank:
        lists = rerank_lists(lists, embeddings, args.topk, evidence)
    elif args.spacetime:
        lists = weigh_lists(lists, evidence, args.topk)
    write_results(args, index, lists)
    return left_out_status(index.bad + bad)


def serve(args, checkpoint):
    """Open the search page. A taken port is an error before the gallery is embedded."""
    from reid.extras import galleries, network, server
    from reid.extras.page import create_app
    from reid.extras.writer import Writer

    token = os.environ.get("REID_TOKEN")
    listener = server.listen(args.host, args.port, token)
    rank, _ = distributed.start(args.device)
    extractor = network.make_extractor(args, checkpoint)
    index = galleries.load(args, extractor)
    check_written(args)
    index = galleries.prepare(args, galleries.build(args, extractor) if index is None else index, extractor)
    if rank:
        return distributed.stop()
    file = args.gallery_uri if args.load_index and isinstance(index, GalleryIndex) else None
    writable = args.writable and partial(Writer, args.gallery_uri, partial(galleries.open_stored, args, extractor),
                                         partial(galleries.prepare, args))
    app = create_app(extractor, index, [args.host, *args.allowed_hosts], file, token=token, writable=writable)
    return server.serve(app, listener)


def group(args, checkpoint):
    """Sort the crops of the gallery into people."""
    from reid.extras import galleries, network, people

    people.check_folder(args.group, args.gallery or Path(args.data_root or DATA_ROOT, "gallery"))
    rank, _ = distributed.start(args.device)
    extractor = network.make_extractor(args, checkpoint)
    index = galleries.load(args, extractor)
    index = galleries.build(args, extractor) if index is None else index
    distributed.stop()
    if rank:
        return 0
    index = index if isinstance(index, GalleryIndex) else index.download()
    print(printable(people.write_people(args.group, index, args.threshold, args.camera_norm is not False)))
    return left_out_status(index.bad)


def change_gallery(args, checkpoint):
    """Enrol, rename, erase or list the people of an index, and print what changed."""
    from reid.extras import galleries, network

    extractor, new, bad = None, None, []
    if args.list:
        return print(enrol.table(galleries.open_stored(args, extractor)))
    if args.add:
        records, extractor = read_folder(args.add), network.make_extractor(args, checkpoint)
        print(records.account(args.add, args.strict))
        extractor.mirror = galleries.open_stored(args, extractor).mirror
        new = GalleryIndex.build(extractor, records, args.strict)
        if not len(new):
            raise ReidError(f"{args.add}: not one image could be read")
        bad = new.bad
    with enrol.changing(args.gallery_uri, partial(galleries.open_stored, args, extractor)) as gallery:
        if args.add:
            text = enrol.enrol(gallery, new, args.name)
        elif args.rename:
            text = enrol.rename(gallery, *args.rename)
        else:
            text = enrol.erase(gallery, args.remove, args.older_than) + f"; {STAYS}"
    print(printable(f"{args.gallery_uri}: {text}"))
    return left_out_status(bad)


def export(args, checkpoint):
    """Write best.onnx beside the checkpoint, after comparing its output with PyTorch's on the query images, or drawn ones."""
    from reid.extras.onnx import export_onnx

    output = checkpoint.with_suffix(".float.onnx" if args.onnx_input == "float" else ".onnx")
    images = find_queries(args)[:64] if args.query_paths else [content for *_, content in islice(synthetic.dataset(4, 0), 8)]
    lowest = export_onnx(checkpoint, output, images, args.mirror is not False, args.onnx_input or "uint8", args.overwrite)
    print(f"{output}: written; lowest cosine to PyTorch {lowest:.6f}")


def find_queries(args):
    """Return the query files of --query_paths; a path without images raises ReidError."""
    if not args.query_paths:
        return [] if args.save_index else read_split(args.data_root or DATA_ROOT, "query").files()[:1]
    found = []
    for path in args.query_paths:
        if Path(path).is_dir():
            names = [Path(path) / name for name in list_images(path)]
        else:  # a quoted pattern is expanded here; a file may also be called "a[1].jpg"
            names = [Path(path)] if Path(path).exists() else [Path(name) for name in sorted(glob.glob(path, recursive=True))]
        if not names:
            raise ReidError(f"--query_paths {path}: {'no images in this folder' if Path(path).is_dir() else 'no such image'}")
        found += names
    return found


def check_written(args, queries=()):
    """Raise ReidError where an output would replace what is read, or another kind of file."""
    file = None if is_milvus(args.gallery_uri) else args.gallery_uri
    outputs = [("output", args.output, PICTURE), ("json", args.json, RESULTS), ("gallery_uri", args.save_index and file, FORMAT)]
    read = [*queries, args.gallery or Path(args.data_root, "gallery"), args.load_index and file]
    check_outputs(outputs, read, args.overwrite)


def write_results(args, index, lists):
    """Print the ranked lists; draw them (--output) and write them (--json) if asked for."""
    for ranked in lists:
        print(f"\nquery {printable(ranked.query.file)}")
        for hit in ranked:
            verdict = {None: "", True: "  match", False: "  no match"}[hit.match]
            who = f"{hit.name}  " if hit.name not in hit.path else ""  # most paths hold the name
            print(f"{hit.position:>4}  {hit.score:.4f}  {printable((who + hit.path).rstrip())}{verdict}")
        if ranked.threshold is not None and not any(hit.match for hit in ranked):
            print(f"      new person: no score above {ranked.threshold:.4f}")
    if args.output:
        from reid.extras.pictures import draw_ranking

        print(f"pictures written: {', '.join(map(str, draw_ranking(args.output, lists, args.positions, args.overwrite)))}")
    if args.json:
        document = {"exp_name": args.exp_name, "fingerprint": index.fingerprint,
                    "threshold": lists[0].threshold if lists else None, "rankings": [ranked.to_dict() for ranked in lists]}
        write_json(args.json, document, args.overwrite)


if __name__ == "__main__":
    run(get_args_parser(), main)
