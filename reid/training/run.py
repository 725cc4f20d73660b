"""A training run: its name and folder, what it trains on, what it saves, and how it goes on after a stop."""

import argparse
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from reid import ReidError, distributed
from reid.checkpoint import FORMAT, VERSION, check_name, checkpoint_payload, load_checkpoint
from reid.cli import check_ranges
from reid.files import locked, save

MANY = 1 << 20
SHARES = ["flip", "erase", "jitter", "gray", "blur", "jpeg", "grid", "mixstyle", "dropout", "drop_path", "smoothing", "ema"]
LIMITS = dict.fromkeys(SHARES, (0, 1)) | {
    "batch_size": (2, MANY), "num_instances": (2, MANY), "height": (32, 2048), "width": (32, 2048), "num_data_loaders": (0, 1024),
    "num_epochs": (1, MANY), "eval_freq": (1, MANY), "warmup_epochs": (0, MANY), "swa": (0, MANY), "lr": (0, 1e38),
    "weight_decay": (0, 1), "pair_weight": (0, MANY), "margin": (-MANY, MANY), "distill": (0, MANY), "seed": (0, 1 << 40)}


def _leave(folder):
    """Remove what a run that is over needs no more: its lock, and the folder if nothing was saved in it."""
    with suppress(OSError):
        (folder / ".lock").unlink(missing_ok=True)
        folder.rmdir()


class Run:
    """`models/<name>/`, held by a lock for as long as this process lives.

    With --resume the settings are those of the run: one given differently on the command line, other than the
    `operational` ones, raises ReidError.
    """

    def __init__(self, args, parser, operational):
        check_ranges(args, LIMITS)
        self.state, self.best = None, None
        self.writer, self.writing = ThreadPoolExecutor(1), None
        if args.resume and not args.exp_name:
            raise ReidError("--resume needs the --exp_name of the run to go on with")
        if not args.exp_name:
            from reid.training.tracking import new_run_name

            args.exp_name = distributed.share(new_run_name() if distributed.rank == 0 else None)
        self.name, self.folder = args.exp_name, Path("models") / check_name(args.exp_name)
        if args.resume:
            self.state = load_checkpoint(self.folder / "last.pth")
            args = self._settings_of_the_run(args, parser, operational)
        elif any((self.folder / name).exists() for name in ("last.pth", "best.pth")):
            raise ReidError(f"--exp_name {self.name}: {self.folder} exists; add --resume to go on, or choose another name")
        self.args = args
        if distributed.rank == 0:
            held, message = ExitStack(), f"another process is training {self.name}; wait for it, or choose another --exp_name"
            held.enter_context(locked(self.folder / ".lock", message))
            held.callback(_leave, self.folder.absolute())
            held.callback(self.writer.shutdown)  # first, so that the last write is done
            weakref.finalize(self, held.close)  # however the run ends, short of kill -9
        self.tracker_id = (self.state or {}).get("training", {}).get("tracker_id")

    def _settings_of_the_run(self, args, parser, operational):
        saved, training, last = self.state["args"], self.state.get("training"), self.folder / "last.pth"
        if not isinstance(training, dict) or not all(isinstance(training.get(key), int) for key in ("epoch", "step")) \
                or not isinstance(training.get("best"), (list, type(None))):
            raise ReidError(f"{last}: holds no training state, so it cannot be resumed")
        defaults = {key: parser.get_default(key) for key in saved}
        wrong = [key for key, value in defaults.items() if value is not None and not isinstance(
            saved[key], (int, float) if isinstance(value, float) else type(value))]
        if wrong or not all(isinstance(key, str) for key in saved):
            raise ReidError(f"{last}: settings of the wrong type ({', '.join(map(str, wrong[:3]))}); it is damaged or not ours")
        check_ranges(argparse.Namespace(**saved), LIMITS)
        for key, value in vars(args).items():
            if key in operational or key not in saved:
                continue
            if value != parser.get_default(key) and value != saved[key]:
                raise ReidError(f"--resume goes on with --{key} {saved[key]}, not {value}; leave it out, or start a new run")
        kept = {key: value for key, value in vars(args).items() if key in operational or key not in saved}
        return argparse.Namespace(**{**saved, **kept})

    def restore(self, engine):
        """Bring the engine to where the run stopped; returns (epoch, step within it) to go on at."""
        if not self.state:
            return 0, 0
        training = self.state["training"]
        try:
            engine.load_state(self.state["state_dict"], training)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0][:120]
            raise ReidError(f"{self.folder / 'last.pth'}: does not fit this training set or code ({reason})") from error
        self.best = training["best"]
        if training.get("is_best") and distributed.rank == 0:  # the run may have been killed before best.pth followed last.pth
            self._write("best.pth", engine.best_model, self.state["metrics"] | {"epoch": training["epoch"]})
        self.state = None  # the weights in it are no longer needed
        return training["epoch"], training["step"]

    @contextmanager
    def tracking(self):
        """The tracker of this run on rank 0, None on the others; it is told how the run ended."""
        if distributed.rank:
            yield None
            return
        from reid.training.tracking import Tracker

        with Tracker(self.name, vars(self.args), run_id=self.tracker_id, tags={"exp_tag": self.args.exp_tag}) as tracker:
            self.tracker_id = tracker.run_id
            yield tracker

    def epoch_done(self, engine, epoch, metrics, tracker, best=None):
        """Save and log. `best` says whether these weights are the best; None: compare on val/."""
        if distributed.rank:
            return
        if best is None and "val/accuracy" in metrics:
            score = (metrics["val/accuracy"], -metrics["val/loss"])
            best = self.best is None or score > tuple(self.best)
            self.best = list(score) if best else self.best
        self.save_last(engine, epoch, 0, metrics, bool(best))
        if best:
            self._write("best.pth", engine.best_model, metrics | {"epoch": epoch})
        tracker.log(metrics, epoch)
        if best:
            self.wait()
            tracker.artifact_reference(self.folder / "best.pth")
        values = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())
        print(f"epoch {epoch}/{self.args.num_epochs}: {values}", flush=True)

    def save_last(self, engine, epoch, step, metrics=None, is_best=False):
        """Write last.pth: `epoch` epochs and `step` steps of the next are done; `is_best`: best.pth will be the same weights."""
        if distributed.rank == 0:
            training = engine.state() | {"epoch": epoch, "step": step, "best": self.best, "is_best": is_best,
                                         "tracker_id": self.tracker_id}
            self._write("last.pth", engine.model, metrics or {}, training)

    def _write(self, name, model, metrics, training=None):
        """In the background, from a copy: the next epoch does not wait for the disk."""
        payload = checkpoint_payload(model, metrics, vars(self.args), training)
        self.wait()
        self.writing = self.writer.submit(save, self.folder / name, payload, FORMAT, VERSION)

    def wait(self):
        """Until the last write is on disk; what went wrong in it is raised here."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()

    def finish(self):
        self.wait()
        if distributed.rank == 0:
            print(f"done: {self.folder / 'best.pth'}; evaluate with: python eval.py --exp_name {self.name} --save_index")
        distributed.stop()
