"""What users of train.py and data_prep.py mistype: each mistake is one line that says the cure, and nothing is written."""

import gc
import os
import sys
from contextlib import chdir

import pytest
import torch
from PIL import Image
from train_lab import TINY

import data_prep
import train
from reid import cli


@pytest.fixture(scope="module")
def place(few, tmp_path_factory):
    """A working folder with a dataset, a run that is finished, and files that are not what the options want."""
    folder = tmp_path_factory.mktemp("place")
    for path in ("empty/train", "models/old", "photos/anna", "site/hall/anna", "split/train/anna", "market/bounding_box_train"):
        (folder / path).mkdir(parents=True)
    for path in ("photos/anna/1.png", "site/hall/anna/1.png", "split/train/anna/1.png",
                 "market/bounding_box_train/0002_c1s1_000451_03.png"):
        Image.new("RGB", (4, 8)).save(folder / path)
    (folder / "notes.txt").write_text("notes")
    torch.save({"layer.weight": torch.zeros(3)}, folder / "other.pth")
    for name in ("best.pth", "last.pth"):
        (folder / "models/old" / name).write_bytes(b"weights")
    (folder / "people").symlink_to(few)
    return folder


def mistake(script, place, monkeypatch, capsys, *options):
    """Run a script in this process and return its error, one line; the files of `place` stay as they are."""
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *options])
    gc.collect()
    with chdir(place), pytest.raises(SystemExit) as end:
        cli.run(script.get_args_parser(), script.main)
    gc.collect()
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith(f"{script.__name__}.py: error: ") and error.count("\n") == 1, error
    assert sorted(path for path in place.rglob("*") if path.name != "mlflow.db") == before
    return error


@pytest.mark.parametrize("options, cure", [
    ("--data_root nowhere", "nowhere/train: no such folder; make it with data_prep.py or give another --data_root"),
    ("--data_root notes.txt", "notes.txt/train: no such folder; make it with data_prep.py"),
    ("--data_root empty", "empty/train: no images in sub-folders named by identity; make them with data_prep.py"),
    ("--data_root market", "market/train: no such folder; make it with data_prep.py"),
    ("--data_root people people", "two roots with the same name"),
    ("--batch_size 10", "must be --num_instances (4, at least 2) times 2 or more identities"),
    ("--batch_size 64", "16 identities in a batch, 6 are trained on (without those of --held_out); give --batch_size 24 or less"),
    ("--held_out 1", "--held_out 1.0: must lie between 0 and 0.5"),
    ("--lr nan", "--lr nan: must lie between 0 and"),
    ("--height 16", "--height 16: must lie between 32 and 2,048"),
    ("--weights imagnet", "--weights imagnet: no such file; give imagenet, none or the path of a state dict"),
    ("--weights other.pth", "0 of 64 backbone tensors matched for tiny"),
    ("--device cuda:7", "--device cuda:7 is not available here; use auto, cpu"),
    ("--device gpu", "--device gpu is not available here; use auto, cpu"),
    ("--precision fp16 --device cpu", "--precision fp16 needs a GPU; a CPU takes fp32 or bf16"),
    ("--exp_name ../up", "--exp_name '../up': a plain name is needed"),
    ("--exp_name old", "models/old exists; add --resume to go on, or choose another name"),
    ("--resume --exp_name old", "models/old/last.pth: not a checkpoint of this project"),
    ("--resume --exp_name odl", "no models/odl/last.pth; runs that can go on: old."),
    ("--teacher gone.pt", "--teacher gone.pt: no such file; give a checkpoint, an OpenVINO network (.xml), an index or a dict"),
    ("--teacher other.pth", "--teacher other.pth: needs `paths`, a list of N file names, and `embeddings`"),
    ("--unlabelled photos", "--unlabelled needs a --teacher"),
    ("--unlabelled empty --teacher other.pth", "empty: no image in it or below it"),
])
def test_train(place, monkeypatch, capsys, options, cure):
    named = ["--data_root", "people", "--exp_name", "new", *TINY] if "--resume" not in options else []
    assert cure in mistake(train, place, monkeypatch, capsys, *named, *options.split())


def test_train_resume_without_a_name(place, monkeypatch, capsys):
    assert "--resume needs the --exp_name of the run" in mistake(train, place, monkeypatch, capsys, "--resume")


@pytest.mark.parametrize("options, cure", [
    ("--from nowhere", "nowhere: no such folder"),
    ("--from notes.txt", "notes.txt: no such folder"),
    ("--from empty", "no images in sub-folders named by identity; the first folder"),
    ("--from site", "hall or anna could be the identity"),
    ("--from split", "split/train: is a split, not an identity; give the folder above the identities, such as --from split"),
    ("--from market", "this is Market-1501's own layout; use --archive market"),
    ("--from photos --output photos/out", "lies in the tree of --from; choose another --output"),
    ("--from photos --output people", "people: exists, but data_prep.py did not make it; choose another --output"),
    ("--from photos --train_share 50", "--train_share 50.0: must lie between 0 and 1"),
    ("--from photos --camera (", "--camera (: is not a regular expression"),
    ("--from photos --identity x(\\d)", "matches no path, such as anna/1.png"),
    ("--from photos --times gone.csv", "gone.csv: No such file"),
    ("--from photos --times notes.txt", "notes.txt, line 1: give, in the columns path, camera and time"),
    ("--times notes.txt", "--times needs --from"),
    ("--archive nowhere.zip", "nowhere.zip: No such file"),
    ("--archive notes.txt", "notes.txt: "),
    ("--archive photos", "no image named like"),
    ("--archive market", "--any_counts"),
    ("--synthetic --num_ids 2", "--num_ids 2: must lie between 4 and"),
])
def test_data_prep(place, monkeypatch, capsys, options, cure):
    assert cure in mistake(data_prep, place, monkeypatch, capsys, *options.split())
    assert not os.path.exists(place / "data")
