"""A network of an OpenVINO file (.xml with its .bin) as a PyTorch module, so that it can teach on any device."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from reid import ReidError
from reid.cli import first_line
from reid.images import MEAN, STD

DTYPES = {"f16": torch.float16, "f32": torch.float32, "i32": torch.int32, "i64": torch.int64}


def _numbers(text):
    return [int(value) for value in text.split(",")]


def _stride_and_padding(data):
    """Return the strides and the padding of a layer; raise ValueError for padding that differs between the sides."""
    if data["pads_begin"] != data["pads_end"] or data.get("auto_pad", "explicit") != "explicit":
        raise ValueError("padding that differs between the sides")
    return {"stride": _numbers(data["strides"]), "padding": _numbers(data["pads_begin"])}


def _convolve(x, weights, data, groups=1):
    return F.conv2d(x, weights, **_stride_and_padding(data), dilation=_numbers(data["dilations"]), groups=groups)


def _pool(function, x, data, **options):
    if data["rounding_type"] != "floor":
        raise ValueError("pooling that rounds up")
    return function(x, _numbers(data["kernel"]), **_stride_and_padding(data), **options)


def _normalise(x, axes, data):
    """Mean-variance normalisation (MVN), in float32."""
    if data["eps_mode"].upper() != "INSIDE_SQRT" or data["normalize_variance"] != "true":
        raise ValueError("MVN without variance, or with eps outside of the square root")
    variance, mean = torch.var_mean(x.float(), axes, correction=0, keepdim=True)
    return ((x - mean) * (variance + float(data["eps"])).rsqrt()).to(x.dtype)


def _gather(x, rows, axis, data):
    """Pick rows of an axis, int or list of int, by slices: a CUDA graph may not copy indices to the GPU."""
    axis = axis if isinstance(axis, int) else axis[0]
    if data.get("batch_dims", "0") != "0":
        raise ValueError("Gather with batch_dims")
    return x.select(axis, rows) if isinstance(rows, int) else torch.cat([x.narrow(axis, row, 1) for row in rows], axis)


# What a layer computes: its inputs, then `data`, the attributes of the layer (https://docs.openvino.ai, operation sets).
LAYERS = {
    "Add": lambda x, y, data: x + y,
    "AvgPool": lambda x, data: _pool(F.avg_pool2d, x, data, count_include_pad=data["exclude-pad"] == "false"),
    "Clamp": lambda x, data: x.clamp(float(data["min"]), float(data["max"])),
    "Convolution": _convolve,
    "Gather": _gather,
    "GroupConvolution": lambda x, weights, data: _convolve(x, weights.flatten(0, 1), data, groups=len(weights)),
    "MVN": _normalise,
    "MatMul": lambda x, y, data: (x.mT if data["transpose_a"] == "true" else x) @ (y.mT if data["transpose_b"] == "true" else y),
    "MaxPool": lambda x, data: _pool(F.max_pool2d, x, data, dilation=_numbers(data["dilations"])),
    "Multiply": lambda x, y, data: x * y,
    "PReLU": lambda x, slope, data: torch.where(x > 0, x, slope * x),
    "ReLU": lambda x, data: x.relu(),
    "ReduceMean": lambda x, axes, data: x.mean(axes, keepdim=data["keep_dims"] == "true"),
    "Sigmoid": lambda x, data: x.sigmoid(),
    "Subtract": lambda x, y, data: x - y,
}


class TeacherNetwork(nn.Module):
    """Compute embeddings, float32 [N, T], of float images [N, 3, H, W], RGB in 0..255 and of any size.

    path: an .xml file with its .bin beside it, of one input [1 or any, 3, H, W] and one output. pixels: what the network
    expects, "bgr255" or "rgb255" (0 to 255), or "imagenet" (RGB, 0 to 1, minus ImageNet's mean over its deviation). It computes
    in float16 on a GPU, else in float32. Raises ReidError for a file that cannot be read, and for layers that are not in LAYERS.
    """

    def __init__(self, path, pixels):
        super().__init__()
        self.pixels, self.size, self.image, self.result = pixels, None, None, None
        self.integers = {}  # constants: int or lists of int
        self.steps = []  # (result, function, inputs, attributes, results to forget)
        for name, values in ("mean", MEAN), ("std", STD):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)
        for file in (Path(path), Path(path).with_suffix(".bin")):
            if not file.is_file():
                raise ReidError(f"--teacher {path}: no such file as {file}")
        try:
            root, weights = ElementTree.parse(path).getroot(), bytearray(Path(path).with_suffix(".bin").read_bytes())
            source = {(edge.get("to-layer"), edge.get("to-port")): edge.get("from-layer") for edge in root.iter("edge")}
            for layer in root.iter("layer"):  # in the order in which they are computed
                self._add(layer, [source[layer.get("id"), port.get("id")] for port in layer.findall("input/port")], weights)
            for kind in ("Parameter", "Result"):
                if (count := sum(layer.get("type") == kind for layer in root.iter("layer"))) != 1:
                    raise ValueError(f"{count} layers of the kind {kind}")
            self._keep_what_is_needed()
            with torch.no_grad():
                found = self(torch.zeros(2, 3, *self.size))
            if found.ndim != 2 or len(found) != 2:
                raise ValueError(f"the output for 2 images is {list(found.shape)}")
            self.config = {"embedding_size": found.shape[1]}
        except (ElementTree.ParseError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ReidError(f"--teacher {path}: cannot teach ({reason}); embed the images once with inference.py --network, and "
                            "give the files to --teacher") from error

    def _add(self, layer, inputs, weights):
        """Add a layer as a step, or its value where it is a constant."""
        name, kind = layer.get("id"), layer.get("type")
        data = layer.find("data").attrib if layer.find("data") is not None else {}
        shape = [int(size.text) for size in layer.findall("output/port/dim")]
        if kind == "Const":
            dtype, count = DTYPES[data["element_type"]], math.prod(shape)
            self._set(name, torch.frombuffer(weights, dtype=dtype, count=count, offset=int(data["offset"])).view(shape).clone())
        elif kind == "Convert":
            if self._is_constant(inputs[0]):  # else the layer computes a shape
                self._set(name, self._value(inputs[0], torch.float32))
        elif kind == "Parameter":
            self.image, self.size = name, tuple(shape[2:])
        elif kind == "Result":
            self.result = inputs[0]
        elif kind == "Reshape":  # to the shape in the file, which is that of one image
            self.steps.append((name, lambda x, data: x.reshape(-1, *shape[1:]), inputs[:1], data, []))
        else:
            self.steps.append((name, LAYERS.get(kind, kind), inputs, data, []))

    def _keep_what_is_needed(self):
        """Drop the steps on which the result does not depend, such as those that compute shapes; plan what can be forgotten."""
        needed, kept = {self.result}, []
        for name, function, inputs, data, _ in reversed(self.steps):
            if name in needed:
                if isinstance(function, str):
                    raise ValueError(f"layers of the kind {function}")
                forget = [value for value in set(inputs) - needed if not self._is_constant(value)]
                kept.append((name, function, inputs, data, forget))
                needed.update(inputs)
        self.steps = kept[::-1]

    def _set(self, name, value):
        if value.is_floating_point():
            self.register_buffer(f"constant_{name}", value.float(), persistent=False)
        else:
            self.integers[name] = value.tolist()

    def _is_constant(self, name):
        return name in self.integers or hasattr(self, f"constant_{name}")

    def _value(self, name, dtype):
        return self.integers[name] if name in self.integers else getattr(self, f"constant_{name}").to(dtype)

    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            x = images.float()
            if x.shape[-2:] != self.size:
                x = F.interpolate(x, self.size, mode="bilinear")
            if self.pixels == "imagenet":
                x = (x - self.mean) / self.std
            elif self.pixels == "bgr255":
                x = x.flip(1)
            x = x.half() if x.device.type == "cuda" else x
            values = {self.image: x}
            for name, function, inputs, data, forget in self.steps:
                given = (values[key] if key in values else self._value(key, x.dtype) for key in inputs)
                values[name] = function(*given, data)
                for key in forget:
                    del values[key]
            return values[self.result].flatten(1).float()
