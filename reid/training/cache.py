"""Decode once: the training images as uint8 tensors, kept where the training step reaches them fastest."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from reid import ReidError
from reid.images import decode, resize

SHOWN = 10  # bad images that are named in one message
CHUNK = 1024  # images that are decoded before they move to the device, so that the host need not hold all of them


class ImageCache:
    """uint8 images [N, 3, H, W] of `files`; `cache[rows]` is a batch on `device`.

    where: "device" (decoded once, kept there), "host" (decoded once, kept in memory), "none" (decoded anew each time) or
    "auto": device if the set takes at most 40 % of a GPU's free memory, else host if at most half of the free memory,
    else none. `.where` is the choice. workers: threads that decode. Raises ReidError with the paths of images that cannot be
    decoded: all of the set, or with "none" those of a batch.
    """

    def __init__(self, files, size, device, where="auto", workers=4):
        self.files, self.size, self.device = files, tuple(size), device
        self.pool, self.bad = ThreadPoolExecutor(max(1, workers)), []  # bad: (row, error) of images that could not be read
        bytes_needed = len(files) * 3 * size[0] * size[1]
        self.where = _place(bytes_needed, device) if where == "auto" else where
        if self.where == "none":
            return
        try:
            shape = len(files), 3, *self.size
            self.pixels = torch.empty(shape, dtype=torch.uint8, device=device if self.where == "device" else "cpu")
        except torch.OutOfMemoryError as error:
            raise ReidError(f"--cache device: {len(files):,} images take {bytes_needed / 2**30:.1f} GiB, more than the GPU has "
                            "free; use --cache host or auto") from error
        with tqdm(total=len(files), desc="decode", unit="img", disable=None) as progress:
            for rows in torch.arange(len(files)).split(CHUNK):
                self.pixels[rows[0] : rows[-1] + 1] = self._decode(rows)
                progress.update(len(rows))
        self._refuse_bad()

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        """rows: int64 [B] -> uint8 [B, 3, H, W] on the device."""
        if self.where == "device":
            return self.pixels[rows.to(self.device)]
        if self.where == "none":
            images = self._decode(rows)
            self._refuse_bad()
        else:
            images = self.pixels[rows]
        if self.device.type == "cuda":
            images = images.pin_memory()  # from pageable memory, a copy would wait for the step before it
        return images.to(self.device, non_blocking=True)

    def batches(self, rows):
        """Yield the batches of an epoch, rows int64 [steps, B]. In host memory, a thread makes each one step ahead."""
        if self.where == "device":
            yield from (self[batch] for batch in rows.to(self.device))
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.__getitem__, rows[0])
            for batch in rows[1:]:
                ready, coming = coming.result(), ahead.submit(self.__getitem__, batch)
                yield ready
            yield coming.result()

    def _decode(self, rows):
        """Return images uint8 [B, 3, H, W]. Those that cannot be read are black and are added to `bad`."""
        def read(row):
            try:
                return resize([decode(self.files[row])], self.size)
            except ReidError as error:
                self.bad.append((row, str(error)))
                return torch.zeros(1, 3, *self.size, dtype=torch.uint8)
        return torch.cat(list(self.pool.map(read, rows.tolist())))

    def _refuse_bad(self):
        messages = [message for _, message in sorted(self.bad)]
        if len(messages) > 1:
            more = f"; and {len(messages) - SHOWN:,} more" if len(messages) > SHOWN else ""
            messages = [f"{len(messages):,} images, which have to be replaced or removed: {'; '.join(messages[:SHOWN])}{more}"]
        if messages:
            raise ReidError(messages[0])


def _place(bytes_needed, device):
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 << 30
    if device.type == "cuda" and bytes_needed < 0.4 * torch.cuda.mem_get_info(device)[0]:
        return "device"
    if bytes_needed < 0.5 * free:
        return "host" if device.type == "cuda" else "device"
    return "none"
