"""A network of an OpenVINO file in PyTorch: the same embeddings as OpenVINO's, every kind of layer, and what cannot be used."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from openvino_lab import SIZE, write
from train_lab import tiny_batches, tiny_trainer

import train
from reid import ReidError
from reid.training import augment
from reid.training.teacher import load_teacher
from reid.training.teacher_network import LAYERS, TeacherNetwork

pytest.importorskip("openvino")
from reid.extras.network import ForeignNetwork


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write(tmp_path_factory.mktemp("teacher") / "net.xml")


def images(count=3, size=SIZE):
    return torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pixels", ["bgr255", "rgb255", "imagenet"])
def test_the_same_embeddings_as_openvino(network, pixels):
    ours, theirs = TeacherNetwork(network, pixels), ForeignNetwork(network, pixels, "fp32", 1)
    assert ours.config == {"embedding_size": 5} and ours.size == SIZE
    torch.testing.assert_close(ours(images().float()), theirs(images()), rtol=1e-4, atol=1e-4)


def test_every_kind_of_layer_is_tried(network):
    text = network.read_text()
    assert [kind for kind in LAYERS if f'type="{kind}"' not in text] == []


def test_images_of_another_size_are_resized(network):
    larger = images(size=(64, 48)).float()
    ours = TeacherNetwork(network, "rgb255")
    assert torch.equal(ours(larger), ours(F.interpolate(larger, SIZE, mode="bilinear")))


def test_the_precision_of_the_student_does_not_reach_it(network):
    ours = TeacherNetwork(network, "rgb255")
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = ours(images().float())
    assert torch.equal(embeddings, ours(images().float()))


@pytest.mark.parametrize("how, reason", [
    ("short weights", "ValueError"), ("no xml", "ParseError"),
    ("padding", "padding that differs between the sides"), ("layer", "layers of the kind SoftMax"),
    ("outputs", "2 layers of the kind Result"), ("batch", r"the output for 2 images is \[8, 5\]")])
def test_what_cannot_teach(tmp_path, how, reason):
    path = write(tmp_path / "net.xml", last="SoftMax" if how == "layer" else "Sigmoid", padding=2 if how == "padding" else 1,
                 end=how if how in ("outputs", "batch") else None)
    weights = path.with_suffix(".bin")
    if how == "short weights":
        weights.write_bytes(weights.read_bytes()[:64])
    elif how == "no xml":
        path.write_text("<net")
    with pytest.raises(ReidError, match=f"net.xml: cannot teach .*{reason}.*give the files to --teacher") as caught:
        TeacherNetwork(path, "rgb255")
    assert "\n" not in str(caught.value)


def test_a_missing_file(network, tmp_path):
    (tmp_path / "net.xml").write_bytes(network.read_bytes())
    for path, missing in (tmp_path / "net.xml", "net.bin"), (tmp_path / "other.xml", "other.xml"):
        with pytest.raises(ReidError, match=f"--teacher .*: no such file as .*{missing}$"):
            TeacherNetwork(path, "rgb255")


def test_a_network_as_the_teacher(network):
    """It sees the images as they are cropped and erased, before their colours change, and has no logits."""
    trainer = tiny_trainer("--teacher", str(network), "--teacher_input", "rgb255", "--jitter", "0.4", "--tint", "0.3")
    images, numbers, labels, rows = tiny_batches(1)
    seen = []
    trainer.teacher.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logged = train.train_step(trainer, images[0], numbers[0], labels, rows)
    assert torch.equal(seen[0], augment.apply(images[0], numbers[0])) and "loss_soft" not in logged
    assert len(trainer.teacher.map.weight) == 5


@pytest.mark.parametrize("given, reason", [
    ({"teacher_input": None}, "needs --teacher_input"), ({"teacher": "t.pt"}, "t.pt: is no network .*leave --teacher_input out"),
    ({"teacher": None, "unlabelled": None}, "--teacher_input needs a --teacher"),
    ({"unlabelled_teacher": "t.pt"}, "embeds the crops itself; leave it out")])
def test_options_that_do_not_fit(network, given, reason):
    args = {"teacher": str(network), "teacher_input": "rgb255", "unlabelled": "crops", "unlabelled_teacher": None, **given}
    with pytest.raises(ReidError, match=reason):
        load_teacher(Namespace(**args), tiny_trainer().model, [], [])
