"""The benchmarks start from any folder and write their rows in one form. No time is asserted."""

import importlib
import json
import sys

import pytest
from forked import Script

BENCHMARKS = ["embedding", "evaluation", "reranking", "search", "serve", "training"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_from_another_folder(tmp_path, name):
    out = Script(tmp_path, f"benchmarks/{name}.py", "--help").works().out
    assert "--quick" in out and "--json" in out


def without_faiss():
    sys.modules["faiss"] = None


@pytest.mark.parametrize("faiss", [True, False], ids=["faiss", "no faiss"])
def test_rows_of_search(tmp_path, faiss):
    if faiss:
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    options = ["--gallery", "200", "--queries", "64", "--rounds", "1", "--json", "rows.json"]
    done = Script(tmp_path, "benchmarks/search.py", *options, prepare=None if faiss else without_faiss).works()
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {"name", "ours", "peer", "peer_name", "ratio"} <= set(row) and row["ours"] > 0 and row["order_of_float64"] == 1
    if faiss:
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
    else:
        assert row["peer"] is None and row["ratio"] is None and "peer not installed" in row["peer_name"]
        assert "peer not installed" in done.out


def test_ratio_is_above_one_where_ours_is_better(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    common = importlib.import_module("common")
    assert [common.row("x", [2, 1, 1], [4, 3, 9], "y", higher)["ratio"] for higher in (False, True)] == [3, 1 / 3]
    assert list(map(len, common.in_turn([list, list], 4))) == [4, 4]
