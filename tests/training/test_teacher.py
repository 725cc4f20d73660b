"""A teacher's file: what is read, which row belongs to which image, and that following it brings the network nearer."""

import re
from argparse import Namespace
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from tiny_network import SIZE, SMALL, tiny_config

import train
from reid import ReidError
from reid.checkpoint import save_checkpoint
from reid.data.datasets import read_folder, read_split
from reid.model import build_model
from reid.retrieval.extract import Extractor
from reid.retrieval.index import GalleryIndex
from reid.training.teacher import load_teacher, match

CONFIG = tiny_config()


def teacher_of(files, teacher, unlabelled=(), unlabelled_teacher=None):
    args = Namespace(teacher=teacher and str(teacher), teacher_input=None, unlabelled="crops" if unlabelled else None,
                     unlabelled_teacher=unlabelled_teacher and str(unlabelled_teacher))
    return load_teacher(args, build_model(CONFIG), [Path(file) for file in files], [Path(file) for file in unlabelled])


def write(path, paths, dimension=4, **more):
    embeddings = torch.randn(len(paths), dimension, generator=torch.Generator().manual_seed(0)).half()
    torch.save({"paths": list(paths), "embeddings": embeddings, **more}, path)
    return path, embeddings


def test_rows_are_found_by_path_and_by_file_name():
    files = [Path("data/mine/train/2/a.jpg"), Path("data/mine/train/3/a.jpg"), Path("data/mine/train/3/b.jpg"), Path("c.jpg")]
    paths = ["3/a.jpg", "b.jpg", "c.jpg", "train/2/a.jpg", "unused.jpg"]
    embeddings = torch.arange(10.0).view(5, 2)
    assert torch.equal(match(files, paths, embeddings, "x"), embeddings[[3, 0, 1, 2]])


def test_the_longest_path_counts():
    files, embeddings = [Path("root/train/2/a.jpg"), Path("root/val/2/a.jpg")], torch.arange(4.0).view(2, 2)
    assert torch.equal(match(files, ["val/2/a.jpg", "2/a.jpg"], embeddings, "x"), embeddings[[1, 0]])


@pytest.mark.parametrize("files, paths, reason", [
    (["x/a.jpg", "x/b.jpg", "x/c.jpg"], ["b.jpg"], "no embedding of 2 of 3 images, such as x/a.jpg"),
    (["x/a.jpg"], ["1/a.jpg", "2/a.jpg"], "no embedding of 1 of 1 images, such as x/a.jpg"),
    (["x/a.jpg"], ["x/a.jpg", "x/a.jpg"], "x/a.jpg, which fits 2 rows"),
    (["x/a.jpg", "y/a.jpg", "y/b.jpg"], ["a.jpg", "b.jpg"], "2 of 3 images .* x/a.jpg, which shares the row a.jpg with another"),
])
def test_every_image_needs_one_row_of_its_own(files, paths, reason):
    with pytest.raises(ReidError, match=f"--teacher f.pt: .*{reason}.*; embed the images with one model") as caught:
        match([Path(file) for file in files], paths, torch.randn(len(paths), 2), "--teacher f.pt")
    assert "\n" not in str(caught.value)


def test_a_file_for_images_and_one_for_crops(tmp_path):
    first, of_images = write(tmp_path / "images.pt", ["b.jpg", "a.jpg"])
    second, of_crops = write(tmp_path / "crops.pt", ["site/c.jpg", "site/d.jpg", "e.jpg"])
    teacher = teacher_of(["x/a.jpg", "x/b.jpg"], first, ["site/c.jpg", "e.jpg"], second)
    embeddings, logits = teacher(None, torch.tensor([3, 0]))
    assert logits is None and torch.equal(embeddings, torch.stack([of_crops[2], of_images[1]]).float())
    assert teacher.map.weight.shape == (4, SIZE) and [name for name, _ in teacher.named_parameters()] == ["map.weight"]
    both, _ = write(tmp_path / "both.pt", ["a.jpg", "c.jpg"])
    assert len(teacher_of(["x/a.jpg"], both, ["x/c.jpg"]).embeddings) == 2
    other, _ = write(tmp_path / "other.pt", ["c.jpg"], dimension=5)
    with pytest.raises(ReidError, match="embeddings of 5 dimensions, those of --teacher have 4"):
        teacher_of(["x/a.jpg"], first, ["x/c.jpg"], other)


def test_what_is_no_teacher(tmp_path):
    def fails(path, **more):
        with pytest.raises(ReidError) as caught:
            teacher_of(["a.jpg"], path, **more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "none.pt: no such file" in fails(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert "not a file of tensors" in fails(tmp_path / "text.pt")
    for name, content, reason in [
            ("list", [1, 2], "holds a list"), ("empty", {}, "needs `paths`"),
            ("short", {"paths": ["a.jpg"], "embeddings": torch.randn(2, 3)}, "needs `paths`"),
            ("flat", {"paths": ["a.jpg"], "embeddings": torch.randn(1)}, "needs `paths`"),
            ("number", {"paths": [1], "embeddings": torch.randn(1, 3)}, "needs `paths`"),
            ("whole", {"paths": ["a.jpg"], "embeddings": torch.ones(1, 3, dtype=torch.int64)}, "needs `paths`"),
            ("nan", {"paths": ["a.jpg", "b.jpg"], "embeddings": torch.tensor([[1, 2], [torch.nan, 0]])}, "1 of 2 embeddings"),
            ("zero", {"paths": ["a.jpg"], "embeddings": torch.zeros(1, 3)}, "1 of 1 embeddings are zero")]:
        torch.save(content, tmp_path / f"{name}.pt")
        assert reason in fails(tmp_path / f"{name}.pt"), name
    assert "--unlabelled needs a --teacher" in fails(None, unlabelled=["b.jpg"])
    save_checkpoint(tmp_path / "ours.pth", build_model(CONFIG), {}, {})
    assert "leave it out" in fails(tmp_path / "ours.pth", unlabelled=["b.jpg"], unlabelled_teacher="b.pt")


@pytest.fixture(scope="module")
def index(people, tmp_path_factory):
    """The index of another model over the training images, with a query."""
    folder = tmp_path_factory.mktemp("index")
    torch.manual_seed(1)
    save_checkpoint(folder / "other.pth", build_model(CONFIG), {}, {})
    extractor = Extractor(folder / "other.pth", device="cpu", precision="fp32", compile="off")
    index = GalleryIndex.build(extractor, read_split(people, "train"), progress=False)
    index.queries = GalleryIndex.build(extractor, read_folder(people / "query"), progress=False)
    index.save(folder / "index.pt")
    return index, folder / "index.pt"


def test_an_index_is_a_teacher(people, index):
    index, path = index
    files = read_split(people, "train").files()
    teacher = teacher_of(files, path, read_folder(people / "query").files(), None)
    assert torch.equal(teacher.embeddings, torch.cat([index.embeddings, index.queries.embeddings]))


def test_training_comes_nearer_to_the_teacher(people, index, tmp_path, capsys):
    arguments = ["--data_root", str(people), "--teacher", str(index[1]), *SMALL, "--batch_size", "16", "--lr", "0.05",
                 "--warmup_epochs", "0.1", "--num_epochs", "2", "--unlabelled", str(people / "query"), "--unlabelled_batch", "8",
                 "--exp_name", "near", "--clip", "20"]
    with chdir(tmp_path):
        train.main(train.get_args_parser().parse_args(arguments))
    out = capsys.readouterr().out
    assert "crops without identities; " in out
    losses = [float(value) for value in re.findall(r"loss_cosine ([\d.]+)", out)]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.05, losses
