"""Score an index with its queries in every way that eval.py offers: plain, camera statistics, re-ranking, camera and time."""

from dataclasses import replace

import torch

from reid import ReidError
from reid.data.datasets import read_split
from reid.retrieval import metrics, spacetime
from reid.retrieval.camera import CameraStatistics
from reid.retrieval.protocol import SPLITS, random_splits
from reid.retrieval.rerank import estimate_bytes, rerank
from reid.retrieval.search import exact_products

FEWEST = 10  # pairs of different people above a threshold


def gather_data(index, multi_query=False):
    """Return the arguments of `metrics.evaluate`, by name and in order, on `index.scoring_device`.

    multi_query: average all images of a query's identity from its camera.
    """
    queries = index.queries
    q_emb, q_pids, q_camids, q_ids = queries.embeddings.float(), queries.pids, queries.camids, queries.contents
    if multi_query:  # gallery images of a query's identity and camera are never ranked for it, so they join the average
        own = {pair for pair in zip(q_pids.tolist(), q_camids.tolist()) if pair[0] > 0 <= pair[1]}
        more = torch.tensor([pair in own for pair in zip(index.pids.tolist(), index.camids.tolist())])
        q_emb, q_pids, q_camids, group = metrics.pool_queries(
            torch.cat([q_emb, index.embeddings[more].float()]), torch.cat([q_pids, index.pids[more]]),
            torch.cat([q_camids, index.camids[more]]))
        q_ids = torch.full_like(q_pids, -1).index_put_((group,), torch.cat([q_ids, index.contents[more]]))
    g_ids = index.contents.where(index.contents >= 0, -2)  # unknown files differ from each other
    data = {"q_emb": q_emb, "g_emb": index.embeddings.float(), "q_pids": q_pids, "q_camids": q_camids,
            "g_pids": index.pids, "g_camids": index.camids, "q_ids": q_ids, "g_ids": g_ids}
    device = index.scoring_device
    return {name: value.to(device) for name, value in data.items()}


def split_index(index, protocol):
    """Return [the index with its queries], or for a published protocol its random splits."""
    if protocol not in SPLITS:
        return [index]
    parts = []
    for q_rows, g_rows in random_splits(protocol, index.queries.pids, index.pids):
        part = index.select(g_rows)
        part.queries = index.queries.select(q_rows)
        parts.append(part)
    return parts


def score(args, index, evidence=None):
    """Yield (name, EvalResult) of each way of scoring. args: eval.py's options; evidence: a SpaceTime, or None."""
    data = gather_data(index, args.multi_query)
    yield "plain", metrics.evaluate(*data.values(), protocol=args.protocol)
    if args.camera_norm and index.statistics is not None:
        index = index.camera_normalised()
        data = gather_data(index, args.multi_query)
        yield "camera_norm", metrics.evaluate(*data.values(), protocol=args.protocol)
    for name, scores in extra_scores(args.rerank, evidence, data, index):
        yield name, metrics.evaluate(*(data | {"q_emb": None, "g_emb": None}).values(), scores=scores, protocol=args.protocol)


def extra_scores(reranked, evidence, data, index):
    """Yield (name, scores as `metrics.evaluate` takes them) of re-ranking, of camera and time, and of both."""
    q_emb, g_emb = data["q_emb"], data["g_emb"]
    if reranked:
        need = estimate_bytes(len(q_emb), len(g_emb), g_emb.shape[1])
        if need > 1 << 28:
            print(f"re-ranking: about {need / 2**20:,.0f} MiB of memory", flush=True)
        yield "+rerank", rerank(q_emb, g_emb).scores
    if evidence is None:
        return
    of_queries, of_gallery = ([column.to(g_emb.device) for column in (part.camids, part.seqs, part.frames)]
                              for part in (index.queries, index))

    @exact_products()
    def fused(start, stop):
        odds = evidence.prob(*(column[start:stop] for column in of_queries), *of_gallery)
        return evidence.fuse(q_emb[start:stop] @ g_emb.T, odds)

    yield "+spacetime", fused
    if reranked:
        bonus = evidence.bonus(*(torch.cat(columns) for columns in zip(of_queries, of_gallery)))
        yield "+both", rerank(q_emb, g_emb, bonus=bonus).scores


def set_thresholds(args, index):
    """Measure TAR@FAR with and without camera statistics and keep the thresholds in the index; return the RocResult in use.

    args: eval.py's options. A rate that is less than FEWEST of the pairs of different people is left out. Without --far or pairs
    of both kinds there are no thresholds, and None is returned.
    """
    index.threshold = index.camera_threshold = index.false_accept_rate = None
    rates = sorted({1e-4, 1e-3, 1e-2, args.far})
    try:
        plain, normalised = (metrics.roc(*gather_data(one, args.multi_query).values(), rates=rates, protocol=args.protocol)
                             for one in (index, index.camera_normalised()))
    except ReidError as error:
        return print(error)
    roc = normalised if args.camera_norm else plain
    rates = [rate for rate in rates if rate * roc.different_pairs >= FEWEST]
    if args.far not in rates:
        return print(f"no threshold: --far {args.far:g} takes {FEWEST / args.far:,.0f} pairs of different people, but there are "
                     f"{roc.different_pairs:,}")
    if not args.multi_query:  # the averages of several queries score higher than the single images of a search
        index.threshold, index.camera_threshold = plain.threshold[args.far], normalised.threshold[args.far]
        index.false_accept_rate = args.far
        index.camera_normalised().threshold = index.camera_threshold
    for rate in rates:
        print(f"TAR@FAR {rate:g}: {100 * roc.tpr[rate]:.2f} % (cosine above {roc.threshold[rate]:.4f})")
    return roc._replace(tpr={rate: roc.tpr[rate] for rate in rates}, threshold={rate: roc.threshold[rate] for rate in rates})


def learn_spacetime(path, data_root, index, make_extractor):
    """Read the SpaceTime at `path`, or learn it from the training identities, never from the test set, and keep it there.

    make_extractor: called without arguments where it has to be learned.
    """
    if path.exists():
        return spacetime.SpaceTime.load(path, index.space, data_root)
    train = read_split(data_root, "train")
    print(f"camera and time: learning from {len(train.pids.unique()):,} training identities", flush=True)
    embeddings, kept, _ = make_extractor().embed_records(train.files())
    train = train.select(kept)
    if index.normalised:
        embeddings = CameraStatistics.fit(embeddings, train.camids).apply(embeddings, train.camids)
    columns = train.pids, train.camids, train.seqs, train.frames
    evidence = replace(spacetime.fit(*columns), weight=spacetime.fit_weight(embeddings, *columns))
    evidence.save(path, index.space, data_root)
    print(f"camera and time: saved as {path}")
    return evidence
