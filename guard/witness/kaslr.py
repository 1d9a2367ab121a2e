# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a known x86_64 kernel lies in old memory, physically and virtually, when no note tells.

A kernel is loaded at a multiple of 2 MiB (CONFIG_PHYSICAL_ALIGN is not less), and KASLR moves its image mapping by a
multiple of that within 1 GiB (arch/x86/boot/compressed/kaslr.c). So its banner, linux_banner, is looked for at one
place in each 2 MiB of old memory; where it stands, init_top_pgt is at a known distance, and the virtual offset is the
one of 512 by which those page tables show the banner."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.ranges import RangeSet
from guard.witness.memory import Memory, Problems
from guard.witness.pagewalk import START_KERNEL_MAP, PageWalk

_ALIGN = 2 << 20
_IMAGE_SIZE = 1 << 30
MAX_PADDR = 1 << 52
_MAX_FOUND = 8
_CHECK_TIME = 256  # places between two looks at the clock
_NO_CPU = -1  # PANIC_CPU_INVALID


class Landmarks(NamedTuple):
    """What is known of the image: the bytes of linux_banner, and the addresses that it was linked for; *panic_cpu* and
    *sme_mask* None if there are no such symbols."""

    banner: bytes
    banner_at: int
    top_table: int
    panic_cpu: int | None
    sme_mask: int | None


class Place(NamedTuple):
    """An address of the image as it was linked + *offset* is its virtual address, and + *shift* its physical address;
    *levels* of page tables, whose entries carry *sme_mask*. *crashed*: panic() had been called."""

    offset: int
    shift: int
    levels: int
    sme_mask: int
    crashed: bool

    @property
    def phys_base(self) -> int:
        """The kernel's own variable: physical = virtual - START_KERNEL_MAP + phys_base."""
        return self.shift + START_KERNEL_MAP - self.offset


def locate(
    mem: Memory,
    ranges: RangeSet,
    marks: Landmarks,
    problems: Problems,
    shift: int | None = None,
    offset: int | None = None,
    time_limit: float = 60.0,
) -> Place:
    """The place of the kernel in *ranges* (physical bytes); *shift* and *offset* as far as they are known.

    Of several kernels of this build, as a warm reset may leave, the one that panicked is taken, else the first; that is
    told in *problems*. Raises WitnessError if there is none, or none was found in *time_limit* seconds."""
    found: list[Place] = []
    shifts = iter([shift]) if shift is not None else _shifts(mem, ranges, marks, time.monotonic() + time_limit)
    late: WitnessError | None = None
    try:
        for one in shifts:
            place = _at(mem, marks, one, offset)
            if place:
                found.append(place)
                if place.crashed or len(found) == _MAX_FOUND:
                    break
    except WitnessError as error:
        late = error
    if not found:
        raise late or WitnessError(f"no such kernel in {ranges.size >> 20} MiB of old memory")
    best = max(found, key=lambda place: place.crashed)
    if len(found) > 1:
        at = ", ".join(f"{place.shift + START_KERNEL_MAP:#x}" for place in found)
        problems.note(
            f"{len(found)} kernels of this build in old memory, displaced by {at}; "
            f"that at {best.shift + START_KERNEL_MAP:#x} is taken"
        )
    return best


def _shifts(mem: Memory, ranges: RangeSet, marks: Landmarks, deadline: float) -> Iterator[int]:
    """Physical less linked address, for each place where the banner stands."""
    looked = 0
    for start, end in ranges:
        first = start + (marks.banner_at - start) % _ALIGN
        for paddr in range(first, end - len(marks.banner) + 1, _ALIGN):
            looked += 1
            if looked % _CHECK_TIME == 0 and time.monotonic() > deadline:
                raise WitnessError(f"no such kernel below {paddr:#x}, and no more time to look for it")
            try:
                if mem.read(paddr, len(marks.banner)) == marks.banner:
                    yield paddr - marks.banner_at
            except ReadError:
                continue


def _at(mem: Memory, marks: Landmarks, shift: int, offset: int | None) -> Place | None:
    """The kernel displaced by *shift*, if its page tables and its banner are there."""
    try:
        mask = _signed(mem, marks.sme_mask, shift, 8)
        mask = mask if mask > 1 << 31 and mask & (mask - 1) == 0 else 0
        crashed = _signed(mem, marks.panic_cpu, shift, 4) != _NO_CPU
        most = START_KERNEL_MAP + _IMAGE_SIZE - marks.banner_at
        for levels in (4, 5):
            walk = PageWalk(mem, marks.top_table + shift, levels, mask)
            for one in range(0, most, _ALIGN) if offset is None else [offset]:
                if _shows(walk, marks.banner_at + one, marks.banner_at + shift, marks.banner):
                    return Place(one, shift, levels, mask, crashed)
    except (WitnessError, ReadError):
        pass
    return None


def _shows(walk: PageWalk, vaddr: int, paddr: int, text: bytes) -> bool:
    try:
        return walk.translate(vaddr) == paddr and walk.read(vaddr, len(text)) == text
    except WitnessError:
        return False


def _signed(mem: Memory, linked: int | None, shift: int, size: int) -> int:
    if linked is None:
        return 0
    paddr = linked + shift
    if not 0 <= paddr < MAX_PADDR:
        raise WitnessError(f"a variable of the kernel would be at physical {paddr:#x}")
    return int.from_bytes(mem.read(paddr, size), "little", signed=True)
