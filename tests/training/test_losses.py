"""The losses against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from reid.training.losses import distillation_loss, identity_loss, triplet_loss


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


def test_distillation_is_zero_for_the_teacher_itself_and_takes_other_sizes():
    features, logits = torch.randn(6, 8), torch.randn(6, 5)
    assert distillation_loss(features, logits, features, logits).item() == pytest.approx(0, abs=1e-5)
    assert distillation_loss(features, logits, F.pad(features, (0, 8)), logits).item() == pytest.approx(0, abs=1e-5)
    assert distillation_loss(features, logits, -features.flip(0), logits.flip(0)).item() > 0.1
