"""The losses against numbers worked out by hand."""

import math

import pytest
import torch

from reid.training.losses import cosine_loss, identity_loss, relational_loss, soft_label_loss, triplet_loss


def test_triplet_by_hand():
    # On the unit circle at 0, 60 (person 0) and 90, 180 degrees (person 1); the distance of an angle a is 2 sin(a / 2).
    angles = torch.tensor([0.0, 60.0, 90.0, 180.0]) * math.pi / 180
    features = 5 * torch.stack([angles.cos(), angles.sin()], 1)  # the length must not matter
    def chord(degrees):
        return 2 * math.sin(math.radians(degrees) / 2)
    # hardest positive - hardest negative: 0: 60 - 90, 60: 60 - 30, 90: 90 - 30, 180: 90 - 120
    terms = [chord(60) - chord(90), chord(60) - chord(30), chord(90) - chord(30), chord(90) - chord(120)]
    expected = sum(max(0, term + 0.3) for term in terms) / 4
    assert triplet_loss(features, torch.tensor([0, 0, 1, 1]), 0.3).item() == pytest.approx(expected, abs=1e-5)


def test_triplet_gradient_is_finite_for_equal_features():
    features = torch.ones(4, 8, requires_grad=True)
    triplet_loss(features, torch.tensor([0, 0, 1, 1])).backward()
    assert torch.isfinite(features.grad).all()


def test_identity_loss_by_hand():
    # logits (0, ln 3): probabilities 1/4, 3/4; smoothing 0.1 over 2 classes: targets 0.95 and 0.05
    logits, labels = torch.tensor([[0.0, math.log(3)]]), torch.tensor([1])
    assert identity_loss(logits, labels, 0.1).item() == pytest.approx(-0.95 * math.log(0.75) - 0.05 * math.log(0.25), abs=1e-6)


def test_relational_loss_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    embeddings, targets = torch.randn(5, 8, generator=generator), torch.randn(5, 3, generator=generator)
    def cosine(rows, i, j):
        return float(rows[i] @ rows[j] / (rows[i].norm() * rows[j].norm()))
    errors = [(cosine(embeddings, i, j) - cosine(targets, i, j)) ** 2 for i in range(5) for j in range(5)]
    assert relational_loss(embeddings, targets).item() == pytest.approx(5 * sum(errors) / 25, rel=1e-5)


def test_relational_loss_by_hand():
    # right angles between ours, none between the teacher's: both entries off the diagonal are wrong by 1; 2 * (0 + 1 + 1 + 0) / 4
    assert relational_loss(torch.tensor([[3.0, 0], [0, 2]]), torch.tensor([[1.0], [5.0]])).item() == pytest.approx(1, abs=1e-6)


def test_cosine_loss_by_hand():
    # angles of 0, 60 and 90 degrees: cosines of 1, 1/2 and 0
    mapped, targets = torch.tensor([[2.0, 0], [1, 0], [0, 1]]), torch.tensor([[1.0, 0], [0.5, math.sqrt(0.75)], [3, 0]])
    assert cosine_loss(mapped, targets).item() == pytest.approx(0.5, abs=1e-6)


def test_soft_label_loss_by_hand():
    # at temperature 4 the logits (0, 4 ln 3) give probabilities 1/4, 3/4; the teacher's (0, 0) give halves
    logits, teacher = torch.tensor([[0.0, 4 * math.log(3)]]), torch.zeros(1, 2)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert soft_label_loss(logits, teacher).item() == pytest.approx(16 * expected, abs=1e-5)
    assert soft_label_loss(logits, logits).item() == pytest.approx(0, abs=1e-6)
