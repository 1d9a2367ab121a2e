# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.sources import fw_cfg
from capture.sources.report import (
    ACPI,
    NVS,
    PERSISTENT,
    RAM,
    RESERVED,
    SOFT_RESERVED,
    UNKNOWN,
    UNUSABLE,
    VMCOREINFO,
    Problems,
    SourceReport,
)
from guard.ranges import RangeSet

BOOT_MAP = [(0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (0x100000, 0x7FEE0000, 1), (0x1_0000_0000, 0x4000_0000, 1)]


def e820(entries: list[tuple[int, int, int]]) -> bytes:
    return b"".join(struct.pack("<QQI", *entry) for entry in entries)


def note(guest_format: int = 1, size: int = 0x1024, paddr: int = 0x1234000, host_format: int = 0) -> bytes:
    return struct.pack("<HHIQ", host_format, guest_format, size, paddr)


def put(root: Path, name: str, raw: bytes, size: str | None = None) -> Path:
    folder = root / "sys/firmware/qemu_fw_cfg/by_name" / name
    folder.mkdir(parents=True)
    (folder / "raw").write_bytes(raw)
    if size is not None:
        (folder / "size").write_text(size)
    return folder


def test_boot_map_is_told_by_type(tmp_path: Path) -> None:
    put(tmp_path, "etc/e820", e820([*BOOT_MAP, (0x8000_0000, 0x1000, 3), (0x8000_1000, 0x1000, 4)]), "120\n")
    put(tmp_path, "etc/vmcoreinfo", note(), "16\n")
    report = fw_cfg.read(str(tmp_path))
    assert report.available
    assert report.problems == ()
    assert report.ranges(RAM) == RangeSet([(0, 0x9FC00), (0x100000, 0x7FFE0000), (0x1_0000_0000, 0x1_4000_0000)])
    assert report.ranges(RESERVED) == RangeSet([(0x9FC00, 0xA0000)])
    assert report.ranges(ACPI, NVS) == RangeSet([(0x8000_0000, 0x8000_2000)])
    assert report.ranges(VMCOREINFO) == RangeSet([(0x1234000, 0x1234000 + 0x1024)])
    assert report.findings[1].detail == "e820 entry 1, type 2"


def test_absent_folder_is_one_problem(tmp_path: Path) -> None:
    report = fw_cfg.read(str(tmp_path))
    assert not report.available
    assert report.findings == ()
    assert len(report.problems) == 1
    assert "qemu_fw_cfg: absent" in report.problems[0]


def test_empty_map_is_available_and_no_problem(tmp_path: Path) -> None:
    put(tmp_path, "etc/e820", b"")
    put(tmp_path, "etc/vmcoreinfo", note())
    report = fw_cfg.read(str(tmp_path))
    assert report.available
    assert report.problems == ()
    assert not report.ranges(RAM)


def test_blob_stated_too_large_is_never_opened(tmp_path: Path) -> None:
    folder = put(tmp_path, "etc/e820", e820(BOOT_MAP), "8388608\n")
    (folder / "raw").unlink()
    report = fw_cfg.read(str(tmp_path))
    assert "etc/e820/size: is 8388608, expected at most 16384; raw is not read" in report.problems[0]
    assert not any("raw: absent" in line for line in report.problems)


def test_blob_larger_than_it_states_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "etc/e820", bytes(20) * 1000)
    report = fw_cfg.read(str(tmp_path))
    assert not report.available
    assert "etc/e820/raw: has 20000 bytes, expected at most 16384; ignored" in report.problems[0]


def test_blob_shorter_than_stated_is_told_and_used(tmp_path: Path) -> None:
    put(tmp_path, "etc/e820", e820(BOOT_MAP[:3]), "80\n")
    report = fw_cfg.read(str(tmp_path))
    assert "etc/e820/raw: has 60 bytes, expected 80" in report.problems[0]
    assert len(report.findings) == 3


BAD_E820 = [
    (e820(BOOT_MAP) + b"\1\2\3", 4, "blob: has 83 bytes, expected a multiple of 20; the last 3 are ignored"),
    (e820([(0x1000, 0, 1)]), 0, "entry 0 at offset 0: range starts at 0x1000"),
    (e820([BOOT_MAP[0], ((1 << 64) - 1, (1 << 64) - 1, 1)]), 1, "entry 1 at offset 20: range 0xffffffffffffffff"),
    (e820([(0, 1 << 60, 1)]), 0, "entry 0 at offset 0: range 0x0-0xfffffffffffffff is beyond"),
]


@pytest.mark.parametrize(("data", "kept", "message"), BAD_E820)
def test_bad_e820_entries_are_named_and_the_others_kept(data: bytes, kept: int, message: str) -> None:
    problems = Problems()
    findings = fw_cfg.parse_e820(data, "blob", problems)
    assert len(findings) == kept
    assert len(problems.lines()) == 1
    assert message in problems.lines()[0]


TYPES = {2: RESERVED, 3: ACPI, 4: NVS, 5: UNUSABLE, 7: PERSISTENT, 12: PERSISTENT, 0xEFFFFFFF: SOFT_RESERVED}
UNKNOWN_TYPES = [0, 6, 8, 11, 13, 99, 128, 0xFFFFFFFF]


@pytest.mark.parametrize(("number", "kind"), [*TYPES.items(), *((number, UNKNOWN) for number in UNKNOWN_TYPES)])
def test_entry_of_any_other_type_inside_of_ram_takes_it_away(tmp_path: Path, number: int, kind: str) -> None:
    ram, other = (0, 0x10000, 1), (0x4000, 0x1000, number)
    for order, entries in {"before": [other, ram], "behind": [ram, other]}.items():
        put(tmp_path / order, "etc/e820", e820(entries))
        report = fw_cfg.read(str(tmp_path / order))
        assert report.ranges(kind) == RangeSet([(0x4000, 0x5000)])
        assert report.ram() == RangeSet([(0, 0x4000), (0x5000, 0x10000)])


BAD_NOTES = [
    (note()[:15], "blob: has 15 bytes, expected 16"),
    (note() + b"\0", "blob: has 17 bytes, expected 16"),
    (note(guest_format=0, size=0, paddr=0, host_format=1), "no kernel has registered a note"),
    (note(guest_format=2), "guest_format at offset 2 is 2, expected 1"),
    (note(size=0), "note size at offset 4 is 0"),
    (note(size=0xFFFFFFFF), "note size at offset 4 is 4294967295"),
    (note(paddr=0), "note address at offset 8 is 0"),
    (note(paddr=(1 << 64) - 1), "note address at offset 8: range 0xffffffffffffffff"),
]


@pytest.mark.parametrize(("data", "message"), BAD_NOTES)
def test_bad_vmcoreinfo_pointer_is_named_and_ignored(data: bytes, message: str) -> None:
    problems = Problems()
    assert fw_cfg.parse_vmcoreinfo(data, "blob", problems) == []
    assert len(problems.lines()) == 1
    assert message in problems.lines()[0]


@given(
    st.lists(st.tuples(st.integers(0, 1 << 52), st.integers(1, 1 << 52), st.sampled_from([1, 2, 3, 4, 5])), max_size=60)
)
def test_every_possible_entry_comes_back(entries: list[tuple[int, int, int]]) -> None:
    problems = Problems()
    findings = fw_cfg.parse_e820(e820(entries), "blob", problems)
    assert [(f.start, f.end - f.start) for f in findings] == [entry[:2] for entry in entries]
    assert [f.kind == RAM for f in findings] == [kind == 1 for _, _, kind in entries]
    assert problems.lines() == ()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.sampled_from([1, 1, 2, 7, 99])), max_size=12))
def test_ram_of_a_map_is_no_byte_of_an_entry_of_another_type(entries: list[tuple[int, int, int]]) -> None:
    report = SourceReport("x", "x", tuple(fw_cfg.parse_e820(e820(entries), "blob", Problems())), (), available=True)
    for byte in range(80):
        types = {kind for start, length, kind in entries if start <= byte < start + length}
        assert (byte in report.ram()) == (types == {1})


@given(st.binary(max_size=400))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    for parse in (fw_cfg.parse_e820, fw_cfg.parse_vmcoreinfo):
        for finding in parse(data, "blob", Problems()):
            assert 0 <= finding.start < finding.end <= 1 << 56
