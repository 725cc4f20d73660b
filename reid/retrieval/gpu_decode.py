"""JPEG files to the GPU: nvJPEG where it decodes a file as Pillow would, CPU threads for everything else."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from PIL import Image

from reid import ReidError, images

FRAMES = range(0xC0, 0xC3)  # baseline, extended, progressive


def load_part(files, part, size, device):
    """The images `files[i]` for i in `part` as uint8 [n, 3, H, W] on `device` (None where none could be read).

    Also returns {i: ReidError} of those that could not be. Work is queued on the current CUDA stream.
    """
    read = _load if decoder(device) == "nvJPEG" else _decode
    loaded = list(_threads().map(lambda i: read(files[i]), part))
    encoded = [i for i, item in enumerate(loaded) if isinstance(item, torch.Tensor) and item.ndim == 1]
    try:
        decoded = _nvjpeg([loaded[i] for i in encoded], device) if encoded else []
    except RuntimeError:  # it refuses one of them and does not say which
        decoded = list(_threads().map(lambda i: _decode(files[part[i]]), encoded))
    for i, item in zip(encoded, decoded):
        loaded[i] = item
    failures = {i: item for i, item in zip(part, loaded) if isinstance(item, ReidError)}
    pixels = [item for item in loaded if not isinstance(item, ReidError)]
    return (_to_device(pixels, size, device) if pixels else None), failures


@cache
def decoder(device):
    """What decodes plain JPEGs for this GPU: nvJPEG, if torchvision has it, or CPU threads."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "jpeg")
    try:
        _nvjpeg([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except (ImportError, RuntimeError):
        return "CPU threads decode"
    return "nvJPEG"


def _nvjpeg(encoded, device):
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)


@cache
def _threads():
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def _load(source):
    """Bytes (uint8 [n]) of a JPEG for nvJPEG, or pixels (uint8 [3, h, w]), or the ReidError."""
    if isinstance(source, (str, os.PathLike)):
        try:
            with open(source, "rb") as file:
                data = file.read()
        except OSError:
            data = b""
        if plain_jpeg(data):
            return torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return _decode(source)


def _decode(source):
    from reid.retrieval.extract import to_pixels

    try:
        return to_pixels(source)
    except ReidError as error:
        return error


def plain_jpeg(data):
    """Whether bytes are a whole JPEG, 8 bits, grey or YCbCr, upright, not too large: one that every decoder reads alike."""
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return False
    at, frame = 2, None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        body = data[at + 4 : at + 2 + length]
        if marker in FRAMES and len(body) >= 6:
            frame = body
        elif marker == 0xDA:  # the pixels begin
            if frame is None:
                return False
            height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
            return frame[0] == 8 and frame[5] in (1, 3) and 0 < height * width <= images.MAX_PIXELS
        elif 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # lossless or arithmetic coding
            return False
        elif (marker == 0xE1 and body[:4] == b"Exif") or (marker == 0xEE and body[:5] == b"Adobe"):
            return False  # may be rotated; may be stored as RGB or CMYK
        at += 2 + length
    return False


def _to_device(pixels, size, device):
    if any(item.is_cuda for item in pixels) or len({item.shape for item in pixels}) == 1:
        if not any(item.is_cuda for item in pixels):  # one copy for the whole batch
            pixels = torch.stack(pixels).pin_memory().to(device, non_blocking=True)
        return images.resize([item.to(device) for item in pixels], size)
    return images.resize(pixels, size).pin_memory().to(device, non_blocking=True)
