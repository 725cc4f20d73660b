"""Find people: rank a gallery of crops by their likeness to query crops.

python inference.py --query_paths crop.jpg --topk 10
python inference.py --gallery my/crops --query_paths 'my/queries/*.png' --output ranking.png
"""

import argparse
import glob
import json
import sys
from pathlib import Path

import torch

from reid import ReidError, distributed
from reid.checkpoint import checkpoint_path, load_spacetime
from reid.cli import HelpFormatter, check_ranges, run
from reid.data.datasets import UNKNOWN, UNKNOWN_PID, Name, folder_pid, list_images, parse_name, read_folder, read_split
from reid.extras import pictures as viz
from reid.extras.milvus_client import INDEXES
from reid.files import atomic_path
from reid.retrieval import extract, rerank
from reid.retrieval.gallery import build_gallery, open_gallery
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import Query, RankedList

CANDIDATES = 200  # rows of the gallery that re-ranking looks at


def get_args_parser():
    parser = argparse.ArgumentParser("inference.py", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--query_paths", nargs="+", help="images, folders or globs; default: the first query of --data_root")
    add("--topk", type=int, default=5, help="results for each query")
    add("--exp_name", default="masked-hog-908", help="run whose models/<run>/best.pth embeds")
    # the gallery
    add("--data_root", default="data/market-1501-grouped", help="grouped dataset whose gallery/ is searched")
    add("--gallery", metavar="DIR", help="search any folder of images instead")
    add("--load_index", action="store_true", help="take the gallery from the index, embed only the queries")
    add("--save_index", action="store_true", help="keep the gallery's embeddings in the index")
    add("--gallery_uri", help="the index: a file (default: index/<run>.pt), or Milvus as name.db or http://host:19530")
    add("--index_type", choices=list(INDEXES), default="FLAT", help="of a Milvus gallery; others than FLAT search only a part "
        "of it: their recall is printed")
    add("--cameras", type=int, nargs="+", help="search these cameras only")
    add("--frames", type=int, nargs=2, metavar=("FIRST", "LAST"), help="search images with these frame numbers only")
    add("--rerank", action="store_true", help=f"re-rank the best {CANDIDATES} (k-reciprocal encoding)")
    add("--spacetime", action="store_true", help="also weigh camera and time, as learnt by eval.py --spacetime")
    # what comes out
    add("--output", metavar="PNG", help="draw the ranked lists; more queries than fit go on numbered sheets")
    add("--positions", type=int, nargs="+", metavar="K", help="draw these positions only, such as 1 5 10 15")
    add("--json", metavar="PATH", help="write the ranked lists")
    # other things to do
    add("--serve", action="store_true", help="open a search page instead")
    add("--host", default="127.0.0.1", help="address of the search page: this machine only, unless another is given")
    add("--port", type=int, default=8000)
    add("--allowed_hosts", nargs="+", default=[], metavar="NAME", help="names of this machine that browsers may open the search "
        "page by, beside its IP addresses and localhost")
    add("--export", choices=["onnx"], help="write models/<run>/best.onnx instead, checked against PyTorch")
    add("--onnx_input", choices=["uint8", "float"], default="uint8", help="of the export: bytes, or for trackers float RGB, "
        "normalised, to models/<run>/best.float.onnx")
    extract.add_arguments(parser)
    add("--strict", action="store_true", help="stop at the first image that cannot be read, instead of leaving it out")
    return parser


def main(args):
    check_ranges(args, {"topk": (1, 1 << 40), "positions": (1, 1 << 40), "cameras": (-1, 1 << 40), "batch_size": (1, 1 << 16),
                        "port": (0, 65535)})
    if args.output:
        viz.picture_format(args.output)  # a wrong name is said now, not after the work
    checkpoint = checkpoint_path(args.exp_name)
    if args.export:
        return export(args, checkpoint)
    if args.serve:
        from reid.extras import page as serve  # FastAPI: only the page's users pay for the import

        listener = serve.listen(args.host, args.port)  # a taken port is said before the gallery is embedded
    query_files = [] if args.serve else find_queries(args)
    distributed.start(args.device)  # torchrun: every rank embeds and writes its part of a Milvus gallery
    network = None
    if args.engine != "torch":
        from reid.extras.openvino import engine_of

        network = engine_of(args)
    extractor = extract.Extractor.from_args(checkpoint, args, network)
    index = gallery_of(args, extractor)
    ours = isinstance(index, GalleryIndex) and not args.serve  # then every rank also searches its stretch of the rows
    ranks = {"rank": distributed.rank, "world_size": distributed.world_size} if ours else {}
    if distributed.rank and not ours:
        return distributed.stop()
    if distributed.rank == 0:
        print(f"{extractor.describe()}; {len(index):,} images in the gallery", flush=True)
    args.topk = max(1, min(args.topk, len(index)))
    if args.serve:
        mapped = args.load_index and isinstance(index, GalleryIndex)
        file = args.gallery_uri or f"index/{args.exp_name}.pt" if mapped else None
        return serve.serve(serve.create_app(extractor, index, [args.host, *args.allowed_hosts], file), listener)

    embeddings, kept, bad = extractor.embed_records(query_files, strict=args.strict, progress=False)
    files = [query_files[i] for i in kept.tolist()]
    names = [name_of(file, args.data_root) for file in files]
    scores, rows = search(args, index, embeddings, names, ranks)
    if distributed.rank:
        return distributed.stop()
    rankings = [ranking(index, *item) for item in zip(files, names, scores, rows)]
    threshold = None if args.rerank or args.spacetime else index.threshold  # it is a cosine, their scores are not
    for item in rankings:
        print_ranking(item, threshold)
    if args.output:
        drawn = [RankedList(Query(file, *name), found[found >= 0], score[found >= 0], index, threshold)
                 for file, name, score, found in zip(files, names, scores, rows)]
        written = viz.draw_ranking(args.output, drawn, args.positions)
        print(f"pictures written: {', '.join(map(str, written))}")
    if args.json:
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps({"exp_name": args.exp_name, "fingerprint": index.fingerprint,
                                             "threshold": threshold, "rankings": rankings}, indent=1))
        print(f"results written: {args.json}")
    for file, reason in index.bad + bad:
        print(f"left out: {file}: {reason}", file=sys.stderr)
    if bad and not rankings:
        raise ReidError("none of the queries could be read")
    return 3 if index.bad or bad else 0


def export(args, checkpoint):
    """Write best.onnx beside the checkpoint, after comparing its output with PyTorch's on the query images."""
    from reid.extras.onnx import export_onnx

    output = checkpoint.with_suffix(".onnx" if args.onnx_input == "uint8" else ".float.onnx")
    lowest = export_onnx(checkpoint, output, find_queries(args)[:64], args.mirror is not False, args.onnx_input)
    print(f"{output}: written; lowest cosine to PyTorch {lowest:.6f}")


def find_queries(args):
    """The query files that --query_paths names; nothing found for a path raises ReidError."""
    if not args.query_paths:
        return read_split(args.data_root, "query").files()[:1]
    found = []
    for path in args.query_paths:
        if Path(path).is_dir():
            names = [Path(path) / name for name in list_images(path)]
        else:  # the shell may have left the pattern to us; a file may also be called "a[1].jpg"
            names = [Path(path)] if Path(path).exists() else [Path(name) for name in sorted(glob.glob(path, recursive=True))]
        if not names:
            raise ReidError(f"--query_paths {path}: no such image")
        found += names
    return found


def gallery_of(args, extractor):
    """The gallery that is searched: loaded, or made of a folder."""
    uri = args.gallery_uri or f"index/{args.exp_name}.pt"
    if args.load_index and not args.gallery:
        index = open_gallery(uri, args.exp_name, extractor)
        if args.mirror is None:
            extractor.mirror = index.mirror
        return index
    records = read_folder(args.gallery) if args.gallery else read_split(args.data_root, "gallery")
    index = build_gallery(uri, args.exp_name, extractor, records, args.save_index, args.index_type,
                          strict=args.strict, rank=distributed.rank, world_size=distributed.world_size)
    if distributed.rank == 0 and not len(index):
        raise ReidError(f"{args.gallery or args.data_root}: not one image of the gallery could be read")
    if args.save_index and distributed.rank == 0:
        print(f"index saved: {uri}")
        if args.index_type != "FLAT":
            recall, compared = index.recall()
            print(f"{args.index_type}: recall@10 {100 * recall:.1f} % against exact search over {compared:,} images")
    return index


def search(args, index, embeddings, names, ranks):
    """(scores, rows), lists of Q tensors: by cosine, or the best CANDIDATES in the order that other evidence gives them."""
    how = {"camids": args.cameras, "frames": args.frames, **ranks}
    if not (args.rerank or args.spacetime):
        return index.nearest(embeddings, args.topk, **how)
    path = checkpoint_path(args.exp_name).with_name("spacetime.pt")
    evidence = load_spacetime(path, args.data_root) if args.spacetime else None
    _, candidates = index.nearest(embeddings, max(args.topk, CANDIDATES), **how)
    scores, rows = [], []
    for query, name, found in zip(embeddings, names, candidates):
        found = found[found >= 0]
        gallery = index.embeddings[found].float()
        told = [torch.tensor([value, *(int(column[row]) for row in found.tolist())])
                for value, column in zip(name[1:], (index.camids, index.seqs, index.frames))]
        if args.rerank:
            new = rerank.rerank(query[None], gallery, bonus=evidence and evidence.bonus(*told)).scores(0, 1)[0]
        else:
            odds = evidence.prob(*(column[:1] for column in told), *(column[1:] for column in told))
            new = evidence.fuse(query[None] @ gallery.T, odds)[0]
        best, order = new.sort(descending=True, stable=True)
        scores.append(best[: args.topk])
        rows.append(found[order[: args.topk]])
    return scores, rows


def name_of(file, data_root):
    """What is known of a query: by its name, and in a grouped dataset by its folder."""
    name = parse_name(file.name) or Name(UNKNOWN_PID, UNKNOWN)
    grouped = Path(data_root).resolve() in file.resolve().parents
    return name._replace(pid=folder_pid(file.parent.name)) if grouped else name


def ranking(index, file, name, scores, rows):
    """What was found for one query, as plain values."""
    found = [(score, row) for score, row in zip(scores.tolist(), rows.tolist()) if row >= 0]
    hits = [{"position": i, "path": str(Path(index.data_root) / index.paths[row]), "score": score,
             "pid": int(index.pids[row]), "camid": int(index.camids[row])} for i, (score, row) in enumerate(found, 1)]
    return {"query": str(file), "pid": name.pid, "camid": name.camid, "hits": hits}


def print_ranking(item, threshold):
    print(f"\nquery {item['query']}")
    for hit in item["hits"]:
        verdict = "" if threshold is None else "  match" if hit["score"] > threshold else "  unknown"
        print(f"{hit['position']:>4}  {hit['score']:.4f}  {hit['path']}{verdict}")


if __name__ == "__main__":
    run(get_args_parser(), main)
