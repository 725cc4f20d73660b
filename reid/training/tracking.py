"""Log a training run to TensorBoard files and to MLflow. Both libraries are imported when they are first needed."""

import hashlib
import importlib.util
import logging
import os
import random
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote, unquote

import torch
import torch.nn.functional as F

from reid import ReidError
from reid.checkpoint import versions
from reid.cli import root_cause, without_secrets
from reid.images import resize

EXPERIMENT = "human-reid"
PROJECTOR_ROWS, SPRITE = 2000, 64  # more rows make the projector's page crawl; side of a thumbnail in pixels


def new_run_name(models_dir="models"):
    """Return a name like `masked-hog-908`, from MLflow's words, that no folder in `models_dir` has.

    MLflow draws from the global `random`: after `random.seed(0)` every run would get the same name, and the draw would change
    the numbers that follow. A private generator does neither.
    """
    _mlflow()
    from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

    rng = random.SystemRandom()
    while True:
        name = f"{rng.choice(_GENERATOR_PREDICATES)}-{rng.choice(_GENERATOR_NOUNS)}-{rng.randint(0, 1000)}".lower()
        if len(name) <= 20 and not (Path(models_dir) / name).exists():
            return name


def open_store():
    """Return MLflow's client and the address of its store: MLFLOW_TRACKING_URI, else `mlflow.db` in the working folder.

    Raises ReidError if it cannot be used.
    """
    mlflow = _mlflow()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    try:
        if uri.startswith("sqlite:///"):
            uri = _database(unquote(uri.removeprefix("sqlite:///")))
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # those of SQLAlchemy, requests and database drivers, too
        raise _unusable(uri, error) from error
    return client, uri


def _unusable(uri, error):
    advice = "repair it, or set MLFLOW_TRACKING_URI to another store (unset, it is mlflow.db in this folder)"
    return ReidError(f"MLflow at {without_secrets(uri)}: {_reason(error, uri)}; {advice}")


class Tracker:
    """One training run in TensorBoard (`<runs_dir>/<run_name>`) and in MLflow (experiment `human-reid`).

    run_name: its name in both. params: its settings, any values, kept as text. tags: {name: text}; None is left out.
    run_id: continue this MLflow run (a new one, if the store has lost it). A setting that has changed becomes a tag
    `resumed.<name>`, since MLflow refuses to change a param. TensorBoard hides what the continued run had logged from the first
    step of this one on.

    As a context manager it closes itself: FINISHED, KILLED after Ctrl-C or an exit, FAILED after any other exception. Raises
    ReidError if the store cannot be used at the start. Later, a log that cannot be written costs a warning, not the training;
    MLflow receives what it has missed when it answers again.
    """

    def __init__(self, run_name, params, runs_dir="runs", run_id=None, tags=None):
        self.client, self._uri = open_store()
        self._unsent = {"metrics": [], "params": [], "tags": []}
        self._warned, self._closed = set(), False
        self._folder, self._board = Path(runs_dir) / run_name, None
        self._folder.mkdir(parents=True, exist_ok=True)
        params = {name: str(value) for name, value in params.items()}
        tags = _environment() | (tags or {})
        try:
            run = (self._reopen(run_id) if run_id else None) or self._create(run_name)
        except Exception as error:
            raise _unusable(self._uri, error) from error
        known = run.data.params
        tags |= {f"resumed.{name}": value for name, value in params.items() if known.get(name, value) != value}
        params = {name: value for name, value in params.items() if name not in known}
        self.run_id = run.info.run_id
        self._send(params=params, tags=tags)
        self._monitor = _system_monitor(self.run_id, self._uri)

    def log(self, metrics, step):
        """Log the numbers of one step, {name: float}. A request and a flush, so once an epoch."""
        now = int(time.time() * 1000)
        self._draw(lambda board: [board.add_scalar(name, value, step) for name, value in metrics.items()], step)
        self._send(metrics=[(name, float(value), now, step) for name, value in metrics.items()])

    def images(self, tag, images, step):
        """Show images in TensorBoard as one grid: uint8 or float (0..255) [N, 3, H, W], RGB."""
        self._draw(lambda board: board.add_images(tag, images.to("cpu", torch.uint8), step), step)

    def projector(self, embeddings, labels, images):
        """Show embeddings in TensorBoard's projector as points in space, each with its thumbnail.

        embeddings: float [N, D]; labels: N ids; images: uint8 [N, 3, H, W]. The first PROJECTOR_ROWS are taken, so give
        them sorted by id. Four decimals are written: a third of the size of all of them.
        """
        embeddings, labels, images = (rows[:PROJECTOR_ROWS] for rows in (embeddings, labels, images))
        scale = SPRITE / max(images.shape[-2:])
        height, width = (round(side * scale) for side in images.shape[-2:])
        top, left = (SPRITE - height) // 2, (SPRITE - width) // 2
        sprites = resize(images.cpu(), (height, width)).float() / 255  # on white squares: the projector wants squares
        sprites = F.pad(sprites, (left, SPRITE - width - left, top, SPRITE - height - top), value=1.0)
        points = embeddings.detach().cpu().double().round(decimals=4)
        names = [str(int(label)) for label in labels]
        self._draw(lambda board: board.add_embedding(points, names, sprites, tag="embeddings"))

    def artifact_reference(self, path):
        """Tag the MLflow run with path and sha256 of a file, instead of storing a checkpoint twice."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._send(tags={Path(path).name: path, f"{Path(path).name}.sha256": digest})

    def close(self, status="FINISHED"):
        """End the run as FINISHED, KILLED or FAILED. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._board:
            self._draw(lambda board: board.close())
        self._send()
        try:
            if self._monitor:
                self._monitor.finish()
            self.client.set_terminated(self.run_id, status)
        except Exception as error:
            self._warn("MLflow", error)
        if missed := len(self._unsent["metrics"]):
            print(f"warning: MLflow misses {missed} values of this run; TensorBoard has them", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        stopped = kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit))
        self.close("KILLED" if stopped else "FAILED" if kind else "FINISHED")

    def _draw(self, write, step=None):
        """Call `write` with TensorBoard's writer. After a failure, such as a removed folder, the next call makes a new one."""
        try:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self._folder), purge_step=step)
            write(self._board)
            self._board.flush()
            self._warned.discard("TensorBoard")
        except Exception as error:
            self._board = None
            self._warn("TensorBoard", error)

    def _create(self, run_name):
        from mlflow.exceptions import MlflowException
        from mlflow.tracking.context.registry import resolve_tags  # user, source file, git commit

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        try:
            number = self.client.create_experiment(name)
        except MlflowException:  # it exists, perhaps since a moment ago
            number = self.client.get_experiment_by_name(name).experiment_id
        return self.client.create_run(number, run_name=run_name, tags=resolve_tags())

    def _reopen(self, run_id):
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if run.info.lifecycle_stage != "active":  # deleted on MLflow's page
            return None
        self.client.update_run(run_id, status="RUNNING")
        return run

    def _send(self, metrics=(), params=None, tags=None):
        """Send all in one request. What the store does not take now goes with a later call."""
        from mlflow.entities import Metric, Param, RunTag

        self._unsent["metrics"] += [Metric(*metric) for metric in metrics]
        self._unsent["params"] += [Param(*item) for item in (params or {}).items()]
        self._unsent["tags"] += [RunTag(name, str(value)) for name, value in (tags or {}).items() if value is not None]
        try:
            while any(self._unsent.values()):
                batch = {kind: values[:100] for kind, values in self._unsent.items()}  # a request holds no more
                self.client.log_batch(self.run_id, **batch)
                for kind in batch:
                    del self._unsent[kind][:100]
            self._warned.discard("MLflow")
        except Exception as error:
            self._warn("MLflow", error)

    def _warn(self, name, error):
        """Warn once until it works again."""
        if name not in self._warned:
            print(f"warning: {name} cannot be written ({_reason(error, self._uri)}); training goes on", file=sys.stderr)
        self._warned.add(name)


def _mlflow():
    """Import MLflow without telemetry and chatter, and such that it notices a lost server in seconds, not in minutes."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
        os.environ.setdefault(name, "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it prints tracebacks of what it raises as well
    return mlflow


def _database(path):
    """Return the address of the SQLite database at `path`, which gets all its tables if it is new.

    It is made aside and linked into place whole: two processes that create the tables of one file at the same time (a
    training and the dashboards) leave it broken for good.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
        raise PermissionError("not a file that can be written")  # MLflow would try again for 100 seconds
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".reid-mlflow-", dir=path.parent, ignore_cleanup_errors=True) as folder:
            fresh = Path(folder) / path.name
            _mlflow().MlflowClient(_address(fresh)).create_experiment(EXPERIMENT)
            try:
                path.hardlink_to(fresh)
            except FileExistsError:
                pass  # another process was faster
            except OSError:  # a file system without links
                fresh.replace(path)
    return _address(path)


def _address(path):
    return "sqlite:///" + quote(path.as_posix(), safe="/:")  # MLflow decodes %20 and cuts at a question mark


def _environment():
    """Return what the numbers of a run depend on beside its settings."""
    names = versions() | {name: version(name) for name in ("torchvision", "numpy", "mlflow")}
    return names | {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def _system_monitor(run_id, uri):
    """Start MLflow's thread that logs the use of processor, memory and GPU; None without the libraries that it needs."""
    needed = ["psutil", "pynvml"] if torch.cuda.is_available() else ["psutil"]
    if not all(importlib.util.find_spec(name) for name in needed):
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def _reason(error, uri):
    """Return the origin of a chain of exceptions in one line, without the user part and the query of `uri`."""
    error = root_cause(error)
    text = " ".join(str(error).split()) or type(error).__name__
    address = re.match(r"\w+://(.*@)?[^?]*(\?.*)?", uri)
    for secret in re.split("[:/@?&=]", "".join(part or "" for part in address.groups())) if address else []:
        text = text.replace(secret, "***") if len(secret) > 2 else text
    return without_secrets(text)[:300]
