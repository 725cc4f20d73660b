"""A gallery that changes: enrol, rename, erase, expire and list, in the index file and in Milvus alike; concurrent writers."""

import os
import threading
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import inference
from reid import ReidError
from reid.cli import left_out_status
from reid.data.datasets import read_folder
from reid.data.names import folder_pid
from reid.data.paths import content_number
from reid.retrieval import enrol, stored
from reid.retrieval.arguments import check_search
from reid.retrieval.index import GalleryIndex
from reid.retrieval.stored import differences

DIM, PRINT, RUN = 16, "f" * 16, "calm-fox-1"
CENTRES = F.normalize(torch.randn(9, DIM, generator=torch.Generator().manual_seed(1)))


class Network:
    fingerprint, mirror, dim, device = PRINT, True, DIM, "cpu"

    def embed_records(self, files, *_):
        return torch.zeros(len(files), DIM), torch.arange(len(files)), []


def embedded(folder):
    """The index of a folder whose images p0_... show person 0."""
    records = read_folder(folder)
    noise = 0.05 * torch.randn(len(records), DIM, generator=torch.Generator().manual_seed(len(str(folder))))
    people = [int(path.rpartition("/")[2][1]) for path in records.paths]
    return GalleryIndex(F.normalize(CENTRES[people] + noise).half(), records, PRINT, True)


def crops(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8), (9 * len(name), 3, 7)).save(folder / name)
    return folder


def kept(tmp_path, kind, index):
    """(uri, function that opens it) of an index file or a Milvus file with the rows of `index`."""
    if kind == "file":
        uri = tmp_path / "index/door.pt"
        index.save(uri)
        return uri, lambda: GalleryIndex.load(uri, PRINT)
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: pip install -e '.[milvus]'")
    from reid.extras import milvus

    uri = str(tmp_path / "door.db")
    gallery = milvus.create_gallery(uri, RUN, PRINT, True, DIM, index.data_root)
    gallery.write(index.embeddings, index.records())
    gallery.collection.set(threshold=index.threshold)
    return uri, lambda: milvus.open_gallery(uri, RUN, PRINT)


def state(gallery):
    """{path's last two parts: name of the person} of every image of a gallery."""
    return {"/".join(path.split("/")[-2:]): gallery.hit(row)[1] for row, path, *_ in zip(*gallery.listing())}


@pytest.mark.parametrize("kind", ["file", "milvus"])
def test_enrol_rename_erase_and_expire(tmp_path, kind):
    folder = crops(tmp_path / "crops", "ben/p1_a.png", "ben/p1_b.png", "p2_c1.png")
    index = embedded(folder)
    index.threshold = 0.7
    uri, opened = kept(tmp_path, kind, index)

    def change(function, *args, **options):
        with enrol.changing(uri, opened) as gallery:
            text = function(gallery, *args, **options)
        return text, state(opened())

    start = {"ben/p1_a.png": "ben", "ben/p1_b.png": "ben", "p2_c1.png": ""}
    new = embedded(crops(tmp_path / "door", "p3_a.png", "p3_b.png"))
    text, found = change(enrol.enrol, new, "anna")
    assert "2 images enrolled and 0 replaced: anna, a new person; 5 images" in text
    assert found == start | {"door/p3_a.png": "anna", "door/p3_b.png": "anna"}
    hits = opened().search(CENTRES[3:4], 3)[0]
    assert hits.names[:2] == ["anna", "anna"] and os.path.isabs(hits[0].path)

    text, found = change(enrol.enrol, embedded(crops(tmp_path / "gate", "p3_c.png")), "stranger")
    assert "who resembles anna (" in text and found["gate/p3_c.png"] == "stranger"
    text, found = change(enrol.rename, "stranger", "anna")
    assert "1 images are now of anna, who has 3" in text and found["gate/p3_c.png"] == "anna"
    text, found = change(enrol.enrol, embedded(crops(tmp_path / "later", "p3_d.png")), "anna")
    assert "replaced: anna; 7 images" in text
    text, found = change(enrol.enrol, embedded(folder))  # by folders; what is there is replaced, with the same paths
    assert "0 images enrolled and 3 replaced: ben, unlabelled" in text and len(found) == 7

    text, found = change(enrol.erase, str(tmp_path / "gate/p3_c.png"))
    assert "1 images erased" in text and "gate/p3_c.png" not in found
    os.utime(folder / "p2_c1.png", (time.time() - 40 * 86400,) * 2)
    change(enrol.enrol, embedded(folder))
    text, found = change(enrol.erase, days=30)
    assert "older than 30 days: 1 images erased" in text and "p2_c1.png" not in found
    assert [line.split()[:2] for line in enrol.table(opened()).splitlines()[1:]] == [["anna", "3"], ["ben", "2"]]
    text, found = change(enrol.erase, "anna")
    assert found == {"ben/p1_a.png": "ben", "ben/p1_b.png": "ben"} and "anna" not in opened().names.values()
    assert (tmp_path / "door/p3_a.png").exists() and opened().threshold == 0.7
    with pytest.raises(ReidError, match="anna: neither a person nor an image"):
        change(enrol.erase, "anna")
    text, found = change(enrol.erase, "ben")
    assert not found and len(opened()) == 0


def test_an_index_of_a_folder_is_still_of_it_after_changes_and_when_brought_up_to_date(tmp_path):
    """Enrolled images of elsewhere are not missing from the folder, erased ones are not new, and --save_index keeps both so."""
    folder = crops(tmp_path / "crops", "anna/p1_a.png", "ben/p2_a.png", "ben/p2_b.png")
    uri, opened = kept(tmp_path, "file", embedded(folder))
    with enrol.changing(uri, opened) as gallery:
        enrol.enrol(gallery, embedded(crops(tmp_path / "door", "p3_a.png")), "carl")
        enrol.erase(gallery, "anna")
    assert not any(differences(opened()).values()) and left_out_status(opened().bad) == 0

    crops(folder, "ben/p2_c.png")
    os.remove(folder / "ben/p2_b.png")
    new = GalleryIndex.build(Network(), read_folder(folder), old=opened())
    assert state(new) == {"ben/p2_a.png": "ben", "ben/p2_c.png": "ben", "door/p3_a.png": "carl"} and new.kept == 2
    assert not any(differences(new).values())
    os.utime(folder / "anna/p1_a.png", (1, 1))  # not even where the file is another, or the folder is called by another path
    again = GalleryIndex.build(Network(), read_folder(os.path.relpath(folder)), old=new)
    assert state(again) == state(new) and not any(differences(again).values())
    assert "anna" not in str(torch.load(uri, weights_only=True)["bad"])
    enrol.enrol(new, embedded(folder))  # on purpose
    assert "anna/p1_a.png" in state(new) and not new.bad


def test_a_change_that_fails_leaves_the_index_as_it_was(tmp_path):
    uri, opened = kept(tmp_path, "file", embedded(crops(tmp_path / "crops", "p1_a.png")))
    before = uri.read_bytes()
    with pytest.raises(KeyboardInterrupt), enrol.changing(uri, opened) as gallery:
        enrol.erase(gallery, days=-1)
        raise KeyboardInterrupt
    assert uri.read_bytes() == before


def sent(uri, opened):
    """Enrol anna by an image as a server keeps it, and by a file of the user; return both files."""
    folder = stored.images_folder(uri, opened())
    [image] = crops(folder, "sent.png").iterdir()
    image = image.rename(folder / f"{content_number(image.read_bytes()):016x}.png")
    own = crops(uri.parent / "my.enrolled", "p2_a.png") / "p2_a.png"
    with enrol.changing(uri, opened) as gallery:
        enrol.enrol(gallery, GalleryIndex(CENTRES[2:3].half(), read_folder(folder), PRINT, True), "anna")
        enrol.enrol(gallery, embedded(own.parent), "anna")
    return image, own


@pytest.mark.parametrize("way", ["link", "moved", "folder moved", "overwritten"])
def test_images_that_a_server_keeps_go_with_their_rows(tmp_path, way):
    """Also where the index is called by another path than when they were enrolled; files of the user stay."""
    folder = crops(tmp_path / "crops", "p1_a.png")
    uri, opened = kept(tmp_path, "file", embedded(folder))
    link = tmp_path / "link.pt"
    link.symlink_to(uri)
    image, own = sent(link, opened)
    assert image.parent == uri.with_name("door.pt.enrolled") and len(opened()) == 3
    if way == "moved":
        uri = uri.rename(tmp_path / "moved.pt")
    elif way == "folder moved":
        uri = uri.parent.rename(tmp_path / "other") / uri.name
        image = uri.parent / image.parent.name / image.name
    assert image.exists()
    if way == "overwritten":
        built = embedded(folder)
        built.mirror = False
        built.save_built(uri, overwrite=True)
    else:
        with enrol.changing(uri, partial(GalleryIndex.load, uri)) as gallery:
            enrol.erase(gallery, "anna")
    assert not image.exists() and own.exists()


@pytest.mark.parametrize("name", ["anna", "nobody"])
def test_images_without_a_row_go_also_where_a_change_fails(tmp_path, name):
    uri, opened = kept(tmp_path, "file", embedded(crops(tmp_path / "crops", "p1_a.png")))
    image, _ = sent(uri, opened)
    other = image.with_name("0" * 16 + ".png")
    with pytest.raises((ReidError, KeyboardInterrupt)), enrol.changing(uri, opened) as gallery:
        other.write_bytes(b"of a server that was killed")
        enrol.erase(gallery, name)
        raise KeyboardInterrupt
    assert image.exists() and not other.exists()


def test_concurrent_writers_lose_nothing(tmp_path):
    uri, opened = kept(tmp_path, "file", embedded(crops(tmp_path / "crops", "p0_a.png")))
    folders = [crops(tmp_path / f"w{i}", f"p{i}_a.png") for i in range(1, 9)]

    def work(i, folder):
        with enrol.changing(uri, opened) as gallery:
            enrol.enrol(gallery, embedded(folder), f"person {i}")

    threads = [threading.Thread(target=work, args=item) for item in enumerate(folders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened()) == 9 and sorted(opened().names.values()) == [f"person {i}" for i in range(8)]


def test_what_others_change_while_an_index_is_built_is_kept(tmp_path, monkeypatch, capsys):
    """--save_index embeds for minutes without a lock; before it saves, it takes over what --add and --remove have done since."""
    folder = crops(tmp_path / "crops", "anna/p1_a.png", "ben/p2_a.png")
    first = embedded(folder)
    first.queries = embedded(crops(tmp_path / "queries", "anna/p1_b.png"))
    uri, opened = kept(tmp_path, "file", first)
    built, built.queries = embedded(folder), embedded(tmp_path / "queries")
    with enrol.changing(uri, opened) as gallery:
        enrol.enrol(gallery, embedded(crops(tmp_path / "door", "p3_a.png")), "carl")
        enrol.erase(gallery, "anna")
    built.save_built(uri)
    assert state(opened()) == {"ben/p2_a.png": "ben", "door/p3_a.png": "carl"} and len(opened().queries) == 0
    with enrol.changing(uri, opened) as gallery:
        enrol.erase(gallery, "carl")
        enrol.enrol(gallery, embedded(folder))
    built.save_built(uri)
    assert state(opened()) == {"ben/p2_a.png": "ben"} and not any(differences(opened())["missing"])
    monkeypatch.setattr(stored, "WAIT", 0.1)
    with stored.changing(uri), pytest.raises(ReidError, match="another process has been changing galleries"):
        built.save_built(uri)
    assert "another process has locked it; waiting for 0.1 s" in capsys.readouterr().err


def test_what_was_changed_by_hand_is_not_forgotten_when_everybody_is_erased_or_the_network_changes(tmp_path):
    folder = crops(tmp_path / "crops", "anna/p1_a.png")
    uri, opened = kept(tmp_path, "file", embedded(folder))
    with enrol.changing(uri, opened) as gallery:
        enrol.erase(gallery, "anna")
    old = GalleryIndex.reusable(uri, Network, folder)
    assert len(GalleryIndex.build(Network(), read_folder(folder), old=old)) == 0  # she is not embedded again

    class Other(Network):
        mirror = False

    with pytest.raises(ReidError, match="1 images were enrolled or erased by hand, which would be forgotten"):
        GalleryIndex.reusable(uri, Other, folder)
    assert GalleryIndex.reusable(uri, Other, folder, overwrite=True) is None


def test_another_writer_that_does_not_end_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "WAIT", 0)
    uri, opened = kept(tmp_path, "file", embedded(crops(tmp_path / "crops", "p0_a.png")))
    with enrol.changing(uri, opened), pytest.raises(ReidError, match="another process"), enrol.changing(uri, opened):
        pass


def test_erasing_reaches_the_queries_of_an_evaluation(tmp_path):
    index = embedded(crops(tmp_path / "crops", "anna/p1_a.png", "ben/p2_a.png"))
    index.queries = embedded(crops(tmp_path / "queries", "anna/p1_b.png"))
    assert enrol.erase(index, "anna").startswith("anna: 1 images and 1 queries erased, 1 left")
    assert index.pids.tolist() == [folder_pid("ben")] and len(index.queries) == 0


@pytest.mark.parametrize("kind", ["file", "milvus"])
def test_a_person_is_erased_by_the_name_that_the_table_has(tmp_path, kind):
    """File names of Market-1501 have people 0 and -1, which no folder's name gives; others have none at all."""
    names = ["anna/cam1/0_c1s1_000001_00.png", "-1_c1s1_000001_00.png", "0007_c1s1_000001_00.png", "street.png"]
    records = read_folder(crops(tmp_path / "crops", *names))
    uri, opened = kept(tmp_path, kind, GalleryIndex(CENTRES[:4].half(), records, PRINT, True))
    with enrol.changing(uri, opened) as gallery:
        enrol.rename(gallery, "0007", "a\x1bb")
        shown = [line.rsplit(None, 3)[0] for line in enrol.table(gallery).splitlines()[1:]]
        assert sorted(shown) == ["(unlabelled)", "-1", "0", "a\\x1bb"]
        for left, name in enumerate(shown[::-1]):
            assert f"1 images erased, {len(shown) - left - 1} left" in enrol.erase(gallery, name)


@pytest.mark.parametrize("options", [["--rename", "", "eve"], ["--rename", "eve", " "], ["--remove", ""], ["--add", ""],
                                     ["--add", "door", "--name", ""], ["--group", ""]])
def test_an_empty_value_is_refused(options):
    """As an unset shell variable gives: it must neither mean everybody nor start a plain search."""
    with pytest.raises(ReidError, match="empty value"):
        check_search(inference.get_args_parser().parse_args(options))


@pytest.mark.parametrize("name", ["0", "000", "-1", "an\u200bna", "a\x1bb", "a/b", "..", "x" * 101])
def test_a_name_that_could_be_misread_is_refused(name):
    for option, given in (("--name", ["--add", "door", f"--name={name}"]), ("--rename", ["--rename", "anna", name])):
        with pytest.raises(ReidError, match=f"{option}: give the person's name"):
            check_search(inference.get_args_parser().parse_args(given))


def test_only_what_has_a_slash_is_a_path(tmp_path, monkeypatch):
    """The name of nobody is not the folder of that name, whose images would be erased."""
    monkeypatch.chdir(crops(tmp_path / "crops", "anna/p1_a.png", "ben/p2_a.png"))
    index = embedded(tmp_path)
    for name in ("", ".", "crops"):
        with pytest.raises(ReidError, match="neither a person nor an image"):
            enrol.erase(index, name)
        with pytest.raises(ReidError, match="neither a person nor an image"):
            enrol.rename(index, name, "eve")
    assert "./anna: 1 images erased, 1 left" in enrol.erase(index, "./anna")
    assert "../crops/: 1 images erased, 0 left" in enrol.erase(index, "../crops/")


def test_an_image_that_is_taken_from_another_person_is_reported(tmp_path):
    index = embedded(crops(tmp_path / "crops", "anna/p1_a.png", "ben/p2_a.png", "p3_a.png"))
    text = enrol.enrol(index, embedded(tmp_path / "crops"), "ben")
    assert text.startswith("0 images enrolled and 3 replaced (1 taken from anna): ben; 3")  # nobody had the last one
