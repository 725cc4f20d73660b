"""data_prep.py --mot: boxes of a tracker become a folder of crops for each track."""

import os
import re
import struct
import sys

import pytest
from PIL import Image

from reid import ReidError
from reid.data.datasets import read_folder
from reid.data.mot import read_frames, read_mot

LINES = """1,7,10,20,30,60,0.9,-1,-1,-1
1,8,100.4,20,20,40,1
2,7,-5,20,30,60,0.9
2,-1,50,50,10,10,0.3
2,9,500,20,30,60,0.9
3,7,10,20,30,60,0
4,7,10,20,30,60,0.5
"""


@pytest.fixture
def video(tmp_path):
    """Two frames of 200 x 100 pixels: the first 200 red, the second green; and the boxes of a tracker."""
    (tmp_path / "cam2").mkdir()
    for number, colour in ((1, (200, 0, 0)), (2, (0, 200, 0))):
        Image.new("RGB", (200, 100), colour).save(tmp_path / f"cam2/frame_{number:06d}.png")
    (tmp_path / "det.txt").write_text(LINES)
    return tmp_path


def test_tracks_are_folders_of_crops_with_camera_and_frame(video, prep):
    status, out, err = prep("--mot", video / "det.txt", "--frames", video / "cam2", output=video / "tracks")
    assert (status, err) == (0, "")
    records = read_folder(video / "tracks")
    assert records.paths == ["track_c2_0007/200007_c2s1_000001_00.jpg", "track_c2_0007/200007_c2s1_000002_00.jpg",
                             "track_c2_0008/200008_c2s1_000001_01.jpg"]
    assert records.camids.tolist() == [2, 2, 2] and records.frames.tolist() == [1, 2, 1]
    assert records.pids.tolist() == [200007, 200007, 200008]
    sizes = [Image.open(file).size for file in records.files()]
    assert sizes == [(30, 60), (25, 60), (20, 40)]
    red, green, _ = Image.open(records.files()[1]).getpixel((5, 5))
    assert green > 190 and red < 10
    assert "5 files, 3 images taken, 2 left out" in out and "1 boxes outside of their frame: frame 2, track 9" in out
    assert "1 boxes of a frame that is not there: frame 4" in out and "2 tracks of 1 to 2 crops" in out
    status, _, err = prep("--mot", video / "det.txt", "--frames", video / "cam2", output=video / "tracks")
    assert status == 1 and "exists; choose another --output" in err


def write_video(path, colours):
    """A video with a frame of 200 x 100 pixels of each colour."""
    av = pytest.importorskip("av", reason="av is not installed: pip install -e '.[video]'")
    with av.open(path, "w") as video:
        stream = video.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 200, 100, "yuv420p"
        for colour in colours:
            video.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (200, 100), colour))))
        video.mux(stream.encode(None))


def test_a_video_is_read_by_the_numbers_of_its_frames(video, prep):
    write_video(video / "cam2.mp4", [(200, 0, 0), (0, 200, 0), (0, 0, 200)])
    status, out, err = prep("--mot", video / "det.txt", "--frames", video / "cam2.mp4", output=video / "tracks")
    assert (status, err) == (0, "")
    records = read_folder(video / "tracks")
    assert records.paths == ["track_c2_0007/200007_c2s1_000001_00.jpg", "track_c2_0007/200007_c2s1_000002_00.jpg",
                             "track_c2_0008/200008_c2s1_000001_01.jpg"]
    colours = [Image.open(file).getpixel((5, 5)) for file in records.files()]
    assert [max(range(3), key=colour.__getitem__) for colour in colours] == [0, 1, 0]  # red, green, red
    assert [Image.open(file).size for file in records.files()] == [(30, 60), (25, 60), (20, 40)]
    assert "1 boxes of a frame that is not there: frame 4" in out


def test_a_video_of_a_phone_is_upright(video):
    """Its frames lie on their side, and the matrix in the header of the track says so: here 90 degrees clockwise."""
    write_video(video / "clip.mp4", [(200, 0, 0)])
    content, identity = (video / "clip.mp4").read_bytes(), struct.pack(">4i", 1 << 16, 0, 0, 0)
    start = content.index(identity, content.index(b"tkhd"))
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 100 << 16, 0, 1 << 30)
    (video / "clip.mp4").write_bytes(content[:start] + turned + content[start + len(turned):])
    [(number, pixels)] = read_frames(video / "clip.mp4", {1}, {})
    assert (number, tuple(pixels.shape)) == (1, (3, 200, 100))


def test_what_is_no_video_is_one_clear_error(video, prep, monkeypatch):
    write_video(video / "cam2.mp4", [(200, 0, 0)] * 3)
    (video / "short.mp4").write_bytes((video / "cam2.mp4").read_bytes()[:200])
    for name in ("det.txt", "short.mp4"):
        status, _, err = prep("--mot", video / "det.txt", "--frames", video / name, output=video / "tracks")
        assert status == 1 and "is neither a folder nor a video that can be read (" in err and not (video / "tracks").exists()
    (video / "late.txt").write_text("9,7,10,20,30,60\n")
    status, _, err = prep("--mot", video / "late.txt", "--frames", video / "cam2.mp4", output=video / "tracks")
    assert status == 1 and "none of its frames is in" in err
    monkeypatch.setitem(sys.modules, "av", None)
    status, _, err = prep("--mot", video / "det.txt", "--frames", video / "cam2.mp4", output=video / "tracks")
    assert status == 1 and "pip install -e '.[video]'" in err


@pytest.mark.parametrize("text, reason", [
    ("1,7,10,20,30\n", "line 1: give frame, track id"), ("1,7,1,1,9,9\nx,7,1,1,9,9\n", "line 2: give frame"),
    ("1,7.5,1,1,9,9\n", "line 1"), ("1,7,nan,1,9,9\n", "line 1"), ("1,7,1,1,inf,9\n", "line 1"), ("1,999999,1,1,9,9\n", "line 1"),
    ("1,-1,1,1,9,9\n", "run a tracker"), ("", "run a tracker"), ("9,7,1,1,9,9\n", "none of its frames"),
    ("1,7,300,1,9,9\n", "not one box could be cut"),
])
def test_bad_boxes_are_one_clear_error(video, prep, text, reason):
    (video / "det.txt").write_text(text)
    status, _, err = prep("--mot", video / "det.txt", "--frames", video / "cam2", output=video / "tracks")
    assert status == 1 and reason in err and not (video / "tracks").exists()


def test_both_options_are_needed(video, prep):
    status, _, err = prep("--mot", video / "det.txt")
    assert status == 1 and "--mot needs --frames" in err
    status, _, err = prep("--frames", video / "cam2")
    assert status == 1 and "--frames needs --mot" in err
    status, _, err = prep("--mot", video / "det.txt", "--frames", video / "nowhere")
    assert status == 1 and "no such folder or video" in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes as on POSIX")
def test_a_pipe_is_no_video(video, prep):
    os.mkfifo(video / "cam2.mp4")
    status, _, err = prep("--mot", video / "det.txt", "--frames", video / "cam2.mp4")
    assert status == 1 and "is neither a file nor a folder" in err


@pytest.mark.parametrize("content", [
    b"\x00\x00\x00 ftypisom\xff\xfe", "1,7,1,1,9,9\n".encode("utf-16"), "1,7,1,1,9,9 \xe9".encode("latin-1"),
    b"1,7,1,1,9," + b"9" * 200_000], ids=["binary", "UTF-16", "Latin-1", "a long field"])
def test_what_is_no_text_of_boxes_is_one_clear_error(video, prep, content):
    (video / "det.txt").write_bytes(content)
    status, _, err = prep("--mot", video / "det.txt", "--frames", video / "cam2", output=video / "tracks")
    assert status == 1 and "det.txt: is no text of numbers separated by commas (" in err and err.count("\n") == 1
    assert not (video / "tracks").exists()


def test_a_damaged_video_is_one_clear_error(video, prep):
    colours = [(number * 12, 200 - number * 9, number * 5) for number in range(20)]
    write_video(video / "cam2.mp4", colours)
    content = bytearray((video / "cam2.mp4").read_bytes())
    start = len(content) // 3
    content[start:2 * start] = bytes(start)
    (video / "cam2.mp4").write_bytes(content)
    (video / "det.txt").write_text("".join(f"{number},7,10,20,30,60\n" for number in range(1, 21)))
    before = sorted(video.iterdir())
    status, _, err = prep("--mot", video / "det.txt", "--frames", video / "cam2.mp4", output=video / "tracks")
    assert status == 1 and re.search(r"cam2.mp4: is damaged after frame \d+; copy it again", err) and err.count("\n") == 1
    assert sorted(video.iterdir()) == before


def test_lines_without_a_track_are_left_out(video):
    assert {frame: len(found) for frame, found in read_mot(video / "det.txt").items()} == {1: 2, 2: 2, 4: 1}
    with pytest.raises(ReidError, match="no boxes"):
        (video / "empty.txt").write_text("\n\n")
        read_mot(video / "empty.txt")
