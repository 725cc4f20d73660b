"""Fixtures of the retrieval tests: the checkpoint of a small network and its Extractor, crops, a frame."""

import numpy as np
import pytest
from embed_lab import trained_like
from PIL import Image

from reid.checkpoint import save_checkpoint
from reid.retrieval.extract import Extractor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "best.pth"
    save_checkpoint(path, trained_like(height=64, width=32), {}, {})
    return path


@pytest.fixture
def crops(tmp_path):
    """Seven small files: sizes, formats and names of every kind."""
    rng = np.random.default_rng(0)
    names = ["0001_c1s1_000001_00.jpg", "b.png", "ü x.jpg", "0002_c2.jpg", "c.jpg", "d.jpg", "e.jpg"]
    for i, name in enumerate(names):
        shape = (40, 20, 3) if i % 3 else (64 + i, 32, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    return [tmp_path / name for name in names]


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (120, 200, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def extractor(checkpoint):
    """An Extractor of `checkpoint` in fp32; a test must not change it."""
    return Extractor(checkpoint, "cpu", "fp32")
