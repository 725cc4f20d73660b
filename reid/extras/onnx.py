"""The network as an ONNX file: pixels in, embeddings out, no Python needed to run it."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from reid import ReidError
from reid.checkpoint import load_checkpoint, restore_model
from reid.files import ONNX, atomic_path
from reid.images import MEAN, PREPROCESSING, STD, decode, resize
from reid.retrieval.extract import Extractor

OPSET = 17  # of 2022: read by every ONNX Runtime, TensorRT and OpenVINO in use
LEAST_COSINE = 0.9999
BATCH = 16  # images at once in the comparison
INPUTS = {"uint8": "uint8 RGB, 0 to 255", "float": f"float32 RGB, (x / 255 - mean) / std with mean {MEAN} and std {STD}"}


class Embedder(nn.Module):
    """Pixels [N, 3, H, W] -> float32 [N, D] of norm 1, as `reid.retrieval.extract.Extractor` computes it.

    pixels: a key of INPUTS, the kind of pixels it takes.
    """

    def __init__(self, model, mirror, pixels="uint8"):
        super().__init__()
        self.model, self.mirror, self.pixels = model, mirror, pixels

    def forward(self, images):
        if self.pixels == "float":  # the network normalises, so undo the caller's normalisation: two operations, one way
            images = images * self.model.std + self.model.mean
        if not self.mirror:
            return self.model(images)
        both = self.model.neck(self.model.features(torch.cat([images, images.flip(3)])))
        return F.normalize(both.unflatten(0, (2, -1)).sum(0))


def export_onnx(checkpoint, output, files, mirror=True, pixels="uint8", overwrite=False):
    """Write the network of `checkpoint` (a .pth file) to `output` and return its lowest cosine to PyTorch on `files`.

    The ONNX graph takes `images` [N, 3, H, W] of any N, RGB, resized: uint8, or with pixels="float" float32 in 0..1 minus
    ImageNet's mean over its deviation, which is what trackers pass. It returns `embeddings`, float32 [N, D] of norm 1. mirror:
    an embedding also includes the mirror image, as the Extractor's. The metadata of the file hold the fingerprint that an
    index keeps, the preprocessing, the input and mirror. files: images to compare on. Raises ReidError, and leaves `output`
    as it was, where a package is missing or a cosine is below LEAST_COSINE.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ReidError(f"--export onnx needs {error.name}: pip install -e '.[export]'") from error
    if not files:
        raise ReidError(f"{output}: no images to compare the export with PyTorch on; give some with --query_paths")
    extractor = Extractor(checkpoint, device="cpu", precision="fp32", mirror=mirror)
    expected = extractor.embed(files)
    network = Embedder(restore_model(load_checkpoint(checkpoint), checkpoint), mirror, pixels).eval()
    with atomic_path(output, ONNX, overwrite) as temporary:
        _write(network, extractor.size, temporary)
        graph = onnx.load(temporary)
        onnx.helper.set_model_props(graph, {"format": ONNX, "fingerprint": extractor.fingerprint, "preprocessing": PREPROCESSING,
                                            "input": INPUTS[pixels], "mirror": str(mirror).lower()})
        onnx.save(graph, temporary)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        lowest = float((expected * _embed(session, files, extractor.size, pixels)).sum(1).min())
        if not lowest >= LEAST_COSINE:  # also where it is NaN
            raise ReidError(f"{output}: not written, its embeddings differ from PyTorch's (cosine {lowest:.6f} is below "
                            f"{LEAST_COSINE}); try another version of torch or onnxruntime")
    return lowest


def _write(network, size, path):
    example = torch.zeros(2, 3, *size, dtype=torch.uint8 if network.pixels == "uint8" else torch.float32)
    axes = {"images": {0: "batch"}, "embeddings": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The TorchScript exporter: three times faster than torch.export's for this network, and one package less.
        torch.onnx.export(network, (example,), str(path), input_names=["images"], output_names=["embeddings"],
                          dynamic_axes=axes, opset_version=OPSET, dynamo=False)


def _embed(session, files, size, pixels):
    """Embed the same files through the ONNX graph, in batches of different sizes: float32 [N, D]."""
    rows = []
    for part in [files[:1], *(files[i : i + BATCH] for i in range(1, len(files), BATCH))]:
        batch = resize([decode(file) for file in part], size)
        if pixels == "float":
            batch = (batch / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        rows.append(torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]))
    return torch.cat(rows)
