"""What a gallery costs as it grows: ingest, search and memory of Milvus beside the index file, in one run.

    python benchmarks/scale.py                          embedded engine: 20k, 200k and 1 M random embeddings
    python benchmarks/scale.py --uri http://host:19530  a server or a cluster (MILVUS_TOKEN)
    python benchmarks/scale.py --quick                  2k, 5k and 10k: seconds

Searches of the two alternate, medians are compared, and both must rank alike. The line fitted through the sizes is what
docs/scale.md projects from. Each size writes a collection of its own (`reid_scale_<size>`), which is dropped at the end.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reid.data import Records
from reid.index import GalleryIndex
from reid.milvus import MilvusGallery
from reid.milvus_client import INDEXES, is_file

DIM, CAMERAS, PER_PERSON = 1024, 20, 20


def gallery_of(size, seed=0):
    """GalleryIndex of random people, about 20 images each, in 20 cameras; no files behind it."""
    generator = torch.Generator().manual_seed(seed)
    people = max(size // PER_PERSON, 1)
    embeddings = torch.empty(size, DIM, dtype=torch.float16)
    pids = torch.randint(1, people + 1, (size,), generator=generator)
    for part in torch.arange(size).split(20_000):
        centres = torch.stack([torch.randn(DIM, generator=torch.Generator().manual_seed(int(p))) for p in pids[part]])
        embeddings[part] = F.normalize(centres + 1.5 * torch.randn(len(part), DIM, generator=generator), dim=1).half()
    camids, frames = torch.randint(1, CAMERAS + 1, (size,), generator=generator), torch.arange(size)
    records = Records(Path("nowhere"), [f"{i // 10_000:04d}/{i:09d}.jpg" for i in range(size)], pids, camids, frames * 0, frames)
    stats = torch.full((2, size), -1)
    return GalleryIndex(embeddings, records, "0" * 32, False, (stats[0], stats[1]))


def resident():
    """Resident memory of this process in bytes (embedded: the engine's is in it)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def alternate(galleries, queries, repeats, **options):
    """Median milliseconds of a search in each gallery, asked in turn, after one search of each to warm up."""
    times = [[] for _ in galleries]
    for turn in range(repeats + 1):
        for gallery, spent in zip(galleries, times):
            started = time.perf_counter()
            gallery.search(queries, 10, **options)
            if turn:
                spent.append(time.perf_counter() - started)
    return [1e3 * statistics.median(spent) for spent in times]


def measure(uri, size, index_type, repeats):
    """One size: a dict of figures."""
    index = gallery_of(size)
    queries = F.normalize(index.embeddings[:: max(size // 100, 1)][:100].float() + 0.02 * torch.randn(100, DIM), dim=1)
    started = time.perf_counter()
    gallery = MilvusGallery.create(uri, f"scale_{size}", index.fingerprint, False, DIM, index.data_root, index_type)
    try:
        gallery.add(index.embeddings, index.records())
        result = {"rows": size, "ingest_rows_per_s": size / (time.perf_counter() - started)}
        for count in (1, 100):
            times = alternate((index, gallery), queries[:count], repeats)
            result |= {f"index_ms_{count}": times[0], f"milvus_ms_{count}": times[1]}
        result["milvus_ms_1_camera"] = alternate([gallery], queries[:1], repeats, camids=[1])[0]
        rows, expected = gallery.search(queries, 10)[1], index.search(queries, 10)[1]
        found = [[gallery.frames[row] for row in line] for line in rows.tolist()]  # a row's frame is its place here
        hits = sum(len(set(a) & set(b)) for a, b in zip(found, expected.tolist()))
        result |= {"recall@10": hits / expected.numel(), "index_bytes": index.embeddings.nbytes,
                   "same_order": sum(a == b for a, b in zip(found, expected.tolist())) / len(queries),
                   "process_bytes": resident()}  # an embedded engine and the index file's matrix are in it
        if is_file(uri):
            files = (Path(uri) / "collections" / gallery.engine.name).rglob("*")
            result["disk_bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    finally:
        gallery.engine.call("drop_collection")
        gallery.close()
    return result


def slope(results, name):
    """(milliseconds at 0 rows, milliseconds a million rows): the least-squares line through the sizes."""
    x = torch.tensor([result["rows"] / 1e6 for result in results], dtype=torch.float64)
    y = torch.tensor([result[name] for result in results], dtype=torch.float64)
    per_million = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return float(y.mean() - per_million * x.mean()), per_million


def main():
    parser = argparse.ArgumentParser("scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uri", help="engine; default: an embedded one in a temporary folder")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--index_type", choices=list(INDEXES), default="FLAT")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    sizes = args.sizes or ([2_000, 5_000, 10_000] if args.quick else [20_000, 200_000, 1_000_000])
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            result = measure(args.uri or f"{folder}/scale.db", size, args.index_type, args.repeats)
            results.append(result)
            print("  ".join(f"{name} {value:,.0f}" if value > 20 else f"{name} {value:.3f}" for name, value in result.items()))
            print("  ".join(f"Milvus / index file at {n} queries: {result[f'milvus_ms_{n}'] / result[f'index_ms_{n}']:.2f}"
                            for n in (1, 100)), flush=True)
    if len(sizes) > 1:
        for name in ("index_ms_1", "milvus_ms_1", "index_ms_100", "milvus_ms_100"):
            start, per_million = slope(results, name)
            print(f"{name}: {start:.1f} ms + {per_million:.1f} ms a million rows")
    if args.json:
        Path(args.json).write_text(json.dumps({"index_type": args.index_type, "results": results}, indent=1))


if __name__ == "__main__":
    main()
