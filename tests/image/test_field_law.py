# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever firmware's tables and the running kernel's /proc/iomem say in any combination, of a real crash: no page
outside of its RAM is read, and what is missing of its RAM is not exit status 0."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from guard.ranges import RangeSet
from tests.image.field import CRASH, DMI, FW_CFG, HIGH, LOW, NOTE, SRAT, WINDOW, Field, Span
from tests.image.field.look import look, put_smbios
from tests.image.machines import srat

BORDERS = [0, 0x100000, 0x8000800, CRASH[1], 0x18000000, LOW[1], 0x30000000, 0xC0000000]
BORDERS += [HIGH[0], 0x102345678, 0x104000000, 0x108000000, HIGH[1], 0x118000000, WINDOW[0], WINDOW[1], 1 << 42]
EDGES = [0, 0x100000, LOW[1], HIGH[0], HIGH[1]]
"""Those that most firmware knows."""
REGIONS = [(0x140000000, 0x180000000), (0x180000000, 0x1A0000000)]
"""Of virtio-mem: their devices alone tell."""
IOMEM = ["PCI Bus 0000:01", "0000:00:07.0", "PNP0C01:00", "pnp 00:01"]


class Firmware(NamedTuple):
    """None: there is no such table. *note* is "told", "unknown" or "lost"; *bars* and *lines* are half-open ranges that
    /proc/iomem has by that name."""

    fw_cfg: bool
    smbios: list[Span] | None
    srat: list[tuple[int, int, int]] | None
    checksum: bool
    lines: list[tuple[Span, str]]
    header: bool
    note: str

    @property
    def devices(self) -> RangeSet:
        return RangeSet(span for span, name in self.lines if name.startswith("0000:"))

    def apply(self, machine: Field) -> None:
        if not self.fw_cfg:
            machine.drop(FW_CFG)
        machine.drop(DMI, SRAT)
        if self.smbios is not None:
            put_smbios(machine, self.smbios)
        if self.srat is not None:
            table = bytearray(srat(self.srat))
            table[9] ^= not self.checksum
            machine.put(SRAT, bytes(table))
        text = (machine.folder / "root/proc/iomem").read_text()
        more = "".join(f"{start:08x}-{end - 1:08x} : {name}\n" for (start, end), name in self.lines)
        machine.put("proc/iomem", (text + more).encode())
        if not self.header:
            machine.without_header()
        if self.note != "told":
            machine.without_note()
        if self.note == "lost":
            machine.poke(NOTE + 12, b"XXXXXXXXXX")


borders = st.sampled_from(EDGES) | st.sampled_from(BORDERS)
spans = st.tuples(borders, borders).filter(lambda span: span[0] < span[1])
right_spans = st.just([LOW, HIGH])
flags = st.sampled_from([0, 1, 1, 2, 3, 3, 5])
entries = st.lists(st.tuples(spans, flags).map(lambda e: (*e[0], e[1])), max_size=4)
right_entries = st.tuples(flags, flags, flags).map(
    lambda f: [(0x100000, LOW[1], f[0]), (*HIGH, f[1]), (HIGH[1], WINDOW[1], f[2])]
)
firmwares = st.builds(
    Firmware,
    st.booleans(),
    st.none() | right_spans | st.lists(spans, max_size=3),
    st.none() | right_entries | entries,
    st.sampled_from([True, True, False]),
    st.lists(st.tuples(spans, st.sampled_from(IOMEM)), max_size=2),
    st.booleans(),
    st.sampled_from(["told", "unknown", "lost"]),
)


@pytest.fixture(scope="module")
def right(field_base: Path) -> RangeSet:
    return look(field_base).readable


NO_SHRINKING = [phase for phase in Phase if phase != Phase.shrink]
"""What fails is easily read, and each try takes a while."""
numbers = itertools.count()


@settings(
    deadline=None, max_examples=40, phases=NO_SHRINKING, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(firmwares)
def test_no_page_outside_of_ram_is_read_and_what_is_missing_of_it_is_not_exit_status_0(
    field_base: Path, tmp_path: Path, right: RangeSet, firmware: Firmware
) -> None:
    machine = Field(field_base, tmp_path / str(next(numbers)))
    firmware.apply(machine)
    answer = look(machine.write())
    assert answer.status in (0, 1, 4)
    assert not answer.readable & (firmware.devices - RangeSet(REGIONS))
    known = firmware.header or firmware.note != "lost"
    if known and not any("does not count" in line or "no VMCOREINFO" in line for line in answer.warnings):
        assert not answer.readable - right
    if right - answer.readable:
        assert answer.status, answer.warnings
