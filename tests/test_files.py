"""Files are whole or absent, damaged or hostile ones end in ReidError, and text is safe to print."""

import errno
import os
import pickle
import random
import subprocess
import sys
import textwrap
import time
import zipfile
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reid import ReidError
from reid import files as storage
from reid.cli import printable, without_secrets
from reid.extras import pictures

PAYLOAD = {"numbers": torch.arange(1000.0), "half": torch.ones(3, dtype=torch.bfloat16), "none": None,
           "list": [1, 2.5, "x", True], "nested": {1: torch.zeros(0), "scalar": torch.tensor(3)}}


@pytest.fixture
def path(tmp_path):
    storage.save(tmp_path / "a.pt", PAYLOAD, "kind", 1)
    return tmp_path / "a.pt"


@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(path, mmap, monkeypatch):
    monkeypatch.setattr(storage, "VERIFY_LIMIT", 0)
    record = storage.load(path, "kind", 1, mmap=mmap)
    assert torch.equal(record["numbers"], PAYLOAD["numbers"]) and record["list"] == PAYLOAD["list"]
    assert record["nested"][1].shape == (0,) and record["nested"]["scalar"] == 3
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_a_small_file_may_be_overwritten_in_place_while_it_is_in_use(path):
    """As by `cp` and `rsync --inplace`; of a file that is mapped into memory, the process would end by SIGBUS."""
    record = storage.load(path, "kind", 1, mmap=True)
    os.truncate(path, 0)
    assert torch.equal(record["numbers"], PAYLOAD["numbers"])


def test_checksum_sees_every_part():
    seen = {storage.checksum(PAYLOAD)}
    changes = [{"numbers": torch.arange(1000.0) + 1e-4}, {"numbers": torch.arange(1000.0).view(10, 100)}, {"half": torch.ones(3)},
               {"none": 0}, {"list": [1, 2.5, "x", False]}, {"nested": {1: torch.zeros(0), "scalar": torch.tensor(4)}},
               {"more": 1}]
    for change in changes:
        seen.add(storage.checksum(PAYLOAD | change))
    assert len(seen) == 1 + len(changes)


def test_wrong_kind_version_and_missing(path):
    with pytest.raises(ReidError, match="expected a other file, found 'kind'"):
        storage.load(path, "other", 1)
    with pytest.raises(ReidError, match="version 1, this code reads version 2"):
        storage.load(path, "kind", 2)
    torch.save({"format": "kind", "version": torch.zeros(2)}, path)
    with pytest.raises(ReidError, match="this code reads version"):
        storage.load(path, "kind", 1)
    with pytest.raises(ReidError, match="no such file"):
        storage.load(path.with_name("b.pt"), "kind", 1)
    torch.save([1, 2], path)
    with pytest.raises(ReidError, match="found 'list'"):
        storage.load(path, "kind", 1)


def test_a_flipped_bit_is_found(path):
    whole = path.read_bytes()
    at = whole.index(torch.tensor([500.0]).numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ReidError, match="damaged"):
        storage.load(path, "kind", 1)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_checksum_of_columns(tmp_path, rows):
    """A column of a single row has a stride that `Tensor.view` refuses."""
    columns = torch.arange(4 * rows).reshape(rows, 4)
    assert storage.checksum(columns[:, 1]) == storage.checksum(columns[:, 1].clone(memory_format=torch.contiguous_format))
    storage.save(tmp_path / "a.pt", {"x": columns.T.contiguous()[2]}, "kind", 1)
    assert storage.load(tmp_path / "a.pt", "kind", 1)["x"].tolist() == columns[:, 2].tolist()


def test_code_in_a_pickle_does_not_run(path):
    marker = path.with_name("ran")

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    for write in (lambda: torch.save({"format": "kind", "x": Hostile()}, path),
                  lambda: path.write_bytes(pickle.dumps(Hostile()))):
        write()
        with pytest.raises(ReidError):
            storage.load(path, "kind", 1)
        assert not marker.exists()


def test_damage_of_any_sort_is_our_error(tmp_path):
    storage.save(tmp_path / "whole.pt", PAYLOAD, "kind", 1)
    whole = (tmp_path / "whole.pt").read_bytes()
    path, rng = tmp_path / "a.pt", random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.5:
            data = data[: rng.randrange(len(data))]
        path.write_bytes(bytes(data))
        try:
            record = storage.load(path, "kind", 1)
        except ReidError as error:
            assert "\n" not in str(error)
        else:  # the change hit padding
            assert torch.equal(record["numbers"], PAYLOAD["numbers"])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_our_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    path.write_bytes(data)
    with pytest.raises(ReidError):
        storage.load(path, "kind", 1)


def test_want_of_memory_is_not_damage(path, monkeypatch):
    for error in MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"):
        monkeypatch.setattr(torch, "load", lambda *args, error=error, **options: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            storage.load(path, "kind", 1)


def test_failure_keeps_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), storage.atomic_path(path, "kind") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_killed_writer_leaves_the_old_file_and_the_next_sweeps(path):
    code = f"""
        import time
        from reid import files as storage
        with storage.atomic_path({str(path)!r}, "kind") as temporary:
            temporary.write_text("half")
            print("written", flush=True)
            time.sleep(60)
    """
    writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    writer.stdout.readline()
    leftover = next(p for p in path.parent.iterdir() if p != path)
    old = time.time() - 60
    os.utime(leftover, (old, old))
    storage.save(path, PAYLOAD, "kind", 1)
    assert leftover.exists()  # its writer lives
    writer.kill()
    writer.wait()
    assert torch.equal(storage.load(path, "kind", 1)["numbers"], PAYLOAD["numbers"])
    storage.save(path, PAYLOAD, "kind", 1)
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["x", "x[0]*", "y" * 250])
def test_only_our_own_leftovers_are_removed(tmp_path, name):
    """Whatever a file is called: its name is never a pattern."""
    mine = [tmp_path / file for file in (f".{name[:200]}.mine.tmp", "x0.tmp", ".reid-notes.tmp", f".reid-{0:032}.tmp")]
    left = tmp_path / f".reid-{'0a' * 16}.tmp"
    mine[-1].symlink_to("x0.tmp")
    for path in (*mine, left):
        path.touch()
        os.utime(path, (1, 1))
    with storage.atomic_path(tmp_path / name, "kind") as temporary:
        temporary.write_text("new")
    assert set(tmp_path.iterdir()) == {*mine, tmp_path / name}


def test_permissions_and_links_are_kept(tmp_path):
    real, link = tmp_path / "disk" / "a.pt", tmp_path / "a.pt"
    storage.save(real, PAYLOAD, "kind", 1)
    real.chmod(0o600)
    link.symlink_to(real)
    storage.save(link, {"x": 1}, "kind", 1)
    assert link.is_symlink() and storage.load(real, "kind", 1)["x"] == 1
    assert real.stat().st_mode & 0o777 == 0o600
    with storage.atomic_path(link, "kind") as temporary:
        assert temporary.parent == real.parent and temporary.stat().st_mode & 0o777 == 0o600  # at no moment readable by others


def picture(path, mark=True):
    exif = Image.Exif()
    if mark:
        exif[pictures.SOFTWARE] = storage.PICTURE
    Image.new("RGB", (300, 300), "red").save(path, exif=exif)


OURS = {"r.json": storage.RESULTS, "r.html": storage.REPORT, "r.png": storage.PICTURE, "r.jpg": storage.PICTURE,
        "r.webp": storage.PICTURE, "r.pt": "reid-index", "r.pth": storage.CHECKPOINT}


def ours(folder):
    """Write one file of each kind, and return {path: kind}."""
    storage.write_json(folder / "r.json", {"x": 1})
    (folder / "r.html").write_text(f'\n<!doctype html>\n<meta name="generator" content="{storage.REPORT}">')
    for name in ("r.png", "r.jpg", "r.webp"):
        picture(folder / name)
    for name in ("r.pt", "r.pth"):
        storage.save(folder / name, PAYLOAD, OURS[name], 1)
    return {folder / name: kind for name, kind in OURS.items()}


def test_a_file_is_replaced_by_one_of_its_kind_only(tmp_path):
    found = ours(tmp_path)
    for (path, own), kind in product(found.items(), set(found.values())):
        if kind == own:
            storage.check_output(path, kind)
            continue
        with pytest.raises(ReidError, match="is a checkpoint" if own == storage.CHECKPOINT else "replace it with --overwrite"):
            storage.check_output(path, kind)
        if own == storage.CHECKPOINT:
            with pytest.raises(ReidError, match="is a checkpoint; choose"):
                storage.check_output(path, kind, overwrite=True)
        else:
            storage.check_output(path, kind, overwrite=True)


def test_files_of_others_are_not_ours(tmp_path):
    """Their names, and what they say about our files, do not matter."""
    with zipfile.ZipFile(tmp_path / "backup.zip", "w") as archive:
        archive.writestr("reid-index/format/reid-checkpoint", "reid-index")
    (tmp_path / "notes.txt").write_text("reid-index reid-results reid-checkpoint human re-identification report")
    (tmp_path / "notes.json").write_text('{"note": "made by reid", "format": "reid-results"}')
    (tmp_path / "empty.json").touch()
    torch.save({"model": {"format": "x"}, "reid-index": 1}, tmp_path / "model.pt")
    picture(tmp_path / "photo.jpg", mark=False)
    for path, kind in product(tmp_path.iterdir(), set(OURS.values())):
        with pytest.raises(ReidError, match="exists and is not a"):
            storage.check_output(path, kind)


def test_outputs_are_no_inputs_and_differ(tmp_path, monkeypatch):
    def refused(*outputs, inputs=(), overwrite=True):
        with pytest.raises(ReidError) as error:
            storage.check_outputs(outputs, inputs, overwrite)
        return str(error.value)

    monkeypatch.chdir(tmp_path)
    ours(tmp_path)
    Path("folder.html").mkdir()
    Path("gallery/0001").mkdir(parents=True)
    picture("gallery/0001/a.png")
    Path("link.png").symlink_to("gallery/0001/a.png")
    Path("elsewhere").symlink_to("gallery")
    for path in ("r.png", "folder.html/../r.png", tmp_path / "r.png"):
        assert "is read by the same command" in refused(("output", path, storage.PICTURE), inputs=["r.png"])
    for path in ("gallery/0001/a.png", "link.png", "elsewhere/0001/a.png"):
        assert "is read by the same command" in refused(("output", path, storage.PICTURE), inputs=["gallery"])
        assert "is read by the same command" in refused(("gallery_uri", path, "reid-index"), inputs=["elsewhere"])
    Path("loop.json").symlink_to("loop.json")
    storage.check_outputs([("json", "loop.json", storage.RESULTS)])
    picture("r-001.png", mark=False)
    assert "r-001.png: exists" in refused(("output", "r.png", storage.PICTURE), overwrite=False)  # a numbered sheet
    Path("link.json").symlink_to("r.json")
    outputs = ("json", "r.json", storage.RESULTS), ("gallery_uri", "link.json", "reid-index")
    assert "two outputs of this command" in refused(*outputs)
    for path, kind in (("folder.html", storage.REPORT), ("new.txt", storage.RESULTS), ("new", storage.PICTURE),
                       ("gallery", "reid-index"), ("", storage.RESULTS)):
        assert "give a file that ends in" in refused(("option", path, kind))
    storage.check_outputs([("json", "r.json", storage.RESULTS), ("report", "new/r.html", storage.REPORT), ("output", None, "")],
                          ["."])


def test_the_owner_is_kept(path):
    if os.getuid():
        pytest.skip("only root may give files away")
    os.chown(path, 1234, 2345)
    storage.save(path, {}, "kind", 1)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


def test_read_only_files_are_not_replaced(path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write everything
    with pytest.raises(ReidError, match="is read-only"):
        storage.save(path, {}, "kind", 1)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EPERM])
def test_a_file_system_without_locks_fsync_or_permissions(path, monkeypatch, code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    fsync, leftover = os.fsync, path.with_name(".reid-0123.tmp")
    leftover.touch()
    os.utime(leftover, (1, 1))
    monkeypatch.setattr(storage.fcntl, "flock", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "fsync", lambda fd: refuse() if os.path.isdir(f"/proc/self/fd/{fd}") else fsync(fd))
    storage.save(path, {"x": 1}, "kind", 1)
    assert storage.load(path, "kind", 1)["x"] == 1
    assert set(path.parent.iterdir()) == {path, leftover}  # without locks, it may have an owner
    with storage.locked(path.parent, "somebody is here"), storage.locked(path.parent / "lock", "somebody is here"):
        storage.copy(path, path.with_name("copy"))
    assert path.with_name("copy").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("code, expected", [(errno.EIO, pytest.raises(OSError)), (errno.EINVAL, nullcontext())])
def test_a_broken_disk_is_reported(tmp_path, monkeypatch, code, expected):
    def fsync(fd):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "fsync", fsync)
    with expected:
        storage.fsync_folder(tmp_path)


@pytest.mark.parametrize("name", ["folder", "file"])
def test_lock_is_held_once(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with storage.locked(tmp_path / name, "somebody is here"):
        with pytest.raises(ReidError, match=f"{name}: somebody is here"), storage.locked(tmp_path / name, "somebody is here"):
            pass
    with storage.locked(tmp_path / name, "somebody is here"):
        pass


def test_everything_of_a_tree_is_written(tmp_path):
    storage.fsync_folder(tmp_path, tree=True)
    with pytest.raises(OSError):
        storage.fsync_folder(tmp_path / "nothing", tree=True)


@pytest.mark.parametrize("text, shown", [
    ("plain ü 日本 \u00a0.jpg", "plain ü 日本 \u00a0.jpg"), ("a\nleft out: b", "a\\nleft out: b"),
    ("\x1b]0;x\x07", "\\x1b]0;x\\x07"), ("caf\udce9", "caf\\udce9"),
    ("\x9b31m\x7f", "\\x9b31m\\x7f"), ("a\u202egpj.exe", "a\\u202egpj.exe"), (Path("a\tb"), "a\\tb")])
def test_control_characters_are_not_printed(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("text, shown", [
    ("http://h/m.zip", "http://h/m.zip"), ("http://h:1/m.zip?token=s3 cret", "http://h:1/m.zip?***"),
    ("postgresql://u:s3/cr@et@h/db", "postgresql://***@h/db"), ("no connection to 'htp://u:s3cret@h'", "no connection to 'htp://***@h'"),
    ("u:s3cret@h/m.zip", "***@h/m.zip"), ("https:/u:s3cret@h", "***@h"), ("http://h/m.zip#token=s3cret", "http://h/m.zip#***"),
    ("http://h/m.zip;token=s3cret", "http://h/m.zip;***"), ("is it right; lr=1? Try again", "is it right; lr=1? Try again")])
def test_secrets_of_addresses_are_masked(text, shown):
    assert without_secrets(text) == shown
