"""Faults of benchmarks/faults.py that come in as files: bad images, hostile checkpoints and indexes, fuzzing."""

import json
import os
import random
import shutil
import time

import torch

from benchmarks import fault_inputs as inputs
from benchmarks.fault_lab import FAULTS, NOBODY, TINY, Child, Script, contents, fault
from reid import ReidError, checkpoint
from reid import files as storage
from reid.data.datasets import parse_name, read_folder
from reid.retrieval import index as index_module
from reid.retrieval import spacetime

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
                attempt(random.Random(f"{lab.seed} {i}"), folder)
                problem = ""
            except ReidError as error:
                problem = "" if "\n" not in str(error) else "more than one line"
            except Exception as error:
                problem = f"seed {lab.seed}, input {i}: {type(error).__name__}: {str(error)[:100]}"
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
        loaded.nearest(torch.ones(1, 1024) / 32, 3, camids=[1])
        assert len(list(loaded.paths)) == len(loaded.records()) == len(loaded)

    evidence = spacetime.fit(torch.tensor([1, 1, 2, 2]), torch.tensor([1, 2] * 2), torch.ones(4).long(), torch.arange(4) * 100)

    def open_spacetime(path):
        loaded, one = spacetime.SpaceTime.load(path, "0" * 16, "people"), torch.ones(1, dtype=torch.int64)
        assert torch.isfinite(loaded.fuse(torch.ones(1, 1), loaded.prob(*[one] * 6))).all()

    whole = contents(lab.tiny, checkpoint)
    state = {key: whole["state_dict"][key] for key in ("neck.weight", "classifier.weight", "body.norm0.running_mean")}
    model = {"config": whole["config"], "metrics": {"val/accuracy": 0.5}, "args": {"lr": 0.1}, "versions": whole["versions"]}

    def open_checkpoint(path):
        loaded = checkpoint.load_checkpoint(path)
        checkpoint.fingerprint(loaded)
    return {"camera and time model": (vars(evidence) | {"fingerprint": "0" * 16, "dataset": spacetime.dataset_name("people")},
                                      spacetime.FORMAT, spacetime.VERSION, open_spacetime),
            "index": (small, index_module.FORMAT, index_module.VERSION, open_index),
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
for _kind, _weight in (("index", 150), ("checkpoint", 50), ("whole checkpoint", 1), ("camera and time model", 20)):
    FAULTS[f"fuzzing: contents of a {_kind} with a right checksum".replace("a i", "an i")] = \
        lambda lab, tries, kind=_kind, weight=_weight: fuzz_contents(lab, tries * weight, kind)
