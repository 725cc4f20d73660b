"""Camera statistics: take out of each embedding what its camera adds to all of them.

Light, background and viewpoint of a camera shift all its embeddings together, so that two images of one camera look alike to
the network, most of all where it has not seen the camera in training. Standardising the embeddings of each camera removes the
shift, without labels. Source: camera-based batch normalisation (Zhuang et al., Rethinking the Distribution Gap of Person
Re-identification with Camera-based Batch Normalization, ECCV 2020), here of embeddings instead of inside the network.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reid.data.names import UNKNOWN

PRIOR = 16  # images' worth of the gallery's statistics in those of each camera, and of "no change" in those of the gallery
CHUNK = 1 << 15  # rows that are converted to float32 together


class CameraStatistics(NamedTuple):
    """Mean and variance of the embeddings of each camera.

    cameras: int64 [C], sorted. mean, variance: float32 [C + 1, D]; the last row is of the whole gallery and serves cameras that
    are unknown or not listed.
    """

    cameras: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def fit(cls, embeddings, camids):
        """Estimate the statistics of a gallery: embeddings float [N, D] with rows of norm 1, camids int64 [N].

        Those of n images are shrunk, because few images are unreliable: (n * own + PRIOR * other) / (n + PRIOR). For a camera
        the other ones are the gallery's; for the gallery, mean 0 and equal variances, which leave all cosines as they are.
        """
        dim = embeddings.shape[1]
        mean, variance = _shrunk(embeddings, torch.zeros(dim), torch.full((dim,), 1 / dim))
        return cls(camids.new_empty(0), mean[None], variance[None]).joined(embeddings, camids)

    def joined(self, embeddings, camids):
        """Add the cameras that only these images have, such as queries from a camera without images in the gallery."""
        new = camids[~torch.isin(camids, self.cameras) & (camids != UNKNOWN)].unique()
        if not len(new):
            return self
        rows = [_shrunk(embeddings[camids == camera], self.mean[-1], self.variance[-1]) for camera in new]
        cameras, order = torch.cat([self.cameras, new]).sort()
        mean, variance = (torch.cat([torch.cat([old[:-1], torch.stack(more)])[order], old[-1:]])
                          for old, more in zip(self[1:], zip(*rows)))
        return CameraStatistics(cameras, mean, variance)

    def apply(self, embeddings, camids, dtype=torch.float32):
        """Standardise embeddings float [N, D] by the statistics of their cameras, int64 [N]: [N, D] of `dtype`, of norm 1."""
        row = torch.full_like(camids, len(self.cameras))
        if len(self.cameras):
            place = torch.searchsorted(self.cameras, camids.contiguous()).clamp(max=len(self.cameras) - 1)
            row = place.where(self.cameras[place] == camids, row)
        out = torch.empty(embeddings.shape, dtype=dtype)
        for part, rows, cameras in zip(out.split(CHUNK), embeddings.split(CHUNK), row.split(CHUNK)):
            part[:] = F.normalize((rows.float() - self.mean[cameras]) / self.variance[cameras].sqrt())
        return out

    @classmethod
    def checked(cls, part, dim):
        """Return the statistics of a dict that was read from a file, or None where it does not fit `dim` dimensions."""
        try:
            found = cls(**part)
            shape = (len(found.cameras) + 1, dim)
            good = found.cameras.dtype == torch.int64 and all(
                table.shape == shape and table.dtype == torch.float32 and table.isfinite().all() for table in found[1:])
            return found if good and bool((found.variance > 0).all()) else None
        except (TypeError, AttributeError):
            return None


def _shrunk(embeddings, mean, variance):
    """Mean and variance of the rows of float [N, D], shrunk towards the given ones, float32 [D] each."""
    total = square = torch.zeros(embeddings.shape[1], dtype=torch.float64)
    for part in embeddings.split(CHUNK):
        total, square = total + part.double().sum(0), square + part.double().square().sum(0)
    count = max(1, len(embeddings))
    share, own = len(embeddings) / (len(embeddings) + PRIOR), (total / count).float()
    spread = (square / count - (total / count) ** 2).clamp(min=0).float()
    return torch.lerp(mean, own, share), torch.lerp(variance, spread, share)
