"""Validation: what it measures, worked out by hand, and which weights become best.pth."""

import gc
import math
from contextlib import chdir, nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from pretended_gpu import pretend
from train_lab import TINY, tiny_trainer, weights

import train
from reid import ReidError, distributed
from reid.data.datasets import LabelledImages
from reid.training.run import Run
from reid.training.trainer import Trainer


class Angles(torch.nn.Module):
    """A network whose images are directions in the plane; its classifier takes the two coordinates for logits."""

    def __init__(self):
        super().__init__()
        self.config = {"embedding_size": 2, "classes": [4, 7, 8, 9]}
        self.neck = self.classifier = torch.nn.Identity()

    def features(self, degrees):
        radians = torch.deg2rad(degrees)
        return torch.stack([radians.cos(), radians.sin()], 1)


def validate(images, device="cpu"):
    """Validate on (label, camera, degrees) of images; three training images come before them in the cache."""
    labels, camids, degrees = zip(*images)
    val_set = LabelledImages(list(labels), torch.tensor(labels), torch.tensor(camids), torch.tensor(labels) >= 2)
    trainer = SimpleNamespace(best_model=Angles(), device=torch.device(device), autocast=nullcontext)
    trainer.embed = partial(Trainer.embed, trainer)
    return train.validate(trainer, torch.tensor([math.nan] * 3 + [*degrees]).to(device), val_set)


TRAINED = [(0, 1, 0.0), (1, 1, 0.0)]
HELD_OUT = [(2, 1, 0.0), (2, 3, 1.0), (2, 2, 50.0), (2, 2, 51.0), (3, 1, 20.0), (3, 2, 90.0)]
# The matches of each query are at these ranks, without its own camera:
#   0: 1, 3, 4   1: 1, 3, 4   50 and 51 (not each other): 3, 4   20: 5   90: 3
MAP = (2 * (1 / 1 + 2 / 3 + 3 / 4) / 3 + 2 * (1 / 3 + 2 / 4) / 2 + 1 / 5 + 1 / 3) / 6
LOSS = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2  # logits 1 and 0, once right and once wrong


@pytest.mark.parametrize("images, expected", [
    (TRAINED + HELD_OUT, {"val/mAP": MAP, "val/rank1": 2 / 6, "val/accuracy": 1 / 2, "val/loss": LOSS}),
    (HELD_OUT, {"val/mAP": MAP, "val/rank1": 2 / 6}),
    (TRAINED, {"val/accuracy": 1 / 2, "val/loss": LOSS}),
])
def test_held_out_identities_are_searched_and_the_others_classified(images, expected):
    assert validate(images) == pytest.approx(expected)


def test_a_gpu_measures_the_same(monkeypatch):
    with pretend(monkeypatch):
        assert validate(TRAINED + HELD_OUT, "cuda") == pytest.approx(
            {"val/mAP": MAP, "val/rank1": 2 / 6, "val/accuracy": 1 / 2, "val/loss": LOSS})


@pytest.mark.parametrize("ranks", [2, 9])  # of nine, the last has no image
def test_ranks_measure_the_same_together(monkeypatch, ranks):
    parts = []
    monkeypatch.setattr(distributed, "world_size", ranks)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "total", lambda embeddings: parts.append(embeddings) or embeddings)
        for rank in range(ranks):
            patch.setattr(distributed, "rank", rank)
            validate(TRAINED + HELD_OUT)
    monkeypatch.setattr(distributed, "total", lambda embeddings: embeddings.copy_(sum(parts)))
    assert validate(TRAINED + HELD_OUT)["val/mAP"] == pytest.approx(MAP)


def test_embeddings_that_are_not_finite():
    with pytest.raises(ReidError, match="NaN or infinite embeddings; lower --lr"):
        validate([*HELD_OUT, (3, 1, math.inf)])


def test_retrieval_chooses_the_best_weights_and_accuracy_only_among_equals(tmp_path):
    with chdir(tmp_path):
        run = Run(train.get_args_parser().parse_args([*TINY, "--exp_name", "chosen"]), train.get_args_parser(), set())
        run.images, trainer, chosen = None, tiny_trainer(), []
        for epoch, (precision, accuracy, loss) in enumerate([(0.5, 0.3, 2), (0.4, 1.0, 1), (0.5, 0.4, 3), (0.6, 0.1, 9)], 1):
            metrics = {"val/mAP": precision, "val/accuracy": accuracy, "val/loss": loss}
            run.epoch_done(trainer, epoch, metrics, mock.MagicMock())
            run.wait()
            chosen.append(weights(tmp_path, "chosen", "best.pth")["metrics"]["epoch"])
        del run
        gc.collect()
    assert chosen == [1, 1, 3, 4]


def test_images_and_pairs_are_counted():
    """A batch of two identities of three images: 3 + 3 pairs; of one with an image twice, and one with one three times: 2."""
    labels = torch.arange(9) // 3
    rows, found = torch.tensor([[[0, 1, 2], [3, 4, 5]], [[6, 6, 7], [8, 8, 8]]]), torch.tensor([0, 3, 3, 4, 4])
    train_set = LabelledImages([None] * 9, labels, labels, labels < 0)
    val_set = LabelledImages([None] * 5, found, labels[:5], found > 2)
    assert train.describe(train_set, val_set, rows) == (
        "9 images of 3 identities, 2 steps an epoch, 4 pairs of images of one identity in a batch, validation on 4 images of 2 "
        "held-out identities and 1 images of the others")
    assert train.describe(train_set, None, rows).endswith("in a batch, no validation")
