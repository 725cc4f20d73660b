"""The scripts are stopped, run out of disk, run twice at once, in odd surroundings and on bad images.

Required is that no file is half written, that old files are kept, and that a plain re-run gives what an undisturbed run gives.
"""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest
import torch
from fault_lab import contents, raw, small_disk, state
from PIL import Image

from reid.files import write_json

COMMANDS = ["data_prep", "train", "eval", "inference"]
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


def whole(name, found, expected):
    """Whether all that a stopped run has left is whole: what an undisturbed run leaves, or a checkpoint of an earlier epoch."""
    return set(found) <= set(expected) and (name == "train" or all(found[key] == expected[key] for key in found))


@pytest.mark.long
@pytest.mark.parametrize("how", SIGNALS, ids=lambda how: how.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_stopped_at_a_random_moment(lab, name, how, moment):
    seconds, expected = lab.expected(name)
    folder = lab.folder(name)
    script = lab.start(name, folder).stop_after(moment * seconds, how)
    assert script.status in (0, -how, 128 + how, 130), script.err
    assert whole(name, state(folder), expected)
    lab.start(name, folder).works()
    assert state(folder) == expected and not list(folder.glob("*.part*"))
    shutil.rmtree(folder)  # 120 MB each of training


def die_at_rename(number):
    """Kill this process before its `number`-th rename of a checkpoint."""
    seen = []

    def hook(event, args):
        if event == "os.rename" and str(args[1]).endswith(".pth"):
            seen.append(args)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def test_killed_between_two_checkpoints(lab):
    """The `best.pth` of an epoch must not be lost after its `last.pth`."""
    expected, folder = lab.expected("train")[1], lab.folder("train")
    assert lab.start("train", folder, partial(die_at_rename, 2)).wait().status == -signal.SIGKILL
    assert whole("train", state(folder), expected)
    lab.start("train", folder).works()
    assert state(folder) == expected


@pytest.fixture(scope="module")
def old(lab):
    """Return a function(command) -> folder of an earlier run: an index and results to replace, a training to go on with."""
    @cache
    def prepared(name):
        lab.expected(name)
        folder = lab.folder(name)
        if name == "train":
            lab.start(name, folder, partial(die_at_rename, 3)).wait()
        elif name == "eval":
            lab.start(name, folder).works()
        elif name == "inference":
            write_json(folder / "r.json", {})
        return folder
    return prepared


NEED = {"data_prep": 1 << 19, "train": 3 << 20, "eval": 1 << 16, "inference": 1 << 16}  # bytes written


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk(lab, old, name, moment):
    """With too little room for what it writes: one clear line, old files are whole, and with room the run gives everything."""
    expected = lab.expected(name)[1]
    with small_disk(lab.folder()) as folder:
        shutil.copytree(old(name), folder, dirs_exist_ok=True)
        before = state(folder)
        with open(folder / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, os.statvfs(folder).f_bavail * 4096 - int(moment * NEED[name])))
        script = lab.start(name, folder).wait()
        if script.status:
            script.fails()
        found = state(folder)
        assert set(before) <= set(found)
        assert all(name == "train" or found[key] in (before.get(key), expected[key]) for key in found)
        (folder / "ballast").unlink()
        lab.start(name, folder).works()
        assert state(folder) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_read_only_disk(lab, old, name):
    with small_disk(lab.folder()) as folder:
        shutil.copytree(old(name), folder, dirs_exist_ok=True)
        before = state(folder)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        lab.start(name, folder).wait().fails()
        assert state(folder) == before


def test_milvus_on_a_read_only_disk(here, tmp_path):
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: pip install -e '.[milvus]'")
    with small_disk(tmp_path) as folder:
        (folder / "crops").mkdir()
        image(folder / "crops/anna_1.jpg")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        for uri in folder / "new.db", folder / "none/new.db":
            assert str(uri.parent) in here.refused("inference", *here.network, "--add", folder / "crops", "--gallery_uri", uri)
        assert [path.name for path in folder.iterdir()] == ["crops"]


@pytest.mark.long
def test_two_evaluations_at_once(lab, moment):
    folder = lab.folder("eval")
    both = [lab.start("eval", folder) for _ in range(2)]
    for script in both:
        script.works()
    assert state(folder) == lab.expected("eval")[1]


@pytest.mark.long
def test_two_trainings_of_one_name(lab, moment):
    """One is refused with a clear line; the other is not disturbed."""
    expected, folder = lab.expected("train")[1], lab.folder("train")
    both = [lab.start("train", folder) for _ in range(2)]
    assert sorted(script.wait().status for script in both) == [0, 1]
    assert "another process" in next(script.err for script in both if script.status)
    assert state(folder) == expected


@pytest.mark.long
def test_search_while_the_index_is_replaced(lab, moment):
    """The answer comes from the old index or from the new one."""
    folder, record = lab.folder("inference"), torch.load(lab.index, weights_only=True)
    raw(folder / "other.pt", record | {"embeddings": record["embeddings"].flip(0).contiguous()})
    indexes, answers = [lab.index, folder / "other.pt"], []
    command = [*lab.command("inference", folder), "--gallery_uri", "x.pt"]
    for index in indexes:
        shutil.copy(index, folder / "x.pt")
        lab.script(folder, *command).works()
        answers.append((folder / "r.json").read_bytes())
    script = lab.script(folder, *command)
    while script.process.is_alive():
        indexes.reverse()
        shutil.copy(indexes[0], folder / "new.pt")
        os.replace(folder / "new.pt", folder / "x.pt")
    script.works()
    assert (folder / "r.json").read_bytes() in answers


def without(*streams):
    """Close streams as a service does."""
    for name in streams:
        os.close(getattr(sys, name).fileno())
        setattr(sys, name, None)


def in_ascii():
    sys.stdout.reconfigure(encoding="ascii")


def into_closed_pipe():
    """As `script | head` after head has ended."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    sys.stdout = open(1, "w", closefd=False)


def as_a_service():
    """Neither output nor home, and few file descriptors."""
    import resource

    without("stdout", "stderr")
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    os.environ.update(HOME="/nowhere", TMPDIR="/nowhere", XDG_CACHE_HOME="/nowhere")


def on_a_poor_disk():
    """A file system without locks, permissions and fsync of folders, as some of networks, FUSE and USB sticks; no stdout."""
    import fcntl

    def refuse(*args, **options):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    fsync = os.fsync
    os.fsync = lambda fd: refuse() if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd)
    os.chmod = os.chown = fcntl.flock = refuse
    without("stdout")


SURROUNDINGS = {"service": as_a_service, "poor disk": on_a_poor_disk, "ASCII terminal": in_ascii, "closed pipe": into_closed_pipe}


@pytest.mark.parametrize("name, kind", [*product(["data_prep", "eval", "inference"], SURROUNDINGS), ("train", "poor disk")])
def test_odd_surroundings(lab, name, kind):
    folder = lab.folder(name)
    script = lab.start(name, folder, SURROUNDINGS[kind]).wait()
    if kind == "closed pipe":
        assert script.status in (0, 141), script.err
    else:
        script.works()
        assert state(folder) == lab.expected(name)[1]


def in_little_memory(mib):
    """Leave so much address space for everything that the script adds to its libraries."""
    import resource

    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is needed")
@pytest.mark.parametrize("mib", [1, 2, 4])  # the small network takes 8
def test_a_small_address_space(lab, mib):
    """One line and an end; more room than this can end in a crash (SIGSEGV) inside of a library."""
    folder = lab.folder("inference")
    assert "not enough memory" in lab.start("inference", folder, partial(in_little_memory, mib)).wait(100).fails()
    assert not state(folder)


def image(path, size=None, kind="JPEG"):
    """Save an image; `size` cuts or extends the file to so many bytes."""
    Image.effect_noise((64, 128), 99).convert("RGB").save(path, kind)
    if size:
        os.truncate(path, size)


def image_in_folder(path):
    path.mkdir()
    image(path / "inside.jpg")


LEFT_OUT = {
    "cut.jpg": partial(image, size=2000), "empty.jpg": Path.touch, "text.jpg": lambda path: path.write_text("text"),
    "40GB.jpg": partial(image, size=40 << 30), "dangling.jpg": lambda path: path.symlink_to("nowhere"),
    "itself.jpg": lambda path: path.symlink_to(path.name), "device.jpg": lambda path: path.symlink_to("/dev/zero"),
    "pipe.jpg": os.mkfifo, "eps.jpg": partial(image, kind="EPS"), "icon.jpg": partial(image, kind="ICO")}
READ = {"clip_1": image_in_folder, "José  Пример [1].jpg": image, "a\nb.jpg": image, os.fsdecode(b"\xff.jpg"): image}


@pytest.mark.parametrize("name", ["inference", "eval"])
def test_bad_and_odd_files_in_the_gallery(lab, name):
    """What cannot be read, or is no photograph, is left out and named, exit status 3; everything else is in the gallery."""
    folder = lab.folder(name)
    shutil.copytree(lab.people, folder / "people", copy_function=os.link)
    images = len(list((folder / "people/gallery").rglob("*.jpg")))
    person = next((folder / "people/gallery").glob("00*[1-9]"))
    for file, write in (LEFT_OUT | READ).items():
        write(person / file)
    query = next((folder / "people/query").rglob("*.jpg"))
    what = {"eval": ["--save_index"], "inference": ["--gallery", "people/gallery", "--query_paths", query, "--topk", 1000]}
    script = lab.script(folder, name, "--exp_name", "tiny", "--data_root", "people", "--json", "r.json", *what[name]).works(3)
    assert all(f"{person.name}/{file}: " in script.err for file in LEFT_OUT), script.err
    if name == "inference":
        assert len(json.loads((folder / "r.json").read_text())["rankings"][0]["hits"]) == images + len(READ)
    else:
        assert len(contents(folder / "index/tiny.pt")["embeddings"]) == images + len(READ)
