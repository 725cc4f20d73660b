"""From images to embeddings: one Extractor owns decoding, the inference network and its device."""

import argparse
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from reid import ReidError, distributed, images
from reid.checkpoint import fingerprint, load_checkpoint, restore_model
from reid.data.datasets import read_folder
from reid.folded import FoldedDenseNet
from reid.model import DTYPES, pick_device, pick_precision

VIEWS = {"cpu": 16, "cuda": 512}  # views (images, or images and their mirrors) that go through the network together
COMPILE_FROM = 300_000  # images from which `compile="auto"` pays for a minute of compiling on a GPU


class Extractor:
    """Embeds person crops with the network of a checkpoint.

    checkpoint: path of a .pth file. device: auto, cpu, cuda, cuda:1 ... precision: auto (what the device computes fast),
    fp32, bf16 or fp16. engine: torch, or openvino (CPU only, an extra package). compile: auto, on or off (CUDA only).
    mirror: the embedding is the normalised sum of the neck's outputs of an image and of its mirror image: twice the work,
    better ranking. batch_size: images that go through the network together (each of a CPU's workers has its own).
    Raises ReidError for what this machine cannot do.
    """

    def __init__(self, checkpoint, device="auto", precision="auto", engine="torch", compile="auto", mirror=True,
                 batch_size=None):
        record = load_checkpoint(checkpoint)
        self.config = {key: value for key, value in record["config"].items() if key != "classes"}
        self.fingerprint = fingerprint(record)
        self.size = (self.config["height"], self.config["width"])
        self.dim = self.config["embedding_size"]
        self.device = pick_device("cpu" if engine == "openvino" and device == "auto" else device)
        self.precision = pick_precision(self.device, precision)
        self.engine, self.compile, self.mirror = engine, compile, mirror
        self.batch_size = batch_size or VIEWS.get(self.device.type, 512) // (2 if mirror else 1)
        self._checkpoint = Path(checkpoint)
        self._model = restore_model(record, checkpoint).eval().requires_grad_(False).to(self.device)
        self._features = self._network()
        self._compiled = self._workers = None
        self._room = 1 << 30  # images that have been found to fit into the GPU's memory together

    @classmethod
    def from_args(cls, checkpoint, args):
        """The Extractor that the options of `add_arguments` ask for, on this rank's GPU under torchrun."""
        return cls(checkpoint, distributed.device or args.device, args.precision, args.engine, args.compile, args.mirror is not False,
                   args.batch_size)

    def describe(self):
        """One line for people: what embeds, where, in which precision."""
        where = f"cpu ({torch.get_num_threads()} threads)"
        if self.device.type == "cuda":
            from reid.retrieval.gpu_decode import decoder

            where = f"{torch.cuda.get_device_name(self.device)} ({decoder(self.device)})"
        size = "x".join(map(str, self.size))
        return f"{self.config['backbone']} {size} on {where}, {self.precision}, {self.engine}{', mirrored' * self.mirror}"

    def embed(self, images, progress=False, dtype=torch.float32):
        """`dtype` [N, dim] on the CPU, rows of norm 1, in the order given; the first bad image raises ReidError.

        images: a folder, or a list of paths, encoded bytes, PIL images, uint8 arrays [h, w, 3] and uint8 tensors
        [3, h, w] (RGB), or a uint8 batch [N, 3, h, w].
        """
        if isinstance(images, (str, Path)):
            images = read_folder(images).files() if os.path.isdir(images) else [images]
        return self.embed_records([images] if isinstance(images, Image.Image) else images, True, progress)[0].to(dtype)

    def embed_records(self, files, strict=False, progress=True):
        """Embed a gallery: images that cannot be read are left out and reported (`strict` raises at the first).

        Returns (embeddings float32 [M, dim], kept int64 [M] positions in `files`, bad [(file, reason)]).
        """
        embeddings, kept, bad = torch.empty(len(files), self.dim), torch.empty(len(files), dtype=torch.int64), []
        count = 0
        for positions, rows in self.stream(files, strict, progress, bad):
            embeddings[count : count + len(rows)] = rows
            kept[count : count + len(rows)] = positions
            count += len(rows)
        return embeddings[:count], kept[:count], bad

    def stream(self, files, strict=False, progress=False, bad=None):
        """Yield (positions int64 [n], embeddings float32 [n, dim] on the CPU) in order, a batch at a time.

        `files` is any sequence of what `embed` takes. Bad images are appended to `bad` as (file, reason); `strict` (or no
        such list) raises at the first.
        """
        from tqdm import tqdm

        with tqdm(total=len(files), unit="img", disable=not progress) as bar:
            for part, failures, rows in self._on_cpu(files) if self.device.type == "cpu" else self._on_gpu(files):
                if failures and (strict or bad is None):
                    raise next(iter(failures.values()))
                if failures:
                    bad += [(files[i], str(error).removeprefix(f"{files[i]}: ")) for i, error in failures.items()]
                bar.update(len(part))
                if rows is not None:
                    yield torch.tensor([i for i in part if i not in failures]), rows

    def _on_cpu(self, files):
        """Each worker takes its own images from file to embedding on a core of its own.

        No two cores wait for each other inside the network, which costs much where something else is running too.
        """
        def work(part):
            pixels, failures = decode_part(files, part)
            return part, failures, self._embed(images.resize(pixels, self.size)) if len(pixels) else None

        workers = _workers()
        size = min(self.batch_size, -(-len(files) // workers) or 1)
        # OpenVINO has threads of its own, which those of PyTorch would get in the way of outside the workers.
        if workers == 1 or (len(files) < 2 and self.engine == "torch"):
            return map(work, _parts(len(files), self.batch_size))
        return in_order(self._pool(workers), work, _parts(len(files), size), 2 * workers)

    def _pool(self, workers):
        if self._workers is None:
            threads, started = torch.get_num_threads(), threading.Barrier(workers)

            def start(_):
                torch.get_num_threads()  # makes PyTorch set this thread up, which would undo the next line later
                torch.set_num_threads(threads // workers)
                started.wait()

            self._workers = ThreadPoolExecutor(workers, thread_name_prefix="embed")
            list(self._workers.map(start, range(workers)))
            torch.set_num_threads(threads)  # the number for new threads is one for the whole process
        return self._workers

    def _on_gpu(self, files):
        """A thread reads, decodes and copies the next batches on a stream of its own while this one computes."""
        from reid.retrieval.gpu_decode import load_part

        compiled = self.compile == "on" or (self.compile == "auto" and len(files) >= COMPILE_FROM)
        if compiled and self._compiled is None:
            self._compiled = torch.compile(plain_network(self._model, DTYPES[self.precision]))
        stream, waiting = torch.cuda.Stream(self.device), None

        def load(part):
            with torch.cuda.stream(stream):
                batch, failures = load_part(files, part, self.size, self.device)
                return part, batch, failures, stream.record_event()

        with ThreadPoolExecutor(1) as loader:
            for part, batch, failures, ready in in_order(loader, load, _parts(len(files), self.batch_size), 2):
                rows = None
                if batch is not None:
                    current = torch.cuda.current_stream(self.device)
                    current.wait_event(ready)
                    batch.record_stream(current)
                    rows = self._fitting(batch, self._compiled if compiled else None)
                if waiting:  # fetched while the next batch computes
                    yield *waiting[:2], waiting[2] if waiting[2] is None else waiting[2].cpu()
                waiting = part, failures, rows
            if waiting:
                yield *waiting[:2], waiting[2] if waiting[2] is None else waiting[2].cpu()

    def _fitting(self, batch, network=None):
        """Embeddings of a batch on the GPU; when its memory is short, in halves, and so from then on."""
        while True:
            try:
                if network and len(batch) <= self._room:  # padded: another shape would be compiled anew
                    padded = F.pad(batch, (0, 0) * 3 + (0, self.batch_size - len(batch)))
                    return self._embed(padded, network)[: len(batch)]
                return torch.cat([self._embed(part) for part in batch.split(min(len(batch), self._room))])
            except torch.OutOfMemoryError as error:
                if min(len(batch), self._room) == 1:
                    raise ReidError(f"{self.device}: out of memory with a single image; use --device cpu") from error
                self._room = min(len(batch), self._room) // 2
            except Exception as error:
                if network is None:
                    raise
                if self.compile == "on":
                    reason = str(error).splitlines()[0][:120]
                    raise ReidError(f"--compile on: torch.compile failed ({reason}); use --compile off") from error
                network = self._compiled = None  # auto: no compiler here, most often
            torch.cuda.empty_cache()  # out here the failed attempt's tensors are gone

    @torch.no_grad()
    def _embed(self, batch, network=None):
        """uint8 [n, 3, H, W] -> embeddings float32 [n, dim], on the device."""
        views = torch.cat([batch, batch.flip(3)]) if self.mirror else batch
        neck = self._model.neck((network or self._features)(views).float())
        return F.normalize(neck[: len(batch)] + neck[len(batch) :] if self.mirror else neck)

    def _network(self):
        """uint8 [n, 3, H, W] -> pooled features [n, D], as fast as the engine, the precision and the backbone allow."""
        if self.engine == "openvino":
            from reid.extras.openvino import OpenVinoNetwork

            kept = self._checkpoint.with_suffix(f".{self.precision}.openvino")
            return OpenVinoNetwork(self._model, self.precision, _workers(), kept, self.fingerprint)
        if self.engine != "torch":
            raise ReidError(f"--engine {self.engine}: use torch or openvino")
        if self.config["backbone"] == "densenet121" and not self.config.get("ibn"):  # instance norms cannot be folded
            return FoldedDenseNet(self._model, DTYPES[self.precision])
        return plain_network(self._model, DTYPES[self.precision])


def add_arguments(parser):
    """The options of a script that embeds, for `Extractor.from_args`. `mirror` is None where it is not given."""
    add = parser.add_argument
    add("--mirror", action=argparse.BooleanOptionalAction, help="average each image with its mirror image (default: as the "
        "index; on for a new one)")
    add("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="auto: the fastest that the device computes in")
    add("--engine", choices=["torch", "openvino"], default="torch", help="openvino: faster on a CPU; an extra package")
    add("--compile", choices=["auto", "on", "off"], default="auto", help=f"torch.compile on a GPU; auto: from {COMPILE_FROM:,} "
        "images")
    add("--batch_size", type=int, help="images at once, on a CPU in each worker (default: 8 on a CPU, 256 on a GPU; twice "
        "that without mirror images)")


def plain_network(model, dtype):
    """The features of a ReidModel as they are, convolutions in `dtype`: for other backbones, and for torch.compile."""
    def features(images):
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return model.features(images)

    return features


def decode_part(files, part):
    """Pixels of the images `files[i]` for i in `part` that could be read, and {i: ReidError} of those that could not.

    Decoded files of one size come as a batch whose channels are last in memory, as decoders write them: that is resized
    twice as fast.
    """
    pixels, failures = [], {}
    for i in part:
        try:
            pixels.append(to_pixels(files[i]))
        except ReidError as error:
            failures[i] = error
    if len({image.shape for image in pixels}) == 1 and pixels[0].stride(0) == 1:
        pixels = torch.stack([image.permute(1, 2, 0) for image in pixels]).permute(0, 3, 1, 2)
    return pixels, failures


def to_pixels(source):
    """One image (path, bytes, PIL image, uint8 array [h, w, 3] or uint8 tensor [3, h, w]) as uint8 [3, h, w]."""
    if not isinstance(source, (np.ndarray, torch.Tensor)):
        return images.decode(source)
    pixels = torch.from_numpy(source).movedim(-1, 0) if isinstance(source, np.ndarray) and source.ndim == 3 else source
    if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3 \
            or pixels.numel() == 0:
        raise ReidError(f"image of shape {tuple(source.shape)} and type {source.dtype}: give uint8, [h, w, 3] as an array "
                        "or [3, h, w] as a tensor")
    return pixels


def in_order(pool, work, parts, ahead):
    """`pool.map` that runs at most `ahead` parts in front of whoever takes the results, so that memory stays flat."""
    waiting = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(work, part))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _workers():
    """Threads that embed side by side on a CPU. Past 16 each has several cores: the interpreter is shared."""
    return min(torch.get_num_threads(), 16)


def _parts(total, size):
    return (range(start, min(start + size, total)) for start in range(0, total, size))
