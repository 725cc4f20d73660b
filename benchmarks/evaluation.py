"""Evaluation of Market-1501's size: `reid.retrieval.metrics.evaluate` against the loop in Python and the one in Cython.

A and B alternate in one process, and the medians are compared. The Python loop does, query by query, what torchreid's
`eval_market1501` does; the Cython one is built from the PyPI package fastreid (needs pip, Cython, setuptools and a C
compiler; skipped with a line that says so). Both are given a gallery without junk, which they do not know.
"""

import argparse
import concurrent.futures
import ctypes
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

# Waiting threads sleep: where they spin, on a machine that is busy, they take the core from the one they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reid.retrieval.metrics import evaluate

QUERIES, GALLERY, JUNK, DISTRACTORS, PEOPLE, CAMERAS = 3368, 19732, 3819, 2798, 750, 6  # Market-1501's test
MEMORY_BAR = 350  # MB beyond the features
LABELS = ("q_pids", "q_camids", "g_pids", "g_camids")


def random_features(distractors=DISTRACTORS, dim=1024, noise=2.4):
    """Clusters around a centre per person, shifted per camera, with Market-1501's numbers of each kind of image."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(PEOPLE + 1, dim, generator=generator)
    cameras = torch.randn(CAMERAS + 1, dim, generator=generator) / 2
    people = GALLERY - JUNK - DISTRACTORS
    pids = torch.cat([torch.full((JUNK,), -1), torch.zeros(distractors, dtype=torch.long),
                      torch.randint(1, PEOPLE + 1, (people,), generator=generator).sort().values])
    data = {"q_pids": torch.randint(1, PEOPLE + 1, (QUERIES,), generator=generator), "g_pids": pids}
    for side in "qg":
        pids = data[f"{side}_pids"]
        camids = torch.randint(1, CAMERAS + 1, (len(pids),), generator=generator)
        emb = torch.empty(len(pids), dim).normal_(0, noise, generator=generator)
        for part in torch.arange(len(pids)).split(10_000):
            emb[part] += cameras[camids[part]] + centres[pids[part]] * (pids[part, None] > 0)
            emb[part] = torch.nn.functional.normalize(emb[part], dim=1)
        data |= {f"{side}_camids": camids, f"{side}_emb": emb}
    return data


def load_features(path):
    return torch.load(path, weights_only=True) if path else random_features()


def python_loop(distance, q_pids, q_camids, g_pids, g_camids, depth=50):
    """mAP and CMC as in torchreid: sort all, then a pass over the whole gallery for each query."""
    order = np.argsort(distance, axis=1)
    right = (g_pids[order] == q_pids[:, None]).astype(np.int32)
    curves, aps = [], []
    for i in range(len(q_pids)):
        own_camera = (g_pids[order[i]] == q_pids[i]) & (g_camids[order[i]] == q_camids[i])
        hits = right[i][~own_camera]
        if not hits.any():
            continue
        curves.append(np.minimum(hits.cumsum(), 1)[:depth])
        precision = np.asarray([found / (place + 1.0) for place, found in enumerate(hits.cumsum())])
        aps.append((precision * hits).sum() / hits.sum())
    return np.mean(aps), np.asarray(curves, dtype=np.float32).mean(0)


def cython_loop():
    """fastreid's `evaluate_cy`, compiled in a temporary folder, with the interface of `python_loop`; or None."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            quiet = {"cwd": folder, "check": True, "capture_output": True, "text": True, "timeout": 240}
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "fastreid==1.4.0"]
            subprocess.run(pip, **quiet)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                source = wheel.read("fastreid/evaluation/rank_cylib/rank_cy.pyx")
            Path(folder, "rank_cy.pyx").write_bytes(source)
            Path(folder, "setup.py").write_text(
                "import numpy\nfrom setuptools import Extension, setup\nfrom Cython.Build import cythonize\n"
                "setup(ext_modules=cythonize([Extension('rank_cy', ['rank_cy.pyx'], include_dirs=[numpy.get_include()])]))")
            subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], **quiet)
            spec = importlib.util.spec_from_file_location("rank_cy", next(Path(folder).glob("rank_cy*.so")))
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except (subprocess.SubprocessError, OSError, KeyError, ImportError, StopIteration) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            print(f"Cython peer skipped: it could not be built ({' '.join(reason)})")
            return None

    def run(distance, q_pids, q_camids, g_pids, g_camids):
        curve, aps, _ = module.evaluate_cy(distance, q_pids, g_pids, q_camids, g_camids, 50)
        return aps.astype(np.float64).mean(), curve
    return run


def compare(data, queries, rounds):
    """Seconds of ours and of each peer, from a score matrix and from features (which adds the matrix product)."""
    q_emb, labels = data["q_emb"][:queries], [data[name][:queries] if name[0] == "q" else data[name] for name in LABELS]
    clean = data["g_pids"] >= 0
    g_emb, clean_labels = data["g_emb"][clean], [*labels[:2], labels[2][clean], labels[3][clean]]
    arrays = [x.numpy() for x in clean_labels]
    peers = {"Python loop (torchreid's way)": python_loop, "Cython (fastreid 1.4.0)": cython_loop()}
    peers = {name: run for name, run in peers.items() if run}
    times, scores = {}, q_emb @ g_emb.T
    mine = {("scores", "ours"): lambda: evaluate(None, None, *clean_labels, scores=scores),
            ("features", "ours"): lambda: evaluate(q_emb, data["g_emb"], *labels)}
    for run in mine.values():
        ours = run()  # warms up
    print(f"mAP {ours.mAP:.4f} Rank-1 {ours.rank[1]:.4f}")
    for number in range(rounds):
        for key, run in mine.items():
            start = time.perf_counter()
            ours = run()
            times.setdefault(key, []).append(time.perf_counter() - start)
        for name, run in peers.items():
            start = time.perf_counter()
            distance = (1 - q_emb @ g_emb.T).numpy()
            middle = time.perf_counter()
            mean_ap, curve = run(distance, *arrays)
            times.setdefault(("scores", name), []).append(time.perf_counter() - middle)
            times.setdefault(("features", name), []).append(time.perf_counter() - start)
            error = max(abs(mean_ap - ours.mAP), *np.abs(curve[:20] - ours.cmc[:20].numpy()))
            if number == 0:
                print(f"largest difference to {name}: {error:.1e}")
            if error > 1e-6:
                sys.exit(f"evaluation.py: error: {name} gives other values, by {error:.1e}")
    seconds = {key: statistics.median(values) for key, values in times.items()}
    return [row(f"evaluation from {what}, s", seconds[what, "ours"], seconds[what, name], name)
            for name in peers for what in ("scores", "features")]


def row(name, ours, peer, peer_name):
    return {"name": name, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": peer / ours}


def memory_mb(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1000


def measure_memory(path, distractors):
    """MB held before, MB at the peak and seconds of one evaluation; runs in a process of its own."""
    data = load_features(path) if path else random_features(distractors)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = memory_mb("VmRSS"), time.perf_counter()
    evaluate(data["q_emb"], data["g_emb"], *(data[name] for name in LABELS))
    return before, memory_mb("VmHWM"), time.perf_counter() - start


def in_new_process(*args):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(*args).result()


def main(args):
    rows = []
    if os.path.exists("/proc/self/clear_refs"):
        before, peak, _ = in_new_process(measure_memory, args.features, DISTRACTORS)
        rows.append(row("peak memory beyond the features, MB", peak - before, MEMORY_BAR, "bar"))
        if not args.quick:
            before, peak, seconds = in_new_process(measure_memory, None, 500_000 - GALLERY + DISTRACTORS)
            print(f"gallery of 500,000: {seconds:.1f} s, {before:.0f} MB with the features, {peak:.0f} MB at the peak")
            rows.append(row("peak memory with a gallery of 500,000, MB", peak, 4000, "bar"))
    else:
        print("memory skipped: /proc is needed to measure it")
    rows += compare(load_features(args.features), 300 if args.quick else QUERIES, 3)
    for r in rows:
        print(f"{r['name']:45} ours {r['ours']:10.3f}   {r['peer_name']} {r['peer']:.3f}   ratio {r['ratio']:.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", help="a .pt dict of q_emb, g_emb, q_pids, q_camids, g_pids, g_camids (default: random)")
    parser.add_argument("--quick", action="store_true", help="300 queries, and no gallery of 500,000")
    parser.add_argument("--json", help="write the rows to this file")
    main(parser.parse_args())
