"""DenseNet-121 for inference on a CPU: batch norms folded into convolutions, no channel copied twice.

Three rewrites, each exact but for rounding. A norm after a convolution goes into its weights and bias. A norm and ReLU before
a 1x1 convolution become one clamp, because relu(a x + b) = a (max(x, t) - t) with t = -b / a (min for a < 0): the scale a
goes into the weights, -a t into the bias. The channels of a block are one matrix [pixels, channels], of which each layer
reads the first columns and writes the next 32, so `torch.cat` is gone.
"""

import torch
import torch.nn.functional as F

PASS_BYTES = 4 << 20  # a block runs on as many images at a time as fill the second-level cache of two cores
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # relative error of the features; rounding makes 1e-6 and 6e-3 of it


class FoldedDenseNet:
    """Pooled features of uint8 images with the weights of a ReidModel on the CPU; weights and activations are `dtype`.

    Raises AttributeError or RuntimeError where the private operators of PyTorch that it needs are missing or wrong.
    """

    @torch.no_grad()
    def __init__(self, model, dtype):
        self.model, self.dtype, self.stages, body = model, dtype, [], model.body
        # PyTorch clamps bf16 by way of float32. Bit patterns compare like the numbers as long as the bounds are not
        # negative, so every stored channel is shifted until they are, and int16 is clamped: 2 to 3 times faster.
        self.bits = torch.int16 if dtype == torch.bfloat16 else dtype
        self.stem = self._conv(*_fold(body.conv0, body.norm0), stride=2, padding=3, relu="relu")
        transitions = [body.transition1, body.transition2, body.transition3]
        blocks = [list(getattr(body, f"denseblock{i}").values()) for i in range(1, 5)]
        ends = [*(transition.norm for transition in transitions), body.norm5]
        shifts = [self._shift([*(layer.norm1 for layer in layers), end]) for layers, end in zip(blocks, ends)]
        shifts[0][: body.conv0.out_channels] = 0  # what leaves the stem is not negative
        gates = [self._gated(end, shift, transition.conv.weight.double(), following[: transition.conv.out_channels])
                 for end, shift, transition, following in zip(ends, shifts, transitions, shifts[1:])]
        bounds, scale, t = self._gate(body.norm5, shifts[-1])
        self.scale, self.offset = scale.float(), (-scale * t).float()
        for layers, end, shift, gate, area in zip(blocks, ends, shifts, [*gates, (bounds, None)], (16, 64, 256, 256)):
            image_bytes = model.config["height"] * model.config["width"] // area * end.num_features * dtype.itemsize
            folded = [(*self._gated(layer.norm1, shift, *_fold(layer.conv1, layer.norm2), relu="relu"),
                       self._conv(layer.conv2.weight, shift[layer.norm1.num_features :][:32], padding=1)) for layer in layers]
            self.stages.append((max(1, PASS_BYTES // image_bytes), folded, *gate))
        image = torch.randint(256, (1, 3, 64, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        expected = model.features(image)
        if not (self(image) - expected).norm() <= TOLERANCE[dtype] * expected.norm():  # also where it is NaN
            raise RuntimeError("the folded network differs from the plain one")

    @torch.inference_mode()
    def __call__(self, x):
        """uint8 [n, 3, H, W] -> pooled features before the neck, float32 [n, D], as `ReidModel.features` gives them."""
        for size, *stage in self.stages:
            x = torch.cat([self._block(part, *stage) for part in x.split(size)])
        return x

    def _block(self, x, layers, bounds, pointwise):
        """uint8 [n, 3, H, W] or stored channels [n, h, w, c] -> the next block's channels, or features [n, D]."""
        if x.dtype == torch.uint8:
            x = x.float().sub_(self.model.mean).div_(self.model.std).to(self.dtype, memory_format=torch.channels_last)
            x = F.max_pool2d(self.stem(x), 3, stride=2, padding=1).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        stored = torch.empty(n * h * w, c + 32 * len(layers), dtype=self.bits)
        scratch = torch.empty_like(stored).flatten()
        stored[:, :c] = x.reshape(-1, c).view(self.bits)
        for layer_bounds, squeeze, conv in layers:
            gated = torch.clamp(stored[:, :c], *layer_bounds, out=scratch[: len(stored) * c].view(-1, c)).view(self.dtype)
            new = conv(squeeze(gated).view(n, h, w, -1).permute(0, 3, 1, 2))
            stored[:, c : c + 32] = new.permute(0, 2, 3, 1).reshape(-1, 32).view(self.bits)
            c += 32
        gated = torch.clamp(stored, *bounds, out=scratch.view(-1, c)).view(self.dtype).view(n, h, w, c)
        if pointwise is None:
            return gated.mean((1, 2), dtype=torch.float32) * self.scale + self.offset
        if c < 1024:  # the first two pool; before the 1x1 convolution that gives the same for a quarter of the work
            gated = F.avg_pool2d(gated.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return pointwise(gated.reshape(-1, c)).view(*gated.shape[:3], -1)

    def _shift(self, norms):
        """Return float64 [channels] to add to each stored channel, so that no bound of the layers that read it is negative."""
        shift = torch.zeros(norms[-1].num_features, dtype=torch.float64)
        for norm in norms if self.bits != self.dtype else []:
            scale, offset = _affine(norm)
            # A bound eight deviations below the mean is never met: to shift so far would only cost precision.
            met = -offset / scale > norm.running_mean.double() - 8 * norm.running_var.double().sqrt()
            shift[: len(met)] = shift[: len(met)].maximum(torch.where(met, offset / scale, 0))
        return (shift * (1 + 2**-7)).to(self.dtype).double()

    def _gate(self, norm, shift):
        """norm and ReLU of channels stored with `shift` -> (low, high), a, t: they are a * (clamp(x, low, high) - t)."""
        scale, offset = _affine(norm)
        t = shift[: len(scale)] - offset / scale
        bound = t.to(self.dtype)
        unmet = (bound < 0) & (self.bits != self.dtype)  # the ReLU is open for every x where a > 0, closed where a < 0
        t = torch.where(unmet, t, bound.double())  # the bias makes up for the rounding of a bound
        low, high = (-32768, 32767) if self.bits != self.dtype else (-torch.inf, torch.inf)
        fill = bound.view(self.bits).masked_fill
        return (fill(unmet | (scale < 0), low), fill(unmet | (scale > 0), high)), torch.where(unmet & (scale < 0), 0, scale), t

    def _gated(self, norm, shift, weight, bias, relu="none"):
        """norm, ReLU and a 1x1 convolution (float64 [o, c, 1, 1] and bias [o]) -> (low, high), callable [m, c] -> [m, o]."""
        bounds, scale, t = self._gate(norm, shift)
        weight = (weight.flatten(1) * scale).to(self.dtype)
        bias, packed = (bias - (weight.double() * t).sum(1)).float(), torch.ops.mkldnn._reorder_linear_weight(weight)
        return bounds, lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, relu, [], "")

    def _conv(self, weight, bias, stride=1, padding=0, relu="none"):
        sizes = [padding] * 2, [stride] * 2, [1, 1], 1
        weight = weight.to(self.dtype).to(memory_format=torch.channels_last)
        packed, bias = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes), bias.float()
        return lambda x: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *sizes, relu, [], "")


def _affine(norm):
    """Return a batch norm in evaluation as a x + b, float64 [c] each; a dead channel's `a` is not 0, so that t exists."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale.where(scale.abs() > 1e-12, 1e-12), norm.bias.double() - norm.running_mean.double() * scale


def _fold(conv, norm):
    """Fold a norm into the convolution before it: float64 weight and bias."""
    scale, offset = _affine(norm)
    return conv.weight.double() * scale[:, None, None, None], offset
