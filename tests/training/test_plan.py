"""What is decided before a step: the learning rate, and the images and random numbers of each rank."""

import pytest
import torch
from train_lab import TINY, fails

import train
from reid import distributed


def test_learning_rate_by_hand():
    class args:
        lr, warmup_epochs, num_epochs = 0.1, 1, 5

    assert train.learning_rate(0, 10, args) == pytest.approx(0.001)
    assert train.learning_rate(5, 10, args) == pytest.approx(0.1 * (0.01 + 0.99 / 2))
    assert train.learning_rate(10, 10, args) == pytest.approx(0.1)
    assert train.learning_rate(30, 10, args) == pytest.approx(0.05)
    assert train.learning_rate(50, 10, args) == pytest.approx(0)


def test_ranks_share_an_epoch_without_overlap(monkeypatch):
    args = train.get_args_parser().parse_args([*TINY])
    labels = torch.arange(64) // 8
    rows, numbers = train.plan_epoch(args, labels, 0, 3)
    monkeypatch.setattr(distributed, "world_size", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", rank)
        shares.append(train.plan_epoch(args, labels, 0, 3))
    assert torch.equal(torch.cat([part for part, _ in shares], 1), rows)
    assert torch.equal(torch.cat([part for _, part in shares], 1), numbers)
    for batch in rows:  # two identities, four images of each: a rank has one of them
        assert len(labels[batch].unique()) == 2 and (labels[batch].view(2, 4) == labels[batch].view(2, 4)[:, :1]).all()


def test_ranks_share_the_crops_without_identities(monkeypatch):
    args = train.get_args_parser().parse_args([*TINY, "--unlabelled_batch", "12"])
    labels = torch.arange(64) // 8
    rows, numbers = train.plan_epoch(args, labels, 30, 3)
    assert rows.shape == (8, 20) and numbers.shape[:2] == (8, 20)
    assert (rows[:, :8] < 64).all() and (rows[:, 8:] >= 64).all() and set(rows[:, 8:].flatten().tolist()) == set(range(64, 94))
    assert torch.equal(rows[:, :8], train.plan_epoch(args, labels, 0, 3)[0])
    monkeypatch.setattr(distributed, "world_size", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", rank)
        shares.append(train.plan_epoch(args, labels, 30, 3))
    for whole, (first, second) in zip((rows, numbers), zip(*shares)):
        assert torch.equal(torch.cat([first[:, :4], second[:, :4], first[:, 4:], second[:, 4:]], 1), whole)


def test_a_batch_that_the_ranks_cannot_share(people, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "start", lambda device: (0, 3))
    assert "must be a multiple of the 3 processes" in fails(tmp_path, "--data_root", people, *TINY)
    more = ["--batch_size", 12, "--unlabelled", people / "gallery", "--unlabelled_batch", 8]
    assert "--unlabelled_batch 8: must be a multiple of the 3" in fails(tmp_path, "--data_root", people, *TINY, *more)


@pytest.mark.parametrize("count, ranks, shards", [(5, 2, [[0, 2, 4], [1, 3]]), (1, 3, [[0], [], []])])
def test_shards_of_few_rows(monkeypatch, count, ranks, shards):
    monkeypatch.setattr(distributed, "world_size", ranks)
    for rank, rows in enumerate(shards):
        monkeypatch.setattr(distributed, "rank", rank)
        assert distributed.shard(count).tolist() == rows
