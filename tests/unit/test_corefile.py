# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own vmcore: never held open, and followed where a device dump shifts it.

A regular file stands in for /proc/vmcore here, changed as fs/proc/vmcore.c:vmcore_add_device_dump() changes that one;
`make ddump` has real ones."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.elfcore import Load, build
from capture.plan import Plan
from capture.vmcore import Vmcore
from guard import procvmcore
from guard._core import ffi, lib
from guard.corefile import Added, CoreFile
from guard.errors import Error, SourceError
from guard.physmem import PREAD, OldMemory, Segment
from guard.procvmcore import PHDR_SIZE
from guard.registry import Registry

PAGE = 4096
RAM = ((0x5000, 0x9000), (0x100800, 0x102400))
NOTES = struct.pack("<III", 5, 32, 1) + b"CORE\0\0\0\0" + bytes(range(32)) + b"VMCOREINFO text" * 9
O_PATH_FLAG = "010000000"


class StandIn:
    """A file that grows as /proc/vmcore does, step by step if so wished."""

    def __init__(self, path: Path, ram: tuple[tuple[int, int], ...] = RAM) -> None:
        self.path = str(path)
        self.core = build(62, NOTES, [Load(start, 0, end - start) for start, end in ram], 4)
        self.head = bytearray(self.core.header)
        self.notes_at = self.core.phdrs[0].offset
        self.notes = bytes(self.head[self.notes_at :])  # padded to whole pages
        del self.head[self.notes_at :]
        self.dumps = b""
        self.memory = b"".join(pattern(e.paddr, e.size) for e in self.core.extents)
        self.write()

    def write(self) -> None:
        """In place: who has the file open sees what has become of it."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT)
        data = bytes(self.head) + self.dumps + self.notes + self.memory
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))
        os.close(fd)

    def update_notes(self, size: int) -> None:
        self.dumps += struct.pack("<III", 8, size - 20, 0x700) + b"LINUX\0\0\0" + b"\xaa" * (size - 20)

    def update_header(self, size: int, first: int = 0) -> None:
        """Program headers from number *first* on."""
        for i, p in enumerate(self.core.phdrs):
            at = 64 + i * PHDR_SIZE
            if i >= first and p.type == procvmcore.PT_NOTE:
                for field in (32, 40):
                    self._add(at + field, size)
            elif i >= first:
                self._add(at + 8, size)

    def _add(self, at: int, size: int) -> None:
        struct.pack_into("<Q", self.head, at, struct.unpack_from("<Q", self.head, at)[0] + size)

    def add_dump(self, size: int = PAGE) -> None:
        self.update_notes(size)
        self.update_header(size)
        self.write()


def pattern(paddr: int, size: int) -> bytes:
    return b"".join(struct.pack("<Q", at | 1) for at in range(paddr, paddr + size, 8))


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path / "vmcore")


@pytest.fixture
def core(stand_in: StandIn) -> Iterator[CoreFile]:
    file = CoreFile(stand_in.path, "/proc/vmcore")
    yield file
    file.close()


def memory_of(core: CoreFile) -> OldMemory:
    return OldMemory(procvmcore.segments(core.fd, core.header), Registry(), core)


def open_for_reading(path: str) -> int:
    """How many descriptors of this process have the file open, O_PATH ones not counted."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") != path:
                continue
            with open(f"/proc/self/fdinfo/{name}") as file:
                flags = next(line.split()[1] for line in file if line.startswith("flags:"))
        except FileNotFoundError:  # that of the listing
            continue
        found += not int(flags, 8) & int(O_PATH_FLAG, 8)
    return found


def test_file_is_open_only_while_something_is_read_from_it(stand_in: StandIn, core: CoreFile) -> None:
    memory = memory_of(core)
    assert open_for_reading(stand_in.path) == 0
    assert memory.read(0x5000, 0x4000) == pattern(0x5000, 0x4000)
    assert memory.read_exact(0x6000, 16) == pattern(0x6000, 16)
    vmcore = Vmcore(stand_in.core, memory)
    assert vmcore.read(stand_in.core.extents[0].offset, PAGE) == pattern(0x5000, PAGE)
    assert core.read(64, 0) == stand_in.core.header[:64]
    assert core.added() == Added(0, 0)
    assert open_for_reading(stand_in.path) == 0


def test_batch_of_reads_opens_the_file_once(stand_in: StandIn, core: CoreFile) -> None:
    memory = memory_of(core)
    buffer = ffi.new("uint8_t[]", PAGE)
    for paddr in (0x5000, 0x7000):
        lib.physmem_read(memory.c, paddr, buffer, PAGE)
        assert open_for_reading(stand_in.path) == 1
    lib.physmem_rest(memory.c)
    assert open_for_reading(stand_in.path) == 0


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.one_of(st.integers(1, 40), st.tuples(st.integers(0, 0x9000), st.integers(1, 0x5000)))))
def test_memory_is_the_same_however_many_dumps_are_added_between_reads(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int | tuple[int, int]]
) -> None:
    stand_in = StandIn(tmp_path_factory.mktemp("core") / "vmcore")
    core = CoreFile(stand_in.path, "/proc/vmcore")
    memory = memory_of(core)
    added = 0
    for step in steps:
        if isinstance(step, int):
            stand_in.add_dump(step * PAGE)
            added += step * PAGE
        else:
            paddr, size = step
            shown = [byte if 0x5000 <= at < 0x9000 else 0 for at, byte in enumerate(pattern(0, 0xF000))]
            assert memory.read(paddr, size) == bytes(shown[paddr : paddr + size])
    assert core.added() == Added(added, 0)
    core.close()


def test_dump_added_within_a_batch_is_noticed_after_the_read(stand_in: StandIn, core: CoreFile) -> None:
    """As before 6.14, where the open file is shifted."""
    memory = memory_of(core)
    buffer = ffi.new("uint8_t[]", PAGE)
    lib.physmem_read(memory.c, 0x5000, buffer, PAGE)
    stand_in.add_dump(3 * PAGE)
    lib.physmem_read(memory.c, 0x6000, buffer, PAGE)
    assert bytes(ffi.buffer(buffer)) == pattern(0x6000, PAGE)
    lib.physmem_rest(memory.c)
    assert memory.faults() == []


def _only_notes(stand_in: StandIn) -> None:
    stand_in.update_notes(2 * PAGE)
    stand_in.write()


def _notes_and_half_of_the_header(stand_in: StandIn) -> None:
    stand_in.update_header(2 * PAGE)
    whole = bytes(stand_in.head)
    stand_in.update_header(-2 * PAGE)
    half = 64 + 2 * PHDR_SIZE
    stand_in.head[:half] = whole[:half]
    _only_notes(stand_in)


def _all_but_the_memory(stand_in: StandIn) -> None:
    """The list's offsets are still the old ones, and so is the size of the file."""
    stand_in.update_header(2 * PAGE)
    stand_in.update_notes(2 * PAGE)
    stand_in.memory = stand_in.memory[: -2 * PAGE]
    stand_in.write()


def _header_alone(stand_in: StandIn) -> None:
    stand_in.update_header(2 * PAGE)
    stand_in.write()


def _other_memory(stand_in: StandIn) -> None:
    stand_in._add(64 + 2 * PHDR_SIZE + 24, PAGE)
    stand_in.write()


UNDER_WAY = [_only_notes, _notes_and_half_of_the_header, _all_but_the_memory, _header_alone, _other_memory]


@pytest.mark.parametrize("step", UNDER_WAY)
def test_where_the_place_of_memory_cannot_be_made_out_it_is_zeros_and_a_fault_never_other_bytes(
    step: object, stand_in: StandIn, core: CoreFile
) -> None:
    memory = memory_of(core)
    assert callable(step)
    step(stand_in)
    assert memory.read(0x5000, 0x4000) == bytes(0x4000)
    assert [(f.range.start, f.range.end, os.strerror(f.errno)) for f in memory.faults()] == [
        (0x5000, 0x9000, "Stale file handle")
    ]
    assert open_for_reading(stand_in.path) == 0


def test_addition_under_way_is_waited_for(stand_in: StandIn, core: CoreFile) -> None:
    memory = memory_of(core)
    _only_notes(stand_in)

    def finish() -> None:
        stand_in.update_header(2 * PAGE)
        stand_in.write()

    timer = threading.Timer(0.02, finish)
    timer.start()
    assert memory.read(0x5000, 0x4000) == pattern(0x5000, 0x4000)
    timer.join()
    assert memory.faults() == []


def test_what_cannot_be_made_out_is_not_waited_for_again_and_again(stand_in: StandIn, core: CoreFile) -> None:
    memory = memory_of(core)
    _only_notes(stand_in)
    memory.read(0x5000, PAGE)
    assert memory._reader.given_up
    stand_in.update_header(2 * PAGE)
    stand_in.write()
    assert memory.read(0x5000, PAGE) == pattern(0x5000, PAGE)
    assert not memory._reader.given_up


def test_memory_added_as_ptloads_is_followed_and_told_too(tmp_path: Path) -> None:
    """fs/proc/vmcore.c:vmcore_add_device_ram_elf64(): the header may grow by pages, notes and memory move."""
    path = tmp_path / "vmcore"
    stand_in = StandIn(path)
    core = CoreFile(str(path), "/proc/vmcore")
    grown = StandIn(tmp_path / "grown", (*RAM, *((n << 20, (n << 20) + PAGE) for n in range(2, 100))))
    assert grown.notes_at > stand_in.notes_at
    grown.path = str(path)
    grown.write()
    memory = memory_of(core)
    assert memory.read(0x5000, 0x4000) == pattern(0x5000, 0x4000)
    assert memory.faults() == []
    assert core.added() == Added(0, 98 * PAGE)
    core.close()


def test_header_that_was_added_to_is_not_read_as_if_it_were_the_one_of_the_start(
    stand_in: StandIn, core: CoreFile
) -> None:
    stand_in.add_dump()
    with pytest.raises(SourceError, match="/proc/vmcore: a driver has just added a device dump or memory to it; start"):
        core.read(64, 0)


def test_header_without_memory_as_recorded_machines_have_it_is_read_and_its_memory_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "vmcore"
    built = StandIn(path).core
    path.write_bytes(built.header)
    core = CoreFile(str(path), "vmcore")
    assert core.read(len(built.header), 0) == built.header
    memory = memory_of(core)
    assert memory.read(0x5000, PAGE) == bytes(PAGE)
    assert [os.strerror(f.errno) for f in memory.faults()] == ["No data available"]
    core.close()


def test_file_is_reached_although_its_name_leads_elsewhere(stand_in: StandIn, core: CoreFile) -> None:
    os.rename(stand_in.path, f"{stand_in.path}.covered")
    Path(stand_in.path).write_bytes(b"what is mounted there now")
    assert memory_of(core).read(0x5000, PAGE) == pattern(0x5000, PAGE)


def test_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "vmcore")
    with pytest.raises(SourceError, match="vmcore: is not a regular file; taken as absent"):
        CoreFile(str(tmp_path / "vmcore"), "vmcore")


def test_damaged_place_of_the_notes_costs_the_mark_alone(tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path / "vmcore")
    struct.pack_into("<Q", stand_in.head, 64 + 32, (1 << 64) - 1)
    stand_in.write()
    core = CoreFile(stand_in.path, "vmcore")
    assert memory_of(core).read(0x5000, PAGE) == pattern(0x5000, PAGE)
    core.close()


def test_collector_inside_gets_the_offsets_of_now_and_the_file_stays_open_for_it(
    stand_in: StandIn, core: CoreFile
) -> None:
    plan = object.__new__(Plan)
    plan._fds, plan._core = [], None
    stand_in.add_dump(2 * PAGE)
    image = Segment(0x200000, PAGE, 99, 0, PREAD, "image")
    first, _, other = plan._in_place([*procvmcore.segments(core.fd, core.header), image], core)
    assert os.pread(first.fd, PAGE, first.offset) == pattern(0x5000, PAGE)
    assert other == image
    assert open_for_reading(stand_in.path) == 1
    plan.close()
    assert open_for_reading(stand_in.path) == 0


def test_collector_inside_is_not_believed_if_memory_was_shifted_under_its_mappings(
    stand_in: StandIn, core: CoreFile
) -> None:
    plan = object.__new__(Plan)
    plan._fds, plan._core = [], None
    plan._in_place(procvmcore.segments(core.fd, core.header), core)
    plan.check_in_place()
    stand_in.add_dump()
    with pytest.raises(Error, match="/proc/vmcore: a device dump was added to it while the command ran"):
        plan.check_in_place()
    plan.close()


def test_file_that_is_gone_is_told_where_a_collector_would_map_it(tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path / "vmcore")
    core = CoreFile(stand_in.path, "/proc/vmcore")
    _only_notes(stand_in)
    with pytest.raises(SourceError, match="/proc/vmcore: cannot be read again: Stale file handle"):
        core.settled()
    assert open_for_reading(stand_in.path) == 0
    core.close()


def test_segment_of_another_core_file_is_refused(stand_in: StandIn, core: CoreFile) -> None:
    segments = procvmcore.segments(core.fd, core.header)
    with pytest.raises(SourceError, match="/proc/vmcore: memory at 0x5000 is read by way of another file"):
        OldMemory(segments, Registry())
