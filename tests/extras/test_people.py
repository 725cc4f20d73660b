"""The folder of people: what was moved by hand stays, numbers and names stay, foreign files stay, a killed run goes on."""

import json
import os
import shutil
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reid import ReidError
from reid.data.datasets import make_records
from reid.extras import people as module
from reid.extras.people import check_folder, write_people
from reid.retrieval.enrol import enrol
from reid.retrieval.index import GalleryIndex

CENTRES = F.normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(3)))


def make_index(root, names):
    """Crops such as a1.png: the letter is the person, an upper case one is half way between two people."""
    generator = torch.Generator().manual_seed(0)
    noise = dict(zip(sorted(names), 0.05 * torch.randn(len(names), 32, generator=generator)))
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16), (9 * number, 50, 90)).save(root / name)
    embeddings = [CENTRES[ord(name.rpartition("/")[2][0]) - ord("a")] + noise[name] for name in names]
    return GalleryIndex(F.normalize(torch.stack(embeddings)), make_records(root, list(names), False), "f" * 16, True)


NAMES = ["a1.png", "a2.png", "a3.png", "b1.png", "b2.png", "c1.png", "in/c2.png", "d1.png"]


def tree(folder):
    """{top folder: names of its links}, each of which leads to the crop of its name."""
    found = {}
    for parent, _, files in os.walk(folder):
        for name in files:
            if os.path.islink(link := os.path.join(parent, name)):
                assert os.path.exists(link) and os.path.basename(os.path.realpath(link)) == name
                found.setdefault(os.path.relpath(parent, folder).split(os.sep)[0], set()).add(name)
    return found


@pytest.fixture
def crops(tmp_path):
    return make_index(tmp_path / "crops", NAMES)


@pytest.fixture
def out(tmp_path, crops):
    write_people(tmp_path / "people", crops, 0.5)
    return tmp_path / "people"


FIRST = {"0001": {"a1.png", "a2.png", "a3.png"}, "0002": {"b1.png", "b2.png"}, "0003": {"c1.png", "c2.png"},
         "singles": {"d1.png"}}


def test_a_folder_for_each_person_with_page_and_sheets(out, crops):
    assert tree(out) == FIRST
    assert not os.path.isabs(os.readlink(out / "0001/a1.png"))
    page = (out / "people.html").read_text()
    assert page.count("data:image/jpeg") == 7 and 'href="0002/"' in page and "http" not in page.replace("http-equiv", "")
    assert sorted(path.name for path in (out / "sheets").iterdir()) == ["0001.jpg", "0002.jpg", "0003.jpg"]
    record = json.loads((out / "people.json").read_text())
    assert record["complete"] and [person["number"] for person in record["people"]] == [1, 2, 3]
    assert record["people"][2]["crops"] == {"c1.png": ["0003/c1.png"], "in/c2.png": ["0003/c2.png"]}
    before = {path: path.lstat().st_mtime_ns for path in out.rglob("*") if path.is_symlink() or path.suffix == ".jpg"}
    assert "0 people new or changed, 0 contact sheets" in write_people(out, crops, 0.5)
    assert before == {path: path.lstat().st_mtime_ns for path in before}


def test_numbers_and_names_stay_when_crops_are_added(tmp_path, out):
    os.rename(out / "0002", out / "ben")
    names = ["a0.png", *(f"e{i}.png" for i in range(6)), "d2.png", *NAMES[1:]]  # a1 is gone
    os.remove(tmp_path / "crops/a1.png")
    write_people(out, make_index(tmp_path / "crops", names), 0.5)
    assert tree(out) == {"0001": {"a0.png", "a2.png", "a3.png"}, "ben": {"b1.png", "b2.png"}, "0003": {"c1.png", "c2.png"},
                         "0004": {f"e{i}.png" for i in range(6)}, "0005": {"d1.png", "d2.png"}}
    people = json.loads((out / "people.json").read_text())["people"]
    assert [(person["number"], person["name"], person["hand"]) for person in people] == [
        (1, "", False), (2, "ben", True), (3, "", False), (4, "", False), (5, "", False)]


def test_what_was_merged_and_split_by_hand_stays(out, crops):
    os.rename(out / "0002/b1.png", out / "0001/b1.png")  # one by one
    os.rename(out / "0002/b2.png", out / "0001/b2.png")
    (out / "0004_anna").mkdir()
    (out / "0005_anna").mkdir()  # two people of one name
    os.rename(out / "0003/c1.png", out / "0004_anna/c1.png")
    os.rename(out / "0003/c2.png", out / "0005_anna/c2.png")
    expected = {"0001": FIRST["0001"] | FIRST["0002"], "0004_anna": {"c1.png"}, "0005_anna": {"c2.png"}, "singles": {"d1.png"}}
    for _ in range(3):
        write_people(out, crops, 0.5)
        assert tree(out) == expected
    people = json.loads((out / "people.json").read_text())["people"]
    assert [person["name"] for person in people] == ["", "anna", "anna"]


def test_a_folder_moved_into_another_is_merged_and_its_links_repaired(out, crops):
    shutil.move(out / "0002", out / "0001/0002")
    assert not os.path.exists(out / "0001/0002/b1.png")
    for _ in range(2):
        write_people(out, crops, 0.5)
        assert tree(out) == {"0001": FIRST["0001"] | FIRST["0002"], "0003": FIRST["0003"], "singles": {"d1.png"}}


@pytest.mark.parametrize("take_out", ["delete", "to singles"])
def test_a_crop_that_was_taken_out_of_a_folder_stays_out(out, crops, take_out):
    if take_out == "delete":
        os.remove(out / "0001/a2.png")
    else:
        os.rename(out / "0001/a2.png", out / "singles/a2.png")
    for _ in range(2):
        write_people(out, crops, 0.5)
        assert tree(out) == FIRST | {"0001": {"a1.png", "a3.png"}, "singles": {"d1.png", "a2.png"}}


def test_a_folder_that_was_deleted_is_made_again(out, crops):
    shutil.rmtree(out / "0001")
    write_people(out, crops, 0.5)
    assert tree(out) == FIRST


def test_foreign_files_stay(out, tmp_path, crops):
    (out / "0002/note.txt").write_text("mine")
    (out / "0004").write_text("mine")
    os.symlink("nowhere", out / "0001/other.png")
    os.symlink(tmp_path, out / "elsewhere")
    names = [name for name in NAMES if name[0] != "b"] + ["e1.png", "e2.png"]
    write_people(out, make_index(tmp_path / "crops", names), 0.5)
    assert (out / "0002/note.txt").read_text() == (out / "0004").read_text() == "mine"
    assert os.readlink(out / "0001/other.png") == "nowhere" and os.readlink(out / "elsewhere") == str(tmp_path)
    assert not (out / "0002/b1.png").is_symlink() and {path.name for path in (out / "0005").iterdir()} == {"e1.png", "e2.png"}


@pytest.mark.parametrize("place", ["0001/b1.png", "0001/a1.png", "my/b1.png", "singles/a1.png", "0003/c1.png", "singles/d1.png"])
@pytest.mark.parametrize("names", [NAMES, NAMES[:5]])
def test_a_link_of_the_users_own_stays_whatever_its_name(out, tmp_path, place, names):
    (tmp_path / "photo.png").touch()
    (out / place).parent.mkdir(exist_ok=True)
    (out / place).unlink(missing_ok=True)
    os.symlink(tmp_path / "photo.png", out / place)
    index = make_index(tmp_path / "crops", names)
    for _ in range(2):
        write_people(out, index, 0.5)
        assert os.readlink(out / place) == str(tmp_path / "photo.png")
    found = {os.path.basename(os.path.realpath(path)) for path in out.rglob("*") if path.is_symlink()}
    assert found == {os.path.basename(name) for name in names} | {"photo.png"}  # no crop is lost


@pytest.mark.parametrize("name", [b"\xff\n", b"<b>'&\"?#%41", b"javascript:alert(1)"])
def test_folders_of_odd_names_are_linked_and_escaped(out, crops, name):
    os.rename(out / "0001", out / os.fsdecode(name))
    for _ in range(2):
        write_people(out, crops, 0.5)
    page = (out / "people.html").read_text()
    assert f'<a href="{quote(name)}/">' in page and "<b>'" not in page and "\n</a>" not in page
    assert (out / os.fsdecode(name) / "a1.png").is_symlink() and not (out / "0001").exists()


def test_a_gallery_that_was_copied_elsewhere_keeps_its_people(out, tmp_path):
    os.rename(out / "0002", out / "ben")
    shutil.copytree(tmp_path / "crops", tmp_path / "copy")
    write_people(out, make_index(tmp_path / "copy", NAMES), 0.5)
    assert tree(out) == {"ben" if top == "0002" else top: names for top, names in FIRST.items()}
    assert all(str(tmp_path / "copy") in os.path.realpath(path) for path in out.rglob("*") if path.is_symlink())


@pytest.mark.parametrize("step", (0, 1, 3, 5, 7, 8))
def test_a_run_that_is_killed_at_any_time_goes_on(tmp_path, out, monkeypatch, step):
    """Crops were added and moved by hand; any operation on links may be the last one."""
    os.rename(out / "0002", out / "ben")
    os.rename(out / "ben/b1.png", out / "0003/b1.png")
    index = make_index(tmp_path / "crops", [*NAMES, "d2.png", "a4.png", "e1.png", "e2.png"])
    left = [step]

    def counted(function):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return function(*args, **options)
        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "symlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            write_people(out, index, 0.5)
    assert not json.loads((out / "people.json").read_text())["complete"]
    write_people(out, index, 0.5)
    assert tree(out) == {"0001": FIRST["0001"] | {"a4.png"}, "ben": {"b2.png"}, "0003": {"b1.png", "c1.png", "c2.png"},
                         "0004": {"d1.png", "d2.png"}, "0005": {"e1.png", "e2.png"}}
    people = json.loads((out / "people.json").read_text())["people"]
    assert [(person["folder"], person["hand"]) for person in people] == [
        ("0001", False), ("ben", True), ("0003", True), ("0004", False), ("0005", False)]


def test_folders_that_are_not_for_people_are_refused(tmp_path, out):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    (tmp_path / "forged").mkdir()
    (tmp_path / "forged/people.json").write_text("{}")
    for folder in ("full", "forged", "full/thesis.txt", "crops", "crops/people", "."):
        with pytest.raises(ReidError, match="--group"):
            check_folder(tmp_path / folder, tmp_path / "crops")
    check_folder(out, tmp_path / "crops")


@pytest.mark.parametrize("damage, message", [
    (lambda text: text[:200], "is damaged"),
    (lambda text: '{"format": "reid-people", "people": 5}', "is damaged"),
    (lambda text: '{"format": "reid-people", "people": ' + 100000 * "[", "is damaged"),
    (lambda text: text.replace('"next": 4', '"next": "4"'), "is damaged"),
    (lambda text: text.replace('"alone": []', '"alone": [{}]'), "is damaged"),
    (lambda text: text.replace('"folder": "0001"', '"folder": "../empty"'), "names '../empty/-'"),
    (lambda text: text.replace('"0003/c1.png"', '"../keep-link"'), "names '../keep-link'"),
    (lambda text: text.replace('"0003/c1.png"', '"/keep-link"'), "names '/keep-link'"),
])
def test_a_damaged_record_is_refused(tmp_path, out, crops, damage, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "keep-link").symlink_to("crops/a1.png")
    before, text = tree(out), (out / "people.json").read_text()
    assert damage(text) != text
    (out / "people.json").write_text(damage(text))
    for function, arguments in ((check_folder, (out, "")), (write_people, (out, crops, 0.5))):
        with pytest.raises(ReidError, match=f"people.json: {message}.*choose another folder"):
            function(*arguments)
    assert tree(out) == before and (tmp_path / "empty").is_dir() and (tmp_path / "keep-link").is_symlink()


@pytest.mark.parametrize("place", ["0001", "sheets", "sheets/0002.jpg", "people.html", "people.json"])
def test_nothing_is_written_through_a_link_in_the_folder(tmp_path, out, place):
    os.rename(out / place, tmp_path / "own")
    (out / place).symlink_to(tmp_path / "own")
    index = make_index(tmp_path / "crops", [*NAMES[1:], "a5.png", "b3.png"])
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ReidError, match=f"{place}: is a link"):
        write_people(out, index, 0.5)
    assert before == {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    os.remove(out / place)
    if place != "people.json":
        write_people(out, index, 0.5)
        assert {path: path.lstat().st_mtime_ns for path in (tmp_path / "own").rglob("*")}.items() <= before.items()


def test_a_folder_that_is_a_link_and_other_pictures_in_it(tmp_path, out):
    """Of the pictures in sheets/ only those of people in the record go."""
    (tmp_path / "link").symlink_to(out)
    for name in ("sheets/0099.jpg", "sheets/2024.jpg"):
        shutil.copy(out / "sheets/0003.jpg", out / name)
    write_people(tmp_path / "link", make_index(tmp_path / "crops", NAMES[:5]), 0.5)
    assert {path.name for path in (out / "sheets").iterdir()} == {"0001.jpg", "0002.jpg", "0099.jpg", "2024.jpg"}


def test_an_index_without_a_folder_is_grouped(tmp_path, crops, monkeypatch):
    """Such as --add makes: data_root is "", and paths are absolute."""
    index = GalleryIndex.empty(SimpleNamespace(dim=32, fingerprint="f" * 16, mirror=True), 0.5)
    enrol(index, crops)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert "7 crops of 3 people" in write_people("people", index)
        assert tree(tmp_path / "people") == FIRST


def test_sheets_are_bounded_and_follow_the_people(out, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DRAWN", 1)
    monkeypatch.setattr(module, "LISTED", 2)
    write_people(out, make_index(tmp_path / "crops", NAMES), 0.5)
    assert [path.name for path in (out / "sheets").iterdir()] == ["0001.jpg"]
    assert "The 2 people with the most crops" in (out / "people.html").read_text()
