"""Files are whole or absent, and what is damaged or hostile ends in our own error."""

import os
import pickle
import random
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reid import ReidError
from reid import files as storage

PAYLOAD = {"numbers": torch.arange(1000.0), "half": torch.ones(3, dtype=torch.bfloat16), "none": None,
           "list": [1, 2.5, "x", True], "nested": {1: torch.zeros(0), "scalar": torch.tensor(3)}}


@pytest.fixture
def path(tmp_path):
    storage.save(tmp_path / "a.pt", PAYLOAD, "kind", 1)
    return tmp_path / "a.pt"


@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(path, mmap):
    record = storage.load(path, "kind", 1, mmap=mmap)
    assert torch.equal(record["numbers"], PAYLOAD["numbers"]) and record["list"] == PAYLOAD["list"]
    assert record["nested"][1].shape == (0,) and record["nested"]["scalar"] == 3
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~storage._umask()


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


def test_failure_keeps_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), storage.atomic_path(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_killed_writer_leaves_the_old_file_and_the_next_sweeps(path):
    code = f"""
        import time
        from reid import files as storage
        with storage.atomic_path({str(path)!r}) as temporary:
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


@pytest.mark.parametrize("name", ["folder", "file"])
def test_lock_is_held_once(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with storage.locked(tmp_path / name, "somebody is here"):
        with pytest.raises(ReidError, match=f"{name}: somebody is here"), storage.locked(tmp_path / name, "somebody is here"):
            pass
    with storage.locked(tmp_path / name, "somebody is here"):
        pass


def test_everything_of_a_tree_is_written(tmp_path):
    storage.fsync_tree(tmp_path)
    with pytest.raises(OSError):
        storage.fsync_tree(tmp_path / "nothing")
