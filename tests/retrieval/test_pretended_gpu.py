"""Search, metrics and re-ranking on a GPU that is not there: nothing mixes devices, and the values are those of the CPU."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from pretended_gpu import OnGpu, pretend

from reid.data.datasets import make_records
from reid.retrieval import metrics, spacetime
from reid.retrieval.evaluation import gather_data, score, set_thresholds
from reid.retrieval.index import GalleryIndex
from reid.retrieval.rerank import rerank
from reid.retrieval.search import ExactSearch


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    centres, found = torch.randn(30, 16, generator=generator), {}
    for side, count in (("q", 25), ("g", 400)):
        found[f"{side}_pids"] = torch.randint(-1, 30, (count,), generator=generator)
        found[f"{side}_camids"] = torch.randint(1, 5, (count,), generator=generator)
        noise = torch.randn(count, 16, generator=generator)
        found[f"{side}_emb"] = F.normalize(centres[found[f"{side}_pids"]] + noise)
    found["g_emb"][100:150] = found["g_emb"][:50]  # exact ties
    names = ("q_emb", "g_emb", "q_pids", "q_camids", "g_pids", "g_camids")
    return {name: found[name] for name in names} | {"q_ids": torch.arange(25), "g_ids": torch.arange(400) + 10}


def test_mixed_devices_are_found(monkeypatch):
    with pretend(monkeypatch):
        ours, own = torch.arange(3, device="cuda"), torch.arange(3)
        assert isinstance(ours * 2, OnGpu) and ours.device.type == "cuda" and not isinstance(ours.cpu(), OnGpu)
        with pytest.raises(RuntimeError, match="on the CPU and on the GPU"):
            ours + own
        with pytest.raises(RuntimeError, match="on the CPU and on the GPU"):
            own[ours]
        assert ours[own].tolist() == [0, 1, 2]


@pytest.mark.parametrize("chunk", [1000, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_search(monkeypatch, data, dtype, chunk):
    """A float16 gallery in one chunk is ranked there, others on the CPU."""
    monkeypatch.setattr("reid.retrieval.search.CHUNK", {"cuda": chunk})
    gallery = data["g_emb"].to(dtype)
    expected = (data["q_emb"].double() @ gallery.double().T).sort(dim=1, descending=True, stable=True).indices[:, :7]
    with pretend(monkeypatch):
        search = ExactSearch(gallery, "cuda")
        found = search.search(data["q_emb"], 7)[1]
        one = search.search(data["q_emb"][:1], 5, torch.arange(400) != expected[0, 2], expected[0, :1])[1]
    assert isinstance(search.exact, OnGpu) == (dtype == torch.float16 and chunk == 1000)
    assert torch.equal(found, expected) and not isinstance(found, OnGpu)
    assert torch.equal(one[0], expected[0, [1, 3, 4, 5, 6]])  # without the first, which is excluded, and the third


@pytest.mark.parametrize("more", [8, 300])
def test_search_among_many_that_are_about_as_near(monkeypatch, data, more):
    monkeypatch.setattr("reid.retrieval.search.SPARE", 2)
    monkeypatch.setattr("reid.retrieval.search.MORE", more)
    gallery = F.normalize(data["g_emb"][:1] + 1e-4 * data["g_emb"]).half()
    expected = (data["q_emb"].double() @ gallery.double().T).sort(dim=1, descending=True, stable=True).indices[:, :3]
    with pretend(monkeypatch):
        assert torch.equal(ExactSearch(gallery, "cuda").search(data["q_emb"], 3)[1], expected)


def measured(data):
    reranked = rerank(data["q_emb"], data["g_emb"], k1=8, k2=4).scores
    results = [metrics.evaluate(*data.values()), metrics.evaluate(**data | {"q_emb": None, "g_emb": None}, scores=reranked)]
    roc, cameras = metrics.roc(*data.values(), rates=(0.1, 0.01)), metrics.camera_table(*data.values())
    shots = metrics.single_shot(*data.values(), repeats=2)
    tensors = [vars(result)[name] for result in results for name in ("ap", "cmc", "first_rank")]
    values = [results[0].mAP, results[1].mAP, *roc.tpr.values(), *shots["mAP"]]
    return values, [*tensors, cameras.mAP, roc.same_histogram]


def test_metrics_and_reranking(monkeypatch, data):
    values, tensors = measured(data)
    with pretend(monkeypatch):
        values_there, tensors_there = measured({name: value.to("cuda") for name, value in data.items()})
    assert values_there == pytest.approx(values, abs=1e-6)
    for one, other in zip(tensors, tensors_there, strict=True):
        assert not isinstance(other, OnGpu)
        torch.testing.assert_close(one, other, equal_nan=True)


def test_every_way_of_scoring(monkeypatch):
    """eval.py with camera statistics, re-ranking, camera and time, several query images and thresholds."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 16, generator=generator)
    names = [f"{i % 20:04}/{i % 20:04}_c{i % 3 + 1}s1_{i % 20 * 50 + i % 3 * 40 + i:06}_00.jpg" for i in range(300)]
    records = make_records("nowhere", names, grouped=True)
    evidence = spacetime.fit(records.pids, records.camids, records.seqs, records.frames)
    embeddings = F.normalize(centres[torch.arange(300) % 20] + torch.randn(300, 16, generator=generator))
    args = argparse.Namespace(rerank=True, camera_norm=True, far=0.01, protocol="market")

    def found(device, multi_query):
        args.multi_query = multi_query
        whole = GalleryIndex(embeddings, records, "f" * 16, True)
        whole.device = device
        index = whole.select(torch.arange(40, 300))
        index.queries = whole.select(torch.arange(40))
        assert isinstance(gather_data(index, multi_query)["g_emb"], OnGpu) == (device == "cuda")
        values = {name: result.mAP for name, result in score(args, index, None if multi_query else evidence)}
        return values | {"threshold": set_thresholds(args, index).threshold[0.01]}

    for multi_query in (False, True):
        expected = found("cpu", multi_query)
        with pretend(monkeypatch):
            assert found("cuda", multi_query) == pytest.approx(expected, abs=1e-6)
        assert len(expected) == (4 if multi_query else 6)
