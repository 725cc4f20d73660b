"""The images of each batch: some of each of several identities (PK sampling), and crops without identities."""

import hashlib
import math

import torch

from reid import ReidError


def seeded_generator(*key):
    """Return a torch.Generator that depends on `key` alone, such as (seed, epoch, "batches"); other keys, unrelated numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def pk_batches(labels, batch_size, per_id, seed, epoch):
    """Draw the identity-balanced batches of one epoch (PK sampling; Hermans et al., arXiv 1703.07737).

    labels: int64 [N]. Returns int64 [max(1, N // batch_size), batch_size]: row positions, `per_id` consecutive ones of each
    of batch_size / per_id different identities. Each identity's images are shuffled and dealt in groups of `per_id` (the
    last group is filled with images already dealt), so nearly every image is seen once. A pure function of (seed, epoch):
    resuming needs no sampler state, and each rank of a data-parallel run cuts its columns from the same rows.
    """
    people, rest = divmod(batch_size, per_id)
    if rest or people < 2 or per_id < 2:
        raise ReidError(f"--batch_size {batch_size} must be --num_instances ({per_id}, at least 2) times 2 or more identities")
    if (identities := len(labels.unique())) < 2:
        raise ReidError(f"--data_root: {identities} identities to train on, where two or more are needed")
    if people > identities:
        raise ReidError(f"--batch_size {batch_size} needs {people} identities in a batch, {identities} are trained on (without "
                        f"those of --held_out); give --batch_size {identities * per_id} or less")
    generator = seeded_generator(seed, epoch, "batches")
    groups = {}
    batches = []
    for _ in range(max(1, len(labels) // batch_size)):
        if len(groups) < people:
            groups = _deal(labels, per_id, generator)
        # Weighting by what is left keeps identities with many images from being all that remains at the end.
        names = list(groups)
        left = torch.tensor([len(groups[name]) for name in names], dtype=torch.float64)
        chosen = [names[i] for i in torch.multinomial(left, people, generator=generator).tolist()]
        batches.append([row for name in chosen for row in groups[name].pop()])
        groups = {name: rows for name, rows in groups.items() if rows}
    return torch.tensor(batches, dtype=torch.int64)


def unlabelled_batches(count, steps, batch_size, seed, epoch):
    """Draw the crops without identities of one epoch: int64 [steps, batch_size], rows of `count`.

    Every crop is drawn once before one is drawn again. A pure function of (seed, epoch), as `pk_batches` is.
    """
    generator = seeded_generator(seed, epoch, "unlabelled")
    rounds = math.ceil(steps * batch_size / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return order[: steps * batch_size].view(steps, batch_size)


def _deal(labels, per_id, generator):
    """Shuffle every identity's rows and return them in groups of `per_id`: {label: [[row, ...], ...]}."""
    shuffled = torch.randperm(len(labels), generator=generator)
    groups = {}
    for row, label in zip(shuffled.tolist(), labels[shuffled].tolist()):
        groups.setdefault(label, []).append(row)
    for label, rows in groups.items():
        missing = -len(rows) % per_id
        rows += [rows[i] for i in torch.randint(len(rows), (missing,), generator=generator).tolist()]
        groups[label] = [rows[i : i + per_id] for i in range(0, len(rows), per_id)]
    return groups
