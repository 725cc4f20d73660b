"""Where decoded images are kept, and that they are the same everywhere."""

import pytest
import torch

from reid import ReidError
from reid.data.datasets import read_split
from reid.images import decode, resize
from reid.training import cache
from reid.training.cache import ImageCache

GIB = 1 << 30


def test_images_that_the_gpu_cannot_hold(people, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cache.torch, "empty", no_room)
    with pytest.raises(ReidError, match=r"6 images take .* use --cache host or auto"):
        ImageCache(read_split(people, "query").files()[:6], (64, 32), torch.device("cpu"), "device")


@pytest.mark.parametrize("where", ["device", "host", "none"])
def test_the_same_images_from_everywhere(people, where, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 4)
    files = read_split(people, "query").files()[:6]
    images = ImageCache(files, (64, 32), torch.device("cpu"), where, workers=2)
    assert images.where == where and len(images) == 6
    rows = torch.tensor([[5, 0], [2, 2]])
    for batch, found in zip(rows, images.batches(rows), strict=True):
        assert torch.equal(found, torch.cat([resize([decode(files[row])], (64, 32)) for row in batch.tolist()]))


@pytest.mark.parametrize("device, needed, where", [
    ("cpu", 3 * GIB, "device"), ("cpu", 5 * GIB, "none"),
    ("cuda", 1 * GIB, "device"), ("cuda", 3 * GIB, "host"), ("cuda", 5 * GIB, "none"),
])
def test_chosen_by_size(monkeypatch, device, needed, where):
    """8 GiB of memory and 5 GiB of GPU memory are free."""
    monkeypatch.setattr(cache.os, "sysconf", {"SC_AVPHYS_PAGES": 8 * GIB // 4096, "SC_PAGE_SIZE": 4096}.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GIB, 8 * GIB))
    assert cache._place(needed, torch.device(device)) == where


def test_bad_images_are_named_in_one_message_up_to_ten(tmp_path):
    files = [tmp_path / f"{number:02}.jpg" for number in range(12)]
    for file in files:
        file.write_bytes(b"no picture")
    with pytest.raises(ReidError, match=r"^12 images, .*: \S+00.jpg: cannot be read .*09.jpg: cannot.*; and 2 more$"):
        ImageCache(files, (64, 32), torch.device("cpu"))
    with pytest.raises(ReidError, match=r"07.jpg: cannot be read as an image"):
        ImageCache(files, (64, 32), torch.device("cpu"), "none")[torch.tensor([7])]
