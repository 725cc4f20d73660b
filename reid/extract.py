"""From images to embeddings: one Extractor owns decoding, the inference network and its device."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from reid import ReidError, images
from reid.checkpoint import fingerprint, load_checkpoint, restore_model
from reid.data import read_folder
from reid.model import pick_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Extractor:
    """Embeds person crops with the network of a checkpoint.

    checkpoint: path of a .pth file. device: auto, cpu, cuda, cuda:1 ... precision: auto, fp32, bf16 or fp16. mirror: the
    embedding is the normalised sum of the neck's outputs of an image and of its mirror image (twice the work, about one
    point of mAP more).
    """

    def __init__(self, checkpoint, device="auto", precision="auto", engine="torch", compile="auto", mirror=True,
                 batch_size=None):
        record = load_checkpoint(checkpoint)
        self.config = {key: value for key, value in record["config"].items() if key != "classes"}
        self.fingerprint = fingerprint(record)
        self.size = (self.config["height"], self.config["width"])
        self.dim = self.config["embedding_size"]
        self.device = pick_device(device)
        self.precision = pick_precision(self.device) if precision == "auto" else precision
        self.mirror = mirror
        self.batch_size = batch_size or (32 if self.device.type == "cpu" else 512)
        self.engine = engine
        self._model = restore_model(record, checkpoint).eval().to(self.device)

    def describe(self):
        """One line for people: what embeds, where, in which precision."""
        where = f"cpu, {torch.get_num_threads()} threads" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        return (f"{self.config['backbone']} {self.size[0]}x{self.size[1]} on {where}, {self.precision}, {self.engine}"
                f"{', mirrored' if self.mirror else ''}")

    def embed(self, images, progress=False):
        """float32 [N, dim] on the CPU, rows of norm 1, in the order given; the first bad image raises ReidError.

        images: a folder, or a list of paths, PIL images, uint8 arrays [h, w, 3] and uint8 tensors [3, h, w] (RGB), or a
        uint8 batch [N, 3, h, w].
        """
        return self.embed_records(_listed(images), strict=True, progress=progress)[0]

    def embed_records(self, files, strict=False, progress=True, on_batch=None):
        """Embed a gallery: images that cannot be read are left out and reported (`strict` raises at the first).

        Returns (embeddings float32 [M, dim], kept int64 [M] positions in `files`, bad [(file, reason)]). `on_batch(done)`
        is called with the number of files done so far.
        """
        embeddings, kept, bad = torch.empty(len(files), self.dim), torch.empty(len(files), dtype=torch.int64), []
        count = 0
        for positions, rows in self.stream(files, strict, progress, bad):
            embeddings[count : count + len(rows)] = rows
            kept[count : count + len(rows)] = positions
            count += len(rows)
            if on_batch:
                on_batch(count + len(bad))
        return embeddings[:count], kept[:count], bad

    def stream(self, files, strict=False, progress=False, bad=None):
        """Yield (positions int64 [n], embeddings float32 [n, dim]) batch by batch; appends (file, reason) to `bad`."""
        bar = _bar(len(files), progress)
        for start in range(0, len(files), self.batch_size):
            positions, pixels = [], []
            for i in range(start, min(start + self.batch_size, len(files))):
                try:
                    pixels.append(to_pixels(files[i]))
                    positions.append(i)
                except ReidError as error:
                    if strict:
                        raise
                    bad.append((files[i], str(error).removeprefix(f"{files[i]}: ")))
            if pixels:
                yield torch.tensor(positions), self._network(images.resize(pixels, self.size))
            bar.update(min(self.batch_size, len(files) - start))
        bar.close()

    @torch.inference_mode()
    def _network(self, batch):
        """uint8 [n, 3, H, W] -> embeddings float32 [n, dim] on the CPU."""
        batch = batch.to(self.device)
        views = [batch, batch.flip(3)] if self.mirror else [batch]
        autocast = torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")
        with autocast:
            features = [self._model.features(view) for view in views]
        return F.normalize(sum(self._model.neck(x.float()) for x in features)).cpu()


def pick_precision(device):
    """bf16 where the device computes in it (fp16 on older GPUs), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "fp32"


def to_pixels(source):
    """One image (path, bytes, PIL image, uint8 array [h, w, 3] or uint8 tensor [3, h, w]) as uint8 [3, h, w]."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        pixels = torch.from_numpy(np.ascontiguousarray(source)).permute(2, 0, 1) if isinstance(source, np.ndarray) and \
            source.ndim == 3 else source
        if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3 \
                or not pixels.numel():
            raise ReidError(f"image of shape {tuple(source.shape)} and type {source.dtype}: give uint8, [h, w, 3] as an array "
                            "or [3, h, w] as a tensor")
        return pixels
    return images.decode(source)


def _listed(source):
    if isinstance(source, (str, Path)):
        return read_folder(source).files() if os.path.isdir(source) else [source]
    return [source] if isinstance(source, Image.Image) else source


def _bar(total, progress):
    from tqdm import tqdm

    return tqdm(total=total, unit="img", disable=not progress)
