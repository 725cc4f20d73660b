"""Writing a gallery into Milvus: nothing is written twice, and what was interrupted goes on where it stopped."""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from tqdm import tqdm

from reid import ReidError, distributed
from reid.extras.milvus_client import NUMBERS, SAFE

WRITE = 1024  # rows of one write: 4 MiB, acknowledged as a whole
BLOCK = 4 * WRITE  # files whose keys are looked up at once


def add(gallery, extractor, records, strict=False, progress=True, rank=0, world_size=1):
    """Embed the images that are not in `gallery` yet, or have other bytes now, and write them; returns the number written.

    Batches are acknowledged, and a row is keyed by its path: killed at any moment and run again, the same call goes on
    after what was acknowledged and ends with the same rows. Unreadable images are left out and stand in `gallery.bad`.
    Each of `world_size` processes does every world_size-th image.
    """
    offset = reserve(gallery, records, rank, world_size)
    progress = progress and rank == 0
    gallery.bad.clear()
    written, started = 0, time.monotonic()
    mine = torch.arange(rank, len(records), world_size)
    with (tqdm(total=len(mine), unit="row", disable=not progress) as bar,
          ThreadPoolExecutor(1) as pool):  # the engine takes one batch while the next is embedded
        pending = None
        for part in mine.split(BLOCK):
            block = records.select(part)
            new, contents = missing(gallery, block)
            files = block.select(new).files()
            bar.update(len(block) - len(new))
            for found, rows in _batches(extractor.stream(files, strict, False, gallery.bad)):
                kept = new[found]
                written += pending.result() if pending else 0
                pending = pool.submit(upsert, gallery, block.select(kept), rows, part[kept] + offset, contents[kept])
                bar.update(len(rows))
        written += pending.result() if pending else 0
    parts = gather((written, gallery.bad), world_size)
    written, gallery.bad = sum(part[0] for part in parts), [left_out for part in parts for left_out in part[1]]
    if rank == 0:
        gallery.engine.call("flush")
    if progress:
        seconds = time.monotonic() - started
        print(f"{gallery.uri}: {written:,} rows written in {seconds:.1f} s ({written / max(seconds, 1e-9):,.0f} rows/s), "
              f"{len(records) - written:,} were there or left out", flush=True)
    return written


def write(gallery, embeddings, records):
    """Write embeddings (float [N, D], norm 1) of `records`; returns the number of rows that were new or have other bytes."""
    if list(embeddings.shape) != [len(records), gallery.dim]:
        raise ReidError(f"{gallery.uri}: embeddings {list(embeddings.shape)} do not fit: {len(records)} images of "
                        f"{gallery.dim} numbers each are expected")
    offset, written = reserve(gallery, records), 0
    for part in torch.arange(len(records)).split(BLOCK):
        block = records.select(part)
        new, contents = missing(gallery, block, embeddings[part])
        written += upsert(gallery, block.select(new), embeddings[part[new]], part[new] + offset, contents[new])
    gallery.engine.call("flush")
    return written


def reserve(gallery, records, rank=0, world_size=1):
    """First position of a listing of images. The same listing again, after a kill, gets the same positions."""
    if rank == 0:
        told, _ = gallery.engine.settings()
        listing = f"{number(json.dumps(list(records.paths)).encode()):x}"
        if listing != told["listing"]:
            cameras = sorted({*told["cameras"], *records.camids.unique().tolist()})
            told = {"start": told["next"], "next": told["next"] + len(records), "listing": listing, "cameras": cameras}
            gallery.engine.set(**told)
            gallery.cameras = cameras
    return distributed.share(told["start"] if rank == 0 else None) if world_size > 1 else told["start"]


def missing(gallery, block, embeddings=None):
    """(positions in `block` that have to be written, content number of every image), int64 each.

    The content number is of the file's bytes, or of the embedding where there is no file.
    """
    contents = []
    for i, file in enumerate(block.files()):
        try:
            contents.append(number(file.read_bytes()))
        except OSError:
            contents.append(0 if embeddings is None else number(embeddings[i].half().numpy().tobytes()))
    keys = [key_of(path) for path in block.paths]
    there = {row["key"]: row for row in gallery.engine.call("get", ids=keys, output_fields=["path", "content"])}
    new, paths = [], {}
    for i, (key, path) in enumerate(zip(keys, block.paths)):
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            gallery.bad.append((block.root / path, "its name is not UTF-8, which Milvus cannot hold; rename it"))
        elif not path == paths.setdefault(key, path) == there.get(key, {"path": path})["path"]:
            gallery.bad.append((block.root / path, "its path has the same 63-bit key as another's; rename it"))
        elif key not in there or there[key]["content"] != contents[i]:
            new.append(i)
    return torch.tensor(new, dtype=torch.int64), torch.tensor(contents, dtype=torch.int64)


def upsert(gallery, records, embeddings, positions, contents):
    """Upsert rows in batches that the engine acknowledges; returns their number."""
    columns = (records.pids, records.camids, records.seqs, records.frames, positions, contents)
    vectors = embeddings.half().float().numpy()  # rounded as in the .pt index: both hold the same numbers and rank alike
    rows = [{"key": key_of(path), "path": path, "vector": vector, **dict(zip(NUMBERS, numbers))} for path, vector, numbers in
            zip(records.paths, vectors, torch.stack(columns, 1).tolist())]
    for first in range(0, len(rows), WRITE):
        batch = rows[first : first + WRITE]
        if (count := gallery.engine.call("upsert", data=batch)["upsert_count"]) != len(batch):
            raise ReidError(f"{gallery.uri}: {count} of {len(batch)} rows were acknowledged; {SAFE}")
    return len(rows)


def key_of(path):
    """The primary key of a path below the data root."""
    return number(os.fsencode(path))


def number(data):
    """63 bits of a hash of bytes: Milvus' integers are signed."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def gather(obj, world_size):
    """The `obj` of every process, when all are here."""
    parts = [obj] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, obj)
    return parts


def _batches(stream):
    """Join what Extractor.stream yields to pieces of WRITE rows or a little more."""
    found, rows = [], []
    for positions, embeddings in stream:
        found.append(positions)
        rows.append(embeddings)
        if sum(map(len, rows)) >= WRITE:
            yield torch.cat(found), torch.cat(rows)
            found, rows = [], []
    if rows:
        yield torch.cat(found), torch.cat(rows)
