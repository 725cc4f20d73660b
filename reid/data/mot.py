"""From a tracker's text file (MOTChallenge) and a folder of frames to a folder of crops for each track."""

import csv
import io
import re
from pathlib import Path

from PIL import Image

from reid import ReidError
from reid.data.datasets import list_files
from reid.data.names import folder_camera
from reid.images import decode

TRACKS = 100_000  # track ids of one camera; the identity in a name is camera * TRACKS + track


def read_mot(file):
    """Return {frame: [(track, (x1, y1, x2, y2) in pixels)]} of lines `frame, track, left, top, width, height, ...`.

    Lines with a track of -1 (no track) or a seventh value of 0 (to be ignored) are left out. Raises ReidError for other lines.
    """
    boxes = {}
    for number, row in enumerate(csv.reader(Path(file).read_text("utf-8-sig").splitlines()), 1):
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


def cut_tracks(file, frames, left_out):
    """Yield (folder, name, JPEG bytes) of every box: track_c1_0007/100007_c1s1_000451_00.jpg is track 7 in frame 451 of camera 1.

    frames: a folder of images whose names end in the number of the frame; named like a camera (cam2), it gives the camera,
    else that is 1. left_out: {reason: files}, a defaultdict, for frames that cannot be read and boxes outside of their frame.
    """
    boxes, frames = read_mot(file), Path(frames)
    if not frames.is_dir():
        raise ReidError(f"--frames {frames}: no such folder; frames of a video: ffmpeg -i video.mp4 {frames}/%06d.jpg")
    camera = folder_camera(frames.resolve().name) or 1
    images, others = list_files(frames, regular=True)
    left_out.update(others)
    numbered = {int(match[1]): path for path in images if (match := re.search(r"(\d{1,15})\.\w+$", path, re.ASCII))}
    if not boxes.keys() & numbered.keys():
        raise ReidError(f"{file}: none of its frames is in {frames}; name them by their numbers, such as {min(boxes):06d}.jpg")
    for frame, found in sorted(boxes.items()):
        if frame not in numbered:
            left_out["boxes of a frame that is not there"] += [f"frame {frame}"] * len(found)
            continue
        try:
            pixels = decode(frames / numbered[frame])
        except ReidError:
            left_out["boxes of a frame that cannot be read"] += [numbered[frame]] * len(found)
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
