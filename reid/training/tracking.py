"""Log a training run to TensorBoard files and to MLflow. Both libraries are imported when they are first needed."""

import hashlib
import logging
import os
import random
import re
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

import torch
import torch.nn.functional as F

from reid import ReidError
from reid.cli import first_line, root_cause, without_secrets
from reid.images import resize

EXPERIMENT = "human-reid"
FINAL = ("val/mAP", "val/rank1", "val/accuracy", "val/loss", "train/loss")  # metrics beside the settings, in TensorBoard
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


class Tracker:
    """One training run in TensorBoard (`runs/<run_name>`) and in MLflow (experiment `human-reid`).

    run_name: its name in both. params: its settings, kept as text. tags: {name: text}. run_id: continue this MLflow run, with
    the params that it has, or start a new one if the store has lost it. TensorBoard hides what the continued run had logged
    from the first step of this one on.

    A context manager: the run begins with the block and ends as FINISHED, as KILLED after Ctrl-C or an exit, as FAILED after
    any other exception. Raises ReidError if the store cannot be used, already when it is made. Later, a log that cannot be
    written costs a warning, not the training, and what MLflow misses is still in TensorBoard.
    """

    def __init__(self, run_name, params, run_id=None, tags=None):
        self.client, self._uri = open_store()
        self._experiment = self._open_experiment()
        self._name, self.run_id, self._params, self._tags = run_name, run_id, params, tags
        self._folder, self._board, self._warned = Path("runs") / run_name, None, set()
        self._folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        try:
            run = self._open(self._name, self.run_id)
        except Exception as error:
            raise _unusable(self._uri, error) from error
        self.run_id = run.info.run_id
        params = {name: value for name, value in self._params.items() if name not in run.data.params}
        self._send(params=params, tags=self._tags)
        return self

    def __exit__(self, kind, error, traceback):
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        if self._board:
            self._draw(lambda board: (kind or self._settings(board, slice(2, 3)), board.close()))
        with self._warning("MLflow"):
            self.client.set_terminated(self.run_id, status)

    def log(self, metrics, step):
        """Log the numbers of one step, {name: float}. A request and a flush, so once an epoch."""
        self._draw(lambda board: [board.add_scalar(name, value, step) for name, value in metrics.items()], step)
        self._send(metrics=metrics, step=step)

    def images(self, tag, images, step):
        """Show images in TensorBoard as one grid: uint8 or float (0..255) [N, 3, H, W], RGB."""
        self._draw(lambda board: board.add_images(tag, images.to("cpu", torch.uint8), step), step)

    def projector(self, embeddings, labels, images):
        """Show embeddings in TensorBoard's projector as points in space, each with its thumbnail.

        embeddings: float [N, D]; labels: N ids; images: uint8 [N, 3, H, W]. The first PROJECTOR_ROWS are taken, so give
        them sorted by id. Four decimals are written: a third of the size of all of them.
        """
        embeddings, labels, images = (rows[:PROJECTOR_ROWS] for rows in (embeddings, labels, images))
        height, width = images.shape[-2:]
        x, y = max(height - width, 0), max(width - height, 0)  # the projector wants squares: white beside the person
        squares = F.pad(images.cpu(), (x // 2, x - x // 2, y // 2, y - y // 2), value=255)
        sprites = resize(squares, (SPRITE, SPRITE)).float() / 255
        points = embeddings.detach().cpu().double().round(decimals=4)
        names = [str(int(label)) for label in labels]
        self._draw(lambda board: board.add_embedding(points, names, sprites, tag="embeddings"))

    def artifact_reference(self, path):
        """Tag the MLflow run with path and sha256 of a file, instead of storing a checkpoint twice."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._send(tags={Path(path).name: path, f"{Path(path).name}.sha256": digest})

    @contextmanager
    def _warning(self, library):
        """Turn what goes wrong in the block into a warning, once for each library."""
        try:
            yield
        except Exception as error:
            if library not in self._warned:
                reason = _reason(error, self._uri)
                print(f"warning: {library} cannot be written ({reason}) and misses values; training goes on", file=sys.stderr)
            self._warned.add(library)

    def _draw(self, write, step=None):
        """Call `write` with TensorBoard's writer. After a failure, such as a removed folder, the next call makes a new one."""
        board, self._board = self._board, None
        with self._warning("TensorBoard"):
            if board is None:
                from torch.utils.tensorboard import SummaryWriter

                board = SummaryWriter(str(self._folder), purge_step=step)
                self._settings(board, slice(2))
            write(board)
            board.flush()
            self._board = board

    def _settings(self, board, parts):
        """Write a part of what TensorBoard's page of hyperparameters needs: its columns and the settings, then the success."""
        from torch.utils.tensorboard.summary import hparams

        settings = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in self._params.items()}
        for summary in hparams(settings, dict.fromkeys(FINAL, 0.0))[parts]:  # the page shows the last scalars of these names
            board.file_writer.add_summary(summary)

    def _send(self, metrics=None, step=0, params=None, tags=None):
        """Send all to MLflow in one request."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        with self._warning("MLflow"):
            self.client.log_batch(self.run_id, [Metric(name, float(value), now, step) for name, value in (metrics or {}).items()],
                                  [Param(name, str(value)) for name, value in (params or {}).items()],
                                  [RunTag(name, str(value)) for name, value in (tags or {}).items()])

    def _open(self, run_name, run_id):
        """Return the MLflow run `run_id`; without one, or if the store has lost it, a new run."""
        from mlflow.exceptions import MlflowException
        from mlflow.tracking.context.registry import resolve_tags  # user, source file, git commit

        if run_id:
            with suppress(MlflowException):  # the run has been deleted
                self.client.update_run(run_id, status="RUNNING")
                return self.client.get_run(run_id)
        return self.client.create_run(self._experiment, run_name=run_name, tags=resolve_tags())

    def _open_experiment(self):
        """Return the number of the experiment, which is created if it does not exist."""
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        try:
            with suppress(MlflowException):  # it exists, perhaps since a moment ago
                return self.client.create_experiment(name)
            found = self.client.get_experiment_by_name(name)
            if found.lifecycle_stage != "active":
                raise ValueError(f"the experiment {name} is deleted; restore it or set MLFLOW_EXPERIMENT_NAME to another")
            return found.experiment_id
        except Exception as error:
            raise _unusable(self._uri, error) from error


def log_evaluation(run_name, metrics, report=None):
    """Add the scores of an evaluation, {name: float}, and its report (a path or None) to a run in MLflow and TensorBoard.

    A run without `runs/<run_name>` was not trained in this folder, and nothing is logged. A store of artifacts that is no folder
    gets the path of the report only, because images are in it. What goes wrong is a warning.
    """
    folder = Path("runs") / run_name
    if not folder.is_dir():
        return
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    try:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder)) as board:
            for name, value in metrics.items():
                board.add_scalar(name, value)
        if uri == "sqlite:///mlflow.db" and not Path("mlflow.db").exists():
            raise FileNotFoundError("mlflow.db is not here any more")
        client, uri = open_store()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments, f"attributes.run_name = '{run_name}'", max_results=1)
        if not runs:
            raise LookupError("it has no such run")
        from mlflow.entities import Metric

        run_id, now = runs[0].info.run_id, int(time.time() * 1000)
        client.log_batch(run_id, [Metric(name, value, now, 0) for name, value in metrics.items()])
        if report:
            client.set_tag(run_id, "report", report)
        if report and re.match(r"file:|/|\.|[^:]*$", runs[0].info.artifact_uri):
            client.log_artifact(run_id, report)
    except Exception as error:  # those of SQLAlchemy, requests and database drivers, too
        print(f"warning: the scores of {run_name} are not logged in MLflow ({_reason(error, uri)})", file=sys.stderr)


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
            with suppress(OSError):  # another process was faster, or the file system has no links
                path.hardlink_to(fresh)
            if not path.exists():
                fresh.replace(path)
    return _address(path)


def _address(path):
    return "sqlite:///" + quote(path.as_posix(), safe="/:")  # MLflow decodes %20 and cuts at a question mark


def _unusable(uri, error):
    advice = "repair it, or set MLFLOW_TRACKING_URI to another store (unset, it is mlflow.db in this folder)"
    return ReidError(f"MLflow at {without_secrets(uri)}: {_reason(error, uri)}; {advice}")


def _reason(error, uri):
    """Return the origin of a chain of exceptions in one line, without the user part and the query of `uri`."""
    text = first_line(root_cause(error))
    for part in re.findall(r"//.*@|\?.*", uri):
        for secret in re.findall(r"[^:/@?&=]{3,}", part):
            text = text.replace(secret, "***")
    return without_secrets(text)
