"""Tracklets: the images of one person in successive frames of one camera as one entry, the mean of their embeddings.

Crops that may be cut off count less in the mean.
"""

import copy
import re
from contextlib import suppress

import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from reid.data.names import DISTRACTOR, JUNK, UNKNOWN
from reid.data.paths import Paths
from reid.images import FORMATS
from reid.retrieval import metrics
from reid.retrieval.evaluation import gather_data
from reid.retrieval.rows import COLUMNS

_TRACK = re.compile(r"(?<![a-z0-9])(?:track|tracklet|t|id)[_-]?(\d+)(?![a-z0-9])|(?<=c\d)t(\d{4})(?=f\d{3})",
                    re.ASCII | re.IGNORECASE)


def number_tracklets(paths, pids, camids, seqs):
    """Return the tracklet of each image, int64 [N], numbered from 0 in the order of their first images.

    The images of one folder with the same identity, camera, sequence and track id in their names (`track_7`, `t7`, or MARS's
    T0007) are a tracklet. Junk and distractors, and images beside all folders whose names have neither sequence nor track, are
    tracklets of their own.
    """
    numbers, keys = [], {}
    for row, (path, *labels) in enumerate(zip(paths, pids.tolist(), camids.tolist(), seqs.tolist())):
        folder, _, name = path.rpartition("/")
        track = _TRACK.search(name)
        alone = labels[0] in (JUNK, DISTRACTOR) or not (folder or track or labels[2] != UNKNOWN)
        key = row if alone else (folder, track and (track[1] or track[2]), *labels)
        numbers.append(keys.setdefault(key, len(keys)))
    return torch.tensor(numbers, dtype=torch.int64)


def shape_weights(files):
    """Return the weight of each crop in the mean, float32 [N]: (height / width / 2)^2, at most 1; 1 where there is no image.

    A person is about twice as high as wide, so lower crops are often cut off, by the border of the frame or a box that is wrong.
    """
    weights = torch.ones(len(files))
    for row, file in enumerate(files):
        with suppress(Exception), Image.open(file, formats=FORMATS) as image:  # the header; Pillow raises errors of all kinds
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            height, width = image.size if turned else image.size[::-1]
            weights[row] = min(1, height / width / 2) ** 2
    return weights


def first_and_mean(embeddings, numbers, weights):
    """Return (first row of each number, int64 [T]; weighted mean of its embeddings, float32 [T, D] of norm 1)."""
    count = int(numbers.max()) + 1 if len(numbers) else 0
    rows = torch.arange(len(numbers))
    first = torch.full((count,), len(numbers)).scatter_reduce(0, numbers, rows, "amin")
    total = embeddings.new_zeros(count, embeddings.shape[1]).index_add_(0, numbers, embeddings * weights[:, None])
    return first, F.normalize(total)


def pool(index):
    """Return a copy of a GalleryIndex with one row for each tracklet, with the labels and the path of its first image."""
    pooled = copy.copy(index)
    numbers = number_tracklets(index.paths, index.pids, index.camids, index.seqs)
    first, mean = first_and_mean(index.embeddings.float(), numbers, shape_weights(index.records().files()))
    pooled.embeddings, pooled._search, pooled._copy = mean.to(index.embeddings.dtype), {}, None
    pooled.paths = Paths.of([index.paths[row] for row in first.tolist()])
    for name in COLUMNS:
        setattr(pooled, name, getattr(index, name)[first])
    return pooled


def pool_queries(queries, embeddings):
    """Return the Query of each tracklet's first image, and the means, float32 [T, D], of float32 [Q, D]."""
    columns = [torch.tensor([query[i] for query in queries], dtype=torch.int64) for i in (1, 2, 3)]  # pid, camid, seq
    files = [str(query.file) for query in queries]
    first, mean = first_and_mean(embeddings, number_tracklets(files, *columns), shape_weights(files))
    return [queries[i] for i in first.tolist()], mean


def evaluate_tracklets(index, protocol):
    """Rank tracklets for tracklets; print and return {"first image" or "mean": EvalResult}.

    A query is the tracklet of a query image: with the gallery's images of its identity, camera and sequence, which the protocol
    ignores for this query. Both rows have the same queries and gallery; the first ranks by one image of each tracklet.
    """
    data, names = gather_data(index), [path.rpartition("/")[2] for part in (index.queries, index) for path in part.paths]
    columns = [torch.cat([getattr(index.queries, name), getattr(index, name)]) for name in ("pids", "camids", "seqs")]
    numbers, split = number_tracklets([f"all/{name}" for name in names], *columns), len(index.queries)
    queries, gallery = numbers[:split].unique(), numbers[split:].unique(return_inverse=True)[1]
    every = torch.cat([data["q_emb"], data["g_emb"]]).cpu()
    weights = shape_weights([file for part in (index.queries, index) for file in part.records().files()])
    first, mean = first_and_mean(every, numbers, weights)
    g_first, g_mean = first_and_mean(every[split:], gallery, weights[split:])
    print(f"tracklets: {len(queries):,} queries of {len(mean[queries]):,}, {len(g_mean):,} in the gallery")
    found = {}
    q_first = first[queries]
    labels = columns[0][q_first], columns[1][q_first], index.pids[g_first], index.camids[g_first]
    for name, q_emb, g_emb in (("first image", every[q_first], every[split:][g_first]), ("mean", mean[queries], g_mean)):
        result = found[name] = metrics.evaluate(q_emb, g_emb, *labels, protocol=protocol)
        print(f"  {name:<12} mAP {100 * result.mAP:.2f}, Rank-1 {100 * result.rank[1]:.2f}, {result.valid:,} valid queries")
    return found
