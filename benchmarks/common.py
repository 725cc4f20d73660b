"""Shared parts of the benchmarks: the command line, timing several sides in turn, rows and the table of rows.

A benchmark is a generator of rows. Import this module first: it makes the package importable from any working folder.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reid import cli

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("q_pids", "q_camids", "g_pids", "g_camids")
QUERIES, GALLERY = 3368, 19732  # images in the test set of Market-1501; the gallery contains those of the next line
JUNK, DISTRACTORS, PEOPLE, CAMERAS = 3819, 2798, 750, 6
COLUMNS = "{:<56} {:>12} {:>12} {:>7}  {}"


def get_args_parser(description, quick, rounds=5):
    """Return a parser with the options that all benchmarks have. quick: help of --quick."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{quick}; ends within 5 minutes on 2 cores")
    parser.add_argument("--rounds", type=int, default=rounds, help="times that all sides run (default: %(default)s)")
    parser.add_argument("--json", metavar="PATH", help='write {"rows": [{"name", "ours", "peer", "peer_name", "ratio"}]}')
    return parser


def run(parser, benchmark):
    """Run a script whose `benchmark(args)` yields rows: print each row when it comes, and write all of them to --json."""
    def main(args):
        rows = []
        print(COLUMNS.format("", "ours", "peer", "ratio", "peer"), flush=True)
        for found in benchmark(args):
            rows.append(found)
            numbers = ("-" if found[key] is None else f"{found[key]:,.4g}" if found[key] < 100 else f"{found[key]:,.0f}"
                       for key in ("ours", "peer", "ratio"))
            print(COLUMNS.format(found["name"], *numbers, found["peer_name"]), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    cli.run(parser, main)


def in_turn(sides, rounds, repeat=1):
    """Call the functions `sides` one after the other in every round.

    Returns a list of `rounds` times for every side, in seconds per call; each function is called `repeat` times a round.
    """
    seconds = [[] for _ in sides]
    for _ in range(rounds):
        for side, times in zip(sides, seconds):
            started = time.perf_counter()
            for _ in range(repeat):
                side()
            times.append((time.perf_counter() - started) / repeat)
    return seconds


def row(name, ours, peer, peer_name, higher_is_better=False, **more):
    """Return a row of the table from the figures of all rounds.

    `ours` and `peer` are medians. `ratio` is the median over the rounds of one side divided by the other, so that a
    disturbance of one round counts once; over 1, ours is better. peer: None if the package is not installed.
    """
    if peer is None:
        median, ratio, peer_name = None, None, f"{peer_name}: peer not installed"
    else:
        median = statistics.median(peer)
        ratio = statistics.median(a / b if higher_is_better else b / a for a, b in zip(ours, peer))
    return {"name": name, "ours": statistics.median(ours), "peer": median, "peer_name": peer_name, "ratio": ratio, **more}


def peak_memory(function):
    """Call `function` and return (its result, megabytes held at its peak beyond those before it; NaN without /proc)."""
    def megabytes(field):
        return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1000

    marks = Path("/proc/self/clear_refs")
    if not marks.exists():
        return function(), float("nan")
    ctypes.CDLL(None).malloc_trim(0)
    marks.write_text("5")  # resets the peak
    before = megabytes("VmRSS")
    return function(), megabytes("VmHWM") - before


def draw_images(folder, count):
    """Write `count` JPEG files of the size of Market-1501's (64 x 128, about 2.4 kB); return their paths."""
    generator, files = torch.Generator().manual_seed(0), []
    for i in range(count):
        pixels = F.interpolate(torch.rand(1, 3, 16, 8, generator=generator), (128, 64), mode="bicubic")[0]
        pixels = (255 * (pixels + 0.02 * torch.randn(3, 128, 64, generator=generator)).clamp(0, 1)).to(torch.uint8)
        files.append(Path(folder, f"{i:05}.jpg"))
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(files[-1], quality=75)
    return files


def features(path=None, queries=QUERIES, gallery=GALLERY):
    """Return embeddings and labels of a test set: {"q_emb", "g_emb", "q_pids", "q_camids", "g_pids", "g_camids"}.

    Without `path` (a .pt file with such a dict, thinned evenly to the sizes asked for) they are random and normalised: a
    centre for each person, a shift for each camera, noise; junk and distractors in the proportions of Market-1501.
    """
    if path:
        data = torch.load(path, weights_only=True)
        wanted = {"q": queries, "g": gallery}
        return {name: value[torch.arange(n) * len(value) // n] for name, value in data.items() if torch.is_tensor(value)
                for n in [min(wanted[name[0]], len(value))]}
    generator = torch.Generator().manual_seed(0)
    centres, shifts = (torch.randn(n + 1, 1024, generator=generator) for n in (PEOPLE, CAMERAS))
    junk = gallery * JUNK // GALLERY
    people = min(gallery, GALLERY) * (GALLERY - JUNK - DISTRACTORS) // GALLERY  # a larger gallery has more distractors
    pids = {side: torch.randint(1, PEOPLE + 1, (n,), generator=generator) for side, n in (("q", queries), ("g", people))}
    pids["g"] = torch.cat([torch.full((junk,), -1), torch.zeros(gallery - junk - people, dtype=torch.long), pids["g"]])
    data = {}
    for side in "qg":
        camids = torch.randint(1, CAMERAS + 1, (len(pids[side]),), generator=generator)
        embeddings = torch.empty(len(camids), 1024).normal_(0, 2.4, generator=generator)
        for part in torch.arange(len(camids)).split(10_000):  # in parts: the largest gallery takes 2 GB
            of_person = centres[pids[side][part].clamp(min=0)] * (pids[side][part, None] > 0)
            embeddings[part] = F.normalize(embeddings[part] + of_person + shifts[camids[part]] / 2, dim=1)
        data |= {f"{side}_emb": embeddings, f"{side}_pids": pids[side], f"{side}_camids": camids}
    return data
