# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images of s390x machines damaged at random, in the very structures that headers are built from: no errors but our
own, an end in good time, nothing read that is not RAM, and what is refused reads as zeros."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capture import report
from capture.dump import Dump, build
from capture.image_machine import ImageMachine
from capture.recorded import RecordedMachine, load, of_image
from guard.errors import Error, SourceError
from guard.physmem import covered
from guard.ranges import RangeSet
from tests.image.s390x_machine import (
    GIB,
    MAGIC_AT,
    MCESAD,
    MIB,
    NOTE_POINTER,
    OLDMEM_BASE_AT,
    OS_INFO_POINTER,
    SAVE_AREA,
    Device,
    S390xMachine,
)
from tests.image.s390x_oracle import PAGE

RAM = [(0, 12 * MIB), (16 * MIB, 20 * MIB)]
CRASH = (8 * MIB, 10 * MIB)
DEVICE = Device(GIB, 32, MIB, frozenset({0, 1, 2, 9, 20}), 24)


class Machine:
    """A machine on disk, whose sound state can be had back. Its RAM's second range is only in machine.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = m = S390xMachine(1)
        m.ram, m.crash, m.devices, m.section_bits = RAM, CRASH, [DEVICE], 22
        m.cpus, m.offline, m.os_info_vmcoreinfo = (0, 1, 2), (2,), True
        m.identity_base = 0x12_0000_0000
        m.lay()
        for block in range(DEVICE.blocks):
            m.put(DEVICE.addr + block * DEVICE.block_size, b"ABCD" * (PAGE // 4))
        m.write(folder)
        places = [(OS_INFO_POINTER, 8), (NOTE_POINTER, 8), (SAVE_AREA, 512), (m.at["os_info"], 300)]
        places += [(m.at["lowcore_ptr"], 8 * m.possible), (m.at["note"], 24)]
        for cpu in m.found.values():
            places += [(cpu.lowcore + SAVE_AREA + 0x100, 256), (cpu.lowcore + MCESAD, 8)]
        own = [
            (OLDMEM_BASE_AT, 16),
            (MAGIC_AT, 8),
            (OS_INFO_POINTER, 8),
            (NOTE_POINTER, 8),
            (0x14100, 64),
            (0x15000, 300),
        ]
        self.places = places + [(CRASH[0] + at, size) for at, size in own]

    def at(self, paddr: int) -> int:
        """Where in ram.raw a byte of the dead machine lies, and of the capture kernel one at its place in CRASH."""
        now = self.made.now(paddr)
        return now if now < RAM[0][1] else now - RAM[1][0] + RAM[0][1]

    @contextmanager
    def damaged(self, damage: list[tuple[int, bytes]], seal: bool) -> Iterator[None]:
        """Write *damage*, as far as it lies in RAM; with *seal* os_info's checksum is right again."""
        before = {number: bytes(page) for number, page in self.made.pages.items()}
        try:
            for paddr, data in damage:
                self.made.put(paddr, data)
            if seal:
                self.made.seal()
            self._flush(before)
            yield
        finally:
            changed = dict(self.made.pages)
            self.made.pages = {number: bytearray(page) for number, page in before.items()}
            self._flush({number: bytes(page) for number, page in changed.items()})

    def _flush(self, before: dict[int, bytes]) -> None:
        fd = os.open(self.folder / "ram.raw", os.O_RDWR)
        try:
            for number in self.made.pages.keys() | before.keys():
                page = bytes(self.made.pages.get(number, bytes(PAGE)))
                if page != before.get(number) and any(a <= number * PAGE < b for a, b in RAM):
                    os.pwrite(fd, page, self.at(number * PAGE))
        finally:
            os.close(fd)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


def check(dump: Dump, ram: RangeSet) -> None:
    assert all("\n" not in line for line in dump.problems)
    assert len(dump.problems) < 250
    readable = dump.readable()
    assert not readable - ram
    assert not covered(dump.memory.segments) - dump.envelope.all
    # RAM once, the kernel image, and whole sections of the device
    assert dump.vmcore.size < 4 * ram.size + 64 * MIB
    assert len(dump.core.header) < 4 * MIB
    assert report.map_text(dump)
    report.as_json(report.guard_json(dump))
    crash = dump.machine.own
    for e in dump.core.extents:
        inside = RangeSet([(e.paddr, e.paddr + e.size)])
        for piece in [*(inside - readable), *(inside & crash)][:8]:
            assert dump.vmcore.read(e.offset + piece.start - e.paddr, PAGE) == bytes(PAGE)
    assert dump.vmcore.read(dump.vmcore.size - 1, 2) == dump.vmcore.read(dump.vmcore.size - 1, 1)


def dump_of(record: RecordedMachine, layout: str, ram: RangeSet) -> Dump | None:
    error = ""
    try:
        dump = build(ImageMachine(record), layout)
    except Error as e:
        error = str(e)
        return None
    finally:
        assert "\n" not in error
    try:
        check(dump, ram)
    finally:
        dump.close()
    return dump


def records(machine: Machine) -> list[tuple[RecordedMachine, RangeSet]]:
    image = machine.folder / "ram.raw"
    found = [(load(str(machine.folder)), RangeSet([*RAM, *DEVICE.runs()]))]
    with suppress(Error):
        found.append((of_image(str(image)), RangeSet([(0, image.stat().st_size)])))
    return found


def words() -> st.SearchStrategy[bytes]:
    """What hurts most where a pointer, a size or a count is expected."""
    edges = [0, 1, 11, 0x1200, PAGE, MIB, CRASH[0], CRASH[1], CRASH[1] - 1, RAM[0][1], RAM[1][0], RAM[1][1], GIB]
    edges += [1 << 31, 1 << 32, 1 << 52, 1 << 63, (1 << 64) - 1, (1 << 64) - PAGE, (1 << 64) - 0x2000]
    numbers = st.sampled_from(edges) | st.integers(0, (1 << 64) - 1) | st.integers(0, RAM[1][1])
    pointers = st.builds(lambda base, more: base + more, st.sampled_from([0x12 << 32, 0x3FFE0068000]), numbers)
    return (numbers | pointers).map(lambda n: struct.pack(">Q", n % (1 << 64)))


fuzz = settings(deadline=None, suppress_health_check=list(HealthCheck))
layouts = st.sampled_from(["kernel", "cut"])


@settings(fuzz, max_examples=200)
@given(data=st.data())
def test_damaged_structures(machine: Machine, data: st.DataObject) -> None:
    damage = []
    for _ in range(data.draw(st.integers(1, 6))):
        at, size = data.draw(st.sampled_from(machine.places))
        at += data.draw(st.sampled_from([0, 8]) | st.integers(0, size - 1))
        damage.append((at, data.draw(words() | st.binary(min_size=1, max_size=32) | st.just(b"\xff" * PAGE))))
    with machine.damaged(damage, data.draw(st.booleans())):
        for record, ram in records(machine):
            dump_of(record, data.draw(layouts), ram)


@settings(fuzz, max_examples=150)
@given(data=st.data())
def test_sealed_os_info_with_any_entries(machine: Machine, data: st.DataObject) -> None:
    at = machine.made.at["os_info"]
    entries = st.lists(
        st.tuples(st.sampled_from([0, 4, 5, 6, 10, 11, 12]), st.sampled_from([0, 8]), words()), min_size=1
    )
    damage = [(at + 32 + 20 * index + more, value) for index, more, value in data.draw(entries)]
    with machine.damaged(damage, True):
        for record, ram in records(machine):
            dump_of(record, data.draw(layouts), ram)


@settings(fuzz, max_examples=150)
@given(data=st.data())
def test_damaged_vmcoreinfo(machine: Machine, data: st.DataObject) -> None:
    """Its lines are believed where os_info's own copy of them, and os_info itself, are not sound."""
    m = machine.made
    note = bytearray(m.get(m.at["note"], 24 + len(m.text)))
    for _ in range(data.draw(st.integers(1, 4))):
        found = data.draw(st.sampled_from(list(re.finditer(rb"=(\w+)\n", bytes(note)))))
        number = int.from_bytes(data.draw(words()), "big")
        other = data.draw(st.sampled_from([f"{number:x}", str(number), "ffffffffffffffff", "1", "0", "-1", ""]))
        value = other.encode() or data.draw(st.binary(max_size=12))
        # the note keeps its size: what follows moves, or makes room
        note[found.start(1) :] = (value + note[found.end(1) :])[: len(note) - found.start(1)].ljust(
            len(note) - found.start(1)
        )
    damage = [(m.at["note"], bytes(note)), (m.at["vmcoreinfo"], b"?")]
    if data.draw(st.booleans()):
        damage.append((OS_INFO_POINTER, bytes(8)))
    with machine.damaged(damage, False):
        for record, ram in records(machine):
            dump_of(record, data.draw(layouts), ram)


@settings(fuzz, max_examples=100)
@given(data=st.data())
def test_image_of_any_length(machine: Machine, data: st.DataObject) -> None:
    image = machine.folder / "ram.raw"
    at, size = data.draw(st.sampled_from(machine.places))
    end = data.draw(st.just(machine.at(at) + size // 2) | st.integers(0, image.stat().st_size - 1))
    try:
        os.truncate(image, end)
        with pytest.raises(SourceError, match="expected at least"):
            load(str(machine.folder))
        with suppress(SourceError):
            dump_of(of_image(str(image)), data.draw(layouts), RangeSet([(0, end)]))
    finally:
        machine.made.write(machine.folder)


def test_sound_machine_passes_the_same_check(machine: Machine) -> None:
    for layout in ("kernel", "cut"):
        (record, ram), _ = records(machine)
        dump = dump_of(record, layout, ram)
        assert dump
        assert dump.problems == []
        assert dump.core.header == bytes(machine.made.expected(layout))
