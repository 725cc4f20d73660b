"""The network: uint8 crops in, a pooled feature, a batch-norm neck, a classifier over the training identities."""

import torch
import torch.nn.functional as F
from torch import nn

from reid import ReidError
from reid.images import MEAN, STD

EMBEDDING_SIZES = {"densenet121": 1024, "resnet50": 2048}
REMOVED = {"last_stride": 1, "pool": "avg", "ibn": False}  # choices of earlier versions, and the one that is left of each
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_config(classes, backbone="densenet121", height=256, width=128):
    """Return what it takes to build the network again; it is part of the checkpoint. classes: the sorted training ids."""
    return {"backbone": backbone, "height": height, "width": width, "embedding_size": EMBEDDING_SIZES[backbone],
            "classes": classes}


class DenseLayer(nn.Module):
    def __init__(self, channels, growth, bottleneck):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)

    def forward(self, parts):
        x = self.conv1(F.relu(self.norm1(torch.cat(parts, 1)), inplace=True))
        return self.conv2(F.relu(self.norm2(x), inplace=True))


class DenseBlock(nn.ModuleDict):
    def forward(self, x):
        parts = [x]
        for layer in self.values():
            parts.append(layer(parts))
        return torch.cat(parts, 1)


class Transition(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.stride = stride

    def forward(self, x):
        x = self.conv(F.relu(self.norm(x), inplace=True))
        return F.avg_pool2d(x, 2) if self.stride == 2 else x


class DenseNet121(nn.Sequential):
    """DenseNet-121's convolutions (Huang et al., CVPR 2017) under torchvision's names, so its weights load as they are.

    Not torchvision's own class, whose import takes as long as the rest of `inference.py`. The last transition does not pool: a
    256 x 128 crop ends at 16 x 8 instead of 8 x 4 (last stride 1; Luo et al., arXiv 1903.07071).
    """

    def __init__(self, growth=32, bottleneck=4, blocks=(6, 12, 24, 16)):
        super().__init__()
        channels = 64
        self.conv0 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.norm0 = nn.BatchNorm2d(channels)
        self.relu0 = nn.ReLU(inplace=True)
        self.pool0 = nn.MaxPool2d(3, stride=2, padding=1)
        for i, layers in enumerate(blocks, 1):
            block = DenseBlock()
            for j in range(layers):
                block[f"denselayer{j + 1}"] = DenseLayer(channels + j * growth, growth, bottleneck)
            self.add_module(f"denseblock{i}", block)
            channels += layers * growth
            if i < len(blocks):
                self.add_module(f"transition{i}", Transition(channels, 1 if i == len(blocks) - 1 else 2))
                channels //= 2
        self.norm5 = nn.BatchNorm2d(channels)
        self.relu5 = nn.ReLU(inplace=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)


def resnet50():
    """Make torchvision's ResNet-50 (v1.5 strides) without its head and with last stride 1, under torchvision's names."""
    from torchvision.models import resnet  # the import that DenseNet's users do not pay for

    full = resnet.resnet50()
    full.layer4[0].conv2.stride = full.layer4[0].downsample[0].stride = (1, 1)
    full.avgpool, full.fc = nn.Identity(), nn.Identity()
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    body = nn.Sequential()
    for name in names:
        body.add_module(name, getattr(full, name))
    return body


BACKBONES = {"densenet121": DenseNet121, "resnet50": resnet50}


class ReidModel(nn.Module):
    """Backbone, pooling, batch-norm neck (Luo et al., arXiv 1903.07071) and classifier.

    config: see `default_config`. The embedding is the neck's output, L2-normalised. The neck's bias stays zero, so that
    classifier and cosine see the same directions.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        size = config["embedding_size"]
        self.body = BACKBONES[config["backbone"]]()
        self.neck = nn.BatchNorm1d(size)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(size, len(config["classes"]), bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255, persistent=False)

    def features(self, images):
        """Map uint8 (or float of the same 0..255 range) [N, 3, H, W] to pooled backbone features, float32 [N, D]."""
        x = ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.body(x).float().mean((2, 3))

    def forward(self, images):
        """Training: (pooled features, output of the neck, logits): [N, D], [N, D], [N, classes].

        Evaluation: embeddings float32 [N, D], the output of the neck at norm 1.
        """
        pooled = self.features(images)
        neck = self.neck(pooled)
        if self.training:
            return pooled, neck, self.classifier(neck)
        return F.normalize(neck.float())


def check_config(config):
    """Raise ReidError for a config that `build_model` cannot build."""
    try:
        for name, only in REMOVED.items():
            if config.get(name, only) != only:
                raise ValueError(f"{name} {config[name]!r}: this version has no such network")
        if config["embedding_size"] != EMBEDDING_SIZES[config["backbone"]]:
            raise KeyError("embedding_size")
        if not all(isinstance(config[k], int) and 32 <= config[k] <= 2048 for k in ("height", "width")):
            raise KeyError("height or width")
        if not isinstance(config["classes"], (list, tuple)) or not all(isinstance(key, str) for key in config):
            raise KeyError("classes")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:  # a file may hold any type
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ReidError(f"model configuration not understood ({reason}); is the checkpoint from another version?") from error


def build_model(config):
    """Make a ReidModel in float32, channels last, with fresh weights. Raises ReidError for a config that it cannot build."""
    check_config(config)
    return ReidModel(config).to(memory_format=torch.channels_last)


def plain_network(model, dtype):
    """Return a callable uint8 [n, 3, H, W] -> pooled features float32 [n, D] of a ReidModel, its convolutions in `dtype`."""
    @torch.no_grad()
    def features(images):
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return model.features(images)

    return features


def cast_network(model, dtype):
    """Return a `plain_network` for a GPU: norms are folded into the convolutions before them, weights are cast only once."""
    from torch.fx.experimental.optimization import fuse

    body = fuse(model.body)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):  # norms compute in float32, whatever they are given
            module.to(dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def features(images):
        x = ((images.float() - model.mean) / model.std).to(dtype, memory_format=torch.channels_last)
        return body(x).float().mean((2, 3))

    return features


def pick_device(name="auto"):
    """Choose a device: `auto` is CUDA where there is a GPU, else the CPU. Raises ReidError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch lists every kind of device, or its own flags
        raise ReidError(f"--device {name} is not available here; use auto, cpu, cuda or cuda:<number>") from error
    return device


def pick_precision(device, name="auto"):
    """Choose a key of DTYPES: `auto` is bf16 where the device computes it fast, else fp16 on a GPU and fp32 on a CPU.

    Raises ReidError for a precision that the device does not support.
    """
    if name not in ("auto", *DTYPES):
        raise ReidError(f"--precision {name}: use auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        return name if name != "auto" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16":
        raise ReidError("--precision fp16 needs a GPU; a CPU takes fp32 or bf16")
    if name == "auto":
        return "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "fp32"
    if name == "bf16" and not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        raise ReidError("--precision bf16: this processor does not support it; use fp32")
    return name
