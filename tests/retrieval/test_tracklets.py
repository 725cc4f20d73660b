"""Tracklets: which images are one, their mean, and what eval.py and inference.py do with them."""

import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from reid.data.datasets import make_records, read_folder
from reid.retrieval.index import GalleryIndex
from reid.retrieval.ranked import Query
from reid.retrieval.tracklets import (
    evaluate_tracklets,
    first_and_mean,
    number_tracklets,
    pool,
    pool_queries,
    shape_weights,
)


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
    first, mean = first_and_mean(torch.tensor([[1.0, 0], [0, 1], [0, 1]]), torch.tensor([0, 0, 1]), torch.ones(3))
    assert first.tolist() == [0, 2] and torch.allclose(mean, torch.tensor([[0.5**0.5, 0.5**0.5], [0, 1]]))


def test_crops_that_may_be_cut_off_count_less(tmp_path):
    for name, size in (("1.png", (20, 40)), ("2.png", (20, 60)), ("3.png", (20, 20)), ("4.png", (40, 20))):
        Image.new("RGB", size).save(tmp_path / name)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "5.jpg", exif=turned)
    (tmp_path / "6.png").write_text("no image")
    files = [tmp_path / name for name in ("1.png", "2.png", "3.png", "4.png", "5.jpg", "6.png", "gone.png")]
    assert shape_weights(files).tolist() == [1, 1, 0.25, 0.0625, 1, 1, 1]

    folder = tmp_path / "track_1"
    folder.mkdir()
    for name in ("1.png", "3.png"):
        (folder / name).write_bytes((tmp_path / name).read_bytes())
    index = GalleryIndex(torch.eye(2), read_folder(folder.parent).select(torch.tensor([-2, -1])), "f" * 16, True)
    assert list(index.paths) == ["track_1/1.png", "track_1/3.png"]
    expected = F.normalize(torch.tensor([[1, 0.25]]))
    assert torch.allclose(pool(index).embeddings, expected)
    queries = [Query(folder / name) for name in ("1.png", "3.png")]
    assert torch.allclose(pool_queries(queries, torch.eye(2))[1], expected)


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
