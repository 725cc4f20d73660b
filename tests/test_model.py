"""Parts of the network that only training uses, or only some networks have."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reid import ReidError
from reid.checkpoint import load_weights
from reid.model import IBN, DenseLayer, build_model, check_config, default_config, mix_style
from reid.retrieval.extract import plain_network

SIZE = {"height": 64, "width": 32}
CONFIG = default_config([1, 2, 3], **SIZE)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(CONFIG)


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (4, 3, 64, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_mixed_style_has_the_moments_between():
    x = torch.randn(3, 5, 8, 4) * torch.tensor([1.0, 2, 3]).view(3, 1, 1, 1) + torch.tensor([0.0, 5, -5]).view(3, 1, 1, 1)
    own, partner = torch.tensor([1.0, 0.25, 0.0]), torch.tensor([2, 0, 1])
    mixed = mix_style(x, own, partner)
    for i in range(3):
        for moment in (torch.mean, torch.std):
            wanted = own[i] * moment(x[i], (1, 2)) + (1 - own[i]) * moment(x[partner[i]], (1, 2))
            assert torch.allclose(moment(mixed[i], (1, 2)), wanted, atol=1e-4)
    assert torch.allclose(mixed[0], x[0], atol=1e-5)
    content = [(maps - maps.mean((1, 2), keepdim=True)) / maps.std((1, 2), keepdim=True) for maps in (x[1], mixed[1])]
    assert torch.allclose(*content, atol=1e-4)


def test_style_reaches_the_features_and_only_in_training(model, images):
    own, partner = torch.full((4,), 0.5), torch.tensor([1, 2, 3, 0])
    model.eval()
    with torch.no_grad():
        plain = model.features(images)
        assert torch.allclose(model.features(images, (torch.ones(4), partner)), plain, atol=1e-4)
        assert not torch.allclose(model.features(images, (own, partner)), plain, atol=1e-2)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    layer = DenseLayer(8, 4, 2).train()
    layer.drop = 0.25
    x = torch.randn(1, 8, 4, 4).repeat(4000, 1, 1, 1)
    with torch.no_grad():
        dropped, layer.drop = layer([x]), 0.0
        whole = layer([x])
    kept = dropped.flatten(1).abs().sum(1) > 0
    assert abs(kept.float().mean() - 0.75) < 0.03
    assert torch.allclose(dropped[kept], whole[kept] / 0.75, atol=1e-4)


def test_depth_grows_and_evaluation_knows_nothing_of_it(images):
    model = build_model(CONFIG)
    model.eval()
    with torch.no_grad():
        before = model(images)
        model.regularise(0.5, 0.2)
        assert torch.equal(model(images), before)
    shares = [module.drop for module in model.modules() if isinstance(module, DenseLayer)]
    assert len(shares) == 58 and shares == sorted(shares) and shares[-1] == 0.2 and shares[0] == pytest.approx(0.2 / 58)
    with pytest.raises(ReidError, match="--drop_path"):
        build_model(default_config([1, 2], "resnet50", **SIZE)).regularise(0.0, 0.1)


def test_dropout_is_before_the_classifier(model, images):
    model.train()
    model.regularise(1.0, 0.0)
    assert (model(images)[1] == 0).all()
    model.regularise(0.0, 0.0)
    assert (model(images)[1] != 0).all()


def test_ibn_is_instance_norm_beside_batch_norm():
    norm, reference = IBN(10), nn.InstanceNorm2d(5, affine=True)
    nn.init.normal_(norm.IN.weight)
    nn.init.normal_(norm.IN.bias)
    reference.load_state_dict(norm.IN.state_dict())
    x = torch.randn(6, 10, 4, 4) * 3 + 1
    expected = torch.cat([reference(x[:, :5]), F.batch_norm(x[:, 5:], None, None, training=True)], 1)
    assert torch.allclose(norm.train()(x), expected, atol=1e-5)


@pytest.mark.parametrize("backbone, count", [("densenet121", 6 + 12 + 24), ("resnet50", 3 + 4 + 6)])
def test_ibn_in_the_early_stages(backbone, count, images):
    model = build_model(default_config([1, 2], backbone, ibn=True, **SIZE)).eval()
    assert sum(isinstance(module, IBN) for module in model.modules()) == count
    with torch.inference_mode():
        assert torch.allclose(plain_network(model, torch.float32)(images), model.features(images))


def test_ibn_takes_the_rest_of_a_plain_network(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    lines = []
    load_weights(build_model(CONFIG | {"ibn": True}), str(tmp_path / "plain.pth"), lines.append)
    assert "backbone tensors matched" in lines[0] and "fresh: body.denseblock1.denselayer1.norm2.IN.weight" in lines[0]


def test_configurations_of_older_checkpoints():
    check_config({key: value for key, value in CONFIG.items() if key != "ibn"})
    with pytest.raises(ReidError, match="ibn"):
        check_config(CONFIG | {"ibn": "yes"})
