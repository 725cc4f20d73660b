"""The optional engine for CPUs: the network as an OpenVINO graph, which embeds a single image faster than PyTorch.

The graph is built from the model layer by layer, in less time than a converted file takes to load. The compiled graph is kept
beside the checkpoint once it has been compared with PyTorch, so that later starts need neither step.
"""

import importlib.util
import io
import sys
import threading
from contextlib import suppress
from functools import cached_property

import torch
import torch.nn.functional as F

from reid import ReidError
from reid.cli import root_cause
from reid.files import load, save
from reid.model import pick_device

PARITY = 0.999  # lowest cosine to PyTorch's float32 features


def engine_of(args):
    """Return the `network` of an Extractor for a script's --engine and --device: None leaves the network to PyTorch.

    `auto` takes OpenVINO on a CPU if the package is installed and gives the same features for this network.
    """
    if args.engine == "openvino":
        return OpenVinoNetwork
    if args.engine != "auto" or pick_device(args.device).type != "cpu" or not importlib.util.find_spec("openvino"):
        return None

    def if_possible(*network):
        try:
            return OpenVinoNetwork(*network)
        except (ReidError, RuntimeError) as error:
            if isinstance(root_cause(error), KeyboardInterrupt):  # which becomes an ImportError in an extension module
                raise KeyboardInterrupt from error
            return None

    return if_possible


def import_openvino(option):
    """Return the module openvino; raises ReidError, naming the option that needs it, where it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # Block OpenVINO's telemetry, which reports each import.
    try:
        import openvino
    except ImportError as error:
        raise ReidError(f"{option} needs its package: pip install -e '.[openvino]'") from error
    return openvino


class CompiledGraph:
    """Compute `graph`, an openvino.Model uint8 [?, 3, H, W] -> float32 [?, D], on the CPU. precision: fp32 or bf16.

    To be called from `workers` threads: a batch gets a worker's share of the cores, an image (and its mirror image) all of
    them. option: what the user gave, named where the package is missing.
    """

    engine = "openvino"

    def __init__(self, option, precision, workers):
        self._core, self._workers = import_openvino(option).Core(), workers
        self._hints = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
                       "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self._compiled, self._lock, self._own = {}, threading.Lock(), threading.local()

    def __call__(self, images):
        """uint8 [n, 3, H, W] -> float32 [n, D]."""
        streams = self._workers if len(images) > 2 else 1
        requests = self._own.__dict__
        if streams not in requests:
            with self._lock:
                if streams not in self._compiled:
                    hints = self._hints | {"NUM_STREAMS": streams}
                    self._compiled[streams] = self._core.compile_model(self.graph, "CPU", hints)
                requests[streams] = self._compiled[streams].create_infer_request()
                # Two first calls at once can wait for each other forever: OpenVINO sets up its use of NumPy in them.
                requests[streams].infer([images.contiguous().numpy()])
        return torch.from_numpy(requests[streams].infer([images.contiguous().numpy()])[0].copy())


class OpenVinoNetwork(CompiledGraph):
    """Pooled features of uint8 images before the neck, like `reid.model.plain_network`.

    path: the checkpoint, beside which the graph that was compiled for single images is kept; it is used if it is of the
    same `fingerprint` of the weights, processor and version. Raises ReidError without the package, for another backbone or
    device, or where the features differ from PyTorch's.
    """

    def __init__(self, model, precision, workers, path, fingerprint):
        super().__init__("--engine openvino", precision, workers)
        if model.config["backbone"] != "densenet121" or model.mean.device.type != "cpu":
            raise ReidError(f"--engine openvino: not made for {model.config['backbone']} on {model.mean.device}; "
                            "use --engine torch")
        self._model, kept = model, path.with_suffix(f".{precision}.openvino")
        processor = self._core.get_property("CPU", "FULL_DEVICE_NAME")
        version = sys.modules["openvino"].__version__
        key = f"{fingerprint} {precision} {torch.get_num_threads()} {processor} {version}"
        with suppress(ReidError, RuntimeError, OSError):  # missing, damaged, or of an OpenVINO with another format
            record = load(kept, "reid-openvino", 1)
            if record.get("key") == key:
                blob = io.BytesIO(record["blob"].numpy())
                self._compiled[1] = self._core.import_model(blob, "CPU", self._hints | {"NUM_STREAMS": 1})
        if not self._compiled:
            self._check()
            with suppress(ReidError, OSError, ValueError):  # a container's models may be read-only; no memory for the copy
                blob = torch.frombuffer(bytearray(self._compiled[1].export_model().getvalue()), dtype=torch.uint8)
                save(kept, {"key": key, "blob": blob}, "reid-openvino", 1)

    @cached_property
    def graph(self):
        """The network as an openvino.Model."""
        return build_graph(self._model)

    def _check(self):
        size = self._model.config["height"], self._model.config["width"]
        image = torch.randint(0, 256, (1, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        with torch.inference_mode():
            cosine = F.cosine_similarity(self(image), self._model.features(image)).item()
        if not cosine >= PARITY:
            raise ReidError(f"--engine openvino: differs from PyTorch on this machine (cosine {cosine:.4f}); use --engine torch")


def build_graph(model):
    """Build the features of a ReidModel (densenet121) as an OpenVINO graph: uint8 [?, 3, H, W] -> float32 [?, D]."""
    import openvino
    from openvino import opset13 as ops

    def array(tensor):
        return tensor.detach().float().cpu().numpy()

    def conv(x, layer):
        padding = list(layer.padding)
        return ops.convolution(x, array(layer.weight), list(layer.stride), padding, padding, [1, 1])

    def norm_relu(x, norm):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        offset = norm.bias - norm.running_mean * scale
        x = ops.multiply(x, array(scale.view(1, -1, 1, 1)))
        return ops.relu(ops.add(x, array(offset.view(1, -1, 1, 1))))

    pixels = ops.parameter([-1, 3, model.config["height"], model.config["width"]], openvino.Type.u8)
    x = ops.divide(ops.subtract(ops.convert(pixels, "f32"), array(model.mean)), array(model.std))
    for name, layer in model.body.named_children():
        if name == "conv0":
            x = norm_relu(conv(x, layer), model.body.norm0)
        elif name == "pool0":
            x = ops.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
        elif name.startswith("denseblock"):
            for dense in layer.values():
                new = conv(norm_relu(x, dense.norm1), dense.conv1)
                x = ops.concat([x, conv(norm_relu(new, dense.norm2), dense.conv2)], 1)
        elif name.startswith("transition"):
            x = conv(norm_relu(x, layer.norm), layer.conv)
            x = ops.avg_pool(x, [2, 2], [0, 0], [0, 0], [2, 2], True) if layer.stride == 2 else x
    x = norm_relu(x, model.body.norm5)
    return openvino.Model([ops.reduce_mean(x, [2, 3])], [pixels], "features")
