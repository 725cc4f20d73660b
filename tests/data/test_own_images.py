"""data_prep.py --from and --synthetic: a folder per identity, a CSV file of times, drawn people."""

import os
import random
import shutil
import sys
from collections import defaultdict

import pytest
from forked import Script
from PIL import Image
from prep_lab import clean, make_tree, members, pack, refused, tree

import data_prep
from reid.cli import run
from reid.data import own, prepare
from reid.data.datasets import read_split
from reid.data.names import identity_name, parse_name


def test_from_a_tree_without_cameras(tmp_path, prep):
    people = {f"Person {i} ä": [f"IMG {j}.png" for j in range(i % 4 + 1)] for i in range(40)}
    folder = make_tree(tmp_path / "mine", people | {"-1": ["-1_c1.jpg", "-1_c2.jpg"], "0000": ["0000_c1s1_000001_00.jpg"]})
    (folder / "notes.txt").write_text("no image")
    (folder / "Person 1 ä" / "gone.jpg").symlink_to("nowhere")
    status, stdout, _ = prep("--from", folder, "--train_share", "0.5")
    assert status == 0 and "rule: " in stdout and "NO CAMERA" not in stdout
    assert f"{folder}: 105 files, 103 images taken, 2 left out" in stdout
    assert "1 .txt file that is no image: notes.txt" in stdout and "1 link to nothing: Person 1 ä/gone.jpg" in stdout
    split = {name: set(os.listdir(tmp_path / "out" / name)) for name in prepare.SPLITS}
    assert len(split["train"]) == 20 and not split["train"] & (split["query"] | split["gallery"])
    assert {"-1", "0000"} <= split["gallery"] and not {"-1", "0000"} & (split["query"] | split["train"])
    for person in split["query"]:
        assert len(os.listdir(tmp_path / "out/query" / person)) == 1 and len(people[person]) > 1
        assert len(os.listdir(tmp_path / "out/gallery" / person)) == len(people[person]) - 1
    assert {p for p in people if p not in split["train"] and len(people[p]) > 1} == split["query"]
    images = tree(tmp_path / "out")
    assert len(images) == sum(map(len, people.values())) + 3
    assert all(data == path.split("/", 1)[1].encode() for path, data in images.items())  # names are kept


def test_every_query_of_a_tree_has_a_match(tmp_path):
    """Random trees: a query's gallery has its identity under another camera, or one of the two has none."""
    rng = random.Random(0)
    for trial in range(25):
        people = {}
        for pid in range(1, 13):
            names = [f"{pid:04d}_c{rng.randint(1, rng.choice([1, 2, 4]))}_{i}.jpg" for i in range(rng.randint(1, 6))]
            people[f"{pid:04d}"] = names + [f"phone {i}.jpg" for i in range(rng.choice([0, 0, 1, 2]))]
        folder = make_tree(tmp_path / str(trial), people)
        images = [(split, pid, parse_name(name)) for split, pid, name, _ in own.from_tree(folder, 0.25)]
        assert len(images) == sum(map(len, people.values()))
        assert len({pid for split, pid, _ in images if split == "train"}) == 3
        cameras = [(split, pid, name.camid if name else None) for split, pid, name in images]
        queries = [row for row in cameras if row[0] == "query"]
        for _, pid, camera in queries:
            others = [c for split, p, c in cameras if split == "gallery" and p == pid]
            assert any(c is None or camera is None or c != camera for c in others), (people[pid], pid)
        matchable = {p for split, p, c in cameras if split != "train" and any(
            q == p and (c is None or d is None or c != d) for s, q, d in cameras if s != "train")}
        seen_once = {p for p in people if len(people[p]) == 1}
        assert {pid for _, pid, _ in queries} == matchable - seen_once


def test_cameras_and_times_from_a_csv_file(tmp_path, prep):
    folder = make_tree(tmp_path / "mine", {"anna": ["a.jpg", "b.png", "c.jpg"], "7": ["a.jpg"], "-1": ["junk.jpg"]})
    times = tmp_path / "times.csv"
    times.write_text("camera,path,time,note\n3,anna/a.jpg,2026-03-01T12:00:05,x\n4,anna/b.png,2026-03-01T12:01:05.2,\n"
                     "3,anna/c.jpg,2026-03-01T12:00:00,\n0,7/a.jpg,2026-03-01T12:00:01,\n3,-1/junk.jpg,2026-03-01T12:00:09,\n")
    status, _, stderr = prep("--from", folder, "--train_share", "0", "--times", times)
    assert status == 0, stderr
    found = {data: parse_name(path.rpartition("/")[2]) for path, data in tree(tmp_path / "out").items()}
    assert {data: (name.camid, name.seq, name.frame) for data, name in found.items()} == {
        b"anna/a.jpg": (3, 1, 125), b"anna/b.png": (4, 1, 1630), b"anna/c.jpg": (3, 1, 0), b"7/a.jpg": (0, 1, 25),
        b"-1/junk.jpg": (3, 1, 225)}
    assert found[b"7/a.jpg"].pid == 7 and found[b"-1/junk.jpg"].pid > 0  # a folder's name alone does not make junk
    queries = [path for path in tree(tmp_path / "out") if path.startswith("query/")]
    assert len(queries) == 1 and "_c3s1_" in queries[0]  # the camera with two images, by the CSV file


@pytest.mark.parametrize("text, message", [
    ("path,camera\na/x.jpg,1\n", "line 1"),
    ("path,camera,time\na/x.jpg,one,3\n", "line 2"),
    ("path,camera,time\na/x.jpg,1,noon\n", "line 2"),
    ("path,camera,time\na/x.jpg,1,nan\n", "line 2"),
    ("path,camera,time\na/x.jpg,1\n", "line 2"),
    ("path,camera,time\na/x.jpg,1,2\na/x.jpg,1,3\n", "line 3"),
    ("path,camera,time\na/z.jpg,1,2\n", "a/x.jpg"),
    ("path,camera,time\na/x.jpg,1,2\nb/z.jpg,1,2\n", "b/z.jpg"),
    ("\0\0", "times.csv"),
])
def test_a_wrong_csv_file_is_one_line(tmp_path, prep, text, message):
    folder = make_tree(tmp_path / "mine", {"a": ["x.jpg"]})
    (tmp_path / "times.csv").write_text(text)
    refused(prep("--from", folder, "--times", tmp_path / "times.csv"), "times.csv", message)
    clean(tmp_path)


def test_trees_that_are_ambiguous_are_refused(tmp_path, prep):
    refused(prep("--from", tmp_path / "nothing"), "no such folder")
    (tmp_path / "empty").mkdir()
    refused(prep("--from", tmp_path / "empty"), "no images in sub-folders")
    refused(prep("--from", make_tree(tmp_path / "deep", {"site1/anna": ["x.jpg"]})), "site1 or anna could be", "first folder")
    refused(prep("--from", make_tree(tmp_path / "two", {"anna/cam1/cam2": ["x.jpg"]})), "two cameras", "first folder")
    refused(prep("--from", make_tree(tmp_path / "both", {"anna/cam1": ["x_c2.jpg"]})), "camera 1 by its folder, 2 by its name")
    refused(prep("--from", make_tree(tmp_path / "cameras", {"cam_a": ["x.jpg"]})), "first folder", "found cam_a/x.jpg")
    refused(prep("--from", make_tree(tmp_path / "splits", {"train/anna": ["x.jpg"]})), "is a split", "splits/train")
    refused(prep("--from", make_tree(tmp_path / "one", {"anna/cam1": ["x.jpg"], "cam1/anna": ["x.jpg"]})), "rename one")
    refused(prep("--from", make_tree(tmp_path / "same", {"7": ["x.jpg"], "007": ["y.jpg"]})), "same identity")
    refused(prep("--from", pack(tmp_path / "market", members())), "--archive")
    refused(prep("--from", tmp_path, "--train_share", "2"), "--train_share")
    refused(prep("--synthetic", "--times", tmp_path / "times.csv"), "--times")
    clean(tmp_path)


def pictures(folder, *names, **options):
    """Write small images of different colours; a name without a suffix that Pillow can write is a PNG."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".ppm": "PPM", ".avif": "AVIF", ".jp2": "JPEG2000"}
        Image.new("RGB", (8, 16), (number * 40 % 256, 90, 200)).save(path, kinds.get(path.suffix, "PNG"), **options)
    return folder


def splits(root):
    """{identity as read: [(split, path below the identity, camera)]} of a prepared tree, val counted as train."""
    found = defaultdict(list)
    for split in prepare.SPLITS:
        if any((root / split).iterdir()):
            records = read_split(root, split)
            for path, pid, camid in zip(records.paths, records.pids.tolist(), records.camids.tolist()):
                found[identity_name(pid, path)].append((split.replace("val", "train"), path.split("/", 2)[2], camid))
    return found


def test_people_numbered_from_zero_are_all_people(tmp_path, prep):
    folder = pictures(tmp_path / "mine", *(f"{person}/{person}_c{camera}_{i}.png" for person in range(4) for camera in (0, 1)
                                           for i in range(2)))
    status, stdout, _ = prep("--from", folder, "--train_share", "0")
    assert status == 0 and "16 files, 16 images taken, 0 left out" in stdout and "junk" not in stdout.split("split")[-1]
    found = splits(tmp_path / "out")
    assert sorted(found) == ["0", "1", "2", "3"] and all(len(rows) == 4 for rows in found.values())
    for rows in found.values():  # a query for each of the two cameras, numbered from 0
        assert sorted((split, camera) for split, _, camera in rows) == [
            ("gallery", 0), ("gallery", 1), ("query", 0), ("query", 1)]


def test_the_top_folder_is_the_identity_and_deeper_ones_give_camera_or_clip(tmp_path, prep):
    folder = pictures(tmp_path / "mine", "0001/cam2/g.png", "0001/cam1/g.png", "anna/track_1/a.png", "anna/track_2/a.png",
                      "cam_b/ben/x.png", "0012_c3_1.png", "beside.png")
    status, stdout, _ = prep("--from", folder, "--train_share", "0")
    assert status == 0 and "7 files, 6 images taken, 1 left out" in stdout
    assert "1 beside the identity folders: beside.png" in stdout
    assert {name: sorted(row[1:] for row in rows) for name, rows in splits(tmp_path / "out").items()} == {
        "1": [("cam1/g.png", 1), ("cam2/g.png", 2)], "anna": [("track_1/a.png", -1), ("track_2/a.png", -1)],
        "ben": [("cam_b/x.png", 2)], "12": [("0012_c3_1.png", 3)]}
    refused(prep("--from", folder, "--strict", output=tmp_path / "strict"), "--strict", "beside.png")
    assert not (tmp_path / "strict").exists()


def test_links_are_followed_once(tmp_path, prep):
    folder = pictures(tmp_path / "mine", "anna/a.png", "anna/b.png")
    pictures(tmp_path / "elsewhere", "1/a.png", "1/b.png", "tree/carl/a.png")
    (folder / "ben").symlink_to(tmp_path / "elsewhere/1")
    (folder / "anna/up").symlink_to(tmp_path)  # a folder that holds the tree
    (folder / "anna/loop").symlink_to(folder / "anna")
    (folder / "ben again").symlink_to(tmp_path / "elsewhere/1")
    (folder / "dora").mkdir()
    (folder / "dora/a.png").symlink_to(folder / "anna/a.png")
    status, stdout, _ = prep("--from", folder, "--train_share", "0")
    assert status == 0 and "8 files, 5 images taken, 3 left out" in stdout
    assert "3 folder that is linked a second time, or holds its own link: anna/loop/, anna/up/, ..." in stdout
    assert {name: len(rows) for name, rows in splits(tmp_path / "out").items()} == {"anna": 2, "ben": 2, "dora": 1}
    (tmp_path / "link").symlink_to(folder)
    assert prep("--from", tmp_path / "link", "--train_share", "0", output=tmp_path / "out2")[0] == 0
    assert tree(tmp_path / "out2") == tree(tmp_path / "out")


def test_images_are_known_by_their_content_where_the_suffix_is_unusual(tmp_path, prep):
    good = ["a.jfif", "b.jpe", "c.ppm", "d.avif", "e.PNG", "f", "g.photo", "h.jp2"]
    folder = pictures(tmp_path / "mine", *(f"anna/{name}" for name in good))
    for name in ("x.heic", "y.txt", "z", "v.mp4"):
        (folder / "anna" / name).write_text("P6 no image")
    (folder / "anna/.DS_Store").touch()
    status, stdout, _ = prep("--from", folder, "--train_share", "0")
    assert status == 0 and "13 files, 8 images taken, 5 left out" in stdout
    for line in (".heic file, which Pillow does not read (convert it to JPEG): anna/x.heic",
                 ".txt file that is no image: anna/y.txt",
                 "suffix-less file that is no image: anna/z", ".mp4 file that is no image: anna/v.mp4", ": anna/.DS_Store"):
        assert f"  1 {line}" in stdout or f"of the operating system{line}" in stdout
    assert sorted(name for _, name, _ in splits(tmp_path / "out")["anna"]) == sorted(good)


@pytest.mark.parametrize("names, pattern, cameras", [
    (["anna/hall.1.png", "anna/door.2.png"], r"/(hall|door)\.", {"hall.1.png": 2, "door.2.png": 1}),
    (["anna/v7_x.png", "anna/v9_c1.png", "anna/y.png"], r"v(\d)", {"v7_x.png": 7, "v9_c1.png": 9, "y.png": -1}),
    (["anna/hall/x.png", "anna/door/y.png"], r"/(hall|door)/", {"x.png": 2, "y.png": 1}),
    (["anna/cam5/x-2.png"], r"x-(\d)", {"x-2.png": 2}),
])
def test_camera_by_a_regular_expression(tmp_path, prep, names, pattern, cameras):
    folder = pictures(tmp_path / "mine", *names)
    status, _, stderr = prep("--from", folder, "--train_share", "0", "--camera", pattern)
    assert status == 0, stderr
    assert {path.split("/")[-1]: camera for _, path, camera in splits(tmp_path / "out")["anna"]} == cameras


@pytest.mark.parametrize("names, pattern, found", [
    (["cam_a/person_0001.png", "cam_b/person_0001.png"], r"person_\d+",
     {"person_0001": [("cam_a/person_0001.png", 1), ("cam_b/person_0001.png", 2)]}),  # PRID-2011
    (["cam_a/000_45.bmp", "cam_b/000_90.bmp", "cam_b/001_90.bmp"], r"/(\d+)_",
     {"0": [("cam_a/000_45.bmp", 1), ("cam_b/000_90.bmp", 2)], "1": [("cam_b/001_90.bmp", 2)]}),  # VIPeR: 0 is a person
    (["shop/p7/2026-05-01/c3_1.png", "mall/p7/c4_1.png"], r"/p(\d)/",
     {"7": [("2026-05-01/shop_p7_c3_1.png", 3), ("mall_p7_c4_1.png", 4)]}),
    (["train/anna/1_c1.png", "test/anna/1_c2.png"], r"/(.*)/", {"anna": [("test_1_c2.png", 2), ("train_1_c1.png", 1)]}),
])
def test_identity_by_a_regular_expression(tmp_path, prep, names, pattern, found):
    folder = pictures(tmp_path / "mine", *names)
    status, stdout, stderr = prep("--from", folder, "--train_share", "0", "--identity", pattern)
    assert status == 0 and f"{len(names)} images taken, 0 left out" in stdout, stderr
    read = splits(tmp_path / "out")
    assert {name.lstrip("0") or "0": sorted(row[1:] for row in rows) for name, rows in read.items()} == found


def test_a_wrong_regular_expression(tmp_path, prep):
    folder = pictures(tmp_path / "mine", "anna/a.png")
    refused(prep("--from", folder, "--camera", "("), "regular expression")
    refused(prep("--from", folder, "--camera", "nowhere"), "matches no path", "anna/a.png")
    refused(prep("--from", folder, "--identity", "nowhere"), "--identity nowhere: matches no path")
    refused(prep("--synthetic", "--camera", "x"), "--camera needs --from")


RIGHT, EMPTY = "WARNING: no query can be right: no test identity was seen by two cameras", "WARNING: query/ is empty"
ALONE, FEW = "WARNING: gallery/ has one identity", "identities, too few for train.py"


@pytest.mark.parametrize("share, names, lines", [
    (0, ["a/1.png", "a/2.png", "b/1.png"], ["NO CAMERA was read", f"train/ has 0 {FEW}"]),
    (0, ["a/c1_1.png", "a/c1_2.png", "b/c1_1.png"], [RIGHT, "--protocol nocam", f"train/ has 0 {FEW}"]),  # one camera in all
    (0, ["a/c1_1.png", "a/c1_2.png", "b/c2_1.png"], [EMPTY, f"train/ has 0 {FEW}"]),
    (0.5, ["a/1.png", "a/2.png"], ["NO CAMERA was read", ALONE, f"train/ has 0 {FEW}"]),  # one person
    (0.6, ["a/c1_1.png", "a/c2_1.png"], [EMPTY, f"train/ has 1 {FEW}"]),
    (0, ["a/c1_1.png", "a/c2_1.png", "b/c1_1.png"], [f"train/ has 0 {FEW}"]),
    (1, ["a/c1_1.png", "a/c2_1.png", "b/c1_1.png"], [EMPTY]),
])
def test_what_a_tree_cannot_be_used_for_is_said(tmp_path, prep, share, names, lines):
    _, stdout, _ = prep("--from", pictures(tmp_path / "mine", *names), "--train_share", share)
    said = {line for line in (RIGHT, EMPTY, ALONE, FEW, "NO CAMERA was read") if line in stdout}
    assert all(line in stdout for line in lines) and not [line for line in said if not any(line in text for text in lines)]
    if RIGHT in lines:
        assert sorted(split for split, *_ in splits(tmp_path / "out")["a"]) == ["gallery", "query"]


def test_images_are_copied_with_their_modes_and_linked_only_when_asked(tmp_path, prep):
    folder = pictures(tmp_path / "mine", "a/1.png", "a/2.png", "b/1.png")
    (folder / "a/1.png").chmod(0o600)
    (folder / "b").chmod(0o700)
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    assert prep("--from", folder, "--train_share", "1")[0] == 0
    assert (tmp_path / "out/train/a/1.png").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700  # nobody reads the copy who could not read the source
    for path in (tmp_path / "out").rglob("*.png"):
        assert path.stat().st_nlink == 1
        path.write_bytes(b"edited")
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before
    assert prep("--from", folder, "--train_share", "1", "--link", output=tmp_path / "linked")[0] == 0
    assert (tmp_path / "linked/train/a/2.png").samefile(folder / "a/2.png")


def test_a_tree_is_complete_only_while_its_source_is_unchanged(tmp_path, prep):
    folder = pictures(tmp_path / "mine", "a/1.png", "a/2.png")
    assert prep("--from", folder)[0] == 0
    assert "is complete already" in prep("--from", folder)[1]
    for change in (lambda: os.utime(folder / "a/1.png", (1, 1)), lambda: pictures(folder, "b/1.png"),
                   lambda: (folder / "a/2.png").rename(folder / "a/3.png"), (folder / "b/1.png").unlink):
        change()
        refused(prep("--from", folder), "have changed", "remove it and run again")
        shutil.rmtree(tmp_path / "out")
        assert prep("--from", folder)[0] == 0


def run_in(folder, monkeypatch, capsys, *options):
    """Run data_prep.py in `folder`, without --output; return (exit status, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["data_prep.py", *options])
    with pytest.raises(SystemExit) as end:
        run(data_prep.get_args_parser(), data_prep.main)
    return end.value.code, *capsys.readouterr()


def test_the_tree_is_named_after_the_folder_and_never_lies_in_it(tmp_path, monkeypatch, capsys):
    pictures(tmp_path / "my/photos", "a/1.png", "a/2.png")
    assert run_in(tmp_path, monkeypatch, capsys, "--from", "my/photos/")[0] == 0
    assert os.listdir(tmp_path / "data") == ["photos"]
    for options in (["--from", "my/photos", "--output", "my/photos/out"], ["--from", "my", "--output", "my/photos/../out"],
                    ["--from", "data/photos"]):
        refused(run_in(tmp_path, monkeypatch, capsys, *options), "lies in the tree of --from")
    (tmp_path / "my/photos").rename(tmp_path / "my/market-1501-grouped")
    refused(run_in(tmp_path, monkeypatch, capsys, "--from", "my/market-1501-grouped"), "give --output")
    assert os.listdir(tmp_path / "data") == ["photos"] and not (tmp_path / "my/out").exists()


@pytest.mark.parametrize("options", [["--synthetic", "--num_ids", "1"], ["--from", "photos"]])
def test_a_failure_leaves_no_folder(tmp_path, monkeypatch, capsys, options):
    (tmp_path / "photos").mkdir()
    refused(run_in(tmp_path, monkeypatch, capsys, *options))
    assert os.listdir(tmp_path) == ["photos"]


def test_other_drawn_people_are_no_complete_set(tmp_path, prep):
    assert prep("--synthetic", "--num_ids", "4")[0] == 0
    assert "complete already" in prep("--synthetic", "--num_ids", "4")[1]
    for options in (["--num_ids", "5"], ["--num_ids", "4", "--seed", "1"]):
        refused(prep("--synthetic", *options), "holds synthetic people (--num_ids 4 --seed 0), not", "remove it or")


@pytest.mark.parametrize("text, encoding", [
    ("Path;Camera;Time\n./anna/a.png;3;12,5\nanna\\b.png;4;13\n", "utf-8"),
    ("path\tcamera\ttime\r\nanna/a.png\t3\t12.5\r\nanna/./b.png\t4\t13\r\n", "utf-16"),
])
def test_times_as_spreadsheets_write_them(tmp_path, prep, text, encoding):
    folder = pictures(tmp_path / "mine", "anna/a.png", "anna/b.png")
    (tmp_path / "times.csv").write_bytes(text.encode(encoding))
    status, _, stderr = prep("--from", folder, "--train_share", "0", "--times", tmp_path / "times.csv")
    assert status == 0, stderr
    names = [parse_name(path.rpartition("/")[2]) for path in tree(tmp_path / "out")]
    assert sorted((name.camid, name.frame) for name in names) == [(3, 0), (4, 12)]  # half a second at 25 frames a second


def test_names_without_identity_in_an_archive_are_counted(tmp_path, prep):
    names = [*(f"{i:04}_c1s1_000001_00.jpg" for i in range(1, 4)), *(f"IMG_{i}.jpg" for i in range(9))]
    archive = pack(tmp_path / "m.zip", {f"m/bounding_box_test/{name}": name.encode() for name in names} | {"m/readme.txt": b"x"})
    status, stdout, _ = prep("--archive", archive, "--any_counts")
    assert status == 0 and "13 files, 3 images taken, 10 left out" in stdout
    assert "9 file whose name has no identity, unlike 0002_c1s1_000451_03.jpg: m/bounding_box_test/IMG_0.jpg, " in stdout
    assert "1 in other folders: m/readme.txt" in stdout
    refused(prep("--archive", archive, "--any_counts", "--strict", output=tmp_path / "2"), "--strict", "IMG_0.jpg")


def test_copies_under_several_identities_and_names_are_pointed_out(tmp_path, prep):
    names = {"ann": ["1.png", "2.png"], "ben": ["1.png", "2.png"], "eve": ["1.png"]}  # of one size
    folder = make_tree(tmp_path / "photos", names)
    status, out, _ = prep("--from", folder)
    assert status == 0 and "more than once" not in out
    for name, copy in ("ann/1.png", "ann/a\n.png"), ("ben/2.png", "eve/a\x1b.png"), ("eve/1.png", "ben/4.png"):
        shutil.copy(folder / name, folder / copy)
    status, out, _ = prep("--from", folder, output=tmp_path / "again")
    (line,) = [line for line in out.splitlines() if "more than once" in line]
    assert line.startswith("  3 photographs are there more than once, 2 of them under several identities: ")
    assert line.endswith("; ...") and "eve/a\\x1b.png" in line and "ben/4.png" in line and "ann/" not in line


def test_of_two_images_none_is_held_out(tmp_path, prep):
    prep("--from", pictures(tmp_path / "mine", "a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png"), "--train_share", "1")
    counts = [len(list((tmp_path / "out" / folder).rglob("*.png"))) for folder in ("train/a", "train/b", "val/a", "val/b")]
    assert counts == [2, 2, 0, 1]


def test_synthetic_command_line(tmp_path):
    done = Script(tmp_path, "data_prep.py", "--synthetic", "--num_ids", 4).works()
    assert set(os.listdir(tmp_path)) == {"data"} and os.listdir(tmp_path / "data") == ["synthetic"]
    assert [line.split()[0] for line in done.out.splitlines()][-5:-1] == ["split", "train", "val", "query"]
