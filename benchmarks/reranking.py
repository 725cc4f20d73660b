"""k-reciprocal re-ranking: `reid.retrieval.rerank` against the dense numpy way that most repositories copy.

Both alternate in one process and the medians are compared. The peak memory of ours is measured beyond the features. In
full, it is the whole of Market-1501's test: the dense way takes 9 GB for it.

Exactness: float32 cannot order two neighbours whose cosines differ by its rounding, and each side breaks such ties its own
way. So the neighbour lists are compared by themselves, in float64, and the distances with the same lists on both sides.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reid.retrieval import rerank as module
from reid.retrieval.metrics import evaluate
from reid.retrieval.rerank import estimate_bytes, rerank

QUERIES, GALLERY = 3368, 19732  # Market-1501's test
K1, K2 = 20, 6
TIE = 2e-6  # of a cosine: 1,024 float32 products, added, and divided by the maximum of a row
LABELS = ("q_pids", "q_camids", "g_pids", "g_camids")


def random_features(dim=1024, people=750, cameras=6):
    """A cluster for each person, with a part that all share and one that a camera adds."""
    generator = torch.Generator().manual_seed(0)
    pids = torch.randint(1, people + 1, (QUERIES + GALLERY,), generator=generator)
    camids = torch.randint(0, cameras, (QUERIES + GALLERY,), generator=generator)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=1)  # noqa: E731
    x = unit(people + 1, dim)[pids] + 0.5 * unit(cameras, dim)[camids] + 0.7 * unit(1, dim) + 2.6 * unit(len(pids), dim)
    x = torch.nn.functional.normalize(x, dim=1)
    both = {"emb": x, "pids": pids, "camids": camids}
    return {f"q_{k}": v[:QUERIES] for k, v in both.items()} | {f"g_{k}": v[QUERIES:] for k, v in both.items()}


def dense_rerank(q_emb, g_emb, k1=K1, k2=K2, lam=0.3):
    """Final distance [Q, G] and neighbours [Q + G, k1 + 1], with dense [Q + G, Q + G] matrices and a loop over images."""
    x, q = np.concatenate([q_emb, g_emb]), len(q_emb)
    n = len(x)
    distance = 2 - 2 * (x @ x.T)
    distance = np.transpose(distance / distance.max(axis=0))
    order = np.argpartition(distance, range(1, k1 + 1))
    v = np.zeros_like(distance)

    def mutual(i, k):
        near = order[i, : k + 1]
        return near[(order[near, : k + 1] == i).any(axis=1)]

    for i in range(n):
        base = mutual(i, k1)
        members = [base]
        for j in base:
            more = mutual(j, int(np.around(k1 / 2)))
            if len(np.intersect1d(more, base)) > 2 / 3 * len(more):
                members.append(more)
        members = np.unique(np.concatenate(members))
        weight = np.exp(-distance[i, members])
        v[i, members] = weight / weight.sum()
    distance = distance[:q, q:].copy()
    if k2 > 1:
        expanded = np.empty_like(v)
        for i in range(n):
            expanded[i] = v[order[i, :k2]].mean(axis=0)
        v = expanded
    holders = [np.flatnonzero(v[:, i]) for i in range(n)]
    final = np.empty_like(distance)
    for i in range(q):
        overlap = np.zeros(n, dtype=np.float32)
        for j in np.flatnonzero(v[i]):
            overlap[holders[j]] += np.minimum(v[i, j], v[holders[j], j])
        final[i] = (1 - overlap / (2 - overlap))[q:] * (1 - lam) + distance[i] * lam
    return final, order[:, : k1 + 1].copy()


def ties(x, a, b):
    """Where the neighbour lists a and b, [N, k1 + 1], differ as the algorithm uses them, which is as sets of three sizes:
    the rows, and for each the largest difference in float64 of the cosines of those that changed places."""
    rows, gaps = [], []
    for i in (a != b).any(1).nonzero().flatten().tolist():
        cosine = lambda other: x[i].double() @ x[other].double().T  # noqa: E731, B023
        changed = [(sorted({*a[i, :k].tolist()} - {*b[i, :k].tolist()}), sorted({*b[i, :k].tolist()} - {*a[i, :k].tolist()}))
                   for k in (K2, round(K1 / 2) + 1, K1 + 1)]
        gap = [(cosine(one)[:, None] - cosine(other)).abs().max().item() for one, other in changed if one]
        if gap:
            rows.append(i)
            gaps.append(max(gap))
    return rows, torch.tensor(gaps)


def compare_exactly(q_emb, g_emb, scores, final, order):
    """Prints how far the distances of both sides are from each other and why; exits where it is not for ties."""
    x = torch.nn.functional.normalize(torch.cat([q_emb, g_emb]), dim=1)
    neighbours = module._neighbours
    rows, gaps = ties(x, neighbours(x, K1 + 1, 512, None)[0], order)
    module._neighbours = lambda *args: (order, neighbours(*args)[1])
    same_lists = torch.empty_like(scores)
    ours(q_emb, g_emb, same_lists)
    module._neighbours = neighbours
    difference, same = ((1 - s - final).abs_() for s in (scores, same_lists))
    print(f"final distances differ by {difference.max():.1e} at most, {(difference > 1e-4).double().mean():.1e} of them by more "
          f"than 1e-4\nwith the same neighbour lists on both sides: by {same.max():.1e} at most\nneighbour lists with other "
          f"members: {len(rows)} of {len(x)}, whose cosines in float64 are apart by {max(gaps, default=0):.1e} at most")
    if same.max() > 1e-4 or max(gaps, default=0) > TIE:
        sys.exit("reranking.py: error: the two sides differ by more than rounding")


def thinned(x, n):
    return x[torch.arange(n) * len(x) // n]


def memory_mb(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1000


def ours(q_emb, g_emb, out):
    """The scores into `out`, and how many MB it took at the peak (None where /proc is missing)."""
    proc = Path("/proc/self/clear_refs")
    if proc.exists():
        ctypes.CDLL(None).malloc_trim(0)
        proc.write_text("5")  # the peak starts anew
        before = memory_mb("VmRSS")
    ranked = rerank(q_emb, g_emb)
    for i in range(0, len(q_emb), 256):
        out[i : i + 256] = ranked.scores(i, min(i + 256, len(q_emb)))
    return memory_mb("VmHWM") - before if proc.exists() else None


def timed(run, *args):
    start = time.perf_counter()
    result = run(*args)
    return time.perf_counter() - start, result


def main(args):
    data = torch.load(args.features, weights_only=True) if args.features else random_features()
    if args.quick:
        data = {name: thinned(x, 400 if name[0] == "q" else 6000) for name, x in data.items() if torch.is_tensor(x)}
    q_emb, g_emb = data["q_emb"], data["g_emb"]
    queries, gallery = len(q_emb), len(g_emb)
    scores = torch.zeros(queries, gallery)
    ours(q_emb, g_emb, scores)  # warms up
    times, peaks = {"ours": [], "dense": []}, []
    for _ in range(args.rounds):
        seconds, peak = timed(ours, q_emb, g_emb, scores)
        times["ours"].append(seconds)
        peaks.append(peak)
        seconds, (final, order) = timed(dense_rerank, q_emb.numpy(), g_emb.numpy())
        times["dense"].append(seconds)
    final, order = torch.from_numpy(final), torch.from_numpy(order)
    print(f"{queries} queries x {gallery} gallery")
    compare_exactly(q_emb, g_emb, scores, final, order)
    labels = [data[name] for name in LABELS]
    for name, given in (("visual", q_emb @ g_emb.T), ("ours", scores), ("dense", 1 - final)):
        result = evaluate(None, None, *labels, scores=given)
        print(f"{name:7} mAP {100 * result.mAP:.3f} Rank-1 {100 * result.rank[1]:.2f}")
    seconds = {name: statistics.median(values) for name, values in times.items()}
    rows = [{"name": "re-ranking, s", "ours": seconds["ours"], "peer": seconds["dense"], "peer_name": "dense numpy"}]
    if peaks[0] is not None:
        estimate = estimate_bytes(queries, gallery, q_emb.shape[1]) / 1e6
        rows.append({"name": "extra memory, MB", "ours": max(peaks), "peer": estimate, "peer_name": "estimate_bytes"})
    for row in rows:
        row["ratio"] = row["peer"] / row["ours"]
        print("{name:20} ours {ours:8.2f}   {peer_name} {peer:8.2f}   ratio {ratio:.1f}".format(**row))
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", help="a .pt dict of q_emb, g_emb and their pids, camids (default: random)")
    parser.add_argument("--quick", action="store_true", help="400 queries against 6,000 images")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", help="write the rows to this file")
    main(parser.parse_args())
