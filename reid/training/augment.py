"""Batched augmentation on the device: what to do is drawn on the CPU for a whole epoch, doing it is a few tensor operations.

Since the draws depend on (seed, epoch) alone, resuming needs no random state, every device sees the same pictures, and the
step has no random operation that would keep it out of a CUDA graph.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from reid.images import MEAN

PAD = 10  # black pixels around the image before the random crop (Luo et al., arXiv 1903.07071)
COLUMNS = ("flip", "dy", "dx", "top", "left", "bottom", "right", "brightness", "contrast", "saturation",
           "sigma", "quality", "period", "grid_y", "grid_x", "own_style", "style_key")
SETTINGS = ("flip", "erase", "jitter", "gray", "blur", "jpeg", "grid")
STAGES = {"colour": ("jitter", "gray"), "blur": ("blur",), "jpeg": ("jpeg",), "grid": ("grid",)}


def draw(count, size, generator, flip=0.5, erase=0.5, jitter=0.0, gray=0.0, blur=0.0, jpeg=0.0, grid=0.0, mixstyle=0.0):
    """Parameters of `count` augmentations of images of `size` (H, W): float32 [count, len(COLUMNS)].

    All but jitter are probabilities of an image. erase: 2 to 40 % of the area at an aspect of 0.3 to 3.3 (Zhong et al., arXiv
    1708.04896; a box that does not fit is shrunk to the image, where the paper draws again). jitter: brightness, contrast and
    saturation are scaled by 1 - jitter to 1 + jitter. blur: Gaussian, sigma 0.1 to 2 pixels of a 256-row image. jpeg: the loss
    of a JPEG of quality 20 to 80. grid: squares of half a period hidden, periods of 1/4 to 1/2 of the width (GridMask, Chen et
    al., arXiv 2001.04086, without its rotation). mixstyle: see `reid.model.mix_style`; own weight from Beta(0.1, 0.1).
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
    columns += [uniform(0.1, 2) * height / 256 * (uniform(0, 1) < blur), uniform(20, 80).round() * (uniform(0, 1) < jpeg)]
    period = uniform(width / 4, width / 2).round().clamp(min=2) * (uniform(0, 1) < grid)
    columns += [period, *((uniform(0, 1) * period).floor() for _ in range(2))]
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))  # torch.distributions takes no generator
    style = torch.from_numpy(rng.beta(0.1, 0.1, count)).float()
    columns += [torch.where(uniform(0, 1) < mixstyle, style, 1), uniform(0, 1)]
    return torch.stack(columns, 1)


def stages(args):
    """The parts of `apply` that settings like train.py's ask for; what is never drawn need not be computed."""
    return frozenset(stage for stage, names in STAGES.items() if any(getattr(args, name) for name in names))


def styles(params):
    """(weight of the own style [N], row of the image that lends the rest, int64 [N]) for `reid.model.mix_style`."""
    return params[:, COLUMNS.index("own_style")], params[:, COLUMNS.index("style_key")].argsort()


def apply(images, params, stages=frozenset(STAGES)):
    """Flip, pad and crop, colour, blur, JPEG, erase. images: uint8 [N, 3, H, W]; params from `draw`, on the same device.

    Returns float32 [N, 3, H, W] in 0..255, channels last. What is hidden holds ImageNet's mean colour, which normalises to 0.
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
    if "colour" in stages:
        x = _colour(x, *(p[name][..., None] for name in ("brightness", "contrast", "saturation")))
    if "blur" in stages:
        x = _blur(x, p["sigma"])
    if "jpeg" in stages:
        x = torch.where(p["quality"][..., None] > 0, _jpeg(x, p["quality"]), x)
    hidden = (ys >= p["top"]) & (ys < p["bottom"]) & (xs >= p["left"]) & (xs < p["right"])
    if "grid" in stages:
        hidden = hidden | (torch.maximum((ys + p["grid_y"]) % p["period"], (xs + p["grid_x"]) % p["period"]) < p["period"] / 2)
    x = torch.where(hidden[..., None], _constant(tuple(255 * c for c in MEAN), x.device), x)
    return x.permute(0, 3, 1, 2)


def _colour(x, brightness, contrast, saturation):
    """Scale brightness, the distance from the mean grey, and the distance from each pixel's grey. x: [N, H, W, 3] in 0..255."""
    weights = _constant((0.299, 0.587, 0.114), x.device)
    x = (x * brightness).clamp(0, 255)
    mean = (x * weights).sum(-1, keepdim=True).mean((1, 2), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 255)
    grey = (x * weights).sum(-1, keepdim=True)
    return (grey + (x - grey) * saturation).clamp(0, 255)


def _blur(x, sigma):
    """Gaussian of each image's own sigma [N, 1, 1] in pixels, 0 leaves it; weights are cut off at the border and sum to 1.

    As matrices [H, H] and [W, W], which is two products instead of a convolution with a kernel for each image.
    """
    def weights(size):
        place = torch.arange(size, device=x.device)
        bell = torch.exp((place[:, None] - place).square() / (-2 * sigma.clamp(min=0.01).square()))
        return bell / bell.sum(-1, keepdim=True)

    count, height, width, _ = x.shape
    x = (weights(height) @ x.reshape(count, height, -1)).view(x.shape)
    x = weights(width) @ x.transpose(1, 2).reshape(count, width, -1)
    return x.view(count, width, height, -1).transpose(1, 2)


# ITU-T T.81, annex K: steps of the luma and of the chroma coefficients at quality 50
LUMA = ((16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
        (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
        (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99))
CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))  # 99 in the other three quarters
YCBCR = ((0.299, -0.168736, 0.5), (0.587, -0.331264, -0.418688), (0.114, 0.5, -0.081312))  # columns of R, G, B; JFIF 1.02
RGB = ((1.0, 1.0, 1.0), (0.0, -0.344136, 1.772), (1.402, -0.714136, 0.0))  # and back
DCT = tuple(tuple(math.cos((2 * i + 1) * k * math.pi / 16) * (0.5 if k else 8**-0.5) for i in range(8)) for k in range(8))


def _jpeg(x, quality):
    """What a JPEG of each image's own quality [N, 1, 1], 1 to 100, loses: coefficients of 8 x 8 blocks rounded to libjpeg's
    steps, colour at full resolution (4:4:4). x: float [N, H, W, 3] in 0..255."""
    _, height, width, _ = x.shape
    dct, luma, grey = (_constant(values, x.device) for values in (DCT, LUMA, (128.0, 0.0, 0.0)))
    chroma = F.pad(_constant(CHROMA, x.device), (0, 4, 0, 4), value=99.0)
    scale = torch.where(quality < 50, 5000 / quality.clamp(min=1), 200 - 2 * quality)[..., None]
    steps = ((torch.stack([luma, chroma, chroma], -1) * scale + 50) / 100).floor().clamp(1, 255)[:, None, :, None]
    ycc = (x @ _constant(YCBCR, x.device)).round() - grey
    padded = F.pad(ycc.permute(0, 3, 1, 2), (0, -width % 8, 0, -height % 8), mode="replicate").permute(0, 2, 3, 1)
    blocks = padded.unflatten(2, (-1, 8)).unflatten(1, (-1, 8))  # [N, H / 8, 8, W / 8, 8, 3]
    coded = torch.einsum("ki,lj,nyixjc->nykxlc", dct, dct, blocks)
    coded = (coded / steps).round() * steps
    blocks = torch.einsum("ki,lj,nykxlc->nyixjc", dct, dct, coded)
    ycc = blocks.flatten(3, 4).flatten(1, 2)[:, :height, :width] + grey
    return (ycc.round() @ _constant(RGB, x.device)).round().clamp(0, 255)


@lru_cache
def _constant(values, device):
    return torch.tensor(values, device=device)  # made once: a CUDA graph may not copy from the host
