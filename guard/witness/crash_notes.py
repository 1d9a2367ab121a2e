# SPDX-License-Identifier: LGPL-2.1-or-later
"""The register notes that the dead kernel's CPUs left: crash_notes, one buffer per possible CPU (kernel/crash_core.c).

``crash_notes`` is a pointer into the per-cpu area: CPU n's buffer is its value + __per_cpu_offset[n]. The area may be
vmalloc'ed, so buffers are found by page walk. A buffer is aligned to its own size rounded up to a power of two, so
that it never crosses a page. crash_save_cpu() fills it with ELF notes and ends them by an empty one; it stays all zero
for a CPU that never saved."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.witness.memory import Memory, Problems
from guard.witness.pagewalk import PageWalk

SYMBOLS = frozenset({"crash_notes", "__per_cpu_offset", "__cpu_possible_mask", "nr_cpu_ids"})

_MAX_CPUS = 8192
"""CONFIG_NR_CPUS at its largest (MAXSMP)."""
_PAGE = 4096
_U64 = (1 << 64) - 1


class CpuNotes(NamedTuple):
    """What one CPU left: the physical address of its buffer, and the ELF notes in it without the empty one that ends
    them; no bytes for a CPU that never saved."""

    cpu: int
    paddr: int
    notes: bytes


def read_crash_notes(walk: PageWalk, symbols: Mapping[str, int], problems: Problems) -> list[CpuNotes]:
    """The notes of every possible CPU, in the order of CPU numbers. A CPU whose buffer cannot be found is left out, a
    buffer whose notes make no sense counts as far as they do; both are told in *problems*.

    Raises WitnessError or ReadError if there is nothing to start from."""
    for name in ("crash_notes", "__per_cpu_offset"):
        if name not in symbols:
            raise WitnessError(f"kallsyms has no {name}")
    base = walk.read_u64(symbols["crash_notes"])
    found: list[CpuNotes] = []
    for cpu in _possible_cpus(walk, symbols, problems):
        try:
            buffer = (base + walk.read_u64(symbols["__per_cpu_offset"] + 8 * cpu)) & _U64
            paddr = walk.translate(buffer)
            found.append(CpuNotes(cpu, paddr, _notes(walk.mem, cpu, paddr, problems)))
        except (WitnessError, ReadError) as error:
            problems.note(f"crash_notes: CPU {cpu} is left out: {error}")
    return found


def _possible_cpus(walk: PageWalk, symbols: Mapping[str, int], problems: Problems) -> list[int]:
    if "nr_cpu_ids" in symbols:
        count = walk.read_u32(symbols["nr_cpu_ids"])
        if not 0 < count <= _MAX_CPUS:
            raise WitnessError(f"nr_cpu_ids is {count}, expected 1 to {_MAX_CPUS}")
    elif "__cpu_possible_mask" in symbols:
        # FORCE_NR_CPUS makes it a constant; how long the mask is then stands nowhere, but one word is always there.
        count = 64
        problems.note("crash_notes: the kernel has no nr_cpu_ids, only the first 64 possible CPUs are looked at")
    else:
        return [0]
    if "__cpu_possible_mask" not in symbols:
        problems.note(f"crash_notes: the kernel has no __cpu_possible_mask, all of {count} CPUs are taken as possible")
        return list(range(count))
    mask = int.from_bytes(walk.read(symbols["__cpu_possible_mask"], (count + 63) // 64 * 8), "little")
    return [cpu for cpu in range(count) if mask >> cpu & 1]


def _notes(mem: Memory, cpu: int, paddr: int, problems: Problems) -> bytes:
    room = _PAGE - paddr % _PAGE
    data = mem.read(paddr, room)
    at = 0
    while at + 12 <= room:
        namesz, descsz, _type = struct.unpack_from("<III", data, at)
        if not namesz:
            return data[:at]
        size = 12 + ((namesz + 3) & ~3) + ((descsz + 3) & ~3)
        if at + size > room:
            problems.note(
                f"crash_notes: CPU {cpu}: note of {size} bytes at {paddr + at:#x} does not fit into its page, "
                f"{at} bytes before it are kept"
            )
            return data[:at]
        at += size
    return data[:at]
