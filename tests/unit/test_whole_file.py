# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that are there as a whole or not at all: on a full disk, killed at any moment, beside planted names."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guard import whole_file
from guard.whole_file import Begun

OLD, NEW = b"old" * 40000, b"new" * 50000


@pytest.fixture(params=[0o000, 0o022, 0o777], ids=oct)
def any_umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("any_umask")
def test_only_the_user_may_read_it_whatever_the_umask(tmp_path: Path) -> None:
    whole_file.write(str(tmp_path / "file"), NEW)
    (tmp_path / "open").touch(0o666)
    whole_file.write(str(tmp_path / "open"), NEW)
    for name in ("file", "open"):
        assert (tmp_path / name).stat().st_mode & 0o7777 == 0o600
        assert (tmp_path / name).read_bytes() == NEW


def test_file_and_folder_are_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(fd: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def renamed(a: str, b: str) -> None:
        done.append("rename")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    whole_file.replace(str(tmp_path / "file"), NEW)
    assert done == ["file", "folder", "rename", "folder"]


def test_full_disk_leaves_what_was_there_and_nothing_beside_it(small_disk: Path) -> None:
    (small_disk / "old").write_bytes(b"old")
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space left on device") as told:
            whole_file.write(str(small_disk / name), NEW)
        assert told.value.filename == str(small_disk / name)
    assert os.listdir(small_disk) == ["old"]
    assert (small_disk / "old").read_bytes() == b"old"


WRITE_ON_AND_ON = """
import sys
from guard import whole_file
print(flush=True)
while True:
    whole_file.replace(sys.argv[1], b"old" * 40000)
    whole_file.replace(sys.argv[1], b"new" * 50000)
"""


def test_writer_that_is_killed_at_any_moment_leaves_a_whole_file_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    left = 0
    for number in range(25):
        writer = subprocess.Popen([sys.executable, "-c", WRITE_ON_AND_ON, path], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(number / 2000)
        writer.kill()
        writer.communicate(timeout=20)
        assert path.read_bytes() in (OLD, NEW)
        left += len(os.listdir(tmp_path)) - 1
        assert len(os.listdir(tmp_path)) <= 2
    assert left, "no writer was killed while it wrote"
    whole_file.replace(str(path), NEW)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == NEW


def test_many_writers_at_once_leave_one_whole_file_of_one_of_them(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    pieces = [bytes([n]) * 100000 for n in range(8)]
    failed: list[BaseException] = []

    def write(data: bytes) -> None:
        try:
            for _ in range(10):
                whole_file.replace(path, data)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=write, args=(piece,)) for piece in pieces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failed == []
    assert os.listdir(tmp_path) == ["file"]
    assert Path(path).read_bytes() in pieces


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
def test_what_was_planted_beside_is_neither_followed_nor_removed(kind: str, tmp_path: Path) -> None:
    planted, victim = tmp_path / "file.new1", tmp_path / "victim"
    if kind == "fifo":
        os.mkfifo(planted)
    elif kind == "folder":
        planted.mkdir()
    else:
        planted.symlink_to(victim)
        if kind == "link":
            victim.write_bytes(b"precious")
    before = planted.lstat()
    with pytest.raises(FileExistsError, match="is no regular file: neither written to nor removed"):
        Begun(str(planted))
    whole_file.write(str(tmp_path / "file"), NEW)
    assert (tmp_path / "file").read_bytes() == NEW
    assert planted.lstat() == before
    assert not victim.exists() or victim.read_bytes() == b"precious"


def test_hard_link_that_was_planted_beside_loses_its_name_and_not_its_bytes(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    os.link(victim, tmp_path / "file.new1")
    whole_file.write(str(tmp_path / "file"), NEW)
    assert sorted(os.listdir(tmp_path)) == ["file", "victim"]
    assert victim.read_bytes() == b"precious"


def test_file_of_a_writer_that_lives_is_not_taken_for_left_over(tmp_path: Path) -> None:
    first = Begun(str(tmp_path / "beside"))
    with pytest.raises(FileExistsError, match="another process is writing it"):
        Begun(str(tmp_path / "beside"))
    first.put(str(tmp_path / "file"))
    first.close()
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_existing_name_is_kept_unless_it_may_be_overwritten(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    path = str(tmp_path / "file")
    for round in range(2):
        begun = Begun(str(tmp_path / "beside"))
        os.write(begun.fd, b"%d" % round)
        if round:
            with pytest.raises(FileExistsError) as told:
                begun.put(path, overwrite=False)
            assert told.value.filename == path
        else:
            begun.put(path, overwrite=False)
            assert os.listdir(tmp_path) == ["file"]
        begun.close()
    assert Path(path).read_bytes() == b"0"


def test_link_to_a_file_stays_and_the_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    for data in (OLD, NEW):
        whole_file.write(str(tmp_path / "link"), data)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == data


def test_device_and_pipe_are_written_to(tmp_path: Path) -> None:
    whole_file.write("/dev/null", NEW)
    os.mkfifo(tmp_path / "fifo")
    reader = subprocess.Popen(["cat", tmp_path / "fifo"], stdout=subprocess.PIPE)
    whole_file.write(str(tmp_path / "fifo"), NEW)
    assert reader.communicate(timeout=20)[0] == NEW
    assert os.listdir(tmp_path) == ["fifo"]
    with pytest.raises(OSError, match="No space left on device") as told:
        whole_file.write("/dev/full", NEW)
    assert told.value.filename == "/dev/full"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(
    "path", ["/dev/fd/{}", "/proc/self/fd/{}", "/proc/{pid}/fd/{}", "/proc/thread-self/fd/{}", "link"]
)
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_descriptor_of_the_process_is_written_on_with(
    path: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    read, fd = os.pipe() if to == "pipe" else (-1, os.open("file", os.O_WRONLY | os.O_CREAT))
    os.write(fd, b"before ")
    name = path.format(fd, pid=os.getpid())
    if path == "link":
        os.symlink(f"/dev/fd/{fd}", name)
    whole_file.write(name, b"and after")
    os.close(fd)
    if to == "pipe":
        assert os.read(read, 100) == b"before and after"
        os.close(read)
    else:
        assert Path("file").read_bytes() == b"before and after"
    assert sorted(os.listdir()) == sorted({*(["file"] if to == "file" else []), *(["link"] if path == "link" else [])})


def test_signal_that_ends_the_writer_in_python_leaves_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        whole_file.replace(str(tmp_path / "file"), NEW)
    assert os.listdir(tmp_path) == []
