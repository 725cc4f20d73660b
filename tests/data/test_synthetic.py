"""Drawn people: Market-1501's names and layout, the same each time, and identities that raw pixels do not separate."""

import io
import random
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from reid.data import synthetic
from reid.data.names import parse_name


@pytest.fixture(scope="module")
def drawn():
    """The default set: rows of (split, folder, name, JPEG bytes)."""
    return list(synthetic.dataset(70, 0))


def pixels(rows):
    return np.stack([np.asarray(Image.open(io.BytesIO(row[3])), np.float32) for row in rows])


def rank1(queries, gallery, query_names, gallery_names):
    """Rank-1 by Market-1501's protocol: cosine similarity; junk and images of the query's id and camera are ignored."""
    mean = gallery.mean(0)
    queries, gallery = queries - mean, gallery - mean
    scores = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).T
    hits = []
    for row, query in zip(scores, query_names):
        keep = [i for i, g in enumerate(gallery_names) if g.pid != -1 and (g.pid, g.camid) != (query.pid, query.camid)]
        hits.append(gallery_names[max(keep, key=lambda i: row[i])].pid == query.pid)
    return np.mean(hits)


def clothes(images, cameras):
    """Mean and spread of the colours of head, trunk, legs and feet, standardised per camera: what a model can learn."""
    bands = [images[:, top:foot, 18:46].reshape(len(images), -1, 3)
             for top, foot in ((8, 20), (22, 38), (38, 58), (62, 82), (84, 104), (106, 124))]
    features = np.concatenate([part for band in bands for part in (band.mean(1), band.std(1))], 1)
    for camera in set(cameras):
        rows = np.array(cameras) == camera
        features[rows] = (features[rows] - features[rows].mean(0)) / (features[rows].std(0) + 1e-6)
    return features


def test_clothes_separate_identities_and_raw_pixels_do_not(drawn):
    queries, gallery = ([row for row in drawn if row[0] == split] for split in ("query", "gallery"))
    names = [parse_name(row[2]) for row in queries + gallery]
    images, n = pixels(queries + gallery), len(queries)
    raw = rank1(images[:n].reshape(n, -1), images[n:].reshape(len(images) - n, -1), names[:n], names[n:])
    assert raw < 0.35
    features = clothes(images, [name.camid for name in names])
    assert rank1(features[:n], features[n:], names[:n], names[n:]) > max(0.6, 2 * raw)


def test_naming_and_layout(drawn):
    names = [row[2] for row in drawn]
    assert len(set(names)) == len(names) and 900 <= len(names) <= 1300
    seen = defaultdict(set)  # (split, pid) -> cameras
    for split, folder, name, data in drawn:
        parsed = parse_name(name)
        assert int(folder) == parsed.pid and name.startswith(folder + "_") and parsed.camid in synthetic.CAMERAS
        assert parsed.seq in (1, 2, 3) and parsed.frame >= 0
        seen[split, parsed.pid].add(parsed.camid)
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (64, 128), "RGB")
    train = {pid for split, pid in seen if split == "train"}
    test = {pid for split, pid in seen if split == "query"}
    assert train == set(range(1, 41)) and test == set(range(41, 71))
    assert {pid for split, pid in seen if split == "gallery"} == test | {-1, 0}
    for pid in test:  # one query per camera, each with a match under another camera
        assert sum(row[0] == "query" and int(row[1]) == pid for row in drawn) == len(seen["query", pid])
        assert len(seen["gallery", pid]) >= 2 and seen["query", pid] <= seen["gallery", pid]


def test_the_time_between_two_cameras_follows_from_their_distance(drawn):
    """Everyone takes about as long between a pair of cameras: what a model of camera and time can learn."""
    first = {}
    for _, _, name, _ in drawn:
        parsed = parse_name(name)
        if parsed.pid > 0:
            key = parsed.pid, parsed.seq, parsed.camid
            first[key] = min(first.get(key, 10**9), parsed.frame)
    assert len({(pid, seq) for pid, seq, _ in first}) == 70  # each walks once
    times = defaultdict(list)
    for (pid, _, camera), frame in first.items():
        for (other_pid, _, other), later in first.items():
            if pid == other_pid and camera < other:
                times[camera, other].append(abs(later - frame))
    assert len(times) == 15
    strangers = [abs(a - b) for a, b in zip(first.values(), random.Random(0).sample(list(first.values()), len(first)))]
    for between in times.values():
        assert np.median(between) < np.median(strangers) / 3
        assert np.subtract(*np.percentile(between, [75, 25])) < np.median(strangers) / 5


def test_crops_depend_on_seed_and_identity_only(drawn):
    few = list(synthetic.dataset(4, 0))
    assert few == list(synthetic.dataset(4, 0))
    assert few != list(synthetic.dataset(4, 1))
    images = {row[2]: row[3] for row in drawn}
    person = [row for row in few if row[1] == "0001"]
    assert person and all(images[row[2]] == row[3] for row in person)
    assert {row[0] for row in few} == {"train", "query", "gallery"}


def test_traits_are_pinned():
    """The figures in README.md hold only as long as the people stay the same."""
    person = synthetic.make_person(0, 1)
    assert (person.top, person.bottom, person.style, person.bag) == ((120, 170, 212), (25, 46, 36), "long", "backpack")


def test_views_differ_and_a_false_detection_has_no_person():
    camera, person = synthetic.make_camera(0, 1), synthetic.make_person(0, 1)

    def view(yaw, who=person):
        return np.asarray(synthetic.draw_crop(who, camera, random.Random(0), yaw, 1.0), np.float32)
    assert view(0).shape == (128, 64, 3)
    assert np.array_equal(view(0), view(0))
    assert np.abs(view(0) - view(180)).mean() > 2
    inside = np.s_[40:100, 24:40]
    assert np.abs(view(0) - view(0, None))[inside].mean() > 20
