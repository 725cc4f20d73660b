"""Fixtures of the training tests."""

import gc
import shutil

import pytest


@pytest.fixture(scope="module", autouse=True)
def fast_collections():
    """Leave what libraries keep out of further garbage collections, by which these tests end their runs."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def few(people, tmp_path_factory):
    """A grouped dataset of six identities, each with up to 8 training images and 1 for validation, and 20 gallery images.

    With two identities held out, three batches of eight images are an epoch.
    """
    folder = tmp_path_factory.mktemp("few") / "people"
    for identity in sorted((people / "train").iterdir())[:6]:
        for split, count in (("train", 8), ("val", 1)):
            (folder / split / identity.name).mkdir(parents=True)
            for image in sorted((people / split / identity.name).iterdir())[:count]:
                shutil.copy(image, folder / split / identity.name)
    for image in sorted((people / "gallery").rglob("*.jpg"))[:20]:
        (folder / "gallery" / image.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / "gallery" / image.parent.name)
    return folder
