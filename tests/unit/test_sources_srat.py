# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.sources import srat
from capture.sources.report import HOTPLUG_WINDOW, PERSISTENT, RAM, Problems
from guard.ranges import RangeSet

ENABLED, HOT, NON_VOLATILE = 1, 2, 4
CPU_AFFINITY = bytes([0, 16]) + bytes(14)


def memory(base: int, length: int, flags: int = ENABLED, proximity: int = 0) -> bytes:
    return struct.pack("<BBIHQQIIQ", 1, 40, proximity, 0, base, length, 0, flags, 0)


def table(*subtables: bytes) -> bytes:
    body = b"".join(subtables)
    header = struct.pack("<4sIBB6s8sI4sIIQ", b"SRAT", 48 + len(body), 1, 0, b"BOCHS ", b"BXPC    ", 1, b"BXPC", 1, 1, 0)
    return signed(header + body)


def signed(data: bytes) -> bytes:
    checksum = -(sum(data) - data[9]) & 0xFF
    return data[:9] + bytes([checksum]) + data[10:]


def bad_checksum(data: bytes) -> bytes:
    return data[:9] + bytes([data[9] ^ 1]) + data[10:]


def with_length(data: bytes, length: int) -> bytes:
    return signed(data[:4] + struct.pack("<I", length) + data[8:])


def put(root: Path, data: bytes) -> str:
    path = root / "sys/firmware/acpi/tables/SRAT"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return str(root)


GOOD = table(
    CPU_AFFINITY,
    memory(0, 0xA0000),
    memory(0x100000, 0x7FF00000, proximity=1),
    memory(0x1_0000_0000, 0x1_0000_0000, ENABLED | HOT, 1),
    memory(0x3_0000_0000, 0x1000_0000, ENABLED | NON_VOLATILE),
    memory(0, 0, 0),
)


def test_ranges_are_told_by_flags(tmp_path: Path) -> None:
    report = srat.read(put(tmp_path, GOOD))
    assert report.available
    assert report.problems == ()
    assert report.path == f"{tmp_path}/sys/firmware/acpi/tables/SRAT"
    assert report.ranges(RAM) == RangeSet([(0, 0xA0000), (0x100000, 0x80000000)])
    assert report.ranges(HOTPLUG_WINDOW) == RangeSet([(0x1_0000_0000, 0x2_0000_0000)])
    assert report.ranges(PERSISTENT) == RangeSet([(0x3_0000_0000, 0x3_1000_0000)])
    assert report.findings[1].detail == "proximity domain 1"


def test_disabled_entry_is_no_finding_and_no_problem() -> None:
    problems = Problems()
    assert srat.parse(table(memory(0, 0x1000, HOT)), "SRAT", problems) == ([], True)
    assert problems.lines() == ()


def test_hot_pluggable_persistent_memory_is_persistent() -> None:
    assert [f.kind for f in srat.parse(table(memory(0, 4096, 7)), "SRAT", Problems())[0]] == [PERSISTENT]


def test_table_with_bad_checksum_only_narrows(tmp_path: Path) -> None:
    report = srat.read(put(tmp_path, bad_checksum(GOOD)))
    assert report.available
    assert report.narrows_only
    assert report.ranges(RAM) == RangeSet([(0, 0xA0000), (0x100000, 0x80000000)])
    assert report.ranges(HOTPLUG_WINDOW) == RangeSet([(0x1_0000_0000, 0x2_0000_0000)])
    assert len(report.damage) == 1


@pytest.mark.parametrize("data", [GOOD, b"APIC" + GOOD[4:], GOOD[:-1]])
def test_table_that_is_right_or_no_table_at_all_is_none_that_narrows(tmp_path: Path, data: bytes) -> None:
    report = srat.read(put(tmp_path, data))
    assert not report.narrows_only
    assert bool(report.findings) == (data == GOOD)


def test_absent_table_is_told(tmp_path: Path) -> None:
    report = srat.read(str(tmp_path))
    assert not report.available
    assert report.problems == (f"{tmp_path}/sys/firmware/acpi/tables/SRAT: absent",)


def test_table_of_more_than_a_mebibyte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sys/firmware/acpi/tables/SRAT"
    path.parent.mkdir(parents=True)
    with path.open("wb") as stream:
        stream.truncate((1 << 20) + 1)
    report = srat.read(str(tmp_path))
    assert not report.available
    assert "SRAT: has 1048577 bytes, expected at most 1048576; ignored" in report.problems[0]


TWO = table(memory(0, 0x1000), memory(0x1000, 0x1000))

BAD = [
    (b"", 0, "SRAT: has 0 bytes, expected at least 48"),
    (GOOD[:47], 0, "SRAT: has 47 bytes, expected at least 48"),
    (b"APIC" + GOOD[4:], 0, "signature is b'APIC', expected b'SRAT'"),
    (GOOD[:-1], 0, f"length at offset 4 is {len(GOOD)}, expected 48 to {len(GOOD) - 1}"),
    (with_length(GOOD, 0xFFFFFFFF), 0, "length at offset 4 is 4294967295"),
    (with_length(GOOD, 47), 0, "length at offset 4 is 47"),
    (bad_checksum(GOOD), 4, "bad checksum); it may narrow what others call memory, and adds nothing"),
    (signed(TWO[:89] + b"\0" + TWO[90:]), 1, "subtable at offset 88 has length 0, expected 2 to 40"),
    (signed(TWO[:89] + b"\1" + TWO[90:]), 1, "subtable at offset 88 has length 1, expected 2 to 40"),
    (signed(TWO[:89] + b"\x29" + TWO[90:]), 1, "subtable at offset 88 has length 41, expected 2 to 40"),
    (table(memory(0, 0x1000), b"\1"), 1, "subtable at offset 88 has length 0, expected 2 to 1"),
    (table(bytes([1, 24]) + bytes(22), memory(0, 0x1000)), 1, "entry at offset 48: has length 24, expected 40"),
    (table(memory(0x5000, 0), memory(0, 0x1000)), 1, "entry at offset 48: range starts at 0x5000"),
    (table(memory(1 << 63, 1 << 63), memory(0, 0x1000)), 1, "entry at offset 48: range 0x8000000000000000-"),
]


@pytest.mark.parametrize(("data", "kept", "message"), BAD)
def test_bad_table_is_named_and_what_is_sound_kept(data: bytes, kept: int, message: str) -> None:
    problems = Problems()
    findings, _ = srat.parse(data, "SRAT", problems)
    assert len(findings) == kept
    assert len(problems.lines()) == 1
    assert message in problems.lines()[0]
    assert problems.lines()[0].startswith("SRAT: ")


def test_a_flood_of_problems_is_cut_short() -> None:
    problems = Problems()
    srat.parse(table(*[memory(4096, 0)] * 1000), "SRAT", problems)
    lines = problems.lines()
    assert len(lines) < 20
    assert lines[-1] == "984 more problems of the same source are not shown"


@given(st.lists(st.tuples(st.integers(0, 1 << 52), st.integers(1, 1 << 52), st.integers(0, 7)), max_size=40))
def test_every_enabled_entry_comes_back(entries: list[tuple[int, int, int]]) -> None:
    problems = Problems()
    data = table(*(part for entry in entries for part in (CPU_AFFINITY, memory(*entry))))
    findings, _ = srat.parse(data, "SRAT", problems)
    assert [(f.start, f.end - f.start) for f in findings] == [e[:2] for e in entries if e[2] & ENABLED]
    assert problems.lines() == ()


@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_never_raise(body: bytes, framed: bool) -> None:
    for finding in srat.parse(table(body) if framed else body, "SRAT", Problems())[0]:
        assert 0 <= finding.start < finding.end <= 1 << 56
