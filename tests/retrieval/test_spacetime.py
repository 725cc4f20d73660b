"""Camera and time on simulated people with given clocks and walking times."""

import pytest
import torch
import torch.nn.functional as F

from reid import ReidError, files
from reid.retrieval import spacetime
from reid.retrieval.metrics import evaluate
from reid.retrieval.rerank import rerank
from reid.retrieval.spacetime import SpaceTime, fit, fit_weight

RATE = 25.0
CLOCKS = {(1, 1): 0.0, (1, 2): 3100.0, (2, 1): -70.0, (3, 1): 35.0, (3, 2): 2900.0}  # s, start of each recording
WALK = {1: 0.0, 2: 60.0, 3: 180.0}  # s from the first camera; the way is 1, 2, 3


def world(people, seed=0, first=1, spread=8.0):
    """pids, camids, seqs, frames: everybody passes each camera once, for 2 to 4 images, within 6,000 s."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for pid in range(first, first + people):
        enters = 100 + 5900 * torch.rand((), generator=g).item()
        for camera, walk in WALK.items():
            at = enters + walk + spread * torch.randn((), generator=g).item()
            seq = max(s for c, s in CLOCKS if c == camera and (CLOCKS[c, s] <= at or s == 1))
            for shot in range(int(torch.randint(2, 5, (), generator=g))):
                rows.append((pid, camera, seq, round((at + shot - CLOCKS[camera, seq]) * RATE)))
    return tuple(torch.tensor(rows).T)


def embeddings(pids, noise, seed=0, dim=64):
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(int(pids.max()) + 1, dim, generator=g)
    return F.normalize(centre[pids] + noise * torch.randn(len(pids), dim, generator=g), dim=1)


@pytest.fixture(scope="module")
def model():
    return fit(*world(300))


def seen(camera, second, seq=1):
    """One image, camids, seqs, frames, at a second of the true time line."""
    return tuple(torch.tensor([x]) for x in (camera, seq, round((second - CLOCKS.get((camera, seq), 0)) * RATE)))


def test_the_recordings_are_put_on_one_time_line(model):
    found = {(c, s): float(t) for (c, s), t in zip(model.recordings.tolist(), model.start)}
    for camera in (1, 3):  # the time between cameras is in the histograms; within one camera it must be right
        assert found[camera, 2] - found[camera, 1] == pytest.approx(CLOCKS[camera, 2] - CLOCKS[camera, 1], abs=10)


def test_the_usual_walking_time_is_likely_and_others_are_not(model):
    at = seen(1, 1000)
    usual, early, late = (model.prob(*at, *seen(2, 1000 + s)).item() for s in (60, -60, 600))
    assert usual > 0.95 and early < 0.2 and late < 0.2
    across = model.prob(*at, *seen(3, 1180)).item()
    other_recording = model.prob(*seen(1, 4000, 2), *seen(3, 4180, 2)).item()
    assert across > 0.95 and other_recording > 0.95


def test_direction_matters_and_the_order_of_the_two_images_does_not(model):
    a, b = seen(1, 1000), seen(2, 1060)
    assert torch.equal(model.prob(*a, *b), model.prob(*b, *a))
    assert model.prob(*a, *b) > model.prob(*seen(2, 1000), *seen(1, 1060))


@pytest.mark.parametrize(
    "other",
    [
        (1, 1, 25000),  # the same camera, at the same time
        (9, 1, 26500),  # a camera, or a recording of a known one, never seen in training
        (2, 7, 26500),
        (-1, -1, -1),
        (2, 1, -1),
        (2, -1, 26500),
        (2, 1, 10**9),  # further apart than anything learned
    ],
)
def test_unknown_camera_or_time_leaves_the_visual_score(model, other):
    one = tuple(torch.tensor([x]) for x in (1, 1, 25000))
    other = tuple(torch.tensor([x]) for x in other)
    visual = torch.tensor([[0.3]])
    for pair in ((one, other), (other, one)):
        prob = model.prob(*pair[0], *pair[1])
        assert prob.item() == 0.5
        assert torch.equal(model.fuse(visual, prob), visual)


def test_fusion_helps_people_that_were_not_trained_on(model):
    pids, *where = world(60, seed=5, first=1000)
    emb = embeddings(pids, noise=3.0, seed=1)
    cosine, prob = emb @ emb.T, model.prob(*where, *where)
    assert prob.shape == cosine.shape and prob.dtype == torch.float32
    ranked = rerank(emb, emb, bonus=model.bonus(*(torch.cat([x, x]) for x in where)))
    labels = (pids, where[0], pids, where[0])
    visual, fused, both = (
        evaluate(None, None, *labels, scores=scores).mAP for scores in (cosine, model.fuse(cosine, prob), ranked.scores)
    )
    assert visual < 0.6 and fused > visual + 0.2 and both > visual + 0.2


def test_bonus_is_the_weighted_evidence_below_zero(model):
    pids, *where = world(20, seed=6)
    bonus = model.bonus(*where)
    every = torch.arange(len(pids))
    square = bonus(every[:, None], every)
    evidence = model.prob(*where, *where).logit()
    torch.testing.assert_close(square - square[0, 0], model.weight * (evidence - evidence[0, 0]), atol=1e-5, rtol=0)
    assert square.max() <= 0
    torch.testing.assert_close(bonus(every[:-1], every[1:]), square.diagonal(1))


def test_the_weight_is_not_fitted_to_a_network_that_separates_its_training_people():
    columns = world(120)
    by_heart = embeddings(columns[0], noise=0.01)  # on these the visual score alone is always right
    assert (by_heart @ by_heart.T)[columns[0][:, None] == columns[0]].min() > 0.9
    strangers = (by_heart @ by_heart.T)[columns[0][:, None] != columns[0]].std().item()
    assert 0.2 * strangers < fit_weight(by_heart, *columns) < 1.6 * strangers


def test_the_weight_is_fitted_with_all_images_as_the_gallery(model):
    """The gallery has all strangers who pass at a likely time; only the queries are of one half."""
    columns = world(40)
    asked = columns[0] % 2 == 0
    half = spacetime._Half(model, asked, embeddings(columns[0], noise=1.0), torch.zeros(len(asked), 64), *columns)
    assert asked[half.q].all() and len(half.q) == 20 * len(WALK)
    assert half.cosines(0.0)[0].shape == half.evidence.shape == (len(half.q), len(asked))


def test_too_few_people_for_two_halves_get_the_default_weight():
    columns = world(1)
    assert fit_weight(embeddings(columns[0], noise=0.5), *columns) == spacetime.DEFAULT_WEIGHT


def test_junk_distractors_and_unknown_frames_change_nothing(model):
    columns = torch.stack(world(300))
    extra = torch.tensor([[-1, 0, 0, 5, 5], [1, 1, 2, 1, 2], [1, 1, 1, 1, 1], [10, 20, 30, -1, -1]])
    other = fit(*torch.cat([columns, extra], 1))
    assert torch.equal(other.log_odds, model.log_odds) and torch.equal(other.start, model.start)


def test_sites_without_common_people_have_even_odds():
    here, there = world(100), list(world(100, seed=1, first=500))
    there[1] = there[1] + 10
    both = fit(*(torch.cat(x) for x in zip(here, there)))
    assert both.prob(*seen(1, 1000), *seen(2, 1060)) > 0.9
    inside, across = (tuple(torch.tensor([x]) for x in place) for place in ((11, 1, 25000), (2, 1, 28250)))
    assert both.prob(*inside, *(torch.tensor([x]) for x in (12, 1, 28250))) > 0.9
    assert both.prob(*inside, *across).item() == 0.5


def test_days_without_common_people_have_even_odds():
    today, tomorrow = world(100), list(world(100, seed=1, first=500))
    tomorrow[2] = tomorrow[2] + 10
    both = fit(*(torch.cat(x) for x in zip(today, tomorrow)))
    one, same_day, next_day = seen(1, 1000), seen(2, 1060), seen(2, 1060)
    next_day[1].add_(10)
    assert both.prob(*one, *same_day) > 0.9
    assert both.prob(*one, *next_day).item() == 0.5


def dataset(folder, images=2):
    """A dataset with `images` training images, which only count by name here."""
    (folder / "train" / "0001").mkdir(parents=True)
    for i in range(images):
        (folder / "train" / "0001" / f"{i}.jpg").touch()
    return folder


def test_save_and_load(model, tmp_path):
    data_root = dataset(tmp_path / "people")
    model.save(tmp_path / "spacetime.pt", "f" * 16, data_root)
    again = SpaceTime.load(tmp_path / "spacetime.pt", "f" * 16, data_root)
    where = world(20, seed=7)[1:]
    assert torch.equal(again.prob(*where, *where), model.prob(*where, *where)) and again.weight == model.weight


def test_a_model_belongs_to_its_weights_and_its_dataset(model, tmp_path):
    path, data_root = tmp_path / "spacetime.pt", dataset(tmp_path / "people")
    with pytest.raises(ReidError, match=r"not there; learn it with: python eval\.py --spacetime"):
        SpaceTime.load(path, "f" * 16, data_root)
    model.save(path, "f" * 16, data_root)
    with pytest.raises(ReidError, match="other weights or another --camera_norm; remove it"):
        SpaceTime.load(path, "0" * 16, data_root)
    namesake = dataset(tmp_path / "elsewhere" / "people")  # the same name and the same number of images
    with pytest.raises(ReidError, match=r"learned from .*people .*, not from .*elsewhere/people"):
        SpaceTime.load(path, "f" * 16, namesake)
    (data_root / "train" / "0001" / "new.jpg").touch()
    with pytest.raises(ReidError, match=r"2 training images of 1 identities.*3 training images of 1 identities"):
        SpaceTime.load(path, "f" * 16, data_root)


@pytest.mark.parametrize("change", [{"cameras": None}, {"rate": 0.0}, {"weight": float("nan")}, {"start": torch.ones(2)},
                                    {"log_odds": torch.full((4, 4, 4), torch.nan)}])
def test_a_damaged_model_is_one_line(model, tmp_path, change):
    record = vars(model) | {"fingerprint": "f" * 16, "dataset": spacetime.dataset_name(tmp_path)} | change
    files.save(tmp_path / "spacetime.pt", record, spacetime.FORMAT, spacetime.VERSION)
    with pytest.raises(ReidError, match="damaged; remove it"):
        SpaceTime.load(tmp_path / "spacetime.pt", "f" * 16, tmp_path)
    del record["cameras"]
    files.save(tmp_path / "spacetime.pt", record, spacetime.FORMAT, spacetime.VERSION)
    with pytest.raises(ReidError, match="damaged; remove it"):
        SpaceTime.load(tmp_path / "spacetime.pt", "f" * 16, tmp_path)


def test_nothing_to_learn_raises_one_line():
    pids, camids, seqs, frames = world(10)
    with pytest.raises(ReidError, match="two cameras"):
        fit(pids, torch.ones_like(camids), seqs, frames)
    with pytest.raises(ReidError, match="two cameras"):
        fit(pids, camids, seqs, torch.full_like(frames, -1))
    with pytest.raises(ReidError, match="one entry"):
        fit(pids, camids[1:], seqs, frames)
    with pytest.raises(ReidError, match="one entry"):
        fit_weight(embeddings(pids[1:], noise=1.0), pids, camids, seqs, frames)
