# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.sources import smbios
from capture.sources.report import RAM, Problems
from guard.ranges import RangeSet

END_OF_TABLE = struct.pack("<BBH", 127, 4, 0x7F00) + b"\0\0"
BIOS = struct.pack("<BBH", 0, 8, 0) + bytes(4) + b"SeaBIOS\x001.16\0\0"


def mapped(start: int, end: int, extended: bool = False, handle: int = 0x1300) -> bytes:
    """A type 19 structure of SMBIOS 2.7 for the bytes [start, end)."""
    kib = (0xFFFFFFFF, 0xFFFFFFFF) if extended else (start >> 10, (end - 1) >> 10)
    addresses = (start, end - 1) if extended else (0, 0)
    return struct.pack("<BBHIIHBQQ", 19, 31, handle, *kib, 0x1000, 1, *addresses) + b"\0\0"


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
