"""data_prep.py --from and --synthetic: a folder per identity, a CSV file of times, drawn people."""

import os
import random
import subprocess
import sys

import pytest
from prep_lab import clean, make_tree, members, pack, refused, tree

from reid.data import prepare


def test_from_a_tree_without_cameras(tmp_path, prep):
    people = {f"Person {i} ä": [f"IMG {j}.png" for j in range(i % 4 + 1)] for i in range(40)}
    folder = make_tree(tmp_path / "mine", people | {"-1": ["x.jpg", "y.jpg"], "0": ["z.jpg"]})
    (folder / "notes.txt").write_text("no image")
    (folder / "Person 1 ä" / "gone.jpg").symlink_to("nowhere")
    status, stdout, _ = prep("--from", folder, "--train_share", "0.5")
    assert status == 0 and "rule: " in stdout
    split = {name: set(os.listdir(tmp_path / "out" / name)) for name in prepare.SPLITS}
    assert len(split["train"]) == 20 and not split["train"] & (split["query"] | split["gallery"])
    assert {"-1", "0"} <= split["gallery"] and not {"-1", "0"} & (split["query"] | split["train"])
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
        images = [(split, pid, prepare.parse_name(name)) for split, pid, name, _ in prepare.from_tree(folder, 0.25)]
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
    found = {data: prepare.parse_name(path.rpartition("/")[2]) for path, data in tree(tmp_path / "out").items()}
    assert {data: (name.camid, name.seq, name.frame) for data, name in found.items()} == {
        b"anna/a.jpg": (3, 1, 125), b"anna/b.png": (4, 1, 1630), b"anna/c.jpg": (3, 1, 0), b"7/a.jpg": (0, 1, 25),
        b"-1/junk.jpg": (3, 1, 225)}
    assert found[b"7/a.jpg"].pid == 7 and found[b"-1/junk.jpg"].pid == -1
    queries = [path for path in tree(tmp_path / "out") if path.startswith("query/")]
    assert len(queries) == 1 and "_c3s1_" in queries[0]  # the camera with two images, by the CSV file


@pytest.mark.parametrize("text, message", [
    ("path,camera\na/x.jpg,1\n", "line 2"),
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
    refused(prep("--from", make_tree(tmp_path / "twice", {"a/cam1": ["x.jpg"], "b/cam1": ["y.jpg"]})), "a/cam1", "b/cam1")
    refused(prep("--from", make_tree(tmp_path / "same", {"7": ["x.jpg"], "007": ["y.jpg"]})), "same identity")
    refused(prep("--from", pack(tmp_path / "market", members())), "--archive")
    refused(prep("--from", tmp_path, "--train_share", "2"), "--train_share")
    refused(prep("--synthetic", "--times", tmp_path / "times.csv"), "--times")
    clean(tmp_path)


def test_synthetic_command_line(tmp_path, root):
    command = [sys.executable, root / "data_prep.py", "--synthetic", "--num_ids", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(tmp_path)) == {"data"} and os.listdir(tmp_path / "data") == ["synthetic"]
    assert done.stdout.splitlines()[-4].split()[0] == "train"
