"""What eval.py adds to reid.retrieval.metrics: cross-domain, the query's own file, JSON, and the comparison of two runs."""

import argparse
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import eval as evaluate
from reid import ReidError
from reid.data.datasets import Records, read_split
from reid.retrieval import metrics
from reid.retrieval.arguments import check_evaluation
from reid.retrieval.evaluation import gather_data, score, set_thresholds, split_index
from reid.retrieval.index import GalleryIndex
from reid.retrieval.protocol import random_splits
from reid.retrieval.summary import compare_table, is_cross_domain, print_matrix, to_document


@pytest.mark.parametrize("classes, trained, people, cross", [
    ([2, 7], "data/there", [2, 7], False),  # the same people, whatever the folder is called
    ([2, 7], ["data/here"], [2], True),  # other people in a folder of that name
    (["there/2", "there/7", "more/3"], ["x/there", "x/more"], [2, 7], False),  # several roots: the ids of each are its own
    (["there/2", "more/7"], ["x/there", "x/more"], [2, 7], True),
    ([2, 7], "data/here", None, False), ([2, 7], ["data/there", "elsewhere/here"], None, False),  # no train/: the name decides
    ([2, 7], ["data/there"], None, True), ([2, 7], None, None, True),
])
def test_cross_domain_depends_on_the_identities(tmp_path, classes, trained, people, cross):
    (tmp_path / "here").mkdir()
    for pid in people or ():
        (tmp_path / "here" / "train" / f"{pid:04d}").mkdir(parents=True)
    record = {"args": {"data_root": trained} if trained else {}, "config": {"classes": classes}}
    assert is_cross_domain(record, tmp_path / "here") == cross


class Rows(list):
    fingerprint, bad = "f" * 8, ()


def test_json_holds_every_query_and_reads_as_strict_json(tmp_path):
    emb = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    pids, camids = torch.arange(30) % 4 + 1, torch.arange(30) % 3
    data = [emb[:6], emb[6:], pids[:6].clone(), camids[:6], pids[6:], camids[6:]]
    data[2][5] = 99  # has no match: its AP is NaN, which JSON has not
    index = Rows(range(24))
    index.queries = Rows(range(6))
    result, more = metrics.evaluate(*data), {"cross_domain": True, "cameras": metrics.camera_table(*data)._asdict()}
    args = argparse.Namespace(exp_name="run", data_root=str(tmp_path))
    document = to_document(args, {"args": {}, "config": {}}, {"plain": result}, {"plain": metrics.bootstrap(result)},
                           metrics.roc(*data), index, more)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(json.dumps(document), parse_constant=refuse)
    plain = found["results"]["plain"]
    assert plain["ap"][5] is None and plain["ap"][:5] == result.ap[:5].tolist()
    assert plain["interval"]["mAP"][0] == pytest.approx(result.mAP) and plain["rank"]["1"] == result.rank[1]
    assert found["cross_domain"] and found["counts"] == {"queries": 6, "gallery": 24, "left_out": 0}
    assert len(found["cameras"]["rank1"]) == 3 and {"fingerprint", "versions", "arguments", "roc"} <= set(found)


def evaluated(name, rows, queries):
    """(name, index, EvalResult) as `compare_table` takes it. rows, queries: (path, pid, camid, embedding)."""
    def index_of(rows):
        paths, pids, camids, emb = zip(*rows)
        unknown = torch.full((len(rows),), -1)
        records = Records(Path("nowhere"), list(paths), torch.tensor(pids), torch.tensor(camids), unknown, unknown)
        return GalleryIndex(torch.nn.functional.normalize(torch.tensor(emb), dim=1), records, "f" * 16, True)

    index = index_of(rows)
    index.queries = index_of(queries)
    data = gather_data(index)
    return name, index, metrics.evaluate(*data.values())


def test_comparison_pairs_by_path():
    gallery = [("g/2.jpg", 2, 2, (1.0, 0, 0)), ("g/1.jpg", 1, 2, (0.5, 1.0, 0)), ("g/3.jpg", 3, 2, (0, 0, 1.0))]
    queries = [("q/1.jpg", 1, 1, (1.0, 0, 0)), ("q/1b.jpg", 1, 3, (1.0, 0.1, 0)), ("q/3.jpg", 3, 1, (0, 0, 1.0)),
               ("q/4.jpg", 4, 1, (1.0, 1.0, 1.0))]  # 4 has no match
    one = evaluated("calm-fox-1", gallery, queries)
    two = evaluated("wise-owl-2", gallery, queries[::-1][:-1])  # another order, one query less
    lines = compare_table(one, two).splitlines()
    # of the two queries in both, 1b is second (AP 1/2) and 3 is first
    assert lines[1].split() == ["mAP", "75.00", "75.00", "+0.00", "+0.00", "to", "+0.00"]
    assert lines[3].split() == ["Rank-1", "50.00", "50.00", "+0.00", "+0.00", "to", "+0.00"]
    assert lines[-2:] == ["2 queries valid in both: 0 better with wise-owl-2, 0 worse, 2 equal",
                          "mAP: no clear difference; Rank-1: no clear difference"]


def test_comparison_names_the_better_run():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 64, generator=generator)
    queries, good, bad = (
        [(f"{number}", number % 40 + 1, camid, row) for number, row in enumerate(
            (centres.repeat(3, 1) + noise * torch.randn(120, 64, generator=generator)).tolist())]
        for camid, noise in ((1, 0.4), (2, 0.4), (2, 8.0)))
    good, bad = evaluated("good", good, queries), evaluated("bad", bad, queries)
    for sides in ((good, bad), (bad, good)):
        lines = compare_table(*sides).splitlines()
        assert lines[-1] == "mAP: good is better; Rank-1: good is better"
        assert float(lines[1].split()[3]) == pytest.approx(100 * (sides[1][2].mAP - sides[0][2].mAP), abs=0.011)
    other = evaluated("other", [("else", 1, 2, (1.0, 0.0))], [("q", 1, 1, (1.0, 0.0))])
    with pytest.raises(ReidError, match="different galleries"):
        compare_table(good, other)
    with pytest.raises(ReidError, match="--compare good good: give two different runs"):
        compare_table(good, good)


def test_a_copy_of_the_query_is_not_a_result(tmp_path):
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
        data = gather_data(index, multi_query)
        result = metrics.evaluate(*data.values(), protocol="nocam")
        assert sorted(result.matches.tolist()) == [1, 2] and result.mAP == 1.0


def test_a_query_folder_that_is_a_copy_of_the_gallery(tmp_path):
    """Six images of three people, given as angles, without cameras. Each query's own file, a copy or a link, never counts.

    The matches are at ranks 2, 5, 4, 4, 2, 1 of the five other images: Rank-1 is 1/6, mAP (1/2 + 1/5 + 1/4 + 1/4 + 1/2 + 1)/6.
    """
    angles = torch.tensor([30, 120, 175, 110, 170, 155]).deg2rad()
    rows, paths = torch.stack([angles.cos(), angles.sin()], 1), [f"{1 + i // 2}/{'ab'[i % 2]}.jpg" for i in range(6)]
    for i, path in enumerate(paths):
        for split in ("gallery", "query"):
            (tmp_path / split / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "gallery" / path).write_bytes(b"%d" % i)
        if i % 2:
            (tmp_path / "query" / path).symlink_to(tmp_path / "gallery" / path)
        else:
            (tmp_path / "query" / path).write_bytes(b"%d" % i)
    index, index.queries = (GalleryIndex(rows, read_split(tmp_path, split), "f" * 16, True) for split in ("gallery", "query"))
    data = gather_data(index)
    for protocol in ("market", "nocam"):
        result = metrics.evaluate(*data.values(), protocol=protocol)
        assert (result.rank[1], result.mAP) == pytest.approx((1 / 6, 0.45)) and result.first_rank.tolist() == [2, 5, 4, 4, 2, 1]
    with_own = metrics.evaluate(*(data | {"q_ids": None, "g_ids": None}).values())
    assert (with_own.rank[1], with_own.mAP) == pytest.approx((1, 0.7889), abs=1e-4)
    roc = metrics.roc(*data.values(), rates=(0.5,))
    assert (roc.same_histogram.sum(), roc.different_histogram.sum(), roc.different_pairs) == (6, 24, 24)
    cosines, hits = rows @ rows.T, []
    for drawn in itertools.product((0, 1), (2, 3), (4, 5)):  # each single-shot gallery is as likely as the others
        for match in drawn:
            query = match ^ 1
            hits.append(all(cosines[query, match] >= cosines[query, other] for other in drawn))
    assert metrics.single_shot(*data.values(), repeats=400)["rank1"][0] == pytest.approx(sum(hits) / 24, abs=0.05)
    assert metrics.camera_table(*data.values()).rank1.tolist() == [[pytest.approx(1 / 6)]]
    table = compare_table(("one", index, result), ("two", index, result)).splitlines()
    assert table[1].split()[:3] == ["mAP", "45.00", "45.00"] and table[3].split()[:3] == ["Rank-1", "16.67", "16.67"]


def test_one_identity_has_no_roc_and_no_threshold(capsys):
    rows = [(f"g/{i}.jpg", 7, 2, (1.0, i)) for i in range(3)]
    _, index, result = evaluated("run", rows, [("q.jpg", 7, 1, (1.0, 0.5))])
    args = argparse.Namespace(multi_query=False, protocol="market", camera_norm=True, far=1e-3, exp_name="run", data_root="d")
    roc = set_thresholds(args, index)
    assert roc is None and index.threshold is index.camera_threshold is None and "no" in capsys.readouterr().out
    document = to_document(args, {"args": {}}, {"plain": result}, {}, roc, index, {})
    assert document["roc"] is None and document["results"]["plain"]["mAP"] == 1.0


def test_published_splits():
    """viper: ten times 316 people; prid: 100 people and every distractor. Each split is evaluated on its own."""
    people = torch.arange(1, 401)
    splits = list(random_splits("viper", people, torch.cat([people, torch.zeros(5, dtype=torch.int64)])))
    assert len(splits) == 10
    for q_rows, g_rows in splits:
        assert len(q_rows) == 316 and len(g_rows) == 321 and torch.equal(people[q_rows], people[g_rows[:316]])
    assert len({tuple(q_rows.tolist()) for q_rows, _ in splits}) == 10
    assert all(torch.equal(a[0], b[0]) for a, b in zip(splits, random_splits("viper", people, people)))
    with pytest.raises(ReidError, match="takes 100 people of queries and gallery, not 99"):
        next(random_splits("prid", people[:99], people))

    generator = torch.Generator().manual_seed(0)
    # people whom only one side has are distractors, whatever their id
    q_pids, g_pids = torch.cat([people[:150], people[300:310]]), torch.cat([people[:150], people[200:250]])
    q_rows, g_rows = next(random_splits("prid", q_pids, g_pids))
    assert len(q_rows) == 100 and int(q_rows.max()) < 150 and g_rows.tolist() == [*q_rows.tolist(), *range(150, 200)]

    rows = F.normalize(torch.randn(120, 16, generator=generator))
    seen = F.normalize(rows + 0.5 * torch.randn(120, 16, generator=generator))
    gallery = [(f"g/{i}", i + 1, 2, row) for i, row in enumerate(seen.tolist())] + [("g/x", 0, 2, [0.25] * 16)]
    _, index, _ = evaluated("run", gallery, [(f"q/{i}", i + 1, 1, row) for i, row in enumerate(rows.tolist())])
    parts = split_index(index, "prid")
    args = argparse.Namespace(multi_query=False, protocol="prid", camera_norm=False, rerank=False, spacetime=False)
    found = [result for part in parts for _, result in score(args, part)]
    scores = index.queries.embeddings @ index.embeddings.T
    by_hand = []
    for q_rows, _ in random_splits("prid", index.queries.pids, index.pids):
        columns = torch.cat([q_rows, torch.tensor([120])])
        ranks = [1 + int((scores[q, columns] > scores[q, q]).sum()) for q in q_rows.tolist()]
        by_hand.append((sum(1 / rank for rank in ranks) / 100, sum(rank == 1 for rank in ranks) / 100))
    assert [(r.mAP, r.rank[1]) for r in found] == [pytest.approx(values) for values in by_hand]
    whole = metrics.pooled(found)
    assert (whole.mAP, whole.rank[1]) == pytest.approx(tuple(torch.tensor(by_hand).double().mean(0).tolist()))
    assert whole.valid == 1000 and len(whole.ap) == 1000 and float(whole.ap.mean()) == pytest.approx(whole.mAP)


def test_table_of_runs_and_datasets(capsys):
    def document(run, dataset, rank1):
        return {"exp_name": run, "arguments": {"data_root": f"data/{dataset}", "protocol": "market"},
                "results": {"plain": {"rank": {"1": rank1}, "mAP": rank1 / 2}}}

    print_matrix([document("calm-fox-1", "a", 0.5), document("calm-fox-1", "b", 0.25), document("owl", "a", 1.0)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines[0][:3] == ["Rank-1", "/", "mAP"] and lines[0][3:] == ["a", "(market)", "b", "(market)"]
    assert lines[1:] == ["calm-fox-1, plain 50.0 / 25.0 25.0 / 12.5".split(), "owl, plain 100.0 / 50.0".split()]


@pytest.mark.parametrize("options, message", [
    (["--data_root", "a", "b", "--protocol", "market", "nocam", "viper"], "2 --data_root but 3 --protocol"),
    (["--data_root", "a", "b", "--save_index"], "no one index"),
    (["--exp_name", "a", "b", "--report", "r.html"], "evaluate them one by one"),
    (["--protocol", "viper", "--report", "r.html"], "draw ten"),
    (["--protocol", "prid", "--single_shot", "3"], "draw ten"),
    (["--compare", "a", "b", "--json", "c.json", "--rerank"], "leave out --json, --rerank"),
    (["--load_index", "--save_index"], "give one of them"),
])
def test_options_that_cannot_act_together(options, message):
    with pytest.raises(ReidError, match=message):
        check_evaluation(evaluate.get_args_parser().parse_args(options))


@pytest.mark.parametrize("far, kept", [(0.001, [0.001, 0.01]), (0.0001, None), (0.5, [0.001, 0.01, 0.5])])
def test_no_threshold_rests_on_few_pairs(capsys, far, kept):
    """120 queries and 120 gallery images, each of another person: 14,280 pairs of different people, of which a rate needs 10."""
    rows = F.normalize(torch.randn(240, 16, generator=torch.Generator().manual_seed(0))).tolist()
    sides = [[(f"{camid}/{i}", i + 1, camid, rows[camid * 120 + i]) for i in range(120)] for camid in (0, 1)]
    _, index, _ = evaluated("run", *sides)
    roc = set_thresholds(argparse.Namespace(multi_query=False, protocol="market", camera_norm=False, far=far), index)
    printed = capsys.readouterr().out
    if kept is None:
        assert roc is None and index.threshold is index.camera_threshold is None
        assert printed == "no threshold: --far 0.0001 takes 100,000 pairs of different people, but there are 14,280\n"
    else:
        assert list(roc.tpr) == kept and index.threshold == roc.threshold[far] and printed.count("TAR@FAR") == len(kept)
        assert index.camera_threshold not in (None, index.threshold) and index.false_accept_rate == far
