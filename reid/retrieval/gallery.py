"""One way to open and keep a gallery, wherever its URI says it is: an index file, a Milvus file, server or cluster."""

from reid import ReidError
from reid.extras.milvus_client import is_engine
from reid.retrieval.index import GalleryIndex


def open_gallery(uri, run, extractor=None):
    """A gallery to search: GalleryIndex for index/<run>.pt, MilvusGallery for name.db and http(s)://host:port.

    Both have search, remove, add, count, fingerprint, mirror, threshold, data_root, bad and close, and tell of a row number
    that `search` returned by paths[row], pids[row], camids[row] and embeddings[rows]. One of other weights raises ReidError.
    """
    return _engine().open(uri, run, extractor) if is_engine(uri) else GalleryIndex.load(uri, extractor)


def build_gallery(uri, run, extractor, records, save, index_type="FLAT", **options):
    """Embed `records` and return their gallery, kept at `uri` if `save`: an engine's rows are then never in memory as a
    whole. options: strict, progress, rank, world."""
    if index_type != "FLAT" and not (save and is_engine(uri)):
        raise ReidError(f"--index_type {index_type}: of a gallery kept in Milvus; give --save_index and --gallery_uri")
    if save and is_engine(uri):
        return _engine().build(uri, run, extractor, records, index_type=index_type, **options)
    index = GalleryIndex.build(extractor, records, **options)
    if save and len(index) and options.get("rank", 0) == 0:
        index.save(uri)
    return index


def load_index(uri, run, wanted):
    """The gallery and its queries in memory, as `eval.py` needs them: every score counts there."""
    if not is_engine(uri):
        return GalleryIndex.load(uri, wanted)
    parts = []
    for part in ("queries", ""):  # the queries first: where they are missing, it is eval.py that makes them
        gallery = _engine().open(uri, run, wanted, part=part)
        parts.append(gallery.download())
        gallery.close()
    parts[1].queries = parts[0]
    return parts[1]


def save_index(index, uri, run):
    """Keep an index with its queries and its threshold at `uri`."""
    if not is_engine(uri):
        return index.save(uri)
    for part, rows in (("", index), ("queries", index.queries)):
        if rows is not None:
            made_of = rows.fingerprint, rows.mirror, rows.embeddings.shape[1], rows.data_root
            gallery = _engine().create(uri, run, *made_of, part=part)
            gallery.write(rows.embeddings, rows.records())
            gallery.threshold, gallery.false_match_rate = rows.threshold, rows.false_match_rate
            gallery.save()
            gallery.close()


def _engine():
    from reid.extras.milvus import MilvusGallery

    return MilvusGallery
