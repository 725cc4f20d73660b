"""What needs a GPU (`pytest -m cuda`), and of the CUDA paths what can be traced without one.

A FakeTensor has a shape, a type and a device, but no values. So operations of tensors on different devices fail as on a GPU, and
so does what reads a value back to the host, which would make the device wait and cannot be recorded as a CUDA graph. The
backward pass and the fused optimizer need a driver even for these, and are left out.
"""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from openvino_lab import write
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import train
from reid.model import DTYPES, EMBEDDING_SIZES, build_model, cast_network, default_config
from reid.retrieval.extract import Extractor
from reid.training import augment
from reid.training.teacher import Teacher
from reid.training.teacher_network import TeacherNetwork
from reid.training.trainer import Trainer

CUDA = torch.device("cuda")
NETWORKS = [("bf16", "resnet50"), *((precision, "densenet121") for precision in DTYPES)]
EVERYTHING = ["--ema", "0.9", "--jitter", "0.4", "--tint", "0.3", "--gray", "0.2", "--blur", "0.3"]


@pytest.fixture(scope="module")
def gpu_check(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "benchmarks")
        import gpu_check
        yield gpu_check
    for name in ("gpu_check", "common"):
        del sys.modules[name]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", ["ways_of_the_step", "settings_of_the_step", "resume", "speed_and_memory", "pixels",
                                   "embeddings", "searches", "command_line"])
def test_check_on_the_gpu(gpu_check, tmp_path, check):
    assert gpu_check.run_check(getattr(gpu_check, check), gpu_check.Setup(CUDA, tmp_path)) == []


@pytest.mark.parametrize("check", ["pixels", "searches"])
def test_check_on_the_cpu(gpu_check, tmp_path, check):
    """The checks that take seconds; `python benchmarks/gpu_check.py --device cpu` runs all of them."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert gpu_check.run_check(getattr(gpu_check, check), gpu_check.Setup(torch.device("cpu"), tmp_path)) == []
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_failed_check_is_counted_and_the_next_one_runs(gpu_check, monkeypatch, capsys):
    def wrong(setup):
        yield "one", True, "1"
        yield "two", False, "2"

    def broken(setup):
        raise RuntimeError("no driver\nno more")
        yield

    monkeypatch.setattr(gpu_check, "CHECKS", (broken, wrong))
    assert gpu_check.main(SimpleNamespace(device="cpu"))
    assert capsys.readouterr().out.splitlines() == [
        "FAIL broken: RuntimeError: no driver", "ok   one: 1", "FAIL two: 2", "2 checks failed: broken, two"]


def test_every_check_is_a_test(gpu_check):
    (mark,) = [mark for mark in test_check_on_the_gpu.pytestmark if mark.name == "parametrize"]
    assert [check.__name__ for check in gpu_check.CHECKS] == mark.args[1]


@pytest.fixture
def traced(monkeypatch):
    """Tensors without values, on a GPU that is not there."""
    augment._constant.cache_clear()
    with FakeTensorMode():  # which must see that there is no GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else autocast does nothing
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        yield
    augment._constant.cache_clear()


def on_gpu(module):
    """Put tensors without values on the GPU in the place of a module's own."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, own in tensors.items():
                if own is not None:
                    tensors[name] = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=CUDA)
                    if own.requires_grad:
                        tensors[name] = torch.nn.Parameter(tensors[name])
    return module


def zeros(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype, device=CUDA)


def model(backbone="densenet121"):
    with unset_fake_temporarily():
        network = build_model(default_config([1, 2, 3], backbone, height=64, width=32))
    return on_gpu(network)


def teacher(size, **options):
    with unset_fake_temporarily():
        found = Teacher(size, torch.zeros(12, 6)) if not options else None
    return on_gpu(found or Teacher(size, **options))


def trace_step(precision="bf16", teacher=None, backbone="densenet121", options=EVERYTHING):
    """Run the step of train.py but for the backward pass and the optimizer; return what it logs."""
    learner, none = model(backbone), lambda *_, **__: None
    trainer = SimpleNamespace(args=train.get_args_parser().parse_args(options), model=learner, network=learner, teacher=teacher,
                              averaged=model(backbone), parameters=[], precision=precision, device=CUDA)
    for method in (Trainer.autocast, Trainer.average_weights):
        setattr(trainer, method.__name__, method.__get__(trainer))
    trainer.optimizer = SimpleNamespace(zero_grad=none)
    trainer.scaler = SimpleNamespace(scale=lambda loss: SimpleNamespace(backward=none), step=none, update=none)
    numbers = zeros(12, sum(augment.NUMBERS.values()), dtype=torch.float32)
    return train.train_step(trainer, zeros(12, 3, 64, 32, dtype=torch.uint8), numbers, zeros(8), zeros(12))  # 4 have no identity


@pytest.mark.parametrize("precision, backbone", NETWORKS)
def test_the_step_stays_on_the_gpu(traced, precision, backbone):
    """Augmentation, forward pass, each loss and the averaged weights; the teacher's embeddings are from a file."""
    logged = trace_step(precision, teacher(EMBEDDING_SIZES[backbone]), backbone)
    assert set(logged) == {"loss", "loss_id", "loss_triplet", "loss_relational", "loss_cosine", "accuracy"}
    assert all(value.device.type == "cuda" and value.shape == () for value in logged.values())


def test_the_step_with_a_teacher_that_is_a_network_stays_on_the_gpu(traced):
    logged = trace_step(teacher=teacher(1024, network=model("resnet50")))
    assert "loss_soft" in logged and all(value.device.type == "cuda" for value in logged.values())


@pytest.mark.parametrize("pixels", ["bgr255", "imagenet"])
def test_the_step_with_an_openvino_teacher_stays_on_the_gpu(traced, tmp_path, monkeypatch, pixels):
    """A CUDA graph cannot be recorded while something is copied from the host."""
    pytest.importorskip("openvino")
    with unset_fake_temporarily():
        network = TeacherNetwork(write(tmp_path / "net.xml"), pixels)
    found, copied = teacher(1024, network=network), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and result.device.type == "cuda":
                copied.append(args[0])
            return result

    with Watch():
        embeddings, logits = found(zeros(12, 3, 64, 32, dtype=torch.float32), zeros(12))
    assert embeddings.device.type == "cuda" and embeddings.shape == (12, 5) and logits is None and not copied


def test_a_value_that_is_read_back_and_a_wrong_device_are_found(traced, monkeypatch):
    monkeypatch.setattr(train, "triplet_loss", lambda features, *_: features.mean().item())
    with pytest.raises(DataDependentOutputException):
        trace_step()
    monkeypatch.setattr(train, "triplet_loss", lambda features, *_: features @ torch.zeros(features.shape[1], device="cpu"))
    with pytest.raises(RuntimeError, match="device"):
        trace_step()


@pytest.mark.parametrize("precision, backbone", NETWORKS)
def test_embedding_stays_on_the_gpu(traced, precision, backbone):
    with unset_fake_temporarily():
        network = build_model(default_config([1, 2, 3], backbone, height=64, width=32)).eval()
        features = cast_network(network, DTYPES[precision])
    for part in (network, inspect.getclosurevars(features.__wrapped__).nonlocals["body"]):
        on_gpu(part)
    extractor = Extractor.__new__(Extractor)
    extractor.mirror, extractor._neck, extractor._features = True, network.neck, features
    found = extractor._embed(zeros(3, 3, 64, 32, dtype=torch.uint8))
    assert found.device.type == "cuda" and found.shape == (3, network.config["embedding_size"]) and found.dtype == torch.float32
