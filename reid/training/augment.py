"""Augmentation of whole batches on their device, by random numbers that are drawn beforehand.

To add one: write a function like `gaussian_blur`, give it a row in NUMBERS and a line in `apply`, and its setting to train.py.
The numbers of an epoch depend on (seed, epoch) alone. So resuming needs no random state, one setting leaves the draws of the
others as they are, and the step has no random operation, which a CUDA graph would repeat.
"""

import math
from functools import lru_cache

import torch

from reid.images import MEAN
from reid.training.sampler import seeded_generator

PAD = 10  # black pixels around the image before the random crop (Luo et al., arXiv 1903.07071)
NUMBERS = {"flip": 1, "crop": 2, "colour": 4, "blur": 2, "erase": 5, "tint": 4}  # how many uniform numbers each of them takes


def draw(steps, batch_size, seed, epoch):
    """Draw the random numbers of an epoch: float32 [steps, batch_size, sum of NUMBERS], uniform in [0, 1)."""
    return torch.rand(steps, batch_size, sum(NUMBERS.values()), generator=seeded_generator(seed, epoch, "augmentation"))


def apply(images, numbers, flip=0.5, erase=0.5, jitter=0.0, gray=0.0, blur=0.0, tint=0.0):
    """Augment images, uint8 [N, 3, H, W], by `numbers` of `draw`, float32 [N, ...] on the same device.

    All but jitter and tint are the probability that an image is changed. Returns float32 [N, 3, H, W] in 0..255, channels last;
    a CPU and a GPU agree to rounding, which TF32 makes coarser in the blur.
    """
    u = dict(zip(NUMBERS, numbers.T.split(list(NUMBERS.values()))))
    x = flip_and_crop(images, u["flip"][0] < flip, u["crop"])
    if jitter or gray:
        x = colour(x, u["colour"], jitter, gray)
    if tint:
        x = light(x, u["tint"], tint)
    if blur:
        x = gaussian_blur(x, u["blur"], blur)
    if erase:
        x = random_erasing(x, u["erase"], erase)
    return x.permute(0, 3, 1, 2)


def flip_and_crop(images, flipped, u):
    """Mirror the images where `flipped`, bool [N]; pad by PAD black pixels and crop at random. Returns float32 [N, H, W, 3]."""
    count, _, height, width = images.shape
    shift_y, shift_x = (u * (2 * PAD + 1)).long().clamp(max=2 * PAD) - PAD  # u * 21 may be rounded to 21
    rows = torch.arange(height, device=images.device) + shift_y[:, None]
    columns = torch.arange(width, device=images.device) + shift_x[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)
    image = torch.arange(count, device=images.device)[:, None, None]
    picked = images.permute(0, 2, 3, 1)[image, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return picked.float() * inside[..., None]


def colour(x, u, jitter, gray):
    """Scale brightness, contrast and saturation by 1 - jitter to 1 + jitter each; turn a share `gray` of the images to grey.

    x: float32 [N, H, W, 3] in 0..255. Contrast is the distance from the mean grey of the image, saturation that of a pixel's
    colour from its grey.
    """
    brightness, contrast, saturation = (1 + jitter * (2 * u[:3] - 1)).clamp(min=0)[..., None, None, None]
    saturation = torch.where((u[3] < gray)[:, None, None, None], 0, saturation)
    weights = _constant((0.299, 0.587, 0.114), x.device)
    x = (x * brightness).clamp(0, 255)
    mean = (x * weights).sum(-1, keepdim=True).mean((1, 2), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 255)
    grey = (x * weights).sum(-1, keepdim=True)
    return (grey + (x - grey) * saturation).clamp(0, 255)


def light(x, u, tint):
    """Imitate other lamps and exposures: scale each channel by 1 - tint to 1 + tint, then apply a gamma of exp(-+tint).

    x: float32 [N, H, W, 3] in 0..255. Every image has a gamma of its own, and its channels each have a factor of their own.
    """
    gain = (1 + tint * (2 * u[:3] - 1)).T[:, None, None]
    gamma = torch.exp(tint * (2 * u[3] - 1))[:, None, None, None]
    return 255 * (x * gain / 255).clamp(0, 1).pow(gamma)


def gaussian_blur(x, u, probability):
    """Blur by a Gaussian of 0.1 to 2 pixels of an image of 256 rows; its weights end at the border and sum to 1.

    x: float32 [N, H, W, 3]. Matrices [H, H] and [W, W] make this two products instead of a convolution for each image.
    """
    count, height, width, _ = x.shape
    sigma = torch.where(u[0] < probability, (0.1 + 1.9 * u[1]) * height / 256, 0)[:, None, None]

    def weights(size):
        place = torch.arange(size, device=x.device)
        bell = torch.exp((place[:, None] - place).square() / (-2 * sigma.clamp(min=0.01).square()))
        return bell / bell.sum(-1, keepdim=True)

    x = (weights(height) @ x.reshape(count, height, -1)).view(x.shape)
    x = weights(width) @ x.transpose(1, 2).reshape(count, width, -1)
    return x.view(count, width, height, -1).transpose(1, 2)


def random_erasing(x, u, probability):
    """Fill a box of each chosen image with ImageNet's mean colour, which normalises to 0. x: float32 [N, H, W, 3]."""
    _, height, width, _ = x.shape
    top, left, bottom, right = erased_box((height, width), u, probability)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    hidden = (((rows >= top[:, None]) & (rows < bottom[:, None]))[:, :, None]
              & ((columns >= left[:, None]) & (columns < right[:, None]))[:, None, :])
    return torch.where(hidden[..., None], _constant(tuple(255 * value for value in MEAN), x.device), x)


def erased_box(size, u, probability):
    """Return (top, left, bottom, right) of random erasing, float32 [N] each; an empty box where an image is not chosen.

    2 to 40 % of the area at an aspect ratio of 0.3 to 3.3 (Zhong et al., arXiv 1708.04896). A box that does not fit is cut to
    the image, where the paper draws again.
    """
    (height, width), (chosen, area, aspect, y, x) = size, u
    area = (0.02 + 0.38 * area) * height * width
    aspect = torch.exp(math.log(0.3) * (1 - 2 * aspect))
    box_h = (area * aspect).sqrt().round().clamp(1, height - 1)
    box_w = (area / aspect).sqrt().round().clamp(1, width - 1)
    top, left = (y * (height - box_h + 1)).floor(), (x * (width - box_w + 1)).floor()
    erased = chosen < probability
    return top, left, top + box_h * erased, left + box_w * erased


@lru_cache
def _constant(values, device):
    return torch.tensor(values, device=device)  # made once: a CUDA graph may not copy from the host
