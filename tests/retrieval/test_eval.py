"""What eval.py adds to the figures of reid.retrieval.metrics: whose people they are of, and all of it as JSON."""

import argparse
import importlib.util
import json

import pytest
import torch

from reid.retrieval import metrics


@pytest.fixture(scope="module")
def script(root):
    spec = importlib.util.spec_from_file_location("eval_script", root / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "trained, people, cross",
    [
        ("data/here", [], False),
        (["data/there", "elsewhere/here"], [], False),
        (["data/there"], [2, 7], True),
        (None, [2, 7], False),  # converted weights: only their classes are known
        (None, [2], True),
        (None, [], True),
    ],
)
def test_cross_domain_is_told_by_what_was_trained_on(script, tmp_path, trained, people, cross):
    for pid in people:
        (tmp_path / "here" / "train" / f"{pid:04d}").mkdir(parents=True)
    record = {"args": {"data_root": trained} if trained else {}, "config": {"classes": [2, 7]}}
    assert script.is_cross_domain(record, tmp_path / "here") == cross


class Rows(list):
    fingerprint, bad = "f" * 8, ()


def test_json_holds_every_query_and_reads_as_strict_json(script, tmp_path):
    emb = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    pids, camids = torch.arange(30) % 4 + 1, torch.arange(30) % 3
    data = [emb[:6], emb[6:], pids[:6].clone(), camids[:6], pids[6:], camids[6:]]
    data[2][5] = 99  # has no match: its AP is NaN, which JSON has not
    index = Rows(range(24))
    index.queries = Rows(range(6))
    result, more = metrics.evaluate(*data), {"cross_domain": True, "cameras": metrics.camera_table(*data)._asdict()}
    args = argparse.Namespace(exp_name="run", data_root=str(tmp_path), json=tmp_path / "out.json")
    script.write_json(args, {"args": {}, "config": {}}, {"visual": result}, {"visual": metrics.bootstrap(result)},
                      metrics.roc(*data), index, more)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(args.json.read_text(), parse_constant=refuse)
    visual = found["results"]["visual"]
    assert visual["ap"][5] is None and visual["ap"][:5] == result.ap[:5].tolist()
    assert visual["interval"]["mAP"][0] == pytest.approx(result.mAP) and visual["rank"]["1"] == result.rank[1]
    assert found["cross_domain"] and found["counts"] == {"queries": 6, "gallery": 24, "left_out": 0}
    assert len(found["cameras"]["rank1"]) == 3 and {"fingerprint", "versions", "arguments", "roc"} <= set(found)
