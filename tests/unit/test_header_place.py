# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the next kernel's header lies: how far the room of the prepared one reaches, and locked pages of our own. A
plain file stands in for /dev/mem."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import elfcore
from capture.header_place import MOST, ONE_MIB, InPlace, Pinned, Window, prepared_at
from guard import pinned
from guard.errors import DeviceError, Error, SourceError
from guard.ranges import Range, RangeSet
from tests.unit.stage_parts import MIB, PAGE, Span, header_dump, needs_root

AT = 4 * MIB
SIZE = 12 * MIB
RESERVED = [(2 * MIB, AT + 64 * PAGE)]


def old_header(offsets: list[int], count: int | None = None, phnum: int | None = None) -> bytes:
    """A prepared header with a PT_LOAD for each of *offsets*, or of *count* that lie below it."""
    offsets = [*offsets, *[MIB] * ((count or len(offsets)) - len(offsets))]
    table = b"".join(struct.pack("<IIQQQQQQ", 1, 7, offset, 0, offset, PAGE, PAGE, 0) for offset in offsets)
    start = bytearray(elfcore.ehdr(62, len(offsets), "<"))
    if phnum is not None:
        struct.pack_into("<H", start, 56, phnum)
    return bytes(start) + table


class Memory:
    """A sparse file in the place of /dev/mem."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("mem")
        os.truncate(self.fd, SIZE)
        self.path = f"/proc/self/fd/{self.fd}"

    def write(self, at: int, data: bytes) -> None:
        os.pwrite(self.fd, data, at)

    def read(self, at: int, size: int) -> bytes:
        return os.pread(self.fd, size, at)

    def place(self, own: list[Span] | None = None, reserved: list[Span] | None = None, at: int = AT) -> InPlace:
        return InPlace(header_dump(at, own or [], RESERVED if reserved is None else reserved), self.path)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    made.write(AT, old_header([2 * MIB, MIB, 0]))
    yield made
    os.close(made.fd)


def test_room_reaches_to_the_end_of_the_reservation(memory: Memory) -> None:
    place = memory.place()
    assert (place.addr, place.room) == (AT, 64 * PAGE)
    assert memory.place(reserved=[(2 * MIB, AT + 5 * PAGE + 9)]).room == 5 * PAGE


def test_room_ends_where_own_memory_begins_with_its_first_part_of_a_page(memory: Memory) -> None:
    own = [(0x1000, 640 << 10), (AT + 3 * PAGE + 100, AT + 9 * PAGE), (AT + 40 * PAGE, SIZE)]
    assert memory.place(own).room == 3 * PAGE


def test_room_ends_at_the_first_byte_that_is_not_zero_behind_the_old_header(memory: Memory) -> None:
    memory.write(AT + 2 * PAGE + 17, b"\1")
    assert memory.place().room == 2 * PAGE + 17
    memory.write(AT + 64 + 3 * 56, b"\1")
    assert memory.place().room == 64 + 3 * 56


@pytest.mark.parametrize("inside", [0, 0x400])
def test_room_ends_where_the_old_header_has_kexecs_copy_of_low_memory(memory: Memory, inside: int) -> None:
    memory.write(AT, old_header([AT + 8 * PAGE, AT + 6 * PAGE + inside, 0]))
    assert memory.place().room == 6 * PAGE


def test_header_that_names_itself_is_nothing_else_that_begins_there(memory: Memory) -> None:
    memory.write(AT, old_header([AT, 0, MIB]))
    assert memory.place().room == 64 * PAGE


def test_nothing_of_the_old_header_is_looked_for_where_none_can_reach(memory: Memory) -> None:
    """The count of its program headers, which can be anywhere where they are too many for e_phnum."""
    damaged = bytearray(old_header([], 3, phnum=0xFFFF))
    struct.pack_into("<Q", damaged, 40, MOST - 63)
    memory.write(AT, bytes(damaged))
    memory.write(AT + MOST - 63 + 44, struct.pack("<I", 3))
    memory.write(AT + 300, b"\1")
    assert memory.place().room == 64 * PAGE
    memory.write(AT + 40, struct.pack("<Q", MOST - 64))
    memory.write(AT + MOST - 64 + 44, struct.pack("<I", 3))
    assert memory.place().room == 300


def test_room_is_the_old_headers_own_pages_where_no_reservation_is_known(memory: Memory) -> None:
    assert memory.place(reserved=[]).room == PAGE
    assert memory.place(reserved=[(AT + PAGE, SIZE), (0, AT)]).room == PAGE


@pytest.mark.parametrize("reserved", [[], RESERVED])
def test_old_header_of_more_than_a_page_is_read_whole(memory: Memory, reserved: list[Span]) -> None:
    memory.write(AT, old_header([], 199) + struct.pack("<IIQQQQQQ", *[0xFFFFFFFF] * 2, *[(1 << 64) - 1] * 6))
    memory.write(AT + 56, struct.pack("<H", 200))
    memory.write(AT + 64 + 200 * 56, b"\0" * 8 + b"behind")
    assert memory.place(reserved=reserved).room == 64 + 200 * 56 + 8
    memory.write(AT + 64 + 198 * 56, struct.pack("<IIQ", 1, 7, AT + 20 * PAGE))
    memory.write(AT + 64 + 200 * 56, bytes(14))
    assert memory.place(reserved=reserved).room == (20 * PAGE if reserved else 3 * PAGE)


@pytest.mark.parametrize(
    "damaged",
    [
        b"\xff" * 64,
        old_header([], 3)[:16] + b"\2" + old_header([], 3)[17:],
        old_header([], 3, phnum=0),
        old_header([], 3, phnum=0xFFFE)[:32] + struct.pack("<Q", 1 << 63) + bytes(16) + b"\x38\0\xfe\xff",
        old_header([], 3)[:40] + struct.pack("<Q", MOST) + bytes(4) + struct.pack("<HHH", 64, 56, 0xFFFF),
    ],
)
def test_what_is_no_header_any_more_gives_its_page_and_all_zeros_behind(memory: Memory, damaged: bytes) -> None:
    memory.write(AT, damaged)
    assert memory.place(reserved=[]).room == PAGE
    assert memory.place().room == 64 * PAGE
    memory.write(AT + PAGE + 3, b"\1")
    assert memory.place().room == PAGE + 3


def test_room_is_never_more_than_any_header_needs(memory: Memory) -> None:
    assert memory.place(reserved=[(0, SIZE)]).room == MOST


@settings(deadline=None)
@given(
    own=st.integers(1, 40 * PAGE),
    reserved=st.one_of(st.none(), st.integers(1, 40 * PAGE)),
    named=st.integers(1, 40 * PAGE),
    dirty=st.integers(64 + 56, 40 * PAGE),
)
def test_room_is_the_least_of_all_bounds(own: int, reserved: int | None, named: int, dirty: int) -> None:
    memory = Memory()
    try:
        memory.write(AT, old_header([AT + named]))
        memory.write(AT + dirty, b"\1")
        known = PAGE if reserved is None else reserved
        whole = min(own, known, named) // PAGE * PAGE
        dump = header_dump(AT, [(AT + own, SIZE)], [] if reserved is None else [(AT, AT + reserved)])
        if own < PAGE:
            with pytest.raises(SourceError, match="lies in memory of this kernel"):
                InPlace(dump, memory.path)
        elif not whole:
            with pytest.raises(SourceError, match="has no whole page"):
                InPlace(dump, memory.path)
        else:
            assert InPlace(dump, memory.path).room == min(whole, dirty)
    finally:
        os.close(memory.fd)


def test_prepared_header_is_where_the_command_line_says() -> None:
    assert prepared_at(header_dump(AT)) == AT
    with pytest.raises(SourceError, match=r"^no elfcorehdr= on the command line: there is no prepared header$"):
        prepared_at(header_dump(None))


def test_header_that_begins_inside_a_page_is_refused(memory: Memory) -> None:
    with pytest.raises(SourceError, match=r"^the prepared header at 0x400200 does not start a page$"):
        memory.place(at=AT + 0x200)


def test_header_in_own_memory_is_refused(memory: Memory) -> None:
    with pytest.raises(SourceError, match=r"^the prepared header at 0x400000 lies in memory of this kernel$"):
        memory.place([(AT + PAGE - 1, AT + 9 * PAGE)])


def test_memory_that_cannot_be_had_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    path = tmp_path / "mem"
    with pytest.raises(SourceError, match=f"^{path}: No such file or directory$"):
        Window(AT, PAGE, str(path))
    path.write_bytes(bytes(PAGE))
    with pytest.raises(SourceError, match=f"^{path}: 0x400000-0x400fff cannot be mapped: mmap [^\n]*$"):
        Window(AT, PAGE, str(path))
    with pytest.raises(SourceError, match=f"^{path}: 0x8000000000000000-[^\n]* cannot be mapped: [^\n]*$"):
        Window(1 << 63, PAGE, str(path))

    def refused(*_args: object, **_more: object) -> mmap.mmap:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(mmap, "mmap", refused)
    with pytest.raises(SourceError, match=r"cannot be mapped: Operation not permitted \(.*iomem=relaxed cures it\)$"):
        Window(0, PAGE, str(path))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [1, PAGE - 1, 3 * PAGE + 5])
def test_what_was_in_place_before_comes_back_to_the_byte(memory: Memory, size: int) -> None:
    memory.write(0, bytes(range(1, 256)) * (AT // 255))
    place = memory.place()
    before = memory.read(0, SIZE)
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert place.before(size) == before[AT : AT + size]
    place.put(data)
    assert memory.read(0, SIZE) == before[:AT] + data + before[AT + size :]
    place.check()
    memory.write(AT + size - 1, b"\0")
    with pytest.raises(Error, match=r"^the header at 0x400000 has been changed$"):
        place.check()
    place.take_back()
    assert memory.read(0, SIZE) == before
    assert place.parameters() == ["elfcorehdr=0x400000"]
    assert not place.is_own_ram


class Stubborn(bytearray):
    """Memory of which one byte cannot be written."""

    def __setitem__(self, key: Any, value: Any) -> None:
        byte = self[9]
        super().__setitem__(key, value)
        super().__setitem__(9, byte)


def test_header_that_does_not_stick_is_an_error_and_taken_back(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    place = memory.place()
    stubborn = Stubborn(memory.read(AT, PAGE))
    monkeypatch.setattr(place._window, "map", stubborn)
    with pytest.raises(Error, match=r"^/dev/mem: what was written at 0x400000 is not there$"):
        place.put(b"\xff" * 100)
    assert bytes(stubborn) == memory.read(AT, PAGE)


# ---- pages of our own


def locked_kib() -> int:
    return int(Path("/proc/self/status").read_text().split("VmLck:")[1].split()[0])


def pfns_by_pagemap(place: Pinned) -> list[int]:
    """Of the pages that are the place, as proc(5) has it."""
    start = pinned.address(place._map) // PAGE + place._first
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(8 * start)
        raw = file.read(8 * (place.room // PAGE))
    return [entry & (1 << 55) - 1 for (entry,) in struct.iter_unpack("<Q", raw)]


@needs_root
@pytest.mark.parametrize("size", [100, 5 * PAGE])
def test_pinned_pages_are_locked_neighbours_in_physical_memory(size: int) -> None:
    before = locked_kib()
    place = Pinned(size)
    assert place.room == -(-size // PAGE) * PAGE
    first = place.addr // PAGE
    assert pfns_by_pagemap(place) == list(range(first, first + place.room // PAGE))
    assert place.addr >= ONE_MIB
    assert locked_kib() - before >= place.room >> 10
    place.take_back()
    assert locked_kib() == before


@needs_root
def test_pinned_pages_hold_what_is_put_there_until_it_changes() -> None:
    place = Pinned(2 * PAGE)
    try:
        data = bytes(range(256)) * 20
        assert place.before(len(data)) == b""
        place.put(data)
        place.check()
        at = place._first * PAGE
        assert place._map[at : at + len(data)] == data
        place._map[at + len(data) - 1] ^= 1
        with pytest.raises(Error, match=f"^the pinned pages at {place.addr:#x} have been changed$"):
            place.check()
    finally:
        place.take_back()


@needs_root
def test_pinned_pages_stay_where_they_are_while_there_are_children() -> None:
    place = Pinned(5 * PAGE)
    children: list[int] = []
    try:
        place.put(b"before")
        before = pfns_by_pagemap(place)
        for _ in range(2):
            pid = os.fork()
            if not pid:
                signal.pause()
                os._exit(0)
            children.append(pid)
        place._map[:] = bytes(len(place._map))
        place.put(b"after" * PAGE)
        assert pfns_by_pagemap(place) == before
        place.check()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        place.take_back()


@needs_root
def test_place_among_pinned_pages_is_never_one_to_avoid_until_none_is_left() -> None:
    place = Pinned(64 << 10)
    try:
        avoid: list[Range] = []
        while True:
            avoid.append(Range(place.addr + PAGE + 1, place.addr + PAGE + 2))
            try:
                place.choose(avoid)
            except SourceError:
                break
            assert not RangeSet([(place.addr, place.addr + place.room)]) & RangeSet(avoid)
            assert pfns_by_pagemap(place)[0] == place.addr // PAGE
        with pytest.raises(SourceError, match=r"^no 65536 bytes of physical neighbours among 1024 locked pages$"):
            place.choose(avoid)
        assert len(avoid) > 1
    finally:
        place.take_back()


def pinned_over(pfns: list[int], pages: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Pinned, list[int]]:
    """Pinned pages in a kernel that has them at *pfns*, the rest far apart. The list may be changed."""
    every = [*pfns, *range(1 << 40, (1 << 40) + 3 * 1024, 3)][:1024]
    start = [0]

    def frames(vaddr: int, count: int) -> list[int]:
        start[0] = start[0] or vaddr
        first = (vaddr - start[0]) // PAGE
        return every[first : first + count]

    monkeypatch.setattr(pinned, "lock", lambda vaddr, size: None)
    monkeypatch.setattr(pinned, "frames", frames)
    return Pinned(pages * PAGE), every


ONE_MIB_PFN = ONE_MIB // PAGE


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(ONE_MIB_PFN - 8, ONE_MIB_PFN + 40), st.integers(1, 12)), min_size=1, max_size=8),
    st.integers(2, 6),
    st.lists(st.tuples(st.integers(0, 50 * PAGE), st.integers(0, 3 * PAGE)), max_size=4),
)
def test_first_neighbours_that_nothing_speaks_against_are_taken(
    runs: list[tuple[int, int]], pages: int, avoided: list[tuple[int, int]]
) -> None:
    pfns = [first + i for first, count in runs for i in range(count)]
    avoid = [Range(ONE_MIB + a, ONE_MIB + a + size) for a, size in avoided]

    def first_of(bad: Callable[[int], bool]) -> int | None:
        for i in range(len(pfns) - pages + 1):
            found = pfns[i : i + pages]
            if found == list(range(found[0], found[0] + pages)) and not any(map(bad, found)):
                return found[0] * PAGE
        return None

    def below(pfn: int) -> bool:
        return pfn < ONE_MIB_PFN

    def bad(pfn: int) -> bool:
        return below(pfn) or any(r.start < (pfn + 1) * PAGE and r.end > pfn * PAGE and r.size for r in avoid)

    with pytest.MonkeyPatch.context() as monkeypatch:
        if first_of(below) is None:
            with pytest.raises(SourceError, match="physical neighbours among 1024 locked pages"):
                pinned_over(pfns, pages, monkeypatch)
            return
        place, _ = pinned_over(pfns, pages, monkeypatch)
        assert place.addr == first_of(below)
        expected = first_of(bad)
        if expected is None:
            with pytest.raises(SourceError, match="physical neighbours"):
                place.choose(avoid)
        else:
            place.choose(avoid)
            assert place.addr == expected
        place.take_back()


def test_pinned_pages_that_the_kernel_moves_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    place, pfns = pinned_over([7, 9, 0x5000, 0x5001, 0x5002], 3, monkeypatch)
    place.put(b"header")
    pfns[4] = 0x6000
    with pytest.raises(Error, match=r"^the pinned pages at 0x5000000 have been moved by the kernel$"):
        place.check()
    with pytest.raises(Error, match="moved"):
        place.put(b"header")


def test_next_kernel_is_told_to_leave_pinned_pages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = pinned_over([0x5000, 0x5001, 0x5002], 3, monkeypatch)
    assert place.parameters() == ["memmap=12K$0x5000000", "elfcorehdr=0x5000000"]
    assert place.is_own_ram


@pytest.mark.parametrize("what", ["lock", "frames"])
def test_no_pinned_pages_is_one_clear_line(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise DeviceError("cannot have them")

    monkeypatch.setattr(pinned, "lock", lambda vaddr, size: None)
    monkeypatch.setattr(pinned, what, refuse)
    with pytest.raises(SourceError, match=r"^no pinned pages: cannot have them$"):
        Pinned(PAGE)
