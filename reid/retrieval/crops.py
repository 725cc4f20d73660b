"""From crops of any kind (paths, bytes, arrays, tensors, boxes of a frame) to batches of pixels."""

import numpy as np
import torch

from reid import ReidError, images
from reid.cli import first_line

SMALL = 1 << 20  # bytes of pixels up to which a decoded image may wait to be resized together with others of its size


def load_batch(files, part, size):
    """Decode and resize the images `files[i]` for i in `part`: uint8 [n, 3, H, W] (None where none could be read).

    Also returns {i: ReidError} of those that could not be read. Large images are resized one by one as soon as they are
    decoded, so that no two wait in memory; small ones together.
    """
    pixels, failures = [], {}
    for i in part:
        try:
            image = to_pixels(files[i])
        except ReidError as error:
            failures[i] = error
            continue
        pixels.append(image if image.numel() <= SMALL else images.resize([image], size)[0])
    return images.resize(pixels, size) if pixels else None, failures


def to_pixels(source):
    """Convert one image, as in `Extractor.embed`, to uint8 [3, h, w]; arrays and tensors keep their order of channels."""
    if not isinstance(source, (np.ndarray, torch.Tensor)):
        return images.decode(source)
    shape, kind, pixels = tuple(source.shape), source.dtype, source
    if isinstance(source, np.ndarray):
        if kind != np.uint8:
            source = source.astype(np.float32) if kind.kind in "uif" else np.empty(0, np.float32)
        elif not source.flags.writeable or min(source.strides, default=0) < 0:  # PyTorch shares memory with neither
            source = source.copy()
        pixels = torch.from_numpy(source)
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels
    if pixels.ndim == 2 or (pixels.ndim == 3 and len(pixels) == 1):
        pixels = pixels.expand(3, *pixels.shape[-2:])
    if pixels.ndim != 3 or len(pixels) != 3 or pixels.numel() == 0:
        raise ReidError(f"image of shape {shape} and type {kind}: give numbers, as an array [h, w, 3] or [h, w], or as a tensor "
                        "[3, h, w]")
    if pixels.dtype == torch.uint8:
        return pixels.cpu()
    pixels = pixels.float().cpu()
    low, high = (value.item() for value in pixels.aminmax())
    if not 0 <= low <= high <= 255:
        raise ReidError(f"image of shape {shape} with values from {low:g} to {high:g}: give 0..255, or floats 0..1")
    return (pixels * (255 if "float" in str(kind) and high <= 1 else 1)).round().to(torch.uint8)


def cut(frame, boxes, channels="rgb"):
    """Cut boxes [N, 4] (x1, y1, x2, y2) out of a frame: RGB, uint8 tensors [3, h, w], empty for an empty box or NaN.

    They are views of one frame, because copies of many large boxes take gigabytes.
    """
    try:
        boxes = np.array(boxes.detach().cpu().numpy() if isinstance(boxes, torch.Tensor) else boxes, dtype=np.float64)
        boxes = boxes.reshape(-1, 4) if boxes.ndim == 2 and boxes.shape[1] == 4 else boxes.reshape(0, 4)
    except (ValueError, TypeError) as error:
        raise ReidError(f"boxes ({first_line(error)}): give [N, 4] as x1, y1, x2, y2") from error
    pixels = to_pixels(frame)
    if channels == "bgr" and isinstance(frame, (np.ndarray, torch.Tensor)):
        pixels = pixels.flip(0)
    boxes[np.isnan(boxes).any(1)] = 0
    boxes = boxes.clip(0, [pixels.shape[2], pixels.shape[1]] * 2).astype(int).tolist()
    return [pixels[:, y1:y2, x1:x2] for x1, y1, x2, y2 in boxes]
