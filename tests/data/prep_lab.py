"""A miniature Market-1501, a folder per identity, and assertions about the outcome of data_prep.py."""

import hashlib
import io
import random
import tarfile
import zipfile

from reid.data import prepare

NAMES = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000551_01.jpg", "0002_c3s2_000776_01.jpg", "Thumbs.db",
                           "0007_c1s1_000100_01.jpg", "0007_c6s1_000200_02.jpg.jpg", "0009_c1s1_000300_01.jpg"],
    "query": ["0001_c1s1_001051_00.jpg", "1488_c2s3_065527_00.jpg.jpg", "Thumbs.db"],
    "bounding_box_test": ["0001_c2s1_001976_01.jpg", "1488_c1s6_023021_02.jpg.jpg", "-1_c1s1_000401_03.jpg",
                          "0000_c1s1_000151_01.jpg", "0000_c4s6_022316_04.jpg.jpg", "Thumbs.db"],
    "gt_bbox": ["0003_c1s1_000001_00.jpg"], "gt_query": ["0001_c1s1_001051_00_good.mat"], "": ["readme.txt"],
}
FORMATS = ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "folder")


def content(name, size=3000):
    return random.Random(name).randbytes(size)


def members(depth="Market-1501-v15.09.15"):
    return {"/".join(filter(None, (depth, folder, name))): content(f"{folder}/{name}") for folder, names in NAMES.items()
            for name in names}


def pack(path, files):
    """An archive (or folder) at `path` of {member name: bytes}; the format follows the suffix."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    elif ".tar" in path.name:
        with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def tree(root):
    """{relative path: bytes} of the images of a prepared tree."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for split in prepare.SPLITS
            for path in (root / split).rglob("*") if path.is_file()}


def expected():
    """The tree that the miniature archive must become, computed here independently."""
    grouped = {}
    for folder, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        for name in NAMES[folder]:
            if name != "Thumbs.db":
                grouped[f"{split}/{name.split('_')[0]}/{name}"] = content(f"{folder}/{name}")
    for pid in ("0002",):  # 0007 and 0009 have one or two images, which stay
        held = min((path for path in grouped if path.startswith(f"train/{pid}/")),
                   key=lambda path: hashlib.sha256(path.split("/")[-1].encode()).hexdigest())
        grouped[held.replace("train", "val", 1)] = grouped.pop(held)
    return grouped


def make_tree(folder, people):
    for person, names in people.items():
        for name in names:
            (folder / person).mkdir(parents=True, exist_ok=True)
            (folder / person / name).write_bytes(f"{person}/{name}".encode())
    return folder


def refused(result, *words):
    status, _, stderr = result
    assert status == 1
    assert stderr.startswith("data_prep.py: error: ") and stderr.count("\n") == 1, stderr
    for word in words:
        assert word in stderr, stderr


def clean(tmp_path):
    """Nothing is left of a run that failed."""
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
