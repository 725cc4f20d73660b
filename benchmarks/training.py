"""Speed of a training step: train.py's step against the plain loop of most re-identification scripts.

The plain loop is eager torchvision DenseNet-121 in float32, NCHW, torchvision transforms on PIL images in a DataLoader,
cross-entropy and batch-hard triplet loss, SGD, and `loss.item()` in each step. Ours reads images that were decoded once.
"""

import tempfile

import common
import torch
from PIL import Image
from torch import nn
from torchvision import models, transforms

import train
from reid.images import MEAN, STD
from reid.model import build_model, default_config, pick_device
from reid.training import augment
from reid.training.cache import ImageCache
from reid.training.losses import identity_loss, triplet_loss
from reid.training.trainer import Trainer

SIZE = (256, 128)


class PlainLoop:
    """One batch after the other as torchreid's or layumi's script trains on it."""

    def __init__(self, files, labels, batch_size, device, workers):
        self.device, self.files, self.labels = device, files, labels
        self.model = models.densenet121(num_classes=int(labels.max()) + 1)
        self.model.features.transition3.pool = nn.Identity()
        self.model.to(device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.transform = transforms.Compose([
            transforms.Resize(SIZE), transforms.RandomHorizontalFlip(), transforms.Pad(10), transforms.RandomCrop(SIZE),
            transforms.ToTensor(), transforms.Normalize(MEAN, STD), transforms.RandomErasing(0.5)])
        self.loader = torch.utils.data.DataLoader(self, batch_size, num_workers=workers, drop_last=True)
        self.batches = iter(())

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(Image.open(self.files[i]).convert("RGB")), self.labels[i]

    def step(self):
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        images, labels = (part.to(self.device) for part in batch)
        features = nn.functional.relu(self.model.features(images)).mean((2, 3))
        loss = identity_loss(self.model.classifier(features), labels) + triplet_loss(features, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()


class OurLoop:
    """The step of train.py, fed as train.py feeds it: rows, augmentation and labels of an epoch are on the device."""

    def __init__(self, files, labels, batch_size, device, workers):
        args = train.get_args_parser().parse_args(["--batch_size", str(batch_size)])
        self.rows = torch.arange(len(files), device=device).view(-1, batch_size)
        self.labels = labels.to(device).view(-1, batch_size)
        self.cache = ImageCache(files, SIZE, device, workers=workers)
        model = build_model(default_config(list(range(int(labels.max()) + 1)), height=SIZE[0], width=SIZE[1])).to(device)
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], args.lr,
                                    momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True)
        self.trainer = Trainer(model, optimizer, train.train_step, args, 1000, device)
        self.trainer.train()
        self.numbers = augment.draw(len(self.rows), batch_size, 0, 0).to(device)
        self.done = 0

    def step(self):
        i = self.done % len(self.rows)
        self.trainer.step(self.cache[self.rows[i]], self.numbers[i], self.labels[i], self.rows[i], 0.01)
        self.done += 1


def benchmark(args):
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    batch_size = args.batch_size or (64 if cuda else 16)
    rounds, steps = (3, 1) if args.quick and not cuda else (args.rounds, 50 if cuda else 4)
    workers = args.workers if cuda else 0  # on few cores the workers of a DataLoader only take turns with the step

    def run_of(loop):
        def side():
            for _ in range(steps):
                loop.step()
            if cuda:
                torch.cuda.synchronize()
        return side

    with tempfile.TemporaryDirectory() as folder:
        files = common.draw_images(folder, batch_size * 8)
        labels = torch.arange(len(files)) // 4 % 751
        ours = OurLoop(files, labels, batch_size, device, workers)
        run_of(ours)()  # compiles, captures the graph, warms up
        memory = torch.cuda.max_memory_reserved(device) / 2**30 if cuda else None  # ours is alone so far
        sides = [run_of(ours), run_of(PlainLoop(files, labels, batch_size, device, workers))]
        sides[1]()
        speeds = [[batch_size * steps / seconds for seconds in side] for side in common.in_turn(sides, rounds)]
    print(f"256x128, {ours.trainer.describe()}" + (f", at most {memory:.2f} GiB" if cuda else ""))
    yield common.row(f"training step, batch {batch_size}, images per second", *speeds,
                     "eager torchvision fp32 with a DataLoader", higher_is_better=True, memory_gib=memory)


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "3 rounds of a step each on a CPU")
    parser.add_argument("--batch_size", type=int, help="default: 16 on a CPU, 64 on a GPU")
    parser.add_argument("--workers", type=int, default=4, help="threads that decode and processes of the DataLoader, on a GPU")
    parser.add_argument("--device", default="auto")
    common.run(parser, benchmark)
