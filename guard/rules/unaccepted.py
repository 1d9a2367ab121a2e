# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that a confidential guest (TDX, SEV-SNP) had not accepted yet: touching it ends the guest at once.

EFI names a table with a bitmap of it, a bit set for each unit that is not accepted (include/linux/efi.h, struct
efi_unaccepted_memory; drivers/firmware/efi/libstub/unaccepted_memory.c). The dead kernel kept that up to date in
place, and the capture kernel gates /proc/vmcore by the same. The table is found as the capture kernel finds it, through
EFI's configuration tables, and not through the dead kernel's variable `efi`: the way there leads through a search of
old memory for its VMCOREINFO, and that would touch what is not accepted.

A table that cannot be read or makes no sense leaves nothing that may safely be touched: then old memory may be read
through /proc/vmcore alone, where the kernel still has its own word on it; on an image there is nothing to be harmed.
Refusing the pages above some border instead would be no answer: what firmware accepts before the kernel runs differs.

One difference from drivers/firmware/efi/unaccepted_memory.c: the last page before a unit that is not accepted is read.
The kernel spares it for its load_unaligned_zeropad(), which loads beyond its operand; nothing here does."""

from __future__ import annotations

import struct

from guard.errors import ReadError, WitnessError
from guard.pageset import PageSet
from guard.ranges import Range
from guard.registry import Rule
from guard.witness.memory import Memory

NAME = "unaccepted"
MAX_TABLES = 512
"""Configuration tables looked through; firmware has some twenty."""

_SIGNATURE = b"IBI SYST"
_COUNT_AT = 104
_GUID = bytes.fromhex("3cded1d55c10f9449ea9bcef98120031")
"""LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID d5d1de3c-105c-44f9-9ea9-bcef98120031."""
_TABLE = struct.Struct("<16sQ")
_HEADER = struct.Struct("<IIQQ")
_VERSION = 1
_MAX_PADDR = 1 << 52
_MAX_BITMAP = 16 << 20
"""256 TiB in units of 2 MiB."""


def find(memory: Memory, systab: int, tables: int) -> int | None:
    """Physical address of the table; None where EFI has none. *systab* and *tables* are the physical addresses of the
    EFI system table and of the array of configuration tables (UEFI specification, "EFI System Table"). Raises
    WitnessError where these cannot be followed."""
    where = f"EFI system table at {systab:#x}"
    header = _read(memory, systab, _COUNT_AT + 4, where)
    if header[:8] != _SIGNATURE:
        raise WitnessError(f"{where}: signature {header[:8]!r}, expected {_SIGNATURE!r}")
    count = int.from_bytes(header[_COUNT_AT:], "little")
    if not 0 < count <= MAX_TABLES:
        raise WitnessError(f"{where}: {count} configuration tables, expected 1 to {MAX_TABLES}")
    array = _read(memory, tables, _TABLE.size * count, f"EFI configuration tables at {tables:#x}")
    return next((at for guid, at in _TABLE.iter_unpack(array) if guid == _GUID), None)


def rule(memory: Memory, at: int, ram_end: int, page_size: int = 4096) -> Rule:
    """Refuses each unit whose bit is set, as far as there is RAM (up to *ram_end*), by the table at physical address
    *at*. Raises WitnessError where that cannot be read or makes no sense."""
    where = f"EFI unaccepted memory table at {at:#x}"
    version, unit, base, size = _HEADER.unpack(_read(memory, at, _HEADER.size, where))
    if version != _VERSION:
        raise WitnessError(f"{where}: version {version}, expected {_VERSION}")
    if unit < page_size or unit & unit - 1:
        raise WitnessError(f"{where}: units of {unit:#x} bytes, expected a power of two of at least {page_size:#x}")
    if base % page_size or base >= _MAX_PADDR:
        raise WitnessError(f"{where}: starts at {base:#x}, expected the physical address of a page")
    if not size or base + size * 8 * unit > _MAX_PADDR:
        raise WitnessError(f"{where}: bitmap of {size:#x} bytes for memory from {base:#x} on is not possible")
    units = min(size * 8, max(0, ram_end - base + unit - 1) // unit)
    if units > _MAX_BITMAP * 8:
        raise WitnessError(f"{where}: units of {unit:#x} bytes are too many for RAM up to {ram_end:#x}")
    bitmap = _read(memory, at + _HEADER.size, (units + 7) // 8, where) if units else b""
    pages = PageSet.of_bitmap(base, unit, units, bitmap, page_size)
    return Rule(NAME, Range(base, base + units * unit), pages, True, "not accepted: touching it would end the guest")


def _read(memory: Memory, at: int, size: int, where: str) -> bytes:
    if at >= _MAX_PADDR:
        raise WitnessError(f"{where}: is beyond all physical addresses")
    try:
        return memory.read(at, size)
    except ReadError as error:
        raise WitnessError(f"{where}: {error}") from None
