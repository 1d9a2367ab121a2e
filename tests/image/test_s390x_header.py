# SPDX-License-Identifier: LGPL-2.1-or-later
"""Headers of s390x machines, byte for byte what their capture kernels would have built; and the swap of low memory."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.dump import Dump, build
from capture.image_machine import ImageMachine
from capture.recorded import load, of_image
from capture.s390x import swapped
from guard.physmem import PREAD, OldMemory, Segment
from guard.ranges import Range
from guard.registry import Registry
from tests.image.machines import oldmem
from tests.image.s390x_machine import GIB, MIB, Device, S390xMachine
from tests.image.s390x_oracle import PAGE, Header, Span, Text, elf_note

SECTION = 128 * MIB
NO_CRASH_REGION = "boot parameter area 0x10418: no crash region: this is no capture kernel; memory is taken as it lies"


@contextmanager
def dumped(folder: Path, layout: str = "kernel") -> Iterator[Dump]:
    dump = build(ImageMachine(load(str(folder))), layout)
    try:
        yield dump
    finally:
        dump.close()


def loads_of(header: bytes) -> list[tuple[int, int, int]]:
    """(offset, physical address, size) of each PT_LOAD."""
    (count,) = struct.unpack_from(">H", header, 56)
    phdrs = [struct.unpack_from(">IIQQQQQQ", header, 64 + 56 * i) for i in range(1, count)]
    return [(p[2], p[4], p[5]) for p in phdrs]


def assert_memory(dump: Dump, machine: S390xMachine) -> None:
    """Every page that holds something is where the header says, as the dead machine had it; zeros if unplugged."""
    ram = machine.expected("cut").ranges
    for offset, start, size in loads_of(dump.core.header):
        for number, page in machine.pages.items():
            paddr = number * PAGE
            if start <= paddr < start + size:
                is_ram = any(a <= paddr < b for a, b in ram)
                found = dump.vmcore.read(offset + paddr - start, PAGE)
                assert found == (page if is_ram else bytes(PAGE)), hex(paddr)


@st.composite
def spans(draw: st.DrawFn) -> list[Span]:
    """RAM ranges in increments of 1 MiB, with gaps of standby memory or none between."""
    found = [(0, draw(st.integers(6, 12)) * MIB)]
    for gap, size in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=3)):
        start = found[-1][1] + gap * MIB
        found.append((start, start + size * MIB))
    return found


@st.composite
def devices(draw: st.DrawFn, start: int) -> list[Device]:
    found = []
    for _ in range(draw(st.integers(0, 2))):
        block_size = 1 << draw(st.integers(16, 23))
        addr = (start // block_size + draw(st.integers(1, 5))) * block_size
        blocks = draw(st.integers(1, 48))
        usable = draw(st.integers(0, blocks))
        plugged = draw(st.frozensets(st.integers(0, usable - 1))) if usable else frozenset[int]()
        found.append(Device(addr, blocks, block_size, plugged, usable))
        start = addr + blocks * block_size
    return draw(st.permutations(found))


@st.composite
def machines(draw: st.DrawFn) -> S390xMachine:
    m = S390xMachine(draw(st.integers(0, 1 << 32)))
    m.ram = draw(spans())
    size = draw(st.integers(32, 256)) * PAGE
    start, end = draw(st.sampled_from([r for r in m.ram if r[1] - max(r[0], size) >= size]))
    base = draw(st.integers(max(start, size) // PAGE, (end - size) // PAGE)) * PAGE
    m.crash = (base, base + size)
    m.devices = draw(devices(m.ram[-1][1]))
    m.section_bits = draw(st.none() | st.integers(20, 24))
    m.possible = draw(st.integers(1, 8))
    m.cpus = sorted({0, *draw(st.sets(st.integers(0, m.possible - 1), max_size=4))})
    m.offline = draw(st.lists(st.integers(1, m.possible), max_size=2))
    m.vector = draw(st.booleans())
    m.os_info = draw(st.sampled_from(["6.10", "6.10", "6.1"]))
    m.os_info_vmcoreinfo = draw(st.booleans())
    m.lowcore_note = draw(st.booleans()) or not m.os_info_vmcoreinfo
    m.identity_base = draw(st.just(0) | st.integers(1, 1 << 20)) << 32
    image_size = draw(st.integers(1, 64)) * PAGE
    m.image = Text(0x3FFE0000000 + draw(st.integers(0, 1 << 15)) * PAGE, m.room(image_size, PAGE), image_size)
    m.capture_release = draw(st.sampled_from(["6.1.0", "6.5.1", "6.10.2", "6.14.0-rc3+", "7.2.13"]))
    m.filler = draw(st.integers(0, 9) | st.integers(0, 3 * PAGE))
    return m


@settings(max_examples=80, deadline=None)
@given(m=machines(), layout=st.sampled_from(["kernel", "cut"]))
def test_header_and_memory_are_what_the_capture_kernel_shows(m: S390xMachine, layout: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        m.lay()
        for device in m.devices:
            for block in range(device.blocks):
                m.put(device.addr + block * device.block_size, b"PLUGGED!" if block in device.plugged else b"POISON!!")
        with dumped(m.write(Path(folder)), layout) as dump:
            assert dump.problems == []
            assert dump.core.header == bytes(m.expected(layout))
            assert_memory(dump, m)


def device(addr: int, blocks: int, block_size: int, plugged: set[int], usable: int | None = None) -> Device:
    return Device(addr, blocks, block_size, frozenset(plugged), blocks if usable is None else usable)


def other_note(m: S390xMachine) -> None:
    m.put(m.at["note"], elf_note(b"VMCOREINFO", 0, m.text.replace(b"CRASHTIME=17", b"CRASHTIME=99")))


def sized(**values: object) -> Callable[[S390xMachine], None]:
    def change(m: S390xMachine) -> None:
        for name, value in values.items():
            assert hasattr(m, name)
            setattr(m, name, value)

    return change


LOW_RAM = [(0, 32 * MIB)]
TWO_MIB = 2 * MIB
# one case each: what is different about the machine, and what that must show in the header
CASES: dict[str, tuple[Callable[[S390xMachine], None], Callable[[Header], bool]]] = {
    "one CPU": (sized(cpus=[0]), lambda h: len(h.cpus) == 1),
    "offline CPU": (sized(cpus=[0, 1, 2], offline=[1]), lambda h: len(h.cpus) == 2),
    "CPU missing in lowcore_ptr": (sized(cpus=[0, 3]), lambda h: len(h.cpus) == 2),
    "many CPUs": (sized(cpus=range(48), possible=64), lambda h: len(h.cpus) == 48),
    "no vector facility": (sized(vector=False), lambda h: all(c.vector is None for c in h.cpus)),
    "vmcoreinfo in os_info only": (sized(os_info_vmcoreinfo=True, lowcore_note=False), lambda h: bool(h.vmcoreinfo)),
    "random identity base": (sized(identity_base=0x7F3_0000_0000), lambda h: h.identity_base != 0),
    "kernel before 6.10 crashed": (sized(os_info="6.1"), lambda h: h.text is None),
    "crash region right behind what it is swapped with": (
        sized(crash=(TWO_MIB, 2 * TWO_MIB)),
        lambda h: h.ranges == [(0, TWO_MIB), (2 * TWO_MIB, 32 * MIB)],
    ),
    "crash region at the end": (sized(crash=(31 * MIB, 32 * MIB)), lambda h: h.ranges == [(0, 31 * MIB)]),
    "crash region in the second range": (
        sized(ram=[(0, 16 * MIB), (20 * MIB, 40 * MIB)], crash=(24 * MIB, 28 * MIB)),
        lambda h: h.ranges == [(0, 16 * MIB), (20 * MIB, 24 * MIB), (28 * MIB, 40 * MIB)],
    ),
    "adjacent ranges": (
        sized(ram=[(0, 8 * MIB), (8 * MIB, 16 * MIB), (16 * MIB, 32 * MIB)]),
        lambda h: h.ranges == [(0, 20 * MIB), (24 * MIB, 32 * MIB)],
    ),
    "crash region over the border of two ranges": (
        sized(ram=[(0, 22 * MIB), (22 * MIB, 32 * MIB)]),
        lambda h: h.ranges == [(0, 20 * MIB), (24 * MIB, 32 * MIB)],
    ),
    "standby gap": (
        sized(ram=[(0, 28 * MIB), (48 * MIB, 64 * MIB)]),
        lambda h: h.ranges[1:] == [(24 * MIB, 28 * MIB), (48 * MIB, 64 * MIB)],
    ),
    "two devices, the upper one probed first": (
        sized(devices=[device(4 * GIB, 256, TWO_MIB, {3}), device(2 * GIB, 256, TWO_MIB, {200})]),
        lambda h: h.ranges[2:] == [(4 * GIB, 4 * GIB + SECTION), (2 * GIB + 3 * SECTION, 2 * GIB + 4 * SECTION)],
    ),
    "neighbouring sections": (
        sized(devices=[device(GIB, 512, TWO_MIB, {0, 64, 255, 400})]),
        lambda h: (
            h.ranges[2:]
            == [(GIB, GIB + 2 * SECTION), (GIB + 3 * SECTION, GIB + 4 * SECTION)]
            + [(GIB + 6 * SECTION, GIB + 7 * SECTION)]
        ),
    ),
    "blocks larger than a section": (
        sized(devices=[device(4 * GIB, 4, GIB, {1})]),
        lambda h: h.ranges[2:] == [(5 * GIB, 6 * GIB)],
    ),
    "usable region that ends inside a section": (
        sized(devices=[device(GIB, 512, TWO_MIB, {64}, usable=70)]),
        lambda h: h.ranges[2:] == [(GIB + SECTION, GIB + 140 * MIB)],
    ),
    "region that starts inside a section": (
        sized(devices=[device(GIB + 100 * MIB, 64, TWO_MIB, {0})]),
        lambda h: h.ranges[2:] == [(GIB + 100 * MIB, GIB + SECTION)],
    ),
    "device with nothing plugged": (sized(devices=[device(GIB, 64, TWO_MIB, set())]), lambda h: len(h.ranges) == 2),
    "sections of 256 MiB": (
        sized(section_bits=28, devices=[device(GIB, 512, TWO_MIB, {0})]),
        lambda h: h.ranges[2:] == [(GIB, GIB + 2 * SECTION)],
    ),
}


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "_"))
def test_named_case(name: str, tmp_path: Path) -> None:
    change, has = CASES[name]
    m = S390xMachine(len(name))
    change(m)
    expected = m.lay().expected()
    assert has(expected)
    with dumped(m.write(tmp_path)) as dump:
        assert dump.problems == []
        assert dump.core.header == bytes(expected)
        assert_memory(dump, m)


@pytest.mark.parametrize(
    ("release", "align", "image", "device_ram"),
    [
        ("5.15.0", 0, False, False),
        ("6.4.16", 0, False, False),
        ("6.5.0-rc1", 4, False, False),
        ("6.9.12", 4, False, False),
        ("6.10.0", 4, True, False),
        ("6.13.7+", 4, True, False),
        ("6.14.0", 4, True, True),
        ("7.2.13-s390x", 4, True, True),
    ],
)
def test_header_is_that_of_the_capture_kernels_release(
    release: str, align: int, image: bool, device_ram: bool, tmp_path: Path
) -> None:
    m = S390xMachine(1)
    m.capture_release, m.identity_base = release, 1 << 40
    m.capture_os_info = "6.10" if image else "6.1"
    m.devices = [device(GIB, 64, TWO_MIB, {0})]
    expected = m.lay().expected()
    assert (expected.note_align, bool(expected.text), len(expected.ranges) == 3) == (align, image, device_ram)
    with dumped(m.write(tmp_path)) as dump:
        assert dump.core.header == bytes(expected)
        assert dump.problems == []


def test_vmcoreinfo_of_os_info_goes_before_that_of_lowcore(tmp_path: Path) -> None:
    m = S390xMachine(2)
    m.os_info_vmcoreinfo = True
    other_note(m.lay())
    with dumped(m.write(tmp_path)) as dump:
        assert dump.core.header == bytes(m.expected())
        assert dump.problems == []


def test_cut_layout_has_the_runs_that_can_be_read(tmp_path: Path) -> None:
    m = S390xMachine(3)
    m.devices = [device(GIB, 64, TWO_MIB, {40, 41, 3}), device(64 * MIB, 4, TWO_MIB, {1})]
    m.lay()
    expected = m.expected("cut")
    assert expected.ranges[2:] == [
        (66 * MIB, 68 * MIB),
        (GIB + 6 * MIB, GIB + 8 * MIB),
        (GIB + 80 * MIB, GIB + 84 * MIB),
    ]
    with dumped(m.write(tmp_path), "cut") as dump:
        assert [(r.start, r.end) for r in dump.readable()] == expected.ranges
        assert dump.core.header == bytes(expected)


def test_machine_without_a_crash_region_is_shown_as_it_lies(tmp_path: Path) -> None:
    m = S390xMachine(4)
    m.crash, m.capture_release = None, m.release
    m.lay().write(tmp_path)
    dump = build(ImageMachine(of_image(str(tmp_path / "ram.raw"))), "kernel")
    assert dump.core.header == bytes(m.expected())
    assert m.expected().ranges == LOW_RAM
    assert [line[: len(NO_CRASH_REGION)] for line in dump.problems] == [NO_CRASH_REGION]
    dump.close()


@pytest.mark.parametrize(
    ("cpus", "vector", "filesz", "data"), [(2, False, 3432, 8192), (4, True, 6656, 12288)], ids=["2_CPUs", "4_CPUs_vx"]
)
def test_worked_numbers(cpus: int, vector: bool, filesz: int, data: int, tmp_path: Path) -> None:
    """156 bytes of PRPSINFO, 764 or 1188 for a CPU, 1748 for a VMCOREINFO text of 1721 bytes."""
    m = S390xMachine(5)
    m.cpus, m.vector = range(cpus), vector
    m.filler += 1721 - len(S390xMachine(5).lay().text)
    assert len(m.lay().text) == 1721
    with dumped(m.write(tmp_path)) as dump:
        header = dump.core.header
    assert struct.unpack_from(">H", header, 56) == (4,)
    assert struct.unpack_from(">IIQQQQQQ", header, 64) == (4, 0, 4096, 0, 0, filesz, filesz, 4)
    assert loads_of(header)[0][0] == data == len(header)


def test_image_alone_is_enough_and_other_readers_accept_the_dump(tmp_path: Path) -> None:
    m = S390xMachine(6)
    m.ram, m.crash = [(0, 12 * MIB)], (8 * MIB, 10 * MIB)
    folder = m.lay().write(tmp_path)
    out = tmp_path / "vmcore"
    saved = oldmem("save", "--image", folder / "ram.raw", "--layout", "kernel", "-o", out)
    assert (saved.status, saved.warnings) == (0, [])
    header = bytes(m.expected())
    assert out.read_bytes()[: len(header)] == header
    checked = oldmem("check", out)
    assert (checked.status, "WRONG" in checked.out) == (0, False), checked.out
    assert "2 NT_PRSTATUS, VMCOREINFO of 7.2.13-test" in checked.out
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    shown = subprocess.run(["readelf", "-lnW", out], capture_output=True, text=True, check=True, timeout=30)
    assert shown.stderr == ""
    words = [line.split() for line in shown.stdout.splitlines()]
    assert [line[1:6] for line in words if line and line[0] == "LOAD"] == [
        [f"{offset:#08x}", f"{vaddr:#018x}", f"{paddr:#018x}", f"{size:#08x}", f"{size:#08x}"]
        for (offset, paddr, size), vaddr in zip(loads_of(header), [m.image.vaddr, 0, 10 * MIB], strict=True)
    ]
    names = ["PRPSINFO", *2 * ["PRSTATUS", "FPREGSET", "S390_TIMER", "S390_TODCMP", "S390_TODPREG", "S390_CTRS"]]
    assert all(f"NT_{name} " in shown.stdout for name in [*names, "S390_PREFIX", "S390_VXRS_HIGH", "S390_VXRS_LOW"])


PAGES = 40
WORDS = b"".join(struct.pack(">Q", at) for at in range(0, PAGES * PAGE, 8))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_swapped_memory_is_read_by_the_kernels_rule_and_swaps_back(data: st.DataObject) -> None:
    """copy_oldmem_iter(): in the crash region at its distance from the start, below its size behind its base."""
    size = data.draw(st.integers(1, PAGES // 2)) * PAGE
    base = data.draw(st.integers(size // PAGE, PAGES - size // PAGE)) * PAGE
    borders = [0, *sorted(data.draw(st.sets(st.integers(1, PAGES - 1), max_size=4))), PAGES]
    near = st.sampled_from([0, size, base, base + size]).flatmap(lambda x: st.integers(x - 2 * PAGE, x + PAGE))
    start = max(0, min(data.draw(near | st.integers(0, PAGES * PAGE)), PAGES * PAGE - 1))
    length = data.draw(st.integers(1, 3 * PAGE) | st.integers(1, PAGES * PAGE))
    length = min(length, PAGES * PAGE - start)
    fd = os.memfd_create("image")
    try:
        os.write(fd, WORDS)
        whole = [Segment(a * PAGE, (b - a) * PAGE, fd, a * PAGE, PREAD, "image") for a, b in pairwise(borders)]
        once = swapped(whole, Range(base, base + size))
        twice = swapped(once, Range(base, base + size))
        asked = range(start, start + length)
        moved = [x - base if base <= x < base + size else x + base if x < size else x for x in asked]
        old, now = OldMemory(once, Registry()), OldMemory(twice, Registry())
        assert old.read(start, length) == bytes(WORDS[x] for x in moved)
        assert now.read(start, length) == WORDS[start : start + length]
        assert old.read_exact(start, length) == old.read(start, length)
        old.close()
        now.close()
    finally:
        os.close(fd)
