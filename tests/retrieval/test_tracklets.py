"""Tracklets: which images are one, their mean, and what eval.py and inference.py do with them."""

import torch
import torch.nn.functional as F

from reid.data.datasets import make_records
from reid.retrieval.index import GalleryIndex
from reid.retrieval.tracklets import evaluate_tracklets, first_and_mean, number_tracklets, pool


def number(*paths, grouped=False):
    records = make_records("nowhere", paths, grouped)
    return number_tracklets(records.paths, records.pids, records.camids, records.seqs).tolist()


def test_images_of_a_folder_or_a_track_id_are_a_tracklet():
    assert number("a/1.jpg", "a/2.jpg", "b/1.jpg") == [0, 0, 1]
    assert number("x_t7_1.jpg", "x_t7_2.jpg", "x_t8_1.jpg", "track_7.jpg", "1.jpg", "2.jpg") == [0, 0, 1, 0, 2, 3]
    assert number("0001C1T0001F001.jpg", "0001C1T0001F002.jpg", "0001C1T0002F001.jpg", "0001C2T0001F001.jpg") == [0, 0, 1, 2]
    market = ["0002/0002_c1s1_000001_01.jpg", "0002/0002_c1s1_000026_01.jpg", "0002/0002_c1s2_000001_01.jpg",
              "0002/0002_c2s1_000001_01.jpg", "0003/0003_c1s1_000001_01.jpg", "0000/0000_c1s1_000001_01.jpg",
              "0000/0000_c1s1_000002_01.jpg", "-1/-1_c1s1_000001_01.jpg", "-1/-1_c1s1_000002_01.jpg"]
    assert number(*market, grouped=True) == [0, 0, 1, 2, 3, 4, 5, 6, 7]


def test_the_mean_has_norm_one():
    first, mean = first_and_mean(torch.tensor([[1.0, 0], [0, 1], [0, 1]]), torch.tensor([0, 0, 1]))
    assert first.tolist() == [0, 2] and torch.allclose(mean, torch.tensor([[0.5**0.5, 0.5**0.5], [0, 1]]))


def make_index(names, embeddings):
    return GalleryIndex(F.normalize(torch.tensor(embeddings)), make_records("nowhere", names, True), "f" * 16, True)


def test_a_pooled_index_is_searched_by_tracklet():
    index = make_index(["0001/0001_c1s1_000001_01.jpg", "0001/0001_c1s1_000002_01.jpg", "0002/0002_c1s1_000001_01.jpg"],
                       [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    pooled = pool(index)
    hits = pooled.search(torch.tensor([[0.0, 1, 0]]), 5)[0]
    assert [hit.path.rpartition("/")[2] for hit in hits] == ["0001_c1s1_000001_01.jpg", "0002_c1s1_000001_01.jpg"]
    assert abs(hits[0].score - 0.5**0.5) < 1e-6 and len(index) == 3


def test_evaluation_compares_the_mean_with_the_first_image(capsys):
    """The first images of person 1 mislead; the means do not. The query's tracklet takes the gallery's images of its sequence."""
    index = make_index(["0001/0001_c1s1_000002_01.jpg", "0001/0001_c2s1_000001_01.jpg", "0001/0001_c2s1_000002_01.jpg",
                        "0001/0001_c2s1_000003_01.jpg", "0002/0002_c2s1_000001_01.jpg", "0000/0000_c3s1_000001_01.jpg"],
                       [[1.0, 0, 0], [0, 0.4, 1], [1, 0, 0], [1, 0, 0.1], [0.1, 1, 0], [0, 0, 1]])
    index.queries = make_index(["0001/0001_c1s1_000001_01.jpg"], [[0.2, 1.0, 0]])
    found = evaluate_tracklets(index, "market")
    assert found["first image"].rank[1] == 0 and found["mean"].rank[1] == 1
    assert "1 queries" in (out := capsys.readouterr().out) and "4 in the gallery" in out and "of 5" not in out
