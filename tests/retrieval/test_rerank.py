"""Re-ranking against a dense numpy version written from the paper (arXiv 1701.08398, sections 3.2 to 3.5)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reid import ReidError
from reid.retrieval import rerank as module
from reid.retrieval.rerank import estimate_bytes, rerank


def dense_rerank(q_emb, g_emb, k1=20, k2=6, lam=0.3):
    """Final distances [Q, G] the slow and obvious way: sets as Python sets, V as one dense matrix."""
    x = torch.cat([q_emb, g_emb]).double().numpy()
    n, q = len(x), len(q_emb)
    d = 2 - 2 * x @ x.T
    d = d / d.max(axis=1, keepdims=True)
    order = np.argsort(d, axis=1, kind="stable")

    def reciprocal(i, k):  # R(i, k): i's k nearest that have i among theirs; a row is its own nearest, hence + 1
        return {j for j in order[i, : k + 1] if i in order[j, : k + 1]}

    half = int(np.around(k1 / 2))
    v = np.zeros((n, n))
    for i in range(n):
        base = reciprocal(i, k1)
        grown = set(base)
        for j in base:
            more = reciprocal(j, half)
            if 3 * len(more & base) > 2 * len(more):
                grown |= more
        members = sorted(grown)
        v[i, members] = np.exp(-d[i, members])
        v[i] /= max(v[i].sum(), 1e-12)
    if k2 > 1:
        v = np.stack([v[order[i, :k2]].mean(0) for i in range(n)])
    final = np.empty((q, n - q))
    for i in range(q):
        jaccard = 1 - np.minimum(v[i], v[q:]).sum(1) / np.maximum(v[i], v[q:]).sum(1).clip(1e-12)
        final[i] = (1 - lam) * jaccard + lam * d[i, q:]
    return final


def clustered(q, g, dim=32, ids=12, noise=0.8, seed=0):
    """Embeddings of a few identities, all with a common part, so that neighbourhoods are worth re-ranking."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(ids, dim, generator=generator)
    ids = torch.randint(0, ids, (q + g,), generator=generator)
    x = F.normalize(centre[ids] + noise * torch.randn(q + g, dim, generator=generator) + 0.5, dim=1)
    return x[:q], x[q:]


def final_distance(q_emb, g_emb, **settings):
    return 1 - rerank(q_emb, g_emb, **settings).scores(0, len(q_emb)).numpy()


@pytest.mark.parametrize(
    "q, g, settings",
    [
        (30, 170, {}),
        (100, 500, {}),
        (70, 130, {"k1": 6, "k2": 3, "lam": 0.1}),
        (20, 80, {"k1": 5, "k2": 1, "lam": 0.0}),  # no query expansion; 5 / 2 is rounded to even
        (20, 80, {"k1": 7, "k2": 12, "lam": 1.0}),  # expansion wider than the neighbourhood
        (1, 100, {}),
        (1, 12, {}),  # the best few of one query: fewer rows than k1
        (3, 2, {}),
        (1, 1, {}),
    ],
)
def test_equals_the_dense_version(q, g, settings):
    q_emb, g_emb = clustered(q, g)
    expected = dense_rerank(q_emb, g_emb, **settings)
    np.testing.assert_allclose(final_distance(q_emb, g_emb, **settings), expected, atol=1e-4)


def test_re_ranking_changes_the_order():
    q_emb, g_emb = clustered(40, 400, noise=1.2)
    plain = (q_emb @ g_emb.T).argsort(1, descending=True)
    assert not torch.equal(plain, torch.from_numpy(final_distance(q_emb, g_emb)).argsort(1))


@pytest.mark.parametrize("noise", [0.02, 0.5])  # with the first, bf16 cannot tell the neighbours apart
def test_bf16_shortlist_is_exact(monkeypatch, noise):
    x = torch.cat(clustered(100, 1201, dim=64, ids=40, noise=noise))
    x[7] = -F.normalize(x.sum(0), dim=0)  # has only negative cosines
    monkeypatch.setattr(module, "_fast_bf16", lambda x: False)
    full = module._neighbours(x, 6, 200, None)
    monkeypatch.setattr(module, "_fast_bf16", lambda x: True)
    short = module._neighbours(x, 6, 200, None)
    chosen = [(x[:, None] * x[rank]).sum(2) for rank in (full[0], short[0])]  # ties may be broken either way
    torch.testing.assert_close(*chosen, atol=1e-6, rtol=0)
    torch.testing.assert_close(full[1], short[1], atol=5e-4, rtol=0)


def test_bonus_counts_as_similarity(monkeypatch):
    """A bonus that is a cosine itself: the same as re-ranking the embeddings of both, side by side."""
    q_emb, g_emb = clustered(40, 1300, ids=60)
    extra = F.normalize(torch.randn(1340, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    joint = torch.cat([torch.cat([q_emb, g_emb]), extra], 1) / 2**0.5
    expected = rerank(joint[:40], joint[40:], k1=6).scores(0, 40)
    for fast in (False, True):
        monkeypatch.setattr(module, "_fast_bf16", lambda x, fast=fast: fast)
        # (a + b) / 2 = a + bonus, once the distances, which are normalised, are halved: bonus = b - 1
        ours = rerank(q_emb, g_emb, k1=6, bonus=lambda i, j: (extra[i] * extra[j]).sum(-1) - 1).scores(0, 40)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    q=st.integers(1, 20), g=st.integers(1, 60), k1=st.integers(1, 25), k2=st.integers(1, 8), block=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_property_any_block_gives_the_dense_result(q, g, k1, k2, block, seed):
    q_emb, g_emb = clustered(q, g, ids=5, seed=seed)
    ours = rerank(q_emb, g_emb, k1, k2, block=block)
    parts = torch.cat([ours.scores(i, min(q, i + block)) for i in range(0, q, block)])
    torch.testing.assert_close(parts, ours.scores(0, q), atol=1e-6, rtol=0)
    np.testing.assert_allclose(1 - parts.numpy(), dense_rerank(q_emb, g_emb, k1, k2), atol=1e-4)


def test_duplicates_stay_finite_and_equal():
    q_emb, g_emb = clustered(5, 20)
    crowd = torch.cat([g_emb, q_emb[:1].expand(60, -1)])  # more copies of one image than k1: rows that miss themselves
    scores = rerank(q_emb, crowd).scores(0, 5)
    assert scores.isfinite().all()
    assert scores[0].argmax() >= 20
    same = rerank(q_emb[:1].expand(3, -1), q_emb[:1].expand(30, -1)).scores(0, 3)
    assert same.isfinite().all()


def test_estimate_covers_the_encoding_and_grows_with_the_gallery():
    assert estimate_bytes(3368, 19732) < 1 << 30
    assert estimate_bytes(1, 100) < estimate_bytes(1, 10_000) < estimate_bytes(1, 1_000_000)


@pytest.mark.parametrize(
    "q_emb, g_emb, settings, word",
    [
        (torch.ones(2, 4), torch.ones(3, 5), {}, "5"),
        (torch.ones(2, 4), torch.ones(0, 4), {}, "empty"),
        (torch.ones(2, 4), torch.full((3, 4), torch.nan), {}, "finite"),
        (torch.ones(2, 4), torch.ones(3, 4), {"k1": 0}, "k1"),
        (torch.ones(2, 4), torch.ones(3, 4), {"k2": 0}, "k2"),
        (torch.ones(2, 4), torch.ones(3, 4), {"lam": 1.5}, "lam"),
    ],
)
def test_bad_input_is_one_clear_line(q_emb, g_emb, settings, word):
    with pytest.raises(ReidError, match=word):
        rerank(q_emb, g_emb, **settings)
