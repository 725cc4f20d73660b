"""Embedding: `reid.retrieval.extract.Extractor` against plain PyTorch, the usual ways to feed it, and OpenVINO on its own.

A and B alternate in one process; the ratio is the median of the rounds' ratios (over 1: ours is faster). Every peer runs the
same weights in torchvision's own DenseNet-121 (last stride 1, no mirrored images), so the embeddings are compared too.

Two other questions have an option each: what a precision costs in mAP (--accuracy), and whether memory stays flat (--memory).
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import models, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reid import ReidError, images
from reid.checkpoint import save_checkpoint
from reid.cli import run
from reid.data.datasets import read_folder, read_split
from reid.extras.openvino import OpenVinoNetwork
from reid.model import DTYPES, build_model, default_config, plain_network
from reid.retrieval import metrics
from reid.retrieval.extract import Extractor
from reid.retrieval.index import GalleryIndex


def get_args_parser():
    parser = argparse.ArgumentParser("embedding.py", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", default="models/masked-hog-908/best.pth")
    add("--data", help="folder of images (default: 256 drawn here)")
    add("--rounds", type=int, default=9)
    add("--quick", action="store_true", help="5 rounds, within 5 minutes on 2 cores")
    add("--accuracy", nargs="+", metavar="MODE", help="instead: mAP and Rank-1 of modes such as torch-fp32 openvino-bf16, "
        "with embeddings stored as fp32 and as fp16; --data is a grouped dataset")
    add("--memory", type=int, metavar="N", help="instead: index N (repeated) files with a small random network, print the memory")
    add("--json", metavar="PATH", help="write the rows")
    return parser


def main(args):
    if args.accuracy:
        rows = [row for mode in args.accuracy for row in accuracy(args.checkpoint, args.data, *mode.split("-"))]
    else:
        with tempfile.TemporaryDirectory() as folder:
            records = read_folder(args.data or draw(folder, 256))
            if args.memory:
                rows = watch_memory(records, args.memory)
            else:
                rounds = 5 if args.quick else args.rounds
                rows = list((on_gpu if torch.cuda.is_available() else on_cpu)(args.checkpoint, records.files(), rounds))
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1))


def draw(folder, count):
    """JPEG files of Market-1501's size and weight (2.4 kB)."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = F.interpolate(torch.rand(1, 3, 16, 8, generator=generator), (128, 64), mode="bicubic")[0]
        pixels = (255 * (pixels + 0.02 * torch.randn(3, 128, 64, generator=generator)).clamp(0, 1)).to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(Path(folder, f"{i:05}.jpg"), quality=75)
    return folder


class Peer:
    """torchvision's network with the checkpoint's weights: what people run who run nothing of this project."""

    def __init__(self, extractor):
        self.size, self.device = extractor.size, extractor.device
        self.body = models.densenet121().features
        self.body.transition3.pool = torch.nn.Identity()
        self.body.load_state_dict(extractor._model.body.state_dict())
        self.body.eval().to(self.device)
        self.neck = extractor._model.neck
        self.transform = transforms.Compose([transforms.Resize(self.size), transforms.ToTensor(),
                                             transforms.Normalize(images.MEAN, images.STD)])

    @torch.no_grad()
    def embed(self, batch):
        """Normalised float32 [n, 3, H, W] -> embeddings."""
        features = F.relu(self.body(batch.to(self.device))).mean((2, 3))
        return F.normalize(self.neck(features)).cpu()

    def pixels(self, batch):
        return (batch.float() / 255 - torch.tensor(images.MEAN).view(3, 1, 1)) / torch.tensor(images.STD).view(3, 1, 1)

    def published(self, files):
        """Pillow, batches of 16, no workers."""
        dataset = [lambda file=file: self.transform(Image.open(file).convert("RGB")) for file in files]
        return torch.cat([self.embed(torch.stack([item() for item in dataset[i : i + 16]])) for i in range(0, len(files), 16)])

    def feature_extractor(self, files):
        """In the manner of torchreid's FeatureExtractor: image by image through the transforms, then one batch."""
        return self.embed(torch.stack([self.transform(Image.open(file).convert("RGB")) for file in files]))


def compare(name, count, ours, peer, peer_name, rounds):
    """One row: `ours` and `peer` (callables that embed the same `count` images) in turn."""
    a, b = ours(), peer()
    cosine = F.cosine_similarity(a, b).min().item()
    repeat, times = max(1, 8 // count), ([], [])
    for _ in range(rounds):
        for side, taken in zip((ours, peer), times):
            started = time.perf_counter()
            for _ in range(repeat):
                side()
            taken.append((time.perf_counter() - started) / repeat)
    ratio = statistics.median(b / a for a, b in zip(*times))
    speeds = [count / statistics.median(taken) for taken in times]
    print(f"{name}: {ratio:.2f} ({speeds[0]:,.1f} images/s, {peer_name} {speeds[1]:,.1f}; lowest cosine {cosine:.6f})",
          flush=True)
    return {"name": name, "ours": speeds[0], "peer": speeds[1], "peer_name": peer_name, "ratio": ratio, "cosine": cosine}


def on_cpu(checkpoint, files, rounds):
    fast = Extractor(checkpoint, "cpu", mirror=False)
    peer, eager = Peer(fast), "eager fp32 NCHW torchvision"
    print(f"{fast.describe()}; ratios over {eager} unless it says otherwise", flush=True)
    pixels = images.resize([images.decode(file) for file in files[:64]], fast.size)
    normal = peer.pixels(pixels)
    engines = {"fp32": Extractor(checkpoint, "cpu", "fp32", mirror=False), fast.precision: fast}
    try:
        engines["openvino"] = Extractor(checkpoint, "cpu", network=OpenVinoNetwork, mirror=False)
    except ReidError as error:
        print(f"left out: {error}")
    for engine, extractor in engines.items():
        for size in (1, 32, 64) if engine != "fp32" else (32,):
            yield compare(f"network, {engine}, batch {size}", size, partial(extractor.embed, pixels[:size]),
                          partial(peer.embed, normal[:size]), eager, rounds)
    files = [files[i % len(files)] for i in range(64)]
    pixels = images.resize([images.decode(file) for file in files], fast.size)
    yield compare("from files, the published way", 64, partial(fast.embed, files), partial(peer.published, files),
                  "Pillow, batches of 16", rounds)
    yield compare("from files, 32 at once", 32, partial(fast.embed, files[:32]), partial(peer.feature_extractor, files[:32]),
                  "transforms image by image", rounds)
    yield compare("files to embeddings over embeddings only", 256, partial(fast.embed, files * 4),
                  partial(fast.embed, pixels.repeat(4, 1, 1, 1)), "decoded in advance", rounds)
    if "openvino" in engines:
        yield from openvino_alone(engines["openvino"], files[:64], pixels, rounds)


def openvino_alone(extractor, files, pixels, rounds):
    import openvino

    network, neck = extractor._features, extractor._model.neck
    hints = {"INFERENCE_PRECISION_HINT": network._precision}
    compiled, array = openvino.Core().compile_model(network.graph, "CPU", hints), pixels.numpy()

    @torch.no_grad()
    def alone(size):
        return F.normalize(neck(torch.from_numpy(compiled([array[:size]])[0].copy())))

    for name, source in (("1", pixels[:1]), ("32", pixels[:32]), ("64", pixels), ("64 from files", files)):
        yield compare(f"engine openvino, batch {name}", len(source), partial(extractor.embed, source),
                      partial(alone, len(source)), "OpenVINO alone, decoded in advance", rounds)


def on_gpu(checkpoint, files, rounds):
    """Speeds on one GPU: the network on resident pixels, and the whole way from files. No copies of results but embeddings."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    extractor = Extractor(checkpoint, "cuda", mirror=False)
    peer = Peer(extractor)
    print(extractor.describe(), flush=True)
    pixels = images.resize([images.decode(file) for file in files[:64]], extractor.size).cuda().repeat(8, 1, 1, 1)
    normal = peer.pixels(pixels.cpu()).cuda()
    compiled = torch.compile(plain_network(extractor._model, DTYPES[extractor.precision]))
    ways = {"eager": None, "torch.compile": compiled}
    for precision in ("fp16", "fp32"):
        ways[f"eager, {precision}"] = Extractor(checkpoint, "cuda", precision, mirror=False)._features
    for name, network in ways.items():
        yield compare(f"network, {name}, batch 512", 512, lambda network=network: extractor._embed(pixels, network).cpu(),
                      lambda: peer.embed(normal), "eager TF32 NCHW torchvision", rounds)
    many = [files[i % len(files)] for i in range(20_000)]
    resident = pixels.repeat(40, 1, 1, 1)[:20_000]
    yield compare("files to embeddings over embeddings only, 20,000", 20_000, lambda: extractor.embed(many),
                  lambda: torch.cat([extractor._embed(part).cpu() for part in resident.split(512)]), "decoded in advance", rounds)
    yield compare("from files, the published way, 512", 512, lambda: extractor.embed(many[:512]),
                  lambda: peer.published(many[:512]), "Pillow, batches of 16", rounds)


def accuracy(checkpoint, data_root, engine, precision):
    """mAP and Rank-1 of a grouped dataset by one mode, without mirrored images, from float32 and from float16 embeddings."""
    extractor = Extractor(checkpoint, "auto", precision, OpenVinoNetwork if engine == "openvino" else None, mirror=False)
    started = time.perf_counter()
    query, gallery = (GalleryIndex.build(extractor, read_split(data_root, split), dtype=torch.float32)
                      for split in ("query", "gallery"))
    speed = (len(query) + len(gallery)) / (time.perf_counter() - started)
    for stored in (torch.float32, torch.float16):
        embeddings = (index.embeddings.to(stored).float() for index in (query, gallery))
        result = metrics.evaluate(*embeddings, query.pids, query.camids, gallery.pids, gallery.camids)
        name = f"{engine} {precision}, stored as {str(stored).removeprefix('torch.')}"
        print(f"{name}: mAP {100 * result.mAP:.3f}, Rank-1 {100 * result.rank[1]:.3f} ({speed:,.0f} images/s)", flush=True)
        yield {"name": name, "mAP": float(result.mAP), "rank1": float(result.rank[1]), "images_per_second": speed}


class Watched(Extractor):
    """Notes the memory of the process while a gallery is embedded."""

    def stream(self, files, *options):
        done, every, self.rows = 0, max(1, len(files) // 10), []
        for positions, rows in super().stream(files, *options):
            yield positions, rows
            done += len(positions)
            if done // every > (done - len(positions)) // every:
                self.rows.append(note(f"{done:,} files", done * self.dim * 2))


def note(name, known):
    """A row with the resident memory now, and what of it is not the `known` bytes of embeddings."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    rest, files = resident - known / 2**20, len(os.listdir("/proc/self/fd"))
    print(f"{name}: {resident:,.0f} MiB resident, {rest:,.0f} without the embeddings; {files} files open", flush=True)
    return {"name": name, "resident_mib": resident, "without_embeddings_mib": rest, "files_open": files}


def watch_memory(records, count):
    """Index `count` files (the records again and again) and save it: only the float16 embeddings and the names may grow.

    The files are decoded as they are; the network has random weights and takes 64x32, so that it ends in minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(f"{folder}/best.pth", build_model(default_config([1, 2], height=64, width=32)), {}, {})
        extractor = Watched(f"{folder}/best.pth", mirror=False)
        Extractor(f"{folder}/best.pth", mirror=False).embed(records.files()[:64])  # libraries are there for the first row
        started = time.perf_counter()
        many = records.select(torch.arange(count) % len(records))
        rows = [note("before", 0)]
        index = GalleryIndex.build(extractor, many, progress=False)
        speed = len(index) / (time.perf_counter() - started)
        index.save(f"{folder}/index.pt")
        rows += [*extractor.rows, note("saved", index.embeddings.nbytes)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{len(index):,} images at {speed:,.0f} images/s; at most {peak:,.0f} MiB resident", flush=True)
    return [*rows, {"name": "whole run", "images_per_second": speed, "peak_mib": peak}]


if __name__ == "__main__":
    run(get_args_parser(), main)
