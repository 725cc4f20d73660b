"""A network as after training, without training."""

import torch

from reid.model import build_model, default_config

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def trained_like(backbone="densenet121", **config):
    """A network with norms as after training: scales of both signs, dead channels, channels that are always on or off."""
    torch.manual_seed(0)
    model = build_model(default_config([1, 2], backbone, **config)).eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.weight, 1, 0.5)
            torch.nn.init.normal_(norm.bias, 0, 0.3)
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.data[:4] = torch.tensor([0.0, 1e-14, 1e-6, -1e-6])
            norm.bias.data[:4] = torch.tensor([0.7, -0.7, 0.9, -0.9])
    torch.nn.init.normal_(model.neck.weight, 1, 0.2)
    model.neck.running_mean.normal_(0, 0.1)
    return model.requires_grad_(False)
