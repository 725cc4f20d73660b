"""`inference.py --group`: sort the crops of a gallery into people, a folder of links for each, which may be edited by hand.

The folder holds `0001/`, `0002/` ... with links to the crops, `singles/` for those that resemble no other, `sheets/` with a
contact sheet of each person, `people.html` and `people.json`, the record of every link that was made. Whatever is not in the
record stays as it is.
"""

import base64
import io
import json
import os
import re
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image, ImageDraw

from reid import ReidError
from reid.cli import printable
from reid.extras import pictures
from reid.extras.report import render
from reid.files import PEOPLE, PICTURE, REPORT, atomic_path, is_ours, locked
from reid.retrieval.group import group_index, pick_threshold

RECORD, SINGLES, SHEETS, PAGE = "people.json", "singles", "sheets", "people.html"
SHOWN, LISTED, DRAWN = 8, 300, 1000  # crops of a person and people on the page; contact sheets
COLUMNS, LINES = 10, 5  # of a contact sheet


def check_folder(folder, gallery):
    """Raise ReidError where `folder` is not for people: it is full of other things, or lies in the gallery or around it."""
    folder, own, read = Path(folder), os.path.join(os.path.realpath(folder), ""), os.path.join(os.path.realpath(gallery), "")
    if str(gallery) and (own.startswith(read) or read.startswith(own)):  # an index without a folder has ""
        raise ReidError(f"--group {folder}: and the gallery {gallery} must not lie in each other; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise ReidError(f"--group {folder}: is a file; give a folder")
    record = folder / RECORD
    if folder.is_dir() and any(folder.iterdir()) and not (record.is_file() and is_ours(record, PEOPLE)):
        raise ReidError(f"--group {folder}: holds other files and no {RECORD} of an earlier run; choose another folder")
    _read_record(folder)


def _read_record(folder):
    """Return the record of the last run. One that is damaged, or names places outside of the folder, raises ReidError."""
    file = folder / RECORD
    if not file.exists():
        return {"people": [], "singles": {}}
    try:
        record = json.loads(file.read_text())
        people, alone = record["people"], record.get("alone", [])
        numbers = [record.get("next", 1), *record.get("sheets", ()), *(person["number"] for person in people)]
        crops = [record["singles"], *(person["crops"] for person in people)]
        places = [place for part in crops for first, *more in part.values() for place in (first, *more)]
        places += [person["folder"] + "/-" for person in people]
        if not all(type(number) is int and 0 < number < 1 << 40 for number in numbers) \
                or not all(isinstance(path, str) for path in alone):
            raise TypeError("numbers of people, or paths of crops")
        outside = [place for place in places if {"", ".", ".."} & {*place.split("/")} or "/" not in place
                   or b"\0" in os.fsencode(place)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReidError(f"{file}: is damaged; restore it, or choose another folder") from error
    if outside:
        raise ReidError(f"{file}: names {outside[0]!r}, which is no place in this folder; restore it, or choose another folder")
    _check_own(folder, {os.path.dirname(place) for place in places})
    return record


def _check_own(folder, places):
    """Raise ReidError where one of the places, or a folder that it is in, is a link, through which other files would change."""
    for own in {own for place in map(Path, places) for own in (place, *place.parents)} - {Path()}:
        if os.path.islink(folder / own):
            raise ReidError(f"{folder / own}: is a link, through which nothing is written; remove it or give it another name")


def write_people(folder, index, threshold=None, camera_norm=True):
    """Group the crops of a GalleryIndex and bring the folder up to date with the groups; return text on what was done.

    threshold: as in `reid.retrieval.group.group`, by default that of the index. camera_norm: take out camera statistics. What was
    moved by hand since the last run stays: the crops of such a folder are one person, and those of two such folders are two. A
    group keeps the number of the largest part of a former one.
    """
    folder, stored = Path(folder), (index.threshold, index.camera_threshold)
    named = {path: row for row, path in enumerate(index.paths) if path}  # other rows were added as embeddings
    index = index.select(torch.tensor(sorted(named.values()), dtype=torch.int64))
    index.threshold, index.camera_threshold = stored
    index = index.camera_normalised() if camera_norm else index
    threshold = pick_threshold(index, threshold)
    check_folder(folder, index.data_root)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "another process groups into this folder"):
        tree = Tree(folder, index)
        together = tree.by_hand()
        groups = group_index(index, threshold, together)
        people = tree.assign(groups, together)
        changed = tree.write(people)
        drawn = _draw_sheets(tree, people, changed)
        _write_page(folder, index, people, int((groups.bincount() == 1).sum()))
        tree.save(people, complete=True)
    crops = sum(len(person["rows"]) for person in people)
    return (f"{folder}: {crops:,} crops of {len(people):,} people, {len(index) - crops:,} single ones, by a threshold of "
            f"{threshold:.4f}; {len(changed):,} people new or changed, {drawn:,} contact sheets drawn; look at {folder / PAGE}")


class Tree:
    """The folder of people, as it is now and as the last run has left it.

    former: {crop's path: (number or None, places where the last run put it)}; found: {row: place}, of the links that are there;
    hand: folders that were made or changed by hand; alone: rows that were taken out of a folder by hand. A place is a path
    relative to the folder, whose first part is that of the person.
    """

    def __init__(self, folder, index):
        self.folder, self.index = folder, index
        self.row_of = {path: row for row, path in enumerate(index.paths)}
        record = _read_record(folder)
        self.complete, self.next, self.gallery = record.get("complete", True), record.get("next", 1), record.get("gallery", "")
        self.people = {person["number"]: person for person in record["people"]}
        parts = [(person["number"], person["crops"]) for person in record["people"]] + [(None, record["singles"])]
        self.former = {path: (number, places) for number, crops in parts for path, places in crops.items()}
        self.hand = {person["folder"] for person in record["people"] if person.get("hand")}
        self.sheets = {*record.get("sheets", self.people)}  # numbers of the people who have one
        self.alone = {self.row_of[path] for path in record.get("alone", ()) if path in self.row_of}
        self.found = self._find()

    def _find(self):
        """{row: place} of the links to crops, by their target, or by their name where that is gone or in the former gallery."""
        by_name = {os.path.basename(place): path for path, (_, places) in self.former.items() for place in places}
        root, found = os.path.abspath(self.index.data_root), {}
        for parent, folders, files in os.walk(self.folder):
            for name in [*folders, *files]:
                link = os.path.join(parent, name)
                if os.path.islink(link):
                    target = os.path.normpath(os.path.join(os.path.realpath(parent), os.readlink(link)))
                    own = by_name.get(name) if self._leads_to(link, by_name.get(name)) else None
                    path = next((path for path in (os.path.relpath(target, os.path.realpath(root)), target, own)
                                 if path in self.row_of), None)
                    place = Path(link).relative_to(self.folder).as_posix()
                    if path and "/" in place and (row := self.row_of[path]) is not None:
                        recorded = place in self.former.get(path, (None, ()))[1]
                        if row not in found or not recorded:  # of two links, the one that was made by hand
                            found[row] = place
        return found

    def _leads_to(self, link, path):
        """Whether a link leads to a crop of the last run, or to nothing; others that have the name of a crop are the user's."""
        return os.path.islink(link) and (not os.path.exists(link) or os.path.realpath(link) == os.path.realpath(
            os.path.join(self.gallery, path or "")))

    def by_hand(self):
        """int64 [N]: one number for the crops of each folder that was made or changed by hand, -1 for other crops."""
        moved, there = {}, {_top(place) for place in self.found.values()}
        for path, (_, places) in self.former.items():
            row = self.row_of.get(path)
            if row is None:
                continue
            tops, now = {_top(place) for place in places}, self.found.get(row)
            if now is None and not self.complete:  # the last run was killed
                self.found[row] = now = places[0]
            if _top(now or "") not in tops and (now or tops & there):  # a folder that is gone as a whole is forgotten
                self.hand |= tops
                moved[row] = now
        self.hand |= {_top(now) for now in moved.values() if now}
        self.hand |= {_top(now) for row, now in self.found.items() if self.index.paths[row] not in self.former}
        self.hand -= {SINGLES}
        self.hand &= there
        number = {top: i for i, top in enumerate(sorted(self.hand))}
        together = torch.full((len(self.index),), -1)
        for row, place in self.found.items():
            together[row] = number.get(_top(place), -1)
        self.alone |= moved.keys()
        self.alone = {row for row in self.alone if _top(self.found.get(row, SINGLES)) == SINGLES}
        for i, row in enumerate(sorted(self.alone), len(number)):
            together[row] = i
        return together

    def assign(self, groups, together):
        """Give every group a number and a folder: [{number, name, folder, hand, rows}], sorted by number."""
        tops, clusters = sorted(self.hand), defaultdict(list)
        for row, number in enumerate(groups.tolist()):
            clusters[number].append(row)
        people = []
        for rows in clusters.values():
            hand = {tops[i] for i in together[rows].tolist() if 0 <= i < len(tops)}
            if hand or len(rows) > 1:
                people.append({"number": None, "folder": next(iter(hand), None), "hand": bool(hand), "rows": rows})
        by_folder = {person["folder"]: number for number, person in self.people.items()}
        votes = []
        for i, person in enumerate(people):
            former = Counter(self.former.get(self.index.paths[row], (None,))[0] for row in person["rows"])
            own = by_folder.get(person["folder"])
            votes += [(number != own, -count, number, i) for number, count in former.items() if number is not None]
        taken = set()
        for _, _, number, i in sorted(votes):
            if people[i]["number"] is None and number not in taken:
                people[i]["number"] = number
                taken.add(number)
        for person in sorted(people, key=lambda person: (-len(person["rows"]), person["rows"])):
            if person["number"] is None:
                while os.path.lexists(self.folder / f"{self.next:04d}"):
                    self.next += 1
                person["number"], self.next = self.next, self.next + 1
            person["folder"] = person["folder"] or f"{person['number']:04d}"
            person["name"] = re.sub(r"^\d{4,}([ _-]+|$)", "", person["folder"])
        return sorted(people, key=lambda person: person["number"])

    def write(self, people):
        """Move and make links; return the numbers of people whose crops differ from the last run's."""
        self._plan(people)
        _check_own(self.folder, {os.path.dirname(place) for place in self.places.values()})
        _check_own(self.folder, [RECORD, PAGE, SHEETS, *(_sheet(person["number"]) for person in people)])
        self.sheets |= {person["number"] for person in people}
        self.save(people, complete=False)
        for row, place in self.places.items():
            old, link = self.found.get(row), self.folder / place
            link.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(os.path.abspath(_file(self.index, row)), os.path.realpath(link.parent))
            if old not in (None, place) and os.path.islink(self.folder / old):
                os.rename(self.folder / old, link)
            if os.path.islink(link) and os.readlink(link) != target:
                link.unlink()
            if not os.path.lexists(link):
                os.symlink(target, link)
        for path in self.former.keys() - self.row_of.keys():
            for place in self.former[path][1]:
                if self._leads_to(self.folder / place, path):
                    (self.folder / place).unlink()
        for person in [*self.people.values(), {"folder": SINGLES}]:
            with suppress(OSError):  # is not empty
                os.rmdir(self.folder / person["folder"])
        former = {number: (person["folder"], set(person["crops"])) for number, person in self.people.items()}
        return {person["number"] for person in people if former.get(person["number"]) != (
            person["folder"], {self.index.paths[row] for row in person["rows"]})}

    def _plan(self, people):
        """Choose `places`, {row: place}: where a link is, if that is the folder of its person, otherwise there under its name."""
        names = Counter(os.path.basename(path) for path in self.index.paths)
        folder_of = {row: person["folder"] for person in people for row in person["rows"]}
        self.places, taken = {}, set()
        for row, path in enumerate(self.index.paths):
            top, old = folder_of.get(row, SINGLES), self.found.get(row)
            place = old
            if old is None or _top(old) != top:
                name = os.path.basename(old or path)
                name = name if old or names[name] == 1 else path.strip("/").replace("/", "_")
                stem, suffix = os.path.splitext(name)
                place, again = f"{top}/{name}", 1
                while place in taken or os.path.lexists(self.folder / place):
                    again += 1
                    place = f"{top}/{stem}-{again}{suffix}"
            taken.add(place)
            self.places[row] = place

    def save(self, people, complete):
        """Write the record. Before it is complete, it has the place where each link was, too."""
        def crops(rows):
            return {self.index.paths[row]: [self.places[row], *([self.found[row]] if not complete and row in self.found else [])]
                    for row in rows}

        single = set(range(len(self.index))) - {row for person in people for row in person["rows"]}
        listed = [{**{key: person[key] for key in ("number", "name", "folder", "hand")}, "crops": crops(person["rows"])}
                  for person in people]
        document = {"format": PEOPLE, "complete": complete, "gallery": self.index.data_root, "next": self.next, "people": listed,
                    "singles": crops(sorted(single)), "sheets": sorted(self.sheets),
                    "alone": [self.index.paths[row] for row in sorted(self.alone & single)]}
        with atomic_path(self.folder / RECORD, PEOPLE) as temporary:
            temporary.write_text(json.dumps(document, indent=1))


def _top(place):
    return place.split("/", 1)[0]


def _file(index, row):
    return Path(index.data_root, index.paths[row])


def _sheet(number):
    return f"{SHEETS}/{number:04d}.jpg"


def _draw_sheets(tree, people, changed):
    """Draw the contact sheets that are new or changed, of the DRAWN people with the most crops; return their number."""
    kept, drawn = set(), 0
    for person in sorted(people, key=lambda person: -len(person["rows"]))[:DRAWN]:
        file = tree.folder / _sheet(person["number"])
        kept.add(person["number"])
        if person["number"] in changed or not file.exists():
            rows = person["rows"][: COLUMNS * LINES]
            sheet = Image.new("RGB", (COLUMNS * 132 + 4, -(-len(rows) // COLUMNS) * 260 + 40), pictures.PAPER)
            more = f", {len(rows)} of them here" if len(rows) < len(person["rows"]) else ""
            font, title = pictures.font(18), f"{person['folder']}: {len(person['rows'])} crops{more}"
            ImageDraw.Draw(sheet).text((8, 8), pictures.ellipsis(title, font, sheet.width - 20), pictures.INK, font)
            for i, row in enumerate(rows):
                sheet.paste(pictures.crop(_file(tree.index, row)), (4 + i % COLUMNS * 132, 36 + i // COLUMNS * 260))
            pictures.save(sheet, file)
            drawn += 1
    for file in (tree.folder / _sheet(number) for number in tree.sheets - kept):
        if file.is_file() and not file.is_symlink() and is_ours(file, PICTURE):
            file.unlink()
    tree.sheets = kept
    return drawn


def _write_page(folder, index, people, singles):
    """Write the page: the people with the most crops, some crops of each."""
    shown = []
    for person in sorted(people, key=lambda person: -len(person["rows"]))[:LISTED]:
        rows = person["rows"]
        cameras = sorted({int(camid) for camid in index.camids[rows]} - {-1})
        thumbs = [_thumb(_file(index, rows[i * len(rows) // min(SHOWN, len(rows))])) for i in range(min(SHOWN, len(rows)))]
        name = {"folder": printable(person["folder"]), "link": quote(os.fsencode(person["folder"]))}
        shown.append(person | name | {"cameras": cameras, "thumbs": thumbs, "sheet": _sheet(person["number"])})
    html = render("people.html", title="People", people=shown, count=len(people), crops=len(index), singles=singles,
                  gallery=printable(index.data_root))
    with atomic_path(folder / PAGE, REPORT) as temporary:
        temporary.write_bytes(html)


def _thumb(file):
    out = io.BytesIO()
    pictures.crop(file).resize((64, 128), Image.Resampling.BOX).save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
