"""Exact search: `GalleryIndex.search` against faiss IndexFlatIP, A and B in turn in one process, and both against float64."""

import argparse
import json
import time
from pathlib import Path

import faiss
import torch
import torch.nn.functional as F

from reid.search import ExactSearch

TOPK = 10


def rows(count, seed, centres):
    """Unit rows around shared centres: as people in a gallery, they have near neighbours."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(count, centres.shape[1])
    for part in out.split(1 << 16):
        part.copy_(centres[torch.randint(len(centres), (len(part),), generator=generator)])
        part += torch.randn(part.shape, generator=generator) * 0.6 / centres.shape[1] ** 0.5
    return F.normalize(out)


def compare(count, query_counts, rounds):
    centres = F.normalize(torch.randn(max(2, count // 26), 1024, generator=torch.Generator().manual_seed(7)))
    gallery = rows(count, 0, centres)
    ours, peer = ExactSearch(gallery.half() if count > 100_000 else gallery), faiss.IndexFlatIP(gallery.shape[1])
    if count > 100_000:
        gallery = ours.exact.float()  # both search the same float16 values
    peer.add(gallery.numpy())
    for queries_count in query_counts:
        queries = rows(queries_count, 1, centres)
        sides = (lambda q=queries: ours.search(q, TOPK)[1], lambda q=queries: torch.from_numpy(peer.search(q.numpy(), TOPK)[1]))
        found = [side() for side in sides]
        some = torch.arange(0, queries_count, max(1, queries_count // 50))
        exact = (queries[some].double() @ gallery.double().T if count < 100_000 else torch.cat(
            [queries[some].double() @ part.double().T for part in gallery.split(1 << 16)], 1)).sort(
            dim=1, descending=True, stable=True)[1][:, :TOPK]
        repeat = max(1, 200 // queries_count)
        times = []
        for _ in range(rounds):
            pair = []
            for side in sides:
                started = time.perf_counter()
                for _ in range(repeat):
                    side()
                pair.append((time.perf_counter() - started) / repeat)
            times.append(pair)
        middle = sorted(times, key=lambda pair: pair[1] / pair[0])[rounds // 2]
        name = f"{queries_count:,} queries, gallery {count:,}"
        same = (found[0][some] == exact).float().mean().item()
        ratio = middle[1] / middle[0]
        print(f"{name}: {ratio:.2f} times faiss IndexFlatIP; order equal to float64: {100 * same:.2f} %", flush=True)
        yield {"name": name, "ours": middle[0], "peer": middle[1], "peer_name": "faiss IndexFlatIP",
               "ratio": ratio, "same_order": same}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the gallery of Market-1501's size only")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = list(compare(19_732, (1, 32, 256, 3368), args.rounds))
    if not args.quick:
        found += compare(1_000_000, (1, 32, 256), args.rounds)
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": found}, indent=1))


if __name__ == "__main__":
    main()
