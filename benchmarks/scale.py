"""What a gallery costs as it grows: ingest, search, memory and disk of Milvus beside the index file, in one run.

    python benchmarks/scale.py                          embedded engine: 20k, 200k and 1 M random embeddings
    python benchmarks/scale.py --uri http://host:19530  a server or a cluster (MILVUS_TOKEN)
    python benchmarks/scale.py --quick                  20k and 50k
    python benchmarks/scale.py --sizes 1000000 --folder DIR --limit 300

The last stops writing after 300 s and goes on when it is called again, until all rows are there and the searches follow. Searches
of the two alternate, medians are compared, and both must rank alike. Writing and searching have a process each, so that
memory is that of one thing. The lines fitted through the sizes are what docs/scale.md projects from.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reid import ReidError
from reid.data.datasets import Records
from reid.extras.milvus import create_gallery, open_gallery
from reid.extras.milvus_client import INDEXES, is_file
from reid.retrieval.index import GalleryIndex

DIM, CAMERAS, PER_PERSON = 1024, 20, 20
STEP = 50_000  # rows between two looks at the clock
UNITS = {"ingest, rows/s": 1, "open, s": 1, "memory, MB": 1e6, "memory while writing, MB": 1e6, "disk, MB": 1e6}


def gallery_of(size, seed=0):
    """GalleryIndex of random people, about 20 images each, in 20 cameras; no files behind it. A row's frame is its number."""
    generator = torch.Generator().manual_seed(seed)
    pids = torch.randint(max(size // PER_PERSON, 1), (size,), generator=generator)
    centres = torch.randn(int(pids.max()) + 1, DIM, generator=generator)
    embeddings = torch.empty(size, DIM, dtype=torch.float16)
    for part in torch.arange(size).split(20_000):
        noise = torch.randn(len(part), DIM, generator=generator)
        embeddings[part] = F.normalize(centres[pids[part]] + 1.5 * noise, dim=1).half()
    camids, frames = torch.randint(1, CAMERAS + 1, (size,), generator=generator), torch.arange(size)
    records = Records(Path("nowhere"), [f"{i // 10_000:04d}/{i:09d}.jpg" for i in range(size)], pids, camids, frames * 0, frames)
    return GalleryIndex(embeddings, records, "0" * 32, False, torch.full((3, size), -1))


def make_index(path, size):
    index, started = gallery_of(size), time.perf_counter()
    index.save(path)
    return time.perf_counter() - started


def ingest(uri, path, size, index_type, limit):
    """Write what is missing, for `limit` seconds at most: (rows there, seconds of all calls so far, peak memory in bytes)."""
    index, started = GalleryIndex.load(path), time.monotonic()
    gallery = create_gallery(uri, f"scale_{size}", index.fingerprint, False, DIM, index.data_root, index_type)
    records, there = index.records(), len(gallery)
    before = gallery.collection.settings().get("seconds", 0)  # kept with the rows
    for part in torch.arange(there, size).split(STEP):
        step_started = time.monotonic()
        there += gallery.write(index.embeddings[part], records.select(part))
        before += time.monotonic() - step_started
        gallery.collection.set(seconds=before)
        if time.monotonic() - started > limit:
            break
    return there, before, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(uri, path, size, repeats, keep):
    """Searches of both in turn: {figure: (Milvus, index file)}, times in milliseconds, memory and disk in bytes."""
    clock, sizes = [time.perf_counter()], [resident()]
    gallery = open_gallery(uri, f"scale_{size}")
    gallery.nearest(torch.ones(1, DIM), 1)  # the engine reads its rows at the first search
    clock, sizes = [*clock, time.perf_counter()], [*sizes, resident()]
    index = GalleryIndex.load(path)
    index.nearest(torch.ones(1, DIM), 1)
    clock, sizes = [*clock, time.perf_counter()], [*sizes, resident()]
    result = {"open, s": (clock[1] - clock[0], clock[2] - clock[1]),
              "memory, MB": (sizes[1] - sizes[0], sizes[2] - sizes[1])}  # a server's memory is not in it
    if is_file(uri):
        files = (Path(uri) / "collections" / gallery.collection.name).rglob("*")
        result["disk, MB"] = sum(file.stat().st_size for file in files if file.is_file()), Path(path).stat().st_size
    noise = torch.randn(100, DIM, generator=torch.Generator().manual_seed(1))
    queries = F.normalize(index.embeddings[:: max(size // 100, 1)][:100].float() + 0.02 * noise, dim=1)
    asked = {"1 query, ms": (1, {}), "100 queries, ms": (100, {}), "1 query in 1 camera, ms": (1, {"camids": [1]})}
    for name, (count, options) in asked.items():
        result[name] = alternate((gallery, index), queries[:count], repeats, **options)
    rows, expected = gallery.nearest(queries, 10)[1].tolist(), index.nearest(queries, 10)[1].tolist()
    found = [[gallery.frames[row] for row in line] for line in rows]
    hits = sum(len(set(a) & set(b)) for a, b in zip(found, expected))
    result["recall@10"] = hits / sum(map(len, expected)), 1.0
    result["lists in the same order"] = sum(a == b for a, b in zip(found, expected)) / len(expected), 1.0
    if not keep:
        gallery.collection.call("drop_collection")
    return result


def alternate(galleries, queries, repeats, **options):
    """Median milliseconds of a search in each gallery, asked in turn, after one search of each to warm up."""
    times = [[] for _ in galleries]
    for turn in range(repeats + 1):
        for gallery, spent in zip(galleries, times):
            started = time.perf_counter()
            gallery.nearest(queries, 10, **options)
            if turn:
                spent.append(time.perf_counter() - started)
    return tuple(1e3 * statistics.median(spent) for spent in times)


def resident():
    """Resident memory of this process in bytes (the embedded engine's is in it)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def alone(function, *arguments):
    """`function` in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def one_size(folder, uri, size, args):
    """The figures of one size, or None where `--limit` ended the writing."""
    path, saving = f"{folder}/{size}.pt", None
    if not Path(path).exists():
        saving = alone(make_index, path, size)
    there, seconds, peak = alone(ingest, uri, path, size, args.index_type, args.limit)
    print(f"{there:,} of {size:,} rows written in {seconds:.1f} s ({there / seconds:,.0f} rows/s)", flush=True)
    if there < size:
        return None
    result = {"ingest, rows/s": (there / seconds, saving and size / saving), "memory while writing, MB": (peak, None)}
    return result | alone(measure, uri, path, size, args.repeats, args.folder)


def rows_of(size, figures, index_type):
    """The figures as rows of the table: a ratio above 1 is in Milvus' favour."""
    for name, (ours, peer) in figures.items():
        ours, peer = ours / UNITS.get(name, 1), peer and peer / UNITS.get(name, 1)
        more_is_better = name.endswith(("rows/s", "@10", "order"))
        ratio = peer and (ours / peer if more_is_better else peer / ours)
        name = f"{name}; {size:,} rows, {index_type}"
        yield {"name": name, "ours": ours, "peer": peer, "peer_name": "index file", "ratio": ratio}


def slope(sizes, values):
    """(value at 0 rows, increase for a million rows): the least-squares line through the sizes."""
    x, y = (torch.tensor(numbers, dtype=torch.float64) for numbers in ([size / 1e6 for size in sizes], values))
    per_million = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return float(y.mean() - per_million * x.mean()), per_million


def main():
    parser = argparse.ArgumentParser("scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uri", help="engine; default: an embedded one in the folder")
    parser.add_argument("--folder", help="keep the galleries here; default: a temporary one")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds of writing; then call again")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--index_type", choices=list(INDEXES), default="FLAT")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the children's threads: two libraries' would spin against each other
    found, rows = {}, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        Path(folder).mkdir(parents=True, exist_ok=True)
        for size in args.sizes or ([20_000, 50_000] if args.quick else [20_000, 200_000, 1_000_000]):
            figures = one_size(folder, args.uri or f"{folder}/{args.index_type}.db", size, args)
            if figures:
                found[size] = figures
                for row in rows_of(size, figures, args.index_type):
                    rows.append(row)
                    print(f"{row['name']}: {row['ours']:,.3f}" + (f", index file {row['peer']:,.3f}, ratio {row['ratio']:.2f}"
                                                                  if row["peer"] else ""), flush=True)
    for name in ("1 query, ms", "100 queries, ms", "memory, MB", "disk, MB") if len(found) > 1 else ():
        for side, gallery in enumerate(("Milvus", "index file")):
            values = [figures[name][side] / UNITS.get(name, 1) for figures in found.values() if name in figures]
            if values:
                start, per_million = slope(found, values)
                print(f"{name}, {gallery}: {start:,.1f} + {per_million:,.1f} for a million rows")
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except ReidError as error:
        sys.exit(f"scale.py: {error}")
