"""Train a re-identification model: `python train.py` is the whole recipe, and every setting is on the next screen.

Writes models/<run>/{best,last}.pth, runs/<run> (TensorBoard) and an MLflow run; <run> is MLflow's generated name.
Several GPUs: torchrun --nproc_per_node N train.py
"""

import argparse
import signal
import time

import torch
from tqdm import tqdm

from reid import ReidError, distributed
from reid.checkpoint import load_weights
from reid.cli import HelpFormatter, run
from reid.data.datasets import load_training_set
from reid.model import EMBEDDING_SIZES, build_model, default_config, pick_device
from reid.training import augment
from reid.training.cache import ImageCache
from reid.training.losses import PAIR_LOSSES
from reid.training.run import Run
from reid.training.sampler import pk_batches
from reid.training.trainer import NORM_BATCHES, Engine


def get_args_parser():
    parser = argparse.ArgumentParser("train.py", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    # the run
    add("--exp_name", help="name of the run; default: a new name from MLflow, such as masked-hog-908")
    add("--exp_tag", default="", help="a note kept with the MLflow run")
    add("--resume", action="store_true", help="go on with --exp_name from models/<run>/last.pth, with that run's settings")
    add("--seed", type=int, default=0, help="of the weights, the batches and the augmentation")
    # data
    add("--data_root", nargs="+", default=["data/market-1501-grouped"], help="grouped dataset; several are trained on jointly")
    add("--train_all", action="store_true", help="val/ joins train/, and the last epoch is the best")
    add("--cache", choices=["auto", "device", "host", "none"], default="auto", help="where the decoded images stay")
    add("--num_data_loaders", type=int, default=4, help="threads that decode images")
    # network
    add("--backbone", choices=list(EMBEDDING_SIZES), default="densenet121")
    add("--weights", default="imagenet", help="imagenet (downloaded by torchvision), none (from scratch), or a file")
    add("--weights_partial", action="store_true", help="load what fits of --weights, even if tensors of the backbone are missing")
    add("--height", type=int, default=256)
    add("--width", type=int, default=128)
    # batches and augmentation
    add("--batch_size", type=int, default=64, help="over all GPUs")
    add("--num_instances", type=int, default=4, help="images of each identity in a batch (the K of the PK sampler)")
    add("--flip", type=float, default=0.5, help="probability")
    add("--erase", type=float, default=0.5, help="probability of random erasing")
    add("--jitter", type=float, default=0.0, help="brightness, contrast and saturation scaled by up to 1 +- this")
    add("--gray", type=float, default=0.0, help="probability of grayscale")
    add("--blur", type=float, default=0.0, help="probability of Gaussian blur")
    add("--jpeg", type=float, default=0.0, help="probability of JPEG noise")
    add("--grid", type=float, default=0.0, help="probability of hiding a grid of squares (GridMask)")
    # loss
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--pair_loss", choices=list(PAIR_LOSSES), default="triplet", help="batch-hard triplet, or circle loss")
    add("--pair_weight", type=float, default=1.0)
    add("--margin", type=float, default=0.3, help="of the pair loss")
    add("--teacher", help="checkpoint to distil from, e.g. models/<run>/best.pth, trained on the same identities")
    add("--distill", type=float, default=1.0, help="weight of the distillation loss, with --teacher")
    # schedule
    add("--num_epochs", type=int, default=60)
    add("--lr", type=float, default=0.05, help="peak of the cosine, SGD with Nesterov momentum 0.9")
    add("--warmup_epochs", type=float, default=5.0)
    add("--weight_decay", type=float, default=5e-4)
    add("--ema", type=float, default=0.0, help="decay per step of averaged weights, e.g. 0.999; 0 is off")
    add("--swa", type=int, default=0, help="average the weights of the last so many epochs; 0 is off")
    add("--freeze_bn", action="store_true", help="keep the backbone's batch-norm statistics, for tiny batches")
    add("--eval_freq", type=int, default=5, help="epochs between evaluations on val/")
    # machine
    add("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    add("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile; auto: on a GPU, for 10 epochs or more")
    return parser


OPERATIONAL = {"exp_name", "resume", "data_root", "cache", "num_data_loaders", "device", "compile", "eval_freq"}


def main(args):
    rank, world_size = distributed.start(args.device)
    run_ = Run(args, get_args_parser(), OPERATIONAL)  # the name, the folder and its lock, and what --resume finds there
    args = run_.args
    device = distributed.device or pick_device(args.device)
    torch.manual_seed(args.seed)

    check_settings(args, world_size)
    size = (args.height, args.width)
    train_set, val_set, classes = load_training_set(args.data_root, args.train_all)
    # rows of every epoch are known beforehand, so a set that cannot fill a batch fails here and not after the decoding
    steps = len(pk_batches(train_set.labels, args.batch_size, args.num_instances, args.seed, 0))
    cache = ImageCache(train_set.files, size, device, args.cache, args.num_data_loaders)
    val_cache = ImageCache(val_set.files, size, device, args.cache, args.num_data_loaders) if val_set else None

    model = build_model(default_config(classes, args.backbone, args.height, args.width))
    if not run_.state:
        load_weights(model, args.weights, args.weights_partial, verbose=print if rank == 0 else lambda line: None)
    engine = Engine(model, args, steps, device)
    if rank == 0:
        print(f"{run_.name}: {len(cache):,} images of {len(classes)} identities, {steps} steps an epoch, "
              f"images on {cache.where}; {engine.describe()}", flush=True)
    epoch, first_step = run_.restore(engine)

    stop = StopSignal(second_kills=world_size == 1)  # of several processes torchrun makes an end
    with run_.tracking() as tracker:
        while epoch < args.num_epochs:
            rows, params = plan_epoch(args, train_set.labels, epoch)
            params, labels = params.to(device), train_set.labels[rows].to(device)

            engine.train()
            started, done = time.perf_counter(), first_step
            batches = tqdm(cache.batches(rows[first_step:]), f"epoch {epoch + 1}/{args.num_epochs}", steps, initial=first_step,
                           disable=rank > 0 or None)
            for i, images in enumerate(batches, first_step):
                engine.step(images, params[i], labels[i], epoch * steps + i)
                done = i + 1
                if stopping := done < steps and distributed.any_(stop.asked):  # a whole epoch is saved as such
                    break
            metrics = engine.end_epoch(epoch * steps + first_step)
            metrics["train/images_per_s"] = (done - first_step) * args.batch_size / (time.perf_counter() - started)
            if stopping:
                run_.save_last(engine, epoch, done)
                run_.wait()
                distributed.any_(True)  # torchrun kills the others when the first one leaves: not before last.pth is written
                raise KeyboardInterrupt
            epoch, first_step = epoch + 1, 0

            last = epoch == args.num_epochs
            due = last or (val_cache and epoch % args.eval_freq == 0)
            engine.average_epoch(epoch)
            if due and engine.averaged and not args.freeze_bn:
                engine.refresh_norms(cache.batches(rows[:NORM_BATCHES]), params)
            if due and val_cache:
                metrics |= engine.validate(val_cache, val_set.labels)
            if tracker and epoch == 1:
                tracker.image("train/augmented", sheet(cache, rows, params), 0)
            run_.epoch_done(engine, epoch, metrics, tracker, best=last if args.train_all else None)
        if tracker:
            tracker.projector(*engine.embed(cache, train_set.labels))
    run_.finish()


def check_settings(args, world_size):
    """Raise ReidError for settings that contradict each other."""
    if args.batch_size % world_size:
        raise ReidError(f"--batch_size {args.batch_size}: {world_size} processes cannot share it evenly; choose a multiple of {world_size}")
    if args.swa and (args.ema or args.swa > args.num_epochs):
        raise ReidError(f"--swa {args.swa}: at most --num_epochs {args.num_epochs}, and not together with --ema")


def plan_epoch(args, labels, epoch):
    """This rank's part of an epoch: rows int64 [steps, B / world_size] and their augmentation float32 [steps, B / world_size, P].

    A pure function of (seed, epoch), of which each rank takes its own columns: no rank sees what another one sees, together
    they see what one process would, and resuming needs no state.
    """
    rows = pk_batches(labels, args.batch_size, args.num_instances, args.seed, epoch)
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    settings = {name: getattr(args, name) for name in augment.SETTINGS}
    params = augment.draw(rows.numel(), (args.height, args.width), generator, **settings).reshape(*rows.shape, -1)
    share = args.batch_size // distributed.world_size
    return tuple(part[:, distributed.rank * share : (distributed.rank + 1) * share] for part in (rows, params))


class StopSignal:
    """Ctrl-C and TERM ask for a stop after the current step, so that what is saved is a whole step."""

    def __init__(self, second_kills):
        self.asked, self.second_kills = False, second_kills
        for name in (signal.SIGINT, signal.SIGTERM):
            try:
                signal.signal(name, self.ask)
            except ValueError:  # not in the main thread, as when a test or a notebook calls main()
                return

    def ask(self, number, _frame):
        self.asked = True
        if self.second_kills:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def sheet(cache, rows, params):
    """The first 32 augmented images of an epoch as one picture, uint8 [3, 4H, 8W]."""
    images = augment.apply(cache[rows[0]], params[0]).to(torch.uint8).cpu()[:32]
    rows_of_images = [torch.cat(list(images[i : i + 8]), 2) for i in range(0, len(images) - len(images) % 8, 8)]
    return torch.cat(rows_of_images or [torch.cat(list(images), 2)], 1)


if __name__ == "__main__":
    run(get_args_parser(), main)
