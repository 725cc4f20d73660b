"""Faults of benchmarks/faults.py that come from the command line and from what surrounds a process."""

import os
import resource
import shutil
import signal
import stat
import sys
import time

from benchmarks.fault_lab import SCRIPTS, TINY, Child, Script, compare, fault, weights_of

HUGE = str(1 << 70)
NUMBERS = {  # values that nobody means
    "data_prep": {"--num_ids": ["0", "-1", "1"], "--seed": ["-1", HUGE], "--train_share": ["nan", "2", "inf"]},
    "train": {
        "--batch_size": ["0", "-8", "1", HUGE], "--num_instances": ["0", "-4", "1", "8"], "--height": ["0", "-64", "1", HUGE],
        "--width": ["0", "1"], "--lr": ["nan", "-1", "inf"], "--warmup_epochs": ["-1", "nan"], "--num_epochs": ["0", "-1"],
        "--eval_freq": ["0", "-1"], "--num_data_loaders": ["0", "-1"], "--seed": ["-1", HUGE], "--flip": ["nan", "2"],
        "--erase": ["nan", "-1"], "--jitter": ["nan", "-1", "1e9"], "--ema": ["nan", "2", "-1"], "--smoothing": ["nan", "2"],
        "--margin": ["nan"], "--pair_weight": ["nan", "-1"], "--weight_decay": ["nan", "-1"], "--device": ["meta", "cuda:-1"]},
    "eval": {"--batch_size": ["0", "-1", HUGE], "--far": ["0", "-1", "2", "nan"], "--device": ["", "cuda:-1", "cpu:7", "\n"]},
    "inference": {
        "--topk": ["0", "-1", "100000000000", HUGE], "--positions": ["0", "-1", "1000000000"], "--cameras": ["-1", HUGE],
        "--batch_size": ["0", "-1"], "--device": ["meta", "mps", "cuda:99"]},
}
NAMES = ["../x", "..", ".", "", "/tmp/x", "a/b", "a\nb", "con", "nul.txt", "x" * 300, "\udcff", "-x", "~", "a\\b", "a:b", ".x"]
TARGETS = ["device", "link", "folder", "file/x", "x" * 300, "/proc/x", "pipe"]  # for what is written


def clear(script, limit=60):
    """Any end but a traceback, a hang or a crash: success, or one line that begins with the script's name."""
    script.wait(limit)
    last = (script.err.strip().splitlines() or [""])[-1]
    good = script.status == 0 or (script.status in (1, 2) and last.startswith(f"{script.name}.py: error: "))
    return "" if good and "Traceback" not in script.err else script.told()


def given(lab, name):
    """The rest of a command line that works."""
    index = ["--exp_name", "tiny", "--data_root", lab.data, "--load_index", "--gallery_uri", lab.index]
    return {"data_prep": ["--synthetic", "--num_ids", 6, "--output", "out"], "eval": index,
            "train": ["--data_root", lab.data, *TINY, "--num_epochs", 1],
            "inference": [*index, "--query_paths", lab.query, "--output", "r.png"]}[name]


@fault("numbers that nobody means, on the command line")
def _(lab, _tries):
    folder = lab.fresh(model=True)
    for name, options in NUMBERS.items():
        for option, value in ((option, value) for option, values in options.items() for value in values):
            rest = ["--from", lab.data / "gallery", "--output", "out"] if option == "--train_share" else given(lab, name)
            if (name, option) == ("eval", "--batch_size"):
                rest = [arg for arg in rest if arg != "--load_index"]
            problem = clear(Script(folder, name, *rest, f"{option}={value}"))
            yield f"{option}={value:.20}: {problem}" if problem else ""
            shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(folder)


@fault("names of runs and of files to write that are none")
def _(lab, _tries):
    folder, index = lab.fresh(model=True), lab.index
    (folder / "folder").mkdir()
    (folder / "file").touch()
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "device") if os.getuid() else os.mknod(folder / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (folder / "link").symlink_to("/proc/self/fd/1")  # as /dev/stdout
    before = set(lab.root.iterdir())
    tries = [(name, "--exp_name", value) for name in ("train", "eval", "inference") for value in NAMES]
    tries += [(name, option, value) for value in TARGETS for name, option in (
        ("eval", "--json"), ("inference", "--json"), ("inference", "--output"), ("eval", "--report"))]
    for name, option, value in tries:
        problem = clear(Script(folder, name, *given(lab, name), f"{option}={value}"))
        yield f"{name}.py {option}={value!r:.40}: {problem}" if problem else ""
    yield "" if not any((folder / name).is_file() for name in ("pipe", "device")) else "a device or a pipe became a file"
    yield "" if index.exists() and set(lab.root.iterdir()) == before else "written outside of the folder"
    shutil.rmtree(folder)


def without(*streams):
    """As in a service that has closed them."""
    for name in streams:
        os.close(getattr(sys, name).fileno())
        setattr(sys, name, None)


def backwards():
    clock, start = time.time, time.time()
    time.time = lambda: start - 1000 * (clock() - start)


SURROUNDINGS = {  # what is done in a process before its script begins
    "stdout closed": lambda: without("stdout"),
    "stdout and stderr closed": lambda: without("stdout", "stderr"),
    "no home and no TMPDIR": lambda: os.environ.update(HOME="/nowhere", TMPDIR="/nowhere", XDG_CACHE_HOME="/nowhere"),
    "read-only home": lambda: os.environ.update(HOME="/proc", XDG_CONFIG_HOME="/proc", MPLCONFIGDIR="/proc"),
    "ASCII only": lambda: sys.stdout.reconfigure(encoding="ascii"),
    "the clock goes backwards": backwards,
    "a terminal of one column": lambda: os.environ.update(COLUMNS="1", LINES="1"),
    "a proxy that is none": lambda: os.environ.update(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9"),
    "64 file descriptors": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
}


@fault("strange surroundings: data_prep.py, eval.py, inference.py")
def _(lab, _tries):
    folder = lab.fresh(model=True)
    for kind, prepare in SURROUNDINGS.items():
        for name in ("data_prep", "eval", "inference"):
            problem = surrounded(folder, prepare, name, given(lab, name))
            yield problem and f"{kind}, {problem}"
        shutil.rmtree(folder / "out")
    shutil.rmtree(folder)


@fault("strange surroundings: train.py")
def _(lab, _tries):
    for kind, prepare in SURROUNDINGS.items():
        folder = lab.fresh()
        problem = surrounded(folder, prepare, "train", lab.train(folder)[1:])
        problem = problem or compare(weights_of, folder, weights_of(lab.trained))
        yield problem and f"{kind}, {problem}"
        shutil.rmtree(folder)


def surrounded(folder, prepare, name, args):
    """What went wrong in a script that begins after prepare()."""
    child = Child(folder, lambda: (prepare(), Script._main(name, list(map(str, args))))).wait()
    told = " | ".join(child.err.strip().splitlines()[-3:])[-300:]
    return "" if child.status == 0 and "Traceback" not in child.err else f"{name}.py: {child.status}, {told}"


@fault("the reader of a pipe goes away; signals HUP, INT, TERM")
def _(lab, _tries):
    for name in SCRIPTS:
        for how in (signal.SIGPIPE, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            folder = lab.fresh(model=True)
            args = list(map(str, lab.train(folder)[1:] if name == "train" else given(lab, name)))
            if how == signal.SIGPIPE:
                child = Child(folder, _into_closed_pipe, name, args)
            else:
                child = Script(folder, name, *args)
                child.process.join(lab.rng.uniform(0.1, 4 if name == "train" else 0.5))
                if child.process.is_alive():
                    os.kill(child.process.pid, how)
            child.wait()
            told = " | ".join(child.err.strip().splitlines()[-3:])[-300:]
            good = child.status in (0, -how, 128 + how) and "Traceback" not in child.err
            yield "" if good else f"{name}.py, {how.name}: status {child.status}, {told}"
            shutil.rmtree(folder)


def _into_closed_pipe(name, args):
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    sys.stdout = open(1, "w", closefd=False)
    Script._main(name, args)
