"""data_prep.py: every source, hostile archives, a faulty server, kill -9 before every file system operation."""

import errno
import hashlib
import io
import os
import random
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import data_prep
from reid import prepare, run, sources

fcntl = pytest.importorskip("fcntl")

NAMES = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000551_01.jpg", "0002_c3s2_000776_01.jpg", "Thumbs.db",
                           "0007_c1s1_000100_01.jpg", "0007_c6s1_000200_02.jpg.jpg", "0009_c1s1_000300_01.jpg"],
    "query": ["0001_c1s1_001051_00.jpg", "1488_c2s3_065527_00.jpg.jpg", "Thumbs.db"],
    "bounding_box_test": ["0001_c2s1_001976_01.jpg", "1488_c1s6_023021_02.jpg.jpg", "-1_c1s1_000401_03.jpg",
                          "0000_c1s1_000151_01.jpg", "0000_c4s6_022316_04.jpg.jpg", "Thumbs.db"],
    "gt_bbox": ["0003_c1s1_000001_00.jpg"], "gt_query": ["0001_c1s1_001051_00_good.mat"], "": ["readme.txt"],
}
FORMATS = ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "folder")


def content(name, size=3000):
    return random.Random(name).randbytes(size)


def members(depth="Market-1501-v15.09.15"):
    return {"/".join(filter(None, (depth, folder, name))): content(f"{folder}/{name}") for folder, names in NAMES.items()
            for name in names}


def pack(path, files):
    """An archive (or folder) at `path` of {member name: bytes}; the format follows the suffix."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    elif ".tar" in path.name:
        with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def tree(root):
    """{relative path: bytes} of the images of a prepared tree."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for split in prepare.SPLITS
            for path in (root / split).rglob("*") if path.is_file()}


def expected():
    """The tree that the miniature archive must become, worked out here once more."""
    grouped = {}
    for folder, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        for name in NAMES[folder]:
            if name != "Thumbs.db":
                grouped[f"{split}/{name.split('_')[0]}/{name}"] = content(f"{folder}/{name}")
    for pid in ("0002", "0007"):  # 0009 has one image, which stays
        held = min((path for path in grouped if path.startswith(f"train/{pid}/")),
                   key=lambda path: hashlib.sha256(path.split("/")[-1].encode()).hexdigest())
        grouped[held.replace("train", "val", 1)] = grouped.pop(held)
    return grouped


@pytest.fixture
def prep(tmp_path, monkeypatch, capsys):
    """Run data_prep.py's command line in this process: returns (exit status, stdout, stderr). --output is added."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def call(*args, output=tmp_path / "out"):
        monkeypatch.setattr(sys, "argv", ["data_prep.py", *map(str, args), "--output", str(output)])
        with pytest.raises(SystemExit) as end:
            run(data_prep.get_args_parser(), data_prep.main)
        return end.value.code, *capsys.readouterr()
    return call


def refused(result, *words):
    status, _, stderr = result
    assert status == 1
    assert stderr.startswith("data_prep.py: error: ") and stderr.count("\n") == 1, stderr
    for word in words:
        assert word in stderr, stderr


def clean(tmp_path):
    """Nothing is left where a run has failed."""
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# ---- Archives -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("depth", ["", "a/b/Market-1501-v15.09.15", "./Market"])
def test_every_format_at_every_depth(tmp_path, prep, kind, depth):
    archive = pack(tmp_path / f"market.{kind}", members(depth))
    assert prep("--archive", archive, "--any_counts")[0] == 0
    assert tree(tmp_path / "out") == expected()


def test_table_counts_images_identities_and_cameras(tmp_path, prep):
    _, stdout, _ = prep("--archive", pack(tmp_path / "m.zip", members()), "--any_counts")
    rows = {line.split()[0]: line for line in stdout.splitlines()[-4:]}
    want = expected()
    for split in prepare.SPLITS:
        names = [path.split("/")[-1] for path in want if path.startswith(split)]
        people = {name.split("_")[0] for name in names} - {"-1", "0000"}
        cameras = {name.split("_c")[1][0] for name in names}
        assert rows[split].split()[1:4] == [str(len(names)), str(len(people)), str(len(cameras))]
    assert "1 junk, 2 distractors" in rows["gallery"]


def test_the_command_line_itself(tmp_path, root):
    """A folder is linked, not copied, where it can be; failure is one line and status 1."""
    folder = pack(tmp_path / "unpacked", members())
    command = [sys.executable, root / "data_prep.py", "--output", tmp_path / "out", "--archive"]
    done = subprocess.run([*command, folder, "--any_counts"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == expected()
    assert (tmp_path / "out/query/0001/0001_c1s1_001051_00.jpg").stat().st_nlink == 2
    done = subprocess.run([*command, tmp_path / "nothing"], capture_output=True, text=True)
    refused((done.returncode, done.stdout, done.stderr), "holds", "choose another --output")


def test_without_hard_links_it_copies(tmp_path, prep, monkeypatch):
    def link(source, target):
        raise OSError(errno.EXDEV, "another file system")
    monkeypatch.setattr(os, "link", link)
    assert prep("--archive", pack(tmp_path / "unpacked", members()), "--any_counts")[0] == 0
    assert tree(tmp_path / "out") == expected()


def test_counts_are_verified(tmp_path, prep):
    archive = pack(tmp_path / "m.zip", members())
    refused(prep("--archive", archive), "4 train", "2 val", "1 junk", "12,185 train", "3,819 junk", "--any_counts")
    clean(tmp_path)


def test_real_archive(shared, prep):
    status, stdout, _ = prep("--archive", shared / "market1501/Market-1501-v15.09.15.tar.xz")
    assert status == 0
    assert [line.split()[:4] for line in stdout.splitlines()[-4:]] == [
        ["train", "12,185", "751", "6"], ["val", "751", "751", "6"], ["query", "3,368", "750", "6"],
        ["gallery", "19,732", "750", "6"]]
    assert "3,819 junk, 2,798 distractors" in stdout


def test_a_second_run_touches_nothing(tmp_path, prep):
    archive = pack(tmp_path / "m.zip", members())
    _, first, _ = prep("--archive", archive, "--any_counts")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    status, second, _ = prep("--archive", archive, "--any_counts")
    assert status == 0 and "complete already" in second
    assert second.splitlines()[1:] == first.splitlines()[1:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_what_is_there_is_never_mixed_or_overwritten(tmp_path, prep):
    out, archive = tmp_path / "out", pack(tmp_path / "m.zip", members())
    out.mkdir()
    assert prep("--archive", archive, "--any_counts")[0] == 0  # an empty folder is as good as none
    refused(prep("--synthetic"), "holds", "synthetic", "choose another --output")
    next((out / "train").rglob("*.jpg")).unlink()
    refused(prep("--archive", archive, "--any_counts"), "'train': 3", "'train': 4", "run again")
    (out / "prepared.json").unlink()
    refused(prep("--archive", archive, "--any_counts"), "did not make it")
    refused(prep("--archive", archive, output=archive / "x"), "file is in the way")


def test_two_runs_at_once(tmp_path, prep):
    archive, partial = pack(tmp_path / "m.zip", members()), tmp_path / "out.partial"
    partial.mkdir()
    other = os.open(partial, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    refused(prep("--archive", archive, "--any_counts"), "another data_prep.py")
    os.close(other)
    assert prep("--archive", archive, "--any_counts")[0] == 0


def test_duplicates(tmp_path, prep):
    files = members("a") | members("b")  # everything twice, the same: once is enough
    assert prep("--archive", pack(tmp_path / "same.tar", files), "--any_counts")[0] == 0
    assert tree(tmp_path / "out") == expected()
    files["b/query/0001_c1s1_001051_00.jpg"] = b"another picture"
    refused(prep("--archive", pack(tmp_path / "other.tar", files), "--any_counts", output=tmp_path / "out2"),
            "0001_c1s1_001051_00.jpg", "twice")


# ---- Hostile archives -----------------------------------------------------------------------------------------------

GOOD = {"m/query/0001_c1s1_000001_00.jpg": b"good"}
EVIL = ["../../../evil/query/0003_c1s1_000001_00.jpg", "/tmp/evil/query/0004_c1s1_000001_00.jpg",
        "m/query/../../../../0005_c1s1_000001_00.jpg", "m/query/..", "m/query/.jpg", "C:\\evil\\query\\0006_c1s1_000001_00.jpg",
        "m/query/a/../0007_c1s1_000001_00.jpg", "m/query/0008_c1s1_000001_00.jpg/x.jpg", "m/query/con.jpg"]
INSIDE = {"query/0001/0001_c1s1_000001_00.jpg", "query/0003/0003_c1s1_000001_00.jpg", "query/0004/0004_c1s1_000001_00.jpg",
          "query/0006/0006_c1s1_000001_00.jpg"}  # a file name is all that is taken from a member's name


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_cannot_lead_outside(tmp_path, prep, kind):
    work = tmp_path / "a/b/c"
    work.mkdir(parents=True)
    archive = pack(work / f"evil.{kind}", GOOD | dict.fromkeys(EVIL, b"evil"))
    assert prep("--archive", archive, "--any_counts", output=work / "out")[0] == 0
    assert set(tree(work / "out")) == INSIDE
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and work / "out" not in path.parents]
    assert outside == [archive] and not Path("/tmp/evil").exists()


def test_only_regular_files_leave_an_archive(tmp_path, prep):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
        for i, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"m/query/000{i + 2}_c1s1_000001_00.jpg")
            member.type, member.linkname, member.devmajor, member.devminor = kind, str(secret), 1, 5
            archive.addfile(member)
        member = tarfile.TarInfo("m/query")  # a folder that is a link out, then a file in it
        member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(member)
        member = tarfile.TarInfo(next(iter(GOOD)))
        member.size = 4
        archive.addfile(member, io.BytesIO(b"good"))
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        link = zipfile.ZipInfo("m/query/0002_c1s1_000001_00.jpg")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(secret))
        archive.writestr(*next(iter(GOOD.items())))
    for name in ("evil.tar", "evil.zip"):
        assert prep("--archive", tmp_path / name, "--any_counts", output=tmp_path / f"{name}-out")[0] == 0
        assert tree(tmp_path / f"{name}-out") == {"query/0001/0001_c1s1_000001_00.jpg": b"good"}


def tar_header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


BOMBS = {  # ten gigabytes of zeros, announced: as an image, as a file to be skipped, as headers
    "image.tar.gz": tar_header("m/query/0001_c1s1_000001_00.jpg", 10 << 30) + bytes(9 << 20),
    "skipped.tar.xz": tar_header("m/readme.txt", 10 << 30) + bytes(9 << 20),
    "header.tar.gz": tar_header("pax", 10 << 30, tarfile.XHDTYPE) + bytes(9 << 20),
    "longname.tar": tar_header("name", 10 << 30, tarfile.GNUTYPE_LONGNAME) + bytes(9 << 20),
}


@pytest.mark.parametrize("name", BOMBS)
def test_gigabytes_of_zeros_fail_early(tmp_path, prep, name):
    opener = {".gz": sources.gzip.open, ".xz": sources.lzma.open}.get(Path(name).suffix, open)
    with opener(tmp_path / name, "wb") as file:
        file.write(BOMBS[name])
    refused(prep("--archive", tmp_path / name, "--any_counts"), name, "unpacks to far more")
    clean(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_many_small_zeros_fail_too(tmp_path, prep, kind, monkeypatch):
    monkeypatch.setattr(sources, "FREE_EXPANSION", 1 << 20)
    files = {f"m/query/{i:04d}_c1s1_000001_00.jpg": bytes(1 << 16) for i in range(1000)}
    written = []
    monkeypatch.setattr(prepare, "_place", lambda data, target: written.append(len(data)))
    refused(prep("--archive", pack(tmp_path / f"m.{kind}", files), "--any_counts"), "unpacks to far more")
    assert sum(written) < 10 << 20


def test_encrypted_zip(tmp_path, prep):
    data = bytearray(pack(tmp_path / "m.zip", GOOD).read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "m.zip").write_bytes(data)
    refused(prep("--archive", tmp_path / "m.zip", "--any_counts"), "encrypted")
    clean(tmp_path)


@pytest.mark.parametrize("kind", FORMATS[:-1])
def test_truncated_and_damaged_archives(tmp_path, prep, kind):
    whole = pack(tmp_path / f"m.{kind}", members()).read_bytes()
    cuts = [whole[: len(whole) * part // 7] for part in range(7)]
    if kind == "tar":  # exactly before a header
        cuts.append(whole[:4 * (512 + 3072)])
        bad = bytearray(whole)
        bad[512 + 3072 + 5] ^= 1  # in a header: tarfile alone would take this for the end
        cuts.append(bytes(bad))
    else:
        bad = bytearray(whole)
        bad[len(bad) // 3] ^= 0x10
        cuts.append(bytes(bad))
    for data in cuts:
        (tmp_path / "cut").write_bytes(data)
        refused(prep("--archive", tmp_path / "cut", "--any_counts"))
        clean(tmp_path)


@pytest.mark.parametrize("data", [b"", b"hello", b"<!doctype html><html>sign in</html>" * 99, bytes(4096), b"PK\x03\x04junk"])
def test_what_is_no_archive(tmp_path, prep, data):
    (tmp_path / "file.zip").write_bytes(data)
    refused(prep("--archive", tmp_path / "file.zip"), "file.zip")
    refused(prep("--archive", tmp_path / "missing.zip"), "missing.zip", "no such file")
    (tmp_path / "empty").mkdir()
    refused(prep("--archive", tmp_path / "empty"), "no image named like")
    clean(tmp_path)


# ---- Faults of this machine -----------------------------------------------------------------------------------------

def in_child(action, events):
    """Fork, run `action`, and kill -9 the child before its `events`-th file system operation. True: it was killed."""
    if not (pid := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        seen = [0]

        def hook(event, args):
            if event in ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"):
                seen[0] += 1
                if seen[0] == events:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_killed_before_every_operation(tmp_path):
    """The tree is whole or absent at every moment, and a plain re-run equals the undisturbed one."""
    archive = pack(tmp_path / "m.tar.gz", members())
    parser = data_prep.get_args_parser()
    killed = 0
    for events in range(1, 200):
        out = tmp_path / f"out{events}"
        args = parser.parse_args(["--archive", str(archive), "--any_counts", "--output", str(out)])
        died = in_child(lambda args=args: data_prep.main(args), events)
        killed += died
        if out.exists():
            assert tree(out) == expected()
        if not died:
            break
        if events % 2:  # killed once more, while it clears up
            in_child(lambda args=args: data_prep.main(args), 3)
        data_prep.main(args)
        assert tree(out) == expected() and not out.with_name(f"{out.name}.partial").exists()
    assert killed > 25 and not died


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_full_disk_and_read_only(tmp_path, prep, monkeypatch, code):
    def write(self, data):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(Path, "write_bytes", write)
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr(*next(iter(GOOD.items())))
    refused(prep("--archive", tmp_path / "m.zip", "--any_counts"), os.strerror(code))
    clean(tmp_path)


# ---- Download -------------------------------------------------------------------------------------------------------

@contextmanager
def server(data, script):
    """A web server that serves `data` and misbehaves as the `script` says, a word per request; then it is good.

    Yields (url, list of the requests' Range headers).
    """
    ranges = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, code, body, length=None, **headers):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def do_GET(self):
            asked = self.headers.get("Range")
            ranges.append(asked)
            word = script.pop(0) if script else "good"
            start = int(asked[6:-1]) if asked else 0
            part, span = data[start:], f"bytes {start}-{len(data) - 1}/{len(data)}"
            if word.isdecimal():
                self.answer(int(word), b"busy", Retry_After="7" if word == "429" else "soon")
            elif word == "html":
                self.answer(200, b"<html>Sign in</html>", Content_Type="text/html; charset=utf-8")
            elif word == "sneaky html":
                self.answer(200, b"<html>Sign in</html>" * 200, Content_Type="application/zip")
            elif word == "other file":
                self.answer(416, b"", Content_Range="bytes */17")
            elif word == "wrong range":
                self.answer(206, data, Content_Range=f"bytes 0-{len(data) - 1}/{len(data)}")
            elif word == "piece":
                end = start + len(part) // 2
                self.answer(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}")
            elif word == "no ranges":
                self.answer(200, data)
            elif word == "cut, no ranges":
                self.answer(200, data[: len(data) // 2], len(data))
            elif word == "claims too little":
                self.answer(200, data, len(data) // 2)
            elif word == "claims too much":
                self.answer(200, data, len(data) + 1000)
            elif word == "wrong bytes":
                self.answer(200, bytes(len(data)))
            elif word == "hang":
                self.answer(200, data[: len(data) // 2], len(data))
                time.sleep(30)
            elif start >= len(data):
                self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
            else:
                code, headers = (206, {"Content_Range": span}) if asked else (200, {})
                self.answer(code, part[: len(part) // 2] if word == "cut" else part, len(part), **headers)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads, http.block_on_close = True, False
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/market", ranges
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture(scope="module")
def big_zip(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("zip") / "m.zip", members() | {"readme": content("readme", 300_000)}).read_bytes()


@pytest.fixture
def naps(monkeypatch):
    slept = []
    monkeypatch.setattr("reid.download.time", SimpleNamespace(sleep=slept.append))
    return slept


@pytest.mark.parametrize("script", [
    [], ["cut"], ["cut"] * 4, ["500"], ["429"], ["503", "cut", "500", "cut"], ["cut", "no ranges"], ["cut", "other file"],
    ["cut", "wrong range"], ["cut", "piece", "piece"], ["cut, no ranges", "cut, no ranges", "no ranges"], ["claims too much"],
    ["cut", "wrong range", "cut", "429"]], ids=",".join)
def test_download_survives(tmp_path, prep, naps, big_zip, script):
    with server(big_zip, list(script)) as (url, ranges):
        status, _, stderr = prep("--url", url, "--any_counts")
    assert status == 0, stderr
    assert tree(tmp_path / "out") == expected()
    assert next(tmp_path.glob("download-*")).read_bytes() == big_zip
    assert len(naps) == len([word for word in script if word != "no ranges"])  # no fault costs a second request
    if script[:1] == ["cut"]:  # what was there is asked for only once
        assert ranges[0] is None and 0 < int(ranges[1][6:-1]) <= len(big_zip) // 2
    if script == ["429"]:
        assert naps == [7]
    if script == ["500"]:
        assert naps == [2]


@pytest.mark.parametrize("script, words", [
    (["404"], ["404", "--archive"]), (["403"], ["403"]), (["html"], ["web page"]), (["500"] * 6, ["6 times", "500", "run again"]),
    (["sneaky html"], ["cannot be unpacked"]), (["wrong bytes"], ["no image named like"]),
    (["claims too little"], ["cannot be unpacked"]), (["cut", "cut", "404"], ["404"]), (["cut", "html"], ["web page"])],
    ids=lambda value: ",".join(value))
def test_download_fails_with_one_line_and_recovers(tmp_path, prep, naps, big_zip, script, words):
    script = list(script)
    with server(big_zip, script) as (url, ranges):
        refused(prep("--url", url, "--any_counts"), *words)
        clean(tmp_path)
        before = len(ranges)
        assert prep("--url", url, "--any_counts")[0] == 0
    assert tree(tmp_path / "out") == expected()
    if before > 1 and "500" not in words:  # the second run went on where the first had stopped
        assert ranges[before] is not None


def test_back_off_grows_and_progress_resets_it(tmp_path, prep, naps, big_zip):
    with server(big_zip, ["500", "500", "500", "cut", "500", "500"]) as (url, _):
        assert prep("--url", url, "--any_counts")[0] == 0
    assert naps == [2, 4, 8, 1, 2, 4]


def test_download_killed_and_run_again(tmp_path, prep, naps, big_zip):
    args = data_prep.get_args_parser().parse_args(["--any_counts", "--output", str(tmp_path / "out")])
    with server(big_zip, ["hang"]) as (args.url, ranges):
        if not (pid := os.fork()):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                data_prep.main(args)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 20
        while not any(part.stat().st_size > 50_000 for part in tmp_path.glob("*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        part = next(tmp_path.glob("*.part"))
        have = part.stat().st_size
        assert part.read_bytes() == big_zip[:have]
        assert prep("--url", args.url, "--any_counts")[0] == 0
    assert ranges == [None, f"bytes={have}-"]
    assert tree(tmp_path / "out") == expected() and not list(tmp_path.glob("*.part"))


def test_no_server_and_no_address(tmp_path, prep, naps):
    refused(prep("--url", "http://127.0.0.1:9/x"), "6 times", "--archive")
    refused(prep("--url", "nonsense"), "nonsense")


def test_passwords_are_not_shown_and_endless_answers_end(tmp_path, prep, naps, big_zip, monkeypatch):
    with server(big_zip, []) as (url, _):
        url = url.replace("//", "//user:secret@")
        with monkeypatch.context() as patch:
            patch.setattr("reid.download.MAX_SIZE", 100_000)
            told = prep("--url", url, "--any_counts")
        refused(told, "more than 0 GB")
        assert not any(part.stat().st_size for part in tmp_path.glob("*.part"))
        told += prep("--url", url, "--any_counts")
    assert told[3] == 0 and tree(tmp_path / "out") == expected()
    assert "secret" not in f"{told} {(tmp_path / 'out' / prepare.STAMP).read_text()}"


# ---- Folder per identity --------------------------------------------------------------------------------------------

def make_tree(folder, people):
    for person, names in people.items():
        for name in names:
            (folder / person).mkdir(parents=True, exist_ok=True)
            (folder / person / name).write_bytes(f"{person}/{name}".encode())
    return folder


def test_from_a_tree_without_cameras(tmp_path, prep):
    people = {f"Person {i} ä": [f"IMG {j}.png" for j in range(i % 4 + 1)] for i in range(40)}
    folder = make_tree(tmp_path / "mine", people | {"-1": ["x.jpg", "y.jpg"], "0": ["z.jpg"]})
    (folder / "notes.txt").write_text("no image")
    (folder / "Person 1 ä" / "gone.jpg").symlink_to("nowhere")
    status, stdout, _ = prep("--from", folder, "--train_share", "0.5")
    assert status == 0 and "rule: " in stdout
    split = {name: set(os.listdir(tmp_path / "out" / name)) for name in prepare.SPLITS}
    assert len(split["train"]) == 20 and not split["train"] & (split["query"] | split["gallery"])
    assert {"-1", "0"} <= split["gallery"] and not {"-1", "0"} & (split["query"] | split["train"])
    for person in split["query"]:
        assert len(os.listdir(tmp_path / "out/query" / person)) == 1 and len(people[person]) > 1
        assert len(os.listdir(tmp_path / "out/gallery" / person)) == len(people[person]) - 1
    assert {p for p in people if p not in split["train"] and len(people[p]) > 1} == split["query"]
    images = tree(tmp_path / "out")
    assert len(images) == sum(map(len, people.values())) + 3
    assert all(data == path.split("/", 1)[1].encode() for path, data in images.items())  # names are kept


def test_every_query_of_a_tree_has_a_match(tmp_path):
    """Random trees: a query's gallery has its identity under another camera, or one of the two has none."""
    rng = random.Random(0)
    for trial in range(25):
        people = {}
        for pid in range(1, 13):
            names = [f"{pid:04d}_c{rng.randint(1, rng.choice([1, 2, 4]))}_{i}.jpg" for i in range(rng.randint(1, 6))]
            people[f"{pid:04d}"] = names + [f"phone {i}.jpg" for i in range(rng.choice([0, 0, 1, 2]))]
        folder = make_tree(tmp_path / str(trial), people)
        images = [(split, pid, sources.parse_name(name)) for split, pid, name, _ in sources.from_tree(folder, 0.25)]
        assert len(images) == sum(map(len, people.values()))
        assert len({pid for split, pid, _ in images if split == "train"}) == 3
        cameras = [(split, pid, name.camid if name else None) for split, pid, name in images]
        queries = [row for row in cameras if row[0] == "query"]
        for _, pid, camera in queries:
            others = [c for split, p, c in cameras if split == "gallery" and p == pid]
            assert any(c is None or camera is None or c != camera for c in others), (people[pid], pid)
        matchable = {p for split, p, c in cameras if split != "train" and any(
            q == p and (c is None or d is None or c != d) for s, q, d in cameras if s != "train")}
        seen_once = {p for p in people if len(people[p]) == 1}
        assert {pid for _, pid, _ in queries} == matchable - seen_once


def test_a_csv_tells_cameras_and_times(tmp_path, prep):
    folder = make_tree(tmp_path / "mine", {"anna": ["a.jpg", "b.png", "c.jpg"], "7": ["a.jpg"], "-1": ["junk.jpg"]})
    times = tmp_path / "times.csv"
    times.write_text("camera,path,time,note\n3,anna/a.jpg,2026-03-01T12:00:05,x\n4,anna/b.png,2026-03-01T12:01:05.2,\n"
                     "3,anna/c.jpg,2026-03-01T12:00:00,\n0,7/a.jpg,2026-03-01T12:00:01,\n3,-1/junk.jpg,2026-03-01T12:00:09,\n")
    status, _, stderr = prep("--from", folder, "--train_share", "0", "--times", times)
    assert status == 0, stderr
    found = {data: sources.parse_name(path.rpartition("/")[2]) for path, data in tree(tmp_path / "out").items()}
    assert {data: (name.camid, name.seq, name.frame) for data, name in found.items()} == {
        b"anna/a.jpg": (3, 1, 125), b"anna/b.png": (4, 1, 1630), b"anna/c.jpg": (3, 1, 0), b"7/a.jpg": (0, 1, 25),
        b"-1/junk.jpg": (3, 1, 225)}
    assert found[b"7/a.jpg"].pid == 7 and found[b"-1/junk.jpg"].pid == -1
    queries = [path for path in tree(tmp_path / "out") if path.startswith("query/")]
    assert len(queries) == 1 and "_c3s1_" in queries[0]  # the camera with two images: the CSV chooses, not the names


@pytest.mark.parametrize("text, told", [
    ("path,camera\na/x.jpg,1\n", "no column time"),
    ("path,camera,time\na/x.jpg,one,3\n", "line 2"),
    ("path,camera,time\na/x.jpg,1,noon\n", "line 2"),
    ("path,camera,time\na/x.jpg,1,nan\n", "line 2"),
    ("path,camera,time\na/x.jpg,1\n", "line 2"),
    ("path,camera,time\na/x.jpg,1,2\na/x.jpg,1,3\n", "second time"),
    ("path,camera,time\na/z.jpg,1,2\n", "no line for a/x.jpg"),
    ("path,camera,time\na/x.jpg,1,2\nb/z.jpg,1,2\n", "b/z.jpg"),
    ("\0\0", "times.csv"),
])
def test_a_wrong_csv_is_one_line(tmp_path, prep, text, told):
    folder = make_tree(tmp_path / "mine", {"a": ["x.jpg"]})
    (tmp_path / "times.csv").write_text(text)
    refused(prep("--from", folder, "--times", tmp_path / "times.csv"), "times.csv", told)
    clean(tmp_path)


def test_trees_that_are_ambiguous_are_refused(tmp_path, prep):
    refused(prep("--from", tmp_path / "nothing"), "no such folder")
    (tmp_path / "empty").mkdir()
    refused(prep("--from", tmp_path / "empty"), "no images in sub-folders")
    refused(prep("--from", make_tree(tmp_path / "twice", {"a/cam1": ["x.jpg"], "b/cam1": ["y.jpg"]})), "a/cam1", "b/cam1")
    refused(prep("--from", make_tree(tmp_path / "same", {"7": ["x.jpg"], "007": ["y.jpg"]})), "same identity")
    refused(prep("--from", pack(tmp_path / "market", members())), "--archive")
    refused(prep("--from", tmp_path, "--train_share", "2"), "--train_share")
    refused(prep("--synthetic", "--times", tmp_path / "times.csv"), "--times")
    clean(tmp_path)


def test_synthetic_command_line(tmp_path, root):
    command = [sys.executable, root / "data_prep.py", "--synthetic", "--num_ids", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(tmp_path)) == {"data"} and os.listdir(tmp_path / "data") == ["synthetic"]
    assert done.stdout.splitlines()[-4].split()[0] == "train"
