# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading the kernel's own vmcore header, sound and damaged."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import elfcore
from capture.elfcore import Load
from guard import procvmcore
from guard.errors import SourceError
from guard.physmem import PREAD, OldMemory, covered
from guard.procvmcore import ProgramHeader
from guard.ranges import Range, RangeSet
from guard.registry import Registry

PAGE = 4096
OpenFile = Callable[[bytes], int]


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[OpenFile]:
    opened: list[int] = []

    def open_it(data: bytes) -> int:
        path = tmp_path / f"{len(opened)}"
        path.write_bytes(data)
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1]

    yield open_it
    for fd in opened:
        os.close(fd)


def core(*loads: tuple[int, int]) -> elfcore.Core:
    return elfcore.build(62, b"notes", [Load(start, 0, end - start) for start, end in loads], 4)


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, *values)
    return bytes(changed)


def test_header_comes_back_as_it_was_built(open_file: OpenFile) -> None:
    built = core((0x100000, 0x200000), (0x300800, 0x400400))
    header = procvmcore.read_header(open_file(built.header), "vmcore")
    assert header.phdrs == built.phdrs
    assert (header.machine, header.byteorder, header.size) == (62, "<", len(built.header))


def test_segments_show_every_page_that_a_ptload_touches_at_its_place_in_the_file(open_file: OpenFile) -> None:
    ranges = [(0x5000, 0x7000), (0x100800, 0x103400), (0x6000, 0x9000)]
    built = core(*ranges)
    data = built.header + b"".join(bytes((i,)) * e.size for i, e in enumerate(built.extents, 1))
    fd = open_file(data)
    segments = procvmcore.segments(fd, procvmcore.read_header(fd, "vmcore"), how=PREAD)
    assert covered(segments) == RangeSet(ranges).outer_pages(PAGE)
    memory = OldMemory(segments, Registry())
    assert memory.read(0x5000, 0x1000) == b"\1" * 0x1000
    assert memory.read(0x6000, 0x1000) in (b"\1" * 0x1000, b"\3" * 0x1000)
    assert memory.read(0x7000, 0x2000) == b"\3" * 0x2000
    assert memory.read(0x100000, 0x4000) == b"\2" * 0x4000
    assert memory.faults() == []


def test_backup_of_low_memory_with_another_offset_in_the_page_is_not_taken_for_whole_pages(
    open_file: OpenFile,
) -> None:
    """kexec -c copies the first 640 KiB away to wherever there is room, and p_offset follows the copy."""
    p = ProgramHeader(procvmcore.PT_LOAD, 7, 0x3400, 0, 0x1000, 0x9EC00, 0x9EC00, 0)
    assert procvmcore.shown_by(p) == Range(0x1000, 0x9FC00)
    header = procvmcore.CoreHeader(62, "<", (p,))
    (segment,) = procvmcore.segments(0, header)
    assert (segment.paddr, segment.end, segment.offset) == (0x1000, 0x9F000, 0x3400)
    assert header.size == 0x3000


def test_tens_of_thousands_of_ptloads_are_laid_out_at_once(open_file: OpenFile) -> None:
    built = core(*((n * 0x4000, n * 0x4000 + 0x2000) for n in range(60_000)))
    fd = open_file(built.header)
    segments = procvmcore.segments(fd, procvmcore.read_header(fd, "vmcore"))
    assert len(segments) == 60_000


@pytest.mark.parametrize(
    ("at", "form", "values", "wrong"),
    [
        (0, "4s", (b"ELF\x7f",), "offset 0x0: no ELF magic"),
        (4, "B", (1,), "offset 0x4: not a 64-bit ELF file"),
        (5, "B", (3,), "offset 0x4: not a 64-bit ELF file of a known byte order"),
        (16, "<H", (2,), r"offset 0x10: e_type 2, expected 4 \(ET_CORE\)"),
        (32, "<Q", (1 << 63,), "beyond the end of any file"),
        (32, "<Q", ((1 << 64) - 1,), "beyond the end of any file"),
        (32, "<Q", (1 << 40,), "ends at 0x10000000000"),
        (54, "<H", (32,), "program headers of 32 bytes, expected 56"),
        (56, "<H", (0,), "0 program headers"),
        (56, "<H", (0xFFFE,), "ends at"),
        (56, "<H", (0xFFFF,), "ends at"),
        (64 + 56 + 40, "<Q", ((1 << 64) - 1,), "program header 1: 0xffffffffffffffff bytes at offset 0x2000"),
        (64 + 56 + 24, "<Q", ((1 << 64) - 0x1000,), "program header 1: 0x100000 bytes at offset 0x2000 cannot be"),
        (64 + 56 + 8, "<Q", ((1 << 64) - 0x1000,), "program header 1: 0x100000 bytes at offset 0xfffffffffffff000"),
        (64 + 56 + 8, "<Q", (1 << 40,), "memory begins at 0x10000000000, expected a header of at most"),
    ],
)
def test_damaged_header_is_one_clear_error(
    at: int, form: str, values: tuple[int, ...], wrong: str, open_file: OpenFile
) -> None:
    good = core((0x100000, 0x200000)).header
    with pytest.raises(SourceError, match=wrong) as caught:
        procvmcore.read_header(open_file(patched(good, at, form, *values)), "vmcore")
    assert str(caught.value).startswith("vmcore: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 63, 64, 100, 175])
def test_header_cut_short_is_told_with_where_it_ends(size: int, open_file: OpenFile) -> None:
    good = core((0x100000, 0x200000)).header
    with pytest.raises(SourceError, match=f"ends at {size:#x}"):
        procvmcore.read_header(open_file(good[:size]), "vmcore")


def test_what_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(SourceError, match="vmcore: Is a directory at 0x0"):
        procvmcore.read_header(fd, "vmcore")
    os.close(fd)


def test_number_of_program_headers_beyond_16_bits_is_taken_from_section_header_0(open_file: OpenFile) -> None:
    """System V gABI, "Program Header": e_phnum is 0xffff, and the count in sh_info."""
    n = 65_600
    table = b"".join(struct.pack("<IIQQQQQQ", 1, 7, 0x400000 + i * PAGE, 0, i * PAGE, PAGE, PAGE, 0) for i in range(n))
    ehdr = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", *(4, 62, 1, 0, 64, 64 + len(table), 0, 64, 56, 0xFFFF, 64, 1, 0)
    )
    section = struct.pack("<IIQQQQIIQQ", *(0, 0, 0, 0, 0, 0, 0, n, 0, 0))
    header = procvmcore.read_header(open_file(ehdr + table + section), "vmcore")
    assert len(header.phdrs) == n
    assert header.phdrs[-1].paddr == (n - 1) * PAGE


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 64 + 56 * 3), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
def test_no_damage_makes_anything_but_our_own_error(changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(core((0x100000, 0x200000), (0x300800, 0x400400)).header)
    for at, change in changes:
        data[at : at + len(change)] = change
    fd = os.memfd_create("vmcore")
    try:
        os.write(fd, data)
        try:
            header = procvmcore.read_header(fd, "vmcore")
        except SourceError:
            return
        assert 0 <= header.size <= procvmcore.MAX_HEADER
        segments = procvmcore.segments(fd, header, how=PREAD)
        OldMemory(segments, Registry())
    finally:
        os.close(fd)
