# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory sections of the dead kernel (SPARSEMEM, include/linux/mmzone.h): where it had struct pages, and which were
online.

All that is needed stands in vmcoreinfo. With SPARSEMEM_EXTREME, mem_section is a pointer to an array of pointers to
pages full of struct mem_section; otherwise it is the array itself. The low bits of section_mem_map are the section's
state."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.ranges import RangeSet
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk
from guard.witness.vmcoreinfo import Vmcoreinfo

MARKED_PRESENT = 1 << 0
HAS_MEM_MAP = 1 << 1
IS_ONLINE = 1 << 2
_STATE_BITS = 0x3F
"""All of the low bits that have been states in some kernel; a memory map starts at a multiple of 64 bytes."""

_MAX_SECTIONS = 1 << 28
_MAX_READS = 1 << 16
"""Pages of sections read at most: with 128 MiB sections, 1 PiB of memory."""
_MAX_RUNS = 1 << 15
"""Runs of sections kept at most; each costs memory in the capture kernel."""
_POINTERS = 1 << 15
"""Bytes of the top array read at a time."""


class Sections(NamedTuple):
    """Physical bytes in sections that are present, and in those that are online (present, with a memory map,
    onlined).

    *memmap* is the virtual address of the struct page of pfn 0, whether there is one or not: the value that all online
    sections have in section_mem_map (SPARSEMEM_VMEMMAP); None where theirs differ.

    *flaw* is the first reason, if any, why this is not the whole truth: something could not be read, which then counts
    as absent, or a section that was in use for certain is not online, which then counts as online."""

    section_size: int
    present: RangeSet
    online: RangeSet
    memmap: int | None = None
    flaw: str | None = None

    @property
    def offline(self) -> RangeSet:
        """Physical bytes in sections that are there but not online: taken offline, never brought online, or memory of a
        device (ZONE_DEVICE). That a section is absent says nothing."""
        return self.present - self.online

    def doubtful(self, within: RangeSet) -> bool:
        """Whether more than half of the present memory *within* these physical bytes is offline. A machine may be like
        that, but a damaged array is more likely to be. Memory of devices is no reason: pass what may be RAM."""
        return 2 * (self.offline & within).size > (self.present & within).size


class Contradictions(NamedTuple):
    """Where resource tree and sections do not agree, physical bytes."""

    without_ram: RangeSet
    """Online sections in which the tree has no System RAM at all."""
    without_section: RangeSet
    """System RAM of the tree in sections that are not present."""


def contradictions(known: Sections, system_ram: RangeSet) -> Contradictions:
    """What cannot be, where both *known* and the tree that has *system_ram* (physical bytes) are sound. Each section of
    boot memory is there because of RAM in it (memory_present(), mm/sparse.c), each later one because of a memory block,
    for which add_memory() makes a resource (mm/memory_hotplug.c); and what is System RAM has struct pages."""
    return Contradictions(known.online - system_ram.outer_pages(known.section_size), system_ram - known.present)


def read_sections(walk: PageWalk, info: Vmcoreinfo, problems: Problems) -> Sections:
    """The state of all sections. What cannot be read counts as absent, is told in *problems*, and is a flaw.

    Raises WitnessError or ReadError if vmcoreinfo lacks a key, contradicts itself, or the top array cannot be read."""
    array = _need(info.symbol("mem_section"), "SYMBOL(mem_section)")
    length = _need(info.length("mem_section"), "LENGTH(mem_section)")
    size = _need(info.size("mem_section"), "SIZE(mem_section)")
    map_offset = _need(info.offset("mem_section.section_mem_map"), "OFFSET(mem_section.section_mem_map)")
    section_bits = _need(info.number("SECTION_SIZE_BITS"), "NUMBER(SECTION_SIZE_BITS)")
    memory_bits = _need(info.number("MAX_PHYSMEM_BITS"), "NUMBER(MAX_PHYSMEM_BITS)")
    page_size = _need(info.page_size, "PAGESIZE")
    if not 20 <= section_bits <= memory_bits <= 64 or 1 << (memory_bits - section_bits) > _MAX_SECTIONS:
        raise WitnessError(
            f"vmcoreinfo: sections of 2^{section_bits} bytes in memory of 2^{memory_bits} are not plausible"
        )
    if size % 8 or map_offset % 8 or not 8 <= map_offset + 8 <= size <= page_size:
        raise WitnessError(
            f"vmcoreinfo: mem_section of {size} bytes with section_mem_map at {map_offset} is not plausible"
        )
    count = 1 << (memory_bits - section_bits)
    per_root = page_size // size
    flaws = _Flaws(problems)
    if length == -(-count // per_root):
        roots = _root_array(walk, array, per_root, size, map_offset, section_bits)
        pieces = _extreme(walk, roots, length, per_root, size, flaws)
    elif length == count:
        pieces = _flat(walk, array, length, per_root, size, flaws)
    else:
        raise WitnessError(
            f"vmcoreinfo: LENGTH(mem_section) is {length}, {count} sections or roots of {per_root} were expected"
        )
    present: list[tuple[int, int]] = []
    online: list[tuple[int, int]] = []
    memmaps: set[int] = set()
    for first, data in pieces:
        if len(present) + len(online) > _MAX_RUNS:
            flaws.note(f"more than {_MAX_RUNS} runs of sections, those from {first} on are left out")
            break
        maps = struct.unpack(f"<{len(data) // 8}Q", data)[map_offset // 8 :: size // 8]
        for number, state in enumerate(maps[: count - first], first):
            if state & MARKED_PRESENT:
                _extend(present, number)
                if state & HAS_MEM_MAP and state & IS_ONLINE:
                    _extend(online, number)
                    if len(memmaps) < 2:
                        memmaps.add(state & ~_STATE_BITS)
    memmap = memmaps.pop() if len(memmaps) == 1 else None
    known = Sections(1 << section_bits, _bytes(present, section_bits), _bytes(online, section_bits), memmap)
    return _used(walk, info, known, flaws)


class _Flaws:
    """Lines about what is missing: all of them are told, and the first one is kept."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self.first: str | None = None

    def note(self, line: str) -> None:
        self.first = self.first or line
        self._problems.note(f"mem_section: {line}")


def _used(walk: PageWalk, info: Vmcoreinfo, known: Sections, flaws: _Flaws) -> Sections:
    """*known*, with the sections online that the kernel ran in for certain."""
    in_use = {"the page tables lie": walk.root_paddr}
    stext = info.symbol("_stext")
    if stext is not None:
        try:
            in_use["the kernel image lies"] = walk.translate(stext)
        except (WitnessError, ReadError):
            pass  # it is asked about by others, who tell
    online = known.online
    for what, paddr in in_use.items():
        if paddr not in online:
            number = paddr // known.section_size
            flaws.note(f"section {number}, which {what} in, is not online; it is taken as online")
            online |= RangeSet([(number * known.section_size, (number + 1) * known.section_size)])
    return known._replace(present=known.present | online, online=online, flaw=flaws.first)


def _need(value: int | None, key: str) -> int:
    if value is None:
        raise WitnessError(f"vmcoreinfo has no {key}: section states are not known")
    return value


def _root_array(walk: PageWalk, symbol: int, per_root: int, size: int, map_offset: int, section_bits: int) -> int:
    """Virtual address of the array of root pointers. SYMBOL(mem_section) is that (VMCOREINFO_SYMBOL_ARRAY, since the
    pointer is printed by value), or the address of the variable that points to it (VMCOREINFO_SYMBOL, kernels before
    that was corrected). The right one has the section that the page tables themselves lie in."""
    number = walk.root_paddr >> section_bits
    for dereference in (False, True):
        try:
            array = walk.read_u64(symbol) if dereference else symbol
            root = walk.read_u64(array + 8 * (number // per_root))
            state = walk.read_u64(root + number % per_root * size + map_offset)
        except (WitnessError, ReadError):
            continue
        if state & MARKED_PRESENT and state & HAS_MEM_MAP:
            return array
    raise WitnessError(f"mem_section at {symbol:#x} does not have section {number}, which the page tables lie in")


def _extreme(
    walk: PageWalk, roots: int, length: int, per_root: int, size: int, flaws: _Flaws
) -> Iterator[tuple[int, bytes]]:
    """(number of the first section, its struct mem_section and those that follow it) for each root there is."""
    reads = 0
    for at in range(0, 8 * length, _POINTERS):
        pointers = walk.read(roots + at, min(_POINTERS, 8 * length - at))
        if not any(pointers):
            continue
        for number, (root,) in enumerate(struct.iter_unpack("<Q", pointers), at // 8):
            if not root:
                continue
            reads += 1
            if reads > _MAX_READS:
                flaws.note(f"more than {_MAX_READS} roots, those from {number} on are left out")
                return
            try:
                yield number * per_root, walk.read(root, per_root * size)
            except (WitnessError, ReadError) as error:
                flaws.note(f"root {number} at {root:#x} is left out: {error}")


def _flat(
    walk: PageWalk, array: int, length: int, per_read: int, size: int, flaws: _Flaws
) -> Iterator[tuple[int, bytes]]:
    for reads, first in enumerate(range(0, length, per_read)):
        if reads == _MAX_READS:
            flaws.note(f"sections from {first} on are left out")
            return
        try:
            yield first, walk.read(array + first * size, min(per_read, length - first) * size)
        except (WitnessError, ReadError) as error:
            flaws.note(f"{per_read} sections from {first} on are left out: {error}")


def _extend(runs: list[tuple[int, int]], number: int) -> None:
    if runs and runs[-1][1] == number:
        runs[-1] = (runs[-1][0], number + 1)
    else:
        runs.append((number, number + 1))


def _bytes(runs: list[tuple[int, int]], section_bits: int) -> RangeSet:
    return RangeSet((first << section_bits, end << section_bits) for first, end in runs)
