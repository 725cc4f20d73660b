"""Decode once: the training images as uint8 tensors where the step can reach them fastest."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from reid import ReidError
from reid.images import decode, resize


class ImageCache:
    """uint8 images [N, 3, H, W] of `files`; `cache[rows]` gives a batch on `device`.

    where: "device" (decoded once, kept there), "host" (decoded once, pinned), "none" (decoded anew each time, by `workers`
    threads) or "auto": device if the set takes at most 40 % of its free memory, else host if at most half of the free
    memory, else none. `.where` tells what was chosen. A file that cannot be decoded raises ReidError with its path.
    """

    def __init__(self, files, size, device, where="auto", workers=4):
        self.files, self.size, self.device = files, tuple(size), device
        self.pool = ThreadPoolExecutor(max(1, workers))
        bytes_needed = len(files) * 3 * size[0] * size[1]
        self.where = _place(bytes_needed, device) if where == "auto" else where
        self.pixels = None
        if self.where == "none":
            return
        pinned = self.where == "host" and device.type == "cuda"
        self.pixels = torch.empty((len(files), 3, *self.size), dtype=torch.uint8, pin_memory=pinned)
        loading = self.pool.map(self._load_into, range(len(files)))
        for _ in tqdm(loading, total=len(files), desc="decode", unit="img", disable=None):
            pass
        if self.where == "device":
            try:
                self.pixels = self.pixels.to(device)
            except torch.OutOfMemoryError as error:
                raise ReidError(f"--cache device: {len(files):,} images take {bytes_needed / 2**30:.1f} GiB, which the GPU has "
                                "not; use --cache host or auto") from error

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        """rows: int64 [B] on the CPU -> uint8 [B, 3, H, W] on the device."""
        if self.where == "device":
            return self.pixels[rows.to(self.device, non_blocking=True)]
        if self.where == "host":
            return self.pixels[rows].to(self.device, non_blocking=True)
        images = list(self.pool.map(self._load, rows.tolist()))
        return torch.cat(images).to(self.device, non_blocking=True)

    def batches(self, rows):
        """The batches of an epoch, rows int64 [steps, B]; where nothing is kept, the next one is decoded meanwhile."""
        if self.where != "none":
            yield from (self[batch] for batch in rows)
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.__getitem__, rows[0])
            for batch in rows[1:]:
                ready, coming = coming.result(), ahead.submit(self.__getitem__, batch)
                yield ready
            yield coming.result()

    def _load(self, row):
        return resize([decode(self.files[row])], self.size)

    def _load_into(self, row):
        self.pixels[row] = self._load(row)[0]


def _place(bytes_needed, device):
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 << 30
    if device.type == "cuda":
        if bytes_needed < 0.4 * torch.cuda.mem_get_info(device)[0]:
            return "device"
        return "host" if bytes_needed < 0.5 * free else "none"
    return "device" if bytes_needed < 0.5 * free else "none"

