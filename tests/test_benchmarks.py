"""The benchmarks start from any folder and write their rows in one form. No time is asserted."""

import json
import subprocess
import sys

import pytest
from forked import Script

BENCHMARKS = ["embedding", "evaluation", "reranking", "search", "serve", "training"]
WITHOUT_FAISS = "import runpy, sys; sys.modules['faiss'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[1]); " \
    "del sys.argv[1]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_from_another_folder(tmp_path, name):
    out = Script(tmp_path, f"benchmarks/{name}.py", "--help").works().out
    assert "--quick" in out and "--json" in out


@pytest.mark.parametrize("faiss", [True, False], ids=["faiss", "no faiss"])
def test_rows_of_search(root, tmp_path, faiss):
    if faiss:
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    script = root / "benchmarks/search.py"
    start = [script] if faiss else ["-c", WITHOUT_FAISS, script, script.parent]
    options = ["--gallery", "200", "--queries", "64", "--rounds", "1", "--json", "rows.json"]
    done = subprocess.run([sys.executable, *map(str, [*start, *options])], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {"name", "ours", "peer", "peer_name", "ratio"} <= set(row) and row["ours"] > 0 and row["order_of_float64"] == 1
    if faiss:
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
    else:
        assert row["peer"] is None and row["ratio"] is None and "peer not installed" in row["peer_name"]
        assert "peer not installed" in done.stdout


def test_ratio_is_above_one_where_ours_is_better(root):
    code = ("import common\n"
            "print([common.row('x', [2, 1, 1], [4, 3, 9], 'y', higher)['ratio'] for higher in (False, True)])\n"
            "print(len(common.in_turn([list, list], 4)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=root / "benchmarks", capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [str([3.0, 1 / 3]), "2"], done.stderr
