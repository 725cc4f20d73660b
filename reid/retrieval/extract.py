"""From images to embeddings: the Extractor owns decoding, the inference network and its device."""

import argparse
import os
import threading
import warnings
from collections import ChainMap, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from reid import ReidError
from reid.checkpoint import checkpoint_path, fingerprint, load_checkpoint, restore_model
from reid.cli import first_line
from reid.data.datasets import read_folder
from reid.folded import FoldedDenseNet
from reid.images import PIXELS
from reid.model import DTYPES, cast_network, pick_device, pick_precision, plain_network
from reid.retrieval.crops import cut, load_batch, to_pixels

VIEWS = {"cpu": 16, "cuda": 512}  # views (images, or images and their mirror images) that go through the network together


class Extractor:
    """Embeds person crops with the network of a checkpoint.

    checkpoint: name of a run (`masked-hog-908` is models/masked-hog-908/best.pth) or path of a .pth file. device: auto, cpu,
    cuda, cuda:1 ... precision: auto (on a GPU fp16, else the fastest that the CPU supports), fp32, bf16 or fp16; a batch that
    overflows fp16 is embedded again in fp32. network: another engine for the CPU, such as the one of reid.extras.openvino: a
    callable (model, precision, workers, path, fingerprint) that returns the features as a callable like `plain_network`'s, or
    None to leave them to PyTorch. mirror: the embedding is the normalised sum of the neck's outputs for an image and its mirror
    image: twice the work, better ranking. batch_size: images that go through the network together (in each worker of a CPU).
    compile: on or off (CUDA only). Raises ReidError for what this machine does not support.
    """

    def __init__(self, checkpoint, device="auto", precision="auto", network=None, mirror=True, batch_size=None, compile="off"):
        path = Path(checkpoint)
        if not (path.is_file() or path.suffix == ".pth" or len(path.parts) > 1):
            path = checkpoint_path(str(checkpoint))
        record = load_checkpoint(path)
        self.config = {key: value for key, value in record["config"].items() if key != "classes"}
        self.fingerprint = fingerprint(record)
        self.size = (self.config["height"], self.config["width"])
        self.dim = self.config["embedding_size"]
        self._start("cpu" if network and device == "auto" else device, precision, mirror, batch_size, compile)
        self._model = restore_model(record, path).eval().requires_grad_(False).to(self.device)
        self._features, self._neck = self._network(network, path), self._model.neck
        self.engine = getattr(self._features, "engine", "torch")

    def _start(self, device, precision, mirror, batch_size, compile="off"):
        self.device = pick_device(device)
        cuda = self.device.type == "cuda"  # fp16 rounds eight times finer than bf16 at the same speed
        self.precision = pick_precision(self.device, "fp16" if cuda and precision == "auto" else precision)
        self.compile, self.mirror = compile, mirror
        self.batch_size = batch_size or VIEWS.get(self.device.type, 512) // (2 if mirror else 1)
        self._compiled = self._pool = None
        self._room = 1 << 30  # images that have been found to fit into the GPU's memory together

    def _network(self, network, path):
        """Return uint8 [n, 3, H, W] -> pooled features float32 [n, D], as fast as engine, precision and backbone allow."""
        if network:
            features = network(self._model, self.precision, worker_count(), path, self.fingerprint)
            if features:
                return features
        dtype = DTYPES[self.precision]
        if self.device.type == "cpu" and self.config["backbone"] == "densenet121":
            try:
                return FoldedDenseNet(self._model, dtype)
            except (AttributeError, RuntimeError, TypeError, NotImplementedError):
                pass  # a PyTorch or a processor without the operators that it is made of
        return (cast_network if self.device.type == "cuda" else plain_network)(self._model, dtype)

    def describe(self):
        """Return one line: network, input size, device, precision, engine."""
        cuda = self.device.type == "cuda"
        where = torch.cuda.get_device_name(self.device) if cuda else f"cpu ({torch.get_num_threads()} threads)"
        size = "x".join(map(str, self.size))
        return f"{self.config['backbone']} {size} on {where}, {self.precision}, {self.engine}{', mirrored' * self.mirror}"

    def embed(self, images, boxes=None, channels="rgb", progress=False):
        """Embed crops, or the boxes of a frame: float32 [N, dim] on the CPU, rows of norm 1, in the order given.

        images: a list of crops, one crop, a folder, or with `boxes` one frame. A crop or frame is a path, encoded bytes, a
        PIL image, an array [h, w, 3] or [h, w] (grey), or a tensor [3, h, w]. Values are 0..255, or floats 0..1: floats of
        which none is above 1. boxes: [N, 4] as x1, y1, x2, y2 in pixels (array, tensor or list), cut to the frame; fractions
        are dropped, as by `int`. channels: order in arrays and tensors, "rgb" or "bgr" (OpenCV).

        An empty array, and a box that is empty or holds NaN, gets a row of NaN, and one warning states how many. The first
        image that cannot be read raises ReidError.
        """
        if channels not in ("rgb", "bgr"):
            raise ReidError(f"channels {channels!r}: use rgb or bgr")
        if boxes is not None:
            crops = cut(images, boxes, channels)
        elif isinstance(images, (str, Path)) and os.path.isdir(images):
            crops = read_folder(images).files()
        else:
            single = isinstance(images, (str, Path, bytes, Image.Image)) or getattr(images, "ndim", 0) in (2, 3)
            crops = [images] if single else images
        whole = [i for i, crop in enumerate(crops) if 0 not in getattr(crop, "shape", ())]
        files = [crops[i] for i in whole]
        if channels == "bgr" and boxes is None:
            files = [to_pixels(file).flip(0) if isinstance(file, (np.ndarray, torch.Tensor)) else file for file in files]
        rows = self.embed_records(files, strict=True, progress=progress)[0]
        if len(whole) == len(crops):
            return rows
        warnings.warn(f"{len(crops) - len(whole)} of {len(crops)} crops are empty; their embeddings are NaN", stacklevel=2)
        return torch.full((len(crops), self.dim), torch.nan).index_copy(0, torch.tensor(whole, dtype=torch.int64), rows)

    def embed_records(self, files, strict=False, progress=True, dtype=torch.float32):
        """Embed a gallery: images that cannot be read are left out and reported (`strict` raises at the first).

        Returns (embeddings [M, dim] of `dtype`, kept int64 [M] positions in `files`, bad [(file, reason)]).
        """
        embeddings, kept, bad = torch.empty(len(files), self.dim, dtype=dtype), torch.empty(len(files), dtype=torch.int64), []
        count = 0
        for positions, rows in self.stream(files, strict, progress, bad):
            embeddings[count : count + len(rows)] = rows
            kept[count : count + len(rows)] = positions
            count += len(rows)
        return embeddings[:count], kept[:count], bad

    def stream(self, files, strict=False, progress=False, bad=None):
        """Yield (positions int64 [n], embeddings float32 [n, dim] on the CPU) in order, a batch at a time.

        files: any sequence of crops that `embed` takes. Bad images are appended to `bad` as (file, reason); `strict` (or no
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
        """Let each worker take its own images from file to embedding, on a core of its own.

        So no core waits for another inside the network, which costs much where other processes run too.
        """
        def work(part):
            batch, failures = load_batch(files, part, self.size)
            return part, failures, None if batch is None else self._embed(batch)

        workers = worker_count()
        size = min(self.batch_size, -(-len(files) // workers) or 1)
        # Another engine has its own threads, with which PyTorch's would compete outside of the workers.
        if workers == 1 or (len(files) < 2 and self.engine == "torch"):
            return map(work, _parts(len(files), self.batch_size))
        return in_order(self._threads(workers), work, _parts(len(files), size), 2 * workers)

    def _threads(self, workers):
        """Return a pool of `workers` threads that share PyTorch's threads evenly."""
        if self._pool is None:
            threads, started = torch.get_num_threads(), threading.Barrier(workers)

            def start(_):
                torch.get_num_threads()  # initialises PyTorch in this thread, which would undo the next line later
                torch.set_num_threads(threads // workers)
                started.wait()

            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="embed")
            try:
                list(self._pool.map(start, range(workers)))
            except RuntimeError:  # no memory for another thread: those that have started must not wait for it
                started.abort()
                raise
            torch.set_num_threads(threads)  # the number for new threads is one for the whole process
        return self._pool

    def _on_gpu(self, files):
        """Decode and resize the next batches in CPU threads, and copy them on a stream of their own while this one computes."""
        if self.compile == "on" and self._compiled is None:
            self._compiled = torch.compile(self._features)
        stream, waiting, workers = torch.cuda.Stream(self.device), deque(), worker_count()
        threads = self._threads(workers)

        def load(part):
            share = -(-len(part) // workers)
            chunks = [part[start : start + share] for start in range(0, len(part), share)]
            batches, failures = zip(*threads.map(lambda chunk: load_batch(files, chunk, self.size), chunks))
            batches, failures = [batch for batch in batches if batch is not None], dict(ChainMap(*failures))
            with torch.cuda.stream(stream):
                batch = torch.cat(batches).pin_memory().to(self.device, non_blocking=True) if batches else None
                return part, batch, failures, stream.record_event()

        with ThreadPoolExecutor(1) as loader:
            for part, batch, failures, ready in in_order(loader, load, _parts(len(files), self.batch_size), 2):
                rows = done = None
                if batch is not None:
                    current = torch.cuda.current_stream(self.device)
                    current.wait_event(ready)
                    batch.record_stream(current)
                    rows = self._fitting(batch)
                    # This copy is queued before the next batch, and fetched while that one computes.
                    rows = torch.empty(rows.shape).pin_memory().copy_(rows, non_blocking=True)
                    done = current.record_event()
                waiting.append((part, failures, rows, batch, done))
                if len(waiting) > 1:
                    yield self._fetch(*waiting.popleft())
            for last in waiting:
                yield self._fetch(*last)

    def _fetch(self, part, failures, rows, batch, done):
        if rows is not None:
            done.synchronize()
            if self.precision == "fp16" and not rows.isfinite().all():  # overflowed
                rows = self._fitting(batch, plain_network(self._model, torch.float32)).cpu()
        return part, failures, rows

    def _fitting(self, batch, network=None):
        """Embed a batch on the GPU; when its memory is short, in halves, and so from then on."""
        while True:
            size = min(len(batch), self._room)
            compiled = self._compiled if network is None and self._room >= self.batch_size else None
            tuned = size == min(self.batch_size, self._room)  # cuDNN tries its algorithms for the shape of most batches only
            try:
                with torch.backends.cudnn.flags(enabled=True, benchmark=tuned, allow_tf32=False):
                    if compiled:  # padded: another shape would be compiled anew
                        return self._embed(F.pad(batch, (0, 0) * 3 + (0, self.batch_size - size)), compiled)[:size]
                    return torch.cat([self._embed(part, network) for part in batch.split(size)])
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise ReidError(f"{self.device}: out of memory with a single image; use --device cpu") from error
                self._room = size // 2
            except Exception as error:
                if not compiled:
                    raise
                raise ReidError(f"--compile on: torch.compile failed ({first_line(error)}); use --compile off") from error
            torch.cuda.empty_cache()  # out here the failed attempt's tensors are gone

    @torch.no_grad()
    def _embed(self, batch, network=None):
        """Map uint8 [n, 3, H, W] to embeddings float32 [n, dim], on the device."""
        views = torch.cat([batch, batch.flip(3)]) if self.mirror else batch
        neck = self._neck((network or self._features)(views).float())
        return F.normalize(neck[: len(batch)] + neck[len(batch) :] if self.mirror else neck)


def add_arguments(parser):
    """Add the options for `reid.extras.network.make_extractor`. `mirror` is None where it is not given."""
    add = parser.add_argument_group("machine").add_argument
    add("--mirror", action=argparse.BooleanOptionalAction, help="average each image with its mirror image (default: as the "
        "index; on for a new one)")
    add("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="auto: fp16 on a GPU, bf16 on a CPU that supports it")
    add("--engine", choices=["auto", "torch", "openvino"], default="auto", help="auto: OpenVINO on a CPU, if it is installed "
        "(pip install -e '.[openvino]')")
    add("--compile", choices=["on", "off"], default="off", help="torch.compile on a GPU: takes a minute, pays for millions of "
        "images")
    add("--batch_size", type=int, help="images at once, on a CPU in each worker (default: 8 on a CPU, 256 on a GPU; twice "
        "that without mirror images)")
    add("--strict", action="store_true", help="fail where a file is left out or an image cannot be read")
    add = parser.add_argument_group("network of another origin").add_argument
    add("--network", metavar="FILE", help="embed with an OpenVINO (.xml) or ONNX network on the CPU, instead of a run's; the "
        "name of the file takes the place of the run's (default: off)")
    add("--network_input", choices=PIXELS, help="pixels that it expects: 0 to 255, or RGB minus "
        "ImageNet's mean over its deviation")


def in_order(pool, work, parts, ahead):
    """Yield as `pool.map` does, at most `ahead` parts in front of the consumer, so that memory stays flat."""
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


def worker_count():
    """Return how many threads embed side by side on a CPU. Past 16 each has several cores, because they share one interpreter."""
    return min(torch.get_num_threads(), 16)


def _parts(total, size):
    return (range(start, min(start + size, total)) for start in range(0, total, size))
