"""The gallery index: its file, what is damaged or of another model or folder, bringing it up to date, rows that are added."""

import argparse
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from index_lab import make_index, random_rows

from reid import ReidError, files
from reid.data.datasets import make_records, read_folder
from reid.data.names import UNKNOWN, UNKNOWN_PID, folder_pid, identity_name
from reid.retrieval.extract import Extractor
from reid.retrieval.index import COLUMNS, FORMAT, VERSION, GalleryIndex
from reid.retrieval.ranked import Query
from reid.retrieval.stored import check_current, differences, save_command


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_round_trip(tmp_path, dtype):
    index = make_index(dtype=dtype)
    index.queries, index.threshold, index.false_accept_rate = make_index(20, dtype=dtype), 0.5, 1e-3
    index.save(tmp_path / "a.pt")
    again = GalleryIndex.load(tmp_path / "a.pt", "f" * 16)
    assert torch.equal(again.embeddings, index.embeddings) and list(again.paths) == list(index.paths)
    assert again.paths[3] == "0003/0003_c1s1_000003_00.jpg" and len(again.queries) == 20 and again.threshold == 0.5
    assert torch.equal(again.records().pids, index.pids)


def test_half_precision_moves_scores_little():
    index, half = make_index(), make_index(dtype=torch.float16)
    queries = random_rows(20, seed=4)
    assert (index.nearest(queries, 5)[0] - half.nearest(queries, 5)[0]).abs().max() < 1e-3


@pytest.mark.parametrize("change, message", [
    (lambda p: p.update(fingerprint="other"), "other weights"), (lambda p: p.update(preprocessing="other"), "other weights"),
    (lambda p: p["embeddings"].fill_(float("nan")), "NaN"), (lambda p: p.update(pids=p["pids"][:-1]), "pids is not"),
    (lambda p: p.update(pids=p["pids"].float()), "pids is not"), (lambda p: p.pop("camids"), "camids is not"),
    (lambda p: p.update(embeddings=p["embeddings"].int()), "embeddings are"), (lambda p: p.pop("embeddings"), "no embeddings"),
    (lambda p: p["path_offsets"].__setitem__(-1, 10**9), "paths do not add up"), (lambda p: p.update(data_root=3), "data_root"),
    (lambda p: p.update(names={1: 2}), "names are wrong"), (lambda p: p.update(names=None), "its names is missing"),
    (lambda p: p.update(bad=[["a.jpg", 1]]), "list of unreadable images"), (lambda p: p.update(split="/"), "split is wrong"),
])
def test_an_index_that_contradicts_itself(tmp_path, change, message):
    part = make_index()._part()
    change(part)
    files.save(tmp_path / "a.pt", part, FORMAT, VERSION)
    with pytest.raises(ReidError, match=message) as caught:
        GalleryIndex.load(tmp_path / "a.pt", "f" * 16)
    assert "eval.py --save_index" in str(caught.value)


def test_an_index_of_an_older_version(tmp_path):
    files.save(tmp_path / "a.pt", make_index()._part(), FORMAT, VERSION - 1)
    with pytest.raises(ReidError, match=f"version {VERSION - 1}, this code reads version {VERSION}; make it again"):
        GalleryIndex.load(tmp_path / "a.pt")


class Flat:
    """Stands in for an Extractor: the mean colour of an image decides."""

    fingerprint, mirror, dim = "f" * 16, True, 64

    embed_records = Extractor.embed_records

    def __init__(self):
        self.embedded = []

    def stream(self, files, strict=False, progress=False, bad=None):
        self.embedded += [file.name for file in files]
        for i, file in enumerate(files):
            if not file.read_bytes():
                bad.append((file, "is empty"))
                continue
            value = float(file.read_bytes()[0])
            yield torch.tensor([i]), F.normalize(torch.cos(value * torch.arange(1.0, 65))[None])


def photos(folder, count=4):
    """Records of `count` files below `folder`, whose first byte is what `Flat` embeds."""
    (folder / "1").mkdir(parents=True)
    for i in range(count):
        (folder / "1" / f"{i}.jpg").write_bytes(bytes([i]))
    return make_records(folder, [f"1/{i}.jpg" for i in range(count)], grouped=True)


def options(**given):
    """The options of inference.py that an advice depends on."""
    return argparse.Namespace(**{"exp_name": "run", "network": None, "network_input": None, "data_root": None, "gallery": None,
                                 "gallery_uri": "index/run.pt", "mirror": None} | given)


def test_differences_compare_content(tmp_path):
    index = GalleryIndex.build(Flat(), photos(tmp_path), progress=False)
    assert not any(differences(index).values())
    (tmp_path / "1" / "0.jpg").unlink()
    (tmp_path / "1" / "1.jpg").write_bytes(bytes([1]))  # another time, the same content
    os.utime(tmp_path / "1" / "1.jpg", (0, 0))
    (tmp_path / "1" / "2.jpg").write_bytes(bytes([9, 9]))
    (tmp_path / "1" / "3.jpg").write_bytes(bytes([8]))
    os.utime(tmp_path / "1" / "3.jpg", (0, 0))
    (tmp_path / "1" / "4.jpg").write_bytes(bytes([4]))
    assert differences(index) == {"changed": ["1/2.jpg", "1/3.jpg"], "new": ["1/4.jpg"], "missing": ["1/0.jpg"]}
    args = options(gallery=str(tmp_path))
    with pytest.raises(ReidError, match=r"x\.pt: its images are not those of .* any more \(2 changed, 1 new, 1 missing, such as "
                       rf"1/2.jpg\); bring it up to date: python inference.py --save_index --exp_name run --gallery {tmp_path}"):
        check_current(index, "x.pt", tmp_path, args)
    with pytest.raises(ReidError, match=rf"made of {tmp_path}, not of elsewhere; give --gallery {tmp_path}, or .*-2"):
        check_current(index, "x.pt", "elsewhere", args)
    with pytest.raises(ReidError, match=r"x\.pt: made with mirrored images; give --mirror, or make it again: .* --no-mirror$"):
        check_current(index, "x.pt", tmp_path, options(gallery=str(tmp_path), mirror=False))
    shutil.rmtree(tmp_path / "1")
    assert len(differences(index)["missing"]) == 4
    tmp_path.rmdir()  # an index works without its images
    check_current(index, "x.pt", tmp_path, args)


def test_an_index_is_brought_up_to_date(tmp_path):
    """Only new and changed images are embedded, and the result is the index made anew, also of what cannot be read."""
    folder, path = tmp_path / "photos", tmp_path / "a.pt"
    photos(folder, 5)
    (folder / "1" / "5.jpg").write_bytes(b"")  # Flat cannot read it
    index = GalleryIndex.build(Flat(), read_folder(folder), progress=False)
    index.threshold = 0.5
    index.save(path)
    assert len(index) == 5 and not any(differences(GalleryIndex.load(path)).values())
    (folder / "1" / "0.jpg").unlink()
    (folder / "1" / "1.jpg").write_bytes(bytes([77]))
    os.utime(folder / "1" / "2.jpg", (1, 1))
    (folder / "0").mkdir()
    (folder / "0" / "a_c3.jpg").write_bytes(bytes([5]))
    (folder / "1" / "6.jpg").write_bytes(b"")
    old, flat = GalleryIndex.reusable(path, Flat(), folder), Flat()
    index = GalleryIndex.build(flat, read_folder(folder), progress=False, old=old)
    anew = GalleryIndex.build(Flat(), read_folder(folder), progress=False)
    assert flat.embedded == ["a_c3.jpg", "1.jpg", "5.jpg", "6.jpg"]
    assert index.update(old) == "3 images kept, 2 embedded, 1 dropped"
    assert list(index.paths) == list(anew.paths) == ["0/a_c3.jpg", "1/1.jpg", "1/2.jpg", "1/3.jpg", "1/4.jpg"]
    for name in ("embeddings", *COLUMNS):
        assert torch.equal(getattr(index, name), getattr(anew, name)), name
    assert [Path(file).name for file, *_ in index.bad] == ["5.jpg", "6.jpg"] and index.bad == anew.bad
    assert all(torch.equal(one, other) for one, other in zip(index.statistics, anew.statistics)) and index.threshold is None
    index.save(path)  # over the file that its rows were read from
    again = GalleryIndex.load(path)
    assert torch.equal(again.embeddings, anew.embeddings) and not any(differences(again).values())
    (folder / "1" / "6.jpg").write_bytes(bytes([6]))  # mended
    assert differences(again) == {"changed": [], "new": ["1/6.jpg"], "missing": []}


def test_an_index_that_was_changed_by_hand_is_no_listing_of_a_folder(tmp_path):
    """New and missing files do not count, files with other content do, and no listing takes its place."""
    index = GalleryIndex.build(Flat(), photos(tmp_path / "photos"), progress=False)
    index.add(index.embeddings[:1].float(), names=["anna"])
    index.save(tmp_path / "a.pt")
    (tmp_path / "photos" / "1" / "0.jpg").unlink()
    (tmp_path / "photos" / "1" / "4.jpg").write_bytes(bytes([4]))
    again = GalleryIndex.load(tmp_path / "a.pt")
    check_current(again, "a.pt", tmp_path / "photos", options())
    with pytest.raises(ReidError, match="changed by hand, whose people would be lost; search it with --load_index"):
        GalleryIndex.build(Flat(), read_folder(tmp_path / "photos"), progress=False).save(tmp_path / "a.pt")
    again.save(tmp_path / "a.pt")
    (tmp_path / "photos" / "1" / "2.jpg").write_bytes(bytes([9]))
    with pytest.raises(ReidError, match=r"\(1 changed, such as 1/2.jpg\); add them again"):
        check_current(again, "a.pt", tmp_path / "photos", options())


@pytest.mark.parametrize("setting, root", [({"fingerprint": "0" * 16}, "photos"), ({"mirror": False}, "photos"), ({}, "others")])
def test_an_index_of_other_settings_is_made_anew(tmp_path, capsys, setting, root):
    GalleryIndex.build(Flat(), photos(tmp_path / "photos"), progress=False).save(tmp_path / "a.pt")
    other = Flat()
    vars(other).update(setting)
    assert GalleryIndex.reusable(tmp_path / "a.pt", other, tmp_path / "photos" / ".." / root) is None
    assert capsys.readouterr().out == f"{tmp_path}/a.pt: of another network, of other settings or damaged, so it is made anew\n"
    assert GalleryIndex.reusable(tmp_path / "none.pt", other, tmp_path) is None and capsys.readouterr().out == ""


@pytest.mark.parametrize("given, queries, expected", [
    ({}, False, "inference.py --save_index --exp_name run --data_root d"),
    ({}, True, "eval.py --save_index --exp_name run --data_root d --far 0.01"),
    ({"data_root": "my data"}, False, "inference.py --save_index --exp_name run --data_root 'my data'"),
    ({"gallery": "g", "gallery_uri": "index/run--g.pt", "mirror": False}, False,
     "inference.py --save_index --exp_name run --gallery g --no-mirror"),
    ({"network": "n.onnx", "network_input": "imagenet", "exp_name": "n", "gallery_uri": "a b.pt"}, False,
     "inference.py --save_index --network n.onnx --network_input imagenet --data_root d --gallery_uri 'a b.pt'"),
])
def test_the_command_that_makes_an_index(given, queries, expected):
    index = make_index(4, root="d")
    assert " --gallery d " in f"{save_command(options(**given | {'gallery': None}), index)} "  # of a folder without splits
    index.split = "gallery"
    if queries:
        index.queries, index.false_accept_rate = make_index(2, root="d"), 0.01
    assert save_command(options(**given), index) == f"python {expected}"
    args = argparse.Namespace(exp_name="run", data_root="d", network=None, gallery_uri="index/run.pt", mirror=None,
                              network_input=None)  # of eval.py
    assert save_command(args, index).startswith("python eval.py --save_index --exp_name run --data_root d")
    assert save_command(args) == "python eval.py --save_index --exp_name run --data_root d"
    index.split = None
    assert save_command(args, index) == "python eval.py --save_index --exp_name run --data_root d --gallery_uri index/run-2.pt"
    assert save_command(options(), index) == "python inference.py --add DIR --exp_name run"


def test_images_that_are_replaced_while_they_are_embedded_count_as_changed(tmp_path):
    class Slow(Flat):
        def stream(self, files, *args):
            yield from super().stream(files, *args)
            for file in files[:2]:
                file.write_bytes(b"other")

    records = photos(tmp_path / "photos", 3)
    (tmp_path / "photos/1/1.jpg").write_bytes(b"")  # cannot be read, and is mended meanwhile
    index = GalleryIndex.build(Slow(), records, progress=False)
    index.split = ""
    assert differences(index) == {"changed": ["1/0.jpg"], "new": ["1/1.jpg"], "missing": []}


@pytest.mark.parametrize("count", [1, 2])
def test_an_index_of_one_image_is_saved(tmp_path, count):
    index = GalleryIndex.build(Flat(), photos(tmp_path / "photos", count), progress=False)
    index.queries = GalleryIndex.build(Flat(), photos(tmp_path / "queries", 1), progress=False)
    index.save(tmp_path / "a.pt")
    again = GalleryIndex.load(tmp_path / "a.pt")
    assert len(again) == count and len(again.queries) == 1 and again.contents.tolist() == index.contents.tolist()


def test_an_index_replaces_only_an_index_of_the_same_folder(tmp_path):
    path, index = tmp_path / "a.pt", GalleryIndex.build(Flat(), photos(tmp_path / "photos"), progress=False)
    index.save(path)
    index.save(path)
    files.save(path, index._part(), FORMAT, VERSION - 1)  # an older version
    index.save(path)
    content = path.read_bytes()
    others = GalleryIndex.build(Flat(), photos(tmp_path / "others"), progress=False)
    with pytest.raises(ReidError, match="--gallery_uri"):
        others.save(path)
    assert path.read_bytes() == content
    others.save(path, overwrite=True)
    assert GalleryIndex.load(path).data_root == others.data_root
    for name, make in {"best.pth": lambda p: files.save(p, {}, "reid-checkpoint", 1), "q.jpg": lambda p: p.write_bytes(b"image"),
                       "other.pt": lambda p: torch.save({"a": 1}, p)}.items():
        make(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        with pytest.raises(ReidError, match="is a checkpoint; choose another" if name == "best.pth" else "with --overwrite"):
            index.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    with pytest.raises(ReidError, match="is a checkpoint"):
        index.save(tmp_path / "best.pth", overwrite=True)
    for name in ("a.pt", "q.jpg", "other.pt"):
        index.save(tmp_path / name, overwrite=True)
        assert GalleryIndex.load(tmp_path / name).data_root == index.data_root


def test_empty_and_add(tmp_path):
    gallery, rows = GalleryIndex.empty(Flat(), threshold=0.9), F.normalize(torch.eye(4, 64))
    assert gallery.search(rows[:1])[0].names == []
    assert gallery.add(rows[:2], names=["anna", "7"], camids=[3, 4], paths=[tmp_path / "a.jpg", "b.jpg"]) == 2
    with pytest.warns(UserWarning, match="1 of 2 embeddings are not finite"):
        assert gallery.add(torch.stack([rows[2], torch.full((64,), torch.nan)]), pids=[9, 9]) == 1
    assert gallery.add(rows[3:], names=["anna"]) == 1 and len(gallery) == 4
    gallery.save(tmp_path / "door.pt")
    for index in (gallery, GalleryIndex.load(tmp_path / "door.pt", Flat())):
        assert [index.hit(row) for row in range(4)] == [
            (str(tmp_path / "a.jpg"), "anna", folder_pid("anna"), 3), ("b.jpg", "7", 7, 4), ("", "9", 9, UNKNOWN),
            ("", "anna", folder_pid("anna"), UNKNOWN)]
        ranked = index.search(rows[:1], topk=2)[0]
        assert ranked.names[0] == "anna" and ranked.matches.tolist() == [True, False]
    for mistake in ({"names": ["anna"]}, {"pids": [1, 2, 3]}, {"camids": []}, {"paths": ["a"]}):
        with pytest.raises(ReidError, match="2 embeddings but"):
            gallery.add(rows[:2], **mistake)
    with pytest.raises(ReidError, match="64 dimensions"):
        gallery.add(torch.ones(1, 3))
    with pytest.raises(ReidError, match="other weights"):
        GalleryIndex.load(tmp_path / "door.pt", "0" * 16)


def test_search_returns_ranked_lists():
    index = make_index()
    queries = random_rows(3, seed=2)
    queries[1] = float("nan")  # an empty box
    index.threshold = 0.5
    scores, rows = index.nearest(queries, 4)
    assert (rows[1] == -1).all() and (scores[1] == -torch.inf).all()
    first, empty, last = index.search(queries, 4, queries=[Query(f"{i}.jpg", i) for i in range(3)])
    assert torch.equal(first.rows, rows[0]) and torch.equal(first.scores, scores[0]) and torch.equal(last.rows, rows[2])
    assert len(empty) == 0 and list(empty) == empty.names == [] and empty.query.pid == 1
    row = int(rows[0, 0])
    pid, camid = int(index.pids[row]), int(index.camids[row])
    score = float(scores[0, 0])
    assert first[0] == (1, row, f"nowhere/{index.paths[row]}", str(pid), pid, camid, score, score > 0.5)


def test_identity_names():
    assert [identity_name(pid, "a/anna/1.jpg") for pid in (7, folder_pid("anna"), UNKNOWN_PID)] == ["7", "anna", ""]
