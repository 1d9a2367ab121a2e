# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firmware's memory map as the dead x86 kernel kept it: e820_table_firmware (arch/x86/kernel/e820.c).

A pointer variable; the table is nr_entries and then packed entries of addr, size and type
(arch/x86/include/asm/e820/types.h). Types are those of the e820 interface, 1 is RAM. Hot-added memory is not in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from guard.errors import WitnessError
from guard.ranges import RangeSet
from guard.witness.btf import Layout
from guard.witness.layouts import FIXED, unpacker
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk

SYMBOLS = frozenset({"e820_table_firmware"})

RAM = 1
"""The type of an entry that is RAM (arch/x86/include/asm/e820/types.h)."""

_MAX_ENTRIES = 128 + 3 * 1024
"""E820_MAX_ENTRIES at the largest CONFIG_NODES_SHIFT."""


class E820Entry(NamedTuple):
    """Half-open physical range [start, end), in bytes, and its e820 type."""

    start: int
    end: int
    type: int


def read_e820(
    walk: PageWalk, variable: int, problems: Problems, layouts: Mapping[str, Layout] = FIXED
) -> list[E820Entry]:
    """The table that the pointer at virtual address *variable* points to, in the table's order.

    Entries that make no sense are left out and told in *problems*. Raises WitnessError or ReadError if there is no
    table."""
    table = walk.read_u64(variable)
    head, entry = layouts["e820_table"].members, layouts["e820_entry"]
    count = walk.read_u32(table + head["nr_entries"].offset)
    if not 0 < count <= _MAX_ENTRIES:
        raise WitnessError(f"e820 table at {table:#x}: {count} entries, expected 1 to {_MAX_ENTRIES}")
    found: list[E820Entry] = []
    fields = unpacker(entry, "addr", "size", "type")
    entries = walk.read(table + head["entries"].offset, entry.size * count)
    for number in range(count):
        start, size, kind = fields(entries[number * entry.size : (number + 1) * entry.size])
        if not size or start + size > 1 << 64:
            problems.note(f"e820 table at {table:#x}: entry {number} has {size:#x} bytes at {start:#x}, left out")
        else:
            found.append(E820Entry(start, start + size, kind))
    return found


def ram(entries: Iterable[E820Entry]) -> RangeSet:
    """What the table calls RAM."""
    return RangeSet((e.start, e.end) for e in entries if e.type == RAM)
