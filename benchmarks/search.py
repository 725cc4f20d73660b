"""Speed of exact search: `reid.retrieval.search.ExactSearch` against faiss `IndexFlatIP`, and of opening an index.

Both sides search the same float16 embeddings for the 10 best. `order_of_float64` of a row is the share of ranks (of at most
50 queries) at which ours has the image that float64 scores put there.
"""

import tempfile

import common
import torch
import torch.nn.functional as F

from reid.data.datasets import make_records
from reid.retrieval.index import GalleryIndex
from reid.retrieval.search import ExactSearch

try:
    import faiss
except ImportError:
    faiss = None

TOPK, DIM, LARGE = 10, 1024, 1_000_000


def embeddings(count, seed, centres):
    """Return float32 [count, DIM] around shared centres: as people in a gallery, they have near neighbours."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(count, DIM)
    for part in out.split(1 << 16):
        part.copy_(centres[torch.randint(len(centres), (len(part),), generator=generator)])
        part += torch.randn(part.shape, generator=generator) * 0.6 / DIM**0.5
        part /= part.norm(dim=1, keepdim=True)
    return out


def searching(gallery, centres, query_counts, rounds):
    """Yield a row for each number of queries. gallery: float16 [N, DIM]."""
    ours, peer = ExactSearch(gallery), faiss and faiss.IndexFlatIP(DIM)
    for part in gallery.split(1 << 16) if faiss else ():
        peer.add(part.float().numpy())
    for count in query_counts:
        queries = embeddings(count, 1, centres)
        sides = [lambda queries=queries: ours.search(queries, TOPK)[1]]
        sides += [lambda queries=queries: peer.search(queries.numpy(), TOPK)] if faiss else []
        some = torch.arange(0, count, max(1, count // 50))
        scores = torch.cat([queries[some].double() @ part.double().T for part in gallery.split(1 << 15)], 1)
        exact = scores.sort(dim=1, descending=True, stable=True)[1][:, :TOPK]
        same = (sides[0]()[some] == exact).double().mean().item()
        common.in_turn(sides, 1)
        seconds = common.in_turn(sides, rounds, max(1, min(200, 4_000_000 // len(gallery)) // count))
        yield common.row(f"search, {count:,} queries in {len(gallery):,}, s", seconds[0], seconds[1] if faiss else None,
                         "faiss IndexFlatIP", order_of_float64=same)


def opening(gallery, rounds):
    """Return a row: a saved index, opened memory-mapped, against reading all of it."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{i % 9999:04}/{i % 9999:04}_c{i % 6 + 1}s1_{i:06}_00.jpg" for i in range(len(gallery))]
        GalleryIndex(gallery, make_records(folder, names, grouped=True), "f" * 16, True).save(f"{folder}/a.pt")
        sides = (lambda: GalleryIndex.load(f"{folder}/a.pt"), lambda: torch.load(f"{folder}/a.pt", weights_only=True))
        return common.row(f"open an index of {len(gallery):,}, s", *common.in_turn(sides, rounds), "torch.load")


def benchmark(args):
    for size in args.gallery or ([common.GALLERY] if args.quick else [common.GALLERY, LARGE]):
        centres = F.normalize(torch.randn(max(1, size // 26), DIM, generator=torch.Generator().manual_seed(7)))
        gallery = embeddings(size, 0, centres).half()
        query_counts = args.queries or ([1, 32, 256] if size >= LARGE else [1, 32, 256, common.QUERIES])
        yield from searching(gallery, centres, query_counts, args.rounds)
        if size >= LARGE:
            yield opening(gallery, args.rounds)


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "a gallery of the size of Market-1501's only")
    parser.add_argument("--gallery", type=int, nargs="+", metavar="N", help="sizes (default: 19,732 and 1,000,000)")
    parser.add_argument("--queries", type=int, nargs="+", metavar="N", help="queries at once (default: 1, 32, 256, 3,368)")
    common.run(parser, benchmark)
