"""Faults of benchmarks/faults.py that stop or starve a script: kills, servers, disks, several at once."""

import os
import shutil
import subprocess
import sys
import time

from benchmarks.fault_lab import (
    Child,
    Script,
    compare,
    contents,
    fault,
    files_of,
    index_of,
    server,
    small_disk,
    tree_of,
    weights_of,
)
from reid import files as storage
from reid.retrieval import index as index_module

# ---- kill -9 --------------------------------------------------------------------------------------------------------

def killed(lab, tries, command, state, new_folder, steps=False):
    """Kill at moments uniform over the undisturbed time; then a plain re-run must give the undisturbed result.

    steps: results between the first and the last are whole, too (a checkpoint of an earlier epoch).
    """
    folder = new_folder()
    before = state(folder)
    started = time.perf_counter()
    lab.make(*command(folder), cwd=folder)
    duration, expected = time.perf_counter() - started, state(folder)
    for _ in range(tries):
        shutil.rmtree(folder)
        folder = new_folder()
        Script(folder, *command(folder)).kill_after(lab.rng.uniform(0, duration))
        yield compare(state, folder, *(() if steps else (before, expected))) or Script(folder, *command(folder)).works() \
            or compare(state, folder, expected) or ", ".join(f"left behind: {path}" for path in folder.glob("*.part*"))
    shutil.rmtree(folder)


@fault("kill -9: data_prep.py --archive")
def _(lab, tries):
    command = ["data_prep", "--archive", lab.archive, "--any_counts", "--output", "out"]
    yield from killed(lab, tries, lambda folder: command, tree_of, lab.fresh)


@fault("kill -9: data_prep.py --synthetic")
def _(lab, tries):
    command = ["data_prep", "--synthetic", "--num_ids", 12, "--output", "out"]
    yield from killed(lab, tries, lambda folder: command, tree_of, lab.fresh)


@fault("kill -9: data_prep.py, download")
def _(lab, tries):
    with server(lab.archive.read_bytes(), nap=0.01) as url:
        command = ["data_prep", "--url", url, "--any_counts", "--output", "out"]
        yield from killed(lab, tries, lambda folder: command, tree_of, lab.fresh)


@fault("kill -9: train.py, then --resume")
def _(lab, tries):
    yield from killed(lab, tries, lab.train, weights_of, lab.fresh, steps=True)


@fault("kill -9: train.py before each rename of a checkpoint, then --resume")
def _(lab, tries):
    expected = weights_of(lab.trained)
    for last in range(1, 5):  # last, best, last, best
        folder = lab.fresh()
        Child(folder, _die_at_rename, last, lab.train(folder)).wait()
        yield compare(weights_of, folder) or Script(folder, *lab.train(folder)).works() or compare(weights_of, folder, expected)
        shutil.rmtree(folder)


def _die_at_rename(number, command):
    left = [number]

    def hook(event, args):
        if event == "os.rename" and str(args[1]).endswith(".pth"):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), 9)
    sys.addaudithook(hook)
    Script._main(command[0], [str(arg) for arg in command[1:]])


@fault("kill -9: eval.py --save_index")
def _(lab, tries):
    yield from killed(lab, tries, lambda folder: lab.eval(), index_of, lambda: lab.fresh(model=True))


# ---- Download -------------------------------------------------------------------------------------------------------

WORDS = ["closing", "too short", "too long", "wrong bytes", "416", "429", "500"]


@fault("download: " + ", ".join(WORDS))
def _(lab, tries):
    folder = lab.fresh()
    lab.make("data_prep", "--archive", lab.archive, "--any_counts", "--output", "out", cwd=folder)
    expected = tree_of(folder)
    for _ in range(tries):
        shutil.rmtree(folder)
        folder = lab.fresh()
        with server(lab.archive.read_bytes(), lab.rng.choices(WORDS, k=2)) as url:
            problem = "it never finishes"
            for _ in range(4):  # a wrong file costs a run with a clear error, and only that
                script = Script(folder, "data_prep", "--url", url, "--any_counts", "--output", "out")
                problem = script.fails() and (script.status and script.told())
                if problem or script.status == 0:
                    break
            yield problem or compare(tree_of, folder, expected)
    shutil.rmtree(folder)


# ---- Disks ----------------------------------------------------------------------------------------------------------

def starve(lab, tries, prepare, command, state, need):
    """A disk with a random rest of `need` bytes free, then a read-only one: a clear error, the old files untouched, and a
    plain re-run with room again gives the undisturbed result. prepare(folder) puts the old files there."""
    folder = lab.fresh()
    prepare(folder)
    lab.make(*command(folder), cwd=folder)
    expected = state(folder)
    shutil.rmtree(folder)
    for i in range(tries + 1):
        with small_disk(lab) as folder:
            prepare(folder)
            old = state(folder)
            if i == tries:
                subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
                yield Script(folder, *command(folder)).fails() or compare(state, folder, old)
                continue
            ballast = folder / "ballast"
            free = os.statvfs(folder).f_bavail * 4096 - int(lab.rng.uniform(0, need))
            with open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free))
            script = Script(folder, *command(folder))
            problem = script.fails()
            problem = compare(state, folder) if script.status == 0 else problem or compare(state, folder)
            missing = [name for name in old if name not in state(folder)] if not problem else []
            ballast.unlink()
            yield problem or ", ".join(missing) or Script(folder, *command(folder)).works() or compare(state, folder, expected)


@fault("disk full, then read-only: data_prep.py")
def _(lab, tries):
    command = ["data_prep", "--archive", lab.archive, "--any_counts", "--output", "out"]
    yield from starve(lab, tries, lambda folder: None, lambda folder: command, tree_of, 20 << 20)


@fault("disk full, then read-only: train.py --resume")
def _(lab, tries):
    half = lab.fresh()
    Child(half, _die_at_rename, 3, lab.train(half)).wait()  # the first epoch is there

    def prepare(folder):
        shutil.copytree(half, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.tmp"))
    yield from starve(lab, tries, prepare, lab.train, weights_of, 160 << 20)
    shutil.rmtree(half)


@fault("disk full, then read-only: eval.py --save_index --json")
def _(lab, tries):
    def prepare(folder):
        shutil.copytree(lab.index.parents[1], folder, dirs_exist_ok=True)
    need = 1.5 * lab.index.stat().st_size
    yield from starve(lab, tries, prepare, lambda folder: lab.eval(), lambda folder: {"index": index_of(folder)}, need)


@fault("disk full, then read-only: inference.py --json --output")
def _(lab, tries):
    def prepare(folder):
        shutil.copytree(lab.index.parents[1], folder, dirs_exist_ok=True)
        (folder / "r.json").write_text("{}")
        (folder / "r.png").write_bytes(b"old")

    command = ["inference", "--exp_name", "tiny", "--data_root", lab.data, "--load_index", "--query_paths", lab.query,
               "--json", "r.json", "--output", "r.png"]
    yield from starve(lab, tries, prepare, lambda folder: command, files_of("r.json", "r.png"), 100 << 10)


# ---- Several at once ------------------------------------------------------------------------------------------------

@fault("at once: two eval.py --save_index")
def _(lab, tries):
    folder = lab.fresh(model=True)
    expected = index_of(lab.index.parents[1])
    for _ in range(tries):
        both = [Script(folder, *lab.eval()) for _ in range(2)]
        yield "".join(script.works() for script in both) or compare(index_of, folder, expected)
    shutil.rmtree(folder)


@fault("at once: inference.py --load_index while the index is replaced")
def _(lab, tries):
    folder = lab.fresh(model=True)
    (folder / "index").mkdir()
    record = contents(lab.index, index_module)
    other = {**record, "embeddings": record["embeddings"].flip(0).contiguous()}
    files, answers = [folder / "one", folder / "two"], []

    def ask():
        return Script(folder, "inference", "--exp_name", "tiny", "--data_root", lab.data, "--load_index",
                      "--query_paths", lab.query, "--json", "r.json")

    def put(i):
        with storage.atomic_path(folder / "index/tiny.pt") as temporary:
            shutil.copyfile(files[i % 2], temporary)

    for i, payload in enumerate((record, other)):
        storage.save(files[i], payload, index_module.FORMAT, index_module.VERSION)
        put(i)
        ask().wait()
        answers.append((folder / "r.json").read_bytes())

    def replace():
        for i in range(1 << 30):
            put(i)
    writer = Child(folder, replace)
    for _ in range(tries):
        yield ask().works() or compare(files_of("r.json"), folder, *({"r.json": answer} for answer in answers))
    writer.kill_after(0)
    shutil.rmtree(folder)


@fault("at once: two train.py with one name")
def _(lab, tries):
    expected = weights_of(lab.trained)
    for _ in range(tries):
        folder = lab.fresh()
        both = [Script(folder, *lab.train(folder)).wait for _ in range(2)]
        both = [wait() for wait in both]
        good = sorted(script.status for script in both) == [0, 1]
        refused = next((script for script in both if script.status == 1), both[0])
        problem = "" if good and "another process" in refused.err else refused.told()
        yield problem or compare(weights_of, folder, expected)
        shutil.rmtree(folder)
