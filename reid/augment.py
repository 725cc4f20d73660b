"""Batched augmentation on the device: what to do is drawn on the CPU for a whole epoch, doing it is a few tensor operations.

Since the draws depend on (seed, epoch) alone, resuming needs no random state, every device sees the same pictures, and the
step has no random operation that would keep it out of a CUDA graph.
"""

import math
from functools import lru_cache

import torch

from reid.images import MEAN

PAD = 10  # black pixels around the image before the random crop (Luo et al., arXiv 1903.07071)
COLUMNS = ("flip", "dy", "dx", "top", "left", "bottom", "right", "brightness", "contrast", "saturation")


def draw(count, size, generator, flip=0.5, erase=0.5, jitter=0.0, gray=0.0):
    """Parameters of `count` augmentations of images of `size` (H, W): float32 [count, len(COLUMNS)].

    flip, erase, gray: probabilities; erasing takes 2 to 40 % of the area at an aspect of 0.3 to 3.3 (Zhong et al., arXiv
    1708.04896; a box that does not fit is shrunk to the image, where the paper draws again); jitter: brightness, contrast and
    saturation are scaled by 1 - jitter to 1 + jitter.
    """
    height, width = size

    def uniform(low, high):
        return torch.rand(count, generator=generator) * (high - low) + low

    erased = uniform(0, 1) < erase
    area, aspect = uniform(0.02, 0.4) * height * width, torch.exp(uniform(math.log(0.3), math.log(1 / 0.3)))
    box_h = (area * aspect).sqrt().round().clamp(1, height - 1)
    box_w = (area / aspect).sqrt().round().clamp(1, width - 1)
    top = (uniform(0, 1) * (height - box_h + 1)).floor()
    left = (uniform(0, 1) * (width - box_w + 1)).floor()
    columns = [
        (uniform(0, 1) < flip).float(),
        uniform(0, 2 * PAD + 1).floor().clamp(max=2 * PAD) - PAD,
        uniform(0, 2 * PAD + 1).floor().clamp(max=2 * PAD) - PAD,
        top, left, top + box_h * erased, left + box_w * erased,
        *(uniform(1 - jitter, 1 + jitter).clamp(min=0) for _ in range(3)),
    ]
    columns[-1][uniform(0, 1) < gray] = 0
    return torch.stack(columns, 1)


def apply(images, params, colour=True):
    """Flip, pad and crop, colour, erase. images: uint8 [N, 3, H, W]; params from `draw`, on the same device.

    Returns float32 [N, 3, H, W] in 0..255, channels last. Erased boxes hold ImageNet's mean colour, which normalises to 0.
    `colour` False leaves out colour altogether, for when nothing was drawn.
    """
    count, _, height, width = images.shape
    p = dict(zip(COLUMNS, params.T[:, :, None, None]))
    ys = torch.arange(height, device=images.device, dtype=torch.float32)[None, :, None]
    xs = torch.arange(width, device=images.device, dtype=torch.float32)[None, None, :]
    from_y, from_x = ys + p["dy"], xs + p["dx"]
    inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
    from_x = torch.where(p["flip"] > 0, width - 1 - from_x, from_x)
    rows = torch.arange(count, device=images.device)[:, None, None]
    picked = images.permute(0, 2, 3, 1)[rows, from_y.clamp(0, height - 1).long(), from_x.clamp(0, width - 1).long()]
    x = picked.float() * inside[..., None]
    if colour:
        x = _colour(x, *(p[name][..., None] for name in ("brightness", "contrast", "saturation")))
    erased = (ys >= p["top"]) & (ys < p["bottom"]) & (xs >= p["left"]) & (xs < p["right"])
    x = torch.where(erased[..., None], _constant(tuple(255 * c for c in MEAN), x.device), x)
    return x.permute(0, 3, 1, 2)


def _colour(x, brightness, contrast, saturation):
    """Scale brightness, the distance from the mean grey, and the distance from each pixel's grey. x: [N, H, W, 3] in 0..255."""
    weights = _constant((0.299, 0.587, 0.114), x.device)
    x = (x * brightness).clamp(0, 255)
    mean = (x * weights).sum(-1, keepdim=True).mean((1, 2), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 255)
    grey = (x * weights).sum(-1, keepdim=True)
    return (grey + (x - grey) * saturation).clamp(0, 255)


@lru_cache
def _constant(values, device):
    return torch.tensor(values, device=device)  # made once: a CUDA graph may not copy from the host
