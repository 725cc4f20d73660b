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
CHUNK = 1 << 10  # rows that are converted to float32 together: 4 MiB, which stay in the cache


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
        (cameras, place), dim = camids.unique(return_inverse=True), embeddings.shape[1]
        sums, known = _sums(embeddings, place, len(cameras)), cameras != UNKNOWN
        mean, variance = _shrunk([part.sum(0, keepdim=True) for part in sums], torch.zeros(dim), torch.full((dim,), 1 / dim))
        own_mean, own_variance = _shrunk([part[known] for part in sums], mean[0], variance[0])
        return cls(cameras[known], torch.cat([own_mean, mean]), torch.cat([own_variance, variance]))

    def joined(self, embeddings, camids):
        """Add the cameras that only these images have, such as queries from a camera without images in the gallery."""
        new = ~torch.isin(camids, self.cameras) & (camids != UNKNOWN)
        if not new.any():
            return self
        cameras, place = camids[new].unique(return_inverse=True)
        rows = _shrunk(_sums(embeddings[new], place, len(cameras)), self.mean[-1], self.variance[-1])
        cameras, order = torch.cat([self.cameras, cameras]).sort()
        mean, variance = (torch.cat([torch.cat([old[:-1], more])[order], old[-1:]]) for old, more in zip(self[1:], rows))
        return CameraStatistics(cameras, mean, variance)

    def apply(self, embeddings, camids, dtype=torch.float32):
        """Standardise embeddings float [N, D] by the statistics of their cameras, int64 [N]: [N, D] of `dtype`, of norm 1."""
        row = torch.full_like(camids, len(self.cameras))
        if len(self.cameras):
            place = torch.searchsorted(self.cameras, camids.contiguous()).clamp(max=len(self.cameras) - 1)
            row = place.where(self.cameras[place] == camids, row)
        out, scale = torch.empty(embeddings.shape, dtype=dtype), self.variance.rsqrt()
        for part, rows, cameras in zip(out.split(CHUNK), embeddings.split(CHUNK), row.split(CHUNK)):
            part[:] = F.normalize((rows.float() - self.mean[cameras]).mul_(scale[cameras]))
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


def _sums(embeddings, place, groups):
    """Return number, sum and sum of squares of the rows of each group: float64 [G, 1], [G, D], [G, D].

    embeddings: float [N, D]; place: int64 [N], the group of each row.
    """
    count, total = torch.bincount(place, minlength=groups).double()[:, None], torch.zeros(2, groups, embeddings.shape[1]).double()
    for rows, part in zip(embeddings.split(CHUNK), place.split(CHUNK)):
        rows, member = rows.float(), F.one_hot(part, groups).T.float()
        total += torch.stack([member @ rows, member @ rows.square()])
    return count, *total


def _shrunk(sums, mean, variance):
    """Return mean and variance, float32 [G, D], of groups with these `_sums`, shrunk towards given ones, float32 [D]."""
    count, total, square = sums
    own, share = total / count, count / (count + PRIOR)
    spread = (square / count - own**2).clamp(min=0)
    return [(share * found + (1 - share) * prior).float() for found, prior in ((own, mean), (spread, variance))]
