"""A training run: its name, folder and lock, what it saves, and how it goes on after a stop."""

import argparse
import os
import shlex
import signal
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from reid import ReidError, distributed
from reid.checkpoint import FORMAT, VERSION, check_name, checkpoint_payload, load_checkpoint
from reid.cli import check_ranges, first_line
from reid.files import checksum, locked, save

SCORES = {"val/mAP": 1, "val/accuracy": 1, "val/loss": -1}  # what chooses best.pth, those further back where others are equal
MANY = 1 << 20
LIMITS = dict.fromkeys(["flip", "erase", "jitter", "gray", "blur", "tint", "smoothing", "ema", "weight_decay"], (0, 1)) | {
    "held_out": (0, 0.5), "batch_size": (2, MANY), "num_instances": (2, MANY), "height": (32, 2048), "width": (32, 2048),
    "num_data_loaders": (0, 1024), "num_epochs": (1, MANY), "eval_freq": (1, MANY), "warmup_epochs": (0, MANY), "lr": (0, 1e38),
    "triplet_weight": (0, MANY), "margin": (-MANY, MANY), "distill": (0, MANY), "cosine": (0, MANY), "clip": (0, 1e38),
    "unlabelled_batch": (1, MANY), "seed": (0, 1 << 40)}
# settings of earlier versions, and the only value that a run may have had to be resumed
REMOVED = {"pair_loss": "triplet", "mixstyle": 0, "ibn": False, "grid": 0, "jpeg": 0, "dropout": 0, "drop_path": 0, "swa": 0,
           "pool": "avg", "last_stride": 1}


class Parser(argparse.ArgumentParser):
    """Parse into a Namespace whose `typed` lists the arguments that were given, also where they equal the default."""

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        given = argparse.Namespace(**dict.fromkeys(vars(found), unset := object()))  # only typed ones are replaced
        super().parse_known_args(args, given)
        found.typed = sorted(key for key, value in vars(given).items() if value is not unset)
        return found, rest


class Run:
    """`models/<name>/`, locked for as long as this process lives.

    With --resume the settings are those of the run: one typed differently raises ReidError, unless it is `operational`, a setting
    that does not change the result. Rank 0 locks and reads; the others receive what it has read.
    """

    def __init__(self, args, parser, operational):
        typed = set(vars(args).pop("typed", ()))
        check_ranges(args, LIMITS)
        if args.resume and not args.exp_name:
            raise ReidError("--resume needs the --exp_name of the run to go on with")
        self.writer, self.writing, self.best = ThreadPoolExecutor(1), None, None
        if distributed.rank == 0 and not args.exp_name:
            from reid.training.tracking import new_run_name

            args.exp_name = new_run_name()
        self.name = args.exp_name = check_name(distributed.share(args.exp_name))
        self.folder = Path("models") / self.name
        self.state = distributed.share(self._lock(args.resume) if distributed.rank == 0 else None)
        self.args = self._settings(args, typed, parser, operational) if self.state else args
        self.tracker_id = self.state["training"].get("tracker_id") if self.state else None

    def _lock(self, resume):
        """Lock the run, and return what its last.pth holds, or None for a new run."""
        lock = self.folder.parent / f".{self.name}.lock"  # beside the folder, which may be removed while it is in use
        held = ExitStack()
        held.enter_context(locked(lock, f"another process is training {self.name}; wait for it, or choose another --exp_name"))
        held.callback(_leave, lock.absolute(), self.folder.absolute(), Path("runs", self.name).absolute())
        held.callback(self.writer.shutdown)  # first, so that the last file is written
        weakref.finalize(self, held.close)  # however the run ends, except by kill -9
        if resume and not (self.folder / "last.pth").is_file():
            known = ", ".join(sorted(path.parent.name for path in self.folder.parent.glob("*/last.pth"))) or "none"
            raise ReidError(f"--resume: no {self.folder / 'last.pth'}; runs that can go on: {known}. A new run takes no --resume")
        if resume:
            return load_checkpoint(self.folder / "last.pth")
        if any((self.folder / name).exists() for name in ("last.pth", "best.pth")):
            raise ReidError(f"--exp_name {self.name}: {self.folder} exists; add --resume to go on, or choose another name")
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder.is_dir() and os.access(self.folder, os.W_OK)):  # else the first epoch would be lost
            raise ReidError(f"--exp_name {self.name}: {self.folder} is no folder that can be written; choose another name")
        return None

    def _settings(self, args, typed, parser, operational):
        saved, training, last = self.state["args"], self.state.get("training"), self.folder / "last.pth"
        if not isinstance(training, dict) or not all(isinstance(training.get(key), int) for key in ("epoch", "step")) \
                or not isinstance(training.get("best"), (list, type(None))):
            raise ReidError(f"{last}: holds no training state, so it cannot be resumed")
        defaults = {key: parser.get_default(key) for key in saved}
        wrong = [key for key, value in defaults.items() if value is not None and not isinstance(
            saved[key], (int, float) if isinstance(value, float) else type(value))]
        if wrong or not all(isinstance(key, str) for key in saved):
            raise ReidError(f"{last}: settings of the wrong type ({', '.join(map(str, wrong[:3]))}); it is damaged or not ours")
        for key, only in REMOVED.items():
            if key in saved and saved[key] != only:
                raise ReidError(f"{last}: trained with --{key} {saved[key]}, which this version does not have; start a new run")
        saved = {"held_out": 0.0} | {key: value for key, value in saved.items() if key not in REMOVED}  # 0: earlier versions
        check_ranges(argparse.Namespace(**saved), LIMITS)
        given = {key: value for key, value in vars(args).items() if key in typed or key not in saved}
        for key, value in sorted(given.items()):
            if key not in operational and saved.get(key, value) != value:
                raise ReidError(f"--resume goes on with --{key} {saved[key]}, not {value}; leave it out, or start a new run")
        return argparse.Namespace(**saved | given)

    def restore(self, trainer, files, validation=()):
        """Bring the trainer to where the run has stopped, and return (epoch, step within it) to go on at.

        files: the paths of the training images, those without identities included; validation: those of the images that choose
        best.pth. Raises ReidError if they, or the embeddings of a teacher, are not those that the run was started with.
        """
        names, others = ([f"{Path(file).parent.name}/{Path(file).name} of {os.path.getsize(file)} bytes" for file in part]
                         for part in (files, validation))
        targets = [value for name, value in sorted(trainer.teacher.named_buffers())] if trainer.teacher else []
        self.images = [len(names), checksum(names + targets), checksum(others)]
        if not self.state:
            return 0, 0
        training, last = self.state["training"], self.folder / "last.pth"
        known = training.get("images")  # of older checkpoints without the validation, or missing
        if list(self.state["config"]["classes"]) != list(trainer.model.config["classes"]) \
                or not (known is None or known in (self.images, self.images[:2])):
            raise ReidError(f"{last}: was trained or validated on other images or embeddings than these {len(names):,}; give the "
                            "same --data_root, --unlabelled and --teacher")
        if not 0 <= training["step"] < trainer.steps or training["epoch"] < 0:
            raise ReidError(f"{last}: stopped at step {training['step']} of an epoch that has {trainer.steps}; it is damaged")
        try:
            trainer.load_state(self.state["state_dict"], training)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ReidError(f"{last}: does not fit this training set or version ({first_line(error)})") from error
        self.best = training["best"]
        if training.get("is_best") and distributed.rank == 0:  # the run may have been killed after last.pth, before best.pth
            self.later(self._save, best=self._payload(trainer.best_model, self.state["metrics"] | {"epoch": training["epoch"]}))
        self.state = None  # its weights are no longer needed
        return training["epoch"], training["step"]

    def check_tracking(self):
        """Open the store of MLflow and the folder of TensorBoard; raises ReidError if that fails."""
        if distributed.rank == 0:
            from reid.training.tracking import Tracker

            self.tracker = Tracker(self.name, vars(self.args), self.tracker_id, {"exp_tag": self.args.exp_tag})

    @contextmanager
    def tracking(self):
        """Yield the tracker of this run on rank 0, None on the others; it records how the block has ended."""
        if distributed.rank:
            yield None
            return
        with self.tracker as tracker:
            self.tracker_id = tracker.run_id
            try:
                yield tracker
            finally:
                self.wait()

    def epoch_done(self, trainer, epoch, metrics, tracker, best=None):
        """Save and log in the background. best: whether these weights are the best; None compares their SCORES."""
        if distributed.rank:
            return
        self.wait()
        if self.best is not None and not (self.folder / "best.pth").exists():
            print(f"warning: {self.folder / 'best.pth'} has been removed; the best of the epochs from {epoch} on takes its place",
                  file=sys.stderr)
            self.best = None
        score = [sign * metrics[name] for name, sign in SCORES.items() if name in metrics]
        if best is None and score:
            best = self.best is None or score > self.best
            self.best = list(score) if best else self.best
        last = self._last(trainer, epoch, 0, metrics, bool(best))
        best = self._payload(trainer.best_model, metrics | {"epoch": epoch}) if best else None
        values = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())

        def save_and_log():
            self._save(last, best)
            tracker.log(metrics, epoch)
            if best:
                tracker.artifact_reference(self.folder / "best.pth")
            print(f"epoch {epoch}/{self.args.num_epochs}: {values}", flush=True)

        self.later(save_and_log)

    def stopped(self, trainer, epoch, step):
        """Save after `epoch` epochs and `step` steps of the next, and raise KeyboardInterrupt with the command to go on."""
        trainer.synchronise()
        if distributed.rank == 0:
            self.wait()
            self._save(self._last(trainer, epoch, step))
        distributed.any_(True)  # when a process ends, torchrun kills the others: not before last.pth is written
        start = f"torchrun --nproc_per_node {distributed.world_size}" if distributed.world_size > 1 else "python"
        raise KeyboardInterrupt(f"saved; go on with: {start} train.py --resume --exp_name {self.name}")

    def _last(self, trainer, epoch, step, metrics=None, is_best=False):
        return self._payload(trainer.model, metrics or {}, trainer.state() | {
            "epoch": epoch, "step": step, "best": self.best, "is_best": is_best, "images": self.images,
            "tracker_id": self.tracker_id})

    def _payload(self, model, metrics, training=None):
        return checkpoint_payload(model, metrics, vars(self.args), training)

    def _save(self, last=None, best=None):
        for name, payload in (("last.pth", last), ("best.pth", best)):
            if payload:
                save(self.folder / name, payload, FORMAT, VERSION)

    def later(self, work, *args, **options):
        """Call `work` in a thread, after what is waiting there: training goes on without waiting for the disk."""
        self.wait()
        self.writing = self.writer.submit(work, *args, **options)

    def wait(self):
        """Wait until everything is written and logged; what went wrong there is raised here."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()

    def finish(self):
        """Say where the weights are, and leave the process group."""
        if distributed.rank == 0:
            print(f"done: {self.folder / 'best.pth'}; evaluate with: python eval.py --exp_name {self.name} "
                  f"--data_root {shlex.quote(self.args.data_root[0])} --save_index")
        distributed.stop()


class StopSignal:
    """Let Ctrl-C, TERM and HUP ask for a stop after the current step, so that what is saved is a whole step."""

    def __init__(self, second_kills):
        self.asked, self.second_kills = False, second_kills
        with suppress(ValueError):  # not in the main thread, as when a notebook calls main()
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no HUP, and nohup ignores it
                if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    signal.signal(number, self.ask)

    def ask(self, number, _frame):
        self.asked = True
        if number == getattr(signal, "SIGHUP", None):  # the terminal has gone, and printing to it would fail
            for stream in (1, 2):
                if os.isatty(stream):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        elif self.second_kills:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _leave(lock, *folders):
    """Remove the lock of a run that is over, and its folders if nothing was saved in them."""
    for remove in (lock.unlink, *(folder.rmdir for folder in folders)):
        with suppress(OSError):
            remove()
