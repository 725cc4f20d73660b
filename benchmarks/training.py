"""Training speed: our step against the plain loop that most re-ID scripts run, A and B in turn in one process.

The plain loop is eager torchvision DenseNet-121 in float32, NCHW, torchvision transforms on PIL images in a DataLoader,
cross-entropy + batch-hard triplet, SGD, and `loss.item()` each step. Ours is the step of train.py on images decoded once.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import models, transforms
from tqdm import tqdm

import train
from reid.images import MEAN, STD
from reid.model import build_model, default_config, pick_device
from reid.training import augment
from reid.training.cache import ImageCache
from reid.training.losses import identity_loss, triplet_loss
from reid.training.trainer import Trainer


def noise_images(folder, count):
    """JPEG files of 64 x 128, blurred noise: as large as crops of people."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (32, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 128), Image.Resampling.BICUBIC).save(Path(folder) / f"{i:05}.jpg", quality=90)
    return sorted(Path(folder).glob("*.jpg"))


class PlainLoop:
    """What torchreid's or layumi's script does for one batch after the other."""

    name = "eager torchvision fp32 with a DataLoader"

    def __init__(self, files, labels, batch_size, size, device, workers):
        self.device = device
        body = models.densenet121(num_classes=int(labels.max()) + 1)
        body.features.transition3.pool = nn.Identity()
        self.model = body.to(device).train()
        self.optimizer = torch.optim.SGD(body.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        transform = transforms.Compose([
            transforms.Resize(size), transforms.RandomHorizontalFlip(), transforms.Pad(10), transforms.RandomCrop(size),
            transforms.ToTensor(), transforms.Normalize(MEAN, STD), transforms.RandomErasing(0.5)])
        items = [(file, int(label)) for file, label in zip(files, labels)]

        class Files(torch.utils.data.Dataset):
            def __len__(self):
                return len(items)

            def __getitem__(self, i):
                return transform(Image.open(items[i][0]).convert("RGB")), items[i][1]

        self.loader = torch.utils.data.DataLoader(Files(), batch_size, shuffle=False, num_workers=workers, drop_last=True)
        self.batches = iter(self.loader)

    def step(self):
        try:
            images, labels = next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            images, labels = next(self.batches)
        images, labels = images.to(self.device), labels.to(self.device)
        features = nn.functional.relu(self.model.features(images)).mean((2, 3))
        loss = identity_loss(self.model.classifier(features), labels) + triplet_loss(features, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()


class OurLoop:
    """train.py's step, fed as train.py feeds it."""

    def __init__(self, files, labels, batch_size, size, device, workers):
        args = train.get_args_parser().parse_args(["--batch_size", str(batch_size)])
        self.count = len(files) // batch_size
        self.cache = ImageCache(files, size, device, workers=workers)
        model = build_model(default_config(list(range(int(labels.max()) + 1)), height=size[0], width=size[1])).to(device)
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], args.lr,
                                    momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True)
        self.trainer = Trainer(model, optimizer, train.train_step, args, 1000, device)
        self.trainer.train()
        self.numbers = augment.draw(self.count, batch_size, 0, 0).to(device)
        self.rows = torch.arange(self.count * batch_size, device=device).view(self.count, batch_size)
        self.labels = labels[: self.count * batch_size].to(device).view(self.count, batch_size)
        self.done = 0

    def step(self):
        i = self.done % self.count
        self.trainer.step(self.cache[self.rows[i]], self.numbers[i], self.labels[i], 0.01)
        self.done += 1


def timed(loop, steps, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        loop.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ends within 5 minutes on 2 cores")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--workers", type=int, default=4, help="of the plain loop's DataLoader and of our decoder")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    batch_size = args.batch_size or (64 if cuda else 16)
    rounds, steps = (3, 2) if args.quick and not cuda else (5, 50 if cuda else 4)
    workers = args.workers if cuda else 0  # on few cores a DataLoader's workers only take turns with the step
    with tempfile.TemporaryDirectory() as folder:
        files = noise_images(folder, batch_size * 8)
        labels = torch.arange(len(files)) // 4 % 751
        loops, memory = [], []
        for loop in (OurLoop, PlainLoop):
            loops.append(loop(files, labels, batch_size, (256, 128), device, workers))
            timed(loops[-1], 5 if cuda else 1, device)  # compilation and warm-up
            memory.append(torch.cuda.max_memory_allocated() / 2**30 if cuda else 0)  # ours is alone at first
        times = [[timed(loop, steps, device) for loop in loops] for _ in tqdm(range(rounds), desc="rounds")]
    ours, peer = (sorted(column)[rounds // 2] / steps for column in zip(*times))
    ratio = sorted(b / a for a, b in times)[rounds // 2]
    where = torch.cuda.get_device_name(device) if cuda else "CPU"
    print(f"{where}, batch {batch_size}, 256x128, {loops[0].trainer.describe()}")
    print(f"training step: {ratio:.2f} times {PlainLoop.name}")
    if cuda:
        print(f"ours {batch_size / ours:,.0f} images/s, plain {batch_size / peer:,.0f} images/s, "
              f"our peak memory {memory[0]:.2f} GiB")
    if args.json:
        row = {"name": f"training step, batch {batch_size}", "ours": ours, "peer": peer, "peer_name": PlainLoop.name,
               "ratio": ratio, "images_per_s": batch_size / ours}
        Path(args.json).write_text(json.dumps({"rows": [row]}, indent=1))


if __name__ == "__main__":
    main()
