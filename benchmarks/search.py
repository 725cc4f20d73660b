"""Exact search: `reid.retrieval.search.ExactSearch` against faiss IndexFlatIP, A and B in turn in one process, both against float64.

Also how long an index of a million images takes to open.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import faiss
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reid.data.datasets import make_records
from reid.retrieval.index import GalleryIndex
from reid.retrieval.search import ExactSearch

TOPK, DIM, LARGE = 10, 1024, 1_000_000


def rows(count, seed, centres):
    """Unit rows around shared centres: as people in a gallery, they have near neighbours."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(count, DIM)
    for part in out.split(1 << 16):
        part.copy_(centres[torch.randint(len(centres), (len(part),), generator=generator)])
        part += torch.randn(part.shape, generator=generator) * 0.6 / DIM**0.5
        part /= part.norm(dim=1, keepdim=True)
    return out


def timed(name, sides, peer_name, rounds, repeat, **more):
    """One row: two callables in turn, the median of the rounds' ratios."""
    pairs = []
    for _ in range(rounds):
        pair = []
        for side in sides:
            started = time.perf_counter()
            for _ in range(repeat):
                side()
            pair.append((time.perf_counter() - started) / repeat)
        pairs.append(pair)
    ours, peer = sorted(pairs, key=lambda pair: pair[1] / pair[0])[rounds // 2]
    print(f"{name}: {peer / ours:.2f} times {peer_name} ({1000 * ours:,.2f} ms, {1000 * peer:,.2f} ms)",
          *(f"{key}: {100 * value:.2f} %" for key, value in more.items()), sep="; ", flush=True)
    return {"name": name, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": peer / ours, **more}


def search(gallery, centres, query_counts, rounds):
    """gallery: float16 [N, DIM]; both sides search the same values."""
    ours, peer = ExactSearch(gallery), faiss.IndexFlatIP(DIM)
    for part in gallery.split(1 << 16):
        peer.add(part.float().numpy())
    for count in query_counts:
        queries = rows(count, 1, centres)
        sides = (lambda q=queries: ours.search(q, TOPK)[1], lambda q=queries: torch.from_numpy(peer.search(q.numpy(), TOPK)[1]))
        found = [side() for side in sides]
        some = torch.arange(0, count, max(1, count // 50))
        scores = torch.cat([queries[some].double() @ part.double().T for part in gallery.split(1 << 15)], 1)
        exact = scores.sort(dim=1, descending=True, stable=True)[1][:, :TOPK]
        same = (found[0][some] == exact).float().mean().item()
        repeat = max(1, 4_000_000 // len(gallery) // count)
        yield timed(f"{count:,} queries, gallery {len(gallery):,}", sides, "faiss IndexFlatIP", rounds, repeat,
                    order_of_float64=same)


def opening(gallery, rounds):
    """A saved index, opened memory-mapped, against reading all of it."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{i % 9999:04}/{i % 9999:04}_c{i % 6 + 1}s1_{i:06}_00.jpg" for i in range(len(gallery))]
        GalleryIndex(gallery, make_records(folder, names, grouped=True), "f" * 16, True).save(f"{folder}/a.pt")
        sides = (lambda: GalleryIndex.load(f"{folder}/a.pt"), lambda: torch.load(f"{folder}/a.pt", weights_only=True))
        return timed(f"open an index of {len(gallery):,}", sides, "torch.load", rounds, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the gallery of Market-1501's size only")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = []
    for count in (19_732,) if args.quick else (19_732, LARGE):
        centres = F.normalize(torch.randn(count // 26, DIM, generator=torch.Generator().manual_seed(7)))
        gallery = rows(count, 0, centres).half()
        found += search(gallery, centres, (1, 32, 256) if count == LARGE else (1, 32, 256, 3368), args.rounds)
    if not args.quick:
        found.append(opening(gallery, args.rounds))
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": found}, indent=1))


if __name__ == "__main__":
    main()
