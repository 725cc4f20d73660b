"""From a tracker's text file (MOTChallenge) and a video, or a folder of its frames, to a folder of crops for each track."""

import csv
import io
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reid import ReidError
from reid.cli import first_line
from reid.data.datasets import list_files
from reid.data.names import folder_camera
from reid.images import decode

TRACKS = 100_000  # track ids of one camera; the identity in a name is camera * TRACKS + track


def read_mot(file):
    """Return {frame: [(track, (x1, y1, x2, y2) in pixels)]} of lines `frame, track, left, top, width, height, ...`.

    Lines with a track of -1 (no track) or a seventh value of 0 (to be ignored) are left out. Raises ReidError for other lines.
    """
    boxes = {}
    try:
        rows = list(csv.reader(Path(file).read_text("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ReidError(f"{file}: is no text of numbers separated by commas ({first_line(error)}); give the boxes as UTF-8 text, "
                        "and the video as --frames") from error
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        try:
            frame, track, left, top, width, height, *rest = map(float, row)
            if not (frame.is_integer() and track.is_integer() and -1 <= track < TRACKS and frame >= 0):
                raise ValueError
            box = tuple(map(round, (left, top, left + width, top + height)))
        except (ValueError, OverflowError):
            raise ReidError(f"{file}, line {number}: give frame, track id (0 to {TRACKS - 1:,}), left, top, width, height, "
                            "separated by commas, the box in pixels") from None
        if track >= 0 and not (rest and rest[0] == 0):
            boxes.setdefault(int(frame), []).append((int(track), box))
    if not boxes:
        raise ReidError(f"{file}: no boxes with a track id; run a tracker on the detections first")
    return boxes


def read_frames(source, numbers, left_out):
    """Yield (number, pixels uint8 [3, h, w]) of the frames `numbers` of a video or of a folder of images, in their order.

    The frames of a video are numbered from 1, the images by the end of their names. Pixels are None where an image cannot be
    read. left_out: as of `cut_tracks`. Raises ReidError for a video that cannot be read.
    """
    if source.is_dir():
        images, others = list_files(source, regular=True)
        left_out.update(others)
        numbered = {int(match[1]): path for path in images if (match := re.search(r"(\d{1,15})\.\w+$", path, re.ASCII))}
        for number in sorted(numbers & numbered.keys()):
            pixels = None
            with suppress(ReidError):
                pixels = decode(source / numbered[number])
            yield number, pixels
        return
    try:
        import av
    except ImportError as error:
        raise ReidError(f"--frames {source}: a video needs av: pip install -e '.[video]'") from error
    number = 0
    try:
        with av.open(source) as video:
            for number, frame in enumerate(video.decode(video=0), 1):
                if number in numbers:
                    upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # phones only mark the turn
                    yield number, torch.from_numpy(upright.copy()).permute(2, 0, 1)
                if number >= max(numbers):
                    return
    except (av.FFmpegError, IndexError) as error:  # IndexError: a file of sound only
        if number:
            raise ReidError(f"--frames {source}: is damaged after frame {number:,}; copy it again "
                            f"({first_line(error)})") from error
        raise ReidError(f"--frames {source}: is neither a folder nor a video that can be read ({first_line(error)})") from error


def cut_tracks(file, frames, left_out):
    """Yield (folder, name, JPEG bytes) of every box: track_c1_0007/100007_c1s1_000451_00.jpg is track 7 in frame 451 of camera 1.

    frames: a video or a folder, as of `read_frames`; named like a camera (cam2, cam2.mp4), it gives the camera, else that is 1.
    left_out: {reason: files}, a defaultdict, for frames that cannot be read and boxes outside of their frame.
    """
    boxes, frames = read_mot(file), Path(frames)
    if not frames.exists():
        raise ReidError(f"--frames {frames}: no such folder or video")
    camera = folder_camera(frames.resolve().name if frames.is_dir() else frames.stem) or 1
    missing = dict(boxes)
    for frame, pixels in read_frames(frames, boxes.keys(), left_out):
        found = missing.pop(frame)
        if pixels is None:
            left_out["boxes of a frame that cannot be read"] += [f"frame {frame}"] * len(found)
            continue
        height, width = pixels.shape[1:]
        for place, (track, (x1, y1, x2, y2)) in enumerate(found):
            x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
            if x1 >= x2 or y1 >= y2:
                left_out["boxes outside of their frame"].append(f"frame {frame}, track {track}")
                continue
            out = io.BytesIO()
            Image.fromarray(pixels[:, y1:y2, x1:x2].permute(1, 2, 0).contiguous().numpy()).save(out, "JPEG", quality=95)
            pid = camera * TRACKS + track
            yield f"track_c{camera}_{track:04d}", f"{pid}_c{camera}s1_{frame:06d}_{place:02d}.jpg", out.getvalue()
    if len(missing) == len(boxes):
        raise ReidError(f"{file}: none of its frames is in {frames}; a video has them from 1, images by their names, "
                        f"such as {min(boxes):06d}.jpg")
    for frame, found in sorted(missing.items()):
        left_out["boxes of a frame that is not there"] += [f"frame {frame}"] * len(found)
