"""From an image file to uint8 pixels: the one way in for training, evaluation, inference and export."""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from reid import ReidError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for RGB in 0..1
MAX_PIXELS = 50_000_000  # larger images are refused before they are decoded (decompression bombs)
MAX_BYTES = 256 << 20  # larger files are refused before they are read; no image of MAX_PIXELS needs more
# Named, because Pillow otherwise looks for more at the first file that it does not know, while other threads go through its
# list; and because some of its formats run other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PREPROCESSING = "rgb-u8/bilinear-antialias/imagenet-mean-std/1"  # part of an index's fingerprint: change it with the code

# Pillow warns of odd images; here and not around each decoding, where threads would undo each other's settings.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(source):
    """An image file as uint8 [3, h, w], RGB, upright.

    source: path, bytes, or a PIL image. EXIF rotation is applied; grey, palette, CMYK, 16-bit and transparent images are
    converted (transparency onto white), of an animation the first frame is taken. Raises ReidError (path and reason) for
    what is not a whole image or has more than MAX_PIXELS.
    """
    name = source if isinstance(source, (str, Path)) else "image"
    try:
        image = source if isinstance(source, Image.Image) else _open(source)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        pixels = np.array(_to_rgb(image))
    except Image.DecompressionBombError as error:
        raise ReidError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError ...
        reason = "no such file" if isinstance(error, FileNotFoundError) else (str(error) or type(error).__name__)
        reason = reason.replace(str(name), "").strip(" '\"") if "cannot identify" not in reason else "not an image"
        raise ReidError(f"{name}: cannot be read as an image ({reason})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open(source):
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(source), formats=FORMATS)
    found = os.stat(source)
    if not stat.S_ISREG(found.st_mode):  # a pipe would never end, a link to /dev/zero neither
        raise OSError("is a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file")
    if found.st_size > MAX_BYTES:
        raise OSError(f"{found.st_size:,} bytes, more than {MAX_BYTES:,}")
    # One read: a handle kept open by a lazy decoder would add up over 100,000 files.
    return Image.open(io.BytesIO(Path(source).read_bytes()), formats=FORMATS)


def _to_rgb(image):
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
    if "exif" in image.info or image.format in ("TIFF", "WEBP", "PNG"):
        image = ImageOps.exif_transpose(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def resize(images, size):
    """Images of any sizes as one uint8 batch [N, 3, H, W].

    images: uint8 tensors [3, h, w] (list, or a batch); size: (H, W). Bilinear, with antialiasing where it shrinks. Images
    of one size are resized together, and each comes out the same whatever stands beside it.
    """
    if len({image.shape for image in images}) == 1:
        batch = images if isinstance(images, torch.Tensor) else torch.stack(list(images))
        return _resize_batch(batch, tuple(size))
    return torch.cat([_resize_batch(image[None], tuple(size)) for image in images])


def _resize_batch(batch, size):
    if batch.shape[-2:] == size:
        return batch.contiguous()
    if batch.device.type == "cpu":  # has a fixed-point kernel for bytes, equal to Pillow's
        return F.interpolate(batch, size, mode="bilinear", antialias=True)
    return F.interpolate(batch.float(), size, mode="bilinear", antialias=True).round_().clamp_(0, 255).to(torch.uint8)
