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
from reid.cli import HelpFormatter, check_network, check_ranges, left_out_status, printable, run
from reid.data import synthetic
from reid.data.datasets import list_images, read_folder, read_split
from reid.data.names import UNKNOWN, read_file
from reid.files import PICTURE, RESULTS, check_outputs, write_json
from reid.retrieval import enrol, tracklets
from reid.retrieval.extract import add_arguments
from reid.retrieval.group import THRESHOLD
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import Query, rerank_lists, weigh_lists
from reid.retrieval.spacetime import SpaceTime
from reid.retrieval.stored import FORMAT, check_current, check_replaceable, default_uri, is_milvus, save_command

DATA_ROOT = "data/market-1501-grouped"
CHANGES = ("add", "rename", "remove", "older_than", "list")
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
    add("--remove", metavar="NAME|PATH", help="erase a person, an image or the images below a folder from the index")
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
    from reid.extras import network

    check_arguments(args)
    checkpoint = Path("index", args.exp_name, "network") if args.network else checkpoint_path(args.exp_name)
    if args.export:
        return export(args, checkpoint)
    if any(getattr(args, option) for option in CHANGES):
        return change_gallery(args, checkpoint)
    if args.serve:
        from reid.extras import server

        token = os.environ.get("REID_TOKEN")
        listener = server.listen(args.host, args.port, token)  # a taken port is an error before the gallery is embedded
    rank, world_size = distributed.start(args.device)  # torchrun: every rank embeds its part
    extractor = network.make_extractor(args, checkpoint)
    index = load_gallery(args, extractor) if args.load_index else None
    args.data_root = args.data_root or (index.data_root if index is not None else DATA_ROOT)
    if args.group:
        index = index or build_gallery(args, extractor, rank, world_size)
        if rank == 0:
            from reid.extras.people import write_people

            index = index if isinstance(index, GalleryIndex) else index.download()
            print(printable(write_people(args.group, index, args.threshold, args.camera_norm is not False)))
        return 0 if rank else left_out_status(index.bad)
    query_files = [] if args.serve else find_queries(args)
    file = None if is_milvus(args.gallery_uri) else args.gallery_uri
    outputs = [("output", args.output, PICTURE), ("json", args.json, RESULTS), ("gallery_uri", args.save_index and file, FORMAT)]
    check_outputs(outputs, [*query_files, args.gallery or Path(args.data_root, "gallery"), args.load_index and file],
                  args.overwrite)
    embeddings, kept, bad = extractor.embed_records(query_files, strict=args.strict, progress=False)
    if bad and not len(kept):  # before the gallery is embedded
        file, reason = bad[0]
        raise ReidError(f"none of the queries could be read ({file}: {reason}); give images such as JPEG or PNG")
    if index is None:
        index = build_gallery(args, extractor, rank, world_size)
    index = prepare(args, index)
    if args.camera_norm and rank == 0 and not index.normalised:
        print(f"--camera_norm: has no effect {'in Milvus' if is_milvus(args.gallery_uri) else 'on a gallery without cameras'}")
    ranks = {"rank": rank, "world_size": world_size} if isinstance(index, GalleryIndex) and not args.serve else {}
    if rank and not ranks:
        return distributed.stop()
    if rank == 0:
        print(f"{extractor.describe()}; {len(index):,} images in the gallery"
              f"{', camera statistics taken out' * index.normalised}", flush=True)
    if args.serve:
        from reid.extras.page import create_app
        from reid.extras.writer import Writer

        file = args.gallery_uri if args.load_index and isinstance(index, GalleryIndex) else None
        writable = args.writable and partial(
            Writer, args.gallery_uri, partial(open_gallery, args, extractor), partial(prepare, args))
        hosts = [args.host, *args.allowed_hosts]
        return server.serve(create_app(extractor, index, hosts, file, token=token, writable=writable), listener)

    evidence = SpaceTime.load(checkpoint.with_name("spacetime.pt"), index.space, args.data_root) if args.spacetime else None
    queries = [Query(query_files[i], *read_file(query_files[i], args.data_root)) for i in kept.tolist()]
    if evidence and queries and all(UNKNOWN in (query.camid, query.frame) for query in queries):
        raise ReidError("--spacetime: no query's name gives camera and time, as 0007_c2s1_000451_03.jpg does; leave it out")
    embeddings = index.normalise(embeddings, torch.tensor([query.camid for query in queries]))
    if args.tracklets:
        queries, embeddings = tracklets.pool_queries(queries, embeddings)
    topk = max(args.topk, CANDIDATES) if args.rerank or args.spacetime else args.topk
    topk = max(1, min(topk, len(index)))
    lists = index.search(embeddings, topk, camids=args.cameras, frames=args.frames, queries=queries, **ranks)
    if rank:
        return distributed.stop()
    if lists and not any(map(len, lists)):
        raise ReidError("no gallery image fits --cameras and --frames; the gallery's names may hold neither")
    if args.rerank:
        lists = rerank_lists(lists, embeddings, args.topk, evidence)
    elif args.spacetime:
        lists = weigh_lists(lists, evidence, args.topk)
    write_results(args, index, lists)
    distributed.stop()
    return left_out_status(index.bad + bad)


def check_arguments(args):
    """Raise ReidError for arguments that cannot work, before any work is done; give --gallery_uri its default."""
    check_ranges(args, {"topk": (1, 1 << 40), "positions": (1, 1 << 40), "cameras": (-1, 1 << 40), "batch_size": (1, 1 << 16),
                        "frames": (-1, 1 << 62), "older_than": (1e-6, 1e6), "threshold": (-1, 1), "port": (0, 65535)})
    for option, value in vars(args).items():
        if any(isinstance(text, str) and not text.strip() for text in (value if isinstance(value, list) else [value])):
            raise ReidError(f"--{option}: has an empty value; is a shell variable unset? Give a value, or leave the option out")
    check_network(args)
    if args.network and args.export:
        raise ReidError("--export: writes the network of a run; leave out --network")
    for option, other in (("positions", "output"), ("onnx_input", "export"), ("name", "add"), ("threshold", "group"),
                          ("writable", "serve"), ("writable", "load_index")):
        if getattr(args, option) is not None and not getattr(args, other):
            raise ReidError(f"--{option}: is of --{other}; give both")
    replaced = ("query_paths", "serve", "export", "output", "json", "rerank", "spacetime", *CHANGES)
    for option in ("group", *CHANGES):
        given = [f"--{other}" for other in replaced if other != option and getattr(args, option) and getattr(args, other)]
        if given:
            raise ReidError(f"--{option} and {given[0]}: give one of them")
    if args.group:
        from reid.extras.people import check_folder

        check_folder(args.group, args.gallery or Path(args.data_root or DATA_ROOT, "gallery"))
    if args.positions and min(args.positions) > args.topk:
        raise ReidError(f"--positions {min(args.positions)}: beyond --topk {args.topk}, so nothing would be drawn")
    if (args.serve or args.export) and not (args.output is args.json is None):
        raise ReidError("--output and --json are of ranked lists, which --serve and --export do not make: leave them out")
    if args.frames and args.frames[0] > args.frames[1]:
        raise ReidError(f"--frames {args.frames[0]} {args.frames[1]}: give the first frame, then the last one")
    uri = args.gallery_uri = args.gallery_uri or default_uri(args.exp_name, args.gallery)
    if args.gallery and not (args.data_root or args.query_paths or args.save_index or args.serve or args.group):
        raise ReidError("--gallery: give --query_paths, the images to look for, or --save_index, to keep the gallery only")
    if args.gallery and args.spacetime and not args.data_root:
        raise ReidError("--spacetime: learned on a dataset by eval.py; give its --data_root beside --gallery")
    if args.load_index and args.save_index:
        raise ReidError("--load_index and --save_index: give one of them; --save_index alone embeds only what has changed")
    if args.index_type != "FLAT" and not (args.save_index and is_milvus(uri)):
        raise ReidError(f"--index_type {args.index_type}: of a gallery kept in Milvus; give --save_index and --gallery_uri")
    if args.save_index and not is_milvus(uri):
        check_replaceable(uri, args.gallery or args.data_root or DATA_ROOT, queries=False, overwrite=args.overwrite)


def change_gallery(args, checkpoint):
    """Enrol, rename, erase or list the people of an index, and print what changed."""
    from reid.extras import network

    extractor, new, bad = None, None, []
    if args.list:
        return print(enrol.table(open_gallery(args, extractor)))
    if args.add:
        records, extractor = read_folder(args.add), network.make_extractor(args, checkpoint)
        print(records.account(args.add, args.strict))
        extractor.mirror = open_gallery(args, extractor).mirror
        new = GalleryIndex.build(extractor, records, args.strict)
        if not len(new):
            raise ReidError(f"{args.add}: not one image could be read")
        bad = new.bad
    with enrol.changing(args.gallery_uri, partial(open_gallery, args, extractor)) as gallery:
        if args.add:
            text = enrol.enrol(gallery, new, args.name)
        elif args.rename:
            text = enrol.rename(gallery, *args.rename)
        else:
            text = enrol.erase(gallery, args.remove, args.older_than) + "; the image files are not deleted"
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
    """The query files of --query_paths; a path without images raises ReidError."""
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


def open_gallery(args, extractor):
    """Open the saved gallery, for --add an empty one where there is none; raises ReidError where it was made of other weights."""
    uri, run = args.gallery_uri, args.exp_name
    if is_milvus(uri):
        from reid.extras import milvus

        if args.add and not milvus.exists(uri, run):
            return milvus.create_gallery(uri, run, extractor.fingerprint, extractor.mirror, extractor.dim, "")
        return milvus.open_gallery(uri, run, extractor)
    if args.add and not Path(uri).exists():
        return GalleryIndex.empty(extractor)
    return GalleryIndex.load(uri, extractor, partial(save_command, args))


def load_gallery(args, extractor):
    """Open the saved gallery; raises ReidError where it was made of other weights, of another folder, or of other images."""
    index = open_gallery(args, extractor)
    check_current(index, args.gallery_uri, args.gallery or args.data_root or index.data_root, args)
    if args.mirror is None:
        extractor.mirror = index.mirror
    return index


def prepare(args, index):
    """Return what is searched of a stored gallery: without camera statistics, with the means of tracklets."""
    if args.camera_norm is not False and isinstance(index, GalleryIndex):
        index = index.camera_normalised()
    if args.tracklets and not isinstance(index, GalleryIndex):
        raise ReidError("--tracklets: not of a gallery in Milvus, whose entries are single images")
    return tracklets.pool(index) if args.tracklets else index


def build_gallery(args, extractor, rank, world_size):
    """Embed the gallery; with --save_index it is kept, in Milvus without ever being in memory as a whole.

    Of a gallery that is kept already only what is new or has changed is embedded.
    """
    records = read_folder(args.gallery) if args.gallery else read_split(args.data_root, "gallery")
    account, uri = records.account(args.gallery or f"{args.data_root}/gallery", args.strict), args.gallery_uri
    if rank == 0:
        print(account)
    old = None
    if args.save_index and is_milvus(uri):
        from reid.extras import milvus

        index = milvus.build_gallery(uri, args.exp_name, extractor, records, args.index_type, args.strict)
    else:
        old = GalleryIndex.reusable(uri, extractor, records.root) if args.save_index else None
        index = GalleryIndex.build(extractor, records, args.strict, rank=rank, world_size=world_size, old=old)
    if rank == 0 and not len(index):
        raise ReidError(f"{args.gallery or args.data_root}: not one image of the gallery could be read")
    if rank == 0 and args.save_index:
        what = f" ({index.update(old)})" if old is not None else ""
        if isinstance(index, GalleryIndex):
            index.save_built(uri, args.overwrite)
        print(f"index saved: {uri}{what}")
        if args.index_type != "FLAT":
            recall, compared = index.recall()
            print(f"{args.index_type}: recall@10 {100 * recall:.1f} % against exact search over {compared:,} images")
    return index


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
