"""Split a tree of images, one folder per identity, into training and test identities: the source of data_prep.py --from."""

import csv
import os
import posixpath
import re
from collections import defaultdict
from datetime import datetime
from pathlib import Path

from reid import ReidError
from reid.cli import printable
from reid.data.archives import FOLDERS
from reid.data.datasets import BESIDE, list_files
from reid.data.names import (
    DISTRACTOR,
    FOLDER_RULE,
    UNKNOWN,
    UNKNOWN_PID,
    folder_camera,
    folder_pid,
    is_clip,
    order,
    parse_name,
    read_folders,
    read_path,
)

FRAMES_PER_SECOND = 25  # of Market-1501's cameras, and so in every name
SPLIT_FOLDERS = {"train", "val", "valid", "test", "query", "gallery"}
TREE_RULE = "rule: " + FOLDER_RULE.replace("; ", ";\n      ") + """;
      an image beside the folders has the identity of its name. Names -1_c... are junk and 0000_c1s1... distractors: gallery.
      Identities are sorted by the SHA-256 of their folder's name, and the first {share:g} of them are for training. Of each
      other identity seen by two or more cameras, one image of every camera with at least two (of one camera, where none has
      two) is a query; without cameras in the names, or with one in all, one image is. The rest is gallery."""


def from_tree(folder, train_share, times=None, camera=None, left_out=None, identity=None):
    """Yield (split, identity's folder, name, path) of the images of a tree with one folder per identity, by TREE_RULE.

    times: a CSV file with the camera and time of every image (see `read_times`), which become part of its new name.
    camera: a regular expression that finds the camera in an image's path, for which its name gets a folder cam<number>.
    left_out: {reason: files} (a defaultdict), to which the files that are not taken are added. identity: a regular expression
    that finds the identity in the path, instead of its folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReidError(f"{folder}: no such folder")
    images, others = list_files(folder, regular=True)
    if left_out is not None:
        left_out.update(others)
    seen = _numbered(_find("camera", camera, images))
    files = _identities(folder, images, seen, _find("identity", identity, images), left_out)
    if times:
        files = _named_by(read_times(times), times, files)
    people, cameras, special = defaultdict(list), set(), []  # identity's folder -> names
    for person, name in files:
        pid, camid, *_ = read_path(f"{person}/{name}", True)
        cameras.add(camid)
        special.append((person, name)) if pid <= DISTRACTOR else people[person].append((camid, name))
    identities = sorted(people, key=order)
    training = set(identities[: round(len(identities) * train_share)])
    for person, names in people.items():
        queries = () if person in training else _queries(names, len(cameras) == 1)
        for _, name in names:
            split = "train" if person in training else "query" if name in queries else "gallery"
            yield split, person, name, folder / files[person, name]
    for person, name in special:
        yield "gallery", person, name, folder / files[person, name]


def _identities(folder, images, seen, people, left_out):
    """Return {(identity's folder, name below it): path} of the images of a tree; those without an identity are left out.

    seen: {path: (camera, text that names it)}, which comes before that of folder and file name. people: {path: identity},
    which comes before that of folders; other folders then become part of the name.
    """
    files, owners, beside = {}, {}, []
    for path in images:
        *folders, name = path.split("/")
        if path not in people and any(part in FOLDERS for part in folders):
            raise ReidError(f"{folder}: this is Market-1501's own layout; use --archive {folder}")
        if path not in people and folders and folders[0] in SPLIT_FOLDERS:
            raise ReidError(f"{folder / folders[0]}: is a split, not an identity; give the folder above the identities, such as "
                            f"--from {folder / folders[0]}")
        if path in seen:
            camera, text = seen[path]
            folders = [part for part in folders if part != text]
        if path in people:
            person, folders = people[path], [part for part in folders if part != people[path]]
            if folder_camera(person) is not None:
                raise ReidError(f"--identity: {path} gives {person}, which is named like a camera; choose another group")
            name = "_".join([*(part for part in folders if folder_camera(part) is None and not is_clip(part)), name])
            folders = [part for part in folders if folder_camera(part) is not None or is_clip(part)]
            camid = read_folders("/".join([*folders, name]))[1]
        else:
            person, camid = read_folders("/".join([*folders, name]))
        parsed = parse_name(name)
        if path in seen:
            folders = [f"cam{camera}", *(part for part in folders if folder_camera(part) is None)]
        elif parsed and camid not in (UNKNOWN, parsed.camid):
            raise ReidError(f"{folder / path}: camera {camid} by its folder, {parsed.camid} by its name; rename one, or give "
                            "--camera")
        if person:
            folders = [part for part in folders if part != person]
        elif parsed and parsed.pid != UNKNOWN_PID:
            person = f"{parsed.pid:04d}" if parsed.pid >= 0 else str(parsed.pid)
        else:
            beside.append(path)
            continue
        other = owners.setdefault(folder_pid(person), person)
        if other != person:
            raise ReidError(f"{folder}: {other} and {person} name the same identity; give one folder per identity")
        if (same := files.setdefault((person, "/".join([*folders, name])), path)) != path:
            raise ReidError(f"{folder / path}: {same} has the same identity, camera and name; rename one")
    if not files:
        raise ReidError(f"{folder}: no images in sub-folders named by identity; {FOLDER_RULE}"
                        + (f"; found {beside[0]}" if beside else ""))
    if beside and left_out is not None:
        left_out[BESIDE] += beside
    return files


def _queries(names, one_camera):
    """Choose the queries among the (camera, name) of one test identity, such that each has a match in the rest."""
    cameras = defaultdict(list)
    for camid, name in sorted(names, key=lambda row: order(posixpath.basename(row[1]))):
        cameras[UNKNOWN if one_camera else camid].append(name)
    if UNKNOWN in cameras:
        return cameras[UNKNOWN][:1] if len(names) > 1 else []
    if len(cameras) < 2:
        return []
    return [seen[0] for seen in cameras.values() if len(seen) > 1] or min(cameras.items())[1][:1]


def _find(option, pattern, paths):
    """Return {path: text} of the paths in which a regular expression matches: its first group, or all that matches."""
    try:
        regex = re.compile(pattern or "")
    except re.error as error:
        raise ReidError(f"--{option} {pattern}: is not a regular expression ({error})") from error
    matches = {path: regex.search(path) for path in paths}
    found = {path: match[min(regex.groups, 1)] for path, match in matches.items() if match}
    found = {path: text.replace("/", "_") for path, text in found.items() if text and text.strip("./")}
    if pattern is not None and paths and not found:
        raise ReidError(f"--{option} {pattern}: matches no path, such as {paths[0]}")
    return found


def _numbered(found):
    """Return {path: (camera, text)} of {path: text}: texts that are not all numbers are numbered in sorted order."""
    texts = sorted(set(found.values()))
    numeric = all(re.fullmatch(r"\d{1,9}", text, re.ASCII) for text in texts)
    numbers = {text: int(text) if numeric else number for number, text in enumerate(texts, 1)}
    if not numeric:
        print("cameras: " + printable(", ".join(f"{number} is {text}" for text, number in numbers.items())))
    return {path: (numbers[text], text) for path, text in found.items()}


def read_times(file):
    """Return {path: (camera, frame)} of a CSV file with the columns path, camera and time; frame 0 is its earliest time.

    The columns are separated by commas, semicolons or tabs, the text is UTF-8 or UTF-16. path is relative to the tree, camera
    a number from 0 on, time in seconds or ISO 8601 (2026-03-01T12:00:05). Raises ReidError with the first line for which
    this does not hold.
    """
    data, line, times = Path(file).read_bytes(), 1, {}
    try:
        lines = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").splitlines()
        separator = max(",;\t", key=lines[0].count) if lines else ","
        heads = [head.strip().lower() for head in lines[0].split(separator)] if lines else []
        if not {"path", "camera", "time"} <= set(heads):
            raise KeyError
        rows = csv.DictReader(lines[1:], heads, delimiter=separator)
        for row in rows:
            line += 1
            path = posixpath.normpath(row["path"].strip().replace("\\", "/"))
            camera, second = int(row["camera"]), _seconds(row["time"])
            if path in times or not (0 <= camera < 10**9 and abs(second) < 10**12):
                raise ValueError
            times[path] = camera, second
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, csv.Error):
        raise ReidError(f"{file}, line {line}: give, in the columns path, camera and time, a path that occurs once, a camera "
                        "number, and a time in seconds or ISO 8601") from None
    earliest = min((second for _, second in times.values()), default=0)
    return {path: (camera, round((second - earliest) * FRAMES_PER_SECOND)) for path, (camera, second) in times.items()}


def _seconds(text):
    try:
        return float(text.replace(",", "."))  # a decimal comma, where semicolons separate the columns
    except ValueError:
        return datetime.fromisoformat(text.strip()).timestamp()


def _named_by(times, source, files):
    """Return `files` with names like Market-1501's; each path must be in `times`, and vice versa."""
    if different := sorted(times.keys() ^ set(files.values())):
        raise ReidError(f"{source}: {different[0]} is in the list or in the tree, not in both; list each image of the tree, by "
                        "its path in it")
    named = {}
    for number, ((person, _), path) in enumerate(sorted(files.items(), key=lambda item: item[1])):
        camera, frame = times[path]
        pid = folder_pid(person) % 10**18  # names hold 18 digits; in the tree the folder names the identity
        named[person, f"{pid:04}_c{camera}s1_{frame:06}_{number:02}{os.path.splitext(path)[1]}"] = path
    return named
