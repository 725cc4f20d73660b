"""One process or several (`torchrun`): who we are, and the few things that world_size tell each other."""

import os

import torch
import torch.distributed as dist

from reid import ReidError

rank, world_size, device = 0, 1, None
talk = None  # a group of the CPUs, for what Python tells Python without waiting for a GPU


def start(device_name="auto"):
    """Join torchrun's process group, if there is one, and return (rank, world_size). Each rank takes the GPU of its local rank."""
    global rank, world_size, device, talk
    if "RANK" not in os.environ or dist.is_initialized():
        return rank, world_size
    cuda = device_name != "cpu" and torch.cuda.is_available()
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ReidError(f"more processes than the {torch.cuda.device_count()} GPUs here; lower --nproc_per_node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world_size, talk = dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo")
    return rank, world_size


def stop():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share(obj):
    """Rank 0's object (plain values, tensors), on every rank."""
    box = [obj]
    if world_size > 1:
        dist.broadcast_object_list(box, device=device)
    return box[0]


def gather_objects(obj):
    """Return the `obj` (anything that pickles) of every rank as a list, rank 0's first. No rank leaves before all have called."""
    parts = [obj] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, obj, group=talk)
    return parts


def gather(tensor):
    """[N, ...] of every rank (same shapes) as [world_size * N, ...], rank 0's first. Only our own part carries a gradient: with
    the loss times `world_size` and gradients averaged, that is the gradient of the loss over the whole batch."""
    if world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(parts, tensor.detach().contiguous())
    parts[rank] = tensor
    return torch.cat(parts)


def average_(tensors):
    """Replace float tensors by their mean over the world_size, in one message."""
    if world_size == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, mean in zip(tensors, flat.div_(world_size).split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


def any_(flag):
    """Whether it is true on some rank."""
    if world_size == 1:
        return flag
    box = torch.tensor([int(flag)])
    dist.all_reduce(box, dist.ReduceOp.MAX, group=talk)
    return bool(box)


def total(tensor):
    """Sum over the world_size."""
    if world_size > 1:
        dist.all_reduce(tensor)
    return tensor
