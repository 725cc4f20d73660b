"""The batched augmentation against one image at a time, and its distribution."""

import math

import numpy as np
import torch

from reid.images import MEAN
from reid.training import augment

SIZE = (64, 32)
FIRST = dict(zip(augment.NUMBERS, np.cumsum([0, *augment.NUMBERS.values()]).tolist()))  # column of each augmentation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count):
    return torch.randint(256, (count, 3, *SIZE), generator=generator(), dtype=torch.uint8)


def numbers(count, seed=0):
    return augment.draw(1, count, seed, 0)[0]


def one_at_a_time(image, u, flip, erase, jitter, gray, blur, tint):
    """The same augmentation of one image [3, H, W], written plainly. u: the numbers of each augmentation."""
    (height, width), x = SIZE, image.numpy().astype(np.float64)
    if u["flip"][0] < flip:
        x = x[:, :, ::-1]
    padded = np.pad(x, ((0, 0), (augment.PAD,) * 2, (augment.PAD,) * 2))
    top, left = (int(value * (2 * augment.PAD + 1)) for value in u["crop"])
    x = padded[:, top : top + height, left : left + width]
    brightness, contrast, saturation = (1 - jitter + 2 * jitter * value for value in u["colour"][:3])
    weights = np.array([0.299, 0.587, 0.114])[:, None, None]
    x = (x * brightness).clip(0, 255)
    mean = (x * weights).sum(0).mean()
    x = (mean + (x - mean) * contrast).clip(0, 255)
    grey = (x * weights).sum(0)
    x = (grey + (x - grey) * (0 if u["colour"][3] < gray else saturation)).clip(0, 255)
    gains = np.array([1 - tint + 2 * tint * value for value in u["tint"][:3]])[:, None, None]
    x = 255 * (x * gains / 255).clip(0, 1) ** math.exp(tint * (2 * u["tint"][3] - 1))
    if u["blur"][0] < blur:
        bell = np.exp(-(np.arange(-64, 65) ** 2) / (2 * ((0.1 + 1.9 * u["blur"][1]) * height / 256) ** 2))
        for axis, size in ((1, height), (2, width)):
            weights = np.array([[bell[64 + i - j] for j in range(size)] for i in range(size)])
            x = np.moveaxis(np.moveaxis(x, axis, -1) @ (weights / weights.sum(1, keepdims=True)).T, -1, axis)
    chosen, area, aspect, y, left = u["erase"]
    if chosen < erase:
        area, aspect = (0.02 + 0.38 * area) * height * width, math.exp(math.log(0.3) * (1 - 2 * aspect))
        box_h, box_w = (min(max(round(math.sqrt(side)), 1), most - 1) for side, most in ((area * aspect, height),
                                                                                           (area / aspect, width)))
        top, left = int(y * (height - box_h + 1)), int(left * (width - box_w + 1))
        x[:, top : top + box_h, left : left + box_w] = 255 * np.array(MEAN)[:, None, None]
    return torch.from_numpy(x.copy()).float()


def test_equals_one_image_at_a_time():
    settings = {"flip": 0.5, "erase": 0.5, "jitter": 0.4, "gray": 0.2, "blur": 0.5, "tint": 0.3}
    drawn = numbers(40, seed=1)
    batch = augment.apply(pictures(40), drawn, **settings)
    for image, row, found in zip(pictures(40), drawn.double().tolist(), batch):
        u = {name: row[start : start + augment.NUMBERS[name]] for name, start in FIRST.items()}
        assert torch.allclose(one_at_a_time(image, u, **settings), found, atol=2e-2)


def test_nothing_asked_for_only_crops():
    drawn = numbers(8)
    drawn[:, FIRST["crop"] : FIRST["crop"] + 2] = 0.5  # no shift
    assert torch.equal(augment.apply(pictures(8), drawn, flip=0, erase=0), pictures(8).float())


def test_a_setting_leaves_the_draws_of_the_others_alone():
    drawn = numbers(8)
    drawn[:, FIRST["erase"]] = drawn[:, FIRST["blur"]] = 0.9  # chosen by no probability below
    plain = augment.apply(pictures(8), drawn, erase=0, blur=0)
    assert torch.allclose(augment.apply(pictures(8), drawn, erase=0.8, blur=0.8), plain, atol=1e-3)


def test_numbers_depend_on_seed_and_epoch_and_not_on_the_sampler():
    first = augment.draw(3, 8, seed=1, epoch=2)
    assert first.shape == (3, 8, sum(augment.NUMBERS.values())) and torch.equal(first, augment.draw(3, 8, seed=1, epoch=2))
    others = [augment.draw(3, 8, seed=1, epoch=3), augment.draw(3, 8, seed=2, epoch=2)]
    for stream in ("batches", "augmentation"):
        drawn = torch.rand(first.shape, generator=augment.seeded_generator(1, 2, stream))
        assert torch.equal(drawn, first) == (stream == "augmentation")
    assert not any(torch.equal(first, other) for other in others)


def test_distribution_of_crops():
    plane = torch.arange(SIZE[0] * SIZE[1]).view(SIZE)  # a picture that shows where each pixel has come from
    images = torch.stack([plane // SIZE[1], plane % SIZE[1], torch.full(SIZE, 255)]).to(torch.uint8)
    found = augment.apply(images.expand(20_000, -1, -1, -1), numbers(20_000, seed=2), erase=0)
    middle = found[:, :, SIZE[0] // 2, SIZE[1] // 2]
    for channel, size in ((0, SIZE[0]), (1, SIZE[1])):
        values, counts = middle[:, channel].unique(return_counts=True)
        assert values.min() >= size // 2 - augment.PAD - 1 and values.max() <= size // 2 + augment.PAD
        assert channel or (len(values) == 2 * augment.PAD + 1 and (counts / 20_000 - 1 / 21).abs().max() < 0.01)
    flipped = (found[:, 1, 32, 20] < found[:, 1, 32, 12]).float().mean()
    assert abs(flipped - 0.5) < 0.02


def test_distribution_of_erased_boxes():
    height, width = 256, 128
    u = torch.rand(5, 100_000, generator=generator(2))
    top, left, bottom, right = augment.erased_box((height, width), u, 0.5)
    area = (bottom - top) * (right - left) / (height * width)
    erased = area > 0
    assert abs(erased.float().mean() - 0.5) < 0.01
    assert area[erased].min() > 0.018 and area[erased].max() < 0.41
    aspect = ((bottom - top) / (right - left))[erased].log()
    assert aspect.min() > math.log(0.28) and aspect.max() < math.log(3.6)
    assert top.min() >= 0 and left.min() >= 0 and bottom.max() <= height and right.max() <= width
    # the paper draws a box that does not fit again, here it is cut: the mean area differs by less than a tenth
    reference = torch.rand(100_000, generator=generator(3)) * 0.38 + 0.02
    assert abs(area[erased].mean() / reference.mean() - 1) < 0.1
