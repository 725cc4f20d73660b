"""Groups without labels: scores worked out by hand, average linkage against a plain loop, constraints."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from reid.retrieval.group import agglomerate, evaluate_groups, group, group_scores, same_frame


def test_scores_worked_by_hand():
    """Groups {1, 1, 2}, {2, 2}, {3}: 4 pairs in groups, 4 of people, 2 both. BCubed: (2/3 + 2/3 + 1/3 + 1 + 1 + 1) / 6."""
    found = group_scores(torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 2, 2, 2, 3]))
    assert found.pairwise == pytest.approx((0.5, 0.5, 0.5))
    assert found.bcubed == pytest.approx((7 / 9, 7 / 9, 7 / 9))
    people = math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6  # entropy of 3, 2 and 1 of 6
    left = (math.log(3) - 2 / 3 * math.log(2)) / 2  # of {1, 1, 2}, which is half of the crops
    assert found.v_measure == pytest.approx((1 - left / people,) * 3)


@pytest.mark.parametrize("groups, pairwise, bcubed, v", [
    ([0, 1, 2, 3], (1, 0, 0), (1, 0.5, 2 / 3), (1, 0.5, 2 / 3)),
    ([0, 0, 0, 0], (1 / 3, 1, 0.5), (0.5, 1, 2 / 3), (0, 1, 0)),
    ([7, 7, 5, 5], (1, 1, 1), (1, 1, 1), (1, 1, 1)),
])
def test_scores_of_extreme_groups(groups, pairwise, bcubed, v):
    found = group_scores(torch.tensor(groups), torch.tensor([4, 4, 9, 9]))
    assert (found.pairwise, found.bcubed, found.v_measure) == tuple(map(pytest.approx, (pairwise, bcubed, v)))


def test_distractors_count_as_people_of_their_own_and_junk_never(capsys):
    found = evaluate_groups(torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, 0, -1, -2]))
    assert found["people"]["pairwise"] == (1, 1, 1)
    assert found["with distractors"]["pairwise"] == pytest.approx((1 / 3, 1, 0.5))
    out = capsys.readouterr().out
    assert "6 images in 2 groups, 1 single ones" in out and "people, 2 images of 1 people: pairs 100.00 / 100.00 / 100.00" in out


def plain_linkage(similarity, groups, fixed, link):
    """Merge the most similar pair of groups until none has a mean of `link`, one at a time, from a full matrix."""
    clusters = [[row for row, number in enumerate(groups) if number == name] for name in sorted(set(groups))]
    while True:
        best = None
        for one, other in itertools.combinations(clusters, 2):
            hands = [{fixed[row] for row in part} - {-1} for part in (one, other)]
            mean = similarity[one][:, other].mean().item() if not (hands[0] and hands[1]) else -math.inf
            if mean >= link and (best is None or mean > best[0]):
                best = mean, one, other
        if best is None:
            return {frozenset(cluster) for cluster in clusters}
        clusters = [cluster for cluster in clusters if cluster not in best[1:]] + [best[1] + best[2]]


@pytest.mark.parametrize("seed", range(8))
def test_agglomerate_is_average_linkage_under_constraints(seed):
    generator = torch.Generator().manual_seed(seed)
    count = 24
    dense = torch.rand(count, count, generator=generator, dtype=torch.float64) ** 2
    dense[dense < 0.3] = 0
    dense = dense.triu(1)
    one, other = torch.randint(count, (2, 5), generator=generator)
    dense[torch.minimum(one, other), torch.maximum(one, other)] = -math.inf
    dense = dense.triu(1).nan_to_num(0, neginf=-math.inf)
    groups, fixed = torch.arange(count), torch.full((count,), -1)
    groups[3], fixed[[1, 3]], fixed[5] = 1, 0, 1
    dense[1, 3] = 0
    row, col = dense.nonzero().T
    found = agglomerate(row, col, dense[row, col], groups, fixed, 0.2)
    expected = plain_linkage(dense + dense.T, groups.tolist(), fixed.tolist(), 0.2)
    assert {frozenset((found == number).nonzero()[:, 0].tolist()) for number in found.unique()} == expected
    assert 1 < len(expected) < count - 1


def test_crops_of_one_camera_and_frame_are_two_people_unless_they_are_copies():
    camids, seqs = torch.tensor([1, 1, 1, 2, -1, -1, 1, 1]), torch.tensor([1, 1, 1, 1, 1, 1, 2, 1])
    frames, contents = torch.tensor([5, 5, 5, 5, 5, 5, 5, -1]), torch.tensor([10, 11, 10, 12, 13, 14, 15, 16])
    pairs = same_frame(camids, seqs, frames, contents=contents)
    assert sorted(map(tuple, pairs.tolist())) == [(0, 1), (1, 2)]
    assert same_frame(camids[:1], seqs[:1], frames[:1], contents=contents[:1]).shape == (0, 2)


def people(count, each, dim=64, noise=0.06, seed=0):
    """Embeddings of `each` crops of `count` people, one person after the other."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, dim, generator=generator).repeat_interleave(each, 0)
    return F.normalize(F.normalize(centres) + noise * torch.randn(count * each, dim, generator=generator))


@pytest.mark.parametrize("count, each", [(1, 1), (3, 2), (40, 12)])
def test_clear_people_are_found_in_small_and_larger_galleries(count, each):
    found = group(people(count, each), 0.5)
    assert found.tolist() == torch.arange(count).repeat_interleave(each).tolist()


def test_constraints_are_kept():
    embeddings, together = people(4, 6), torch.full((24,), -1)
    together[[0, 6]] = 0  # one person, though unlike
    together[[12, 13]] = torch.tensor([1, 2])  # two people, though alike
    found = group(embeddings, 0.5, apart=torch.tensor([[18, 19]]), together=together)
    assert found[0] == found[6] and found[12] != found[13] and found[18] != found[19]
    assert found[1] == found[2] and set(found[20:].tolist()) <= set(found[18:20].tolist())
