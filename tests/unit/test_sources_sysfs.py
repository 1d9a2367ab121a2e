# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sources that are folders of small sysfs files: firmware_memmap and memory_blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.sources import files, firmware_memmap, memory_blocks
from capture.sources.report import (
    ACPI,
    NO_RAM,
    NVS,
    OFFLINE,
    ONLINE,
    PERSISTENT,
    RAM,
    RESERVED,
    SOFT_RESERVED,
    UNKNOWN,
    UNUSABLE,
)
from guard.ranges import RangeSet

MIB = 1 << 20


def put_memmap(root: Path, *entries: tuple[str, str, str]) -> Path:
    folder = root / "sys/firmware/memmap"
    folder.mkdir(parents=True)
    for number, entry in enumerate(entries):
        (folder / str(number)).mkdir()
        for name, text in zip(("start", "end", "type"), entry, strict=True):
            (folder / str(number) / name).write_text(text + "\n")
    return folder


def put_blocks(root: Path, size: str, states: dict[int, str]) -> Path:
    folder = root / "sys/devices/system/memory"
    folder.mkdir(parents=True)
    (folder / "block_size_bytes").write_text(size + "\n")
    (folder / "auto_online_blocks").write_text("online\n")
    for number, state in states.items():
        (folder / f"memory{number}").mkdir()
        (folder / f"memory{number}/state").write_text(state + "\n")
    return folder


def test_memmap_entries_are_told_by_type_with_inclusive_ends(tmp_path: Path) -> None:
    put_memmap(
        tmp_path,
        ("0x0", "0x9fbff", "System RAM"),
        ("0x9fc00", "0x9ffff", "Reserved"),
        ("0xf0000", "0xfffff", "reserved"),
        ("0x100000000", "0x13fffffff", "Persistent Memory (legacy)"),
        ("0x200000000", "0x200000fff", "Unknown E820 type"),
    )
    report = firmware_memmap.read(str(tmp_path))
    assert report.available
    assert report.problems == ()
    assert report.ranges(RAM) == RangeSet([(0, 0x9FC00)])
    assert report.ranges(RESERVED) == RangeSet([(0x9FC00, 0xA0000), (0xF0000, 0x100000)])
    assert report.ranges(PERSISTENT) == RangeSet([(0x1_0000_0000, 0x1_4000_0000)])
    assert report.ranges(UNKNOWN) == RangeSet([(0x2_0000_0000, 0x2_0000_1000)])


TYPES = [
    ("System RAM", RAM),
    ("Reserved", RESERVED),
    ("reserved", RESERVED),
    ("ACPI Tables", ACPI),
    ("ACPI Non-volatile Storage", NVS),
    ("Unusable memory", UNUSABLE),
    ("Persistent Memory", PERSISTENT),
    ("Persistent Memory (legacy)", PERSISTENT),
    ("Soft Reserved", SOFT_RESERVED),
    ("Unknown E820 type", UNKNOWN),
    ("Application Reserved", UNKNOWN),
    ("", UNKNOWN),
]


@pytest.mark.parametrize(("name", "kind"), TYPES)
def test_memmap_type_that_no_kernel_prints_is_no_ram(tmp_path: Path, name: str, kind: str) -> None:
    put_memmap(tmp_path, ("0x1000", "0x1fff", name))
    report = firmware_memmap.read(str(tmp_path))
    assert report.ranges(kind) == RangeSet([(0x1000, 0x2000)])
    assert bool(report.ranges(*NO_RAM)) == (kind not in (RAM, PERSISTENT, SOFT_RESERVED))


def test_memmap_entries_keep_the_order_of_the_firmware(tmp_path: Path) -> None:
    put_memmap(tmp_path, *[(hex(n * 4096), hex(n * 4096 + 4095), "System RAM") for n in range(12)])
    findings = firmware_memmap.read(str(tmp_path)).findings
    assert [f.start for f in findings] == [n * 4096 for n in range(12)]


BAD_MEMMAP = [
    (("", "0xfff", "System RAM"), "/0/start: expected a hexadecimal number, found ''"),
    (("0x0", "-0x1", "System RAM"), "/0/end: expected a hexadecimal number, found '-0x1'"),
    (("0x0", "0x1_000", "System RAM"), "/0/end: expected a hexadecimal number, found '0x1_000'"),
    (("0x0", "0x" + "f" * 17, "System RAM"), "/0/end: expected a hexadecimal number"),
    (("0x0", "0x" + "f" * 16, "System RAM"), "/0: range 0x0-0xffffffffffffffff is beyond"),
    (("0x2000", "0x1000", "System RAM"), "/0: range starts at 0x2000 and ends before 0x1001"),
]


@pytest.mark.parametrize(("entry", "message"), BAD_MEMMAP)
def test_bad_memmap_entry_is_named_and_the_others_kept(
    tmp_path: Path, entry: tuple[str, str, str], message: str
) -> None:
    put_memmap(tmp_path, entry, ("0x100000", "0x1fffff", "System RAM"))
    report = firmware_memmap.read(str(tmp_path))
    assert [(f.start, f.end) for f in report.findings] == [(0x100000, 0x200000)]
    assert len(report.problems) == 1
    assert message in report.problems[0]


def test_memmap_entry_without_a_file_is_named(tmp_path: Path) -> None:
    folder = put_memmap(tmp_path, ("0x0", "0xfff", "System RAM"), ("0x1000", "0x1fff", "System RAM"))
    (folder / "0/type").unlink()
    report = firmware_memmap.read(str(tmp_path))
    assert len(report.findings) == 1
    assert report.problems == (f"{folder}/0/type: absent",)


def test_blocks_of_one_state_are_joined(tmp_path: Path) -> None:
    put_blocks(tmp_path, "8000000", {0: "online", 1: "online", 2: "offline", 10: "going-offline", 32: "online"})
    report = memory_blocks.read(str(tmp_path))
    assert report.available
    assert report.problems == ()
    assert report.ranges(ONLINE) == RangeSet(
        [(0, 256 * MIB), (1280 * MIB, 1408 * MIB), (4096 * MIB, 4096 * MIB + 128 * MIB)]
    )
    assert report.ranges(OFFLINE) == RangeSet([(256 * MIB, 384 * MIB)])
    assert [f.detail for f in report.findings] == [
        "memory0 to memory1: online",
        "memory2: offline",
        "memory10: going-offline",
        "memory32: online",
    ]


BAD_BLOCK_SIZES = [
    ("", "expected a hexadecimal number, found ''"),
    ("128M", "expected a hexadecimal number, found '128M'"),
    ("0", "0x0 is not a power of two from 4096 on"),
    ("8000001", "0x8000001 is not a power of two from 4096 on"),
    ("800", "0x800 is not a power of two from 4096 on"),
]


@pytest.mark.parametrize(("size", "message"), BAD_BLOCK_SIZES)
def test_bad_block_size_makes_the_blocks_unavailable(tmp_path: Path, size: str, message: str) -> None:
    put_blocks(tmp_path, size, {0: "online"})
    report = memory_blocks.read(str(tmp_path))
    assert not report.available
    assert report.findings == ()
    assert len(report.problems) == 1
    assert f"memory/block_size_bytes: {message}" in report.problems[0]


def test_bad_block_is_named_and_the_others_kept(tmp_path: Path) -> None:
    folder = put_blocks(tmp_path, "8000000", {0: "online", 1: "ERROR-UNKNOWN-9", 2: "online", 1 << 40: "online"})
    (folder / "memory3").mkdir()
    report = memory_blocks.read(str(tmp_path))
    assert report.ranges(ONLINE) == RangeSet([(0, 128 * MIB), (256 * MIB, 384 * MIB)])
    assert len(report.problems) == 3
    assert (
        "memory1/state: expected one of online, going-offline, offline, found 'ERROR-UNKNOWN-9'" in report.problems[0]
    )
    assert report.problems[1] == f"{folder}/memory3/state: absent"
    assert f"memory{1 << 40}: range 0x80000000000000" in report.problems[2]


@pytest.mark.parametrize("source", [firmware_memmap, memory_blocks])
def test_absent_folder_is_one_problem(tmp_path: Path, source: object) -> None:
    report = source.read(str(tmp_path))  # type: ignore[attr-defined]
    assert not report.available
    assert len(report.problems) == 1
    assert report.problems[0].endswith(": absent")


@given(st.text(max_size=24))
def test_numbers_are_read_as_the_kernel_prints_them_or_not_at_all(text: str) -> None:
    value = files.hexadecimal(text)
    assert value is None or (0 <= value < 1 << 64 and int(text, 16) == value and text.isascii() and "_" not in text)
    count = files.decimal(text)
    assert count is None or str(count) == text
