# SPDX-License-Identifier: LGPL-2.1-or-later
"""Situations from the field, on a real crash (tests/image/field) whose firmware or memory says something else: what
firmware's tables, odd flags and damage must not cost, and what must not be read for them.

Files of makedumpfile and images of other formats have tests of their own: test_makedumpfile.py,
tests/unit/test_check*.py, tests/unit/test_file_kind.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard.ranges import RangeSet
from tests.image import field
from tests.image.field import BOOT, CRASH, DMI, FW_CFG, HIGH, LOW, NOTE, SRAT, WINDOW, Field, Span
from tests.image.field.huge import make_huge_page_poisoned
from tests.image.field.look import Answer, look, put_smbios
from tests.image.machines import oldmem, phdrs_of, srat

UNUSED = [(HIGH[1], WINDOW[0] - 0x1000000), (WINDOW[1], WINDOW[1] + 0x1F000000)]
FIRST_MIB = (0, 0x100000)
LOW_RAM = (0x100000, LOW[1])
FLAGGED = [(*FIRST_MIB, 3), (*LOW_RAM, 3), (*HIGH, 3), (HIGH[1], WINDOW[1], 3)]


@pytest.fixture
def machine(field_base: Path, tmp_path: Path) -> Field:
    """The crash without the kernel's own header."""
    made = Field(field_base, tmp_path / "changed")
    made.drop("proc/vmcore")
    return made


@pytest.fixture(scope="module")
def right(field_base: Path) -> RangeSet:
    """What may be read of it."""
    return look(field_base).readable


def with_empty_low_memory(machine: Field) -> Field:
    """Nothing of the dead kernel is left, so that firmware alone tells."""
    machine.without_note()
    machine.document["virtio_mem"] = []
    machine.document["ram"] = []
    return add_image(machine, LOW)


def add_image(machine: Field, span: Span) -> Field:
    """Memory that is all zeros."""
    name = f"zeros{span[0]:x}.raw"
    with (machine.folder / name).open("wb") as image:
        image.truncate(span[1] - span[0])
    machine.document["ram"].append({"image": name, "offset": 0, "paddr": span[0], "size": span[1] - span[0]})
    return machine


def same(answer: Answer, right: RangeSet) -> bool:
    return (answer.status, answer.readable, answer.lost) == (0, right, RangeSet())


# A: hot-pluggable flags


@pytest.mark.parametrize("smbios", [True, False])
def test_boot_ram_is_read_where_srat_flags_all_of_it_as_on_hyper_v(
    field_base: Path, tmp_path: Path, smbios: bool
) -> None:
    machine = Field(field_base, tmp_path / "changed")
    machine.drop(FW_CFG, DMI)
    if smbios:
        machine.drop("proc/vmcore")
        put_smbios(machine, [LOW, HIGH])
    beyond = [(1 << n, 2 << n, 3) for n in range(36, 52)]
    machine.put(SRAT, srat([(*LOW, 3), (*HIGH, 3), (HIGH[1], 0xFE0000000, 3), *beyond]))
    machine.document["virtio_mem"] = []
    answer = look(machine.write())
    assert (answer.readable, answer.status) == (RangeSet(BOOT), 4)
    assert answer.warnings == [
        "0x140000000-0x15fffffff is lost: nothing tells its state",
        "0x180000000-0x187ffffff is lost: nothing tells its state",
    ]


@pytest.mark.parametrize("plain", [0, 2], ids=["all", "second node"])
def test_boot_ram_that_smbios_tells_is_read_where_srat_flags_it(machine: Field, right: RangeSet, plain: int) -> None:
    machine.drop(FW_CFG)
    put_smbios(machine, [LOW, HIGH])
    machine.put(SRAT, srat([(a, b, 1 if i < plain else f) for i, (a, b, f) in enumerate(FLAGGED)]))
    assert same(look(machine.write()), right)


# B: marks stand on their own evidence


def test_poisoned_pages_are_refused_where_the_kernel_used_less_than_half_of_the_machine(
    machine: Field, right: RangeSet
) -> None:
    machine.drop(SRAT, DMI)
    machine.put_e820([(*LOW, 1), (*HIGH, 1), *((*span, 1) for span in UNUSED)])
    for span in UNUSED:
        add_image(machine, span)
    answer = look(machine.write())
    assert same(answer, right)
    refused = {(e["start"], e["end"]): e["refused_by"] for e in answer.document["entries"]}
    assert all(refused[span] == "dead kernel" for span in UNUSED)


def test_poison_on_the_head_of_a_huge_page_refuses_all_of_it_and_nothing_else(machine: Field, right: RangeSet) -> None:
    page = make_huge_page_poisoned(machine, HIGH)
    answer = look(machine.write())
    assert same(answer, right - RangeSet([page]))


# C: what is no RAM


def test_hole_that_smbios_alone_calls_ram_is_not_read_where_this_kernel_has_a_bus(machine: Field) -> None:
    size = 0x30000000
    machine.drop(FW_CFG, SRAT)
    put_smbios(machine, [(0, size)])
    with_empty_low_memory(machine).document["ram"] = []
    answer = look(add_image(machine, (0, size)).write())
    assert answer.readable == RangeSet([(0x100000, CRASH[0]), (0x15F5D000, 0x15FFF000), (CRASH[1], BOOT[1][1])])
    assert answer.says("0x20000000-0x2fffffff is lost: one source calls it RAM, another speaks against it")
    assert (answer.status, answer.lost) == (4, RangeSet([(LOW[1], size)]))


def test_range_of_a_type_that_no_kernel_knows_is_not_read(machine: Field) -> None:
    machine.drop(FW_CFG)
    for name, value in (("start", "0x18000000"), ("end", "0x180fffff"), ("type", "Unknown E820 type")):
        machine.put(f"sys/firmware/memmap/20/{name}", f"{value}\n".encode())
    answer = look(with_empty_low_memory(machine).write())
    assert answer.readable & RangeSet([CRASH[1:] + LOW[1:]]) == RangeSet(
        [(CRASH[1], 0x18000000), (0x18100000, BOOT[1][1])]
    )


def test_reserved_entry_inside_of_fw_cfgs_ram_is_not_read(machine: Field) -> None:
    machine.put_e820([(*LOW, 1), (0x18000000, 0x18100000, 2), (*HIGH, 1)])
    answer = look(with_empty_low_memory(machine).write())
    assert answer.readable & RangeSet([CRASH[1:] + LOW[1:]]) == RangeSet(
        [(CRASH[1], 0x18000000), (0x18100000, BOOT[1][1])]
    )
    assert answer.says("fw_cfg calls it RAM, but no image holds it")


# D: RAM that firmware's tables lack


def test_ram_behind_a_hole_that_smbios_does_not_know_is_read(machine: Field, right: RangeSet) -> None:
    machine.drop(FW_CFG)
    put_smbios(machine, [(0, LOW[1] + HIGH[1] - HIGH[0])])
    machine.put(SRAT, srat([(0, 0xA0000, 1), (*LOW_RAM, 1), (*HIGH, 1), (*WINDOW, 3)]))
    assert same(look(machine.write()), right)


def test_soft_reserved_memory_that_became_system_ram_is_read(machine: Field, right: RangeSet) -> None:
    soft = (0x108000000, 0x10A000000)
    machine.put_e820([(*LOW, 1), (HIGH[0], soft[0], 1), (*soft, 0xEFFFFFFF), (soft[1], HIGH[1], 1)])
    answer = look(machine.write())
    assert same(answer, right)
    assert answer.warnings == [
        "0x108000000-0x109ffffff was System RAM that no firmware table here calls RAM: read, on the dead kernel's word"
    ]


# E, F: the kernel's own header


def test_note_of_the_kernels_own_header_is_used_where_memory_has_lost_it(
    field_base: Path, tmp_path: Path, right: RangeSet
) -> None:
    machine = Field(field_base, tmp_path / "changed")
    machine.without_note()
    machine.poke(NOTE + 12, b"XXXXXXXXXX")
    folder, header = machine.write(), tmp_path / "header"
    assert same(look(folder), right)
    assert oldmem("header", "--machine", folder, "-o", header).status == 0
    (note,) = (p for p in phdrs_of(header.read_bytes()) if p.type == 4)
    assert b"VMCOREINFO\0" in header.read_bytes()[note.offset : note.offset + note.filesz]


def test_header_is_the_kernels_byte_for_byte_where_system_ram_begins_inside_of_a_page(
    field_base: Path, tmp_path: Path
) -> None:
    assert "15fffc00-15ffffff : System RAM" in (field_base / "root/proc/iomem").read_text()
    header = tmp_path / "header"
    made = oldmem("header", "--machine", field_base, "--mode", "preloaded", "-o", header)
    assert (made.status, made.lines) == (0, [])
    assert header.read_bytes() == (field_base / "root/proc/vmcore").read_bytes()
    assert look(field_base, "--mode", "preloaded").status == 0


# What is not there at all


def test_without_a_copy_of_sys_and_proc_the_dead_kernel_tells_what_crashkernel_reserved(
    machine: Field, right: RangeSet
) -> None:
    machine.drop(".")
    answer = look(machine.write())
    assert same(answer, right)
    assert len(answer.warnings) == 1
    assert answer.says("proc/iomem: absent; only the first MiB is taken to be the capture kernel's own")


def test_without_any_word_of_firmware_the_same_is_read(machine: Field, right: RangeSet) -> None:
    machine.drop(FW_CFG, DMI, "sys/firmware/acpi")
    machine.document.pop("vmcoreinfo_paddr")
    answer = look(machine.write())
    assert same(answer, right)
    assert answer.warnings == []


def test_what_the_live_kernel_called_poisoned_or_offline_is_in_no_answer(field_base: Path, right: RangeSet) -> None:
    told = field.truth(field_base)
    assert told["hwpoison"]
    assert told["offline"]
    assert not right & RangeSet(told["hwpoison"] + told["offline"])
