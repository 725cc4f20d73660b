"""Group crops without labels into people: average linkage of re-ranked similarities, with constraints. Tensors only.

The similarity of two crops is the Jaccard index of their k-reciprocal encodings (`reid.retrieval.rerank`), that of two groups
the mean over all pairs of their crops. Average linkage is exact although the graph is sparse, since pairs that share no neighbour
have similarity 0. All pairs of groups that are each other's most similar are merged at once. That gives the groups of merging the
best pair one by one, because a merged group is never more similar to another one than both of its parts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from reid.data.names import DISTRACTOR
from reid.retrieval.rerank import jaccard_pairs

K1, K2 = 20, 6
THRESHOLD = 0.4  # cosine, where none is measured
FLOOR = 0.02  # Jaccard index below which two crops count as 0, which bounds the memory
LINK = 0.1  # mean Jaccard index above which two groups are one person


def group(embeddings: Tensor, threshold: float, apart: Tensor | None = None, together: Tensor | None = None) -> Tensor:
    """Return the group of each crop, int64 [N], numbered from 0 in the order of their first crops.

    embeddings: float [N, D]. threshold: cosine below which two crops have similarity 0. apart: int64 [P, 2], pairs of crops of
    different people. together: int64 [N]: crops with the same number of 0 or more are one person, those with two of these numbers
    are two; -1 for free crops.
    """
    low, high, similarity = jaccard_pairs(embeddings, K1, K2, FLOOR, threshold)
    count = len(embeddings)
    start = torch.arange(count)
    if together is not None and (together >= 0).any():
        held = together >= 0
        first = torch.full((int(together.max()) + 1,), count).scatter_reduce(0, together[held], start[held], "amin")
        start[held] = first[together[held]]
    fixed = torch.full((count,), -1) if together is None else together
    if apart is not None and len(apart):
        low, high = torch.cat([low, apart[:, 0]]), torch.cat([high, apart[:, 1]])
        similarity = torch.cat([similarity, similarity.new_full((len(apart),), -torch.inf)])
    return agglomerate(low, high, similarity, start, fixed, LINK)


def agglomerate(one: Tensor, other: Tensor, similarity: Tensor, groups: Tensor, fixed: Tensor, link: float) -> Tensor:
    """Merge groups while the mean similarity of the crops of two is at least `link`; return those of `group`.

    one, other: int64 [E], pairs of crops, each once; similarity: float [E], -inf for pairs that must never be in one group. All
    other pairs have similarity 0. groups: int64 [N], the groups to start with, named by their first crop. fixed: as `together` of
    `group`.
    """
    count = len(groups)
    size = torch.bincount(groups, minlength=count).double()
    fixed = fixed.clone()
    one, other, total = _joined(groups[one], groups[other], similarity.double(), count)
    while True:
        mean = total / (size[one] * size[other])
        mean[(fixed[one] >= 0) & (fixed[other] >= 0)] = -torch.inf
        order = (mean >= link).nonzero()[:, 0]
        if not len(order):
            return groups.unique(return_inverse=True)[1]
        order = order[mean[order].argsort(descending=True, stable=True)]
        rank = torch.arange(len(order))
        best = torch.full((count,), count * count).scatter_reduce(0, one[order], rank, "amin").scatter_reduce(
            0, other[order], rank, "amin")
        chosen = order[(best[one[order]] == rank) & (best[other[order]] == rank)]
        kept, gone = one[chosen], other[chosen]
        parent = torch.arange(count)
        parent[gone] = kept
        size[kept] += size[gone]
        fixed[kept] = torch.maximum(fixed[kept], fixed[gone])
        groups = parent[groups]
        touched = torch.zeros(count, dtype=torch.bool).index_fill_(0, torch.cat([kept, gone]), True)
        changed = touched[one] | touched[other]  # only pairs of these groups can have become the same pair
        joined = _joined(parent[one[changed]], parent[other[changed]], total[changed], count)
        one, other, total = (torch.cat([old[~changed], new]) for old, new in zip((one, other, total), joined))


def _joined(one: Tensor, other: Tensor, total: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the totals of the same two groups, the smaller number first; pairs within a group are dropped."""
    different = one != other
    key = (torch.minimum(one, other) * count + torch.maximum(one, other))[different]
    key, place = key.unique(return_inverse=True)
    return key // count, key % count, total.new_zeros(len(key)).index_add_(0, place, total[different])


def same_frame(*columns: Tensor, contents: Tensor) -> Tensor:
    """Return the pairs of crops, int64 [P, 2], that one camera has seen in one frame: two people.

    columns: camera, sequence and frame, int64 [N]; a crop without camera or frame has no such pairs. contents: int64 [N], -1 for
    unknown: copies of one image are the same person.
    """
    known = ((columns[0] >= 0) & (columns[-1] >= 0)).nonzero()[:, 0]
    key = torch.stack([column[known] for column in columns], 1).unique(dim=0, return_inverse=True)[1]
    key, order = key.sort(stable=True)
    rows, pairs = known[order], []
    for step in range(1, len(rows)):
        same = (key[step:] == key[:-step]).nonzero()[:, 0]
        if not len(same):
            break
        pairs.append(torch.stack([rows[same], rows[same + step]], 1))
    pairs = torch.cat(pairs) if pairs else torch.empty(0, 2, dtype=torch.int64)
    one, other = contents[pairs].T
    return pairs[(one != other) | (one < 0)]


def group_index(index, threshold: float, together: Tensor | None = None) -> Tensor:
    """Return the group of each image of a GalleryIndex, as `group` does.

    Two images of one camera and frame are two people, unless their cosine reaches the threshold: detectors draw two boxes
    around one person.
    """
    apart = same_frame(index.camids, index.seqs, index.frames, contents=index.contents)
    cosines = [(index.embeddings[one].float() * index.embeddings[other].float()).sum(1) for one, other in
               zip(*(side.split(1 << 15) for side in apart.T))]
    apart = apart[torch.cat([torch.empty(0), *cosines]) < threshold]
    return group(index.embeddings, threshold, apart, together)


def pick_threshold(index, given=None):
    """Return the threshold to group a GalleryIndex by: the one that is given, else its own, else THRESHOLD."""
    return next(value for value in (given, index.threshold, THRESHOLD) if value is not None)


class GroupScores(NamedTuple):
    """How well groups agree with identities: (precision, recall, F1) of pairs and of BCubed; homogeneity, completeness, V."""

    pairwise: tuple[float, float, float]
    bcubed: tuple[float, float, float]
    v_measure: tuple[float, float, float]


def group_scores(groups: Tensor, pids: Tensor) -> GroupScores:
    """Compare groups with identities, int64 [N] each.

    Pairwise: of the pairs of crops in one group, and of those of one person. BCubed (Bagga and Baldwin, 1998; Amigo et al., A
    comparison of extrinsic clustering evaluation metrics, 2009): the mean over crops of the share of its group that is its
    person, and of its person that is in its group. V-measure (Rosenberg and Hirschberg, EMNLP 2007).
    """
    groups, pids = (values.unique(return_inverse=True)[1] for values in (groups, pids))
    cell, both = (groups * (int(pids.max()) + 1) + pids).unique(return_counts=True)
    sizes, people, both = groups.bincount().double(), pids.bincount().double(), both.double()
    in_group, of_person = sizes[cell // len(people)], people[cell % len(people)]
    pairs = [(count * (count - 1)).sum().item() for count in (both, sizes, people)]
    conditional = [-(both * (both / whole).log()).sum().item() for whole in (in_group, of_person)]
    entropies = [-(whole * (whole / len(pids)).log()).sum().item() for whole in (people, sizes)]
    shares = [1 - part / whole if whole else 1.0 for part, whole in zip(conditional, entropies)]
    precision, recall = ((both * both / whole).sum().item() / len(pids) for whole in (in_group, of_person))
    found = [pairs[0] / whole if whole else 1.0 for whole in pairs[1:]]
    return GroupScores(*((*values, _harmonic(*values)) for values in (found, (precision, recall), shares)))


def evaluate_groups(groups: Tensor, pids: Tensor) -> dict[str, dict]:
    """Score the groups, int64 [N], of a gallery by its identities, int64 [N]: print and return {what counts: scores}.

    Junk and unlabelled images are grouped, but never count. Distractors count in a second row, each as a person of its own: one
    in the group of a person, and two in one group, are errors.
    """
    rows = {"people": pids > DISTRACTOR, "with distractors": pids >= DISTRACTOR}
    own = torch.where(pids == DISTRACTOR, -10 - torch.arange(len(pids)), pids)
    found = {name: group_scores(groups[counts], own[counts]) for name, counts in rows.items() if counts.any()}
    sizes = groups.bincount()
    print(f"groups: {len(pids):,} images in {int((sizes > 1).sum()):,} groups, {int((sizes == 1).sum()):,} single ones; "
          "precision / recall / F1, and homogeneity / completeness / V")
    for name, scores in found.items():
        text = ", ".join(f"{what} " + " / ".join(f"{100 * value:.2f}" for value in values)
                         for what, values in zip(("pairs", "BCubed", "V-measure"), scores))
        print(f"  {name}, {int(rows[name].sum()):,} images of {len(pids[pids > DISTRACTOR].unique()):,} people: {text}")
    return {name: scores._asdict() for name, scores in found.items()}


def _harmonic(one, other):
    return 2 * one * other / (one + other) if one + other else 0.0
