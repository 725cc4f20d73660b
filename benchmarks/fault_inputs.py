"""Rubbish for benchmarks/faults.py: image files, checkpoints and indexes as accidents and attackers make them."""

import os
import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reid import files as storage

READ, LEFT_OUT = "read", "left out"  # what must become of an image


def picture(size=(64, 128), mode="RGB"):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def bomb(width=50_000, height=50_000):
    """A PNG of a few hundred bytes that unpacks to gigabytes."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def _rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(path, exif=exif)


def _truncated(path):
    picture().save(path)
    os.truncate(path, path.stat().st_size // 2)


def _unreadable(path):
    picture().save(path)
    path.chmod(0)


def _sparse(path):
    picture().save(path)
    os.truncate(path, 40 << 30)  # no block on the disk, and more than fits into memory


def _folder(path):
    path.mkdir()
    picture().save(path / "inside.jpg")


IMAGES = {  # kind: (file name, write(path), what must become of it)
    "truncated": ("0002_c1s1_000001_01.jpg", _truncated, LEFT_OUT),
    "empty": ("0002_c1s1_000002_01.jpg", Path.touch, LEFT_OUT),
    "text": ("0002_c1s1_000003_01.jpg", lambda path: path.write_text("no image"), LEFT_OUT),
    "decompression bomb": ("0002_c1s1_000004_01.png", lambda path: path.write_bytes(bomb()), LEFT_OUT),
    "40 GB of nothing": ("0002_c1s1_000005_01.jpg", _sparse, LEFT_OUT),
    "unreadable": ("0002_c1s1_000006_01.jpg", _unreadable, LEFT_OUT),
    "dangling link": ("0002_c1s1_000007_01.jpg", lambda path: path.symlink_to("nowhere"), LEFT_OUT),
    "link to itself": ("0002_c1s1_000008_01.jpg", lambda path: path.symlink_to(path.name), LEFT_OUT),
    "link to /dev/zero": ("0002_c1s1_000009_01.jpg", lambda path: path.symlink_to("/dev/zero"), LEFT_OUT),
    "pipe": ("0002_c1s1_000010_01.jpg", os.mkfifo, LEFT_OUT),
    "folder named x.jpg": ("x.jpg", _folder, READ),
    "CMYK": ("0002_c1s1_000011_01.jpg", lambda path: picture(mode="CMYK").save(path), READ),
    "16 bits": ("0002_c1s1_000012_01.png", lambda path: Image.fromarray(
        np.arange(64 * 128, dtype=np.uint16).reshape(128, 64) * 8).save(path), READ),
    "palette": ("0002_c1s1_000013_01.png", lambda path: picture(mode="P").save(path, transparency=3), READ),
    "animated": ("0002_c1s1_000014_01.gif", lambda path: picture().save(
        path, save_all=True, append_images=[picture(mode="L")]), READ),
    "EXIF-rotated": ("0002_c1s1_000015_01.jpg", _rotated, READ),
    "progressive": ("0002_c1s1_000016_01.jpg", lambda path: picture().save(path, progressive=True), READ),
    "1 x 1": ("0002_c1s1_000017_01.png", lambda path: picture((1, 1)).save(path), READ),
    "20,000 pixels wide": ("0002_c1s1_000018_01.png", lambda path: Image.new("RGB", (20_000, 3)).save(path), READ),
    "wrong extension": ("0002_c1s1_000019_01.jpg", lambda path: picture().save(path, "PNG"), READ),
    "unicode and spaces": ("José  Пример 日本 [1].jpg", lambda path: picture().save(path), READ),
    "name not in UTF-8": (os.fsdecode(b"\xff\xfe name.jpg"), lambda path: picture().save(path), READ),
    "line break in the name": ("a\nb.jpg", lambda path: picture().save(path), READ),
    "camera of 3 digits": ("0002_c123s1_000020_01.jpg", lambda path: picture().save(path), READ),
}


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def raw(path, record, kind, version):
    """As storage.save writes, with a checksum that fits whatever is in it."""
    record = {"format": kind, "version": version, **record}
    try:
        record["sha256"] = storage.checksum(record)
    except (RuntimeError, NotImplementedError, TypeError, RecursionError):
        record["sha256"] = ""
    torch.save(record, path)


def damaged_bytes(whole, rng):
    """`whole` with up to 8 bytes changed, cut off in one case of three."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 1 / 3 else data)


def huge(*shape, dtype=torch.float32):
    """A tensor of petabytes that takes one number in a file."""
    return torch.zeros(1, dtype=dtype).expand(*shape)


def _ring():
    ring = []
    ring.append(ring)
    return ring


STRANGE = [  # values that a file may hold and that code does not expect
    None, True, -1, 0, 1 << 70, float("nan"), float("inf"), "", "\ud800", "../../x", "a\nb", b"bytes", [], {}, (), [[]], {1: 2},
    _ring(),
    torch.tensor(1), torch.empty(0), torch.ones(2, 3), torch.full((3, 4), torch.nan), torch.ones(3, dtype=torch.complex64),
    torch.ones(3, dtype=torch.bool), torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta"), huge(1 << 25, 1 << 25),
    torch.full((5,), 1 << 62), torch.nn.Parameter(torch.ones(2)),
]


def strange_contents(node, rng):
    """A copy of a dict in which one value, at any depth, is another, twice as long, of another type or gone."""
    node = dict(node)
    key = rng.choice(sorted(node, key=str))
    if isinstance(node[key], dict) and node[key] and rng.random() < 0.8:
        node[key] = strange_contents(node[key], rng)
        return node
    value, lot = node[key], rng.random()
    if lot < 0.1:
        del node[key]
    elif lot < 0.5 and isinstance(value, torch.Tensor) and value.ndim:
        node[key] = rng.choice([value.double, value.short, value.half, lambda: torch.cat([value, value]), lambda: value[None],
                                lambda: value[:-1], lambda: value.flip(0), lambda: -value.long(), lambda: value * torch.nan,
                                lambda: value.expand(3, *value.shape), lambda: value[:1].expand(1 << 40, *value.shape[1:])])()
    else:
        node[key] = rng.choice(STRANGE)
    return node


def hostile_files(record, kind, version, marker, rng=None):
    """Files that must be refused: {name: write(path)}. record: the contents of a good file of this kind."""
    rng = rng or random.Random(0)

    def changed(**values):
        return lambda path: raw(path, {**record, **values}, kind, version)

    def bytes_of(change):
        def write(path):
            storage.save(path, record, kind, version)
            path.write_bytes(change(path.read_bytes()))
        return write

    def flip(data):  # of a weight or an embedding, in the largest part of the file
        at = len(data) // 2
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return {
        "code in a plain pickle": lambda path: path.write_bytes(pickle.dumps(Hostile(marker))),
        "code in a value": lambda path: torch.save({"format": kind, "version": version, "x": Hostile(marker)}, path),
        "code in torch's old format": lambda path: torch.save({"format": kind, "version": version, "x": Hostile(marker)}, path,
                                                              _use_new_zipfile_serialization=False),
        "empty": bytes_of(lambda data: b""),
        "text": bytes_of(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "truncated": bytes_of(lambda data: data[: rng.randrange(len(data))]),
        "last byte gone": bytes_of(lambda data: data[:-1]),
        "bit flipped": bytes_of(flip),
        "of another version": lambda path: raw(path, record, kind, version + 1),
        "of another kind": lambda path: raw(path, record, "reid-other", version),
        "a list": lambda path: torch.save([1, 2], path),
        "petabytes in one number": changed(**{key: huge(1 << 25, 1 << 25) if isinstance(value, torch.Tensor) else
                                              {"x": huge(1 << 25, 1 << 25)} for key, value in record.items()
                                              if key in ("embeddings", "state_dict")}),
    }


def hostile_checkpoints(record, kind, version, marker):
    config, state = record["config"], record["state_dict"]
    name = "body.conv0.weight"

    def changed(**values):
        return lambda path: raw(path, {**record, **values}, kind, version)

    return hostile_files(record, kind, version, marker) | {
        "weights of another shape": changed(state_dict=state | {name: state[name][1:]}),
        "weights missing": changed(state_dict={key: value for key, value in state.items() if key != name}),
        "weights NaN": changed(state_dict=state | {name: state[name] * torch.nan}),
        "weights as text": changed(state_dict=state | {name: "x"}),
        "another backbone": changed(config=config | {"backbone": "resnet50"}),
        "images of a billion pixels": changed(config=config | {"height": 1 << 30, "width": 1 << 30}),
        "no configuration": changed(config={}),
    }


def hostile_indexes(record, kind, version, marker):
    rows = record["embeddings"]

    def changed(**values):
        return lambda path: raw(path, {**record, **values}, kind, version)

    return hostile_files(record, kind, version, marker) | {
        "embeddings NaN": changed(embeddings=rows * torch.nan),
        "one embedding NaN": changed(embeddings=torch.cat([rows[:-1], rows[-1:] * torch.nan])),
        "embeddings of another size": changed(embeddings=rows[:, :7].contiguous()),
        "embeddings missing": changed(embeddings=rows[:-1]),
        "ids missing": changed(pids=record["pids"][:-1]),
        "ids as decimals": changed(pids=record["pids"].float()),
        "another model": changed(fingerprint="0" * 16),
        "another preprocessing": changed(preprocessing="rgb-u8/nearest/1"),
        "names out of bounds": changed(path_offsets=record["path_offsets"] + (1 << 40)),
        "names backwards": changed(path_offsets=record["path_offsets"].flip(0)),
    }
