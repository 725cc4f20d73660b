"""A network of an OpenVINO file in PyTorch: the same embeddings as OpenVINO's, every kind of layer, and what cannot be used."""

from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train_lab import tiny_batches, tiny_trainer

import train
from reid import ReidError
from reid.training import augment
from reid.training.openvino_network import LAYERS, OpenVinoNetwork
from reid.training.teacher import load_teacher

openvino = pytest.importorskip("openvino")
from reid.extras.network import ForeignNetwork  # noqa: E402

SIZE = 32, 16


def graph(last="Sigmoid", padding=1):
    """An openvino.Model with every layer of LAYERS, of a batch of one. last: the layer before the last product."""
    from openvino import opset13 as layers
    generator = np.random.default_rng(0)

    def weights(*shape):
        return generator.normal(size=shape).astype(np.float32)

    image = layers.parameter([1, 3, *SIZE], np.float32)
    x = layers.subtract(layers.gather(image, [2, 1, 0], 1), np.float32([100]))
    x = layers.add(layers.convolution(x, weights(8, 3, 3, 3), [2, 2], [1, 1], [padding, padding], [1, 1]), weights(1, 8, 1, 1))
    x = layers.mvn(x, [2, 3], True, 1e-5, "INSIDE_SQRT")
    x = layers.max_pool(x, [1, 1], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
    x = layers.avg_pool(x, [2, 2], [0, 0], [0, 0], [2, 2], True)
    x = layers.group_convolution(x, weights(4, 2, 2, 3, 3), [1, 1], [2, 2], [2, 2], [2, 2])
    x = layers.clamp(layers.relu(x), 0, 6)
    groups = layers.mvn(layers.reshape(x, [0, 2, -1], True), [2], True, 1e-5, "INSIDE_SQRT")
    x = layers.reshape(groups, layers.shape_of(x), False)
    gate = layers.convolution(layers.reduce_mean(x, [2, 3], True), weights(8, 8, 1, 1), [1, 1], [0, 0], [0, 0], [1, 1])
    x = layers.multiply(x, layers.sigmoid(gate) if last == "Sigmoid" else layers.softmax(gate, 1))
    x = layers.matmul(layers.reduce_mean(x, [2, 3], False), weights(5, 8), False, True)
    return openvino.Model([layers.prelu(x, weights(5))], [image])


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write(tmp_path_factory.mktemp("teacher") / "net.xml")


def write(path, **options):
    openvino.save_model(graph(**options), path, compress_to_fp16=True)
    return path


def images(count=3, size=SIZE):
    return torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pixels", ["bgr255", "rgb255", "imagenet"])
def test_the_same_embeddings_as_openvino(network, pixels):
    ours, theirs = OpenVinoNetwork(network, pixels), ForeignNetwork(network, pixels, "fp32", 1)
    assert ours.config == {"embedding_size": 5} and ours.size == SIZE
    torch.testing.assert_close(ours(images().float()), theirs(images()), rtol=1e-4, atol=1e-4)


def test_every_kind_of_layer_is_tried(network):
    text = network.read_text()
    assert [kind for kind in LAYERS if f'type="{kind}"' not in text] == []


def test_images_of_another_size_are_resized(network):
    larger = images(size=(64, 48)).float()
    ours = OpenVinoNetwork(network, "rgb255")
    assert torch.equal(ours(larger), ours(F.interpolate(larger, SIZE, mode="bilinear")))


def test_the_precision_of_the_student_does_not_reach_it(network):
    ours = OpenVinoNetwork(network, "rgb255")
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = ours(images().float())
    assert torch.equal(embeddings, ours(images().float()))


@pytest.mark.parametrize("how, reason", [
    ("no weights", "No such file"), ("short weights", "ValueError"), ("no xml", "ParseError"),
    ("padding", "padding that differs between the sides"), ("layer", "layers of the kind SoftMax")])
def test_what_cannot_teach(tmp_path, how, reason):
    path = write(tmp_path / "net.xml", last="SoftMax" if how == "layer" else "Sigmoid", padding=2 if how == "padding" else 1)
    weights = path.with_suffix(".bin")
    if how == "no weights":
        weights.unlink()
    elif how == "short weights":
        weights.write_bytes(weights.read_bytes()[:64])
    elif how == "no xml":
        path.write_text("<net")
    with pytest.raises(ReidError, match=f"net.xml: cannot teach .*{reason}.*give the files to --teacher") as caught:
        OpenVinoNetwork(path, "rgb255")
    assert "\n" not in str(caught.value)


def test_a_network_as_the_teacher(network):
    """It sees the images as they are cropped and erased, before their colours change, and has no logits."""
    trainer = tiny_trainer("--teacher", str(network), "--teacher_input", "rgb255", "--jitter", "0.4", "--tint", "0.3")
    images, numbers, labels, rows = tiny_batches(1)
    seen = []
    trainer.teacher.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logged = train.train_step(trainer, images[0], numbers[0], labels, rows)
    assert torch.equal(seen[0], augment.apply(images[0], numbers[0])) and "loss_soft" not in logged
    assert trainer.teacher.map.weight.shape == (5, 1024)


@pytest.mark.parametrize("given, reason", [
    ({"teacher_input": None}, "--teacher_input is for a network"), ({"teacher": "t.pt"}, "--teacher_input is for a network"),
    ({"unlabelled_teacher": "t.pt"}, "embeds the crops itself; leave it out")])
def test_options_that_do_not_fit(network, given, reason):
    args = {"teacher": str(network), "teacher_input": "rgb255", "unlabelled": "crops", "unlabelled_teacher": None, **given}
    with pytest.raises(ReidError, match=reason):
        load_teacher(Namespace(**args), tiny_trainer().model, [], [])
