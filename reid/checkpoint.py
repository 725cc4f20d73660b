"""Checkpoints (`.pth`): what a run leaves in `models/<run>/`, and weights that come from elsewhere."""

import hashlib
import platform
import re
import shlex
from pathlib import Path

import torch

from reid import ReidError
from reid.files import checksum, is_ours, load, save
from reid.images import PREPROCESSING, is_image
from reid.model import build_model, check_config

FORMAT, VERSION = "reid-checkpoint", 1
PLAIN_NAME = re.compile(r"\w[\w .+=@,-]{0,99}(?<![ .])")
DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # Windows': not even a folder may be called so


def checkpoint_payload(model, metrics, args, training=None):
    """Return the dict of a checkpoint, copied to the CPU so that training can continue while it is written.

    metrics, args: plain values. Without `training` the weights are stored as float16 where their values fit (best.pth: what
    inference needs, and the classifier); with it (a dict of optimizer, schedule and RNG states) in full precision for exact
    resume (last.pth). Raises ReidError for weights that are not finite.
    """
    state = _copy(model.state_dict())
    _check_finite(state, "the weights of this run", "nothing was saved; lower --lr")
    if training is None:
        state = {key: _half(value) for key, value in state.items()}
    payload = {"config": dict(model.config), "state_dict": state, "metrics": metrics, "args": dict(args)}
    return payload | {"versions": versions()} | ({"training": _copy(training)} if training is not None else {})


def save_checkpoint(path, model, metrics, args, training=None):
    """Write a checkpoint, whole or not at all; see `checkpoint_payload`."""
    save(path, checkpoint_payload(model, metrics, args, training), FORMAT, VERSION)


def _copy(node):
    """Return the tree with its tensors on the CPU, cloned (a view would keep its whole storage)."""
    if isinstance(node, torch.Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_copy(value) for value in node)
    return node


def _half(value):
    """Return floats as float16 if all of them are in its range, else as float32."""
    if not value.is_floating_point():
        return value
    half = value.to(torch.float16)
    return half if half.isfinite().all() else value.float()


def _check_finite(state, owner, advice):
    if not all(value.isfinite().all() for value in state.values()):
        raise ReidError(f"{owner}: NaN or infinite values; {advice}")


def versions():
    """Return library versions as plain strings (torch's own version object is refused by weights_only loading)."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}


def check_name(exp_name):
    """Return the name of a run, which becomes folders and files; raise ReidError where it could not, on any system."""
    if not PLAIN_NAME.fullmatch(exp_name) or DEVICE_NAME.match(exp_name):
        raise ReidError(f"--exp_name {exp_name!r:.120}: a plain name is needed, it becomes a folder")
    return exp_name


def checkpoint_path(exp_name, name="best.pth", models="models"):
    """Return `models/<run>/<name>`; an unknown run raises ReidError that lists the runs there are."""
    path = Path(models) / check_name(exp_name) / name
    if not path.is_file():
        known = sorted(p.parent.name for p in Path(models).glob(f"*/{name}"))
        raise ReidError(f"--exp_name {exp_name}: no {path}; runs here: {', '.join(known) or 'none, train one with train.py'}")
    return path


def load_checkpoint(path):
    """Return the dict of a checkpoint, on the CPU: config, state_dict, metrics, args, versions (and training for last.pth)."""
    if Path(path).is_file() and not is_ours(path, FORMAT):
        raise ReidError(f"{path}: not a checkpoint of this project; to start from weights of another origin, train from them: "
                        f"python train.py --weights {shlex.quote(str(path))}")
    record = load(path, FORMAT, VERSION)
    parts = {"config": dict, "state_dict": dict, "metrics": dict, "args": dict}
    for name, kind in parts.items():
        if not isinstance(record.get(name), kind):
            raise ReidError(f"{path}: checkpoint has no {name}; it is damaged or not ours")
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in record["state_dict"].items()):
        raise ReidError(f"{path}: state_dict holds more than named tensors; it is damaged or not ours")
    try:
        check_config(record["config"])
    except ReidError as error:
        raise ReidError(f"{path}: {error}") from error
    return record


def restore_model(record, path="checkpoint"):
    """Return the ReidModel of a loaded checkpoint, in float32. Raises ReidError where weights do not fit or are not finite."""
    model = build_model(record["config"])
    try:
        model.load_state_dict(record["state_dict"])
    except (RuntimeError, AttributeError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise ReidError(f"{path}: weights do not fit its own configuration ({reason})") from error
    _check_finite(model.state_dict(), path, "use an earlier checkpoint")
    return model


def fingerprint(record):
    """Return 16 hex digits, kept by an index, that change with the embedding weights, the input size or the preprocessing."""
    config = {key: value for key, value in record["config"].items() if key != "classes"}
    weights = {key: _half(value) for key, value in record["state_dict"].items()
               if not key.startswith("classifier.") and not key.endswith("num_batches_tracked")}
    digest = checksum([PREPROCESSING, sorted(config.items()), sorted(weights.items())])
    return hashlib.sha256(digest.encode()).hexdigest()[:16]


def load_weights(model, weights, partial=False, verbose=print):
    """Initialise `model` from `weights`: "none", "imagenet" (torchvision's download), or a path.

    A path may hold a checkpoint of this project, torchvision's own file, or a state dict in the manner of torchreid or layumi
    (prefixes such as `module.` and `model.features.` are dropped). Prints what matched and what did not. Raises ReidError
    where a tensor of the backbone is missing or has another shape, unless `partial`; then where none fits.
    """
    if weights == "none":
        return
    source = _imagenet(model.config["backbone"]) if weights == "imagenet" else _read_state(weights)
    state = model.state_dict()
    target = [key for key in state if not key.endswith("num_batches_tracked")]
    names = {_bare(key): key for key in state}
    taken, dropped = {}, []
    for key, value in source.items():
        name = names.get(_bare(key))
        if name is not None and isinstance(value, torch.Tensor) and value.shape == state[name].shape:
            taken[name] = value
        else:
            dropped.append(key)
    backbone = [key for key in target if key.startswith("body.")]
    missing = [key for key in backbone if key not in taken]
    summary = f"{len(backbone) - len(missing)} of {len(backbone)} backbone tensors matched"
    if missing and (not partial or len(missing) == len(backbone)):
        raise ReidError(f"--weights {weights}: {summary} for {model.config['backbone']}, {_few(missing)} did not; is it of "
                        f"another backbone?{'' if partial else ' --weights_partial loads what fits'}")
    _check_finite(taken, f"--weights {weights}", "use another file")
    model.load_state_dict(taken, strict=False)
    fresh = [key for key in target if key not in taken]
    verbose(f"weights {weights}: {summary}"
            + (f"; not used: {_few(dropped)}" if dropped else "") + (f"; fresh: {_few(fresh)}" if fresh else ""))


def _few(names):
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _bare(key):
    """Return a tensor's name without the wrappers that different repositories put around the same network."""
    key = re.sub(r"^(?:(?:_orig_mod|module|net|model|backbone|base|body|features|classifier_backbone)\.)+", "", key)
    key = re.sub(r"\.(norm|conv)\.(\d)\.", r".\1\2.", key)  # torchvision's oldest DenseNet files: norm.1 for norm1
    return re.sub(r"^(?:bn|bottleneck|bnneck)\.", "neck.", key)


def load_foreign(path, name, advice):
    """Return what a file of tensors of any origin holds; ReidError begins with `name`, and advises where there is no file."""
    if not Path(path).is_file():
        raise ReidError(f"{name}: {'is a folder' if Path(path).is_dir() else 'no such file'}; {advice}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types
        if not is_image(path) and re.search("Unsupported (global|class|operand)|TorchScript|safe_globals", str(error)):
            raise ReidError(f"{name}: holds a whole model or other Python objects, which are not loaded since they could run any "
                            "code; where its code is, save its tensors alone: torch.save(model.state_dict(), FILE)") from error
        raise ReidError(f"{name}: not a file of tensors that torch.load reads with weights_only=True") from error


def _read_state(path):
    record = load_foreign(path, f"--weights {path}", "give imagenet, none or the path of a state dict or best.pth")
    if isinstance(record, dict) and record.get("format") == FORMAT:
        return load_checkpoint(path)["state_dict"]
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(record, dict) and isinstance(record.get(key), dict):
            record = record[key]
    kind = record.get("format") if isinstance(record, dict) else type(record).__name__  # such as reid-index
    if kind is not None:
        raise ReidError(f"--weights {path}: holds a {kind}, not a state dict")
    return {str(key): value for key, value in record.items()}


def _imagenet(backbone):
    import torchvision.models as models

    weights = {"densenet121": models.DenseNet121_Weights, "resnet50": models.ResNet50_Weights}[backbone].IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash a RuntimeError
        raise ReidError(f"--weights imagenet could not be downloaded from {weights.url} ({error}); check the network, or use "
                        "--weights none (from scratch) or --weights PATH") from error
