# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stage 2 being gone to: what is checked before, the order in which it is done, and that all is undone where it does
not come off. Nothing is loaded here: stand-ins answer for kexec."""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture import header_place, kexec, stage2, stage_state
from capture.boot_image import Initramfs
from capture.dump import Dump
from capture.kexec import Image, Loaded
from capture.stage2 import TRIES, GivenUp, Plan
from capture.stage_state import Meant
from guard.errors import Error
from guard.ranges import RangeSet
from tests.unit.stage_parts import LINE, MIB, PAGE, PLACE_AT, FakePlace, MakePlan, open_files


class Kexec:
    """Stands in for capture.kexec: every call is an item of *events*. The next loads lie at *segments*, the last of
    which stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.loaded = False
        self.segments: list[RangeSet | None] = [None]
        self.refused = ""
        self.images: list[tuple[Image, bool, bytes]] = []
        for name in ("load", "unload", "is_loaded", "jump"):
            monkeypatch.setattr(kexec, name, getattr(self, name))
        monkeypatch.setattr(os, "sync", lambda: self.events.append("sync"))
        monkeypatch.setattr(stage2, "available", lambda: 1 << 40)

    def load(self, image: Image, want_segments: bool) -> Loaded:
        self.events.append("load")
        self.images.append((image, want_segments, os.pread(image.initramfs, 1 << 20, 0)))
        if self.refused:
            raise Error(self.refused)
        self.loaded = True
        return Loaded("test", self.segments.pop(0) if len(self.segments) > 1 else self.segments[0])

    def unload(self) -> None:
        self.events.append("unload")
        self.loaded = False

    def is_loaded(self) -> bool:
        return self.loaded

    def jump(self) -> None:
        self.events.append("jump")
        raise Error("no way there")


@pytest.fixture
def fake_kexec(monkeypatch: pytest.MonkeyPatch) -> Kexec:
    return Kexec(monkeypatch)


def place_in(fake: Kexec, own: bool = False) -> FakePlace:
    what = header_place.Pinned.what if own else header_place.InPlace.what
    return FakePlace(what, PLACE_AT, 1 << 16, fake.events)


# ---- memory, and what goes through the jump
def test_memory_that_loading_takes_is_checked_before(
    plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "initrd").write_bytes(bytes(3 * MIB))
    made = plan_of()._replace(initramfs=Initramfs(str(tmp_path / "initrd")))
    have = [76 * MIB + 6 * MIB]
    monkeypatch.setattr(stage2, "available", lambda: have[0])
    stage2.check_memory(made)
    stage2.check_memory(made, 6 * MIB)
    have[0] -= 1
    for size in (None, 6 * MIB):
        with pytest.raises(Error, match=r"^82M of memory needed to load stage 2, 82\.00M available$"):
            stage2.check_memory(made, size)
    stage2.check_memory(made, 6 * MIB - 1)


def opening(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever stage2 opens has this *text*."""
    (tmp_path / "text").write_text(text)

    def open_instead(_path: str, **how: Any) -> Any:
        return builtins.open(tmp_path / "text", **how)

    monkeypatch.setattr(stage2, "open", open_instead, raising=False)


def test_available_memory_is_what_the_kernel_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening("MemTotal: 9 kB\nMemFree:  5 kB\nMemAvailable:   1234 kB\n", monkeypatch, tmp_path)
    assert stage2.available() == 1234 << 10
    for text in ("MemTotal: 9 kB\n", "MemAvailable: much\n"):
        opening(text, monkeypatch, tmp_path)
        with pytest.raises(Error, match=r"^/proc/meminfo: no MemAvailable$"):
            stage2.available()


def test_only_disks_that_are_mounted_for_writing_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = (
        "rootfs / rootfs rw 0 0\n/dev/vda1 /sysroot ext4 ro,relatime,errors=rw 0 0\nbad\n"
        "/dev/vdb1 /kdumproot xfs rw,relatime 0 0\ntmpfs /run tmpfs rw 0 0\n/dev/vdc /mnt ext4 noatime,rw 0 0\n"
    )
    opening(mounts, monkeypatch, tmp_path)
    assert stage2.mounted_for_writing() == ["/kdumproot", "/mnt"]


def test_what_would_be_done_is_told_line_by_line(
    plan_of: MakePlan, live_dump: Dump, fake_kexec: Kexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage2, "mounted_for_writing", lambda: ["/kdumproot"])
    made = plan_of()
    lines = list(stage2.described(made, live_dump))
    size = len(made.header)
    assert lines[0] == f"header: {size} bytes at {PLACE_AT:#x}, in place of the prepared one (room for 65536)"
    assert lines[1].startswith(f"PT_LOADs: {len(made.loads)} of ")
    assert lines[2] == "notes: 3 where old memory has them, 0 bytes copied"
    assert "initramfs: /boot/initrd" in lines
    assert "load: by kexec_file_load(2), else by kexec -c" in lines
    assert f"command line: {made.cmdline}" in lines
    assert lines[-1] == "mounted for writing: /kdumproot, whose file system will find itself as after a crash"
    (device,) = live_dump.machine.devices
    live_dump.machine.devices = [device._replace(gated_by_kernel=True)]
    pinned = plan_of(place="pinned")._replace(given_up=GivenUp(3, 9 * PAGE), why_not_in_place="why not")
    lines = list(stage2.described(pinned, live_dump))
    assert lines[1] == "  why not"
    assert lines[3] == "  given up for want of room: the 3 smallest runs of readable memory, 36K"
    assert (
        "load: by kexec_file_load(2) if it tells its segments, else by kexec -c; none may lie over the header" in lines
    )
    assert lines[-1] == f"left out: {device.plugged}, whose state nothing tells"


# ---- going


DONE = ["load", "put", "sync", "check", "jump", "take back", "unload"]


@pytest.fixture
def made(plan_of: MakePlan, tmp_path: Path, fake_kexec: Kexec, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan of a machine, with an initramfs of four bytes."""
    (tmp_path / "initrd").write_bytes(b"cpio")
    made = plan_of()._replace(initramfs=Initramfs(str(tmp_path / "initrd")), place=place_in(fake_kexec))
    monkeypatch.setattr(stage2, "Pinned", header_place.Pinned)
    return made


def test_loading_comes_first_and_a_jump_that_fails_undoes_all(made: Plan, live_dump: Dump, fake_kexec: Kexec) -> None:
    before = open_files()
    with pytest.raises(Error, match=r"^no way there$"):
        stage2.go(made, live_dump)
    assert fake_kexec.events == DONE
    assert open_files() == before
    ((image, want_segments, initramfs),) = fake_kexec.images
    assert (image.kernel, image.cmdline, want_segments) == (made.kernel.path, made.cmdline, False)
    assert initramfs.startswith(stage_state.archive(stage2._state(made, live_dump)))
    assert initramfs.endswith(b"cpio")
    assert isinstance(made.place, FakePlace)
    assert made.place.data == made.header


def test_nothing_is_placed_where_nothing_could_be_loaded(made: Plan, live_dump: Dump, fake_kexec: Kexec) -> None:
    before = open_files()
    fake_kexec.refused = "not this one"
    with pytest.raises(Error, match=r"^not this one$"):
        stage2.go(made, live_dump)
    assert fake_kexec.events == ["load"]
    assert open_files() == before


def test_memory_is_checked_before_and_behind_packing(
    made: Plan, live_dump: Dump, fake_kexec: Kexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def check(plan: Plan, size: int | None = None) -> None:
        asked.append(size)
        if size:
            raise Error("too little")

    packed = len(stage_state.archive(stage2._state(made, live_dump))) + 4
    monkeypatch.setattr(stage2, "check_memory", check)
    with pytest.raises(Error, match=r"^too little$"):
        stage2.go(made, live_dump)
    assert asked == [None, packed]
    assert fake_kexec.events == []


def test_next_stage_is_told_what_was_meant_and_the_way_back(made: Plan, live_dump: Dump) -> None:
    (device,) = live_dump.machine.devices
    live_dump.machine.devices = [device._replace(gated_by_kernel=True)]
    state = stage2._state(made._replace(given_up=GivenUp(2, PAGE)), live_dump)
    initramfs = made.initramfs.path
    meant = Meant(LINE, PLACE_AT, made.core.size, "/boot/vmlinuz", initramfs, (2, PAGE), tuple(device.plugged), True)
    assert stage_state.decode(state[stage_state.MEANT]) == meant
    assert state[stage_state.HEAD] == made.core.header
    assert state[stage_state.ORIGINAL] == b"o" * len(made.header)
    assert b'"readable"' in state[stage_state.MAP]
    assert b'"rules"' in state[stage_state.GUARD]


def test_next_stage_puts_nothing_back_where_the_prepared_header_stays(made: Plan, live_dump: Dump) -> None:
    live_dump.machine.phdr_note_align = None
    state = stage2._state(made._replace(place=FakePlace(header_place.Pinned.what, MIB, PAGE)), live_dump)
    assert state[stage_state.ORIGINAL] == b""
    meant = stage_state.decode(state[stage_state.MEANT])
    assert (meant.elfcorehdr, meant.knows_note_align) == (None, False)


# ---- segments and the header


@pytest.fixture
def pinned(made: Plan, fake_kexec: Kexec, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The same in pinned pages."""
    monkeypatch.setattr(stage2, "Pinned", FakePlace)
    return made._replace(place=place_in(fake_kexec, own=True))


def load(plan: Plan) -> None:
    fd = os.memfd_create("initramfs")
    try:
        stage2._load(plan, fd)
    finally:
        os.close(fd)


def over(start: int, size: int = PAGE) -> RangeSet:
    return RangeSet([(0x1000, 0x2000), (start, start + size)])


def test_header_moves_away_from_segments_and_the_command_line_with_it(pinned: Plan, fake_kexec: Kexec) -> None:
    end = PLACE_AT + MIB + (1 << 16)
    first, second = over(PLACE_AT - PAGE, PAGE + 1), over(end - 1, 1)
    fake_kexec.segments = [first, second, over(PLACE_AT + 2 * MIB - PAGE) | over(PLACE_AT + 2 * MIB + (1 << 16))]
    load(pinned)
    moved = ["load", "unload", f"choose not {first}", "load", "unload", f"choose not {second}", "load"]
    assert fake_kexec.events == moved
    assert [image.cmdline.split()[-2] for image, _, _ in fake_kexec.images] == [
        f"elfcorehdr={PLACE_AT + n * MIB:#x}" for n in range(3)
    ]
    assert all(want_segments for _, want_segments, _ in fake_kexec.images)
    assert fake_kexec.loaded


def test_segments_that_follow_the_header_everywhere_end_with_nothing_loaded(pinned: Plan, fake_kexec: Kexec) -> None:
    fake_kexec.segments = [over(0x10000, 1 << 32)]
    with pytest.raises(
        Error, match=rf"^segments lie over the header in each of {TRIES} places that were tried for it$"
    ):
        load(pinned)
    assert fake_kexec.events.count("load") == TRIES
    assert not fake_kexec.loaded


@pytest.mark.parametrize("segments", [None, over(PLACE_AT - PAGE) | over(PLACE_AT + (1 << 16))])
def test_header_in_place_of_the_prepared_one_needs_no_segments(
    segments: RangeSet | None, made: Plan, fake_kexec: Kexec
) -> None:
    fake_kexec.segments = [segments]
    load(made)
    assert fake_kexec.events == ["load"]
    assert fake_kexec.images[0][1] is False


def test_segment_over_a_place_that_cannot_move_ends_with_nothing_loaded(made: Plan, fake_kexec: Kexec) -> None:
    fake_kexec.segments = [over(PLACE_AT + (1 << 16) - 1, 1)]
    with pytest.raises(Error, match=r"^test: a segment lies over the header's place, which is no RAM of this kernel$"):
        load(made)
    assert fake_kexec.events == ["load", "unload"]


# ---- the jump


def held() -> set[int]:
    return {int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, ())}


def failing(place: FakePlace, method: str, monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    whole = getattr(place, method)

    def fail(*arguments: bytes) -> None:
        whole(*arguments)
        do()

    monkeypatch.setattr(place, method, fail)


def refuse() -> None:
    raise Error("not there")


@pytest.mark.parametrize(
    ("method", "done"),
    [
        ("put", ["put", "unload"]),  # which undoes what it did itself
        ("check", ["put", "sync", "check", "take back", "unload"]),
    ],
)
def test_header_that_is_not_there_is_not_gone_to(
    method: str, done: list[str], fake_kexec: Kexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kexec.loaded = True
    place = place_in(fake_kexec)
    failing(place, method, monkeypatch, refuse)
    with pytest.raises(Error, match=r"^not there$"):
        stage2.jump(place, b"header")
    assert fake_kexec.events == done


def test_kernel_that_is_loaded_no_more_is_not_gone_to(fake_kexec: Kexec) -> None:
    with pytest.raises(Error, match=r"^the kernel that was loaded is not there any more$"):
        stage2.jump(place_in(fake_kexec), b"header")
    assert fake_kexec.events == ["put", "sync", "check", "take back", "unload"]


def test_signals_that_end_a_process_wait_between_header_and_jump(
    fake_kexec: Kexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kexec.loaded = True
    before = held()
    ending = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    assert not before & ending
    seen: list[set[int]] = []
    place = place_in(fake_kexec)
    for method in ("put", "take_back"):
        failing(place, method, monkeypatch, lambda: seen.append(held()))
    with pytest.raises(Error, match="no way there"):
        stage2.jump(place, b"header")
    assert all(ending <= blocked for blocked in seen)
    assert len(seen) == 2
    assert held() == before
