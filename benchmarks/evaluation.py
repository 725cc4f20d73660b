"""Speed and memory of `reid.retrieval.metrics.evaluate` on a test set of the size of Market-1501's.

The Python loop does, query by query, what torchreid's `eval_market1501` does. The Cython loop is compiled from the PyPI
package fastreid (this needs pip, Cython, setuptools and a C compiler). Both take a gallery without junk images, which they
do not handle. All values must agree to 1e-6.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Threads that wait must sleep: on a busy machine, spinning ones take the core of the thread that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import common
import numpy as np

from reid import ReidError
from reid.retrieval.metrics import evaluate

MEMORY_LIMIT = 350  # MB beyond the embeddings
LARGE, LARGE_LIMIT = 500_000, 4000  # images, MB with the embeddings


def python_loop(distance, q_pids, q_camids, g_pids, g_camids, depth=50):
    """Return (mAP, CMC [depth]) as torchreid does: sort everything, then read the whole gallery for each query."""
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
    """Compile fastreid's `evaluate_cy` in a temporary folder; return it in the form of `python_loop`, or None."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            quiet = {"cwd": folder, "check": True, "capture_output": True, "text": True, "timeout": 240}
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "fastreid==1.4.0"]
            subprocess.run(pip, **quiet)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                Path(folder, "rank_cy.pyx").write_bytes(wheel.read("fastreid/evaluation/rank_cylib/rank_cy.pyx"))
            Path(folder, "setup.py").write_text(
                "import numpy\nfrom setuptools import Extension, setup\nfrom Cython.Build import cythonize\n"
                "setup(ext_modules=cythonize([Extension('rank_cy', ['rank_cy.pyx'], include_dirs=[numpy.get_include()])]))")
            subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], **quiet)
            spec = importlib.util.spec_from_file_location("rank_cy", next(Path(folder).glob("rank_cy*.so")))
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except (subprocess.SubprocessError, OSError, KeyError, ImportError, StopIteration) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            print(f"the Cython loop could not be built ({' '.join(reason)})")
            return None

    def loop(distance, q_pids, q_camids, g_pids, g_camids):
        curve, aps, _ = module.evaluate_cy(distance, q_pids, g_pids, q_camids, g_camids, 50)
        return aps.astype(np.float64).mean(), curve
    return loop


def speeds(data, rounds):
    """Yield rows: from a score matrix, and from embeddings, which adds the matrix product to both sides."""
    labels, clean = [data[name] for name in common.LABELS], data["g_pids"] >= 0
    q_emb, g_emb, clean_labels = data["q_emb"], data["g_emb"][clean], [*labels[:2], labels[2][clean], labels[3][clean]]
    scores, arrays = q_emb @ g_emb.T, [label.numpy() for label in clean_labels]
    distance = (1 - scores).numpy()
    peers = {"Python loop (as torchreid)": python_loop, "Cython loop (fastreid 1.4.0)": cython_loop()}
    found = {}

    def from_peer(name, loop):
        found[name] = loop(distance, *arrays)

    built = {name: lambda name=name, loop=loop: from_peer(name, loop) for name, loop in peers.items() if loop}
    sides = [lambda: evaluate(None, None, *clean_labels, scores=scores), lambda: evaluate(q_emb, data["g_emb"], *labels),
             lambda: (1 - q_emb @ g_emb.T).numpy(), *built.values()]
    ours = [side() for side in sides[:3]][1]  # the first calls are not timed
    from_scores, from_embeddings, product, *loops = common.in_turn(sides, rounds)
    loops = dict(zip(built, loops))
    for name in peers:
        times, more = loops.get(name), {}
        if times:
            mean_ap, curve = found[name]
            more["largest_difference"] = float(max(abs(mean_ap - ours.mAP), *np.abs(curve[:20] - ours.cmc[:20].numpy())))
            if more["largest_difference"] > 1e-6:
                raise ReidError(f"{name} gives other values, by {more['largest_difference']:.1e}")
        yield common.row("CMC and mAP from scores, s", from_scores, times, name, **more)
        times = times and [sum(pair) for pair in zip(product, times)]
        yield common.row("CMC and mAP from embeddings, s", from_embeddings, times, name, **more)


def memory(data):
    """Return the megabytes of an evaluation at its peak beyond the embeddings, and those of the embeddings."""
    labels = [data[name] for name in common.LABELS]
    peak = common.peak_memory(lambda: evaluate(data["q_emb"], data["g_emb"], *labels))[1]
    return peak, (data["q_emb"].nbytes + data["g_emb"].nbytes) / 1e6


def benchmark(args):
    data = common.features(args.features)
    yield common.row("peak memory beyond the embeddings, MB", [memory(data)[0]], [MEMORY_LIMIT], "limit")
    if not args.quick:
        total = sum(memory(common.features(gallery=LARGE)))
        yield common.row(f"peak memory, gallery of {LARGE:,}, MB", [total], [LARGE_LIMIT], "limit")
    if args.quick:
        data |= {name: data[name][:300] for name in ("q_emb", "q_pids", "q_camids")}
    yield from speeds(data, args.rounds)


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "300 queries, and no gallery of 500,000", rounds=3)
    parser.add_argument("--features", metavar="PATH", help="a .pt dict of q_emb, g_emb, their pids and camids (default: random)")
    common.run(parser, benchmark)
