"""RankedList: hits by position, matches by threshold, new scores, re-ranking, camera and time."""

import argparse
import json

import pytest
import torch

from reid.data.names import folder_pid
from reid.retrieval.ranked import Query, RankedList, ranked_lists, rerank_lists, weigh_lists
from reid.retrieval.rerank import rerank
from reid.retrieval.spacetime import fit


class Gallery:
    def hit(self, row):
        return f"g/{row}.jpg", f"name {row}", row, 1


def test_hits_matches_and_json():
    anna = folder_pid("anna")  # beyond 2^53, which JavaScript rounds
    ranked = RankedList(Query("anna/q.jpg", anna, 2), torch.tensor([4, 7]), torch.tensor([0.9, 0.5]), Gallery(), 0.5)
    assert len(ranked) == 2 and ranked.names == ["name 4", "name 7"] and ranked.matches.tolist() == [True, False]
    first, second = ranked
    assert first[:6] == (1, 4, "g/4.jpg", "name 4", 4, 1) and first.match and second == ranked[-1] and not second.match
    plain = json.loads(json.dumps(ranked.to_dict()))
    assert (plain["query"], plain["pid"], plain["name"], plain["camid"]) == ("anna/q.jpg", str(anna), "anna", 2)
    hits = [(1, 4, "g/4.jpg", "name 4", "4", 1, 0.9, True), (2, 7, "g/7.jpg", "name 7", "7", 1, 0.5, False)]
    assert [tuple(hit.values()) for hit in plain["hits"]] == [pytest.approx(hit) for hit in hits]
    assert list(plain["hits"][0]) == ["position", "row", "path", "name", "pid", "camid", "score", "match"]
    assert RankedList(Query(), ranked.rows[:0], ranked.scores[:0], Gallery()).to_dict() == {
        "query": None, "pid": None, "name": "", "camid": -1, "hits": []}  # unlabelled


class Named:
    def hit(self, row):
        return ("x/anna/1.jpg", "7.jpg", "")[row], ("anna", "ben", "eve")[row], row, 1


def test_lists_name_people(capsys):
    from inference import write_results

    ranked = RankedList(Query("q.jpg"), torch.arange(3), torch.tensor([0.9, 0.5, 0.25]), Named(), 0.6)
    write_results(argparse.Namespace(output=None, json=None), None, [ranked])
    assert capsys.readouterr().out == ("\nquery q.jpg\n   1  0.9000  x/anna/1.jpg  match\n   2  0.5000  ben  7.jpg  no match\n"
                                       "   3  0.2500  eve  no match\n")


def test_new_scores_reorder_and_drop_the_threshold():
    ranked = RankedList(Query(), torch.tensor([4, 7, 5]), torch.tensor([0.9, 0.5, 0.4]), Gallery(), 0.5)
    again = ranked.reordered(torch.tensor([1.0, 2.0, 2.0]), topk=2)
    assert again.rows.tolist() == [7, 5] and again.scores.tolist() == [2.0, 2.0]
    assert again.matches is None and again[0].match is None and ranked.rows.tolist() == [4, 7, 5]


class Seen(Gallery):
    """30 images in two cameras, 10 s apart, with embeddings."""

    threshold = 0.5
    embeddings = torch.nn.functional.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)))
    camids, seqs, frames = torch.arange(30) % 2 + 1, torch.ones(30, dtype=torch.int64), torch.arange(30) * 250


def test_re_ranking_and_evidence_reorder_lists():
    gallery = Seen()
    pids = torch.arange(30) // 2 + 1
    evidence = fit(pids, gallery.camids, gallery.seqs, gallery.frames)
    queries = torch.nn.functional.normalize(gallery.embeddings[:2] + 0.1)
    scores, rows = (queries @ gallery.embeddings.T).sort(descending=True)
    rows[1] = -1  # nothing was found for the second query
    lists = ranked_lists(gallery, scores, rows, [Query("a.jpg", 1, 1, 1, 0), Query("b.jpg", 2, 1, 1, 0)])
    found = gallery.embeddings[rows[0]]
    where = [torch.cat([torch.tensor([value]), column[rows[0]]])
             for value, column in zip((1, 1, 0), (gallery.camids, gallery.seqs, gallery.frames))]
    expected = {
        "rerank": rerank(queries[:1], found).scores(0, 1)[0],
        "both": rerank(queries[:1], found, bonus=evidence.bonus(*where)).scores(0, 1)[0],
        "spacetime": scores[0] + evidence.weight * evidence.prob(*(x[:1] for x in where), *(x[1:] for x in where))[0].logit()}
    results = {"rerank": rerank_lists(lists, queries, 7), "both": rerank_lists(lists, queries, 7, evidence),
               "spacetime": weigh_lists(lists, evidence, 7)}
    for name, (first, empty) in results.items():
        best, order = expected[name].sort(descending=True, stable=True)
        torch.testing.assert_close(first.scores, best[:7])
        assert torch.equal(first.rows, rows[0][order[:7]]), name
        assert first.query.file == "a.jpg" and first.threshold is None and lists[0].threshold == 0.5 and len(empty) == 0
    assert not torch.equal(results["spacetime"][0].rows, lists[0].rows[:7])
