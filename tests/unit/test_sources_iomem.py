# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.sources import iomem
from capture.sources.report import (
    ACPI,
    CRASH_KERNEL,
    DRIVER_CLAIM,
    OWN_RAM,
    RAM_BUFFER,
    RESERVED,
    Problems,
)
from guard.ranges import RangeSet

CAPTURE_KERNEL = """\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
0009fc00-0009ffff : Reserved
000a0000-000bffff : PCI Bus 0000:00
000f0000-000fffff : Reserved
  000f0000-000fffff : System ROM
20000000-2bffdfff : System RAM
  21000000-223fffff : Kernel code
  22400000-22efffff : Kernel rodata
2bffe000-2fffffff : RAM buffer
7ffdb000-7fffffff : ACPI Tables
100000000-103ffffff : PCI Bus 0000:00
  100000000-100003fff : 0000:00:04.0
    100000000-100003fff : virtio-pci-modern
"""

NORMAL_MODE = """\
140000000-15fffffff : virtio3
  140000000-147ffffff : System RAM (virtio_mem)
  150000000-157ffffff : System RAM (virtio_mem)
160000000-17fffffff : virtio4
"""


def put(root: Path, text: str) -> str:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/iomem").write_text(text)
    return str(root)


def test_own_memory_of_the_capture_kernel_is_told(tmp_path: Path) -> None:
    report = iomem.read(put(tmp_path, CAPTURE_KERNEL))
    assert report.available
    assert report.problems == ()
    assert report.ranges(OWN_RAM) == RangeSet([(0x1000, 0x9FC00), (0x20000000, 0x2BFFE000)])
    assert report.ranges(RAM_BUFFER) == RangeSet([(0x2BFFE000, 0x30000000)])
    assert report.ranges(ACPI) == RangeSet([(0x7FFDB000, 0x80000000)])
    assert report.ranges(RESERVED) == RangeSet([(0, 0x1000), (0x9FC00, 0xA0000), (0xF0000, 0x100000)])
    assert not report.ranges(DRIVER_CLAIM)


def test_system_ram_of_every_flavour_and_depth_is_own_memory(tmp_path: Path) -> None:
    text = "0-fff : a\n  0-fff : b\n    0-fff : System RAM (kmem)\n1000-1fff : System RAM\n"
    assert iomem.read(put(tmp_path, text)).ranges(OWN_RAM) == RangeSet([(0, 0x2000)])


def test_crash_kernel_area_is_told(tmp_path: Path) -> None:
    text = "00100000-3fffffff : System RAM\n  20000000-2bffffff : Crash kernel\n"
    assert iomem.read(put(tmp_path, text)).ranges(CRASH_KERNEL) == RangeSet([(0x20000000, 0x2C000000)])


def test_tree_keeps_depth_and_parents() -> None:
    tree = iomem.parse(CAPTURE_KERNEL.encode(), "iomem", Problems())
    assert [r.depth for r in tree[-3:]] == [0, 1, 2]
    assert tree[tree[-1].parent].name == "0000:00:04.0"
    assert tree[tree[-2].parent].name == "PCI Bus 0000:00"
    assert tree[0].parent == -1


def test_normal_mode_claims_of_virtio_mem_are_found(tmp_path: Path) -> None:
    report = iomem.read(put(tmp_path, CAPTURE_KERNEL + NORMAL_MODE))
    assert [(f.start, f.end, f.detail) for f in report.findings if f.kind == DRIVER_CLAIM] == [
        (0x140000000, 0x160000000, "virtio3"),
        (0x160000000, 0x180000000, "virtio4"),
    ]
    assert report.ranges(OWN_RAM).covers(0x140000000, 0x148000000)


def test_dax_window_of_virtiofs_is_no_claim() -> None:
    text = "0-ffff : PCI Bus 0000:00\n  0-3fff : 0000:00:05.0\n    0-3fff : virtio2\n"
    assert iomem.virtio_mem_claims(iomem.parse(text.encode(), "iomem", Problems())) == ()


def test_hidden_addresses_make_the_tree_unavailable(tmp_path: Path) -> None:
    report = iomem.read(put(tmp_path, "00000000-00000000 : System RAM\n  00000000-00000000 : Kernel code\n"))
    assert not report.available
    assert report.findings == ()
    assert "proc/iomem: all addresses read as zero" in report.problems[0]
    assert "CAP_SYS_ADMIN" in report.problems[0]


def test_empty_file_is_not_taken_for_a_kernel_without_memory(tmp_path: Path) -> None:
    report = iomem.read(put(tmp_path, ""))
    assert not report.available
    assert "proc/iomem: tells of no resource at all" in report.problems[0]


BAD_LINES = [
    ("no colon here", "line 2: expected 'start-end : name', found 'no colon here'; ignored"),
    ("1000-zz : System RAM", "line 2: expected 'start-end : name'"),
    ("-1000-2000 : System RAM", "line 2: expected 'start-end : name'"),
    ("2000-1fff : System RAM", "line 2: expected 'start-end : name'"),
    ("1000-1fff : ", "line 2: expected 'start-end : name'"),
    ("0-10000000000000000 : System RAM", "line 2: expected 'start-end : name'"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line_is_named_and_the_others_kept(line: str, message: str) -> None:
    problems = Problems()
    tree = iomem.parse(f"0-fff : first\n{line}\n5000-5fff : System RAM\n".encode(), "iomem", problems)
    assert [r.name for r in tree] == ["first", "System RAM"]
    assert len(problems.lines()) == 1
    assert f"iomem: {message}" in problems.lines()[0]


@pytest.mark.parametrize("indent", [1, 3, 4, 40])
def test_senseless_indentation_is_told_and_the_resource_kept(indent: int) -> None:
    problems = Problems()
    tree = iomem.parse(f"0-fff : first\n{' ' * indent}0-7ff : System RAM\n".encode(), "iomem", problems)
    assert tree[1].name == "System RAM"
    assert tree[1].depth <= 1
    assert f"iomem: line 2: indented by {indent}" in problems.lines()[0]


def test_last_byte_of_the_address_space_is_a_possible_end() -> None:
    problems = Problems()
    tree = iomem.parse(b"0-ffffffffffffffff : PCI mem\n", "iomem", problems)
    assert tree[0].end == 1 << 64
    assert problems.lines() == ()


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 1 << 60), st.integers(0, 1 << 40), st.sampled_from("abcd")),
        min_size=1,
        max_size=40,
    )
)
def test_printed_tree_comes_back(lines: list[tuple[int, int, int, str]]) -> None:
    depth = -1
    text, expected = "", []
    for wanted, start, length, name in lines:
        depth = min(wanted, depth + 1)
        text += f"{'  ' * depth}{start:08x}-{start + length:08x} : {name}\n"
        expected.append((depth, start, start + length + 1, name))
    problems = Problems()
    tree = iomem.parse(text.encode(), "iomem", problems)
    assert [r[:4] for r in tree] == expected
    assert all(r.parent == -1 if r.depth == 0 else tree[r.parent].depth == r.depth - 1 for r in tree)
    assert problems.lines() == ()


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    for index, resource in enumerate(iomem.parse(data, "iomem", Problems())):
        assert resource.start < resource.end <= 1 << 64
        assert -1 <= resource.parent < index
