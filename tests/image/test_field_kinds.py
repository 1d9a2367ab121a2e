# SPDX-License-Identifier: LGPL-2.1-or-later
"""More of each kind of situation from the field (test_field_cases.py), on the same real crash: what firmware, the
running kernel's /proc/iomem and a recorded machine can say that is odd, coarse or wrong, and what it must not cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from guard.ranges import RangeSet
from tests.image.field import BOOT, DMI, FW_CFG, HIGH, LOW, NOTE, SRAT, WINDOW, Field, Span
from tests.image.field.look import CACHE, END_OF_TABLE, FLASH, SYSTEM_MEMORY, look, put_smbios, type_16, type_19
from tests.image.machines import srat

Change = Callable[[Field], object]
TABLE = DMI + "/tables/DMI"
LOW_RAM, MIDDLE, UPPER = (0x100000, LOW[1]), (0x104000000, 0x104100000), (0x108000000, HIGH[1])
"""MIDDLE is RAM that holds no record of the dead kernel, UPPER holds its resource tree."""
ALL = (0, 1 << 52)
ODD = (HIGH[0], 0x101234567)
NO_HOLE, HOLE = (0, 0x30000000), (LOW[1], 0x30000000)
BAD = ["bad checksum"]
READ = "was System RAM that no firmware table here calls RAM: read, on the dead kernel's word"


def all_of(*changes: Change) -> Change:
    def change(machine: Field) -> None:
        for one in changes:
            one(machine)

    return change


def without(*names: str) -> Change:
    return lambda machine: machine.drop(*names)


def affinity(*entries: tuple[int, int, int]) -> Change:
    return lambda machine: machine.put(SRAT, srat(entries))


def bad_affinity(*entries: tuple[int, int, int]) -> Change:
    """With a wrong checksum."""

    def change(machine: Field) -> None:
        table = bytearray(srat(entries))
        table[9] ^= 1
        machine.put(SRAT, bytes(table))

    return change


def smbios(*spans: Span) -> Change:
    return all_of(without(FW_CFG), lambda machine: put_smbios(machine, spans))


def smbios_entries(*spans: Span) -> Change:
    """As the dmi-sysfs module shows them, without the whole table."""

    def change(machine: Field) -> None:
        machine.drop(FW_CFG, DMI)
        for i, span in enumerate(spans):
            machine.put(f"{DMI}/entries/19-{i}/raw", type_19([span]))

    return change


def smbios_arrays(*arrays: tuple[int, list[Span]]) -> Change:
    """Memory arrays, each with its use."""

    def change(machine: Field) -> None:
        machine.drop(FW_CFG, SRAT, DMI)
        table = b"".join(type_16(0x1000 + i, use) for i, (use, _) in enumerate(arrays))
        table += b"".join(type_19(spans, 0x1000 + i) for i, (_, spans) in enumerate(arrays))
        machine.put(TABLE, table + END_OF_TABLE)

    return change


def e820(*entries: tuple[int, int, int]) -> Change:
    return lambda machine: machine.put_e820(entries)


def memmap(*entries: tuple[int, int, str]) -> Change:
    def change(machine: Field) -> None:
        for number, (start, end, kind) in enumerate(entries, 50):
            for name, value in (("start", f"{start:#x}"), ("end", f"{end - 1:#x}"), ("type", kind)):
                machine.put(f"sys/firmware/memmap/{number}/{name}", f"{value}\n".encode())

    return change


def iomem(*lines: str, replace: tuple[str, str] = ("", "")) -> Change:
    def change(machine: Field) -> None:
        text = (machine.folder / "root/proc/iomem").read_text().replace(*replace)
        machine.put("proc/iomem", (text + "".join(f"{line}\n" for line in lines)).encode())

    return change


def no_hint(machine: Field) -> None:
    machine.without_note()
    machine.without_header()


def no_note(machine: Field) -> None:
    no_hint(machine)
    machine.poke(NOTE + 12, b"XXXXXXXXXX")


def without_upper_image(machine: Field) -> None:
    (ram,) = (entry for entry in machine.document["ram"] if entry["paddr"] == HIGH[0])
    pages = (UPPER[0] - HIGH[0]) // 4096
    ram["size"] = UPPER[0] - HIGH[0]
    ram["held"] = [[first, min(count, pages - first)] for first, count in ram["held"] if first < pages]


WITHOUT_TABLES = without(FW_CFG, DMI, SRAT)
FLAGGED = affinity((*LOW_RAM, 3), (*HIGH, 3), (HIGH[1], WINDOW[1], 3))
SECOND_NODE_FLAGGED = affinity((*LOW_RAM, 1), (HIGH[0], WINDOW[1], 3))

COMPLETE: list[tuple[str, Change, list[str]]] = [
    # A: hot-pluggable flags
    ("all flagged, beside fw_cfg", FLAGGED, []),
    ("all flagged, dead kernel alone tells", all_of(without(FW_CFG, DMI), FLAGGED), []),
    ("one flagged entry over everything", all_of(smbios(LOW, HIGH), affinity((*ALL, 3))), []),
    ("one flagged entry over everything, no other table", all_of(without(FW_CFG, DMI), affinity((*ALL, 3))), []),
    ("second node flagged, the note in it", all_of(without(FW_CFG, DMI), SECOND_NODE_FLAGGED), []),
    ("flagged entry that spans RAM and more", all_of(smbios(LOW, HIGH), SECOND_NODE_FLAGGED), []),
    (
        "entries split inside of pages",
        all_of(
            smbios(LOW, HIGH),
            affinity((0x100000, 0x8123400, 3), (0x8123400, LOW[1], 1), (*ODD, 3), (ODD[1], 1 << 40, 3)),
        ),
        [],
    ),
    ("SMBIOS structure by structure", all_of(smbios_entries(LOW, HIGH), FLAGGED), []),
    ("SMBIOS too large, in a flagged window", all_of(smbios(LOW, (HIGH[0], 0x118000000)), SECOND_NODE_FLAGGED), []),
    ("entries that are not enabled", all_of(smbios(LOW, HIGH), affinity((*LOW, 2), (*HIGH, 0), (*WINDOW, 3))), []),
    ("boot RAM called non-volatile", all_of(smbios(LOW, HIGH), affinity((*LOW, 5), (*HIGH, 7))), []),
    # B: more RAM told of than the kernel used
    ("4 TiB of RAM told of", all_of(smbios((0, 1 << 42)), affinity((0, 1 << 42, 1))), []),
    # C: what is no RAM, and what only seems to be none
    ("bus window inside RAM, all sources", iomem("104000000-1040fffff : PCI Bus 0000:01"), []),
    ("bus window inside RAM, fw_cfg", all_of(without(DMI, SRAT), iomem("104000000-1040fffff : PCI Bus 0000:01")), []),
    ("bus window inside RAM, images", all_of(WITHOUT_TABLES, iomem("104000000-1040fffff : PCI Bus 0000:01")), []),
    ("system board over all RAM, images", all_of(WITHOUT_TABLES, iomem("00100000-10fffffff : PNP0C01:00")), []),
    ("system board over all RAM, fw_cfg", all_of(without(DMI, SRAT), iomem("00100000-10fffffff : pnp 00:01")), []),
    ("flash array in the PCI hole", smbios_arrays((SYSTEM_MEMORY, [NO_HOLE, HIGH]), (FLASH, [HOLE])), []),
    ("cache array inside RAM", smbios_arrays((SYSTEM_MEMORY, [LOW, HIGH]), (CACHE, [MIDDLE])), [READ]),
    ("bad SRAT that has the hole", all_of(smbios(NO_HOLE, HIGH), bad_affinity((*LOW, 1), (*HIGH, 1))), BAD),
    ("bad SRAT that lacks RAM", all_of(smbios(LOW, HIGH), bad_affinity((*LOW, 1), (*ODD, 1))), BAD),
    ("bad SRAT that is wider", all_of(smbios(LOW, HIGH), bad_affinity((0, 1 << 40, 1))), BAD),
    ("bad SRAT alone", all_of(without(FW_CFG, DMI), bad_affinity((0, 1 << 40, 1))), BAD),
    # D: RAM that the tables lack
    ("persistent memory by kmem", e820((*LOW, 1), (HIGH[0], UPPER[0], 1), (*UPPER, 7)), [READ]),
    ("type 12 by kmem", all_of(without(DMI, SRAT), e820((*LOW, 1), (HIGH[0], UPPER[0], 1), (*UPPER, 12))), [READ]),
    (
        "non-volatile of SRAT by kmem",
        all_of(smbios(LOW, (HIGH[0], UPPER[0])), affinity((*LOW, 1), (HIGH[0], UPPER[0], 1), (*UPPER, 5))),
        [READ],
    ),
    ("DIMM without SRAT", all_of(without(DMI, SRAT), e820((*LOW, 1), (HIGH[0], UPPER[0], 1))), [READ]),
    ("SMBIOS up to 3 GiB", all_of(smbios(LOW, (LOW[1], 0xC0000000)), without(SRAT)), [READ]),
    ("SRAT without the hole", all_of(smbios(LOW, HIGH), affinity((*NO_HOLE, 1))), []),
    ("SMBIOS and SRAT have nothing in common", all_of(smbios(LOW), affinity((*HIGH, 1))), []),
    ("... and SRAT's part is flagged", all_of(smbios(LOW), affinity((*HIGH, 3))), []),
    ("fw_cfg lacks the second half", all_of(without(DMI, SRAT), e820((*LOW, 1))), [READ]),
    # E: what tells of notes is garbage
    ("elfcorehdr= names no header", lambda m: m.put("proc/cmdline", b"elfcorehdr=0x100000\n"), []),
    ("elfcorehdr= beyond any memory", lambda m: m.put("proc/cmdline", b"elfcorehdr=0xfffffffffffff000\n"), []),
    ("prepared header overwritten", lambda m: m.poke(0x15F5D000, b"\xff" * 4096), []),
    ("/proc/vmcore is no ELF file", lambda m: m.put("proc/vmcore", b"\xff" * 4096), ["no ELF magic"]),
    # F: System RAM at odd bytes
    ("kernel's RAM ends at an odd byte", iomem(replace=("15f5cfff", "15f5d122")), []),
    ("kernel's RAM begins at an odd byte", iomem(replace=("0a000000-", "0a000001-")), []),
    # G: no copies of /sys and /proc
    ("no root, no word on the note", all_of(without("."), Field.without_note), ["iomem: absent", "found by searching"]),
]  # fmt: skip


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


@pytest.mark.parametrize(("change", "lines"), [c[1:] for c in COMPLETE], ids=[c[0] for c in COMPLETE])
def test_all_is_read_and_nothing_else_whatever_firmware_says(
    machine: Field, right: RangeSet, change: Change, lines: list[str]
) -> None:
    change(machine)
    answer = look(machine.write())
    assert answer.readable == right, answer.warnings
    assert answer.status == 0
    assert len(answer.warnings) == len(lines)
    for line in lines:
        assert answer.says(line), answer.warnings


EDGE = (HIGH[0], HIGH[0] + 0x1000)
OTHER_USE = "the dead kernel used it as System RAM, but firmware or this kernel has something else there"

LACKING: list[tuple[str, Change, Span, str]] = [
    ("BAR inside RAM", iomem("104000000-1040fffff : 0000:00:07.0"), MIDDLE, OTHER_USE),
    ("unknown type in fw_cfg", e820((*LOW, 1), (*HIGH, 1), (*MIDDLE, 77)), MIDDLE, OTHER_USE),
    ("reserved at the edge", e820((*LOW, 1), (*HIGH, 1), (*EDGE, 2)), EDGE, OTHER_USE),
    ("unknown type of memmap", all_of(WITHOUT_TABLES, memmap((*MIDDLE, "Unknown E820 type"))), MIDDLE, OTHER_USE),
    ("type that no kernel prints", all_of(WITHOUT_TABLES, memmap((*MIDDLE, "Device Reserved"))), MIDDLE, OTHER_USE),
]  # fmt: skip


@pytest.mark.parametrize(("change", "span", "why"), [c[1:] for c in LACKING], ids=[c[0] for c in LACKING])
def test_what_is_known_to_be_no_ram_is_not_read_and_told_as_lost_if_the_dead_kernel_used_it(
    machine: Field, right: RangeSet, change: Change, span: Span, why: str
) -> None:
    change(machine)
    answer = look(machine.write())
    assert answer.readable == right - RangeSet([span]), answer.warnings
    assert (answer.status, answer.lost) == (4, RangeSet([span]))
    assert len(answer.warnings) == 1
    assert answer.says(why)


def test_pages_that_are_reserved_in_part_are_not_read(machine: Field, right: RangeSet) -> None:
    e820((*LOW, 1), (MIDDLE[0] + 0x800, MIDDLE[1] + 0x800, 2), (*HIGH, 1))(machine)
    answer = look(machine.write())
    assert answer.readable == right - RangeSet([(MIDDLE[0], MIDDLE[1] + 0x1000)])
    assert answer.status == 4


NO_RECORDS: list[tuple[str, Change, RangeSet, str]] = [
    (
        "system board over all RAM",
        all_of(without(DMI, SRAT), iomem("00100000-10fffffff : pnp 00:01")),
        RangeSet(BOOT),
        "one source calls it RAM, another speaks against it",
    ),
    (
        "SMBIOS without the hole, SRAT with it",
        all_of(smbios(NO_HOLE), affinity((*LOW, 1), (*HIGH, 1))),
        RangeSet([HIGH]),
        "one source calls it RAM, another speaks against it",
    ),
    (
        "SRAT without the hole, SMBIOS with it",
        all_of(smbios(LOW, HIGH), affinity((*NO_HOLE, 1))),
        RangeSet([HIGH]),
        "one source calls it RAM, another speaks against it",
    ),
    ("second node flagged", all_of(without(FW_CFG, DMI), SECOND_NODE_FLAGGED), RangeSet([HIGH]), "hot-plugged there"),
    ("SMBIOS up to 3 GiB", all_of(smbios(LOW), without(SRAT)), RangeSet([HIGH]), "an image holds it"),
    (
        "BAR over half of RAM",
        iomem("100000000-10fffffff : 0000:00:07.0"),
        RangeSet([HIGH]),
        "fw_cfg calls it RAM, but this kernel has a device there",
    ),
    (
        "bus window inside of the only image",
        all_of(WITHOUT_TABLES, iomem("104000000-1040fffff : PCI Bus 0000:01")),
        RangeSet([MIDDLE]),
        "one source calls it RAM, another speaks against it",
    ),
]


@pytest.mark.parametrize(("change", "lacking", "why"), [c[1:] for c in NO_RECORDS], ids=[c[0] for c in NO_RECORDS])
def test_where_no_dead_kernel_tells_ram_in_doubt_is_not_read_and_told_as_lost(
    machine: Field, right: RangeSet, change: Change, lacking: RangeSet, why: str
) -> None:
    change(machine)
    no_note(machine)
    answer = look(machine.write())
    boot = RangeSet(BOOT)
    assert answer.readable & boot == boot - lacking, answer.warnings
    assert answer.status == 4
    assert not lacking - answer.lost
    assert answer.says(" is lost: ", why)
    assert not answer.lost & RangeSet([(0, 0x100000)])  # which is never old memory


def test_memory_of_a_device_that_only_the_dead_kernel_tells_of_is_not_read_without_the_devices_word(
    machine: Field,
) -> None:
    WITHOUT_TABLES(machine)  # so that no hotplug window is known either
    machine.document["virtio_mem"] = []
    answer = look(machine.write())
    assert answer.readable == RangeSet(BOOT)
    assert answer.status == 4
    assert answer.warnings == [
        "0x140000000-0x15fffffff is lost: nothing tells its state",
        "0x180000000-0x187ffffff is lost: nothing tells its state",
    ]


def test_image_of_a_device_that_is_named_as_ram_is_read_by_the_dead_kernels_marks(
    machine: Field, right: RangeSet
) -> None:
    """A host's dump of all of a guest's memory: reading an image harms nothing."""
    WITHOUT_TABLES(machine)
    devices, machine.document["virtio_mem"] = machine.document["virtio_mem"], []
    machine.document["ram"] += [
        {"image": d["image"], "paddr": d["addr"], "size": d["region_size"], "held": d["held"]} for d in devices
    ]
    answer = look(machine.write())
    assert (answer.status, answer.readable, answer.warnings) == (0, right, [])


@pytest.mark.parametrize(
    "change",
    [
        all_of(without(DMI, SRAT), e820((*LOW, 1), (HIGH[0], UPPER[0], 1)), without_upper_image),
        e820((*LOW, 1), (*HIGH, 1), (UPPER[0], (1 << 64) - 1, 2)),
    ],
    ids=["no image of a DIMM", "reserved entry without end"],
)
def test_resource_tree_in_memory_that_nobody_calls_ram_is_no_complete_dump(machine: Field, change: Change) -> None:
    change(machine)
    answer = look(machine.write())
    assert not answer.readable & RangeSet([UPPER])
    assert answer.status == 4
    assert answer.says(" is lost: the dead kernel's records lie there, but fw_cfg does not have it")


def test_header_of_the_kernel_that_lists_what_firmware_calls_reserved_is_told_where_no_dead_kernel_tells(
    field_base: Path, tmp_path: Path
) -> None:
    machine = Field(field_base, tmp_path / "changed")
    memmap((*MIDDLE, "Reserved"))(machine)
    header = (machine.folder / "root/proc/vmcore").read_bytes()
    no_note(machine)
    machine.put("proc/vmcore", header.replace(b"VMCOREINFO\0", b"XXXXXXXXXX\0"))
    answer = look(machine.write())
    assert not answer.readable & RangeSet([MIDDLE])
    assert answer.status == 4
    assert answer.says("0x104000000-0x1040fffff is lost: the kernel's own header has it, but firmware")


@pytest.mark.parametrize("arguments", [["--mode", "preloaded"], ["--layout", "kernel"]], ids=" ".join)
@pytest.mark.parametrize(
    "change",
    [
        iomem(replace=("15f5cfff", "15f5d122")),
        iomem(replace=("0a000000-", "0a000001-")),
        iomem(replace=("00001000-0009fbff : System", "00001234-0009fbff : System")),
        iomem("15fffe00-15ffffff : System RAM", replace=("15fffc00-15ffffff", "15fffc00-15fffdff")),
    ],
    ids=["end", "start", "low memory", "two in a page"],
)  # fmt: skip
def test_system_ram_at_odd_bytes_changes_nothing_in_any_mode(
    field_base: Path, tmp_path: Path, change: Change, arguments: list[str]
) -> None:
    machine = Field(field_base, tmp_path / "changed")
    change(machine)
    base, answer = look(field_base, *arguments), look(machine.write(), *arguments)
    assert (answer.status, answer.warnings) == (0, [])
    assert answer.readable == base.readable


def test_plugged_memory_of_a_device_without_image_is_lost(machine: Field, right: RangeSet) -> None:
    for key in ("image", "offset", "held"):
        machine.document["virtio_mem"][0].pop(key, None)
    answer = look(machine.write())
    device = RangeSet([(0x140000000, 0x180000000)])
    assert (answer.status, answer.readable, answer.lost) == (4, right - device, right & device)


@pytest.mark.parametrize("keep", [64, 120, 4096])
def test_kernels_header_that_is_cut_short_costs_one_line(
    field_base: Path, machine: Field, right: RangeSet, keep: int
) -> None:
    machine.put("proc/vmcore", (field_base / "root/proc/vmcore").read_bytes()[:keep])
    folder = machine.write()
    answer = look(folder)
    assert (answer.status, answer.readable, len(answer.warnings)) == (0, right, 1)
    assert answer.says(f"proc/vmcore: ends at {keep:#x}, expected ")
    assert look(folder, "--mode", "preloaded").status == 1


def test_missing_folder_is_no_traceback(machine: Field) -> None:
    shutil.rmtree(machine.folder / "root")
    machine.document.pop("root")
    assert look(machine.write()).status == 0
