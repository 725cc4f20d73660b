"""k-reciprocal re-ranking: `reid.rerank` against the dense numpy way that most repositories copy.

Both alternate in one process and the medians are compared; the final distances must agree. The peak memory of ours is
measured beyond the features. In full, it is the whole of Market-1501's test: the dense way takes 9 GB for it.
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
from reid.metrics import evaluate
from reid.rerank import estimate_bytes, rerank

QUERIES, GALLERY = 3368, 19732  # Market-1501's test
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


def dense_rerank(q_emb, g_emb, k1=20, k2=6, lam=0.3):
    """Final distance [Q, G] with dense [Q+G, Q+G] matrices and a Python loop over images."""
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
    return final


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
        seconds, final = timed(dense_rerank, q_emb.numpy(), g_emb.numpy())
        times["dense"].append(seconds)
    difference = (1 - scores - torch.from_numpy(final)).abs()
    print(f"{queries} queries x {gallery} gallery; differences of the final distances: {difference.max():.1e} at most, "
          f"{(difference > 1e-4).double().mean():.1e} of them above 1e-4 (near ties that rounding broke the other way)")
    labels = [data[name] for name in LABELS]
    for name, given in (("visual", q_emb @ g_emb.T), ("ours", scores), ("dense", 1 - torch.from_numpy(final))):
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
