"""One way to open and keep a gallery, wherever its URI says it is: an index file, a Milvus file, server or cluster."""

from reid import ReidError
from reid.retrieval.index import GalleryIndex


def open_gallery(uri, run, extractor=None):
    """A gallery to search: GalleryIndex for index/<run>.pt, MilvusGallery for name.db and http(s)://host:port."""
    return _milvus().open_gallery(uri, run, extractor) if _milvus().is_uri(uri) else GalleryIndex.load(uri, extractor)


def build_gallery(uri, run, extractor, records, save, index_type="FLAT", strict=False, progress=True, rank=0, world_size=1):
    """Embed `records` and return their gallery, kept at `uri` if `save`."""
    if index_type != "FLAT" and not (save and _milvus().is_uri(uri)):
        raise ReidError(f"--index_type {index_type}: of a gallery kept in Milvus; give --save_index and --gallery_uri")
    if save and _milvus().is_uri(uri):
        return _milvus().build_gallery(uri, run, extractor, records, index_type, strict, progress)
    index = GalleryIndex.build(extractor, records, strict=strict, progress=progress, rank=rank, world_size=world_size)
    if save and len(index) and rank == 0:
        index.save(uri)
    return index


def load_index(uri, run, wanted):
    """The gallery and its queries in memory, as `eval.py` needs them: every score counts there."""
    return _milvus().load_index(uri, run, wanted) if _milvus().is_uri(uri) else GalleryIndex.load(uri, wanted)


def save_index(index, uri, run):
    """Keep an index with its queries and its threshold at `uri`."""
    return _milvus().save_index(index, uri, run) if _milvus().is_uri(uri) else index.save(uri)


def _milvus():
    from reid.extras import milvus

    return milvus
