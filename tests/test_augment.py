"""The batched augmentation against one image at a time, and its distribution."""

import math

import numpy as np
import torch

from reid import augment
from reid.images import MEAN

SIZE = (64, 32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_at_a_time(image, params):
    """The same augmentation of one image [3, H, W], written plainly."""
    p = dict(zip(augment.COLUMNS, params.tolist()))
    x = image.numpy().astype(np.float64)
    if p["flip"]:
        x = x[:, :, ::-1]
    padded = np.pad(x, ((0, 0), (augment.PAD,) * 2, (augment.PAD,) * 2))
    top, left = augment.PAD + int(p["dy"]), augment.PAD + int(p["dx"])
    x = padded[:, top : top + SIZE[0], left : left + SIZE[1]]
    weights = np.array([0.299, 0.587, 0.114])[:, None, None]
    x = (x * p["brightness"]).clip(0, 255)
    mean = (x * weights).sum(0).mean()
    x = (mean + (x - mean) * p["contrast"]).clip(0, 255)
    grey = (x * weights).sum(0)
    x = (grey + (x - grey) * p["saturation"]).clip(0, 255)
    x = x.copy()
    box = slice(int(p["top"]), int(p["bottom"])), slice(int(p["left"]), int(p["right"]))
    for channel in range(3):
        x[channel][box] = 255 * MEAN[channel]
    return torch.from_numpy(x).float()


def test_equals_one_image_at_a_time():
    images = torch.randint(256, (40, 3, *SIZE), generator=generator(), dtype=torch.uint8)
    params = augment.draw(40, SIZE, generator(1), jitter=0.4, gray=0.2)
    batch = augment.apply(images, params)
    for image, row, result in zip(images, params, batch):
        assert torch.allclose(one_at_a_time(image, row), result, atol=1e-2)


def test_nothing_drawn_is_the_identity():
    images = torch.randint(256, (8, 3, *SIZE), generator=generator(), dtype=torch.uint8)
    params = augment.draw(8, SIZE, generator(), flip=0, erase=0)
    params[:, 1:3] = 0  # no shift
    assert torch.equal(augment.apply(images, params), images.float())
    assert torch.equal(augment.apply(images, params, colour=False), images.float())


def test_distribution():
    height, width = 256, 128
    columns = dict(zip(augment.COLUMNS, augment.draw(100_000, (height, width), generator(2), jitter=0.3, gray=0.1).T))
    assert abs(columns["flip"].mean() - 0.5) < 0.01
    for name in ("dy", "dx"):
        values, counts = columns[name].unique(return_counts=True)
        assert values.tolist() == list(range(-10, 11))
        assert (counts / 100_000 - 1 / 21).abs().max() < 0.005
    area = (columns["bottom"] - columns["top"]) * (columns["right"] - columns["left"]) / (height * width)
    erased = area > 0
    assert abs(erased.float().mean() - 0.5) < 0.01
    assert area[erased].min() > 0.018 and area[erased].max() < 0.41
    aspect = ((columns["bottom"] - columns["top"]) / (columns["right"] - columns["left"]))[erased].log()
    assert aspect.min() > math.log(0.28) and aspect.max() < math.log(3.6)
    assert columns["bottom"].max() <= height and columns["right"].max() <= width
    # a paper's box that does not fit is drawn again, ours is shrunk: the mean area differs by less than a tenth
    reference = torch.rand(100_000, generator=generator(3)) * 0.38 + 0.02
    assert abs(area[erased].mean() / reference.mean() - 1) < 0.1
    for name in ("brightness", "contrast"):
        assert columns[name].min() > 0.69 and columns[name].max() < 1.31 and abs(columns[name].mean() - 1) < 0.01
    assert abs((columns["saturation"] == 0).float().mean() - 0.1) < 0.01


def test_draws_repeat():
    assert torch.equal(augment.draw(10, SIZE, generator(4)), augment.draw(10, SIZE, generator(4)))
