"""Speed and memory of k-reciprocal re-ranking: `reid.retrieval.rerank` against the dense numpy code that is widely copied.

In full it is the test set of Market-1501, for which the dense code takes 9 GB. float32 cannot order two neighbours whose
cosines differ by its rounding, and each side breaks such ties in its own way, which changes a few final distances: at most
one in a thousand may differ by more than 1e-4.
"""

import common
import numpy as np
import torch

from reid import ReidError
from reid.retrieval.metrics import evaluate
from reid.retrieval.rerank import estimate_bytes, rerank

K1, K2 = 20, 6


def dense_rerank(q_emb, g_emb, k1=K1, k2=K2, lam=0.3):
    """Return the final distance, float32 [Q, G], with dense [Q + G, Q + G] matrices and a loop over images.

    The method is k-reciprocal encoding: Zhong et al., Re-ranking Person Re-identification, CVPR 2017.
    """
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


def benchmark(args):
    sizes = (400, 6000) if args.quick else (common.QUERIES, common.GALLERY)
    data = common.features(args.features, *sizes)
    q_emb, g_emb, peaks = data["q_emb"], data["g_emb"], []
    scores, dense = torch.zeros(len(q_emb), len(g_emb)), {}

    def ours():
        ranked = rerank(q_emb, g_emb)
        for i in range(0, len(q_emb), 256):
            scores[i : i + 256] = ranked.scores(i, min(i + 256, len(q_emb)))

    ours()  # the first call is not timed
    seconds = common.in_turn((lambda: peaks.append(common.peak_memory(ours)[1]),
                              lambda: dense.update(final=dense_rerank(q_emb.numpy(), g_emb.numpy()))), args.rounds)
    final = torch.from_numpy(dense["final"])
    for name, given in (("without", q_emb @ g_emb.T), ("ours", scores), ("dense", 1 - final)):
        result = evaluate(None, None, *(data[label] for label in common.LABELS), scores=given)
        print(f"{name:7} mAP {100 * result.mAP:.3f} Rank-1 {100 * result.rank[1]:.2f}")
    difference = (1 - scores - final).abs()
    apart = difference > 1e-4
    share, rest = apart.double().mean().item(), difference[~apart].max().item()
    print(f"distances that differ by more than 1e-4: {share:.1e} of all; the others differ by at most {rest:.1e}")
    if share > 1e-3:
        raise ReidError("the two sides differ by more than rounding")
    yield common.row(f"re-ranking, {len(q_emb):,} queries in {len(g_emb):,}, s", *seconds, "dense numpy",
                     share_apart=share, largest_other_difference=rest)
    estimate = estimate_bytes(*scores.shape, q_emb.shape[1]) / 1e6
    yield common.row("peak memory beyond the embeddings, MB", [max(peaks)], [estimate], "estimate_bytes")


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "400 queries against 6,000 images", rounds=2)
    parser.add_argument("--features", metavar="PATH", help="a .pt dict of q_emb, g_emb, their pids and camids (default: random)")
    common.run(parser, benchmark)
