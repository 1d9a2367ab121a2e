# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.sources import smbios
from capture.sources.report import OTHER_MEMORY, RAM, Problems, SourceReport
from guard.ranges import RangeSet

END_OF_TABLE = struct.pack("<BBH", 127, 4, 0x7F00) + b"\0\0"
BIOS = struct.pack("<BBH", 0, 8, 0) + bytes(4) + b"SeaBIOS\x001.16\0\0"


SYSTEM_ARRAY, OTHER_ARRAY, NO_ARRAY = 0x1000, 0x1001, 0xFFFE
VIDEO, FLASH, NON_VOLATILE, CACHE = 4, 5, 6, 7
UNKNOWN_USE, SYSTEM = 2, 3


def array(use: int, handle: int = OTHER_ARRAY) -> bytes:
    """A type 16 structure of SMBIOS 2.7."""
    return struct.pack("<BBHBBBIHHQ", 16, 23, handle, 3, use, 3, 0x80000000, NO_ARRAY, 1, 0) + b"\0\0"


def mapped(start: int, end: int, extended: bool = False, handle: int = 0x1300, of_array: int = SYSTEM_ARRAY) -> bytes:
    """A type 19 structure of SMBIOS 2.7 for the bytes [start, end)."""
    kib = (0xFFFFFFFF, 0xFFFFFFFF) if extended else (start >> 10, (end - 1) >> 10)
    addresses = (start, end - 1) if extended else (0, 0)
    return struct.pack("<BBHIIHBQQ", 19, 31, handle, *kib, of_array, 1, *addresses) + b"\0\0"


def short(start_kib: int, end_kib: int) -> bytes:
    """A type 19 structure of SMBIOS 2.1."""
    return struct.pack("<BBHIIHB", 19, 15, 0x1300, start_kib, end_kib, 0x1000, 1) + b"\0\0"


def put(root: Path, name: str, data: bytes) -> None:
    path = root / "sys/firmware/dmi" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


TIB = 1 << 40
GOOD = BIOS + mapped(0, 0x80000000) + short(0x400000, 0x5FFFFF) + mapped(5 * TIB, 6 * TIB, extended=True) + END_OF_TABLE
GOOD_RANGES = RangeSet([(0, 0x80000000), (0x1_0000_0000, 0x1_8000_0000), (5 * TIB, 6 * TIB)])


def test_whole_table_is_read(tmp_path: Path) -> None:
    put(tmp_path, "tables/DMI", GOOD)
    report = smbios.read(str(tmp_path))
    assert report.available
    assert report.problems == ()
    assert report.ranges(RAM) == GOOD_RANGES
    assert report.findings[0].detail == "handle 0x1300"


def test_entries_of_dmi_sysfs_stand_in_for_an_absent_table(tmp_path: Path) -> None:
    put(tmp_path, "entries/19-0/raw", mapped(0, 0x80000000))
    put(tmp_path, "entries/19-1/raw", mapped(0x1_0000_0000, 0x1_4000_0000))
    put(tmp_path, "entries/17-0/raw", bytes(40))
    put(tmp_path, "entries/19-x/raw", bytes(40))
    report = smbios.read(str(tmp_path))
    assert report.available
    assert report.path.endswith("dmi/entries")
    assert [line for line in report.problems if "tables/DMI: absent" not in line] == []
    assert report.ranges(RAM) == RangeSet([(0, 0x80000000), (0x1_0000_0000, 0x1_4000_0000)])


MIB = 1 << 20
FLASH_RANGE = (0xFF000000, 0x1_0000_0000)


def told(*structures: bytes) -> SourceReport:
    problems = Problems()
    findings = tuple(smbios.parse(b"".join(structures) + END_OF_TABLE, "DMI", problems))
    return SourceReport("smbios", "DMI", findings, problems.lines(), available=True)


@pytest.mark.parametrize("use", [0, 1, UNKNOWN_USE, VIDEO, FLASH, NON_VOLATILE, CACHE, 8, 0xFF])
@pytest.mark.parametrize("arrays_first", [True, False])
def test_range_of_an_array_that_is_no_system_memory_is_no_ram(use: int, arrays_first: bool) -> None:
    arrays = array(SYSTEM, SYSTEM_ARRAY) + array(use)
    ranges = mapped(0, 256 * MIB) + mapped(*FLASH_RANGE, of_array=OTHER_ARRAY)
    report = told(arrays, ranges) if arrays_first else told(ranges, arrays)
    assert report.ram() == report.ranges(RAM) == RangeSet([(0, 256 * MIB)])
    assert report.ranges(OTHER_MEMORY) == RangeSet([FLASH_RANGE])
    assert report.problems == ()


def test_flash_inside_of_a_range_without_a_hole_is_taken_off_it() -> None:
    arrays = array(SYSTEM, SYSTEM_ARRAY) + array(FLASH)
    report = told(arrays, mapped(0, 16 << 30), mapped(*FLASH_RANGE, of_array=OTHER_ARRAY))
    assert report.ram() == RangeSet([(0, FLASH_RANGE[0]), (FLASH_RANGE[1], 16 << 30)])
    assert report.problems == ()


@pytest.mark.parametrize("at", [(0, MIB), (255 * MIB, 256 * MIB)])
def test_other_memory_at_either_end_of_a_system_memory_range_is_taken_off_it(at: tuple[int, int]) -> None:
    arrays = array(SYSTEM, SYSTEM_ARRAY) + array(VIDEO)
    report = told(arrays, mapped(0, 256 * MIB), mapped(*at, of_array=OTHER_ARRAY))
    assert report.ram() == RangeSet([(0, 256 * MIB)]) - RangeSet([at])


CONTRADICTIONS = [
    (16 * MIB, 256 * MIB),  # the same
    (16 * MIB, 257 * MIB),
    (15 * MIB, 256 * MIB),
    (0, 1024 * MIB),
    (0, 17 * MIB),
    (255 * MIB, 512 * MIB),
]


@pytest.mark.parametrize("span", CONTRADICTIONS)
def test_other_memory_that_is_not_inside_of_a_system_memory_range_takes_none_of_it(span: tuple[int, int]) -> None:
    arrays = array(SYSTEM, SYSTEM_ARRAY) + array(CACHE)
    report = told(arrays, mapped(16 * MIB, 256 * MIB), mapped(*span, of_array=OTHER_ARRAY))
    assert report.ram() == RangeSet([(16 * MIB, 256 * MIB)])
    assert report.problems == (
        f"DMI: type 19 structure at offset {2 * len(array(0)) + len(FIRST)}: array 0x1001 is no system memory, another "
        "one that is has the same range; ignored",
    )


def test_range_that_leads_to_no_array_is_believed() -> None:
    assert told(array(FLASH), mapped(0, 256 * MIB, of_array=NO_ARRAY)).ram() == RangeSet([(0, 256 * MIB)])
    short_array = struct.pack("<BBHB", 16, 5, SYSTEM_ARRAY, FLASH) + b"\0\0"
    assert told(short_array, mapped(0, 256 * MIB)).ram() == RangeSet([(0, 256 * MIB)])


def test_array_of_unknown_use_is_system_memory_where_firmware_names_none() -> None:
    ranges = mapped(0, 256 * MIB) + mapped(*FLASH_RANGE, of_array=OTHER_ARRAY)
    report = told(array(UNKNOWN_USE, SYSTEM_ARRAY), array(FLASH), ranges)
    assert report.ram() == RangeSet([(0, 256 * MIB)])


def test_handle_that_two_arrays_have_is_system_memory_if_one_of_them_is() -> None:
    for uses in ((FLASH, SYSTEM), (SYSTEM, FLASH)):
        assert told(*(array(use, SYSTEM_ARRAY) for use in uses), mapped(0, MIB)).ram() == RangeSet([(0, MIB)])


def test_arrays_are_read_from_the_entries_of_dmi_sysfs_too(tmp_path: Path) -> None:
    put(tmp_path, "entries/19-0/raw", mapped(0, 0x80000000))
    put(tmp_path, "entries/19-1/raw", mapped(*FLASH_RANGE, of_array=OTHER_ARRAY))
    put(tmp_path, "entries/16-0/raw", array(SYSTEM, SYSTEM_ARRAY))
    put(tmp_path, "entries/16-1/raw", array(FLASH))
    report = smbios.read(str(tmp_path))
    assert report.ram() == RangeSet([(0, 0x80000000)])
    assert report.ranges(OTHER_MEMORY) == RangeSet([FLASH_RANGE])
    assert report.damage == []


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 24)), max_size=6)


@given(SPANS, SPANS)
def test_other_memory_takes_only_what_lies_inside_of_larger_ranges(
    system: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    ours, others = ([(s, s + length) for s, length in spans] for spans in (system, other))
    arrays = array(SYSTEM, SYSTEM_ARRAY) + array(FLASH)
    structures = [mapped(s << 10, e << 10) for s, e in ours]
    structures += [mapped(s << 10, e << 10, of_array=OTHER_ARRAY) for s, e in others]
    taken = [
        o
        for o in others
        if all(s[1] <= o[0] or o[1] <= s[0] or (s != o and s[0] <= o[0] and o[1] <= s[1]) for s in ours)
    ]
    expected = RangeSet((s << 10, e << 10) for s, e in ours) - RangeSet((s << 10, e << 10) for s, e in taken)
    report = told(arrays, *structures)
    assert report.ram() == expected
    assert len(report.problems) == len(others) - len(taken)


def test_table_full_of_ranges_is_told_apart_in_no_time() -> None:
    half = 10_000
    ranges = b"".join(mapped(i << 12, (2 * half + i) << 12) for i in range(half))
    ranges += b"".join(mapped(i << 12, (i + 1) << 12, of_array=OTHER_ARRAY) for i in range(half))
    before = time.process_time()
    told(array(SYSTEM, SYSTEM_ARRAY), array(FLASH), ranges).ram()
    assert time.process_time() - before < 5


def test_absent_is_not_the_same_as_read_without_findings(tmp_path: Path) -> None:
    assert not smbios.read(str(tmp_path)).available
    put(tmp_path, "tables/DMI", BIOS + END_OF_TABLE)
    report = smbios.read(str(tmp_path))
    assert report.available
    assert not report.findings
    assert not report.problems


def test_nothing_behind_the_end_of_table_is_looked_at() -> None:
    problems = Problems()
    assert smbios.parse(END_OF_TABLE + mapped(0, 0x1000) + b"\xff", "DMI", problems) == []
    assert problems.lines() == ()


FIRST = mapped(0, 0x1000)
BAD = [
    (FIRST + b"\x13\x1f", 1, "2 bytes left at offset 33, expected at least 4"),
    (FIRST + b"\x13\x00\0\0\0\0", 1, "structure at offset 33 has length 0, expected 4 to 6"),
    (FIRST + b"\x13\xff\0\0\0\0", 1, "structure at offset 33 has length 255, expected 4 to 6"),
    (FIRST[:-1], 1, "strings of the structure at offset 0 do not end"),
    (
        b"\x13\x0e\0\0" + bytes(10) + b"\0\0" + FIRST,
        1,
        "type 19 structure at offset 0: has length 14, expected at least",
    ),
    (short(0xFFFFFFFF, 0xFFFFFFFF) + FIRST, 1, "offset 0: addresses are in the extended fields, but its length is 15"),
    (short(0x400, 0x3FE) + FIRST, 1, "offset 0: range starts at 0x100000 and ends before 0xffc00"),
    (mapped(0, 1 << 64, extended=True) + FIRST, 1, "offset 0: range 0x0-0xffffffffffffffff is beyond"),
]


@pytest.mark.parametrize(("data", "kept", "message"), BAD)
def test_bad_structure_is_named_and_what_is_sound_kept(data: bytes, kept: int, message: str) -> None:
    problems = Problems()
    assert len(smbios.parse(data, "DMI", problems)) == kept
    assert len(problems.lines()) == 1
    assert message in problems.lines()[0]


@given(st.lists(st.tuples(st.integers(0, (1 << 52) >> 10), st.integers(1, 1 << 30)), max_size=30))
def test_every_range_comes_back(ranges: list[tuple[int, int]]) -> None:
    problems = Problems()
    spans = [(start << 10, (start + length) << 10) for start, length in ranges]
    data = b"".join(BIOS + mapped(*span, extended=span[1] > 4 * TIB - 1024) for span in spans)
    findings = smbios.parse(data + END_OF_TABLE, "DMI", problems)
    assert [(f.start, f.end) for f in findings] == spans
    assert problems.lines() == ()


@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_never_raise(data: bytes, behind_a_good_one: bool) -> None:
    for finding in smbios.parse(FIRST + data if behind_a_good_one else data, "DMI", Problems()):
        assert 0 <= finding.start < finding.end <= 1 << 56
