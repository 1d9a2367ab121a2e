# SPDX-License-Identifier: LGPL-2.1-or-later
"""No PT_LOAD lies where firmware and devices know of no memory, whatever the dead kernel's records say, in any
layout."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from capture.dump import CUT, KERNEL, Dump, build
from capture.image_machine import ImageMachine
from capture.recorded import load
from guard.ranges import RangeSet
from guard.witness.resources import BUSY, SYSTEM_RAM
from tests.image.field import HIGH, LOW, WINDOW, Field, Span
from tests.image.machines import GIB, MIB, PAGE, SMALL, RecordedKernel, oldmem, phdrs_of

BUS_AT, BUS = 0x100297440, (0xC0000000, 0xFEC00000)
"""Of the real crash: the struct resource of a PCI bus, which has the registers of its virtio devices inside."""
HIGH_AT = 0x10FFD3DC0
"""That of its upper RAM."""
FLAGS, END = 24, 8


def loads(folder: Path, layout: str) -> tuple[RangeSet, list[str], Dump]:
    """What the PT_LOADs of the vmcore list, and what is told of it."""
    dump = build(ImageMachine(load(str(folder))), layout)
    listed = RangeSet((p.paddr, p.paddr + p.memsz) for p in phdrs_of(dump.core.header) if p.type == 1)
    assert not listed - dump.envelope.all.outer_pages(PAGE)
    dump.close()
    return listed, dump.problems, dump


@pytest.mark.parametrize("layout", [CUT, KERNEL])
def test_registers_that_a_lying_resource_tree_calls_ram_are_not_listed(
    layout: str, field_base: Path, tmp_path: Path
) -> None:
    machine = Field(field_base, tmp_path / "changed")
    sound, told, _ = loads(machine.write(), layout)
    assert told == []
    machine.poke(BUS_AT + FLAGS, struct.pack("<Q", SYSTEM_RAM | BUSY))
    listed, told, dump = loads(machine.folder, layout)
    assert RangeSet([BUS]) & dump.arch.system_ram
    assert listed == sound
    line = f"the dead kernel's records have RAM at {RangeSet([BUS])}, where nothing else has any: not listed"
    assert (line in told) == (layout == KERNEL)
    out = tmp_path / "header"
    result = oldmem("header", "--layout", layout, "--machine", machine.folder, "-o", out)
    assert result.status == 4
    assert any("is lost: the dead kernel used it as System RAM" in line for line in result.warnings)


@pytest.mark.parametrize("layout", [CUT, KERNEL])
@pytest.mark.parametrize("bit", [12, 21, 27, 28, 30, 31, 32, 33, 34, 40, 46])
def test_ram_whose_end_has_a_wrong_bit_is_listed_as_far_as_there_is_any(
    bit: int, layout: str, field_base: Path, tmp_path: Path
) -> None:
    machine = Field(field_base, tmp_path / "changed")
    machine.poke(HIGH_AT + END, struct.pack("<Q", (HIGH[1] - 1) ^ 1 << bit))
    listed, _, _ = loads(machine.write(), layout)
    assert not listed - RangeSet([LOW, HIGH, WINDOW])


def with_end_of_image(end: int, tmp_path: Path) -> tuple[Path, int, int]:
    """A machine whose kernel's symbol _end is *end* bytes behind _text: folder, physical _text, its end by firmware."""
    machine = RecordedKernel()
    machine.shrink()
    kernel = machine.kernel
    kernel.symbols.append(("B", "_end", kernel.text_vaddr + end))
    machine.finish_kernel()
    ram = next(span for span in SMALL if span[0] <= kernel.text_paddr < span[1])
    return machine.write(tmp_path), kernel.text_paddr, ram[1]


def text_load(folder: Path, layout: str) -> tuple[list[Span], list[str]]:
    _, told, dump = loads(folder, layout)
    text = [p for p in phdrs_of(dump.core.header) if p.type == 1 and p.vaddr >= 0xFFFFFFFF80000000]
    return [(p.paddr, p.paddr + p.memsz) for p in text], told


@pytest.mark.parametrize("layout", [CUT, KERNEL])
def test_kernel_text_that_reaches_out_of_ram_is_cut_and_told(layout: str, tmp_path: Path) -> None:
    folder, start, ram_end = with_end_of_image(512 * MIB, tmp_path)
    assert start + 512 * MIB > ram_end
    text, told = text_load(folder, layout)
    assert text == [(start, ram_end)]
    size = ram_end - start
    assert f"kernel text of {512 * MIB:#x} bytes at {start:#x} is not all in RAM; cut to {size:#x} bytes" in told


@pytest.mark.parametrize("layout", [CUT, KERNEL])
@pytest.mark.parametrize("end", [0, -PAGE, GIB])
def test_kernel_text_that_is_larger_than_an_image_or_empty_is_left_out_and_told(
    end: int, layout: str, tmp_path: Path
) -> None:
    folder, _, _ = with_end_of_image(end, tmp_path)
    text, told = text_load(folder, layout)
    assert text == []
    assert any("dead kernel's image extent not known, left out: _text " in line for line in told)
