"""Open, make and keep the gallery of inference.py and the index of eval.py, in a file or in Milvus."""

from functools import partial
from pathlib import Path

from reid import ReidError, distributed
from reid.data.datasets import read_folder, read_split
from reid.extras import milvus, network
from reid.model import pick_device
from reid.retrieval import tracklets
from reid.retrieval.arguments import DATA_ROOT
from reid.retrieval.index import GalleryIndex
from reid.retrieval.protocol import SPLITS, random_splits
from reid.retrieval.stored import changing, check_current, is_milvus, save_command


def open_stored(args, extractor):
    """Open the saved gallery, for --add an empty one where there is none; raises ReidError where it was made of other weights."""
    uri, run = args.gallery_uri, args.exp_name
    if is_milvus(uri):
        if args.add and not milvus.exists(uri, run):
            return milvus.create_gallery(uri, run, extractor.fingerprint, extractor.mirror, extractor.dim, "")
        return milvus.open_gallery(uri, run, extractor)
    if args.add and not Path(uri).exists():
        return GalleryIndex.empty(extractor)
    return GalleryIndex.load(uri, extractor, partial(save_command, args))


def load(args, extractor):
    """Open the saved gallery for --load_index, else return None; give --data_root its default.

    Raises ReidError where it was made of other weights, of another folder, or of other images.
    """
    index = open_stored(args, extractor) if args.load_index else None
    if index is not None:
        check_current(index, args.gallery_uri, args.gallery or args.data_root or index.data_root, args)
        extractor.mirror = index.mirror
        if not (len(index) or args.serve):
            raise ReidError(f"{args.gallery_uri}: holds no image; enrol some with --add")
    args.data_root = args.data_root or (DATA_ROOT if index is None else index.data_root)
    return index


def prepare(args, index, extractor=None):
    """Return what is searched of a gallery: without camera statistics, with the means of tracklets.

    extractor: where it is given, print what embeds and what is searched.
    """
    if args.camera_norm is not False and isinstance(index, GalleryIndex):
        index = index.camera_normalised()
    if args.tracklets and not isinstance(index, GalleryIndex):
        raise ReidError("--tracklets: not of a gallery in Milvus, whose entries are single images")
    index = tracklets.pool(index) if args.tracklets else index
    if extractor and distributed.rank == 0:
        if args.camera_norm and not index.normalised:
            where = "in Milvus" if is_milvus(args.gallery_uri) else "on a gallery without cameras"
            print(f"--camera_norm: has no effect {where}")
        print(f"{extractor.describe()}; {len(index):,} images in the gallery"
              f"{', camera statistics taken out' * index.normalised}", flush=True)
    return index


def build(args, extractor):
    """Embed the gallery; with --save_index it is kept, in Milvus without ever being in memory as a whole.

    Of a gallery that is kept already only what is new or has changed is embedded.
    """
    rank, records = distributed.rank, read_folder(args.gallery) if args.gallery else read_split(args.data_root, "gallery")
    account, uri = records.account(args.gallery or f"{args.data_root}/gallery", args.strict), args.gallery_uri
    if rank == 0:
        print(account)
    old = None
    if args.save_index and is_milvus(uri):
        index = milvus.build_gallery(uri, args.exp_name, extractor, records, args.index_type, args.strict)
    else:
        old = GalleryIndex.reusable(uri, extractor, records.root, args.overwrite) if args.save_index else None
        index = GalleryIndex.build(extractor, records, args.strict, rank=rank, world_size=distributed.world_size, old=old)
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


def load_evaluated(args, wanted):
    """Read the saved index with its queries; raises ReidError where weights, dataset, images or settings differ."""
    uri = args.gallery_uri
    if is_milvus(uri):
        index = milvus.load_index(uri, args.exp_name, wanted)
    else:
        index = GalleryIndex.load(uri, wanted, partial(save_command, args))
    if index.queries is None:
        raise ReidError(f"{uri}: has a gallery but no queries; make them: {save_command(args, index)}")
    check_current(index, uri, args.data_root, args)
    args.mirror, index.device = index.mirror, distributed.device or pick_device(args.device)
    return index


def build_evaluated(args, checkpoint):
    """Embed gallery and queries of the dataset; with --save_index only what is new or has changed since."""
    rank, images, queries = distributed.rank, read_split(args.data_root, "gallery"), read_split(args.data_root, "query")
    if args.protocol in SPLITS:
        next(random_splits(args.protocol, queries.pids, images.pids))  # too few people: refused before they are embedded
    extractor = network.make_extractor(args, checkpoint)
    old = None
    if args.save_index and not is_milvus(args.gallery_uri):
        old = GalleryIndex.reusable(args.gallery_uri, extractor, args.data_root, args.overwrite)
    accounts = [images.account(f"{args.data_root}/gallery", args.strict), queries.account(f"{args.data_root}/query", args.strict)]
    if rank == 0:
        print(extractor.describe(), *accounts, sep="\n", flush=True)
    options = {"strict": args.strict, "rank": rank, "world_size": distributed.world_size, "progress": rank == 0}
    index = GalleryIndex.build(extractor, images, old=old, **options)
    index.queries = GalleryIndex.build(extractor, queries, old=None if old is None else old.queries, **options)
    if rank == 0 and old is not None:
        print(f"{args.gallery_uri}: gallery {index.update(old)}"
              + (f"; queries {index.queries.update(old.queries)}" if old.queries is not None else ""))
    if rank == 0 and not (len(index) and len(index.queries)):
        raise ReidError(f"{args.data_root}: not one image of its {'gallery' if not len(index) else 'query'} could be read")
    return index


def save_evaluated(index, uri, exp_name, overwrite=False):
    """Keep an index with its queries and its threshold."""
    if is_milvus(uri):
        with changing(uri):
            milvus.save_index(index, uri, exp_name)
    else:
        index.save_built(uri, overwrite)
    print(f"index saved: {uri}")
