"""The adapters of docs/trackers.md run as written, in the order of the page, where their packages are installed."""

import re
import warnings

import numpy as np
import pytest


@pytest.fixture(scope="module")
def blocks(root):
    """The Python blocks of the page: a frame and its boxes, the adapter of BoxMOT, BoxMOT, supervision."""
    page = (root / "docs/trackers.md").read_text()
    found = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(found) == 4
    return found


@pytest.fixture(scope="module")
def namespace(blocks, root):
    """The variables of the page after its first two blocks."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for code in blocks[:2]:
            exec(code, names)
    return names


def test_embeddings_of_a_frame(namespace):
    found, frame = namespace["embeddings"].numpy(), namespace["frame"]
    assert found.shape == (2, 1024) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.diag(namespace["similarity"].numpy()), 1, atol=1e-5)
    crops = [frame[80:300, 100:180, ::-1], frame[200:460, 600:690, ::-1]]
    np.testing.assert_array_equal(found, namespace["extractor"].embed(crops).numpy())


def test_boxmot_adapter(namespace):
    """The same embeddings, and finite rows of norm 1 for boxes outside of the frame, as BoxMOT requires."""
    model, boxes = namespace["ReidModel"](namespace["extractor"]), namespace["boxes"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.get_features(np.concatenate([boxes, [[2000, 0, 2100, 200]]]), namespace["frame"])
    np.testing.assert_array_equal(found[:2], namespace["embeddings"].numpy())
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.abs(found[:2] @ found[2]).max() < 0.6
    assert model.get_features(np.empty((0, 4)), namespace["frame"]).shape == (0, 1024)


def test_boxmot(namespace, blocks):
    pytest.importorskip("boxmot", reason="pip install boxmot")
    names = dict(namespace)
    exec(blocks[2], names)
    assert len(names["tracks"]) == 2
    again = names["tracker"].update(names["detections"], names["frame"])
    np.testing.assert_array_equal(np.asarray(again)[:, 4], np.asarray(names["tracks"])[:, 4])  # the ids stay


def test_supervision(namespace, blocks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about OpenCV, which it can do without
        pytest.importorskip("supervision", reason="pip install supervision")
    names = dict(namespace)
    exec(blocks[3], names)
    np.testing.assert_array_equal(names["detections"].data["embedding"], names["embeddings"].numpy())
    assert 0 in [int(np.flatnonzero((names["boxes"] == box).all(1))[0]) for box in names["found"].xyxy]
