"""The metrics against cases worked out on paper and an independent slow loop."""

import math

import pytest
import torch
from index_lab import same

from reid import ReidError
from reid.retrieval.metrics import REASONS, bootstrap, camera_table, evaluate, pool_queries, roc, single_shot


def tensors(*columns):
    return [torch.tensor(column) for column in columns]


def one_query(scores, pids, camids, **options):
    """A query of person 1 in camera 1 against a gallery with these scores."""
    labels = tensors([1], [1], pids, camids)
    return evaluate(None, None, *labels, scores=torch.tensor([scores]), **options)


# ---- worked out on paper

def test_junk_own_camera_and_distractor():
    result = one_query([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [-1, 1, 0, 1, 2, 1], [2, 1, 2, 2, 2, 3])
    # junk first and the own-camera image do not count: wrong (0), right, wrong (2), right, so matches at 2 and 4
    assert result.ap.tolist() == [(1 / 2 + 2 / 4) / 2]
    # before the first match precision is 0/1, before the second 1/3: ((0 + 1/2)/2 + (1/3 + 2/4)/2) / 2 = (1/4 + 5/12)/2
    assert result.mAP_trapezoid == pytest.approx(1 / 3, abs=1e-12)
    assert result.mINP == 2 / 4
    assert result.cmc[:5].tolist() == [0, 1, 1, 1, 1]
    assert result.match_rate[:5].tolist() == [0, 1, 0, 1, 0]
    assert result.rank == {1: 0.0, 5: 1.0, 10: 1.0, 20: 1.0}
    assert (result.valid, result.skipped, result.first_rank.tolist(), result.matches.tolist()) == (1, {}, [2], [2])


def test_without_cameras_only_junk_is_ignored():
    result = one_query([0.9, 0.8, 0.7, 0.6], [-1, 1, 0, 1], [2, 1, 2, 2], protocol="nocam")
    # right, wrong (0), right: (1/1 + 2/3) / 2, and by trapezoids (1 + (1/2 + 2/3)/2) / 2
    assert result.mAP == pytest.approx(5 / 6, abs=1e-12)
    assert result.mAP_trapezoid == pytest.approx(19 / 24, abs=1e-12)


def test_unknown_camera_is_never_the_own_camera():
    result = evaluate(None, None, *tensors([1], [-1], [2, 1], [-1, -1]), scores=torch.tensor([[0.9, 0.8]]))
    assert result.first_rank.tolist() == [2]


@pytest.mark.parametrize("scores, pids, first, ap", [
    ([0.5, 0.5, 0.5, 0.5], [2, 1, 3, 1], 2, (1 / 2 + 2 / 4) / 2),  # all equal: gallery order
    ([0.5, 0.5], [1, 2], 1, 1.0),
    ([0.5, 0.5], [2, 1], 2, 1 / 2),
    ([0.0, -0.0], [2, 1], 2, 1 / 2),  # both zeros are one score
    ([-0.0, 0.0], [2, 1], 2, 1 / 2),
    ([0.3, 0.7, 0.7, 0.7, 0.7], [1, 2, 1, 1, 3], 2, (1 / 2 + 2 / 3 + 3 / 5) / 3),  # two duplicates between wrong ones
    ([math.inf, 0.0, -math.inf], [2, 1, 1], 2, (1 / 2 + 2 / 3) / 2),
])
def test_ties_rank_in_gallery_order(scores, pids, first, ap):
    result = one_query(scores, pids, [2] * len(pids))
    assert result.first_rank.tolist() == [first]
    assert result.mAP == pytest.approx(ap, abs=1e-12)


def test_own_camera_duplicate_of_a_match_does_not_count():
    # own camera, match and wrong image with one score: the match is second in the row, but first of those that count
    assert one_query([0.5, 0.5, 0.5], [1, 1, 2], [1, 2, 2]).first_rank.tolist() == [1]


def test_one_image():
    result = one_query([0.1], [1], [2])
    assert (result.mAP, result.mAP_trapezoid, result.mINP, result.rank[1]) == (1, 1, 1, 1)
    assert result.cmc.tolist() == [1] * 20 and result.match_rate.tolist() == [1] + [0] * 19


def test_skipped_queries_are_counted_not_averaged():
    q_pids, q_camids, q_ids = [1, 2, 3, 0, -1, 4, 1], [1, 1, 1, 1, 1, 1, 2], [10, 11, 12, 13, 14, 15, 16]
    g_pids, g_camids, g_ids = [1, 3, 0, -1, 4], [2, 1, 1, 1, 2], [20, 21, 22, 23, 15]
    result = evaluate(None, None, *tensors(q_pids, q_camids, g_pids, g_camids), scores=torch.zeros(7, 5),
                      q_ids=torch.tensor(q_ids), g_ids=torch.tensor(g_ids))
    assert result.reason.tolist() == [0, 2, 3, 1, 1, 4, 3]
    assert result.skipped == {REASONS[1]: 2, REASONS[2]: 1, REASONS[3]: 2, REASONS[4]: 1}
    assert (result.valid, result.mAP, result.rank[1]) == (1, 1.0, 1.0)
    assert result.ap.isnan().tolist() == [False] + [True] * 6


@pytest.mark.parametrize("pids, why", [([2, 3], REASONS[2]), ([-1, -1], REASONS[2])])
def test_nothing_to_average_is_an_error(pids, why):
    with pytest.raises(ReidError, match=f"none of the 1 queries.*{why}: 1"):
        one_query([0.2, 0.1], pids, [2, 2])


def test_own_file_is_ignored_under_any_id_and_protocol():
    for protocol in ("market", "nocam"):
        # the own file comes first, once with the right id and once (mislabelled) as another person
        result = one_query([0.9, 0.8, 0.7, 0.6], [1, 2, 3, 1], [2, 2, 2, 2], protocol=protocol,
                           q_ids=torch.tensor([7]), g_ids=torch.tensor([7, 7, 8, 9]))
        assert result.mAP == 1 / 2 and result.matches.tolist() == [1]  # wrong (3), right


# ---- an independent loop, written from the protocol

def slow(scores, q_pids, q_camids, g_pids, g_camids, q_ids, g_ids, cameras):
    values = []
    for i, pid in enumerate(q_pids):
        ranked = []
        for j in sorted(range(len(g_pids)), key=lambda j: (-scores[i][j], j)):
            own_camera = cameras and g_pids[j] == pid and g_camids[j] == q_camids[i] >= 0
            if g_pids[j] != -1 and not own_camera and q_ids[i] != g_ids[j]:
                ranked.append(g_pids[j] == pid)
        if pid <= 0 or not any(ranked):
            values.append(None)
            continue
        ap = trapezoid = found = 0
        old_precision = 1
        for place, right in enumerate(ranked, start=1):
            found += right
            if right:
                ap += found / place / sum(ranked)
                trapezoid += (old_precision + found / place) / 2 / sum(ranked)
            old_precision = found / place
        last = max(place for place, right in enumerate(ranked, start=1) if right)
        values.append((ap, trapezoid, sum(ranked) / last, ranked))
    return values


def random_case(seed, queries=23, gallery=90, levels=12):
    """Scores on a few levels, so that most are tied; some queries are gallery images too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *size):
        return torch.randint(low, high, size, generator=generator)

    labels = [draw(-1, 7, queries), draw(-1, 4, queries), draw(-1, 6, gallery), draw(-1, 4, gallery)]
    ids = {"q_ids": draw(0, 60, queries), "g_ids": draw(0, 600, gallery)}
    return draw(0, levels, queries, gallery) / 8 - 0.5, labels, ids


@pytest.mark.parametrize("protocol", ["market", "nocam"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [1, 12, 10**6])
def test_equals_the_slow_loop(seed, protocol, levels):
    scores, labels, ids = random_case(seed, levels=levels)
    result = evaluate(None, None, *labels, **ids, scores=scores, protocol=protocol, block=7)
    columns = [x.tolist() for x in (scores, *labels, *ids.values())]
    expected = slow(*columns, cameras=protocol == "market")
    assert (result.reason == 0).tolist() == [value is not None for value in expected]
    valid = [value for value in expected if value]
    assert result.valid == len(valid) and sum(result.skipped.values()) == len(expected) - len(valid)
    for got, position in ((result.mAP, 0), (result.mAP_trapezoid, 1), (result.mINP, 2)):
        assert got == pytest.approx(sum(value[position] for value in valid) / len(valid), abs=1e-12)
    assert result.ap[result.reason == 0].tolist() == pytest.approx([value[0] for value in valid], abs=1e-12)
    ranked = [value[3] for value in valid]
    for curve, share in ((result.cmc, lambda right, k: any(right[:k])),
                         (result.match_rate, lambda right, k: any(right[k - 1:k]))):
        expected = [sum(share(right, k) for right in ranked) / len(ranked) for k in range(1, 21)]
        assert curve.tolist() == pytest.approx(expected, abs=1e-12, rel=0)


def clustered(seed=0, queries=40, gallery=300, people=12, dim=16):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(people + 1, dim, generator=generator)
    labels = [torch.randint(low, high, (size,), generator=generator)
              for low, high, size in ((1, people + 1, queries), (0, 4, queries),
                                      (-1, people + 1, gallery), (0, 4, gallery))]
    emb = [torch.nn.functional.normalize(centres[pids] + torch.randn(len(pids), dim, generator=generator), dim=1)
           for pids in labels[::2]]
    return emb, labels


@pytest.mark.parametrize("block", [1, 7, None])
def test_embeddings_matrix_and_callable_agree(block):
    (q, g), labels = clustered()
    scores = q @ g.T
    # rounding differs with the shape of a product, so the embeddings are ones whose products are exact
    q, g = (q * 64).round() / 64, (g * 64).round() / 64
    scores = q @ g.T
    expected = evaluate(None, None, *labels, scores=scores)
    assert same(evaluate(q, g, *labels, block=block), expected)
    assert same(evaluate(None, None, *labels, scores=lambda start, stop: scores[start:stop], block=block), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu():
    scores, labels, ids = random_case(1)
    data = [x.cuda() for x in labels]
    gpu = evaluate(None, None, *data, scores=scores.cuda(), **{name: x.cuda() for name, x in ids.items()})
    cpu = evaluate(None, None, *labels, scores=scores, **ids)
    assert gpu.first_rank.equal(cpu.first_rank) and gpu.mAP == pytest.approx(cpu.mAP, abs=1e-12)
    assert roc(None, None, *data, scores=scores.cuda()).tpr == roc(None, None, *labels, scores=scores).tpr


# ---- the rest of the module

@pytest.mark.parametrize("levels", [12, 10**6])
def test_roc_equals_brute_force(levels):
    scores, (q_pids, q_camids, g_pids, g_camids), _ = random_case(3, queries=50, gallery=300, levels=levels)
    scores = scores / scores.abs().max()
    rates = (1e-3, 1e-2, 0.3)
    result = roc(None, None, q_pids, q_camids, g_pids, g_camids, scores=scores, rates=rates, bins=16, block=9)
    right = q_pids[:, None] == g_pids
    counts = (q_pids[:, None] > 0) & (g_pids != -1) & ~(right & (q_camids[:, None] == g_camids) & (g_camids >= 0))
    positive, negative = scores[counts & right], scores[counts & ~right]
    assert (result.same_pairs, result.different_pairs) == (len(positive), len(negative))
    for rate, threshold in result.threshold.items():
        assert (negative > threshold).double().mean() <= rate < (negative >= threshold).double().mean()
        assert result.tpr[rate] == pytest.approx((positive > threshold).double().mean().item())
    assert torch.equal(result.same_histogram, torch.histc(positive, 16, -1, 1).long())
    assert torch.equal(result.different_histogram, torch.histc(negative, 16, -1, 1).long())
    assert result.edges[[0, -1]].tolist() == [-1, 1] and len(result.edges) == 17


def test_roc_needs_both_kinds_of_pairs():
    with pytest.raises(ReidError, match="1 same-id and 0 different-id"):
        roc(None, None, *tensors([1], [1], [1], [2]), scores=torch.ones(1, 1))


@pytest.mark.parametrize("protocol", ["market", "nocam"])
def test_camera_table_equals_evaluating_the_parts(protocol):
    (q, g), (q_pids, q_camids, g_pids, g_camids) = clustered()
    scores = q @ g.T
    table = camera_table(None, None, q_pids, q_camids, g_pids, g_camids, scores=scores, protocol=protocol, block=11)
    assert table.cameras == [0, 1, 2, 3]
    for a in range(4):
        for b in range(4):
            mine, theirs = q_camids == a, g_camids == b
            if a == b and protocol == "market":
                assert table.mAP[a, b].isnan() and table.queries[a, b] == 0
                continue
            part = evaluate(None, None, q_pids[mine], q_camids[mine], g_pids[theirs], g_camids[theirs],
                            scores=scores[mine][:, theirs], protocol=protocol)
            assert table.mAP[a, b] == pytest.approx(part.mAP) and table.rank1[a, b] == pytest.approx(part.rank[1])
            assert table.queries[a, b] == part.valid


def test_single_shot():
    (q, g), labels = clustered()
    first, again, other = (single_shot(q, g, *labels, repeats=3, seed=seed, ks=(1, 5)) for seed in (0, 0, 1))
    assert first == again != other and first["mAP"][1] > 0 and set(first) == {"mAP", "mINP", "rank1", "rank5"}
    # a gallery with one image of each person and camera, and two distractors of one camera, leaves nothing to draw
    q_pids, q_camids, g_pids, g_camids = tensors([1, 2], [0, 0], [0, 1, 2, 0, 1], [1, 1, 1, 1, 2])
    scores = torch.tensor([[0.9, 0.5, 0.4, 0.8, 0.7], [0.6, 0.1, 0.5, 0.7, 0.2]])
    drawn = single_shot(None, None, q_pids, q_camids, g_pids, g_camids, scores=scores, repeats=2)
    assert drawn["mAP"] == (evaluate(None, None, q_pids, q_camids, g_pids, g_camids, scores=scores).mAP, 0)


def test_single_shot_draws_one_image_of_each_person_and_camera():
    # ten images of one person in one camera, all but one ranked behind the wrong image: Rank-1 is 1 in a tenth of draws
    q_pids, q_camids, g_pids, g_camids = tensors([1], [0], [1] * 10 + [2], [1] * 11)
    scores = torch.tensor([[0.9] + [0.1] * 9 + [0.5]])
    drawn = single_shot(None, None, q_pids, q_camids, g_pids, g_camids, scores=scores, repeats=400)
    assert drawn["rank1"][0] == pytest.approx(0.1, abs=0.05)
    assert drawn["mAP"][0] == pytest.approx(drawn["rank1"][0] + (1 - drawn["rank1"][0]) / 2)  # its rank is 1 or 2


def test_bootstrap():
    (q, g), labels = clustered()
    result = evaluate(q, g, *labels)
    worse = evaluate(q + 0.3 * torch.randn(q.shape, generator=torch.Generator().manual_seed(0)), g, *labels)
    interval = bootstrap(result)["mAP"]
    assert interval.low < interval.value < interval.high and interval.value == pytest.approx(result.mAP)
    assert bootstrap(result) == bootstrap(result) != bootstrap(result, seed=1)
    ap = result.ap[result.ap.isfinite()]
    error = 1.96 * float(ap.std()) / math.sqrt(len(ap))  # the normal approximation
    assert interval.high - interval.low == pytest.approx(2 * error, rel=0.15)
    assert bootstrap(result, result)["mAP"] == (0, 0, 0)
    paired = bootstrap(result, worse)["mAP"]
    assert paired.value == pytest.approx(result.mAP - worse.mAP) and paired.low < paired.value < paired.high
    with pytest.raises(ReidError, match="do not pair"):
        bootstrap(result, evaluate(q[:5], g, *(x[:5] for x in labels[:2]), *labels[2:]))


def test_pool_queries():
    emb = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    pids, camids = tensors([5, 5, 5, 0, 0], [1, 1, 2, 1, 1])
    pooled, pooled_pids, pooled_camids, group = pool_queries(emb, pids, camids)
    assert pooled_pids[group].tolist() == pids.tolist() and pooled_camids[group].tolist() == camids.tolist()
    assert len(pooled) == 4 and group[0] == group[1] and group[3] != group[4]  # distractors are not one person
    half = math.sqrt(0.5)
    assert torch.allclose(pooled[group], torch.tensor([[half, half], [half, half], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("change, message", [
    ({"protocol": "cuhk"}, "protocol 'cuhk' is unknown"),
    ({"q_ids": torch.zeros(1)}, "one side only"),
    ({"q_ids": torch.zeros(1), "g_ids": torch.zeros(3)}, "gallery ids have shape"),
    ({"scores": torch.zeros(2, 2)}, "do not fit"),
    ({"scores": torch.zeros(1, 2, dtype=torch.float64)}, "pass float32"),
    ({"scores": torch.tensor([[0.1, math.nan]])}, "contain NaN"),
    ({"scores": lambda start, stop: torch.zeros(1, 3)}, r"not \(1, 2\)"),
])
def test_mistakes_are_named(change, message):
    with pytest.raises(ReidError, match=message):
        evaluate(None, None, *tensors([1], [1], [1, 2], [2, 2]), **({"scores": torch.zeros(1, 2)} | change))


def test_embeddings_that_do_not_fit():
    with pytest.raises(ReidError, match="with one D"):
        evaluate(torch.zeros(1, 4), torch.zeros(2, 5), *tensors([1], [1], [1, 2], [2, 2]))
    with pytest.raises(ReidError, match="nothing to evaluate"):
        evaluate(torch.zeros(0, 4), torch.zeros(2, 4), *tensors([], [], [1, 2], [2, 2]))
