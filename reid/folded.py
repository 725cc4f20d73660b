"""DenseNet for inference: every batch norm folded away, and no channel copied twice.

Three rewrites, each exact but for rounding:

- A norm after a convolution goes into that convolution's weights and bias.
- A norm and ReLU before a 1x1 convolution become one clamp, because relu(a x + b) = a (max(x, t) - t) with t = -b / a
  (min where a < 0): the scale a goes into the weights, -a t into the bias.
- A block's channels live in one matrix [pixels, channels]. Each layer reads the first of its columns and writes the next
  32, so `torch.cat` is gone.

The normalisation of pixels stays outside: folded into the first convolution it would need a padding of mean grey, and it
costs one per cent.
"""

import platform

import torch
import torch.nn.functional as F

PASS_BYTES = 4 << 20  # a block runs on as many images at a time as fill the second-level cache of two cores (CPU)
CONSTANT = 8  # columns of ones beside the channels where the matrix product takes no float32 bias; 8 keeps rows aligned


class FoldedDenseNet:
    """Pooled features of uint8 images with the weights of a ReidModel (backbone densenet121), on CPU or CUDA.

    dtype: of weights and activations; products are summed in float32. On x86 oneDNN's packed weights and fused bias and
    ReLU are used (`packed`), elsewhere plain PyTorch.
    """

    def __init__(self, model, dtype, packed=None):
        self.model, self.dtype = model, dtype
        self.device = model.mean.device
        x86 = self.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
        self.packed = x86 if packed is None else packed
        # PyTorch clamps bf16 by way of float32. Bit patterns compare like the numbers as long as the bounds are not
        # negative, so on the CPU every stored channel is shifted until they are, and int16 is clamped: 2 to 3 times faster.
        self.bits = torch.int16 if dtype == torch.bfloat16 and self.device.type == "cpu" else dtype
        self.constant = 0 if self.packed else CONSTANT
        body = model.body
        self.stem = self._conv(*_fold_norm(body.conv0, body.norm0), stride=2, padding=3, relu=True)
        self.blocks, arriving = [], None
        for i in range(1, 5):
            layers = list(getattr(body, f"denseblock{i}").values())
            transition = getattr(body, f"transition{i}", None)
            norms = [layer.norm1 for layer in layers] + [transition.norm if transition else body.norm5]
            # What leaves the stem is not negative, so its channels need no shift.
            shift = self._shift(norms, len(layers) * 32 + layers[0].norm1.num_features, 64 if i == 1 else 0)
            if arriving:
                gate, weight, bias, stride = arriving
                self.blocks[-1].append((gate, self._pointwise(weight, bias + shift[: len(bias)], relu=False), stride))
            self.blocks.append([[self._layer(layer, shift) for layer in layers]])
            if transition:
                gate, weight, bias = self._gate(transition.norm, shift, _matrix(transition.conv))
                arriving = gate, weight, bias, transition.stride
        self.last = self._gate(body.norm5, shift, None)

    @torch.inference_mode()
    def __call__(self, images):
        """uint8 [n, 3, H, W] -> pooled features before the neck, float32 [n, D], as `ReidModel.features` gives them."""
        x = images
        height, width = (images.shape[2] + 3) // 4, (images.shape[3] + 3) // 4
        for layers, *transition in self.blocks:
            size = PASS_BYTES // (layers[-1][0][0].nbytes * height * width) if self.device.type == "cpu" else len(x)
            parts = [self._block(part, layers, *transition) for part in x.split(max(1, size))]
            x = torch.cat(parts) if len(parts) > 1 else parts[0]
            height, width = x.shape[2:] if transition else (1, 1)
        return x

    def _start(self, images):
        x = ((images.float() - self.model.mean) / self.model.std).to(self.dtype, memory_format=torch.channels_last)
        x = self.stem(x)
        if self.bits == self.dtype:
            return F.max_pool2d(x, 3, stride=2, padding=1)
        # Not negative, so bit patterns compare like numbers here too, and zeros pad.
        x, odd = x.permute(0, 2, 3, 1).view(self.bits), (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2)
        x = F.pad(x, odd) if any(odd) else x
        for dim in (1, 2):
            even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
            x = torch.maximum(even, odd)
            later = x.narrow(dim, 1, x.shape[dim] - 1)
            torch.maximum(later, odd.narrow(dim, 0, x.shape[dim] - 1), out=later)
        return x.view(self.dtype).permute(0, 3, 1, 2)

    def _block(self, x, layers, transition=None):
        x = x if x.is_floating_point() else self._start(x)
        n, c, h, w = x.shape
        c += self.constant
        total = c + 32 * len(layers)
        buffer = torch.empty(n * h * w, total, dtype=self.dtype, device=x.device)
        buffer[:, : self.constant] = 1
        buffer = buffer.view(self.bits)
        scratch = torch.empty_like(buffer).flatten()
        buffer[:, self.constant : c] = _rows(x).view(self.bits)
        for (low, high), pointwise, conv in layers:
            gated = torch.clamp(buffer[:, :c], low, high, out=scratch[: len(buffer) * c].view(-1, c)).view(self.dtype)
            new = conv(pointwise(gated).view(n, h, w, -1).permute(0, 3, 1, 2))
            buffer[:, c : c + 32] = _rows(new).view(self.bits)
            c += 32
        low, high = transition[0] if transition else self.last[0]
        gated = torch.clamp(buffer, low, high, out=scratch.view(-1, total)).view(self.dtype).view(n, h, w, total)
        if not transition:
            return self._pool(gated[..., self.constant :])
        _, pointwise, stride = transition
        if stride == 2:  # pooling before the 1x1 convolution gives the same for a quarter of the work
            gated = F.avg_pool2d(gated.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        n, h, w, _ = gated.shape
        return pointwise(gated.reshape(n * h * w, total)).view(n, h, w, -1).permute(0, 3, 1, 2)

    def _pool(self, gated):
        _, scale, offset = self.last
        if self.model.pool is None:
            return gated.mean((1, 2), dtype=torch.float32) * scale + offset
        return self.model.pool((gated.float() * scale + offset).permute(0, 3, 1, 2))

    def _shift(self, norms, channels, natural):
        """What is added to each stored channel so that no bound of the layers reading it is negative, float64 [channels]."""
        shift = torch.zeros(channels, dtype=torch.float64)
        if self.bits == self.dtype:
            return shift
        for norm in norms:
            scale, offset = _affine(norm)
            bound = -offset / scale.where(scale.abs() > 1e-12, torch.inf)
            # A ReLU that is open eight deviations below the mean never acts: shifting so far would only cost precision.
            reach = norm.running_mean.double() - 8 * norm.running_var.double().sqrt()
            need = torch.where(bound > reach, -bound, 0)
            shift[: len(need)] = torch.maximum(shift[: len(need)], need)
        shift[:natural] = 0
        return (shift * (1 + 2**-7)).to(self.dtype).double()

    def _gate(self, norm, shift, weight):
        """norm and ReLU before the matrix `weight` -> bounds of the clamp, folded weight, bias (float64).

        Without `weight` (the last norm): bounds, scale and offset, float32, which turn clamped values into normed ones.
        """
        scale, offset = _affine(norm)
        dead = scale.abs() <= 1e-12
        at = shift[: len(scale)] - torch.where(dead, 0, offset / scale.where(~dead, 1))
        largest = torch.finfo(self.dtype).max
        free = dead | (at < (0 if self.bits != self.dtype else -largest))
        bound = at.clamp(-largest, largest).to(self.dtype)
        at = torch.where(free, at, bound.double())  # the bias makes up for the bound's own rounding
        low, high = (-32768, 32767) if self.bits != self.dtype else (-torch.inf, torch.inf)
        bound = bound.view(self.bits)
        bounds = bound.masked_fill(free | (scale < 0), low), bound.masked_fill(free | (scale > 0), high)
        ones = torch.ones(self.constant, dtype=self.dtype).view(self.bits)
        bounds = tuple(torch.cat([ones, value]).to(self.device) for value in bounds)
        rest = torch.where(dead, offset.clamp(min=0), 0)
        scale = torch.where(dead, 0, scale)
        if weight is None:
            return bounds, scale.float().to(self.device), (rest - scale * at).float().to(self.device)
        folded = (weight * scale).to(self.dtype)
        return bounds, folded, (weight * rest).sum(1) - (folded.double() * at).sum(1)

    def _layer(self, layer, shift):
        channels = layer.norm1.num_features
        weight, bias = _fold_norm(layer.conv1, layer.norm2)
        bounds, weight, extra = self._gate(layer.norm1, shift, weight.flatten(1))
        offset = shift[channels : channels + 32] if self.bits != self.dtype else None
        conv = self._conv(layer.conv2.weight.detach(), offset, padding=1)
        return bounds, self._pointwise(weight, bias + extra, relu=True), conv

    def _pointwise(self, weight, bias, relu):
        """[m, c] -> [m, o]: the 1x1 convolution of `weight` [o, c] and float64 `bias` [o], with ReLU if asked."""
        if self.packed:
            op, bias = torch.ops.mkldnn._linear_pointwise, bias.float()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
            return lambda x: op(x, packed, bias, "relu" if relu else "none", [], "")
        high = bias.to(self.dtype)
        columns = weight.new_zeros(len(bias), self.constant)
        columns[:, 0], columns[:, 1] = high, (bias - high.double()).to(self.dtype)  # together as good as float32
        weight = torch.cat([columns, weight], 1).to(self.device).T
        zero = weight.new_zeros(weight.shape[1])
        return (lambda x: torch._addmm_activation(zero, x, weight)) if relu else (lambda x: x @ weight)

    def _conv(self, weight, bias, stride=1, padding=0, relu=False):
        weight = weight.to(self.dtype).to(self.device, memory_format=torch.channels_last)
        if self.packed:
            op, bias = torch.ops.mkldnn._convolution_pointwise, None if bias is None else bias.float()
            pads, strides, ones = [padding] * 2, [stride] * 2, [1, 1]
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, pads, strides, ones, 1)
            return lambda x: op(x, packed, bias, pads, strides, ones, 1, "relu" if relu else "none", [], "")
        bias = None if bias is None else bias.to(self.dtype).to(self.device)
        after = F.relu_ if relu else lambda x: x
        return lambda x: after(F.conv2d(x, weight, bias, stride, padding))


def _affine(norm):
    """A batch norm in evaluation as x * scale + offset, float64 [c]."""
    scale = norm.weight.detach().double().cpu() / (norm.running_var.double().cpu() + norm.eps).sqrt()
    return scale, norm.bias.detach().double().cpu() - norm.running_mean.double().cpu() * scale


def _fold_norm(conv, norm):
    scale, offset = _affine(norm)
    return conv.weight.detach().double().cpu() * scale[:, None, None, None], offset


def _matrix(conv):
    return conv.weight.detach().double().cpu().flatten(1)


def _rows(x):
    """[n, c, h, w] in channels-last memory -> [n h w, c], a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
