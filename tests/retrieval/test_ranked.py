"""RankedList: hits by position, matches by threshold, new scores."""

import json

import torch

from reid.retrieval.ranked import Query, RankedList


class Gallery:
    def hit(self, row):
        return f"g/{row}.jpg", f"name {row}", row, 1


def test_hits_matches_and_json():
    ranked = RankedList(Query("q.jpg", 3, 2), torch.tensor([4, 7]), torch.tensor([0.9, 0.5]), Gallery(), 0.5)
    assert len(ranked) == 2 and ranked.names == ["name 4", "name 7"] and ranked.matches.tolist() == [True, False]
    first, second = ranked
    assert first[:6] == (1, 4, "g/4.jpg", "name 4", 4, 1) and first.match and second == ranked[-1] and not second.match
    plain = json.loads(json.dumps(ranked.to_dict()))
    assert plain["query"] == "q.jpg" and [hit["position"] for hit in plain["hits"]] == [1, 2]


def test_new_scores_reorder_and_drop_the_threshold():
    ranked = RankedList(Query(), torch.tensor([4, 7, 5]), torch.tensor([0.9, 0.5, 0.4]), Gallery(), 0.5)
    again = ranked.reordered(torch.tensor([1.0, 2.0, 2.0]), topk=2)
    assert again.rows.tolist() == [7, 5] and again.scores.tolist() == [2.0, 2.0]
    assert again.matches is None and again[0].match is None and ranked.rows.tolist() == [4, 7, 5]
