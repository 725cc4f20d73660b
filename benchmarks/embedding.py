"""Speed of embedding: `reid.retrieval.extract.Extractor` against plain PyTorch with the same weights.

The peer is torchvision's own DenseNet-121 (last stride 1, no mirrored images), eager, in float32 and NCHW. `cosine` of a row
is the lowest between the embeddings of both sides. Two other questions have an option each: what a precision costs in mAP
(--accuracy), and whether memory stays flat over a large gallery (--memory).
"""

import os
import tempfile
import time
from functools import partial

import common
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import models, transforms

from reid import ReidError, images
from reid.checkpoint import load_checkpoint, restore_model, save_checkpoint
from reid.data.datasets import read_folder, read_split
from reid.extras.openvino import OpenVinoNetwork
from reid.model import build_model, default_config, pick_device
from reid.retrieval import metrics
from reid.retrieval.extract import Extractor
from reid.retrieval.index import GalleryIndex

EAGER = "torchvision fp32, eager"


class Peer:
    """torchvision's network with the weights of a checkpoint."""

    def __init__(self, checkpoint, device):
        model = restore_model(load_checkpoint(checkpoint), checkpoint).eval().to(device)
        self.size, self.device = (model.config["height"], model.config["width"]), device
        self.body, self.neck = models.densenet121().features, model.neck
        self.body.transition3.pool = torch.nn.Identity()
        self.body.load_state_dict(model.body.state_dict())
        self.body.eval().to(device)
        self.transform = transforms.Compose([transforms.Resize(self.size), transforms.ToTensor(),
                                             transforms.Normalize(images.MEAN, images.STD)])

    @torch.no_grad()
    def embed(self, batch):
        """Normalised float32 [N, 3, H, W] -> embeddings [N, 1024] on the CPU."""
        return F.normalize(self.neck(F.relu(self.body(batch.to(self.device))).mean((2, 3)))).cpu()

    def embed_files(self, files, batch_size):
        """Pillow, image by image, and no workers."""
        return torch.cat([self.embed(torch.stack([self.transform(Image.open(file).convert("RGB")) for file in
                                                  files[i : i + batch_size]])) for i in range(0, len(files), batch_size)])


def compare(name, count, sides, peer_name, rounds):
    """Return a row. sides: two functions that embed the same `count` images."""
    cosine = F.cosine_similarity(*(side() for side in sides)).min().item()
    speeds = [[count / seconds for seconds in side] for side in common.in_turn(sides, rounds, max(1, 8 // count))]
    return common.row(f"{name}, images per second", *speeds, peer_name, higher_is_better=True, cosine=cosine)


def make_extractors(checkpoint, device):
    """Yield (name, Extractor, batch sizes) of everything that can embed on this device."""
    cuda = device.type == "cuda"
    auto = Extractor(checkpoint, device, mirror=False)
    print(auto.describe(), flush=True)
    yield auto.precision, auto, (1, 64, 512) if cuda else (1, 32, 64)
    if auto.precision != "fp32":
        yield "fp32", Extractor(checkpoint, device, "fp32", mirror=False), (512,) if cuda else (32,)
    if cuda:
        yield f"{auto.precision}, torch.compile", Extractor(checkpoint, device, compile="on", mirror=False), (512,)
        return
    try:
        yield f"OpenVINO {auto.precision}", Extractor(checkpoint, device, network=OpenVinoNetwork, mirror=False), (1, 32, 64)
    except ReidError as error:
        print(f"OpenVINO is left out: {error}")


def speeds(checkpoint, files, device, rounds):
    peer, extractors = Peer(checkpoint, device), list(make_extractors(checkpoint, device))
    most = 512 if device.type == "cuda" else 64
    files = [files[i % len(files)] for i in range(most)]
    pixels = images.resize([images.decode(file) for file in files], peer.size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.MEAN, images.STD))
    normalised = (pixels.float() / 255 - mean) / std
    for name, extractor, sizes in extractors:
        for size in sizes:
            sides = partial(extractor.embed, pixels[:size]), partial(peer.embed, normalised[:size])
            yield compare(f"{name}, batch {size}", size, sides, EAGER, rounds)
    ours = extractors[0][1]
    for count, batch_size in ((most, 16), (most // 2, most // 2)):
        sides = partial(ours.embed, files[:count]), partial(peer.embed_files, files[:count], batch_size)
        yield compare(f"{count} files", count, sides, f"{EAGER}, Pillow, batches of {batch_size}", rounds)
    sides = partial(ours.embed, files * 4), partial(ours.embed, pixels.repeat(4, 1, 1, 1))
    yield compare(f"{4 * most} files", 4 * most, sides, "ours, images decoded in advance", rounds)


def accuracy(checkpoint, data_root, modes):
    """Yield rows of mAP in percent on a grouped dataset, without mirrored images; the peer is the first row.

    modes: engine and precision, such as torch-bf16; each with embeddings stored as float32 and as float16.
    """
    first = None
    for engine, precision in (mode.split("-") for mode in modes):
        extractor = Extractor(checkpoint, "auto", precision, OpenVinoNetwork if engine == "openvino" else None, mirror=False)
        started = time.perf_counter()
        query, gallery = (GalleryIndex.build(extractor, read_split(data_root, split), dtype=torch.float32)
                          for split in ("query", "gallery"))
        speed = (len(query) + len(gallery)) / (time.perf_counter() - started)
        for dtype in (torch.float32, torch.float16):
            embeddings = (index.embeddings.to(dtype).float() for index in (query, gallery))
            result = metrics.evaluate(*embeddings, query.pids, query.camids, gallery.pids, gallery.camids)
            name, mAP = f"mAP, {engine} {precision}, stored as {str(dtype).removeprefix('torch.')}", 100 * float(result.mAP)
            first = first or (mAP, name)
            print(f"{name}: {mAP:.3f}, Rank-1 {100 * result.rank[1]:.3f}")
            yield common.row(name, [mAP], [first[0]], first[1], higher_is_better=True,
                             rank1=100 * float(result.rank[1]), images_per_second=speed)


class Watched(Extractor):
    """Keeps the resident memory beyond the float16 embeddings, in MB, at each tenth of the gallery."""

    def stream(self, files, *options):
        done, every, self.memory = 0, max(1, len(files) // 10), []
        for positions, rows in super().stream(files, *options):
            yield positions, rows
            done += len(positions)
            if done // every > (done - len(positions)) // every:
                pages = int(open("/proc/self/statm").read().split()[1])
                self.memory.append((pages * os.sysconf("SC_PAGESIZE") - done * self.dim * 2) / 1e6)


def memory(records, count):
    """Return a row: memory at the end of a gallery of `count` (repeated) files against that after its first tenth.

    The files are decoded as they are; the network has random weights and takes 64 x 32, so that this ends in minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(f"{folder}/best.pth", build_model(default_config([1, 2], height=64, width=32)), {}, {})
        extractor = Watched(f"{folder}/best.pth", mirror=False)
        extractor.embed(records.files()[:64])  # loads the libraries
        started = time.perf_counter()
        index = GalleryIndex.build(extractor, records.select(torch.arange(count) % len(records)), progress=False)
        speed = len(index) / (time.perf_counter() - started)
        index.save(f"{folder}/index.pt")
    return common.row(f"memory beyond the embeddings, {count:,} files, MB", extractor.memory[-1:], extractor.memory[:1],
                      "after a tenth of the files", images_per_second=speed)


def benchmark(args):
    if args.accuracy:
        yield from accuracy(args.checkpoint, args.data, args.accuracy)
        return
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            common.draw_images(folder, 256)
        records = read_folder(args.data or folder)
        if args.memory:
            yield memory(records, args.memory)
        else:
            yield from speeds(args.checkpoint, records.files(), pick_device(args.device), 3 if args.quick else args.rounds)


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "3 rounds", rounds=9)
    parser.add_argument("--checkpoint", default=common.ROOT / "models/masked-hog-908/best.pth")
    parser.add_argument("--data", metavar="DIR", help="a folder of images (default: 256 drawn ones)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--accuracy", nargs="+", metavar="MODE", help="instead: mAP of modes such as torch-fp32 openvino-bf16 "
                        "on --data, a grouped dataset")
    parser.add_argument("--memory", type=int, metavar="N", help="instead: index N files, watch the memory (Linux)")
    common.run(parser, benchmark)
