"""Crops of every kind: files, bytes, arrays, tensors, boxes of a frame, empty ones, large ones."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from reid import ReidError, images
from reid.retrieval.crops import cut, load_batch


def test_every_kind_of_input(extractor, crops, tmp_path):
    pixels = [images.decode(file) for file in crops]
    expected = extractor.embed(crops)
    assert expected.shape == (7, 1024) and expected.dtype == torch.float32 and not expected.requires_grad
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(7))
    for same in (list(map(str, crops)), pixels, [image.permute(1, 2, 0).numpy() for image in pixels],
                 [Image.open(file) for file in crops], [file.read_bytes() for file in crops]):
        torch.testing.assert_close(extractor.embed(same), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(extractor.embed(images.resize(pixels, extractor.size)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(extractor.embed(tmp_path), extractor.embed(sorted(crops)), atol=1e-5, rtol=0)
    assert extractor.embed(crops[0]).shape == extractor.embed(Image.open(crops[0])).shape == (1, 1024)
    assert extractor.embed([]).shape == (0, 1024)
    arrays = [image.permute(1, 2, 0).numpy() for image in pixels]
    frozen = [array.copy() for array in arrays]
    for array in frozen:
        array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in ([array[::-1].copy()[::-1] for array in arrays], frozen, [array.astype(np.float64) for array in arrays],
                     [array.astype(np.float32) / 255 for array in arrays], [array.astype(np.uint16) for array in arrays],
                     [image / 255 for image in pixels], [array.transpose(1, 0, 2).copy().transpose(1, 0, 2) for array in arrays]):
            assert torch.equal(extractor.embed(same), expected)
        assert torch.equal(extractor.embed([array[..., ::-1] for array in arrays], channels="bgr"), expected)
        assert torch.equal(extractor.embed([image.flip(0) for image in pixels], channels="bgr"), expected)
        assert torch.equal(extractor.embed(crops, channels="bgr"), expected)  # a file states its own order
    for one in (crops[0], str(crops[0]), arrays[0], pixels[0], crops[0].read_bytes()):
        torch.testing.assert_close(extractor.embed(one), expected[:1], atol=1e-5, rtol=0)
    gray = arrays[0][..., 0]
    for same in (gray, gray[..., None], torch.from_numpy(gray.copy()), gray / np.float32(255)):
        torch.testing.assert_close(extractor.embed(same), extractor.embed(np.dstack([gray] * 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrong", [
    np.zeros((8, 8, 4), np.uint8), torch.zeros(4, 8, 8, dtype=torch.uint8), np.full((8, 8, 3), "a"), np.full((8, 8, 3), np.nan),
    np.full((8, 8, 3), 256.0), np.full((8, 8, 3), -1.0), np.zeros((2, 2, 8, 8, 3)), np.zeros(8)])
def test_arrays_that_are_no_image(extractor, wrong):
    with pytest.raises(ReidError, match=r"image of shape .* give"):
        extractor.embed([wrong])


def test_boxes_of_a_frame_equal_their_crops(extractor, frame):
    boxes = np.array([[0, 0, 200, 120], [10.9, 20, 40, 90.2], [150, 60, 151, 61], [-30, -9, 50, 40], [170, 100, 999, np.inf]])
    crops = [frame, frame[20:90, 10:40], frame[60:61, 150:151], frame[:40, :50], frame[100:, 170:]]
    expected = extractor.embed(crops)
    assert expected.shape == (5, 1024) and expected.dtype == torch.float32 and expected.device.type == "cpu"
    for same in (boxes, torch.from_numpy(boxes), boxes.tolist(), boxes[::-1].copy()[::-1]):
        assert torch.equal(extractor.embed(frame, boxes=same), expected)
    bgr = np.ascontiguousarray(frame[..., ::-1])
    for same, channels in ((bgr, "bgr"), (bgr[..., ::-1], "rgb"), (frame / 255, "rgb"), (frame.astype(np.float32), "rgb"),
                           (torch.from_numpy(frame).permute(2, 0, 1), "rgb"), (Image.fromarray(frame), "rgb"),
                           (Image.fromarray(frame), "bgr"), (np.repeat(frame, 2, 1)[:, ::2], "rgb")):
        assert torch.equal(extractor.embed(same, boxes=boxes, channels=channels), expected)
    gray = frame[..., 0]
    expected = extractor.embed([np.dstack([gray] * 3)[20:90, 10:40]])
    assert torch.equal(extractor.embed(gray, boxes=boxes[1:2]), expected)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_boxes_share_the_memory_of_one_frame(channels):
    """Else many boxes of a large frame take gigabytes."""
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    crops = cut(frame, [[0, 0, 30, 20]] * 3 + [[5, 2, 9, 12]], channels)
    assert len({crop.untyped_storage().data_ptr() for crop in crops}) == 1
    expected = torch.from_numpy(frame[..., ::-1].copy() if channels == "bgr" else frame).permute(2, 0, 1)
    assert torch.equal(crops[0], expected) and torch.equal(crops[3], expected[:, 2:12, 5:9])


def test_empty_boxes_and_crops_get_a_row_of_nan(extractor, frame):
    boxes = [[10, 20, 40, 90], [10, 20, 10, 90], [40, 90, 10, 20], [np.nan, 0, 40, 90], [300, 0, 400, 90], [5, 5, 25, 60]]
    with pytest.warns(UserWarning, match="^4 of 6 crops are empty; their embeddings are NaN$") as caught:
        found = extractor.embed(frame, boxes=boxes)
    assert len(caught) == 1
    assert found.isnan().all(1).tolist() == found.isnan().any(1).tolist() == [False, True, True, True, True, False]
    assert torch.equal(found[[0, 5]], extractor.embed([frame[20:90, 10:40], frame[5:60, 5:25]]))
    with pytest.warns(UserWarning, match="2 of 3"):
        found = extractor.embed([frame[:0], frame, torch.zeros(3, 0, 8, dtype=torch.uint8)], channels="bgr")
    assert torch.equal(found[1:2], extractor.embed([frame[..., ::-1]])) and found[[0, 2]].isnan().all()
    with pytest.warns(UserWarning, match="1 of 1"):
        assert extractor.embed(frame, boxes=boxes[1:2]).isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for none in ([], np.zeros((0, 4)), torch.zeros(0, 4), np.zeros(0)):
            assert extractor.embed(frame, boxes=none).shape == (0, 1024)
    for wrong in ([1, 2, 3, 4], [[1, 2, 3]], [[1, 2, 3, 4], [1]], np.zeros((2, 6)), "box"):
        with pytest.raises(ReidError, match=r"boxes .*x1, y1, x2, y2"):
            extractor.embed(frame, boxes=wrong)
    with pytest.raises(ReidError, match="use rgb or bgr"):
        extractor.embed(frame, boxes=boxes, channels="RGB")


def test_large_images_are_resized_before_the_next_is_decoded(tmp_path, monkeypatch):
    """Else a batch of 50-megapixel pictures takes gigabytes; small ones wait, because they are resized together faster."""
    rng, waiting, most, decode = np.random.default_rng(0), [], [], images.decode
    for name, shape in (("large", (800, 600, 3)), ("small", (128, 64, 3))):
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"{name}{i}.png")
    resize = images.resize

    def counted(source):
        waiting.append(source)
        most.append(len(waiting))
        return decode(source)

    monkeypatch.setattr(images, "decode", counted)
    monkeypatch.setattr(images, "resize", lambda batch, size: waiting.clear() or resize(batch, size))
    for name, limit in (("large", 1), ("small", 4)):
        files = [tmp_path / f"{name}{i}.png" for i in range(4)]
        batch, failures = load_batch(files, range(4), (64, 32))
        assert not failures and max(most) == limit
        assert torch.equal(batch, torch.cat([resize([decode(file)], (64, 32)) for file in files]))
