"""Checkpoints of this project, and weights from elsewhere."""

import pytest
import torch

from reid import ReidError
from reid import files as storage
from reid.checkpoint import (
    FORMAT,
    VERSION,
    checkpoint_path,
    fingerprint,
    load_checkpoint,
    load_weights,
    restore_model,
    save_checkpoint,
)
from reid.model import build_model, default_config

CONFIG = default_config([2, 7, 11], height=64, width=32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(CONFIG)


@pytest.fixture
def path(model, tmp_path):
    save_checkpoint(tmp_path / "models" / "run" / "best.pth", model, {"val/accuracy": 0.5}, {"lr": 0.05})
    return tmp_path / "models" / "run" / "best.pth"


def test_round_trip_in_half_precision(model, path):
    record = load_checkpoint(path)
    assert record["config"]["classes"] == [2, 7, 11] and record["args"] == {"lr": 0.05}
    restored = restore_model(record)
    for key, value in model.state_dict().items():
        assert torch.allclose(value, restored.state_dict()[key], atol=1e-3)
    assert path.stat().st_size < 16 * 2**20


def test_values_beyond_half_precision_are_kept_in_full(model, tmp_path):
    wide = build_model(CONFIG)
    wide.load_state_dict(model.state_dict())
    wide.body.norm5.running_var[0] = 1e6
    save_checkpoint(tmp_path / "best.pth", wide, {}, {})
    record = load_checkpoint(tmp_path / "best.pth")
    kinds = {key: value.dtype for key, value in record["state_dict"].items() if value.is_floating_point()}
    assert kinds.pop("body.norm5.running_var") == torch.float32 and set(kinds.values()) == {torch.float16}
    assert torch.equal(restore_model(record).body.norm5.running_var, wide.body.norm5.running_var)
    save_checkpoint(tmp_path / "last.pth", wide, {}, {}, training={})
    assert fingerprint(load_checkpoint(tmp_path / "last.pth")) == fingerprint(record)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("training", [None, {"epoch": 3}])
def test_weights_that_are_not_finite_are_not_saved(path, value, training):
    before, broken = path.read_bytes(), build_model(CONFIG)
    broken.body.conv0.weight.data[0, 0, 0, 0] = value
    with pytest.raises(ReidError, match="NaN or infinite values; nothing was saved"):
        save_checkpoint(path, broken, {}, {}, training)
    assert path.read_bytes() == before


def test_full_precision_for_resume(model, path):
    save_checkpoint(path, model, {}, {}, training={"epoch": 3})
    record = load_checkpoint(path)
    assert record["training"] == {"epoch": 3}
    assert all(torch.equal(value, record["state_dict"][key]) for key, value in model.state_dict().items())


def test_fingerprint_follows_what_embeds(model, path):
    record = load_checkpoint(path)
    first = fingerprint(record)
    assert len(first) == 16 and first == fingerprint(load_checkpoint(path))
    record["state_dict"]["classifier.weight"] += 1
    assert fingerprint(record) == first
    record["config"]["height"] = 128
    assert fingerprint(record) != first
    record["config"]["height"] = 64
    record["state_dict"]["body.conv0.weight"][0] += 1
    assert fingerprint(record) != first


def test_unknown_run_names_the_runs_there_are(path):
    models = path.parent.parent
    assert checkpoint_path("run", models=models) == path
    with pytest.raises(ReidError, match=r"--exp_name nobody: no .*best\.pth; runs here: run"):
        checkpoint_path("nobody", models=models)
    with pytest.raises(ReidError):
        checkpoint_path("../models/run", models=models)


@pytest.mark.parametrize("change, message", [
    (lambda r: r["config"].update(backbone="vgg"), "configuration"),
    (lambda r: r["config"].pop("height"), "configuration"),
    (lambda r: r["config"].update(height=10**9), "configuration"),
    (lambda r: r["config"].update(backbone="resnet50"), "configuration"),
    (lambda r: r["state_dict"].pop("neck.weight"), "do not fit"),
    (lambda r: r["state_dict"].update({"neck.weight": torch.zeros(3)}), "do not fit"),
    (lambda r: r["state_dict"]["neck.weight"].fill_(float("nan")), "NaN"),
])
def test_a_checkpoint_that_contradicts_itself(path, change, message):
    record = load_checkpoint(path)
    change(record)
    with pytest.raises(ReidError, match=message):
        restore_model(record)


def test_parts_missing(path):
    storage.save(path, {"config": {}}, FORMAT, VERSION)
    with pytest.raises(ReidError, match="no state_dict"):
        load_checkpoint(path)


def fresh():
    torch.manual_seed(1)
    return build_model(CONFIG)


def renamed(model, rename, wrap=lambda state: state):
    return wrap({rename(key): value for key, value in model.state_dict().items()})


@pytest.mark.parametrize("style", [
    lambda m: renamed(m, lambda k: k.replace("body.", "features.")),  # torchvision
    # torchreid
    lambda m: renamed(m, lambda k: "module." + k.replace("body.", "features."), lambda s: {"state_dict": s, "epoch": 3}),
    lambda m: renamed(m, lambda k: k.replace("body.", "model.features.")),  # layumi
    lambda m: renamed(m, lambda k: k.replace("body.", "features.").replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2.")),
    lambda m: renamed(m, lambda k: "_orig_mod." + k, lambda s: {"model_state_dict": s, "epoch": 3}),  # after torch.compile
    lambda m: renamed(m, lambda k: "module._orig_mod." + k),
    lambda m: renamed(m, lambda k: k.replace("body.", "net.features.")),
])
def test_weights_from_elsewhere(model, tmp_path, capsys, style):
    torch.save(style(model), tmp_path / "other.pth")
    target = fresh()
    load_weights(target, str(tmp_path / "other.pth"))
    assert torch.equal(target.body.denseblock4.denselayer16.conv2.weight, model.body.denseblock4.denselayer16.conv2.weight)
    backbone = sum(key.startswith("body.") and not key.endswith("num_batches_tracked") for key in model.state_dict())
    assert f"{backbone} of {backbone} backbone tensors matched" in capsys.readouterr().out


def test_weights_of_a_torchvision_model_give_its_features(tmp_path):
    from torchvision.models import densenet121

    theirs = densenet121(num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    theirs.features.transition3.pool = torch.nn.Identity()  # last stride 1
    target = build_model(default_config([1, 2], height=64, width=32)).eval()
    lines = []
    load_weights(target, str(tmp_path / "tv.pth"), verbose=lines.append)
    assert "not used: classifier.weight" in lines[0]
    x = torch.randint(256, (2, 3, 64, 32)).float()
    with torch.inference_mode():
        expected = theirs.features((x - target.mean) / target.std).relu().mean((2, 3))
        assert torch.allclose(target.features(x), expected, atol=1e-5)


def test_classifier_of_other_identities_is_left_out(model, path):
    target = build_model(default_config([1, 2, 3, 4], height=64, width=32))
    lines = []
    load_weights(target, str(path), verbose=lines.append)
    assert "not used: classifier.weight" in lines[0] and "fresh: classifier.weight" in lines[0]


def test_weights_of_a_larger_densenet_are_refused(tmp_path):
    """DenseNet-169 has every tensor of the first two blocks of DenseNet-121, and most of the third."""
    from torchvision.models import densenet169

    with torch.device("meta"):  # without the initialisation, which takes long
        state = densenet169(num_classes=5).state_dict()
    torch.save({name: torch.zeros(value.shape, dtype=value.dtype) for name, value in state.items()}, tmp_path / "tv.pth")
    target = fresh()
    before = target.body.conv0.weight.clone()
    with pytest.raises(ReidError, match=r"of 604 backbone tensors matched for densenet121, .*--weights_partial"):
        load_weights(target, str(tmp_path / "tv.pth"))
    assert torch.equal(target.body.conv0.weight, before)
    lines = []
    load_weights(target, str(tmp_path / "tv.pth"), partial=True, verbose=lines.append)
    assert not torch.equal(target.body.conv0.weight, before) and "fresh: body.transition3" in lines[0]


def test_weights_without_a_tensor_are_refused(model, tmp_path):
    state = model.state_dict()
    del state["body.norm5.bias"]
    torch.save({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, tmp_path / "most.pth")
    with pytest.raises(ReidError, match=r"603 of 604 .*, body\.norm5\.bias did not"):
        load_weights(fresh(), str(tmp_path / "most.pth"))


def test_weights_that_do_not_fit(model, tmp_path):
    torch.save({"layer1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(model, tmp_path / "model.pth")
    torch.save({"model": model, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pth")
    (tmp_path / "text.pth").write_text("hello")
    whole = r"holds a whole model or other Python objects.*: torch.save\(model.state_dict\(\), FILE\)"
    for name, message in (("other.pth", "0 of 604 backbone tensors matched"), ("text.pth", "weights_only=True$"),
                          ("missing.pth", "no such file"), ("model.pth", whole), ("wrapped.pth", whole), ("script.pth", whole)):
        with pytest.raises(ReidError, match=message):
            load_weights(fresh(), str(tmp_path / name))
