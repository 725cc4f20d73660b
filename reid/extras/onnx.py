"""The network as an ONNX file: pixels in, embeddings out, no Python needed to run it."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from reid import ReidError
from reid.checkpoint import load_checkpoint, restore_model
from reid.files import atomic_path
from reid.images import PREPROCESSING, decode, resize
from reid.retrieval.extract import Extractor

OPSET = 17  # of 2022: read by every ONNX Runtime, TensorRT and OpenVINO in use
LEAST_COSINE = 0.9999
BATCH = 16  # images at once in the comparison


class Embedder(nn.Module):
    """uint8 [N, 3, H, W] -> float32 [N, D] of norm 1, as `reid.retrieval.extract.Extractor` computes it."""

    def __init__(self, model, mirror):
        super().__init__()
        self.model, self.mirror = model, mirror

    def forward(self, images):
        if not self.mirror:
            return self.model(images)
        both = self.model.neck(self.model.features(torch.cat([images, images.flip(3)])))
        return F.normalize(both.unflatten(0, (2, -1)).sum(0))


def export_onnx(checkpoint, output, files, mirror=True):
    """Write the network of `checkpoint` (a .pth file) to `output` and return its lowest cosine to PyTorch on `files`.

    The ONNX graph takes `images`, uint8 RGB [N, 3, H, W] of any N, normalises them itself, and gives `embeddings`, float32
    [N, D] of norm 1. mirror: an embedding also sees the mirror image, as the Extractor's and the index's; the fingerprint
    that an index keeps is in the file's metadata. files: images to compare on. Raises ReidError, and leaves `output` as it
    was, where a package is missing or a cosine is below LEAST_COSINE.
    """
    onnx, runtime = _packages()
    if not files:
        raise ReidError(f"{output}: no images to compare the export with PyTorch on; give some with --query_paths")
    extractor = Extractor(checkpoint, device="cpu", precision="fp32", mirror=mirror)
    expected = extractor.embed(files)
    network = Embedder(restore_model(load_checkpoint(checkpoint), checkpoint), mirror).eval()
    with atomic_path(output) as temporary:
        _write(network, extractor.size, temporary)
        graph = onnx.load(temporary)
        onnx.helper.set_model_props(graph, {"fingerprint": extractor.fingerprint, "preprocessing": PREPROCESSING,
                                            "mirror": str(mirror).lower()})
        onnx.save(graph, temporary)
        session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        lowest = float((expected * _embed(session, files, extractor.size)).sum(1).min())
        if not lowest >= LEAST_COSINE:  # also where it is NaN
            raise ReidError(f"{output}: not written, its embeddings differ from PyTorch's (cosine {lowest:.6f} is below "
                            f"{LEAST_COSINE}); try another version of torch or onnxruntime")
    return lowest


def _packages():
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ReidError(f"--export onnx needs {error.name}: pip install -e '.[export]'") from error
    return onnx, onnxruntime


def _write(network, size, path):
    example = torch.zeros(2, 3, *size, dtype=torch.uint8)
    axes = {"images": {0: "batch"}, "embeddings": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The TorchScript exporter: three times faster than torch.export's for this network, and one package less.
        torch.onnx.export(network, (example,), str(path), input_names=["images"], output_names=["embeddings"],
                          dynamic_axes=axes, opset_version=OPSET, dynamo=False)


def _embed(session, files, size):
    """The same files through the ONNX graph, in batches of different sizes: float32 [N, D]."""
    parts = [files[:1], *(files[i : i + BATCH] for i in range(1, len(files), BATCH))]
    return torch.cat([torch.from_numpy(session.run(None, {"images": resize([decode(f) for f in part], size).numpy()})[0])
                      for part in parts])
