"""A network of another origin: an OpenVINO (.xml with its .bin) or ONNX file in place of a run's checkpoint."""

import hashlib
import math
import re
from pathlib import Path

import torch
from torch import nn

from reid import ReidError, distributed
from reid.cli import first_line
from reid.extras.openvino import CompiledGraph, engine_of
from reid.images import MEAN, PREPROCESSING, STD
from reid.retrieval.extract import Extractor, worker_count

SIZE = (256, 128)  # height and width of the crops for a network that takes any


def make_extractor(args, checkpoint=None):
    """Return the Extractor of a script's options: of --network where it is given, else of `checkpoint` with --engine.

    Under torchrun it embeds on the GPU of this rank.
    """
    mirror = args.mirror is not False
    if args.network:
        return NetworkExtractor(args.network, args.network_input, args.device, args.precision, mirror, args.batch_size)
    device = distributed.device or args.device
    return Extractor(checkpoint, device, args.precision, engine_of(args), mirror, args.batch_size, args.compile)


def network_fingerprint(path, pixels):
    """Return 16 hex digits that change with a network's files, the kind of its input or the preprocessing.

    Raises ReidError for a file that is not there or of another kind.
    """
    path, digest = Path(path), hashlib.sha256(f"{PREPROCESSING} {pixels}".encode())
    if path.suffix not in (".xml", ".onnx"):
        raise ReidError(f"--network {path}: give an OpenVINO network (.xml, with its .bin beside it) or an ONNX network (.onnx)")
    if not path.is_file():
        raise ReidError(f"--network {path}: no such file")
    content = path.read_bytes()
    digest.update(content)
    for weights in [path.with_suffix(".bin")] if path.suffix == ".xml" else _external_data(path, content):
        if not weights.is_file():
            raise ReidError(f"--network {path}: no such file as {weights}, which holds its weights")
        digest.update(weights.read_bytes())
    return digest.hexdigest()[:16]


def _external_data(path, content):
    """Return the files that hold weights of an ONNX network.

    They are found in its bytes, since the package onnx may not be installed: TensorProto.external_data is a list of pairs of
    strings, of which one is "location" and a file name (https://onnx.ai/onnx/repo-docs/ExternalData.html). A string has its
    length before it.
    """
    names = {found[2][: found[1][0]].decode(errors="replace")
             for found in re.finditer(rb"\x0a\x08location\x12([\x01-\x7f])(?=(.{1,127}))", content, re.DOTALL)}
    return [path.parent / name for name in sorted(names)]


class NetworkExtractor(Extractor):
    """An Extractor for a network of another origin, on a CPU through OpenVINO.

    path: an .xml file with its .bin, or an .onnx file, with one image input [N, 3, H, W] and one output [N, D]. A batch that
    is fixed is made variable, or else filled one by one. pixels: what the network expects, "bgr255" or "rgb255" (0 to 255),
    or "imagenet" (RGB, 0 to 1, minus ImageNet's mean over its deviation). precision: auto is fp32, so that the network is
    measured as it is. Crops are decoded and resized as for our own networks. The other arguments are the Extractor's.
    Raises ReidError for another kind of file or network, and without the package openvino.
    """

    def __init__(self, path, pixels, device="auto", precision="auto", mirror=True, batch_size=None):
        if str(device) not in ("auto", "cpu"):
            raise ReidError(f"--device {device}: --network computes on a CPU; use --device cpu")
        self.config = {"backbone": Path(path).stem}
        self.fingerprint = network_fingerprint(path, pixels)
        self._start("cpu", "fp32" if precision == "auto" else precision, mirror, batch_size)
        self._features, self._neck = ForeignNetwork(path, pixels, self.precision, worker_count()), nn.Identity()
        self.engine, self.size, self.dim = self._features.engine, self._features.size, self._features.dim


class ForeignNetwork(CompiledGraph):
    """Embeddings of uint8 RGB images [n, 3, H, W], float32 [n, D], not normalised. size: (H, W); dim: D."""

    def __init__(self, path, pixels, precision, workers):
        super().__init__("--network", precision, workers)
        self._path = path
        try:
            graph = self._core.read_model(str(path))
        except RuntimeError as error:
            raise self._unfit(f"OpenVINO cannot read it ({_reason(error)})") from error
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise self._unfit(f"it has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs")
        shape = graph.input(0).get_partial_shape()
        if shape.rank.is_dynamic or len(shape) != 4 or shape[1].is_dynamic or shape[1].get_length() != 3:
            raise self._unfit(f"its input is {shape}")
        self.size = tuple(side.get_length() if side.is_static else default for side, default in zip(list(shape)[2:], SIZE))
        self._most = None  # images at once, where that is written into the layers
        try:
            self.dim = self._embedding_size(graph, 2)
            graph.reshape([-1, 3, *self.size])
        except RuntimeError:
            self._most, graph = 1, self._core.read_model(str(path))
            self.dim = self._embedding_size(graph, 1)
        self.graph = _with_pixels(graph, pixels)

    def __call__(self, images):
        """uint8 [n, 3, H, W] -> float32 [n, D]."""
        parts = images.split(self._most or len(images))
        return torch.cat([CompiledGraph.__call__(self, part) for part in parts]).flatten(1)

    def _embedding_size(self, graph, count):
        """Return D of the output for `count` images; OpenVINO raises RuntimeError where a layer has another number."""
        graph.reshape([count, 3, *self.size])
        shape = graph.output(0).get_partial_shape()
        sizes = list(shape.to_shape()) if shape.is_static else []
        if len(sizes) < 2 or sizes[0] * max(sizes[1:]) != math.prod(sizes):
            raise self._unfit(f"its output is {shape}")
        if sizes[0] != count:
            raise RuntimeError(f"{count} images in, {sizes[0]} rows out")
        return max(sizes[1:])

    def _unfit(self, reason):
        return ReidError(f"--network {self._path}: {reason}; give a network with one input [N, 3, H, W] and one output [N, D]")


def _with_pixels(graph, pixels):
    """Put the conversion from uint8 RGB in front of an openvino.Model."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(graph)
    image = steps.input(0)
    image.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NCHW"))
    image.model().set_layout(openvino.Layout("NCHW"))
    convert = image.preprocess().convert_element_type(openvino.Type.f32)
    if pixels == "bgr255":
        convert.reverse_channels()
    elif pixels == "imagenet":
        convert.mean([255 * value for value in MEAN]).scale([255 * value for value in STD])
    convert.convert_element_type(graph.input(0).get_element_type())
    steps.output(0).tensor().set_element_type(openvino.Type.f32)
    return steps.build()


def _reason(error):
    """Return the last line of what OpenVINO raised: the lines before it name its own source files."""
    return first_line(str(error).strip().splitlines()[-1])
