"""Fault injection: kills, starves and misleads the scripts, and counts what is lost.

    python benchmarks/faults.py                               everything, 100 tries each: hours on two cores
    python benchmarks/faults.py --tries 10 --only kill disk   the faults whose names contain one of the words
    python benchmarks/faults.py --merge a.json b.json         one table of several parts (--seed, --minutes, --json)

The scripts run as forks of this process, with their real command lines: a kill at a random moment then hits work, and not
mostly the import of libraries. Full and read-only disks are small tmpfs mounts and need root. Prints
`fault, tries, survived, lost`, and what was lost.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork may not inherit threads, and bits depend on their number

import torch  # noqa: E402

from benchmarks import fault_crashes, fault_files, fault_misuse  # noqa: E402, F401 (they fill FAULTS)
from benchmarks.fault_lab import FAULTS, Child, Lab, Script, Skip, compare, fault, weights_of  # noqa: E402
from reid import checkpoint  # noqa: E402
from reid.model import build_model, default_config  # noqa: E402
from reid.retrieval.extract import Extractor  # noqa: E402

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
                rng = random.Random(f"{lab.seed} {i}")
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
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no new try of a fault begins")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="faults whose name contains one of these")
    parser.add_argument("--seed", type=int, default=0, help="of what is at random; the lists of faults are always the same")
    parser.add_argument("--json", metavar="PATH", help="write the table as rows {name, tries, survived, lost}")
    parser.add_argument("--merge", nargs="+", metavar="PATH", help="inject nothing, add up the tables of earlier runs")
    return parser


def main(args):
    rows = merged(args.merge) if args.merge else inject(args)
    print("\n| fault | tries | survived | lost |\n|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['name']} | {row['tries']:,} | {row['survived']:,} | {row['lost']:,} |")
    write(args.json, rows)
    return 1 if any(row["lost"] for row in rows) else 0


def write(path, rows):
    if path:
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def merged(paths):
    """The rows of several runs, those of one fault added up, in the order of FAULTS."""
    counts = {name: Counter() for name in FAULTS}
    for path in paths:
        for row in json.loads(Path(path).read_text()):
            counts[row.pop("name")].update(row)
    return [{"name": name, **{key: count[key] for key in ("tries", "survived", "lost")}}
            for name, count in counts.items() if count]


def until(end, tries):
    for problem in tries:
        yield problem
        if time.perf_counter() > end:
            return


def inject(args):
    rows = []
    with tempfile.TemporaryDirectory(prefix="reid-faults-") as root:
        lab = Lab(root, args.seed)
        for name, function in FAULTS.items():
            if not any(word in name for word in args.only):
                continue
            started = time.perf_counter()
            try:
                problems = list(until(started + 60 * args.minutes, function(lab, args.tries)))
            except Skip as reason:
                print(f"{name}: skipped, {reason}", flush=True)
                continue
            lost = [problem for problem in problems if problem]
            rows.append({"name": name, "tries": len(problems), "survived": len(problems) - len(lost), "lost": len(lost)})
            print(f"{name}: {len(problems):,} tries, {len(problems) - len(lost):,} survived, {len(lost):,} lost"
                  f" ({time.perf_counter() - started:.0f} s)", flush=True)
            for problem in sorted(set(lost))[:20]:
                print(f"    LOST: {problem}", flush=True)
            write(args.json, rows)  # a part that is stopped counts as far as it came
    return rows


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
