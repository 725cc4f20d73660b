"""Fault injection: kills, starves and misleads the scripts, and counts what is lost.

    python benchmarks/faults.py                               everything, 100 tries each: hours on two cores
    python benchmarks/faults.py --tries 10 --only kill disk   the faults whose names contain one of the words

The scripts run as forks of this process, with their real command lines: a kill at a random moment then hits work, and not
mostly the import of libraries. Full and read-only disks are small tmpfs mounts and need root. Prints
`fault, tries, survived, lost`, and what was lost.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork may not inherit threads, and bits depend on their number

import torch  # noqa: E402

from benchmarks import fault_inputs as inputs  # noqa: E402
from benchmarks.fault_lab import (  # noqa: E402
    NOBODY,
    TINY,
    Child,
    Lab,
    Script,
    Skip,
    compare,
    contents,
    files_of,
    index_of,
    server,
    small_disk,
    tree_of,
    weights_of,
)
from reid import ReidError, checkpoint, storage  # noqa: E402
from reid import index as index_module  # noqa: E402
from reid.data import parse_name, read_folder  # noqa: E402
from reid.extract import Extractor  # noqa: E402
from reid.model import build_model, default_config  # noqa: E402

FAULTS = {}  # name -> generator function(lab, tries): yields "" for a try that lost nothing, else what was lost


def fault(name):
    return lambda function: FAULTS.setdefault(name, function)


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


# ---- Bad files ------------------------------------------------------------------------------------------------------

@fault("a bad or odd image in the gallery and as a query: inference.py")
def _(lab, _tries):
    for kind, (name, write, verdict) in inputs.IMAGES.items():
        folder = lab.fresh(model=True)
        gallery, good = folder / "gallery", folder / "good query.jpg"
        (gallery / "0002").mkdir(parents=True)
        shutil.copy(lab.query, good)
        for i in range(3):
            shutil.copy(lab.query, gallery / f"000{i}_c{i}s1_000001_01.jpg")
        path = gallery / "0002" / name
        write(path)
        script = Script(folder, "inference", "--exp_name", "tiny", "--gallery", gallery, "--query_paths", good, path, "--topk", 9,
                        "--json", "found.json", user=NOBODY if os.getuid() == 0 else None)
        problem = script.works(3 if verdict == inputs.LEFT_OUT else 0)
        if not problem:
            answered = json.loads((folder / "found.json").read_text())["rankings"]
            hits = {hit["path"]: hit["camid"] for hit in answered[0]["hits"]}
            shown = next((hit for hit in hits if hit.startswith(str(path))), None)
            right = (len(answered), len(hits)) == ((2, 4) if shown else (1, 3)) and bool(shown) == (verdict == inputs.READ)
            told = verdict == inputs.READ or script.err.count(f"left out: {path}: ") == 2  # in the gallery and as a query
            right = right and ("c123" not in name or hits[shown] == 123)
            problem = "" if right and told else f"{len(hits)} hits; {script.told()}"
        yield f"{kind}: {problem}" if problem else ""
        shutil.rmtree(folder)


@fault("a bad or odd image in the dataset: eval.py")
def _(lab, _tries):
    for kind, (name, write, verdict) in inputs.IMAGES.items():
        folder = lab.fresh(model=True)
        shutil.copytree(lab.data, folder / "data", copy_function=os.link)
        person = next((folder / "data/gallery").glob("0*"))
        write(person / name)
        script = Script(folder, "eval", "--exp_name", "tiny", "--data_root", "data", user=NOBODY if os.getuid() == 0 else None)
        problem = script.works(3 if verdict == inputs.LEFT_OUT else 0)
        if not problem and verdict == inputs.LEFT_OUT and name not in script.err:
            problem = f"the file is not named; {script.told()}"
        yield f"{kind}: {problem}" if problem else ""
        shutil.rmtree(folder)


@fault("100,000 empty files beside three images: inference.py --gallery")
def _(lab, _tries):
    folder = lab.fresh(model=True)
    gallery = folder / "gallery"
    gallery.mkdir()
    for i in range(100_000):
        os.close(os.open(gallery / f"{i % 1501:04d}_c{i % 6}s1_{i:06d}_01.jpg", os.O_CREAT))
    for i in range(3):
        shutil.copy(lab.query, gallery / f"a{i}.jpg")
    started = time.perf_counter()
    listed = len(read_folder(gallery))
    seconds = time.perf_counter() - started
    script = Script(folder, "inference", "--exp_name", "tiny", "--gallery", "gallery", "--query_paths", lab.query,
                    "--json", "r.json")
    problem = script.works(3)
    hits = [] if problem else json.loads((folder / "r.json").read_text())["rankings"][0]["hits"]
    yield problem or ("" if (len(hits), listed, script.err.count("left out: ")) == (3, 100_003, 100_000) else "not all are told")
    print(f"    listing of 100,003 files: {seconds:.2f} s; with opening each: {time.perf_counter() - started:.1f} s")
    shutil.rmtree(folder)


# ---- Hostile checkpoints and indexes --------------------------------------------------------------------------------

TAKEN = ("of another kind", "weights of another shape", "weights missing", "weights as text", "another backbone",
         "images of a billion pixels", "no configuration")  # --weights takes what fits from any state dict


@fault("hostile checkpoint: eval.py, inference.py, train.py --weights and --resume")
def _(lab, _tries):
    record = contents(lab.tiny, checkpoint)
    marker = lab.root / "ran"
    for kind, write in inputs.hostile_checkpoints(record, checkpoint.FORMAT, checkpoint.VERSION, marker).items():
        folder = lab.fresh()
        for name in ("best.pth", "last.pth"):
            path = folder / "models/bad" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        common = ["--exp_name", "bad", "--data_root", lab.data]
        for command in (["eval", *common], ["inference", *common], ["train", *common, "--resume"],
                        ["train", "--data_root", lab.data, "--exp_name", "new", *TINY, "--weights", "models/bad/best.pth"]):
            if "--weights" in command and kind in TAKEN:
                continue
            problem = Script(folder, *command).fails("models/bad/")
            yield f"{kind}, {command[0]}.py: {problem}" if problem else "code ran" if marker.exists() else ""
        shutil.rmtree(folder)


@fault("hostile index: eval.py and inference.py --load_index")
def _(lab, _tries):
    record = contents(lab.index, index_module)
    marker = lab.root / "ran"
    for kind, write in inputs.hostile_indexes(record, index_module.FORMAT, index_module.VERSION, marker).items():
        folder = lab.fresh(model=True)
        (folder / "index").mkdir()
        write(folder / "index/tiny.pt")
        common = ["--exp_name", "tiny", "--data_root", lab.data, "--load_index"]
        for command in (["eval", *common], ["inference", *common, "--query_paths", lab.query]):
            problem = Script(folder, *command).fails(*(["index/tiny.pt"] if kind != "embeddings of another size" else []))
            yield f"{kind}, {command[0]}.py: {problem}" if problem else "code ran" if marker.exists() else ""
        shutil.rmtree(folder)


@fault("index whose images are gone: eval.py and inference.py --load_index")
def _(lab, _tries):
    folder = lab.fresh(model=True)
    shutil.copytree(lab.data, folder / "data")
    common = ["--exp_name", "tiny", "--data_root", "data"]
    lab.make("eval", *common, "--save_index", cwd=folder)
    shutil.rmtree(folder / "data/gallery")
    yield Script(folder, "eval", *common, "--load_index").works()
    yield Script(folder, "inference", *common, "--load_index", "--query_paths", lab.query, "--output", "r.png",
                 "--json", "r.json", "--rerank").works()
    shutil.rmtree(folder)


# ---- Fuzzing --------------------------------------------------------------------------------------------------------

def fuzz(lab, tries, attempt):
    """attempt(rng, folder) `tries` times in another process: only ReidError may come out, and no crash."""
    folder = lab.fresh()

    def loop():
        for i in range(tries):
            try:
                attempt(random.Random(i), folder)
                problem = ""
            except ReidError as error:
                problem = "" if "\n" not in str(error) else "more than one line"
            except Exception as error:
                problem = f"input {i}: {type(error).__name__}: {str(error)[:100]}"
            print(json.dumps(problem), flush=problem != "")
    child = Child(folder, loop).wait(3600)
    results = [json.loads(line) for line in child.out.splitlines()]
    yield from results
    yield from ["" if child.status == 0 else f"crash, status {child.status}"] * (tries - len(results))
    shutil.rmtree(folder)


@fault("fuzzing: file names")
def _(lab, tries):
    letters = "0123456789-_cs.jpgf \n\0é日\ud800٣²"

    def attempt(rng, _folder):
        name = "".join(rng.choices(letters, k=rng.randint(0, 40)))
        if rng.random() < 0.7:
            name = bytearray(b"-1_c1s1_000451_03.jpg.jpg") if rng.random() < 0.3 else bytearray(b"0002_c12s3_f0046985_00.png")
            for _ in range(rng.randint(1, 4)):
                name[rng.randrange(len(name))] = rng.randrange(128)
            name = name.decode()
        parsed = parse_name(name)
        if parsed and not all(-(1 << 63) <= value < 1 << 63 for value in parsed):
            raise OverflowError(name)
    yield from fuzz(lab, 800 * tries, attempt)


def small_files(lab):
    """{kind: (contents, format, version, load)} of small but complete files: loading a small one is what is tried, often."""
    record = contents(lab.index, index_module)
    small = {key: value[:20].clone() if isinstance(value, torch.Tensor) else value for key, value in record.items()
             if key != "queries"}
    small["path_offsets"] = record["path_offsets"][:21].clone()
    small["path_blob"] = record["path_blob"][: int(small["path_offsets"][-1])].clone()
    small["embeddings"] = torch.nn.functional.normalize(torch.randn(20, 1024)).half()

    def open_index(path):
        loaded = index_module.GalleryIndex.load(path, record["fingerprint"])
        loaded.search(torch.ones(1, 1024) / 32, 3, camids=[1])
        assert len(list(loaded.paths)) == len(loaded.records()) == len(loaded)

    whole = contents(lab.tiny, checkpoint)
    state = {key: whole["state_dict"][key] for key in ("neck.weight", "classifier.weight", "body.norm0.running_mean")}
    model = {"config": whole["config"], "metrics": {"val/accuracy": 0.5}, "args": {"lr": 0.1}, "versions": whole["versions"]}

    def open_checkpoint(path):
        loaded = checkpoint.load_checkpoint(path)
        checkpoint.fingerprint(loaded)
    return {"index": (small, index_module.FORMAT, index_module.VERSION, open_index),
            "checkpoint": ({**model, "state_dict": state}, checkpoint.FORMAT, checkpoint.VERSION, open_checkpoint),
            "whole checkpoint": ({**model, "state_dict": whole["state_dict"]}, checkpoint.FORMAT, checkpoint.VERSION,
                                 lambda path: checkpoint.restore_model(checkpoint.load_checkpoint(path), path))}


def fuzz_bytes(lab, tries, kind):
    record, name, version, load = small_files(lab)[kind]
    storage.save(lab.root / "fuzz", record, name, version)
    whole = (lab.root / "fuzz").read_bytes()

    def attempt(rng, folder):
        (folder / "f").write_bytes(inputs.damaged_bytes(whole, rng))
        load(folder / "f")
    yield from fuzz(lab, tries, attempt)


def fuzz_contents(lab, tries, kind):
    record, name, version, load = small_files(lab)[kind]

    def attempt(rng, folder):
        inputs.raw(folder / "f", inputs.strange_contents(record, rng), name, version)
        load(folder / "f")
    yield from fuzz(lab, tries, attempt)


for _kind, _weight in (("index", 150), ("checkpoint", 150)):
    FAULTS[f"fuzzing: bytes of an {_kind}".replace("an c", "a c")] = \
        lambda lab, tries, kind=_kind, weight=_weight: fuzz_bytes(lab, tries * weight, kind)
for _kind, _weight in (("index", 150), ("checkpoint", 50), ("whole checkpoint", 1)):
    FAULTS[f"fuzzing: contents of a {_kind} with a right checksum".replace("a i", "an i")] = \
        lambda lab, tries, kind=_kind, weight=_weight: fuzz_contents(lab, tries * weight, kind)


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


# ---- Resources and determinism --------------------------------------------------------------------------------------

@fault("leaks: descriptors, shared memory, memory over 1,000 batches")
def _(lab, _tries):
    path = lab.root / "32x32.pth"
    checkpoint.save_checkpoint(path, build_model(default_config([1], height=32, width=32)), {}, {})
    files = sorted((lab.data / "gallery").rglob("*.jpg"))[:80]

    def usage():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return [len(os.listdir("/proc/self/fd")), len(os.listdir("/dev/shm")), pages * 4 >> 10]

    def loop():
        extractor = Extractor(path, precision="fp32", mirror=False, batch_size=4)
        for i in range(50):  # of 20 batches
            extractor.embed(files)
            if i == 9:
                early = usage()
        print(json.dumps([early, usage()]))

    child = Child(lab.root, loop).wait(1800)
    if child.status:
        yield child.err[-200:]
        return
    (fds, shm, memory), (fds_then, shm_then, memory_then) = json.loads(child.out.splitlines()[-1])
    print(f"    after 200 and 1,000 batches: {fds} and {fds_then} descriptors, {memory} and {memory_then} MiB resident")
    yield f"{fds} -> {fds_then} descriptors" if fds_then > fds else ""
    yield f"{shm} -> {shm_then} files in /dev/shm" if shm_then > shm else ""
    yield f"{memory} -> {memory_then} MiB" if memory_then > 1.1 * memory else ""


@fault("same seed, same weights: train.py")
def _(lab, tries):
    for _ in range(tries):
        folder = lab.fresh()
        yield Script(folder, *lab.train(folder)).works() or compare(weights_of, folder, weights_of(lab.trained))
        shutil.rmtree(folder)


@fault("embeddings do not depend on batch size and order")
def _(lab, tries):
    files = sorted((lab.data / "gallery").rglob("*.jpg"))[:40]

    def loop():
        for precision, limit in (("fp32", 1e-6), ("bf16", 1e-3)):
            reference = Extractor(lab.tiny, precision=precision, batch_size=1).embed(files).double()
            for i in range(tries):
                rng = random.Random(i)
                order = rng.sample(range(len(files)), len(files))
                extractor = Extractor(lab.tiny, precision=precision, batch_size=rng.choice([2, 3, 7, 16, 32, 64]))
                rows = extractor.embed([files[k] for k in order]).double()
                off = (1 - torch.nn.functional.cosine_similarity(rows, reference[order])).abs().max().item()
                print(json.dumps([precision, off, limit]))
    child = Child(lab.root, loop).wait(1800)
    results = [json.loads(line) for line in child.out.splitlines() if line.startswith("[")]
    for precision in ("fp32", "bf16"):
        print(f"    {precision}: largest cosine distance {max([off for p, off, _ in results if p == precision], default=None)}")
    yield from (f"{precision}: {off:.1e}" if off > limit else "" for precision, off, limit in results)
    yield from [child.err[-200:] or "no result"] * (2 * tries - len(results))


# ---- The table ------------------------------------------------------------------------------------------------------

def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=100, help="of faults at random; those of a list are tried once each")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="faults whose name contains one of these")
    parser.add_argument("--json", metavar="PATH", help="write the table as rows {name, tries, survived, lost}")
    return parser


def main(args):
    rows = []
    with tempfile.TemporaryDirectory(prefix="reid-faults-") as root:
        lab = Lab(root)
        for name, function in FAULTS.items():
            if not any(word in name for word in args.only):
                continue
            started = time.perf_counter()
            try:
                problems = list(function(lab, args.tries))
            except Skip as reason:
                print(f"{name}: skipped, {reason}", flush=True)
                continue
            lost = [problem for problem in problems if problem]
            rows.append({"name": name, "tries": len(problems), "survived": len(problems) - len(lost), "lost": len(lost)})
            print(f"{name}: {len(problems):,} tries, {len(problems) - len(lost):,} survived, {len(lost):,} lost"
                  f" ({time.perf_counter() - started:.0f} s)", flush=True)
            for problem in sorted(set(lost))[:20]:
                print(f"    LOST: {problem}", flush=True)
    print("\n| fault | tries | survived | lost |\n|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['name']} | {row['tries']:,} | {row['survived']:,} | {row['lost']:,} |")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["lost"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
