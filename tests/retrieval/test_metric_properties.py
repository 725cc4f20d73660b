"""Properties of the metrics that hold for any scores and labels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index_lab import same

from reid.retrieval.metrics import evaluate


@st.composite
def rankings(draw):
    """Distinct scores and labels with at least one match from another camera."""
    queries, gallery = draw(st.integers(1, 6)), draw(st.integers(2, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scores = torch.randperm(queries * gallery, generator=generator).view(queries, gallery) / (queries * gallery)
    labels = [torch.randint(low, high, (size,), generator=generator)
              for low, high, size in ((1, 4, queries), (0, 1, queries), (-1, 4, gallery), (0, 3, gallery))]
    labels[2][0], labels[3][0] = labels[0][0], 1
    return scores, labels, generator


properties = settings(max_examples=60, deadline=None)


@properties
@given(rankings())
def test_gallery_order_does_not_matter(case):
    scores, (q_pids, q_camids, g_pids, g_camids), generator = case
    order = torch.randperm(len(g_pids), generator=generator)
    assert same(evaluate(None, None, q_pids, q_camids, g_pids, g_camids, scores=scores),
                evaluate(None, None, q_pids, q_camids, g_pids[order], g_camids[order], scores=scores[:, order]))


@properties
@given(rankings(), st.integers(1, 9))
def test_junk_changes_nothing(case, junk):
    scores, (q_pids, q_camids, g_pids, g_camids), generator = case
    order = torch.randperm(len(g_pids) + junk, generator=generator)
    more = torch.cat([scores, torch.rand(len(scores), junk, generator=generator)], 1)
    pids = torch.cat([g_pids, torch.full((junk,), -1)])
    camids = torch.cat([g_camids, torch.zeros(junk, dtype=torch.long)])
    assert same(evaluate(None, None, q_pids, q_camids, g_pids, g_camids, scores=scores),
                evaluate(None, None, q_pids, q_camids, pids[order], camids[order], scores=more[:, order]))


@properties
@given(rankings())
def test_bounds_and_monotony(case):
    scores, labels, _ = case
    result = evaluate(None, None, *labels, scores=scores)
    assert (result.cmc.diff() >= 0).all() and result.cmc[-1] <= 1
    assert result.mAP - 0.25 - 1e-12 <= result.mAP_trapezoid <= result.mAP + 1e-12
    assert 0 < result.mINP <= 1
    assert result.match_rate[0] == result.rank[1]


@properties
@given(rankings())
def test_perfect_ranking(case):
    scores, labels, _ = case
    result = evaluate(None, None, *labels, scores=scores + (labels[0][:, None] == labels[2]))
    assert (result.mAP, result.mAP_trapezoid, result.mINP, result.rank[1]) == pytest.approx((1, 1, 1, 1), abs=1e-12)
