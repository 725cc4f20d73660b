"""The mistakes that people type: each ends in one line with its cure, exit status 1, no traceback, and nothing is written."""

import functools
import importlib
import os
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_network import SIZE, tiny_model

from reid.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from reid.cli import run
from reid.data.datasets import read_split
from reid.files import save
from reid.retrieval import spacetime
from reid.retrieval.index import GalleryIndex

# script, arguments, what its one line says: what is wrong, and the cure
SET, LOAD = "--exp_name tiny --data_root set", "--exp_name tiny --data_root set --load_index"
QUERY = "--query_paths set/query/1/1_c2.png"
MISTAKES = [
    # whose network?
    ("eval", "--exp_name nobody --data_root set", r"--exp_name nobody: no models/nobody/best.pth; runs here: foreign"),
    ("eval", "--exp_name foreign --data_root set",
     r"models/foreign/best.pth: not a checkpoint of this project; .*: python train.py --weights models/foreign/best.pth$"),
    ("inference", "--exp_name pickled --data_root set", r"pickled/best.pth: not a checkpoint .*: python train.py --weights \S+$"),
    ("eval", f"{SET} --network n.onnx", r"--network needs --network_input, the pixels"),
    ("eval", "--network none.onnx --network_input rgb255 --data_root set", r"--network none.onnx: no such file$"),
    ("inference", f"{SET} --device cuda:7", r"--device cuda:7 is not available here; use auto, cpu"),
    # which images?
    ("eval", "--exp_name tiny --data_root nowhere", r"nowhere/gallery: no such folder; make it with data_prep.py or give"),
    ("eval", "--exp_name tiny --data_root set/gallery", r"set/gallery/gallery: no such folder; .* give another --data_root"),
    ("eval", "--exp_name tiny --data_root empty", r"empty/gallery: no images in sub-folders named by identity"),
    ("inference", "--exp_name tiny --data_root nowhere", r"nowhere/query: no such folder; make it with data_prep.py or give"),
    ("inference", f"--exp_name tiny --gallery note.txt {QUERY}", r"note.txt: is a file; give a folder of images"),
    ("inference", f"--exp_name tiny --gallery nowhere {QUERY}", r"nowhere: no such folder"),
    ("inference", "--exp_name tiny --gallery set/gallery", r"--gallery: give --query_paths, the images to look for, or --save"),
    ("inference", f"{LOAD} --query_paths nowhere.jpg", r"--query_paths nowhere.jpg: no such image"),
    ("inference", f"{LOAD} --query_paths note.txt", r"none of the queries could be read \(note.txt: .+\); give images"),
    ("inference", f"{LOAD} --query_paths index", r"--query_paths index: no images in this folder"),
    # an index of what?
    ("eval", f"{LOAD} --gallery_uri index/none.pt",
     r"no such index; make it: python eval.py --save_index --exp_name tiny --data_root set --gallery_uri index/none.pt$"),
    ("inference", f"--exp_name tiny --load_index --gallery set/gallery {QUERY}",
     r"index/tiny--gallery.pt: no such index; make it: python inference.py --save_index --exp_name tiny --gallery set/gallery$"),
    ("eval", "--exp_name tiny --data_root grown --load_index", r"index/tiny.pt: made of set, not of grown; give --data_root set"),
    ("inference", "--exp_name tiny --data_root grown --load_index", r"made of set, not of grown; give --data_root set, or make "),
    ("eval", f"{LOAD} --no-mirror", r"made with mirrored images; give --mirror, or make it again: python .* --no-mirror$"),
    ("inference", f"{LOAD} --no-mirror", r"made with mirrored images; give --mirror, or make it again: python eval.py .*"),
    ("eval", "--exp_name tiny --data_root grown --load_index --gallery_uri index/grown.pt",
     r"\(1 new, such as gallery/2/new.png\); bring it up to date: python eval.py --save_index --exp_name tiny --data_root grown "
     r"--gallery_uri index/grown.pt$"),
    ("inference", "--exp_name tiny --load_index --gallery_uri index/grown.pt",
     r"\(1 new, .* date: python eval.py --save_index --exp_name tiny --data_root grown --gallery_uri index/grown.pt$"),
    ("inference", f"{LOAD} --gallery_uri index/old.pt", r"reid-index version 1, this code reads version \d; make it again: "
     r"python eval.py --save_index --exp_name tiny --data_root set --gallery_uri index/old.pt$"),
    ("eval", f"{LOAD} --save_index", r"--load_index and --save_index: give one of them; --save_index alone embeds only what has"),
    ("eval", f"{LOAD} --gallery_uri models/tiny/best.pth", r"best.pth: expected a reid-index file, found 'reid-checkpoint'"),
    ("inference", f"{LOAD} --gallery_uri note.txt", r"note.txt: not a readable reid-index file; it is damaged or not ours$"),
    ("eval", f"{SET} --save_index --gallery_uri note.txt", r"note.txt: exists and is not a reid-index file; choose another name"),
    ("eval", "--exp_name tiny --data_root grown --save_index", r"index of set would be replaced by one of grown; add --over"),
    ("inference", f"{SET} --save_index", r"eval.py's index, whose queries would be lost; search it with --load_index, bring it"),
    ("inference", f"{SET} --index_type HNSW", r"--index_type HNSW needs a gallery in Milvus: give --save_index and --gal"),
    # how?
    ("eval", f"{SET} --far 0", r"--far 0.0: must lie between"),
    ("eval", f"{SET} --single_shot 0", r"--single_shot 0: must lie between 1 and"),
    ("eval", f"{SET} --protocol prid", r"--protocol prid: takes 100 people of queries and gallery, not 2$"),
    ("inference", "--exp_name tiny --list --gallery_uri index/none.pt",
     r"no such index; make it: python inference.py --add DIR --exp_name tiny --gallery_uri index/none.pt$"),
    ("eval", f"{LOAD} --protocol viper", r"--protocol viper: takes 316 people of queries and gallery, not 2$"),
    ("eval", f"{SET} --protocol viper --report r.html", r"draw ten: use --protocol market"),
    ("eval", f"{SET} --multi_query --spacetime", r"--spacetime needs the time of each query, .*: give one of them"),
    ("eval", f"{SET} --multi_query --protocol nocam", r"--multi_query averages the images of one camera, which --protocol nocam"),
    ("eval", "--data_root set grown --save_index", r"several --data_root have no one index .*: evaluate them one by one"),
    ("eval", "--compare tiny tiny", r"--compare tiny tiny: give two different runs"),
    ("eval", "--compare tiny other", r"--exp_name other: no models/other/best.pth; runs here: foreign, pickled, timed"),
    ("eval", "--compare tiny grown --json c.json", r"--compare prints two runs from their saved indexes; leave out --json$"),
    ("inference", f"{LOAD} --topk 0", r"--topk 0: must lie between 1 and"),
    ("inference", f"{LOAD} --cameras 99", r"no gallery image fits --cameras and --frames; the gallery's names may hold neither"),
    ("inference", f"{LOAD} --frames 9 1", r"--frames 9 1: give the first frame, then the last one"),
    ("inference", f"{LOAD} --spacetime",
     r"models/tiny/spacetime.pt: not there; learn it with: python eval.py --spacetime --exp_name tiny --data_root set$"),
    ("inference", "--exp_name timed --data_root set --load_index --gallery_uri index/tiny.pt --spacetime",
     r"--spacetime: no query's name gives camera and time, as 0007_c2s1_000451_03.jpg does; leave it out$"),
    ("inference", f"--exp_name tiny --gallery set/gallery --spacetime {QUERY}", r"give its --data_root beside --gallery"),
    # where to?
    ("eval", f"{SET} --json out.txt", r"--json out.txt: give a file that ends in .json"),
    ("inference", f"{LOAD} --output out.txt", r"--output out.txt: give a file that ends in .png, .jpg"),
    ("inference", f"{LOAD} --output out.png --positions 9", r"--positions 9: beyond --topk 5, so nothing would be drawn"),
    ("inference", f"{LOAD} --positions 1", r"--positions needs --output"),
    ("inference", f"{SET} --onnx_input float", r"--onnx_input needs --export"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the run "tiny", foreign weights, the data sets "set" and "grown" and their indexes with random embeddings."""
    folder = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = tiny_model()
        save_checkpoint("models/tiny/best.pth", model, {}, {})
        for name, content in (("foreign", {f"_orig_mod.{key}": value for key, value in model.state_dict().items()}),
                              ("pickled", torch.nn.Linear(2, 2))):
            (folder / "models" / name).mkdir()
            torch.save(content, f"models/{name}/best.pth")
        save_checkpoint("models/timed/best.pth", model, {}, {})
        ones = torch.ones(2, dtype=torch.int64)
        spacetime.fit(ones, torch.tensor([1, 2]), ones, torch.tensor([0, 250])).save(
            "models/timed/spacetime.pt", fingerprint(load_checkpoint("models/tiny/best.pth")) + "+camera_norm", "set")
        (folder / "note.txt").write_text("no image")
        (folder / "empty/gallery").mkdir(parents=True)
        made_by = fingerprint(load_checkpoint("models/tiny/best.pth"))
        for root, uri in (("set", "index/tiny.pt"), ("grown", "index/grown.pt")):
            for split, camera in (("gallery", 1), ("query", 2)):
                for pid in (1, 2):
                    (folder / root / split / str(pid)).mkdir(parents=True)
                    Image.new("RGB", (8, 16), (pid * 90, camera * 90, 0)).save(f"{root}/{split}/{pid}/{pid}_c{camera}.png")
            rows = F.normalize(torch.randn(4, SIZE, generator=torch.Generator().manual_seed(0)))
            index = GalleryIndex(rows[:2].half(), read_split(root, "gallery"), made_by, True)
            index.queries = GalleryIndex(rows[2:].half(), read_split(root, "query"), made_by, True)
            index.save(uri)
        save("index/old.pt", {"data_root": "set"}, "reid-index", 1)
        Image.new("RGB", (8, 16)).save("grown/gallery/2/new.png")
        yield folder


@pytest.fixture(scope="module")
def extractor():
    """`make_extractor` that builds the network of each run once."""
    from reid.extras import network

    made = functools.cache(lambda path, device: network.Extractor(path, device, "fp32"))
    return lambda args, checkpoint: made(checkpoint, args.device)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("script, arguments, message", MISTAKES)
def test_one_line_with_its_cure(lab, extractor, monkeypatch, capsys, script, arguments, message):
    from reid.extras import network

    module = importlib.import_module(script)
    monkeypatch.chdir(lab)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments.split()])
    if "--network" not in arguments:
        monkeypatch.setattr(network, "make_extractor", extractor)
    before = files(lab)
    with pytest.raises(SystemExit) as end:
        run(module.get_args_parser(), module.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and line.startswith(f"{script}.py: error: ")
    assert re.search(message, line), line
    assert files(lab) == before and os.getcwd() == str(lab)
