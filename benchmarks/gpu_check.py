"""Check what needs a GPU, against the CPU or against itself: run this first on a new machine (about 5 minutes).

Each check prints a line: ok or FAIL, its name, and what it measured. The last line is the number of failed checks, and the exit
status is 1 if there are any. `--device cpu` tries the script itself, on small sizes. All images are drawn or random.
"""

import argparse
import copy
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
import torch.nn.functional as F

import train
from reid import cli
from reid.model import build_model, default_config, pick_device
from reid.retrieval import metrics
from reid.retrieval.extract import Extractor
from reid.retrieval.rerank import rerank
from reid.retrieval.search import ExactSearch
from reid.training import augment
from reid.training.cache import ImageCache
from reid.training.teacher import Teacher
from reid.training.trainer import Trainer

EVERYTHING = ["--ema", "0.9", "--jitter", "0.4", "--gray", "0.2", "--blur", "0.3", "--tint", "0.3", "--clip", "5"]
WAYS = {"eager": (False, "off"), "CUDA graph": (True, "off"), "compiled CUDA graph": (True, "on")}


class Setup:
    """The device and the sizes that suit it. folder: a place for files."""

    def __init__(self, device, folder):
        self.device, self.cuda, self.folder = device, device.type == "cuda", Path(folder)
        self.batch, self.size, self.steps, count = (64, (256, 128), 200, 512) if self.cuda else (8, (64, 32), 2, 16)
        (self.folder / "crops").mkdir()
        self.files = common.draw_images(self.folder / "crops", count)

    def trainer(self, *options, device=None, graph=True):
        """Return a Trainer with the step of train.py, which follows random embeddings of a teacher as well."""
        device = device or self.device
        args = train.get_args_parser().parse_args(["--batch_size", str(self.batch), *options])
        torch.manual_seed(0)
        model = build_model(default_config(list(range(751)), height=self.size[0], width=self.size[1])).to(device)
        teacher = Teacher(1024, torch.randn(self.batch, 64)).to(device)
        learning = [weight for weight in (*model.parameters(), *teacher.parameters()) if weight.requires_grad]
        optimizer = torch.optim.SGD(learning, 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
        trainer = Trainer(model, optimizer, train.train_step, args, 1000, device, teacher)
        trainer.graph_wanted &= graph
        trainer.train()
        return trainer

    def train(self, trainer, first, last):
        """Run the steps from `first` to `last` on four batches in turn; return their losses and the parameters."""
        shape = (4, self.batch, 3, *self.size)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(trainer.device)
        numbers = augment.draw(4, self.batch, 0, 0).to(trainer.device)
        rows = torch.arange(self.batch, device=trainer.device)
        for step in range(first, last):
            trainer.step(pixels[step % 4], numbers[step % 4], rows // 4, rows, 0.01)
        losses = torch.stack(trainer.logged)[len(trainer.logged) - (last - first) :, 0].cpu() if last > first else None
        return losses, torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]).cpu()


def allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def ways_of_the_step(setup):
    """All ways of a step give the same losses and weights, and move the weights, which an empty graph does not.

    Two steps: a change of 1e-7 of the first weights changes the loss of the second by 1e-5, that of the fourth by 1e-2.
    """
    losses, moved = {}, {}
    for way, (graph, compiled) in WAYS.items():
        trainer = setup.trainer("--precision", "fp32", "--compile", compiled if setup.cuda else "off", graph=graph)
        allow_tf32(False)
        start = setup.train(trainer, 0, 0)[1]
        losses[way], end = setup.train(trainer, 0, 2)
        moved[way] = end - start
        taken = trainer.graph is not None, trainer.network is not trainer.model
        apart = (moved[way] - moved["eager"]).norm() / moved["eager"].norm()
        good = taken == (graph and setup.cuda, compiled == "on" and setup.cuda) and moved[way].norm() > 0
        good &= bool(apart < 0.05) and torch.allclose(losses[way], losses["eager"], rtol=5e-3)
        yield f"step, {way}", good, f"moved by {moved[way].norm():.3g}, {apart:.1e} of it apart from eager"
        trainer.close()


def settings_of_the_step(setup):
    """Every setting in a graph, fp16 with its loss scale, and each GPU."""
    runs = [(EVERYTHING, setup.device)]
    if setup.cuda:
        runs += [([*EVERYTHING, "--precision", "fp16"], setup.device), (["--precision", "fp16"], setup.device)]
        runs += [([], torch.device("cuda", i)) for i in reversed(range(torch.cuda.device_count()))]  # ends at the first
    for options, device in runs:
        trainer = setup.trainer(*options, device=device)
        start = setup.train(trainer, 0, 0)[1]
        losses, end = setup.train(trainer, 0, 8)
        good = losses.isfinite().all() and 0 < (end - start).norm() < torch.inf
        yield "step with every setting" if "--ema" in options else "step", good, f"{device}, {trainer.describe()}"
        trainer.close()


def resume(setup):
    trainer, again = setup.trainer(), setup.trainer()
    setup.train(trainer, 0, 3)
    again.load_state(*copy.deepcopy((trainer.model.state_dict(), trainer.state())))
    (losses, end), (losses_again, end_again) = (setup.train(one, 3, 6) for one in (trainer, again))
    yield "resume", torch.allclose(losses, losses_again, rtol=2e-2), f"bit-equal: {torch.equal(end, end_again)}"
    for one in (trainer, again):
        one.close()


def speed_and_memory(setup):
    """The goals are for an H100; compiling should pay."""
    speeds = {}
    for compiled in ("off", "on") if setup.cuda else ("off",):
        if setup.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer = setup.trainer("--compile", compiled)
        setup.train(trainer, 0, 5)
        started = time.perf_counter()
        setup.train(trainer, 5, 5 + setup.steps)
        speed = speeds[compiled] = setup.batch * setup.steps / (time.perf_counter() - started)
        gib = torch.cuda.max_memory_reserved() / 2**30 if setup.cuda else 0
        goal = (2000 if compiled == "off" else max(4000, speeds["off"])) if setup.cuda else 0
        yield f"training speed, compile {compiled}", speed >= goal, f"{speed:,.0f} images/s; the goal is {goal:,.0f}"
        yield f"training memory, compile {compiled}", gib < 6, f"{gib:.2f} GiB reserved; the goal is less than 6"
        trainer.close()


def pixels(setup):
    rows = torch.arange(8).flip(0)
    kept = [ImageCache(setup.files, setup.size, setup.device, where)[rows].cpu() for where in ("device", "host", "none")]
    yield "image cache", all(torch.equal(batch, kept[0]) for batch in kept), "the same on the device, in memory, from files"
    allow_tf32(False)
    numbers, options = augment.draw(1, 8, 0, 0)[0], {"jitter": 0.4, "gray": 0.3, "blur": 0.5, "tint": 0.3}
    ours = augment.apply(kept[0].to(setup.device), numbers.to(setup.device), **options).cpu()
    apart = (augment.apply(kept[0], numbers, **options) - ours).abs()
    yield "augmentation", apart.mean() < 0.05, f"differs by {apart.mean():.3f} on average, {apart.max():.1f} at most, of 255"


def embeddings(setup):
    """Each precision against float32 on the CPU; and a second pass, in which a race of streams would show."""
    checkpoint, some = common.ROOT / "models/masked-hog-908/best.pth", setup.files[:64]
    truth = Extractor(checkpoint, "cpu", "fp32", mirror=False).embed(some)
    least = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999} if setup.cuda else {"fp32": 0.99999}
    for precision, compiled in ((name, way) for name in least for way in (("off", "on") if setup.cuda else ("off",))):
        extractor = Extractor(checkpoint, setup.device, precision, mirror=False, compile=compiled)
        cosine = F.cosine_similarity(extractor.embed(some), truth).min()
        yield f"embedding, {precision}, compile {compiled}", cosine > least[precision], f"lowest cosine {cosine:.6f}"
    extractor = Extractor(checkpoint, setup.device, mirror=False)
    many = (setup.files * 40)[: 20_000 if setup.cuda else 24]
    first, started = extractor.embed(many), time.perf_counter()
    same = torch.equal(extractor.embed(many), first)
    speed = len(many) / (time.perf_counter() - started)
    yield "embedding twice", same, f"bit-equal, {extractor.precision}, {speed:,.0f} files/s"


def searches(setup):
    """Search has the order of float64, metrics are those of the CPU; also where TF32 is switched on for the process."""
    allow_tf32(True)
    gallery = F.normalize(torch.randn(300_000 if setup.cuda else 3000, 256))
    gallery[1::7] = gallery[::7][: len(gallery[1::7])]  # exact ties
    queries = F.normalize(gallery[:40] + 0.05 * torch.randn(40, 256))
    for stored in (gallery, gallery.half()):
        expected = (queries.double() @ stored.double().T).sort(dim=1, descending=True, stable=True).indices[:, :10]
        found = ExactSearch(stored, setup.device).search(queries, 10)[1]
        yield f"search, {stored.dtype}", torch.equal(found, expected), "order of float64, ties by row"
    data, values = common.features(queries=200, gallery=2000), []
    for device in ("cpu", setup.device):
        pair, labels = ([data[name].to(device) for name in names] for names in (("q_emb", "g_emb"), common.LABELS))
        reranked = metrics.evaluate(None, None, *labels, scores=rerank(*pair).scores)
        values.append([metrics.evaluate(*pair, *labels).mAP, metrics.roc(*pair, *labels).tpr[1e-2], reranked.mAP])
    for name, cpu, ours, error in zip(("mAP", "TAR@FAR 1 %", "re-ranked mAP"), *values, (1e-5, 1e-3, 1e-3)):
        yield name, abs(cpu - ours) <= error, f"{ours:.6f}, on the CPU {cpu:.6f}"


def command_line(setup):
    """train.py takes the graph, eval.py finds on the device what it finds on the CPU, and torchrun ends."""
    def run(script, *options, launcher=()):
        command = [str(part) for part in (sys.executable, *launcher, common.ROOT / script, *options)]
        done = subprocess.run(command, cwd=setup.folder, capture_output=True, text=True, timeout=280)
        if done.returncode:
            raise RuntimeError(f"{script}: {(done.stderr.strip() or '?').splitlines()[-1]}")
        return done.stdout

    run("data_prep.py", "--synthetic", "--num_ids", 64 if setup.cuda else 16, "--output", "people")
    options = ["--data_root", "people", "--weights", "none", "--num_epochs", 2, "--warmup_epochs", 1, "--device", setup.device]
    options += [] if setup.cuda else ["--height", 64, "--width", 32, "--batch_size", 8]
    out = run("train.py", *options, "--exp_name", "one", "--compile", "on" if setup.cuda else "off")
    yield "train.py", "going on without" not in out and ("CUDA graph" in out) == setup.cuda, "takes the fastest way of the step"
    tables = []
    for device, index in ((setup.device, "--save_index"), ("cpu", "--load_index")):
        out = run("eval.py", "--exp_name", "one", "--data_root", "people", index, "--rerank", "--device", device)
        rows = re.findall(r"^(?:plain|\+rerank) +(.*)$", out, re.MULTILINE)
        tables.append([float(value) for row in rows for value in re.findall(r"[\d.]+", row)])
    apart = max(abs(one - other) for one, other in zip(*tables, strict=True))
    yield "eval.py", apart < 0.1, f"percentages differ by {apart:.2f} from those of the CPU"
    for count in sorted({1, torch.cuda.device_count()} if setup.cuda else {2}):
        launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count
        run("train.py", *options, "--exp_name", f"ranks-{count}", launcher=launcher)
        yield "torchrun", True, f"ends, processes: {count}"


CHECKS = (ways_of_the_step, settings_of_the_step, resume, speed_and_memory, pixels, embeddings, searches, command_line)


def run_check(check, setup):
    """Run a check and print a line for each result; return the names of those that failed."""
    failed = []
    try:
        for name, good, figure in check(setup):
            print("ok  " if good else "FAIL", f"{name}: {figure}", flush=True)
            failed += [] if good else [name]
    except Exception as error:  # the other checks run all the same
        print("FAIL", f"{check.__name__}: {type(error).__name__}: {cli.first_line(error)}", flush=True)
        failed.append(check.__name__)
    return failed


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(pick_device(args.device), folder)
        failed = [name for check in CHECKS for name in run_check(check, setup)]
    print(f"{len(failed)} checks failed{': ' * bool(failed)}{', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial of the script (default: cuda)")
    cli.run(parser, main)
