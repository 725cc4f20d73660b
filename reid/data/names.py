"""Identity and camera of an image, read from its file name and its folders."""

import hashlib
import os
import re
import unicodedata
from pathlib import PurePath
from typing import NamedTuple

from reid import ReidError

JUNK, DISTRACTOR = -1, 0  # Market-1501's reserved ids: ignored; kept and always wrong
UNKNOWN = -1  # camera, sequence or frame that is not part of a name
UNKNOWN_PID = -2  # unlabelled: neither name nor folder gives an identity
PERSON = 100  # characters of the name that a person is given
FOLDER_RULE = ("the first folder that is not named like a camera (cam2, camera_a, c3) is the identity; folders below it may be "
               "cameras, or clips (track_1, seq2, clip3, a date)")

_INTEGER = re.compile(r"\d{1,18}", re.ASCII)
_STYLES = [re.compile(style + r"(?:\.\w{1,8}){0,2}", re.ASCII | re.IGNORECASE) for style in (  # ".jpg.jpg" occurs
    # Market-1501 0002_c1s1_000451_03, DukeMTMC 0005_c2_f0046985, VeRi 0002_c002_00030600_0, plain 0007_c3; "-1" is junk
    r"(?P<pid>-?\d{1,18})_c(?P<camid>\d{1,9})(?:s(?P<seq>\d{1,9}))?(?:_f?(?P<frame>\d{1,15}))?(?:_\d{1,15})?",
    r"(?P<pid>\d{4})_\d{3}_(?P<camid>\d{2})_\d{4}(?:morning|noon|afternoon)_\d{4}_\d{1,2}(?:_ex)?",  # MSMT17
    r"(?P<pid>00-1|\d{4})C(?P<camid>\d)T\d{4}F\d{3}",  # MARS
    r"(?P<pair>[1-5])_(?P<pid>\d{3})_(?P<camid>[12])_\d{2}",  # CUHK03: five pairs of cameras, each with its own ids
)]
_CAMERA = r"(?:cam(?:era)?[ _-]?(\d{1,9})|cam(?:era)?[ _-]([a-z])|c(\d{1,9}))"
_CAMERA_FOLDER = re.compile(_CAMERA, re.ASCII | re.IGNORECASE)
_CAMERA_IN_NAME = re.compile(rf"(?<![a-z0-9]){_CAMERA}(?=s\d|[^a-z0-9]|$)", re.ASCII | re.IGNORECASE)
_CLIP = re.compile(r"(?:track|tracklet|seq|sequence|clip|video|shot|session|day|scene|part|frames?|images?|crops?)[ _-]?\d*"
                   r"|\d{4}-?\d\d-?\d\d(?:\D.*)?", re.ASCII | re.IGNORECASE)


class Name(NamedTuple):
    """The parts of a file name: identity, camera, sequence and frame (UNKNOWN_PID, UNKNOWN where there is none)."""

    pid: int
    camid: int
    seq: int = UNKNOWN
    frame: int = UNKNOWN


def parse_name(name):
    """Parse a file name into a Name; return None for a name that gives neither identity nor camera.

    Read are the names of Market-1501, DukeMTMC, VeRi, MSMT17, MARS and CUHK03, and a camera anywhere between separators
    (`anna_cam2_01.jpg`, `x_C1S1_3.png`, `cam_a-7.jpg`), with the identity if its number comes directly before the camera. A
    name with two different cameras gives none.
    """
    for style in _STYLES:
        if match := style.fullmatch(name):
            parts = {key: int(value.replace("00-", "-")) for key, value in match.groupdict().items() if value}
            if pair := parts.pop("pair", 0):
                parts = {"pid": 1000 * pair + parts["pid"], "camid": 2 * pair - 2 + parts["camid"]}
            return Name(**parts)
    found = list(_CAMERA_IN_NAME.finditer(name))
    if len({_camera(match) for match in found}) != 1:
        return None
    before = re.fullmatch(r"(\d{1,18})[_-]", name[: found[0].start()], re.ASCII)
    return Name(int(before[1]) if before else UNKNOWN_PID, _camera(found[0]))


def is_clip(folder):
    """Whether a folder below an identity is named like a clip: track_1, seq2, a date."""
    return bool(_CLIP.fullmatch(folder))


def _camera(match):
    """Return the number of a camera; letters count from a = 1."""
    return ord(match[2].lower()) - ord("a") + 1 if match[2] else int(match[1] or match[3])


def folder_camera(folder):
    """Return the camera of a folder named like one, or None."""
    match = _CAMERA_FOLDER.fullmatch(folder)
    return _camera(match) if match else None


def read_folders(path):
    """Return (identity's folder or "", camera or UNKNOWN) of the folders of a POSIX path, by FOLDER_RULE.

    Raises ReidError where two folders could be the identity, or two give different cameras.
    """
    identity, camid = "", UNKNOWN
    for folder in path.split("/")[:-1]:
        if (camera := folder_camera(folder)) is not None:
            if camid not in (UNKNOWN, camera):
                raise ReidError(f"{path}: its folders name two cameras; {FOLDER_RULE}")
            camid = camera
        elif not identity:
            identity = folder
        elif not is_clip(folder):
            raise ReidError(f"{path}: {identity} or {folder} could be the identity; {FOLDER_RULE}; give "
                            "the folder above the identities, or data_prep.py --from DIR --camera REGEX or --identity REGEX")
    return identity, camid


def folder_pid(folder):
    """Return the identity of a folder: its number, or a hash of its name, the same in every split and run.

    Hashes lie between 2^61 and 2^62, far away from any number that a person would choose. Folders 0 and -1 have one, too: a
    folder's name alone is no sign of Market-1501's junk and distractors (see `reserved`).
    """
    if _INTEGER.fullmatch(folder):
        if int(folder):
            return int(folder)
        folder = "0"
    folder = unicodedata.normalize("NFC", folder)  # a Mac writes é as two characters
    digest = hashlib.blake2b(folder.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 2) | (1 << 61)


def check_person(name, source):
    """Return a name that is given to a person, without spaces around it; raise ReidError for one that could be misread.

    It must not look like another name, a path, junk or a distractor, and fit into the address of DELETE /people/{name}. source:
    where it was given, for the message.
    """
    name = name.strip()
    if not (0 < len(name) <= PERSON and name.isprintable()) or "/" in name or re.fullmatch(r"-1|0+|\.\.?", name):
        raise ReidError(f"{source}: give the person's name, 1 to {PERSON} printable characters without /; -1 and 0 are junk and "
                        "distractors")
    return name


def order(name):
    """Return a sort key that is the same everywhere and, unlike the name itself, favours no camera."""
    return hashlib.sha256(os.fsencode(str(name))).digest()


def reserved(name):
    """Whether a Name is that of Market-1501's junk (-1) or, in its own style with a sequence (0000_c1s1), a distractor."""
    return name.pid == JUNK or (name.pid == DISTRACTOR and name.seq != UNKNOWN)


def read_path(path, grouped):
    """Return the Name of an image from its POSIX path below a folder of people.

    grouped: the identity is that of the folder (FOLDER_RULE). Otherwise a file name with a sequence (0007_c2s1_...) gives it,
    then a folder, except a date or a clip, then any file name; and folders that could mean two things give neither. The camera
    of a folder comes before that of the name. Raises ReidError like `read_folders`.
    """
    parsed = parse_name(path.rpartition("/")[2]) or Name(UNKNOWN_PID, UNKNOWN)
    try:
        folder, camid = read_folders(path)
    except ReidError:
        if grouped:
            raise
        folder, camid = "", UNKNOWN
    pid = parsed.pid
    by_folder = grouped or pid == UNKNOWN_PID or (parsed.seq == UNKNOWN and not is_clip(folder))
    if folder and by_folder and not (reserved(parsed) and re.fullmatch(rf"0*{pid}", folder)):
        pid = folder_pid(folder)
    elif pid == DISTRACTOR and not reserved(parsed):
        pid = folder_pid("0")
    return parsed._replace(pid=pid, camid=parsed.camid if camid == UNKNOWN else camid)


def read_file(file, data_root):
    """Return the Name of a query image: in a split of the grouped dataset `data_root` by its folder, elsewhere by its name."""
    for absolute in (os.path.abspath, os.path.realpath):
        split, _, path = os.path.relpath(absolute(file), absolute(data_root)).replace(os.sep, "/").partition("/")
        if split != ".." and "/" in path:
            return read_path(path, True)
    return read_path(os.path.basename(file), False)


def identity_name(pid, path):
    """Name an identity: "" if unlabelled, its number, or the folder's name in `path` from which `folder_pid` derived it."""
    if pid < 1 << 61:
        return "" if pid == UNKNOWN_PID else str(pid)
    folders = [folder for folder in PurePath(path).parts[:-1] if folder_pid(folder) == pid]
    return folders[0] if folders else "0" if pid == folder_pid("0") else ""


def describe(path, name):
    """Return what was read from the path of an image, and from where, as text."""
    *folders, _ = path.split("/")
    identity = identity_name(name.pid, path)
    sources = ["folder" if any(folder_pid(folder) == name.pid or folder == identity for folder in folders) else "name",
               "folder" if any(folder_camera(folder) == name.camid for folder in folders) else "name"]
    return (f"{path}: " + (f"identity {identity} (from its {sources[0]})" if identity else "unlabelled")
            + ("" if name.camid == UNKNOWN else f", camera {name.camid} (from its {sources[1]})"))
