"""Train a re-identification model: this page is the recipe, from its settings to the step that changes the weights.

Writes models/<run>/{best,last}.pth, runs/<run> (TensorBoard) and an MLflow run; <run> is MLflow's generated name. best.pth is
chosen by retrieval of identities that are held out of the training (see --held_out), never by a test set.
Several GPUs: torchrun --nproc_per_node N train.py
"""

import math
import time
from contextlib import closing

import torch
import torch.nn.functional as F
from tqdm import tqdm

from reid import ReidError, cli, distributed
from reid.checkpoint import load_weights
from reid.data.datasets import load_training_set, read_folder
from reid.images import PIXELS
from reid.model import EMBEDDING_SIZES, build_model, default_config, pick_device
from reid.retrieval.metrics import evaluate
from reid.training import augment
from reid.training.cache import ImageCache
from reid.training.losses import cosine_loss, identity_loss, relational_loss, soft_label_loss, triplet_loss
from reid.training.run import Parser, Run, StopSignal
from reid.training.sampler import pk_batches, unlabelled_batches
from reid.training.teacher import load_teacher
from reid.training.trainer import Trainer

NORM_BATCHES = 64  # batches that give averaged weights their batch-norm statistics


def get_args_parser():
    parser = Parser("train.py", description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument_group("run").add_argument
    add("--exp_name", help="name of the run (default: a new one from MLflow, such as masked-hog-908)")
    add("--exp_tag", default="", help="a note kept with the MLflow run")
    add("--resume", action="store_true", help="go on with --exp_name from models/<run>/last.pth, with that run's settings")
    add("--seed", type=int, default=0, help="of the first weights, the batches and the augmentation")
    add("--eval_freq", type=int, default=5, help="epochs between validations")
    add = parser.add_argument_group("data").add_argument
    add("--data_root", nargs="+", default=["data/market-1501-grouped"], help="grouped dataset; several are trained on jointly")
    add("--held_out", type=float, default=0.1, help="share of the identities, 100 at most, to hold out of the training. "
        "val/mAP, measured on them, chooses best.pth")
    add("--train_all", action="store_true", help="train on all identities and on val/, without validation; the last epoch is "
        "the best")
    add("--batch_size", type=int, default=64, help="over all GPUs")
    add("--unlabelled", metavar="DIR", help="crops without identities, which join each batch and only follow --teacher")
    add("--unlabelled_batch", type=int, default=64, help="crops of --unlabelled in a batch, over all GPUs")
    add("--num_instances", type=int, default=4, help="images of each identity in a batch (the K of the PK sampler)")
    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=list(EMBEDDING_SIZES), default="densenet121", help="of the embedding")
    add("--weights", default="imagenet", help="imagenet (downloaded by torchvision), none (from scratch), or a file")
    add("--weights_partial", action="store_true", help="load what fits of --weights, even if tensors of the backbone are missing")
    add("--height", type=int, default=256, help="of the network's input, in pixels")
    add("--width", type=int, default=128, help="of the network's input, in pixels")
    add("--freeze_bn", action="store_true", help="keep the batch-norm statistics of the backbone, for tiny batches")
    add = parser.add_argument_group("augmentation").add_argument
    add("--flip", type=float, default=0.5, help="probability of a mirrored image")
    add("--erase", type=float, default=0.5, help="probability of random erasing")
    add("--jitter", type=float, default=0.0, help="brightness, contrast and saturation scaled by up to 1 +- this")
    add("--gray", type=float, default=0.0, help="probability of a grey image")
    add("--blur", type=float, default=0.0, help="probability of Gaussian blur")
    add("--tint", type=float, default=0.0, help="each channel scaled by up to 1 +- this, and a gamma of up to exp(+-this)")
    add = parser.add_argument_group("loss").add_argument
    add("--smoothing", type=float, default=0.1, help="label smoothing of the cross-entropy")
    add("--triplet_weight", type=float, default=1.0, help="weight of the triplet loss")
    add("--margin", type=float, default=0.3, help="margin of the triplet loss")
    add("--teacher", metavar="FILE", help="distil from it: a network (OpenVINO, .xml) or a checkpoint trained on the same "
        "identities, which see each image as it is cropped and erased, before its colours change; or embeddings of the "
        "images by any model, an index or a dict of paths and embeddings (docs/your-cameras.md)")
    add("--teacher_input", choices=PIXELS, help="pixels that the network of --teacher expects: 0 to "
        "255, or RGB minus ImageNet's mean over its deviation")
    add("--unlabelled_teacher", metavar="FILE", help="embeddings of the crops of --unlabelled, if not in the file of --teacher")
    add("--distill", type=float, default=1.0, help="weight of the losses that follow --teacher")
    add("--cosine", type=float, default=5.0, help="weight of the cosine loss, relative to the other distillation losses")
    add("--clip", type=float, default=0.0, help="largest norm of the gradient; 0 is off")
    add = parser.add_argument_group("schedule").add_argument
    add("--num_epochs", type=int, default=60, help="of training")
    add("--lr", type=float, default=0.05, help="highest learning rate, after the warm-up and before the cosine")
    add("--warmup_epochs", type=float, default=5.0, help="epochs in which the rate rises from 1 percent")
    add("--weight_decay", type=float, default=5e-4, help="of SGD, which has Nesterov momentum 0.9")
    add("--ema", type=float, default=0.0, help="decay per step of averaged weights, e.g. 0.999; 0 is off")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the network's arithmetic")
    add("--compile", choices=["on", "off"], default="off", help="torch.compile, which takes minutes; its gain is not measured")
    add("--cache", choices=["auto", "device", "host", "none"], default="auto", help="where the decoded images stay")
    add("--num_data_loaders", type=int, default=4, help="threads that decode images")
    add("--projector", action="store_true", help="show training images in TensorBoard: 32 as augmented, and about 1,000 in its "
        "projector; without it, runs/ holds no pictures of people")
    return parser


# settings that do not change the result, and may differ at --resume
OPERATIONAL = {"exp_name", "resume", "data_root", "cache", "num_data_loaders", "device", "compile", "eval_freq", "projector"}


def learning_rate(step, steps, args):
    """Linear warm-up from 1 % of --lr, then a cosine to zero (Loshchilov and Hutter, arXiv 1608.03983)."""
    warmup, total = round(args.warmup_epochs * steps), args.num_epochs * steps
    if step < warmup:
        return args.lr * (0.01 + 0.99 * step / warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def plan_epoch(args, labels, crop_count, epoch):
    """Return this rank's part of an epoch: rows int64 [steps, B / world_size], and random numbers for their augmentation.

    The first columns are images of `labels`; those of `crop_count` crops without identities follow, and so do their rows. A pure
    function of (seed, epoch), of which each rank takes its own columns. So no rank sees the images of another, together they see
    what one process would, and resuming needs no state.
    """
    rows = pk_batches(labels, args.batch_size, args.num_instances, args.seed, epoch)
    if crop_count:
        more = unlabelled_batches(crop_count, len(rows), args.unlabelled_batch, args.seed, epoch)
        rows = torch.cat([rows, len(labels) + more], 1)
    numbers = augment.draw(*rows.shape, args.seed, epoch)
    columns = torch.arange(rows.shape[1]).tensor_split([args.batch_size])  # with and without identities
    own = torch.cat([part.tensor_split(distributed.world_size)[distributed.rank] for part in columns])
    return rows[:, own], numbers[:, own]


def augmented(images, numbers, args):
    return augment.apply(images, numbers, args.flip, args.erase, args.jitter, args.gray, args.blur, args.tint)


def train_step(trainer, images, numbers, labels, rows):
    """Update the weights once. The Trainer runs this as it is, or records it as a CUDA graph: nothing may wait for the device.

    images: uint8 [B, 3, H, W]; numbers: float32 [B, P] of `augment.draw`; labels: int64 [L], of the first L images, as the others
    have no identity; rows: int64 [B], the positions of the images in the training set. Returns what is logged.
    """
    args, labelled = trainer.args, len(labels)
    seen = None
    if trainer.teacher and trainer.teacher.network:  # its colours stay: the student learns that they do not matter
        seen = augment.apply(images, numbers, args.flip, args.erase)
    images = augmented(images, numbers, args)
    with trainer.autocast():
        features, embeddings, logits = trainer.network(images)
        targets, target_logits = trainer.teacher(seen, rows) if trainer.teacher else (None, None)

    logged = {"loss_id": identity_loss(logits[:labelled], labels, args.smoothing),
              "loss_triplet": triplet_loss(distributed.gather(features[:labelled]), distributed.gather(labels), args.margin)}
    loss = logged["loss_id"] + args.triplet_weight * logged["loss_triplet"]
    if targets is not None:  # of all images; what is gathered is that of all ranks
        logged["loss_relational"] = relational_loss(distributed.gather(embeddings), distributed.gather(targets))
        logged["loss_cosine"] = cosine_loss(trainer.teacher.map(embeddings), targets)
        loss = loss + args.distill * (logged["loss_relational"] + args.cosine * logged["loss_cosine"])
    if target_logits is not None:
        logged["loss_soft"] = soft_label_loss(logits, target_logits)
        loss = loss + args.distill * logged["loss_soft"]

    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.scaler.scale(loss).backward()  # the scale is 1, except for fp16
    distributed.average_([parameter.grad for parameter in trainer.parameters])
    if args.clip:
        trainer.scaler.unscale_(trainer.optimizer)
        torch.nn.utils.clip_grad_norm_(trainer.parameters, args.clip)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    if args.ema:
        trainer.average_weights(args.ema)
    accuracy = (logits[:labelled].argmax(1) == labels).float().mean()
    return {"loss": loss, **logged, "accuracy": accuracy}


@torch.no_grad()
def validate(trainer, cache, val_set):
    """Measure the weights on images that they were not trained on, the last ones of `cache`; exact for any number of ranks.

    val/mAP, val/rank1: each image of the identities that are held out is a query, and the others are its gallery (protocol
    "market" of `evaluate`). So few identities are easier to find than a test set's: compare only runs that hold out the same.
    val/accuracy, val/loss: the classifier, which has outputs for all identities, on the other images, whose identities it was
    trained on; val/accuracy chooses best.pth where fewer than two identities are held out.
    """
    model, rows = trainer.best_model, distributed.shard(len(val_set.files))
    embeddings = torch.zeros(len(val_set.files), model.config["embedding_size"], device=trainer.device)
    if len(rows):
        embeddings[rows] = trainer.embed(cache, len(cache) - len(embeddings) + rows)
    if not distributed.total(embeddings).isfinite().all():
        raise ReidError("validation: NaN or infinite embeddings; lower --lr (best.pth and last.pth are as before)")
    labels, camids = val_set.labels.to(trainer.device), val_set.camids.to(trainer.device)
    held_out, metrics = val_set.held_out.to(trainer.device), {}
    if held_out.any():
        found, labelled = F.normalize(embeddings[held_out]), (labels[held_out] + 1, camids[held_out])  # 0 would be a distractor
        files = torch.arange(len(found))
        result = evaluate(found, found, *labelled, *labelled, files, files)
        metrics = {"val/mAP": result.mAP, "val/rank1": result.rank[1]}
    if not held_out.all():
        logits, truth = model.classifier(embeddings[~held_out]), labels[~held_out]
        metrics["val/accuracy"] = (logits.argmax(1) == truth).float().mean().item()
        metrics["val/loss"] = F.cross_entropy(logits, truth).item()
    return metrics


def train_epoch(trainer, batches, epoch, first, stop):
    """Train on `batches`, those of an epoch from step `first` on. Returns the step after the last one that was done."""
    steps, done = trainer.steps, first
    progress = tqdm(batches, f"epoch {epoch + 1}/{trainer.args.num_epochs}", steps, initial=first,
                    disable=distributed.rank > 0 or None)
    for i, batch in enumerate(progress, first):
        trainer.step(*batch, learning_rate(epoch * steps + i, steps, trainer.args))
        done = i + 1
        if done < steps and distributed.any_(stop.asked):
            break
    return done


def describe(train_set, val_set, batches):
    """Return text on the images of a run. batches: rows int64 [steps, identities of a batch, images of each]."""
    pairs = ((batches[..., None] != batches[..., None, :]).sum() / 2 / len(batches)).item()
    text = (f"{len(train_set.files):,} images of {len(train_set.labels.unique()):,} identities, {len(batches):,} steps an epoch, "
            f"{pairs:.4g} pairs of images of one identity in a batch")
    if not val_set:
        return f"{text}, no validation"
    held = val_set.labels[val_set.held_out]
    return (f"{text}, validation on {len(held):,} images of {len(held.unique())} held-out identities and "
            f"{len(val_set.labels) - len(held):,} images of the others")


def main(args):
    rank, world_size = distributed.start(args.device)
    run = Run(args, get_args_parser(), OPERATIONAL)  # the name, the folder and its lock, and what --resume finds there
    args = run.args
    for name in ["batch_size"] + ["unlabelled_batch"] * bool(args.unlabelled):
        if getattr(args, name) % world_size:
            raise ReidError(f"--{name} {getattr(args, name)}: must be a multiple of the {world_size} processes")
    device = distributed.device or pick_device(args.device)
    torch.manual_seed(args.seed)

    train_set, val_set, classes = load_training_set(args.data_root, args.train_all, args.held_out)
    crops = read_folder(args.unlabelled).files() if args.unlabelled else []
    # What does not fit, such as a set that cannot fill a batch, fails before the images are decoded.
    batches = pk_batches(train_set.labels, args.batch_size, args.num_instances, args.seed, 0)
    steps = len(batches)
    model = build_model(default_config(classes, args.backbone, args.height, args.width))
    teacher = load_teacher(args, model, train_set.files, crops)
    if not run.state:
        load_weights(model, args.weights, args.weights_partial, verbose=print if rank == 0 else lambda line: None)
    parameters = [parameter for module in (model, teacher) if module for parameter in module.to(device).parameters()]
    optimizer = torch.optim.SGD([parameter for parameter in parameters if parameter.requires_grad], args.lr, momentum=0.9,
                                nesterov=True, weight_decay=args.weight_decay, fused=True)
    trainer = Trainer(model, optimizer, train_step, args, steps, device, teacher)
    files = train_set.files + crops
    start, first = run.restore(trainer, files, val_set.files if val_set else [])  # the epoch, and the step within it, to go on at
    run.check_tracking()

    files += val_set.files if val_set else []
    cache = ImageCache(files, (args.height, args.width), device, args.cache, args.num_data_loaders)
    if rank == 0:
        print(f"{run.name}: {describe(train_set, val_set, batches.view(steps, -1, args.num_instances))}"
              f"{f', {len(crops):,} crops without identities' if crops else ''}; images on {cache.where}; {trainer.describe()}",
              flush=True)
    stop = StopSignal(second_kills=world_size == 1)  # of several processes, torchrun ends all
    with run.tracking() as tracker, closing(trainer):
        plan = plan_epoch(args, train_set.labels, len(crops), start)
        for epoch in range(start, args.num_epochs):
            (rows, numbers), started = plan, time.perf_counter()
            labels, numbers = train_set.labels[rows[:, : args.batch_size // world_size]].to(device), numbers.to(device)
            trainer.train()
            columns = (column[first:] for column in (numbers, labels, rows.to(device)))
            done = train_epoch(trainer, zip(cache.batches(rows[first:]), *columns), epoch, first, stop)
            if done < steps:
                run.stopped(trainer, epoch, done)  # raises KeyboardInterrupt
            plan = plan_epoch(args, train_set.labels, len(crops), epoch + 1)  # while a GPU works off its queue
            metrics = trainer.end_epoch(epoch * steps + done)
            metrics["train/images_per_s"] = (done - first) * rows.shape[1] * world_size / (time.perf_counter() - started)

            first, last = 0, epoch + 1 == args.num_epochs
            if last or (val_set and (epoch + 1) % args.eval_freq == 0):
                if args.ema:
                    trainer.refresh_norms(augmented(images, drawn, args)
                                          for images, drawn in zip(cache.batches(rows[:NORM_BATCHES]), numbers))
                if val_set:
                    metrics |= validate(trainer, cache, val_set)
            if tracker and args.projector and epoch == 0:
                run.later(tracker.images, "train/augmented", augmented(cache[rows[0, :32]], numbers[0, :32], args), 0)
            run.epoch_done(trainer, epoch + 1, metrics, tracker, best=last if args.train_all else None)
        if tracker and args.projector:
            shown = train_set.labels.argsort(stable=True)[:1000]  # about so many, of whole identities
            run.later(tracker.projector, F.normalize(trainer.embed(cache, shown)), train_set.labels[shown], cache[shown])
    run.finish()


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
