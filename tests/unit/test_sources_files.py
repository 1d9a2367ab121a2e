# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading below a root, and what problem lines look like."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.sources import cmdline, files, firmware_memmap, fw_cfg, iomem, memory_blocks, smbios, srat
from capture.sources.report import (
    ACPI,
    BUS_WINDOW,
    DEVICE,
    HOTPLUG_WINDOW,
    NO_RAM,
    NVS,
    OTHER_MEMORY,
    PERSISTENT,
    PHYS_END,
    RAM,
    RESERVED,
    SOFT_RESERVED,
    UNKNOWN,
    UNUSABLE,
    Finding,
    Problems,
    SourceReport,
    add_range,
)
from guard.ranges import RangeSet

SOURCES = [cmdline, firmware_memmap, fw_cfg, iomem, memory_blocks, smbios, srat]


def read(root: Path, relative: str, limit: int = 100) -> tuple[bytes | None, tuple[str, ...]]:
    problems = Problems()
    return files.read_file(str(root), relative, limit, problems), problems.lines()


def test_file_of_exactly_the_limit_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    (tmp_path / "fits").write_bytes(bytes(100))
    (tmp_path / "larger").write_bytes(bytes(101))
    assert read(tmp_path, "fits") == (bytes(100), ())
    assert read(tmp_path, "larger") == (None, (f"{tmp_path}/larger: has 101 bytes, expected at most 100; ignored",))


def test_file_that_states_no_size_is_bounded_too() -> None:
    problems = Problems()
    assert files.read_file("/", "proc/self/maps", 64, problems) is None
    assert problems.lines() == ("/proc/self/maps: has more than 64 bytes, expected at most 64; ignored",)


def test_link_that_stays_below_the_root_is_followed(tmp_path: Path) -> None:
    (tmp_path / "by_key").mkdir()
    (tmp_path / "by_key/raw").write_bytes(b"x")
    (tmp_path / "by_name").symlink_to("by_key")
    assert read(tmp_path, "by_name/raw") == (b"x", ())


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname"])
def test_link_that_leads_out_of_the_root_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(target)
    data, lines = read(root, "link")
    assert data is None
    assert lines == (f"{root}/link: cannot be read (symbolic link leads out of {root}); ignored",)


def test_link_to_a_sibling_whose_name_starts_like_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2/file").write_bytes(b"x")
    (tmp_path / "root/link").symlink_to("../root2/file")
    assert read(tmp_path / "root", "link")[0] is None


def test_loop_of_links_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    data, lines = read(tmp_path, "a")
    assert data is None
    assert "cannot be read" in lines[0]


def test_fifo_and_folder_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder"):
        assert read(tmp_path, name) == (None, (f"{tmp_path}/{name}: is not a regular file; ignored",))


def test_file_below_a_file_is_absent(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert read(tmp_path, "file/raw") == (None, (f"{tmp_path}/file/raw: absent",))


def test_only_exact_numbered_names_are_listed_and_in_numeric_order(tmp_path: Path) -> None:
    for name in ("memory10", "memory9", "memory", "memory07", "memory-1", "memory1x", "memory\u00b2", "memor1"):
        (tmp_path / "folder" / name).mkdir(parents=True)
    assert files.numbered(str(tmp_path), "folder", "memory", Problems()) == [9, 10]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.__name__)
def test_every_source_answers_for_a_root_that_does_not_exist(source: object) -> None:
    report = source.read("/nonexistent")  # type: ignore[attr-defined]
    assert not report.available
    assert report.findings == ()
    assert report.problems


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.__name__)
def test_every_source_answers_for_this_machine(source: object) -> None:
    report = source.read("/")  # type: ignore[attr-defined]
    assert report.available or report.problems


def test_ranges_of_several_kinds_are_joined() -> None:
    findings = (Finding(0, 10, RAM, ""), Finding(10, 20, RESERVED, ""), Finding(30, 40, RAM, ""))
    report = SourceReport("x", "x", findings, (), available=True)
    assert report.ranges(RAM) == RangeSet([(0, 10), (30, 40)])
    assert report.ranges(RAM, RESERVED) == RangeSet([(0, 20), (30, 40)])
    assert not report.ranges()


def test_a_problem_stays_one_printable_line() -> None:
    problems = Problems()
    problems.add("a\nb\x1b[31m\udc80")
    assert problems.lines() == ("a\\nb\\x1b[31m\\udc80",)


FINDINGS = st.builds(
    lambda start, length, kind: Finding(start, start + length, kind, ""),
    st.integers(0, 64),
    st.integers(1, 32),
    st.sampled_from([RAM, RAM, RAM, *NO_RAM, PERSISTENT, SOFT_RESERVED, OTHER_MEMORY, HOTPLUG_WINDOW, DEVICE]),
)


@given(st.lists(FINDINGS, max_size=12))
def test_ram_is_what_a_source_calls_ram_and_nothing_else(findings: list[Finding]) -> None:
    def said(byte: int, *kinds: str) -> bool:
        return any(f.start <= byte < f.end for f in findings if f.kind in kinds)

    ram = SourceReport("x", "x", tuple(findings), (), available=True).ram()
    for byte in range(96):
        other = said(byte, RESERVED, ACPI, NVS, UNUSABLE, UNKNOWN, PERSISTENT, SOFT_RESERVED, OTHER_MEMORY)
        assert (byte in ram) == (said(byte, RAM) and not other)


def test_memory_that_can_become_system_ram_is_no_evidence_against_ram() -> None:
    assert not {PERSISTENT, SOFT_RESERVED, OTHER_MEMORY, HOTPLUG_WINDOW, BUS_WINDOW, RAM} & set(NO_RAM)


@pytest.mark.parametrize("kind", NO_RAM)
def test_what_is_no_ram_counts_as_far_as_there_can_be_memory(kind: str) -> None:
    findings: list[Finding] = []
    problems = Problems()
    add_range(findings, problems, "x", 0x1000, 1 << 64, kind, "")
    assert findings == [(0x1000, PHYS_END, kind, "")]
    assert len(problems.lines()) == 1
    add_range(findings, problems, "x", PHYS_END, 1 << 64, kind, "")
    assert len(findings) == 1


def test_absent_is_no_damage_and_damage_that_reads_like_it_is() -> None:
    problems = Problems()
    problems.absent("a")
    problems.absent("b\n", "as on most machines")
    problems.add("c: type 'x: absent' is not known; ignored")
    report = SourceReport("x", "x", (), problems.lines(), available=True)
    assert report.problems == ("a: absent", "b\\n: absent (as on most machines)", report.damage[0])
    assert report.damage == ["c: type 'x: absent' is not known; ignored"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.__name__)
def test_a_source_that_is_not_there_has_no_damage(tmp_path: Path, source: object) -> None:
    report = source.read(str(tmp_path / "elsewhere"))  # type: ignore[attr-defined]
    assert report.problems
    assert report.damage == []


def test_damage_below_a_root_of_any_name_is_damage(tmp_path: Path) -> None:
    table = tmp_path / "machine: absent/sys/firmware/acpi/tables/SRAT"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"no table")
    assert len(srat.read(str(tmp_path / "machine: absent")).damage) == 1
