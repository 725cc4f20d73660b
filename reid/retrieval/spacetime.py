"""Camera and time as evidence, in the manner of st-ReID (Wang et al., AAAI 2019, arXiv 1812.03282).

People need typical times from one camera to another. From the training identities `fit` learns

1. one time line. Each recording (camera, sequence) counts its frames from 0 at an unknown moment. Two recordings are
   shifted so that most of the identities they share pass both together; the strongest such links place them all;
2. for each pair of cameras the log-odds of a time difference: log p(difference | one person) / p(difference | two
   people), two Parzen-smoothed histograms. st-ReID uses the first alone; the ratio includes how likely a difference
   is between strangers, so it needs no normalising constants and is added to the visual score as evidence.

`fit_weight` learns how much visual score a unit of evidence is worth. What was not seen in training has even odds, which
leave the visual score unchanged, and so have two images of one camera: the benchmark ignores matches in the query's own
camera, but a search should find people who come back.

Rules and constants were compared on the training identities of Market-1501: times from one half of them, queries of the other
half, all training images as the gallery. Odds within a camera gave +0.1 to +0.4 mAP, and -0.3 with re-ranking; other values
of the constants below gave at most +0.06.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reid import ReidError, files
from reid.cli import command
from reid.data.datasets import list_images
from reid.retrieval.metrics import evaluate

FORMAT, VERSION = "reid-spacetime", 2
TAU = 8.0  # s; the resolution of differences is about STEP * TAU around 0, and STEP of themselves beyond TAU
STEP, BANDWIDTH = 0.1, 0.15  # width of a bin, and of the Gaussian that smooths, on the axis asinh(difference / TAU)
TICK = TAU / 16  # s; resolution of the time line
REACH = 1 << 16  # ticks, 9 hours; longer differences are not learned and have even odds
PRIOR = 3.0  # identities' worth of even odds that each pair of cameras starts with: bounds the odds where data is sparse
TOGETHER, MIN_TOGETHER = 80.0, 3.0  # s, identities: sightings this close, of this many, give the offset of two recordings
CROWD, QUERIES, SOME = 128, 1000, 4096  # images of an identity, queries and strangers that are used: thinned evenly above
WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85, 1, 1.25, 1.5)  # fit_weight tries
DEFAULT_WEIGHT = 0.03  # cosine per nat: 0.4 standard deviations of strangers' cosines, where that is 0.08
UNSEEN_MAP = 0.7  # a visual mAP that is realistic for people not trained on


@dataclass(frozen=True)
class SpaceTime:
    """The result of `fit`. Images are given by camids, seqs, frames, int64 [N], on the scores' device; -1 is unknown.

    cameras: int64 [C], sorted. recordings: int64 [K, 2], camera and sequence, sorted; start: float64 [K], s, the time of
    frame 0 on the common time line. log_odds: float32 [C + 1, C + 1, bins + 1], nats, by camera of the first and of the
    second image and bin of the difference second - first; the last camera and the last bin are unknown, with even odds.
    rate: frames a second. weight: cosine per nat.
    """

    cameras: Tensor
    recordings: Tensor
    start: Tensor
    log_odds: Tensor
    rate: float
    weight: float = DEFAULT_WEIGHT

    def prob(self, q_camids, q_seqs, q_frames, g_camids, g_seqs, g_frames) -> Tensor:
        """Return float32 [b, G]: probability of one person by cameras and times alone, from even prior odds; 0.5 is neutral."""
        q, g = self._places(q_camids, q_seqs, q_frames), self._places(g_camids, g_seqs, g_frames)
        table = self.log_odds.sigmoid().to(q[0].device)
        return _look_up(table, q[0][:, None], q[1][:, None], g[0], g[1])

    def fuse(self, visual: Tensor, prob: Tensor) -> Tensor:
        """Add the evidence of `prob` to the visual score, float32 [b, G], nothing where it is 0.5."""
        return visual + self.weight * prob.logit()

    def bonus(self, camids: Tensor, seqs: Tensor, frames: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the evidence as `reid.retrieval.rerank.rerank` takes it, for all [Q + G] images, the queries first.

        Re-ranking by fused similarities is better than adding the evidence to re-ranked ones: it also corrects the neighbours.
        """
        camera, tick = self._places(camids, seqs, frames)
        table = ((self.log_odds - self.log_odds.max()) * self.weight).to(camera.device)
        return lambda i, j: _look_up(table, camera[i], tick[i], camera[j], tick[j])

    def save(self, path, fingerprint: str, data_root) -> None:
        """Write spacetime.pt for the embeddings whose cosines `weight` fits (`GalleryIndex.space`) and for the dataset whose
        cameras and clocks these are."""
        files.save(path, vars(self) | {"fingerprint": fingerprint, "dataset": dataset_name(data_root)}, FORMAT, VERSION)

    @classmethod
    def load(cls, path, fingerprint: str, data_root) -> "SpaceTime":
        """Read what `save` wrote; raises ReidError where there is none, or one of other weights or another dataset."""
        if not Path(path).exists():
            advice = command("eval.py", spacetime=True, exp_name=Path(path).parent.name, data_root=data_root)
            raise ReidError(f"{path}: not there; learn it with: {advice}")
        record = files.load(path, FORMAT, VERSION)
        if record.get("fingerprint") != fingerprint:
            raise ReidError(f"{path}: learned with other weights or another --camera_norm; remove it to learn it again")
        known, here = record.get("dataset"), dataset_name(data_root)
        if known != here:
            raise ReidError(f"{path}: learned from {known!s:.200}, not from {here}; remove it to learn it again")
        try:
            model = cls(**{field.name: record[field.name] for field in fields(cls)})
            c, k = len(model.cameras), len(model.start)
            shapes = {"cameras": (torch.int64, (c,)), "recordings": (torch.int64, (k, 2)), "start": (torch.float64, (k,)),
                      "log_odds": (torch.float32, (c + 1, c + 1, int(_bins("cpu").max()) + 1))}
            good = all((getattr(model, name).dtype, getattr(model, name).shape) == want for name, want in shapes.items())
            good &= all(isinstance(value, float) and 0 < value < math.inf for value in (model.rate, model.weight))
            good = good and k > 0 < c and bool(torch.isfinite(model.log_odds).all() & torch.isfinite(model.start).all())
        except (KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise ReidError(f"{path}: the camera and time model is damaged; remove it to learn it again")
        return model

    def _places(self, camids, seqs, frames):
        """Return position in `cameras` (their number if unknown) and tick on the time line, both int32 [N]."""
        device = camids.device
        start, known = self.start.to(device), (camids >= 0) & (frames >= 0)
        recording, found = _find(_recording_key(*self.recordings.T).to(device), _recording_key(camids, seqs))
        tick = (start[recording] + frames.double() / self.rate).div(TICK).round()
        known &= found & (tick.abs() < 2**29)
        camera, found = _find(self.cameras.to(device), camids)
        return camera.where(known & found, len(self.cameras)).int(), tick.where(known, 0).int()


def dataset_name(data_root) -> str:
    """Name a dataset by its folder and its training images, so that another one of the same name differs."""
    paths = list_images(Path(data_root) / "train")
    return f"{Path(data_root).resolve()} ({len(paths):,} training images of {len({Path(p).parent for p in paths}):,} identities)"


def fit(pids: Tensor, camids: Tensor, seqs: Tensor, frames: Tensor, rate: float = 25.0) -> SpaceTime:
    """Learn from the training identities. int64 [N] each; images without camera or frame (-1), junk and distractors
    are left out; sequence -1 is a recording like any other. rate: frames a second (1.0 if `frames` are seconds).

    The weight is a default; `fit_weight` finds the one for a network. Raises ReidError if no identity was seen by two cameras.
    """
    pids, camids, seqs, frames = _usable(pids, camids, seqs, frames)
    cameras, camera = camids.unique(return_inverse=True)
    if not len(_pairs(pids, camera)[0]):
        raise ReidError("camera and time: no training identity has images with frame numbers from two cameras, so "
                        "there is nothing to learn; leave it off")
    key, recording = _recording_key(camids, seqs).unique(return_inverse=True)
    second = frames.double() / rate
    start = _time_line(pids, recording, second, len(key))
    log_odds = _log_odds(pids, camera, ((start[recording] + second) / TICK).round().int(), len(cameras))
    return SpaceTime(cameras, torch.stack([key >> 32, (key & 0xFFFFFFFF) - 1], 1), start, log_odds, float(rate))


def _usable(pids, *columns):
    """Drop images without identity, camera or frame; the camera is the first column and the frame the last. On the CPU."""
    if any(len(column) != len(pids) for column in columns):
        raise ReidError("camera and time: pids, camids, seqs, frames and embeddings must have one entry for each image")
    good = ((pids > 0) & (columns[0] >= 0) & (columns[-1] >= 0)).cpu()
    return [column.cpu()[good] for column in (pids, *columns)]


def fit_weight(emb: Tensor, pids: Tensor, camids: Tensor, seqs: Tensor, frames: Tensor, rate: float = 25.0) -> float:
    """Find how much cosine a nat of evidence is worth: the weight of the best mAP on training identities. Arguments: `fit`'s.

    Queries of one half of the identities get their evidence from a model of the other half. All images are the gallery, and
    all training images should be given: among fewer people fewer strangers pass at a likely time, and the weight gets too
    large (of Market-1501, a quarter of the people gives 0.45 standard deviations a nat, all give 0.35).

    The network was trained on these people, so its cosines separate them too well. Noise is therefore added to the embeddings
    until the visual mAP is UNSEEN_MAP; the weight depends little on it. Noise shrinks all cosines, so the weight is found in
    standard deviations of the cosines of different people, which are the same for people trained on and others.
    """
    pids, camids, emb, seqs, frames = _usable(pids, camids, emb, seqs, frames)
    half = pids.unique(return_inverse=True)[1] % 2
    noise = torch.randn(emb.shape, generator=torch.Generator().manual_seed(0)) / math.sqrt(emb.shape[1])
    columns = (pids, camids, seqs, frames)
    try:
        halves, low, high = [], 0.0, 4.0
        for side in (0, 1):
            model = fit(*(x[half != side] for x in columns), rate=rate)
            halves.append(_Half(model, half == side, emb, noise, *columns))
        for _ in range(7):
            level = (low + high) / 2
            visual = sum(h.mean_ap(h.cosines(level)[0]) for h in halves) / 2
            low, high = (level, high) if visual > UNSEEN_MAP else (low, level)
        noisy = [h.cosines(low) for h in halves]

        def fused(weight):
            return sum(h.mean_ap(cosine + weight * sd * h.evidence) for h, (cosine, sd) in zip(halves, noisy))

        return max(WEIGHTS, key=fused) * sum(h.cosines(0.0)[1] for h in halves) / 2
    except ReidError:  # too few identities for two halves
        return DEFAULT_WEIGHT


class _Half:
    """Half of the training identities as queries, all as the gallery, with noise of a chosen level on the embeddings."""

    def __init__(self, model, asked, emb, noise, pids, camids, seqs, frames):
        group = (pids * (camids.max() + 1) + camids).unique(return_inverse=True)[1]
        first = torch.zeros(int(group.max()) + 1, dtype=torch.int64)
        first = first.scatter_reduce_(0, group, torch.arange(len(pids)), "amin", include_self=False)
        self.q = q = _thinned(first[asked[first]], QUERIES)  # an image of each identity in each camera
        self.emb, self.noise, self.labels = emb, noise, (pids[q], camids[q], pids, camids)
        self.evidence = model.prob(camids[q], seqs[q], frames[q], camids, seqs, frames).logit()

    def cosines(self, level):
        """Return cosines [queries, images], and their standard deviation where the people are different."""
        x = F.normalize(self.emb.float() + level * self.noise, dim=1)
        cosine = x[self.q] @ x.T
        return cosine, cosine[self.labels[0][:, None] != self.labels[2]].std().item()

    def mean_ap(self, scores):
        return evaluate(None, None, *self.labels, scores=scores).mAP


def _time_line(pids: Tensor, recording: Tensor, second: Tensor, k: int) -> Tensor:
    """Place the recordings on one time line: the start of each, float64 [k], s. Groups of recordings that share too few
    people are placed further apart than REACH."""
    i, j, weight = _pairs(pids, recording)
    order = (recording[i] * k + recording[j]).argsort(stable=True)
    i, j, weight = i[order], j[order], weight[order]
    link, size = (recording[i] * k + recording[j]).unique_consecutive(return_counts=True)
    shift, support = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
    for pair, delta, w in zip(link.tolist(), (second[i] - second[j]).split(size.tolist()), weight.split(size.tolist())):
        shift.view(-1)[pair], support.view(-1)[pair] = _densest(delta, w)
    start, group = torch.zeros(k, dtype=torch.float64), torch.full((k,), -1)
    while (group < 0).any():  # always the recording with the strongest link to those placed
        links = support.where((group[:, None] >= 0) & (group < 0), torch.zeros(()))
        a, b = divmod(int(links.argmax()), k)
        if links[a, b] >= MIN_TOGETHER:
            start[b], group[b] = start[a] + shift[a, b], group[a]
        else:
            group[support.sum(1).where(group < 0, -torch.ones(())).argmax()] = group.max() + 1
    end = 0.0
    for g in range(int(group.max()) + 1):
        time = (second + start[recording])[group[recording] == g]
        start[group == g] += end - time.min()
        end += float(time.max() - time.min()) + 2 * REACH * TICK
    return start


def _densest(value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Find the window of 2 * TOGETHER with most weight: the mean value in it, and its weight."""
    value, order = value.sort()
    total = F.pad(weight[order].cumsum(0), (1, 0))
    low, high = torch.searchsorted(value, value - TOGETHER), torch.searchsorted(value, value + TOGETHER, right=True)
    support = total[high] - total[low]
    best = support.argmax()
    inside = slice(int(low[best]), int(high[best]))
    return (value * weight[order])[inside].sum() / support[best], support[best]


def _log_odds(pids: Tensor, camera: Tensor, tick: Tensor, c: int) -> Tensor:
    """Return float32 [c + 1, c + 1, bins + 1], see SpaceTime."""
    bins = int(_bins("cpu").max())
    i, j, weight = _pairs(pids, camera)
    same = torch.zeros(c * c * (bins + 1), dtype=torch.float64)
    same.index_add_(0, (camera[i] * c + camera[j]) * (bins + 1) + _bin_of(tick[j] - tick[i]), weight)
    strangers = torch.zeros_like(same)
    some = _thinned(torch.arange(len(pids)), SOME)
    for i in some.split(256):
        cell = (camera[i, None] * c + camera[some]) * (bins + 1) + _bin_of(tick[some] - tick[i, None])
        strangers += torch.bincount(cell[pids[i, None] != pids[some]], minlength=len(same))
    same, strangers = (_smooth(x.view(c * c, bins + 1)[:, :bins]) for x in (same, strangers))
    p_strangers = (strangers + 1 / bins) / (strangers.sum(1, keepdim=True) + 1)
    p_same = (same + PRIOR * p_strangers) / (same.sum(1, keepdim=True) + PRIOR)
    odds = (p_same / p_strangers).log().view(c, c, bins)  # even for one camera and itself: no such pair was counted
    return F.pad(odds, (0, 1, 0, 1, 0, 1)).float()


def _smooth(histogram: Tensor) -> Tensor:
    reach = math.ceil(4 * BANDWIDTH / STEP)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=histogram.dtype) * STEP / BANDWIDTH) ** 2)
    return F.conv1d(histogram[:, None], (kernel / kernel.sum())[None, None], padding=reach)[:, 0]


def _pairs(pids: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """List all (i, j) of one identity at two places, in both orders, with weights that sum to 1 for each identity and two
    places, so that long stays in view count no more than short ones."""
    count = int(place.max()) + 1 if len(place) else 1
    order = pids.argsort(stable=True)
    size = pids[order].unique_consecutive(return_counts=True)[1].tolist()
    crowds = [_thinned(crowd, CROWD) for crowd in order.split(size)]
    found = [torch.cartesian_prod(crowd, crowd) for crowd in crowds if len(crowd) > 1]
    i, j = torch.cat([torch.empty(0, 2, dtype=torch.int64), *found]).T
    i, j = (x[place[i] != place[j]] for x in (i, j))
    images = torch.cat([torch.empty(0, dtype=torch.int64), *crowds])
    owner, slot = (pids * count + place).unique(return_inverse=True)
    seen = torch.bincount(slot[images], minlength=len(owner)).double()
    return i, j, 1 / (seen[slot[i]] * seen[slot[j]])


def _thinned(x: Tensor, most: int) -> Tensor:
    """Keep at most `most` entries, evenly spread."""
    return x if len(x) <= most else x[torch.arange(most) * len(x) // most]


def _recording_key(camids: Tensor, seqs: Tensor) -> Tensor:
    return camids * (1 << 32) + seqs + 1


def _find(known: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Find the position of each wanted value in the sorted `known` (any if it is missing), and whether it is there."""
    position = torch.searchsorted(known, wanted.contiguous()).clamp(max=len(known) - 1)
    return position, known[position] == wanted


@cache
def _bins(device) -> Tensor:
    """Return the bin of each difference in ticks, -REACH - 1 .. REACH + 1, int32: narrow around 0, wide far out. Both ends
    have the bin of unknown differences."""
    axis = torch.asinh(torch.arange(-REACH - 1, REACH + 2, dtype=torch.float64) * TICK / TAU).div(STEP).round().int()
    axis -= axis[1].item()
    axis[[0, -1]] = axis[-2] + 1
    return axis.to(device)


def _bin_of(difference: Tensor) -> Tensor:
    """Return the bin of differences in ticks, int32; `difference` is overwritten."""
    place = difference.clamp_(-REACH - 1, REACH + 1).add_(REACH + 1)
    return _bins(difference.device).index_select(0, place.flatten()).view_as(place)


def _look_up(table: Tensor, camera_i: Tensor, tick_i: Tensor, camera_j: Tensor, tick_j: Tensor) -> Tensor:
    cell = _bin_of(tick_j - tick_i)
    cell += camera_i * (table.shape[1] * table.shape[2])
    cell += camera_j * table.shape[2]
    return table.flatten().index_select(0, cell.flatten()).view_as(cell)
