"""Wrap torch.distributed: the same calls work in one process and in several started by torchrun."""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist

from reid import ReidError

rank, world_size, device = 0, 1, None
cpu_group = None  # gloo: decisions between processes need not wait for a GPU


def start(device_name="auto"):
    """Join the process group of torchrun, if there is one. On GPUs, each process takes that of its local rank.

    Sets and returns `rank` and `world_size`; sets `device`, which is None without torchrun and on a CPU.
    """
    global rank, world_size, device, cpu_group
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
    rank, world_size, cpu_group = dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo")
    return rank, world_size


def stop():
    """Leave the process group. CUDA graphs that hold its collectives must be gone, else NCCL waits for them forever."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def alone():
    """Leave out all communication for the time of the block, as if this were the only process."""
    global world_size
    kept, world_size = world_size, 1
    try:
        yield
    finally:
        world_size = kept


def shard(count):
    """Return every world_size-th of `count` row numbers as int64 [n], from `rank` on; n may be 0."""
    return torch.arange(count)[rank::world_size]


def share(obj):
    """Return rank 0's `obj` (anything that pickles) on every rank."""
    box = [obj]
    if world_size > 1:
        dist.broadcast_object_list(box, group=cpu_group)
    return box[0]


def gather_objects(obj):
    """Return the `obj` (anything that pickles) of every rank as a list, rank 0's first. No rank leaves before all have called."""
    parts = [obj] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, obj, group=cpu_group)
    return parts


def gather_rows(rows, positions, more):
    """Put the rows of all processes together on each of them, with one copy of the whole and one part in memory.

    rows: [n, D]; positions: int64 [n], ascending, of the rows among those of all; more: another object to gather. Returns (rows
    [N, D], positions int64 [N], ascending, order int64 [N] of the processes' rows in them, list of the other objects).
    """
    parts = gather_objects((positions, more))
    ascending, order = torch.cat([part for part, _ in parts]).sort()
    whole = rows.new_empty(len(ascending), rows.shape[1])
    for source, (places, _) in enumerate(parts):
        part = rows if source == rank else rows.new_empty(len(places), rows.shape[1])
        part = part.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(part, source)
        whole[torch.searchsorted(ascending, places)] = part.cpu()
    return whole, ascending, order, [other for _, other in parts]


def gather(tensor):
    """Concatenate the [N, ...] of every rank, of the same shape, as [world_size * N, ...], rank 0's first.

    Every rank may compute the same loss of the result: this rank's rows carry its gradient times `world_size`, so that
    `average_` over the ranks leaves the gradient of that loss.
    """
    if world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(parts, tensor.detach().contiguous())
    parts[rank] = tensor.view_as(tensor)
    if tensor.requires_grad:
        parts[rank].register_hook(lambda gradient: gradient * world_size)
    return torch.cat(parts)


def average_(tensors):
    """Replace float tensors by their mean over the ranks, in one message."""
    if world_size == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.div_(world_size).split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def any_(flag):
    """Return whether `flag` is true on at least one rank."""
    if world_size == 1:
        return bool(flag)
    box = torch.tensor([int(flag)])
    dist.all_reduce(box, dist.ReduceOp.MAX, group=cpu_group)
    return bool(box)


def total(tensor):
    """Add up the tensors of all ranks in place, and return the sum."""
    if world_size > 1:
        dist.all_reduce(tensor)
    return tensor
