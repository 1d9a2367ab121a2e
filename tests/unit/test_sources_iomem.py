# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.sources import iomem
from capture.sources.report import (
    ACPI,
    BUS_WINDOW,
    CRASH_KERNEL,
    CXL_WINDOW,
    DEVICE,
    DRIVER_CLAIM,
    OWN_RAM,
    PERSISTENT,
    RAM,
    RAM_BUFFER,
    RESERVED,
    SOFT_RESERVED,
    UNKNOWN,
    Problems,
    SourceReport,
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


# A desktop, a server with VMD, a guest with CXL memory: real listings, cut down
DEVICES = """\
00000000-00000fff : Reserved
000a0000-000bffff : PCI Bus 0000:00
000c0000-000cfdff : Video ROM
  000c0000-000c7fff : pnp 00:01
3f000000-3fffffff : RAM buffer
62000000-68ffffff : Reserved
  64000000-67ffffff : Graphics Stolen Memory
  68fff000-68ffffff : MSFT0101:00
70000000-bfffffff : PCI Bus 0000:00
  70000000-700fffff : PCI Bus 0000:01
    70000000-70003fff : 0000:01:00.0
      70000000-70003fff : nvme
  74000000-75ffffff : 0000:00:0e.0
    74000000-75ffffff : VMD MEMBAR1
      74000000-740fffff : PCI Bus 10000:e1
        74000000-74003fff : 10000:e1:00.0
  7f000000-7f07ffff : amd_iommu
  7f100000-7f100fff : pnp 00:07
c0000000-cfffffff : pnp 00:05
  c0000000-cdffffff : PCI ECAM 0000 [bus 00-df]
e0000000-efffffff : PCI MMCONFIG 0001 [bus 00-ff]
  e0000000-efffffff : Reserved
    e0000000-efffffff : PNP0C01:00
f0000000-f00fffff : 10000:02:00.0
fec00000-fec003ff : IOAPIC 0
fed00000-fed003ff : HPET 2
  fed00000-fed003ff : PNP0103:00
fed90000-fed90fff : dmar0
fee00000-fee00fff : Local APIC
  fee00000-fee00fff : Reserved
"""


def spans(report: SourceReport, kind: str) -> list[tuple[int, int]]:
    return [(f.start, f.end - 1) for f in report.findings if f.kind == kind]


def test_devices_and_bus_windows_are_told_once_each(tmp_path: Path) -> None:
    report = iomem.read(put(tmp_path, DEVICES))
    assert spans(report, DEVICE) == [
        (0x64000000, 0x67FFFFFF),
        (0x70000000, 0x70003FFF),
        (0x74000000, 0x75FFFFFF),
        (0x7F000000, 0x7F07FFFF),
        (0xC0000000, 0xCDFFFFFF),
        (0xE0000000, 0xEFFFFFFF),
        (0xF0000000, 0xF00FFFFF),
        (0xFEC00000, 0xFEC003FF),
        (0xFED00000, 0xFED003FF),
        (0xFED90000, 0xFED90FFF),
        (0xFEE00000, 0xFEE00FFF),
    ]
    assert spans(report, BUS_WINDOW) == [
        (0xA0000, 0xBFFFF),
        (0x68FFF000, 0x68FFFFFF),
        (0x70000000, 0xBFFFFFFF),
        (0xC0000000, 0xCFFFFFFF),
    ]
    assert report.problems == ()


NO_DEVICES = [
    "0000:00:1f", "0000:00:1f.", "0000:00:1f.8", "0000:00:1g.0", "00:00:1f.2", "0000:00-1f.2", "0000:00:1f.2 ",
    "0000:00:1f.22", "000x:00:1f.2", "000000000:00:1f.2", "+000:00:1f.2", "0000:00:1f.2 0000:00:1f.2",
    "IOAPIC", "IOAPIC x", "HPET", "dmar", "dmar0 x", "AMD-Vi", "PCI", "GART", "Local APIC 1",
    "PNP0C01:00", "pnp 00:03", "INT0800:00", "virtio-pci-modern", "fb", "Xen scratch", "port1", "10:20",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_DEVICES)
def test_name_that_does_not_say_what_it_is_is_a_bus_window(tmp_path: Path, name: str) -> None:
    report = iomem.read(put(tmp_path, f"1000-1fff : {name}\n"))
    assert [f.kind for f in report.findings] == [BUS_WINDOW]


MEMORY = [
    ("RAM buffer", RAM_BUFFER),
    ("Reserved", RESERVED),
    ("reserved", RESERVED),
    ("ACPI Tables", ACPI),
    ("Unknown E820 type", UNKNOWN),
    ("Persistent Memory", PERSISTENT),
    ("Soft Reserved", SOFT_RESERVED),
    ("System RAM", OWN_RAM),
    ("System RAM (kmem)", OWN_RAM),
    ("Crash kernel", CRASH_KERNEL),
    ("CXL Window 12", CXL_WINDOW),
    *((name, "") for name in ("Kernel code", "Kernel rodata", "Kernel data", "Kernel bss", "Video ROM", "System ROM")),
    *((name, "") for name in ("Adapter ROM", "Extension ROM", "dax0.0", "region0", "namespace1.0", "hmem.0")),
]


@pytest.mark.parametrize(("name", "kind"), MEMORY)
def test_memory_is_neither_device_nor_bus_window(tmp_path: Path, name: str, kind: str) -> None:
    report = iomem.read(put(tmp_path, f"1000-1fff : {name}\n"))
    assert [f.kind for f in report.findings] == ([kind] if kind else [])


CXL = """\
180000000-1ffffffff : Soft Reserved
  180000000-1bfffffff : dax1.0
    180000000-1bfffffff : System RAM (kmem)
5c0001128-5c00011b7 : port1
5d0000000-64fffffff : CXL Window 0
  5d0000000-64fffffff : region0
    5d0000000-64fffffff : dax0.0
      5d0000000-5dfffffff : System RAM (kmem)
a90000000-aafffffff : Persistent Memory
  a90000000-aafffffff : region1
    a90000000-a97ffffff : namespace0.0
    a98000000-a98000fff : btt0.1
"""


def test_parts_of_memory_of_a_bus_are_no_findings(tmp_path: Path) -> None:
    report = iomem.read(put(tmp_path, CXL))
    assert spans(report, CXL_WINDOW) == [(0x5D0000000, 0x64FFFFFFF)]
    assert spans(report, OWN_RAM) == [(0x180000000, 0x1BFFFFFFF), (0x5D0000000, 0x5DFFFFFFF)]
    assert spans(report, BUS_WINDOW) == [(0x5C0001128, 0x5C00011B7)]
    assert spans(report, DEVICE) == []
    assert len(report.findings) == 6


def test_bus_of_wrong_firmware_inside_of_a_cxl_window_is_a_bus_window(tmp_path: Path) -> None:
    text = """\
480010000-cffffffff : CXL Window 0
  4c0200000-cffffffff : PCI Bus 0000:00
    4c0200000-4c0203fff : 0000:00:03.0
    4c0300000-4c0303fff : efifb
"""
    report = iomem.read(put(tmp_path, text))
    assert [f.kind for f in report.findings] == [CXL_WINDOW, BUS_WINDOW, DEVICE]


def test_own_memory_inside_of_a_bus_window_too_large_is_own_memory(tmp_path: Path) -> None:
    text = "0-ffffffff : PCI Bus 0000:00\n  1000000-1ffffff : System RAM\n    1000000-10fffff : Kernel code\n"
    report = iomem.read(put(tmp_path, text))
    assert [f.kind for f in report.findings] == [BUS_WINDOW, OWN_RAM]


def test_memory_of_other_architectures_is_no_bus_window(tmp_path: Path) -> None:
    text = """\
40000000-bfffffff : System RAM
  40210000-4180ffff : Kernel code
  41810000-41a1ffff : reserved
  bc000000-bdffffff : ramoops:dump(0/1)
c0000000-c0ffffff : reserved
"""
    report = iomem.read(put(tmp_path, text))
    assert [f.kind for f in report.findings] == [OWN_RAM, RESERVED, RESERVED]


def test_own_memory_is_no_ram_of_the_dead_machine(tmp_path: Path) -> None:
    report = iomem.read(put(tmp_path, CAPTURE_KERNEL + NORMAL_MODE))
    assert not report.ranges(RAM)
    assert not report.ram()


def test_region_that_virtio_mem_claimed_is_no_bus_window(tmp_path: Path) -> None:
    report = iomem.read(put(tmp_path, NORMAL_MODE))
    assert not report.ranges(BUS_WINDOW, DEVICE)


def test_time_grows_with_the_lines_alone(tmp_path: Path) -> None:
    lines = []
    for i in range(10_000):
        at = 0x100000000 + (i << 20)
        lines.append(f"{at:x}-{at + 0xFFFFF:x} : PCI Bus 0000:{i % 256:02x}\n")
        lines.append(f"  {at:x}-{at + 0xFFFF:x} : 0000:{i % 256:02x}:00.0\n")
        lines.append(f"    {at:x}-{at + 0xFFFF:x} : virtio-pci-modern\n")
    root = put(tmp_path, "".join(lines))
    before = time.process_time()
    report = iomem.read(root)
    assert time.process_time() - before < 2
    assert len(report.ranges(DEVICE)) == 10_000


NAMES = st.sampled_from([
    "System RAM", "Reserved", "PCI Bus 0000:00", "0000:00:01.0", "pnp 00:01", "CXL Window 0", "dax0.0", "virtio3",
    "RAM buffer", "efifb",
])  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 4), NAMES), min_size=1, max_size=30))
def test_every_device_and_every_bus_is_covered_by_findings_of_its_kind(lines: list[tuple[int, str]]) -> None:
    tree: list[iomem.Resource] = []
    path: list[int] = []
    for i, (wanted, name) in enumerate(lines):
        depth = min(wanted, len(path))
        del path[depth:]
        # children are tenths of their parents
        parent = path[-1] if path else -1
        start, size = (i << 40, 10**10) if parent < 0 else (tree[parent].start, tree[parent].end - tree[parent].start)
        tree.append(iomem.Resource(depth, start, start + max(size // 10, 1), name, parent))
        path.append(i)
    report = SourceReport("x", "x", tuple(iomem.findings(tuple(tree))), (), available=True)
    for r in tree:
        if r.name == "0000:00:01.0":
            assert report.ranges(DEVICE).covers(r.start, r.end)
        if r.name == "PCI Bus 0000:00":
            assert report.ranges(DEVICE, BUS_WINDOW).covers(r.start, r.end)
        if r.name == "System RAM":
            assert report.ranges(OWN_RAM).covers(r.start, r.end)


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
