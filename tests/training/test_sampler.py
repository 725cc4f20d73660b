"""PK sampling: balanced, complete, a function of seed and epoch."""

import random

import pytest
import torch

from reid import ReidError
from reid.training.sampler import pk_batches, unlabelled_batches


def labels_of(counts):
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def test_pk_batches_are_balanced_and_nearly_everything_is_seen():
    labels = labels_of([random.Random(0).randint(2, 40) for _ in range(100)])
    batches = pk_batches(labels, 64, 4, seed=3, epoch=5)
    assert batches.shape == (len(labels) // 64, 64)
    for batch in labels[batches]:
        groups = batch.view(16, 4)
        assert (groups == groups[:, :1]).all()
        assert len(groups[:, 0].unique()) == 16
    assert len(batches.unique()) > 0.8 * len(labels)


def test_pk_batches_are_a_function_of_seed_and_epoch():
    labels = labels_of([5] * 30)
    assert torch.equal(pk_batches(labels, 16, 4, 1, 2), pk_batches(labels, 16, 4, 1, 2))
    assert not torch.equal(pk_batches(labels, 16, 4, 1, 2), pk_batches(labels, 16, 4, 1, 3))
    assert not torch.equal(pk_batches(labels, 16, 4, 1, 2), pk_batches(labels, 16, 4, 2, 2))


def test_pk_batches_of_tiny_sets():
    assert pk_batches(labels_of([1, 1]), 8, 4, 0, 0).shape == (1, 8)
    for batch_size, per_id in ((10, 4), (4, 4), (64, 4), (8, 1)):
        with pytest.raises(ReidError, match="--batch_size"):
            pk_batches(labels_of([3, 3, 3]), batch_size, per_id, 0, 0)
    with pytest.raises(ReidError, match="1 identities to train on"):
        pk_batches(labels_of([9]), 8, 4, 0, 0)


def test_unlabelled_batches_draw_everything_before_anything_again():
    batches = unlabelled_batches(10, 7, 4, seed=1, epoch=2)
    assert batches.shape == (7, 4) and batches.dtype == torch.int64
    order = batches.flatten()
    assert order[:10].sort().values.tolist() == order[10:20].sort().values.tolist() == list(range(10))
    assert torch.equal(batches, unlabelled_batches(10, 7, 4, 1, 2))
    for seed, epoch in ((2, 2), (1, 3)):
        assert not torch.equal(batches, unlabelled_batches(10, 7, 4, seed, epoch))
    assert unlabelled_batches(1000, 2, 3, 0, 0).unique().numel() == 6
