"""From an image file to uint8 pixels: the only way for training, evaluation, inference and export."""

import io
import os
import re
import stat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps

from reid import ReidError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for RGB in 0..1
PIXELS = ("bgr255", "rgb255", "imagenet")  # what networks of other origins expect: 0 to 255, or RGB minus MEAN over STD
MAX_PIXELS = 50_000_000  # larger images are refused before they are decoded (decompression bombs)
MAX_BYTES = 256 << 20  # larger files are refused before they are read; no image of MAX_PIXELS needs more
MAX_SCANS = 100  # of a JPEG: a scan of a few bytes costs a pass over all pixels; progressive files of cameras have about 10
MAX_SEGMENTS = 10_000  # of a JPEG; cameras write less than a hundred
MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")  # of a JPEG's segment; others (stuffing, restarts) are part of the data
# The header of a PPM that is not written as text, which Pillow reads slowly: 10 MB of comments take minutes
PPM = re.compile(rb"P(4(?=(NUMBER){2})|[56fF](?=(NUMBER){3}))".replace(b"NUMBER", rb"\s+(?:#[^\n]*\n\s*)*[-+.\d]+"))
# A fixed list, because Pillow otherwise loads further plug-ins at the first unknown file, while other threads read its list;
# and because some of its formats run other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
PREPROCESSING = "rgb-u8/bilinear-antialias/imagenet-mean-std/1"  # part of an index's fingerprint: change it with the code


def decode(source):
    """Decode an image file to uint8 [3, h, w], RGB, upright.

    source: path, bytes, or a PIL image. EXIF rotation is applied; grey, palette, CMYK, 16-bit, float and transparent images
    are converted (transparency onto white; grey values of more than 8 bits by the range that holds them); of an animation
    the first frame is taken. Raises ReidError (path and reason) for what is not a whole image, has more than MAX_PIXELS, or
    would take minutes: a JPEG of more than MAX_SCANS scans, a PPM written as text.
    """
    name, most = source if isinstance(source, (str, Path)) else "image", MAX_PIXELS
    try:
        image = source if isinstance(source, Image.Image) else _open(source)
        most //= 4 if image.format == "JPEG2000" else 1  # whose decoder takes 24 bytes for each
        if image.width * image.height > most:
            raise Image.DecompressionBombError
        pixels = np.array(_to_rgb(image))
    except Image.DecompressionBombError as error:
        raise ReidError(f"{name}: more than {most:,} pixels; make it smaller") from error
    except MemoryError:  # says nothing about this image
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError ...
        reason = "no such file" if isinstance(error, FileNotFoundError) else (str(error) or type(error).__name__)
        reason = reason.replace(str(name), "").strip(" '\"") if "cannot identify" not in reason else "not an image"
        raise ReidError(f"{name}: cannot be read as an image ({reason})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def is_image(source):
    """Whether a file (path or bytes) begins like an image that `decode` reads, whatever its name is."""
    try:
        Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS).close()
    except Exception:  # see `decode`
        return False
    return True


def _open(source):
    if not isinstance(source, (bytes, bytearray, memoryview)):
        found = os.stat(source)
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end, nor a link to /dev/zero
            raise OSError("is a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file")
        if found.st_size > MAX_BYTES:
            raise OSError(f"{found.st_size:,} bytes, more than {MAX_BYTES:,}")
        source = Path(source).read_bytes()  # one read: handles that lazy decoders keep open would add up over 100,000 files
    if source[:2] == b"\xff\xd8" and _has_too_many_scans(source):
        raise OSError(f"a JPEG of more than {MAX_SCANS} scans or {MAX_SEGMENTS:,} segments")
    if re.match(rb"P[1-6fF]\s", source) and not PPM.match(source[:1024]):
        raise OSError("a PPM written as text, or with long comments; save it in another format")
    return Image.open(io.BytesIO(source), formats=FORMATS)


def _has_too_many_scans(data):
    """Whether a JPEG has more than MAX_SCANS scans or MAX_SEGMENTS segments, each of which states its length."""
    scans, segments, found = 0, 0, MARKER.search(data, 2)
    while found and found[1] != b"\xd9" and scans <= MAX_SCANS and segments <= MAX_SEGMENTS:
        scans, segments = scans + (found[1] == b"\xda"), segments + 1
        found = MARKER.search(data, found.end() + int.from_bytes(data[found.end() : found.end() + 2]))
    return scans > MAX_SCANS or segments > MAX_SEGMENTS


def _to_rgb(image):
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(_to_eight_bits(np.asarray(image)))
    if "exif" in image.info or image.format in ("TIFF", "WEBP", "PNG"):
        image.load()  # which turns a TIFF
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else Pillow would copy it
            image = ImageOps.exif_transpose(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _to_eight_bits(values):
    """Scale grey values, integers or floats, to 0..255 by the range that holds them: 0..1 (floats), 8, 10, 12, 14 or 16 bits.

    Raises ValueError for negative, larger and non-finite values.
    """
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"values from {low:g} to {high:g}; save it with 8 bits a channel")
    ranges = (1.0,) * (values.dtype.kind == "f") + (255, 1023, 4095, 16383, 65535)
    return (values.astype(np.float64) * 255 / next(full for full in ranges if high <= full)).astype(np.uint8)


def resize(images, size):
    """Resize images of any sizes to one uint8 batch [N, 3, H, W].

    images: uint8 tensors [3, h, w] (list, or a batch); size: (H, W). Bilinear, with antialiasing where it shrinks. Images
    of one size are resized together, and the result for an image does not depend on the others.
    """
    size = tuple(size)
    if len({image.shape for image in images}) != 1:
        return torch.cat([_resize_batch(image[None], size) for image in images])
    if not isinstance(images, torch.Tensor):
        # Decoders write channels last; a batch with that memory layout is resized twice as fast.
        images = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return _resize_batch(images, size)


def _resize_batch(batch, size):
    if batch.shape[-2:] == size:
        return batch.contiguous()
    return F.interpolate(batch, size, mode="bilinear", antialias=True)  # for bytes a fixed-point kernel, equal to Pillow's
