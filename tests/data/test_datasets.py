"""File names, folders and the training set."""

import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid import ReidError
from reid.data.datasets import load_training_set, read_folder, read_split
from reid.data.names import UNKNOWN_PID, Name, folder_pid, identity_name, parse_name, read_file, read_path


@pytest.mark.parametrize("name, expected", [
    ("0002_c1s1_000451_03.jpg", Name(2, 1, 1, 451)),
    ("-1_c3s2_000451_00.jpg", Name(-1, 3, 2, 451)),
    ("0000_c6s3_088167_02.jpg.jpg", Name(0, 6, 3, 88167)),
    ("1501_c12s4_1_1.png", Name(1501, 12, 4, 1)),
    ("0005_c123_f0046985.jpg", Name(5, 123, -1, 46985)),
    ("0007_c3.png", Name(7, 3)),
    ("7_c3", Name(7, 3)),
    ("0002_C1S1_000451_03.JPG", Name(2, 1, 1, 451)), ("0002_c1s1_000451_03 (1).jpg", Name(2, 1)),
    ("0002_c002_00030600_0.jpg", Name(2, 2, -1, 30600)),  # VeRi
    ("0012_000_01_0303morning_0008_0.jpg", Name(12, 1)), ("0012_003_15_0113noon_0120_1_ex.jpg", Name(12, 15)),  # MSMT17
    ("0001C3T0001F001.jpg", Name(1, 3)), ("00-1C1T0002F003.jpg", Name(-1, 1)),  # MARS
    ("2_001_1_01.png", Name(2001, 3)), ("1_034_2_10.png", Name(1034, 2)),  # CUHK03: the second pair has cameras 3 and 4
    ("0007_c0.jpg", Name(7, 0)), ("7_cam_b_3.png", Name(7, 2)), ("anna_cam2_01.jpg", Name(UNKNOWN_PID, 2)),
    ("x_C1S1_3.png", Name(UNKNOWN_PID, 1)), ("camera-3.jpg", Name(UNKNOWN_PID, 3)), ("cam_a.jpg", Name(UNKNOWN_PID, 1)),
    ("_c1s1_1_1.jpg", Name(UNKNOWN_PID, 1)), ("1" * 30 + "_c1.jpg", Name(UNKNOWN_PID, 1)), ("٣_c1.jpg", Name(UNKNOWN_PID, 1)),
    ("Thumbs.db", None), ("person.jpg", None), ("abc1.jpg", None), ("cama.jpg", None), ("c1_c2.jpg", None),
    ("20240501.jpg", None),
])
def test_parse_name(name, expected):
    assert parse_name(name) == expected


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=string.printable + "éß₂٣", max_size=40)
       | st.from_regex(r"-?\d{1,25}_c\d{1,12}(s\d+)?(_\d+)*(\.jpg)*", fullmatch=True))
def test_parse_name_never_raises(name):
    parsed = parse_name(name)
    assert parsed is None or all(-(2**63) <= value < 2**63 for value in parsed)


def test_folder_pid_is_the_number_or_a_stable_hash():
    assert folder_pid("0002") == 2
    assert folder_pid("anna") == folder_pid("anna") != folder_pid("berta")
    for name in ("anna", "0", "-1", "-7"):
        assert 2**61 <= folder_pid(name) < 2**62
    assert folder_pid("0") == folder_pid("0000") != folder_pid("-1")
    assert folder_pid("Zo\u00eb") == folder_pid("Zoe\u0308")  # composed, and as a Mac writes it
    assert identity_name(folder_pid("anna"), Path("people/anna/7_c1.jpg")) == "anna"


@pytest.mark.parametrize("path, identity", [
    ("anna/7_c1.jpg", "anna"), ("anna/cam2/7.jpg", "anna"),
    ("7_c1.jpg", "7"), ("cam2/7_c1.jpg", "7"), ("2026-11-26/7_c1.jpg", "7"),
    ("door/0007_c2s1_000451_03.jpg", "7"), ("0007/0007_c1.jpg", "7")])
def test_without_a_split_a_folder_comes_before_a_number_without_sequence(path, identity):
    assert identity_name(read_path(path, False).pid, path) == identity


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def test_read_split_takes_the_identity_from_the_folder(tmp_path):
    make(tmp_path, "train/0002/0002_c1s1_000451_03.jpg", "train/0002/Thumbs.db", "train/anna/0001_c2.JPG", "train/anna/me.png",
         "train/anna/.hidden.jpg", "train/loose.jpg", "train/-1/-1_c1s1_1_1.jpg.jpg")
    records = read_split(tmp_path, "train")
    assert records.paths == ["train/-1/-1_c1s1_1_1.jpg.jpg", "train/0002/0002_c1s1_000451_03.jpg", "train/anna/0001_c2.JPG",
                             "train/anna/me.png"]
    assert records.pids.tolist() == [-1, 2, folder_pid("anna"), folder_pid("anna")]
    assert records.camids.tolist() == [1, 1, 2, -1]
    assert records.frames.tolist() == [1, 451, -1, -1]
    assert records.select(records.pids == 2).paths == [records.paths[1]]


def test_read_folder_takes_the_name_then_the_folder(tmp_path):
    make(tmp_path, "0002_c1s1_000451_03.jpg", "a b/ü.png", "x.jpg/inner.jpg", "me.bmp")
    records = read_folder(tmp_path)
    pids = dict(zip(records.paths, records.pids.tolist()))
    assert pids == {"0002_c1s1_000451_03.jpg": 2, "a b/ü.png": folder_pid("a b"), "x.jpg/inner.jpg": folder_pid("x.jpg"),
                    "me.bmp": UNKNOWN_PID}


def test_deeper_folders_give_camera_or_clip(tmp_path):
    make(tmp_path, "gallery/0001/cam2/g.png", "gallery/anna/track_1/a_c3.png", "gallery/cam_b/ben/x.png", "gallery/loose.png")
    (tmp_path / "gallery/0001/notes.txt").write_text("no image")
    split, folder = read_split(tmp_path, "gallery"), read_folder(tmp_path / "gallery")
    rows = [(1, 2), (folder_pid("anna"), 3), (folder_pid("ben"), 2)]
    assert list(zip(split.pids.tolist(), split.camids.tolist())) == rows
    assert list(zip(folder.pids.tolist(), folder.camids.tolist())) == [*rows, (UNKNOWN_PID, -1)]
    text = split.account("mine")
    assert text.startswith("mine: 5 files, 3 images taken, 2 left out\n") and "1 beside the identity folders: loose.png" in text
    assert "identity of 3 and camera of 3 of 3 images" in text
    assert "such as gallery/0001/cam2/g.png: identity 1 (from its folder), camera 2 (from its folder)" in text
    with pytest.raises(ReidError, match=r"--strict.*loose\.png"):
        split.account("mine", strict=True)
    make(tmp_path, "gallery/site/carl/x.png")
    with pytest.raises(ReidError, match="site or carl could be the identity; the first folder"):
        read_split(tmp_path, "gallery")
    assert read_folder(tmp_path / "gallery").pids.tolist()[-1] == UNKNOWN_PID  # a gallery may be searched without identities


def test_a_query_is_labelled_by_its_folder_inside_of_the_dataset_only(tmp_path):
    make(tmp_path, "d/query/anna/cam2/0007_c1.png")
    (tmp_path / "link").symlink_to(tmp_path / "d")
    for file in ("d/query/anna/cam2/0007_c1.png", "link/query/anna/cam2/0007_c1.png"):
        assert read_file(tmp_path / file, tmp_path / "d")[:2] == (folder_pid("anna"), 2)
        assert read_file(tmp_path / file, tmp_path / "elsewhere")[:2] == (7, 1)


def test_a_dataset_without_cameras_says_so(tmp_path):
    make(tmp_path, "gallery/anna/1.png", "gallery/ben/1.png")
    assert "NO CAMERA was read" in read_split(tmp_path, "gallery").account("mine")
    make(tmp_path, "gallery/anna/2_c1.png")
    assert "NO CAMERA" not in read_split(tmp_path, "gallery").account("mine")


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_no_images_is_an_error(tmp_path, what):
    folder = tmp_path / what
    if what == "empty":
        (folder / "train").mkdir(parents=True)
    with pytest.raises(ReidError, match=what):
        read_split(folder, "train")
    with pytest.raises(ReidError):
        read_folder(folder / "train")


def test_joint_training_keeps_ids_apart(people, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(people)
    train, val, classes = load_training_set([str(people), str(other)], held_out=0)
    alone, _, once = load_training_set([str(people)], held_out=0)
    assert len(classes) == 2 * len(once) and len(train.files) == 2 * len(alone.files)
    assert len(train.labels.unique()) == len(classes) and val.labels.max() < len(classes)
    with pytest.raises(ReidError, match="same name"):
        load_training_set([str(people), str(people)], train_all=False)


@pytest.fixture
def small(tmp_path):
    return make(tmp_path, "train/3/3_c1.jpg", "train/3/3_c2.jpg", "train/12/12_c1.jpg", "train/-1/-1_c1.jpg",
                "train/0000/0000_c1s1_1_1.jpg", "val/12/12_c2.jpg")


def test_training_set(small):
    train, val, classes = load_training_set([str(small)], train_all=False)
    assert classes == [3, 12]  # neither junk nor distractors
    assert [(file.name, label) for file, label in zip(train.files, train.labels.tolist())] == [
        ("12_c1.jpg", 1), ("3_c1.jpg", 0), ("3_c2.jpg", 0)]
    assert [file.name for file in val.files] == ["12_c2.jpg"] and val.labels.tolist() == [1]
    train, val, classes = load_training_set([str(small)], train_all=True)
    assert [file.name for file in train.files] == ["12_c1.jpg", "3_c1.jpg", "3_c2.jpg", "12_c2.jpg"]
    assert train.labels.tolist() == [1, 0, 0, 1] and val is None and classes == [3, 12]


def test_training_set_without_or_with_another_val(small):
    make(small, "val/99/99_c1.jpg")
    with pytest.raises(ReidError, match=r"val/ has identities that train/ has not: \[99\]"):
        load_training_set([str(small)], train_all=False)
    assert load_training_set([str(small)], train_all=True)[2] == [3, 12, 99]
    (small / "val").rename(small / "other")
    with pytest.raises(ReidError, match="--train_all"):
        load_training_set([str(small)], train_all=False)
    assert len(load_training_set([str(small)], train_all=True)[0].files) == 3


def test_an_empty_val_is_no_error_where_something_else_validates_or_nothing_has_to(small):
    (small / "val/12/12_c2.jpg").unlink()
    assert load_training_set([str(small)], train_all=True)[2] == [3, 12]
    with pytest.raises(ReidError, match="val: no images to validate on; train without validation with --train_all"):
        load_training_set([str(small)])
    make(small, *(f"train/{pid}/{pid}_c{camera}.jpg" for pid in (20, 21) for camera in (1, 2)))
    train, val, classes = load_training_set([str(small)], held_out=0.5)
    assert len(classes) == 4 and len(train.labels.unique()) == 2 and len(train.files) + len(val.files) == 7


def test_identities_that_are_held_out(tmp_path):
    """Half of eleven is six, taken from the nine that can have a match: seen by two cameras, or in two images without camera."""
    make(tmp_path, *(f"train/{pid}/{pid}_c{camera}_{i}.jpg" for pid in range(1, 9) for camera in (1, 2) for i in (0, 1)),
         "train/one/a_c1_1.jpg", "train/one/a_c1_2.jpg", "train/alone/a.jpg", "train/phone/a.jpg", "train/phone/b.jpg",
         *(f"val/{pid}/{pid}_c3_9.jpg" for pid in range(1, 9)))
    train, val, classes = load_training_set([str(tmp_path)], held_out=0.5)
    held = {file.parent.name for file, unseen in zip(val.files, val.held_out) if unseen}
    assert len(held) == 6 and len(classes) == 11 and not held & {"one", "alone"}
    images = set(tmp_path.rglob("*.jpg"))
    assert set(val.files) == {file for file in images if file.parent.name in held or file.parent.parent.name == "val"}
    assert set(train.files) == images - set(val.files) and len(set(train.labels.tolist())) == 5
    assert not train.held_out.any() and not set(train.labels.tolist()) & set(val.labels[val.held_out].tolist())
    assert val.camids.tolist() == [read_path(f"{file.parent.name}/{file.name}", True).camid for file in val.files]
    assert load_training_set([str(tmp_path)], held_out=0.5)[1].files == val.files  # the same in every run
    assert not load_training_set([str(tmp_path)], held_out=0.1)[1].held_out.any()  # a single one would always find itself
