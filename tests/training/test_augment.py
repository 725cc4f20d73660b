"""The batched augmentation against one image at a time, and its distribution."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reid.images import MEAN
from reid.training import augment

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
    bell = np.exp(-(np.arange(-64, 65) ** 2) / (2 * max(p["sigma"], 0.03) ** 2))
    for axis, size in ((1, SIZE[0]), (2, SIZE[1])):
        weights = np.array([[bell[64 + i - j] for j in range(size)] for i in range(size)])
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ (weights / weights.sum(1, keepdims=True)).T, -1, axis)
    for y in range(SIZE[0] if p["period"] else 0):
        for at in range(SIZE[1]):
            if all((place + p[name]) % p["period"] < p["period"] / 2 for place, name in ((y, "grid_y"), (at, "grid_x"))):
                x[:, y, at] = 255 * np.array(MEAN)
    box = slice(int(p["top"]), int(p["bottom"])), slice(int(p["left"]), int(p["right"]))
    for channel in range(3):
        x[channel][box] = 255 * MEAN[channel]
    return torch.from_numpy(x).float()


def test_equals_one_image_at_a_time():
    images = torch.randint(256, (40, 3, *SIZE), generator=generator(), dtype=torch.uint8)
    params = augment.draw(40, SIZE, generator(1), jitter=0.4, gray=0.2, blur=0.5, grid=0.5)
    batch = augment.apply(images, params)
    for image, row, result in zip(images, params, batch):
        assert torch.allclose(one_at_a_time(image, row), result, atol=1e-2)


def test_nothing_drawn_is_the_identity():
    images = torch.randint(256, (8, 3, *SIZE), generator=generator(), dtype=torch.uint8)
    params = augment.draw(8, SIZE, generator(), flip=0, erase=0)
    params[:, 1:3] = 0  # no shift
    assert torch.equal(augment.apply(images, params), images.float())
    assert torch.equal(augment.apply(images, params, stages=()), images.float())


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


def test_distribution_of_blur_noise_grid_and_style():
    settings = {"blur": 0.3, "jpeg": 0.4, "grid": 0.2, "mixstyle": 0.6}
    columns = dict(zip(augment.COLUMNS, augment.draw(100_000, (256, 128), generator(2), **settings).T))
    for name, share, low, high in (("sigma", 0.3, 0.1, 2), ("quality", 0.4, 20, 80), ("period", 0.2, 32, 64)):
        drawn = columns[name][columns[name] > 0]
        assert abs(len(drawn) / 100_000 - share) < 0.01
        assert drawn.min() >= low and drawn.max() <= high and abs(drawn.mean() - (low + high) / 2) < 0.02 * high
    for name in ("grid_y", "grid_x"):
        assert (columns[name][columns["period"] > 0] < columns["period"][columns["period"] > 0]).all()
    lent = 1 - columns["own_style"]  # 0.6 of Beta(0.1, 0.1), whose mean is 1/2 and variance 1/4.8
    assert abs(lent.mean() - 0.6 / 2) < 0.01 and abs(lent.square().mean() - 0.6 * (1 / 4 + 1 / 4.8)) < 0.01


def test_a_setting_leaves_the_draws_of_the_others_alone():
    assert torch.equal(augment.draw(10, SIZE, generator(4)), augment.draw(10, SIZE, generator(4)))
    every = augment.draw(10, SIZE, generator(4), blur=0.5, jpeg=0.5, grid=0.5, mixstyle=0.5)
    assert torch.equal(augment.draw(10, SIZE, generator(4))[:, :10], every[:, :10])


@pytest.mark.parametrize("size", [(64, 32), (60, 36)])
@pytest.mark.parametrize("quality", [20, 50, 80])
def test_jpeg_noise_is_that_of_a_codec(size, quality):
    picture = F.interpolate(torch.rand(1, 3, 16, 9, generator=generator()), size, mode="bicubic").clamp(0, 1)
    picture = (picture * 255).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(picture[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling=0)
    theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()
    params = augment.draw(1, size, generator(), flip=0, erase=0)
    params[:, 1:3] = 0
    params[:, augment.COLUMNS.index("quality")] = quality
    ours = augment.apply(picture, params)[0]
    lost = (picture[0] - theirs).abs().mean()
    assert lost > 1 and (ours - theirs).abs().mean() < 0.2 * lost


def test_only_what_is_asked_for_is_computed():
    class args:
        flip = erase = 0.5
        jitter = blur = grid = 0.0
        gray = jpeg = 0.1

    assert augment.stages(args) == {"colour", "jpeg"}


def test_a_style_comes_from_each_image_once():
    own, partner = augment.styles(augment.draw(16, SIZE, generator(), mixstyle=1))
    assert sorted(partner.tolist()) == list(range(16)) and len(own) == 16
