"""What eval.py adds to reid.retrieval.metrics: cross-domain, the query's own file, JSON, and the comparison of two runs."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from reid import ReidError
from reid.data.datasets import Records
from reid.retrieval import metrics
from reid.retrieval.index import GalleryIndex


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
def test_cross_domain_depends_on_the_training_data(script, tmp_path, trained, people, cross):
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


def evaluated(script, name, rows, queries):
    """(name, index, EvalResult) as `compare_table` takes it. rows, queries: (path, pid, camid, embedding)."""
    def index_of(rows):
        paths, pids, camids, emb = zip(*rows)
        unknown = torch.full((len(rows),), -1)
        records = Records(Path("nowhere"), list(paths), torch.tensor(pids), torch.tensor(camids), unknown, unknown)
        return GalleryIndex(torch.nn.functional.normalize(torch.tensor(emb), dim=1), records, "f" * 16, True)

    index = index_of(rows)
    index.queries = index_of(queries)
    data = script.gather_data(argparse.Namespace(multi_query=False), index)
    return name, index, metrics.evaluate(*data.values())


def test_comparison_pairs_by_path(script):
    gallery = [("g/2.jpg", 2, 2, (1.0, 0, 0)), ("g/1.jpg", 1, 2, (0.5, 1.0, 0)), ("g/3.jpg", 3, 2, (0, 0, 1.0))]
    queries = [("q/1.jpg", 1, 1, (1.0, 0, 0)), ("q/1b.jpg", 1, 3, (1.0, 0.1, 0)), ("q/3.jpg", 3, 1, (0, 0, 1.0)),
               ("q/4.jpg", 4, 1, (1.0, 1.0, 1.0))]  # 4 has no match
    one = evaluated(script, "calm-fox-1", gallery, queries)
    two = evaluated(script, "wise-owl-2", gallery, queries[::-1][:-1])  # another order, one query less
    lines = script.compare_table(one, two).splitlines()
    # of the two queries in both, 1b is second (AP 1/2) and 3 is first
    assert lines[1].split() == ["mAP", "75.00", "75.00", "+0.00", "+0.00", "to", "+0.00"]
    assert lines[3].split() == ["Rank-1", "50.00", "50.00", "+0.00", "+0.00", "to", "+0.00"]
    assert lines[-2:] == ["2 queries valid in both: 0 better with wise-owl-2, 0 worse, 2 equal",
                          "mAP: no clear difference; Rank-1: no clear difference"]


def test_comparison_names_the_better_run(script):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 64, generator=generator)
    queries, good, bad = (
        [(f"{number}", number % 40 + 1, camid, row) for number, row in enumerate(
            (centres.repeat(3, 1) + noise * torch.randn(120, 64, generator=generator)).tolist())]
        for camid, noise in ((1, 0.4), (2, 0.4), (2, 8.0)))
    good, bad = evaluated(script, "good", good, queries), evaluated(script, "bad", bad, queries)
    for sides in ((good, bad), (bad, good)):
        lines = script.compare_table(*sides).splitlines()
        assert lines[-1] == "mAP: good is better; Rank-1: good is better"
        assert float(lines[1].split()[3]) == pytest.approx(100 * (sides[1][2].mAP - sides[0][2].mAP), abs=0.011)
    other = evaluated(script, "other", [("else", 1, 2, (1.0, 0.0))], [("q", 1, 1, (1.0, 0.0))])
    with pytest.raises(ReidError, match="different galleries"):
        script.compare_table(good, other)


def test_a_copy_of_the_query_is_not_a_result(script, tmp_path):
    """Query and gallery folders hold the same file: by content it is the query itself, whatever its name, camera and id."""
    def index_of(split, images):
        records = Records(tmp_path, [f"{split}/{name}" for name in images], torch.tensor([1] * len(images)),
                          torch.full((len(images),), -1), *[torch.full((len(images),), -1)] * 2)
        (tmp_path / split).mkdir()
        for name, (content, _) in images.items():
            (tmp_path / split / name).write_bytes(content)
        return GalleryIndex(torch.tensor([row for _, row in images.values()]), records, "f" * 16, True)

    index = index_of("gallery", {"copy.jpg": (b"one", (1.0, 0.0)), "match.jpg": (b"two", (0.6, 0.8))})
    index.queries = index_of("query", {"q.jpg": (b"one", (1.0, 0.0)), "gone.jpg": (b"three", (1.0, 0.0))})
    (tmp_path / "query" / "gone.jpg").unlink()
    index.queries.contents[1] = -1  # the query's file is unknown: both images count
    for multi_query in (False, True):  # without cameras each image stays alone
        data = script.gather_data(argparse.Namespace(multi_query=multi_query), index)
        result = metrics.evaluate(*data.values(), protocol="nocam")
        assert sorted(result.matches.tolist()) == [1, 2] and result.mAP == 1.0
