# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the platform alone says must not be read: a dump of the machine refuses exactly that, and where the evidence is
damaged, nothing for it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.dump import build
from capture.image_machine import ImageMachine
from capture.recorded import load
from capture.report import guard_json
from tests.image.machines import GIB, HIGH, MIB, RecordedKernel, Result, oldmem, phdrs_of
from tests.unit.platform_tables import (
    ACPI,
    ENABLED,
    GUID,
    SYSTAB,
    TABLE,
    TABLES,
    UNIT,
    northbridge,
    system_table,
    table,
)

APERTURE = (GIB, GIB + 64 * MIB)
UNACCEPTED = [(5 * GIB, 6 * GIB), (7 * GIB, 7 * GIB + UNIT), (8 * GIB - 4 * UNIT, 8 * GIB)]
ACPI_TABLES = (TABLE & -0x10000, 2 * GIB)
WHERE = f"EFI unaccepted memory table at {TABLE:#x}: "


def bitmap() -> bytes:
    bits = bytearray((HIGH[1] - HIGH[0]) // UNIT // 8)
    for start, end in UNACCEPTED:
        for unit in range((start - HIGH[0]) // UNIT, (end - HIGH[0]) // UNIT):
            bits[unit // 8] |= 1 << unit % 8
    return bytes(bits)


def efi_machine(data: bytes, at: int = TABLE, signature: bytes = b"IBI SYST") -> RecordedKernel:
    """A machine with EFI, whose unaccepted memory table at *at* is *data*."""
    machine = RecordedKernel()
    memory = machine.kernel.mem
    memory.write(SYSTAB, system_table(3, signature))
    for i, (guid, where) in enumerate([(ACPI, 0x7FFF8000), (GUID, at), (ACPI, 0)]):
        memory.write(TABLES + 24 * i, guid.bytes_le + struct.pack("<Q", where))
    if at < 2 * GIB:
        memory.write(at, data)
    machine.put("sys/firmware/efi/config_table", f"{TABLES:#x}\n".encode())
    info = struct.pack("<4s7I", b"EL64", SYSTAB, 48, 1, 0, 0, 0, 0)
    machine.put("sys/kernel/boot_params/data", bytes(0x1C0) + info + bytes(4096 - 0x1E0))
    for name, value in (("start", ACPI_TABLES[0]), ("end", ACPI_TABLES[1] - 1)):
        machine.put(f"sys/firmware/memmap/9/{name}", f"{value:#x}\n".encode())
    machine.put("sys/firmware/memmap/9/type", b"ACPI Tables\n")
    return machine


def written(machine: RecordedKernel, folder: Path) -> Path:
    machine.finish_kernel()
    return machine.write(folder)


def refused_by(name: str, result: Result) -> list[tuple[int, int]]:
    return [(e["start"], e["end"]) for e in json.loads(result.out)["entries"] if e["refused_by"] == name]


def test_unaccepted_memory_is_refused_and_nothing_else(tmp_path: Path) -> None:
    folder = written(efi_machine(table(bitmap())), tmp_path)
    result = oldmem("map", "--machine", folder, "--json")
    assert (result.status, result.lines) == (0, [])
    assert refused_by("unaccepted", result) == UNACCEPTED
    header = tmp_path / "header"
    assert oldmem("header", "--machine", folder, "-o", header).lines == []
    high = [p for p in phdrs_of(header.read_bytes()) if p.type == 1 and HIGH[0] <= p.paddr < HIGH[1]]
    assert [(p.paddr, p.paddr + p.memsz) for p in high] == [
        (4 * GIB, 5 * GIB),
        (6 * GIB, 7 * GIB),
        (7 * GIB + UNIT, 8 * GIB - 4 * UNIT),
    ]


def test_table_in_ram_is_read_too(tmp_path: Path) -> None:
    """Where the first kernels that had it put it."""
    result = oldmem("map", "--machine", written(efi_machine(table(bitmap()), 0x1F000008), tmp_path), "--json")
    assert (result.lines, refused_by("unaccepted", result)) == ([], UNACCEPTED)


def test_unaccepted_memory_is_not_touched_by_a_search_for_the_note(tmp_path: Path) -> None:
    """Without an address of the note all of boot RAM is searched: the rule must be there before."""
    machine = efi_machine(table(bitmap()))
    del machine.files["sys/firmware/qemu_fw_cfg/by_name/etc/vmcoreinfo/raw"]
    result = oldmem("map", "--machine", written(machine, tmp_path), "--json")
    assert refused_by("unaccepted", result) == UNACCEPTED
    assert len(result.warnings) == 1
    assert "found by searching" in result.warnings[0]


@pytest.mark.parametrize(
    ("machine", "line"),
    [
        (lambda: efi_machine(table(bitmap(), version=2)), WHERE + "version 2, expected 1"),
        (
            lambda: efi_machine(table(bitmap(), unit=0x180000)),
            WHERE + "units of 0x180000 bytes, expected a power of two of at least 0x1000",
        ),
        (
            lambda: efi_machine(table(bitmap(), base=12345)),
            WHERE + "starts at 0x3039, expected the physical address of a page",
        ),
        (
            lambda: efi_machine(table(bitmap(), size=1 << 40)),
            WHERE + "bitmap of 0x10000000000 bytes for memory from 0x100000000 on is not possible",
        ),
        (
            lambda: efi_machine(table(bitmap()[:64]), 2 * GIB - 64),
            "EFI unaccepted memory table at 0x7fffffc0: old memory at 0x80000000: refused by firmware",
        ),
        (
            lambda: efi_machine(b"", 3 * GIB),
            "EFI unaccepted memory table at 0xc0000000: old memory at 0xc0000000: refused by firmware",
        ),
        (
            lambda: efi_machine(b"", (1 << 64) - 4096),
            "EFI unaccepted memory table at 0xfffffffffffff000: is beyond all physical addresses",
        ),
    ],
)
def test_damaged_table_is_one_line_and_the_rest_goes_on(
    machine: Callable[[], RecordedKernel], line: str, tmp_path: Path
) -> None:
    result = oldmem("map", "--machine", written(machine(), tmp_path), "--json")
    assert result.status == 0
    assert result.lines == [f"oldmem: warning: {line}; nothing is refused for it"]
    assert refused_by("unaccepted", result) == []


def test_efi_that_cannot_be_followed_is_told_on_request(tmp_path: Path) -> None:
    folder = written(efi_machine(table(bitmap()), signature=b"scramble"), tmp_path)
    assert oldmem("map", "--machine", folder).lines == []
    line = f"EFI system table at {SYSTAB:#x}: signature b'scramble', expected b'IBI SYST'"
    told = oldmem("map", "-v", "--machine", folder).lines
    assert f"oldmem: note: {line}: not known whether memory was left unaccepted" in told


@pytest.mark.parametrize("missing", ["sys/firmware/efi/config_table", "sys/kernel/boot_params/data"])
def test_machine_without_efi_has_no_rule_and_no_line(missing: str, tmp_path: Path) -> None:
    machine = efi_machine(table(bitmap()))
    del machine.files[missing]
    result = oldmem("map", "--machine", written(machine, tmp_path), "--json")
    assert (result.lines, refused_by("unaccepted", result)) == ([], [])


def with_northbridges(*configs: bytes) -> RecordedKernel:
    machine = RecordedKernel()
    for i, config in enumerate(configs):
        machine.put(f"sys/bus/pci/devices/0000:00:{0x18 + i:02x}.3/config", config)
    return machine


def test_gart_aperture_is_refused_and_nothing_else(tmp_path: Path) -> None:
    machine = with_northbridges(northbridge(), northbridge(flags=ENABLED))
    result = oldmem("map", "--machine", written(machine, tmp_path), "--json")
    assert (result.status, result.lines) == (0, [])
    assert refused_by("GART aperture", result) == [APERTURE]


def test_northbridges_that_contradict_are_one_line(tmp_path: Path) -> None:
    machine = with_northbridges(northbridge(), northbridge(base=0))
    result = oldmem("map", "--machine", written(machine, tmp_path), "--json")
    assert result.lines == [
        "oldmem: warning: northbridge 0000:00:19.3: aperture none, but 0000:00:18.3 has 0x40000000-0x43ffffff; "
        "no GART aperture is refused"
    ]
    assert refused_by("GART aperture", result) == []


def test_platform_rules_are_in_the_guards_report(tmp_path: Path) -> None:
    machine = efi_machine(table(bitmap()))
    machine.put("sys/bus/pci/devices/0000:00:18.3/config", northbridge())
    folder = written(machine, tmp_path)
    dump = build(ImageMachine(load(str(folder))))
    rules = {r["name"]: r for r in guard_json(dump)["rules"]}
    dump.close()
    assert rules["unaccepted"]["refused"] == [list(span) for span in UNACCEPTED]
    assert rules["unaccepted"]["refused_bytes"] == sum(end - start for start, end in UNACCEPTED)
    assert rules["unaccepted"]["trouble"] == "not-ram"
    assert rules["GART aperture"]["refused"] == [list(APERTURE)]
    assert rules["GART aperture"]["trouble"] == "ram"


def test_recorded_xen_guest_is_not_asked(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.put("sys/hypervisor/type", b"xen\n")
    assert oldmem("map", "--machine", written(machine, tmp_path)).lines == []
