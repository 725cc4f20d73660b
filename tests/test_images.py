"""Every kind of image file that users have, good and bad."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from reid import ReidError
from reid.images import MAX_PIXELS, MAX_SCANS, decode, resize


def picture(mode="RGB", size=(20, 30)):
    """A smooth picture, so that lossy formats stay near it."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).convert(mode)


def near(pixels, reference, tolerance):
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(reference.convert("RGB")).astype(int))
    return difference.mean() < tolerance


def test_want_of_memory_is_not_the_fault_of_an_image(tmp_path, monkeypatch):
    """It would be left out of the index."""
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr("reid.images._to_rgb", lambda image: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        decode(tmp_path / "a.png")


@pytest.mark.parametrize("mode, name, options", [
    ("RGB", "a.jpg", {}), ("RGB", "a.jpg", {"progressive": True}), ("L", "a.jpg", {}), ("CMYK", "a.jpg", {}),
    ("RGB", "a.png", {}), ("P", "a.png", {}), ("P", "a.gif", {}), ("L", "a.png", {}), ("1", "a.png", {}),
    ("RGBA", "a.png", {}), ("LA", "a.png", {}),
    ("RGB", "a.bmp", {}), ("RGB", "a.webp", {}), ("RGB", "a.tif", {}), ("CMYK", "a.tif", {}),
])
def test_formats_and_modes(tmp_path, mode, name, options):
    path = tmp_path / name
    picture(mode).save(path, **options)
    pixels = decode(path)
    assert pixels.shape == (3, 30, 20) and pixels.dtype == torch.uint8
    assert near(pixels, picture(mode), 40 if mode == "1" else 12)


def test_sixteen_bits(tmp_path):
    values = np.linspace(0, 65535, 600).reshape(30, 20).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.abs(decode(tmp_path / "a.png")[0].numpy().astype(int) - values // 257).max() <= 1


@pytest.mark.parametrize("values, wanted", [
    (np.array([[0, 0.5], [0.25, 1]], np.float32), [[0, 127], [63, 255]]),  # 0..1
    (np.array([[0, 100], [12.5, 255]], np.float32), [[0, 100], [12, 255]]),  # 0..255
    (np.array([[0, 4095], [2048, 16]], np.uint16), [[0, 255], [127, 0]]),  # 12 bits
    (np.array([[0, 1023], [512, 4]], np.uint16), [[0, 255], [127, 0]]),  # 10 bits
    (np.array([[0, 65535], [32768, 257]], np.uint16), [[0, 255], [127, 1]]),
    (np.array([[0, 65535], [32768, 257]], np.int32), [[0, 255], [127, 1]]),
    (np.array([[0, 200], [7, 1]], np.uint16), [[0, 200], [7, 1]]),  # 8 bits
])
def test_more_than_eight_bits_are_scaled_by_their_range(tmp_path, values, wanted):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert decode(tmp_path / "a.tif")[1].tolist() == wanted


@pytest.mark.parametrize("value", [-1, np.nan, np.inf, 70_000])
def test_values_without_a_range_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ReidError, match="8 bits a channel"):
        decode(tmp_path / "a.tif")


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png") == 255).all()


def jpeg2000(side):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG2000")
    return buffer.getvalue()


SLOW = {"P3": b"P3 10 10 255\n" + b"0 " * 300, "P2": b"P2\n#\n#\n2 2 255\n1 2 3 4", "P1": b"P1 2 2\n1 0 1 0",
        "P6 comments": b"P6\n" + b"#\n" * 1000 + b"1 1 255\n\1\2\3", "P6 spaces": b"P6 1 1" + b" " * 2000 + b"255 \1\2\3",
        "P4 comments": b"P4 8 #" + b"\n#" * 1000 + b"\n1 \1"}


@pytest.mark.parametrize("kind", SLOW)
def test_ppm_that_is_read_slowly_is_refused(kind):
    with pytest.raises(ReidError, match="a PPM written as text, or with long comments"):
        decode(SLOW[kind])


@pytest.mark.parametrize("data, shape", [
    (b"P6\n# a comment\n2 1\n#\n255\n\1\2\3\4\5\6", (3, 1, 2)), (b"P5 1 2 255 \1\2", (3, 2, 1)), (b"P4\n8 1\n\1", (3, 1, 8)),
    (b"Pf\n1 1\n-1.0\n\0\0\0\0", (3, 1, 1))])
def test_other_ppm_is_read(data, shape):
    assert decode(data).shape == shape


def test_budgets_of_decoders(monkeypatch):
    """JPEG 2000 needs four times the memory of other formats; each segment of a JPEG takes its time."""
    monkeypatch.setattr("reid.images.MAX_PIXELS", 4 * 64 * 64)
    assert decode(jpeg2000(64)).shape == (3, 64, 64)
    with pytest.raises(ReidError, match="more than 4,096 pixels"):
        decode(jpeg2000(65))
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG")
    monkeypatch.setattr("reid.images.MAX_SEGMENTS", 20)
    assert decode(buffer.getvalue()).shape == (3, 30, 20)
    with pytest.raises(ReidError, match="scans or 20 segments"):
        decode(buffer.getvalue()[:2] + b"\xff\xfe\0\2" * 20 + buffer.getvalue()[2:])


def test_first_frame_of_an_animation(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert decode(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise to look upright
    picture().save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert decode(tmp_path / "a.jpg").shape == (3, 20, 30)
    assert near(decode(tmp_path / "a.jpg"), picture().rotate(-90, expand=True), 6)


def test_small_wide_and_misnamed(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    assert decode(tmp_path / "one.png").shape == (3, 1, 1)
    Image.new("RGB", (20_000, 3)).save(tmp_path / "wide.png")
    assert resize([decode(tmp_path / "wide.png")], (256, 128)).shape == (1, 3, 256, 128)
    picture().save(tmp_path / "png.jpg", format="png")
    assert near(decode(tmp_path / "png.jpg"), picture(), 1)


def test_bytes_and_pil_images():
    buffer = io.BytesIO()
    picture().save(buffer, "png")
    assert torch.equal(decode(buffer.getvalue()), decode(picture()))


def bomb(width, height):
    """A PNG that claims to be huge, with next to no data."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_bad_files_raise_one_line_with_the_path(tmp_path):
    picture(size=(64, 128)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "header.jpg").write_bytes(whole[:20])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    picture().save(tmp_path / "program.jpg", "eps")  # would be run by Ghostscript
    (tmp_path / "bomb.png").write_bytes(bomb(50_000, 50_000))
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("truncated.jpg", "header.jpg", "empty.jpg", "text.jpg", "program.jpg", "bomb.png", "dangling.jpg",
                 "folder.jpg", "missing.jpg"):
        with pytest.raises(ReidError) as caught:
            decode(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ReidError, match="more than 50,000,000 pixels"):
        decode(tmp_path / "bomb.png")
    assert 50_000 * 50_000 > MAX_PIXELS


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def scan_bomb(scans, between=b"", side=7000):
    """A progressive JPEG with scans of three bytes: each is a pass over all blocks, which costs milliseconds.

    between: what stands before each scan.
    """
    first = segment(0xDA, bytes([1, 1, 0x00, 0, 0, 0])) + bytes(8)  # the constant part of each block
    refinement = segment(0xDA, bytes([1, 1, 0x00, 1, 63, 0])) + b"\x7f\x00\x00"
    tables = segment(0xC4, bytes([0x00, 1, *[0] * 15, 0])) + segment(0xC4, bytes([0x10, 0, 2, *[0] * 14, 0x00, 0xE0]))
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
    return (b"\xff\xd8" + segment(0xDB, bytes([0, *[1] * 64])) + frame + tables + first + (between + refinement) * (scans - 1)
            + b"\xff\xd9")


@pytest.mark.parametrize("between", [b"", segment(0xFE, b"\xff\xd9"), b"\xff\xff", b"\xff\x00\xff\xd0"])
def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(tmp_path, between):
    """Also where an end of the image is hidden in a comment, or padding and restart markers lie between the scans."""
    path = tmp_path / "bomb.jpg"
    path.write_bytes(scan_bomb(MAX_SCANS + 1, between))
    for source in (path, path.read_bytes()):
        with pytest.raises(ReidError, match="more than 100 scans"):
            decode(source)
    assert decode(scan_bomb(MAX_SCANS, between, side=16)).shape == (3, 16, 16)


def test_only_scans_count(tmp_path):
    """Bytes that look like the start of a scan: in a comment, and behind the end of the image, where cameras keep videos."""
    picture().save(tmp_path / "a.jpg", progressive=True, comment=b"\xff\xda" * 200)
    with open(tmp_path / "a.jpg", "ab") as file:
        file.write(b"\xff\xda" * 200)
    assert decode(tmp_path / "a.jpg").shape == (3, 30, 20)
    with pytest.raises(ReidError):
        decode(b"\xff\xd8" + b"\xff\xda" * 200)


def test_resize_is_pillows_and_does_not_depend_on_neighbours():
    small, large = picture(size=(64, 128)), picture(size=(300, 500))
    mixed = resize([decode(small), decode(large)], (256, 128))
    for pixels, image in zip(mixed, (small, large)):
        reference = np.asarray(image.resize((128, 256), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(pixels.permute(1, 2, 0).numpy() - reference).max() <= 1
    assert torch.equal(mixed[0], resize([decode(small)], (256, 128))[0])
    assert torch.equal(mixed[:1].expand(2, -1, -1, -1), resize([decode(small)] * 2, (256, 128)))
