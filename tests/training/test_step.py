"""train_step and the Trainer: losses, averaged weights, and the ways of the step, on a small network in this process."""

import gc
from contextlib import nullcontext
from functools import cache, partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tiny_network import SIZE
from train_lab import LEVERS, freeze, random_targets, tiny_batches, tiny_trainer

import train
from reid import ReidError
from reid.checkpoint import save_checkpoint
from reid.model import build_model, default_config
from reid.training import augment
from reid.training.teacher import load_teacher


def test_the_loss_is_the_sum_of_its_parts():
    trainer = tiny_trainer("--triplet_weight", "0.5", "--distill", "0.7", "--cosine", "3", targets=random_targets(12))
    images, numbers, labels, rows = tiny_batches(1, crops=4)
    logged = {name: value.item() for name, value in train.train_step(trainer, images[0], numbers[0], labels, rows).items()}
    expected = logged["loss_id"] + 0.5 * logged["loss_triplet"] + 0.7 * (logged["loss_relational"] + 3 * logged["loss_cosine"])
    assert logged["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_losses_are_those_of_the_output_of_the_neck():
    trainer = freeze(tiny_trainer(targets=(targets := random_targets(20))))
    images, numbers, labels, _ = tiny_batches(1, crops=4)
    rows = torch.arange(12) + 5
    with torch.no_grad():
        neck = trainer.model.neck(trainer.model.features(augment.apply(images[0], numbers[0])))
        ours, theirs, mapped = map(F.normalize, (neck, targets[rows], neck @ trainer.teacher.map.weight.T))
        expected = [12 * (ours @ ours.T - theirs @ theirs.T).square().mean().item(), 1 - (mapped * theirs).sum(1).mean().item()]
    logged = train.train_step(trainer, images[0], numbers[0], labels, rows)
    assert [logged[name].item() for name in ("loss_relational", "loss_cosine")] == pytest.approx(expected, rel=1e-4)


def test_crops_without_identities_are_only_distilled():
    images, numbers, labels, rows = tiny_batches(1, crops=4)
    logged, weights = [], []
    for change in (0, 100):
        images[0, 8:] = images[0, 8:] // 2 + change
        trainer = freeze(tiny_trainer(targets=random_targets(12)))
        logged.append(train.train_step(trainer, images[0], numbers[0], labels, rows))
        weights.append(trainer.model.body.conv0.weight.detach().clone())
    for name in ("loss_id", "loss_triplet", "accuracy"):
        assert logged[0][name].item() == pytest.approx(logged[1][name].item(), rel=1e-5), name
    assert logged[0]["loss_relational"] != logged[1]["loss_relational"]
    assert (weights[0] - weights[1]).abs().max() > 1e-6


def test_the_norm_of_the_gradient_is_clipped():
    images, numbers, labels, rows = tiny_batches(1, crops=4)
    steps = []
    for clip in ("0", "0.5"):
        trainer = freeze(tiny_trainer("--clip", clip, "--weight_decay", "0", targets=random_targets(12)))
        train.train_step(trainer, images[0], numbers[0], labels, rows)
        steps.append(torch.cat([parameter.grad.flatten() for parameter in trainer.parameters]))
    assert steps[0].norm() > 0.6 and steps[1].norm().item() == pytest.approx(0.5, rel=1e-3)
    assert torch.allclose(steps[1], steps[0] * 0.5 / steps[0].norm(), atol=1e-4)


def test_averaged_weights_and_their_statistics():
    trainer = tiny_trainer("--ema", "0.9")
    conv, averaged = trainer.model.body.conv0.weight, trainer.averaged
    before = averaged.body.conv0.weight.clone()
    with torch.no_grad():
        conv += torch.randn(conv.shape) / 10
    trainer.average_weights(0.9)
    assert torch.allclose(averaged.body.conv0.weight, 0.9 * before + 0.1 * conv, atol=1e-6)
    images = [augment.apply(*batch) for batch in zip(*tiny_batches(2)[:2])]
    trainer.refresh_norms(images)
    means = [averaged.body.conv0((x - averaged.mean) / averaged.std).mean((0, 2, 3)) for x in images]
    assert torch.allclose(averaged.body.norm0.running_mean, torch.stack(means).mean(0), atol=1e-4)
    assert not averaged.training and trainer.best_model is averaged


def test_freezing_keeps_the_statistics_of_the_backbone_and_not_of_the_neck():
    trainer = tiny_trainer("--freeze_bn", "--ema", "0.9")
    images, numbers, labels, rows = tiny_batches(1)
    trainer.step(images[0], numbers[0], labels, rows, 0.01)
    trainer.refresh_norms([augment.apply(images[0], numbers[0])])
    for model in (trainer.model, trainer.averaged):
        assert torch.equal(model.body.norm0.running_mean, torch.zeros(64))
        assert not torch.equal(model.neck.running_mean, torch.zeros(SIZE))


def test_a_first_step_that_fp16_skips_leaves_no_memory_that_was_never_written():
    trainer = tiny_trainer(steps=2)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))  # overflows, as on a GPU in fp16
    trainer.scaler.scale(torch.zeros(()))
    images, numbers, labels, rows = tiny_batches(2)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.step(images[0], numbers[0], labels, rows, 0.01)
    assert all(torch.equal(*pair) for pair in zip(before, trainer.parameters, strict=True)), "the step was not skipped"
    for state in trainer.optimizer.state.values():
        assert torch.equal(state["momentum_buffer"], torch.zeros_like(state["momentum_buffer"]))


def test_a_teacher_of_another_backbone_and_size(tmp_path):
    path = tmp_path / "teacher.pth"
    save_checkpoint(path, build_model(default_config([1, 2], height=96, width=48)), {}, {})
    images, numbers, labels, rows = tiny_batches(1, crops=4)
    found = {}
    for weight in (0, 1):
        pupil = tiny_trainer("--teacher", str(path), "--distill", str(weight))
        pupil.step(images[0], numbers[0], labels, rows, 0.01)
        found[weight] = pupil.end_epoch(1)
    assert found[1]["train/loss"] > found[0]["train/loss"] and found[1]["train/loss_id"] == found[0]["train/loss_id"]
    parts = [found[1][f"train/loss_{name}"] for name in ("id", "triplet", "relational", "soft")]
    assert found[1]["train/loss"] == pytest.approx(sum(parts) + 5 * found[1]["train/loss_cosine"], rel=1e-5)
    network = pupil.teacher.network
    assert not network.training and all(parameter.grad is None for parameter in network.parameters())
    pupil.model.config["classes"] = [1, 3]
    with pytest.raises(ReidError, match="trained on other identities"):
        load_teacher(pupil.args, pupil.model, [], [])


class PretendGraph:
    """Of a CUDA graph what a CPU can have: the recorded step runs again on what is in the static inputs."""

    def __init__(self, trainer):
        self.trainer = trainer

    def replay(self):
        self.trainer.scalars = train.train_step(self.trainer, *self.trainer.inputs)


class EmptyGraph(PretendGraph):
    """What CUDA records on the wrong stream."""

    def replay(self):
        pass


def no_graph(_):
    raise RuntimeError("no driver\nno more")


def no_compiler(_):
    raise RuntimeError("no compiler")


def pretend_cuda(monkeypatch, graph, trainer):
    for name in ("Stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", partial(graph, trainer))
    trainer.graph_wanted = True


def states_after_three_steps(trainer):
    images, numbers, labels, rows = tiny_batches(3, crops=4)
    for step in range(3):
        trainer.step(images[step], numbers[step], labels, rows, 0.01 * (step + 1))
    return [*trainer._state_tensors(), *trainer.logged]


@cache
def eager_states():
    trainer = tiny_trainer(*LEVERS, steps=3, targets=random_targets(12))
    states = states_after_three_steps(trainer)
    assert trainer.graph is None
    return states


@pytest.mark.parametrize("graph, compiler, lines", [
    (PretendGraph, None, []),
    (no_graph, None, ["no CUDA graph here (no driver)"]),
    (EmptyGraph, None, ["no CUDA graph here (a replay changes no weight)"]),
    (PretendGraph, no_compiler, ["no compiled network here (no compiler)"]),
    (no_graph, no_compiler, ["no compiled network here (no compiler)", "no CUDA graph here (no driver)"]),
])
def test_choosing_the_way_of_the_step_changes_nothing(monkeypatch, capsys, graph, compiler, lines):
    """Warm-up, recording and replay are undone to the last bit, and so is an attempt that fails."""
    expected, trainer = eager_states(), tiny_trainer(*LEVERS, steps=3, targets=random_targets(12))
    pretend_cuda(monkeypatch, graph, trainer)
    if compiler:
        trainer.compile_wanted = True
        monkeypatch.setattr(torch, "compile", lambda model: lambda images: compiler(images))
    states = states_after_three_steps(trainer)
    assert (trainer.graph is not None) == (graph is PretendGraph)
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(lines) and all(line in found for line, found in zip(lines, printed))
    trainer.close()
    assert trainer.graph is None


def test_nothing_of_autograd_is_alive_when_a_step_is_recorded(monkeypatch):
    """Autograd's nodes belong to the stream on which they were made, and CUDA records no step that leaves its stream."""
    trainer = tiny_trainer()
    pretend_cuda(monkeypatch, PretendGraph, trainer)
    learning, record, alive = {id(parameter) for parameter in trainer.parameters}, trainer._record, []

    def look_and_record(batch):
        nodes = (function for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.grad_fn is not None
                 for function, _ in thing.grad_fn.next_functions)
        alive.extend(node for node in nodes if id(getattr(node, "variable", None)) in learning)
        record(batch)

    monkeypatch.setattr(trainer, "_record", look_and_record)
    images, numbers, labels, rows = tiny_batches(1)
    trainer.step(images[0], numbers[0], labels, rows, 0.01)
    assert trainer.graph is not None and not alive
