"""data_prep.py: archives, hostile ones among them, and kill -9 before every file system operation."""

import errno
import io
import os
import signal
import stat
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from forked import Script
from prep_lab import FORMATS, clean, expected, members, pack, refused, tree

import data_prep
from reid.data import archives, prepare

fcntl = pytest.importorskip("fcntl")

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


def test_the_command_line_itself(tmp_path):
    """The images of a folder are copied; a failure is one line and status 1."""
    folder = pack(tmp_path / "unpacked", members())
    command = ["data_prep.py", "--output", tmp_path / "out", "--archive"]
    Script(tmp_path, *command, folder, "--any_counts").works()
    assert tree(tmp_path / "out") == expected()
    assert (tmp_path / "out/query/0001/0001_c1s1_001051_00.jpg").stat().st_nlink == 1
    line = Script(tmp_path, *command, tmp_path / "nothing").fails()
    assert "holds" in line and "choose another --output" in line


def test_without_hard_links_it_copies(tmp_path, prep, monkeypatch):
    def link(source, target):
        raise OSError(errno.EXDEV, "another file system")
    monkeypatch.setattr(os, "link", link)
    assert prep("--archive", pack(tmp_path / "unpacked", members()), "--any_counts", "--link")[0] == 0
    assert tree(tmp_path / "out") == expected()


def test_counts_are_verified(tmp_path, prep):
    archive = pack(tmp_path / "m.zip", members())
    refused(prep("--archive", archive), "5 train", "1 val", "1 junk", "12,188 train", "3,819 junk", "--any_counts")
    clean(tmp_path)


def test_real_archive(shared, prep):
    status, stdout, _ = prep("--archive", shared / "market1501/Market-1501-v15.09.15.tar.xz")
    assert status == 0
    assert [line.split()[:4] for line in stdout.splitlines()[-4:]] == [
        ["train", "12,188", "751", "6"], ["val", "748", "748", "6"], ["query", "3,368", "750", "6"],
        ["gallery", "19,732", "750", "6"]]
    assert "3,819 junk, 2,798 distractors" in stdout


def test_a_second_run_changes_nothing(tmp_path, prep):
    archive = pack(tmp_path / "m.zip", members())
    _, first, _ = prep("--archive", archive, "--any_counts")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    status, second, _ = prep("--archive", archive, "--any_counts")
    assert status == 0 and "complete already" in second
    assert second.splitlines()[1:] == first.splitlines()[-6:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_an_existing_tree_is_never_mixed_or_overwritten(tmp_path, prep):
    out, archive = tmp_path / "out", pack(tmp_path / "m.zip", members())
    out.mkdir()
    assert prep("--archive", archive, "--any_counts")[0] == 0  # an empty folder is like none
    refused(prep("--synthetic"), "holds", "synthetic", "choose another --output")
    next((out / "train").rglob("*.jpg")).unlink()
    refused(prep("--archive", archive, "--any_counts"), "'train': 4", "'train': 5", "run again")
    (out / "prepared.json").unlink()
    refused(prep("--archive", archive, "--any_counts"), "did not make it")
    refused(prep("--archive", archive, output=archive / "x"), "Not a directory")


def test_two_runs_at_once(tmp_path, prep):
    archive, partial = pack(tmp_path / "m.zip", members()), tmp_path / "out.partial"
    partial.mkdir()
    other = os.open(partial, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    refused(prep("--archive", archive, "--any_counts"), "another data_prep.py")
    os.close(other)
    assert prep("--archive", archive, "--any_counts")[0] == 0


@pytest.mark.parametrize("link", [False, True])
def test_a_partial_folder_of_the_user_is_left_alone(tmp_path, prep, link):
    mine = tmp_path / ("elsewhere" if link else "out.partial")
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    if link:
        (tmp_path / "out.partial").symlink_to(mine)
    archive = pack(tmp_path / "m.zip", members())
    refused(prep("--archive", archive, "--any_counts"), "out.partial", "did not make it")
    assert (mine / "notes.txt").read_text() == "mine" and os.listdir(mine) == ["notes.txt"]
    assert not (tmp_path / "out").exists()


def test_a_partial_folder_of_a_killed_run_is_emptied(tmp_path, prep):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("mine")
    partial = tmp_path / "out.partial"
    (partial / "train" / "0002").mkdir(parents=True)
    (partial / prepare.MARK).touch()
    (partial / "train" / "link").symlink_to(tmp_path / "elsewhere")
    (partial / "link").symlink_to(tmp_path / "elsewhere")
    assert prep("--archive", pack(tmp_path / "m.zip", members()), "--any_counts")[0] == 0
    assert tree(tmp_path / "out") == expected() and not partial.exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gallery", "prepared.json", "query", "train", "val"]
    assert (tmp_path / "elsewhere" / "notes.txt").exists()


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
    opener = {".gz": archives.gzip.open, ".xz": archives.lzma.open}.get(Path(name).suffix, open)
    with opener(tmp_path / name, "wb") as file:
        file.write(BOMBS[name])
    refused(prep("--archive", tmp_path / name, "--any_counts"), name, "unpacks to far more")
    clean(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("name", ["m/query/0001_c1s1_000001_00.jpg", "m/readme.txt"])
def test_a_member_of_negative_size_ends(tmp_path, prep, kind, name):
    """tarfile would read such a member again and again (CVE-2025-8194)."""
    data = bytearray(tar_header(name, 0, kind))
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512, as GNU tar writes it
    data[148:156] = b"%06o\0 " % (256 + sum(data[:148]) + sum(data[156:512]))
    (tmp_path / "m.tar").write_bytes(tar_header("m/first.txt", 0) + bytes(data) + bytes(9 << 10))
    refused(prep("--archive", tmp_path / "m.tar", "--any_counts"), "m.tar")
    clean(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_many_small_zeros_fail_too(tmp_path, prep, kind, monkeypatch):
    monkeypatch.setattr(archives, "FREE_EXPANSION", 1 << 20)
    files = {f"m/query/{i:04d}_c1s1_000001_00.jpg": bytes(1 << 16) for i in range(1000)}
    written = []
    monkeypatch.setattr(prepare, "_place", lambda data, target, link: written.append(len(data)) or True)
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
    refused(prep("--archive", tmp_path / "missing.zip"), "missing.zip", "No such file")
    (tmp_path / "empty").mkdir()
    refused(prep("--archive", tmp_path / "empty"), "no image named like")
    clean(tmp_path)


# ---- Faults of this machine -----------------------------------------------------------------------------------------

def in_child(action, events):
    """Fork, run `action`, and kill -9 the child before its `events`-th file system operation. Returns whether it was killed."""
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
    """The tree is whole or absent at every moment, and a second run completes it."""
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
        if events % 2:  # killed once more, while it removes the remains
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
