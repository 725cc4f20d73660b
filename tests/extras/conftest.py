"""Fixtures of the tests of the search page."""

import io

import numpy as np
import pytest
from PIL import Image

from reid import images
from reid.data.datasets import read_folder
from reid.retrieval.index import GalleryIndex


@pytest.fixture(scope="session")
def gallery(tmp_path_factory):
    """Six people, two images by each of three cameras, and one junk image: blocks of colour with noise."""
    root, rng = tmp_path_factory.mktemp("gallery"), np.random.default_rng(1)
    for pid in [*range(1, 7), -1]:
        blocks = rng.integers(0, 256, (4, 2, 3))
        for camera in (1, 2, 3) if pid > 0 else (1,):
            for frame in (0, 1) if pid > 0 else (0,):
                noisy = np.kron(blocks, np.ones((16, 16, 1))) + rng.normal(0, 25, (64, 32, 3))
                name = f"{pid:04d}" if pid > 0 else "-1"
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / f"{name}_c{camera}s1_{frame:06d}_00.png")
    return root


@pytest.fixture(scope="session")
def index(gallery):
    from page_lab import PRINT, SIZE, Colours  # needs fastapi

    records = read_folder(gallery)
    pixels = images.resize([images.decode(file) for file in records.files()], SIZE)
    made = GalleryIndex(Colours().embed(pixels), records, PRINT, False)
    made.threshold = 0.8
    return made


@pytest.fixture(scope="module")
def site(index):
    from page_lab import Site

    with Site(index, topk_limit=15, allowed_hosts=["Crops.example"]) as running:
        yield running


@pytest.fixture
def uri(tmp_path):
    """Where `door` stores its gallery."""
    return tmp_path / "index/door.pt"


@pytest.fixture
def door(index, uri):
    """A server with --writable."""
    from page_lab import Site, writable

    with Site(**writable(index, uri), topk_limit=100) as running:
        yield running


@pytest.fixture(scope="session")
def crop(gallery):
    """A query: the bytes of another image of person 3."""
    image = np.asarray(Image.open(gallery / "0003_c2s1_000000_00.png")).astype(int)
    noisy = image + np.random.default_rng(2).normal(0, 20, image.shape)
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()
