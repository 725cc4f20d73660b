"""Settings, and pieces of a training in this process, that the tests of train.py share."""

import gc
from contextlib import chdir

import pytest
import torch
from tiny_network import SIZE, SMALL, tiny_model

import train
from reid import ReidError
from reid.checkpoint import load_checkpoint
from reid.training import augment
from reid.training.teacher import Teacher, load_teacher
from reid.training.trainer import Trainer

TINY = [*SMALL, "--batch_size", "8", "--lr", "0.005", "--warmup_epochs", "1"]
LEVERS = ["--ema", "0.9", "--jitter", "0.4", "--tint", "0.3", "--gray", "0.2", "--blur", "0.3", "--clip", "5"]


def weights(folder, run, name="last.pth"):
    return load_checkpoint(folder / "models" / run / name)


def fails(folder, *args):
    """The error of a run in this process."""
    gc.collect()  # the traceback of an earlier failure keeps its run alive, and so its lock
    with chdir(folder), pytest.raises(ReidError) as caught:
        train.main(train.get_args_parser().parse_args([str(arg) for arg in args]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tiny_trainer(*options, steps=1, targets=None):
    """A Trainer of a small network of two identities, as train.py makes it. targets: embeddings of a teacher."""
    torch.manual_seed(0)
    args = train.get_args_parser().parse_args([*TINY, *options])
    model = tiny_model()
    teacher = load_teacher(args, model, [], []) if targets is None else Teacher(SIZE, targets)
    parameters = [*model.parameters(), *(teacher.parameters() if teacher else [])]
    optimizer = torch.optim.SGD([parameter for parameter in parameters if parameter.requires_grad], args.lr, momentum=0.9,
                                nesterov=True, weight_decay=args.weight_decay, fused=True)
    trainer = Trainer(model, optimizer, train.train_step, args, steps, torch.device("cpu"), teacher)
    trainer.train()
    return trainer


def tiny_batches(steps, crops=0):
    """Images, numbers, labels and rows of batches of eight images of two identities and of `crops` without identities."""
    generator, count = torch.Generator().manual_seed(0), 8 + crops
    images = torch.randint(256, (steps, count, 3, 64, 32), dtype=torch.uint8, generator=generator)
    return images, augment.draw(steps, count, 0, 0), torch.arange(8) // 4, torch.arange(count)


def random_targets(count, dimension=6):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(1))


def freeze(trainer):
    """Keep the batch-norm layers from mixing the images of a batch."""
    trainer.model.eval()
    trainer.model.training = True  # forward returns what the losses need
    return trainer
