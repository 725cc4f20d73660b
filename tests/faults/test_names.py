"""File names with control characters, and names that are not UTF-8, are escaped wherever they are shown or written."""

import os
from pathlib import Path

import pytest
from PIL import Image

ODD = ["\x1b]0;title\x07.png", "a\nleft out: b.png", "\u202egpj.png", os.fsdecode(b"\xff\xfe.png"), "<b>&'\".png"]
FORBIDDEN = ["\x1b", "\x07", "\u202e", "a\nleft"]


@pytest.fixture
def odd(here):
    """Two people, each image under an odd name, one damaged, and a query of each."""
    for split, camera in ("query", 1), ("gallery", 2):
        for number, name in enumerate(ODD):
            file = Path("data", split, f"000{1 + number % 2}", f"000{1 + number % 2}_c{camera}s1_00000{number}_{name}")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 16), (40 * number, 90 * camera, 0)).save(file)
    Path("data/gallery/0001/0001_c2s1_damaged\x1b[31m.jpg").write_bytes(b"\xff\xd8")
    return here


def test_odd_names_are_escaped(odd):
    for name, options in (("eval", ["--report", "r.html"]), ("inference", ["--output", "r.png", "--query_paths", "data/query"])):
        status, out, err = odd(name, *odd.network, "--data_root", "data", "--json", f"{name}.json", *options)
        assert status == 3, err
        shown = [out, "\n".join(err), Path(f"{name}.json").read_text()]
        if name == "eval":
            shown.append(Path("r.html").read_text())
            assert "<b>&" not in shown[-1]
        for text in shown:
            text.encode()  # no surrogates
            assert not [word for word in FORBIDDEN if word in text]
        assert any(line.startswith("left out: ") and "damaged\\x1b[31m.jpg: " in line for line in err)
    assert "\\x1b]0;title\\x07.png" in out and Path("r.png").exists()


def test_odd_names_in_errors(odd):
    for option in (["--json"], ["--output"], ["--load_index", "--gallery_uri"], ["--query_paths"]):
        line = odd.refused("inference", *odd.network, "--data_root", "data", *option, "x\x1b]0;\nerror: y")
        assert "x\\x1b]0;" in line and "\x1b" not in line
    missing = ["--data_root", "data", "--query_paths", os.fsdecode(b"\xff.png")]
    assert "no such image" in odd.refused("inference", *odd.network, *missing)
