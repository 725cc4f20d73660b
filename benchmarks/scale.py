"""What a gallery costs as it grows: writing, searches, memory and disk of Milvus beside the index file.

    python benchmarks/scale.py                            embedded engine: 20k, 200k and 1 M random embeddings
    python benchmarks/scale.py --uri http://host:19530    a server or a cluster (MILVUS_TOKEN holds user:password)
    python benchmarks/scale.py --index_type HNSW --sizes 20000
    python benchmarks/scale.py --folder DIR               keeps the galleries: interrupted, it goes on with the missing rows

Both sides search in turn and must rank alike. Writing and searching run in processes of their own, so that the memory
measured is that of one thing.
"""

import itertools
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from common import get_args_parser, in_turn, row, run

from reid.data.datasets import Records
from reid.extras.milvus import create_gallery, open_gallery
from reid.extras.milvus_client import INDEXES, is_file
from reid.retrieval.index import GalleryIndex

DIM, CAMERAS, PER_PERSON, PEER = 1024, 20, 20, "index file"
STEP = 50_000  # rows of one call of `write`
SEARCHES = {"1 query, s": (1, {}), "100 queries, s": (100, {}), "1 query in 1 camera of 20, s": (1, {"camids": [1]})}


def random_index(size):
    """GalleryIndex of random people with about 20 images each in 20 cameras, without files. The frame of a row is its number."""
    generator = torch.Generator().manual_seed(0)
    pids = torch.randint(max(size // PER_PERSON, 1), (size,), generator=generator)
    centres = torch.randn(int(pids.max()) + 1, DIM, generator=generator)
    embeddings = torch.empty(size, DIM, dtype=torch.float16)
    for part in torch.arange(size).split(STEP):
        noise = torch.randn(len(part), DIM, generator=generator)
        embeddings[part] = F.normalize(centres[pids[part]] + 1.5 * noise, dim=1).half()
    camids, frames = torch.randint(1, CAMERAS + 1, (size,), generator=generator), torch.arange(size)
    paths = [f"{i // 10_000:04d}/{i:09d}.jpg" for i in range(size)]
    return GalleryIndex(embeddings, Records(Path("nowhere"), paths, pids, camids, frames * 0, frames), "0" * 32, False)


def save(path, size):
    """Write the index file; return seconds."""
    index, started = random_index(size), time.perf_counter()
    index.save(path)
    return time.perf_counter() - started


def write(uri, path, size, index_type):
    """Write the rows that are missing; return (rows written, seconds, peak memory in bytes)."""
    index = GalleryIndex.load(path)
    gallery = create_gallery(uri, f"scale-{size}", index.fingerprint, False, DIM, index.data_root, index_type)
    records, started, written = index.records(), time.perf_counter(), 0
    for part in torch.arange(len(gallery), size).split(STEP):
        written += gallery.write(index.embeddings[part], records.select(part))
        print(f"{int(part[-1]) + 1:,} of {size:,} rows are written", flush=True)
    return written, time.perf_counter() - started, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def search(uri, path, size, rounds):
    """Return the rows of the table about opening and searching."""
    clock, memory, galleries = [time.perf_counter()], [resident()], []
    for make in (lambda: open_gallery(uri, f"scale-{size}"), lambda: GalleryIndex.load(path)):
        galleries.append(make())
        galleries[-1].nearest(torch.ones(1, DIM), 1)  # both read their rows at the first search
        clock, memory = [*clock, time.perf_counter()], [*memory, resident()]
    gallery, index = galleries
    seconds, megabytes = ([[b - a] for a, b in itertools.pairwise(values)] for values in (clock, [x / 1e6 for x in memory]))
    rows = [row("open, s", *seconds, PEER), row("memory, MB (not that of a server)", *megabytes, PEER)]
    if is_file(uri):
        files = (Path(uri) / "collections" / gallery.collection.name).rglob("*")
        rows.append(row("disk, MB", [sum(file.stat().st_size for file in files if file.is_file()) / 1e6],
                        [Path(path).stat().st_size / 1e6], PEER))
    noise = torch.randn(100, DIM, generator=torch.Generator().manual_seed(1))
    queries = F.normalize(index.embeddings[:: max(size // 100, 1)][:100].float() + 0.02 * noise, dim=1)
    for name, (count, filters) in SEARCHES.items():
        times = in_turn([partial(side.nearest, queries[:count], 10, **filters) for side in galleries], rounds + 1)
        rows.append(row(name, *(side[1:] for side in times), PEER))  # without the first round, which warms up
    found, expected = ([side.frames[line].tolist() for line in side.nearest(queries, 10)[1]] for side in galleries)
    hits = sum(len(set(one) & set(other)) for one, other in zip(found, expected))
    rows.append(row("recall@10", [hits / sum(map(len, expected))], [1.0], PEER, higher_is_better=True))
    same = sum(one == other for one, other in zip(found, expected)) / len(expected)
    return [*rows, row("lists in the same order", [same], [1.0], PEER, higher_is_better=True)]


def resident():
    """Resident memory of this process in bytes, with the embedded engine."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def alone(function, *arguments):
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def benchmark(args):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else the threads of two libraries spin against each other
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        uri = args.uri or str(folder / f"{args.index_type}.db")
        for size in args.sizes or ([5_000, 20_000] if args.quick else [20_000, 200_000, 1_000_000]):
            path = str(folder / f"{size}.pt")
            saved = None if Path(path).exists() else [size / alone(save, path, size)]
            written, seconds, peak = alone(write, uri, path, size, args.index_type)
            rows = [{**row("memory while writing, MB", [peak / 1e6], None, PEER), "peer_name": ""}]
            if written:
                rows.append(row("writing, rows/s", [written / seconds], saved, PEER, higher_is_better=True))
            for found in rows + alone(search, uri, path, size, args.rounds):
                yield {**found, "name": f"{found['name']}; {size:,} rows, {args.index_type}"}


if __name__ == "__main__":
    parser = get_args_parser(__doc__, "5,000 and 20,000 rows")
    parser.add_argument("--uri", help="engine; default: an embedded one in the folder")
    parser.add_argument("--folder", help="keep the galleries here; default: a temporary folder")
    parser.add_argument("--sizes", type=int, nargs="+", help="rows of the galleries")
    parser.add_argument("--index_type", choices=list(INDEXES), default="FLAT")
    run(parser, benchmark)
