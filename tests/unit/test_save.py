# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copying a vmcore out: the bytes, the holes, the progress, and every way that an output can fail."""

from __future__ import annotations

import io
import os
import random
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from capture import save as save_module
from capture.save import CHUNK, Progress, copy, save
from capture.vmcore import Vmcore
from guard.errors import Error
from guard.ranges import RangeSet
from tests.unit.conftest import MakeVmcore

PAGE = 4096


def patchy(pages: int) -> bytes:
    """Pages with something in them, pages that are zeros, and pages with a single byte at one end."""
    rng = random.Random(4)
    kinds = [
        lambda: rng.randbytes(PAGE),
        lambda: bytes(PAGE),
        lambda: bytes(PAGE - 1) + b"x",
        lambda: b"x" + bytes(PAGE - 1),
    ]
    return b"".join(rng.choice(kinds)() for _ in range(pages))


@pytest.fixture
def vmcore(make_vmcore: MakeVmcore) -> Vmcore:
    return make_vmcore(patchy(600) + bytes(3 << 20) + patchy(5))


def test_file_has_every_byte(vmcore: Vmcore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(vmcore, str(out), io.StringIO())
    assert out.read_bytes() == vmcore.read(0, vmcore.size)
    assert os.listdir(tmp_path) == ["out"]


def test_zero_pages_become_holes(make_vmcore: MakeVmcore, tmp_path: Path) -> None:
    vmcore = make_vmcore(b"x" * PAGE, size=64 << 20)
    out = tmp_path / "out"
    save(vmcore, str(out), io.StringIO())
    assert out.stat().st_size == vmcore.size
    assert out.stat().st_blocks * 512 <= 16 * PAGE


def test_dump_that_ends_with_zeros_has_its_full_size(make_vmcore: MakeVmcore, tmp_path: Path) -> None:
    vmcore = make_vmcore(bytes(2 * CHUNK + PAGE))
    save(vmcore, str(tmp_path / "out"), io.StringIO())
    assert (tmp_path / "out").stat().st_size == vmcore.size
    assert (tmp_path / "out").read_bytes() == vmcore.read(0, vmcore.size)


def test_dense_stream_has_the_same_bytes_as_the_sparse_file(vmcore: Vmcore, tmp_path: Path) -> None:
    read, write = os.pipe()
    parts: list[bytes] = []

    def drain() -> None:
        with open(read, "rb") as stream:
            parts.append(stream.read())

    reader = threading.Thread(target=drain)
    reader.start()
    copy(vmcore, write, False, Progress(vmcore.size, io.StringIO()))
    os.close(write)
    reader.join(timeout=20)
    assert parts[0] == vmcore.read(0, vmcore.size)


def test_existing_file_is_replaced_only_by_a_whole_dump(
    vmcore: Vmcore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"the dump of yesterday")
    seen: list[bytes] = []
    rename = os.rename

    def watched(a: str, b: str) -> None:
        seen.append(out.read_bytes())
        rename(a, b)

    monkeypatch.setattr(os, "rename", watched)
    save(vmcore, str(out), io.StringIO(), overwrite=True)
    assert seen == [b"the dump of yesterday"]
    assert out.read_bytes() == vmcore.read(0, vmcore.size)


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_existing_name_is_not_replaced_unless_that_is_asked_for(kind: str, vmcore: Vmcore, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    if kind != "dangling link":
        (out if kind == "file" else other).write_bytes(b"the dump of yesterday")
    if kind != "file":
        out.symlink_to(other)
    before = out.lstat(), sorted(os.listdir(tmp_path))
    with pytest.raises(Error) as told:
        save(vmcore, str(out), io.StringIO())
    assert str(told.value) == f"{out}: is there already (--overwrite: replace it)"
    assert (out.lstat(), sorted(os.listdir(tmp_path))) == before
    save(vmcore, str(out), io.StringIO(), overwrite=True)
    assert not out.is_symlink()
    assert out.read_bytes() == vmcore.read(0, vmcore.size)
    assert not other.exists() or other.read_bytes() == b"the dump of yesterday"


def test_name_that_is_taken_while_it_saves_is_not_replaced(
    vmcore: Vmcore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def copied(*_: object) -> None:
        out.write_bytes(b"of another")

    monkeypatch.setattr(save_module, "copy", copied)
    with pytest.raises(Error) as told:
        save(vmcore, str(out), io.StringIO())
    assert str(told.value) == f"{out}: File exists"
    assert out.read_bytes() == b"of another"


def test_left_over_of_an_earlier_try_is_replaced_and_told(vmcore: Vmcore, tmp_path: Path) -> None:
    (tmp_path / "out-incomplete").write_bytes(b"x" * (vmcore.size + 10 * PAGE))
    told: list[str] = []
    save(vmcore, str(tmp_path / "out"), io.StringIO(), tell=told.append)
    assert (tmp_path / "out").read_bytes() == vmcore.read(0, vmcore.size)
    assert os.listdir(tmp_path) == ["out"]
    assert told == [f"{tmp_path}/out-incomplete was left by an earlier save that did not end: it is replaced"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_planted_link_is_not_followed(overwrite: bool, vmcore: Vmcore, tmp_path: Path) -> None:
    victim, planted = tmp_path / "victim", tmp_path / "out-incomplete"
    victim.write_bytes(b"precious")
    planted.symlink_to(victim)
    with pytest.raises(Error) as told:
        save(vmcore, str(tmp_path / "out"), io.StringIO(), overwrite)
    assert str(told.value) == f"{planted}: is no regular file: neither written to nor removed"
    assert victim.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["out-incomplete", "victim"]


def test_two_that_save_to_one_name_do_not_meet(vmcore: Vmcore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    copy_ = save_module.copy

    def meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(save_module, "copy", copy_)
        with pytest.raises(Error) as error:
            save(vmcore, str(tmp_path / "out"), io.StringIO())
        told.append(str(error.value))
        copy_(*arguments)

    monkeypatch.setattr(save_module, "copy", meanwhile)
    save(vmcore, str(tmp_path / "out"), io.StringIO())
    assert told == [f"{tmp_path}/out-incomplete: another process is writing it"]
    assert (tmp_path / "out").read_bytes() == vmcore.read(0, vmcore.size)


@pytest.mark.parametrize("umask", [0o000, 0o777], ids=oct)
def test_only_the_user_may_read_it_whatever_the_umask(umask: int, vmcore: Vmcore, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save(vmcore, str(tmp_path / "out"), io.StringIO())
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o600


def test_fifo_gets_the_dense_stream(vmcore: Vmcore, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE)
    save_thread = threading.Thread(target=save, args=(vmcore, str(fifo), io.StringIO()))
    save_thread.start()
    assert reader.communicate(timeout=20)[0] == vmcore.read(0, vmcore.size)
    save_thread.join(timeout=20)


@pytest.mark.parametrize(
    ("out", "line"),
    [
        ("folder", r"/folder: Is a directory$"),
        ("nothing/there", r"/nothing/there-incomplete: No such file or directory$"),
        ("file/below", r"/file/below: Not a directory$"),
        ("out", r"/out-incomplete: is no regular file: neither written to nor removed$"),
    ],
)
def test_output_that_cannot_be_written_is_one_line(out: str, line: str, vmcore: Vmcore, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "out-incomplete").mkdir()
    with pytest.raises(Error, match=line) as caught:
        save(vmcore, str(tmp_path / out), io.StringIO())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("small_disk", [1024], indirect=True)
def test_full_disk_is_one_line_and_leaves_no_file_under_the_final_name(vmcore: Vmcore, small_disk: Path) -> None:
    (small_disk / "out").write_bytes(b"yesterday")
    with pytest.raises(Error) as caught:
        save(vmcore, str(small_disk / "out"), io.StringIO(), overwrite=True)
    out = small_disk / "out"
    assert str(caught.value) == f"{out}: No space left on device; {out}-incomplete has what fitted"
    assert out.read_bytes() == b"yesterday"


def test_reader_that_goes_away_is_one_line(vmcore: Vmcore, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["head", "-c", "100", fifo], stdout=subprocess.DEVNULL)
    with pytest.raises(Error, match="the reader closed the pipe before the vmcore was complete"):
        save(vmcore, str(fifo), io.StringIO())
    reader.wait(timeout=20)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


LINE = re.compile(r"Copying data : \[ *[0-9]+\.[0-9] %\] / eta: ([0-9]+m)?[0-9]+s  $")


def test_progress_is_in_makedumpfiles_words_and_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr(save_module, "time", clock)
    progress = Progress(1000, out)
    for done in range(0, 1000, 10):
        clock.now += 0.25
        progress.show(done)
    progress.show(1000, final=True)
    lines = out.getvalue().split("\n")[:-1]
    assert len(lines) == 26
    assert all(LINE.match(line) for line in lines)
    assert lines[0] == "Copying data : [  3.0 %] / eta: 32s  "
    assert lines[-1] == "Copying data : [100.0 %] / eta: 0s  "


def test_long_waits_are_told_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr(save_module, "time", clock)
    progress = Progress(1000, out)
    clock.now += 10
    progress.show(50)
    assert out.getvalue() == "Copying data : [  5.0 %] / eta: 3m10s  \n"


def test_terminal_gets_one_line_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    progress = Progress(0, out)
    progress.show(0, final=True)
    assert out.getvalue() == "Copying data : [100.0 %] / eta: 0s  \r\n"


def test_console_that_takes_no_progress_does_not_cost_the_dump(vmcore: Vmcore, tmp_path: Path) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    save(vmcore, str(tmp_path / "out"), Full())
    assert (tmp_path / "out").stat().st_size == vmcore.size


def test_refused_pages_are_zeros_in_the_file(make_vmcore: MakeVmcore, tmp_path: Path) -> None:
    start = 1 << 20
    vmcore = make_vmcore(b"x" * 8 * PAGE, start, RangeSet([(start + 2 * PAGE, start + 5 * PAGE)]))
    save(vmcore, str(tmp_path / "out"), io.StringIO())
    data = (tmp_path / "out").read_bytes()
    assert data[-8 * PAGE :] == b"x" * 2 * PAGE + bytes(3 * PAGE) + b"x" * 3 * PAGE
