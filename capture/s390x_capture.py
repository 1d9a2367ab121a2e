# SPDX-License-Identifier: LGPL-2.1-or-later
"""An s390x capture kernel as an image of its memory shows it: where the crash region is, and which kernel it is.

The boot parameter area tells the kernel which memory it dumps (struct parmarea, arch/s390/include/asm/setup.h). The
header depends on the capture kernel, not on the crashed one; what a kernel of its age puts there stands in a table.
That is no test for a feature, as it is no kernel that runs here: only its own records tell of it."""

from __future__ import annotations

import struct
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.ranges import Range, RangeSet
from guard.witness import lowcore, os_info
from guard.witness.memory import Memory, Problems

MAGIC_AT, MAGIC = 0x10008, b"S390EP"
OLDMEM_BASE, OLDMEM_SIZE = 0x10418, 0x10420
PAGE = 4096


class Generation(NamedTuple):
    """What the headers of kernels from release *since* on have: p_align of the merged PT_NOTE, the kernel image's
    PT_LOAD with addresses by identity base, PT_LOADs for the memory of virtio-mem devices."""

    since: tuple[int, int]
    note_align: int
    image: bool
    device_ram: bool


GENERATIONS = (
    Generation((0, 0), note_align=0, image=False, device_ram=False),
    Generation((6, 5), note_align=4, image=False, device_ram=False),  # 60592fb6b67c, merged for 6.5
    Generation((6, 10), note_align=4, image=True, device_ram=False),
    Generation((6, 14), note_align=4, image=True, device_ram=True),
)
OLDEST, NEWEST = GENERATIONS[0], GENERATIONS[-1]


class CaptureKernel(NamedTuple):
    """*crash* is the crash region, physical bytes; None where no capture kernel was given one."""

    crash: Range | None
    generation: Generation
    section_size_bits: int | None = None


def not_s390x(found: bytes) -> str | None:
    """Why memory with *found* at MAGIC_AT is not that of an s390x kernel; None if it may be."""
    return None if found == MAGIC else f"{found!r} at {MAGIC_AT:#x} where {MAGIC!r} is in every s390x kernel's memory"


def read(current: Memory, ram: RangeSet, recorded_release: str | None, problems: Problems) -> CaptureKernel:
    """What *current*, memory by the addresses it has now, shows of the capture kernel in it; *ram* is all there is.
    *recorded_release* counts where memory does not tell."""
    try:
        if why := not_s390x(current.read(MAGIC_AT, len(MAGIC))):
            problems.note(f"RAM: {why}")
    except ReadError as e:
        problems.note(f"RAM: {e}, where every s390x kernel has {MAGIC!r}")
    crash = _crash_region(current, ram, problems)
    ignored = Problems()
    records = os_info.read_os_info(current, ignored)
    info, why = None, "has no OSRELEASE="
    try:
        info = lowcore.vmcoreinfo_note(current)
        why = f"at {info.paddr:#x} {why}"
    except (ReadError, WitnessError) as e:
        why = str(e)
    release = (info.text("OSRELEASE") if info else None) or recorded_release
    generation = _of_release(release) if release else None
    if generation is None:
        if release:
            why = f"{release!r} is no release"
        generation = NEWEST if records is None or records.image else OLDEST
        problems.note(
            f"the capture kernel's release is not to be had: VMCOREINFO: {why}; header as by kernels from "
            f"{generation.since[0]}.{generation.since[1]} on"
        )
    bits = info.number("SECTION_SIZE_BITS") if info else None
    return CaptureKernel(crash, generation, bits if bits and PAGE.bit_length() <= bits < 48 else None)


def _of_release(release: str) -> Generation | None:
    parts = release.split(".")
    if len(parts) < 2 or not parts[0].isdecimal():
        return None
    minor = parts[1].partition("-")[0]
    if not minor.isdecimal() or len(parts[0]) + len(minor) > 8:
        return None
    number = int(parts[0]), int(minor)
    return next(g for g in reversed(GENERATIONS) if g.since <= number)


def _crash_region(current: Memory, ram: RangeSet, problems: Problems) -> Range | None:
    place = f"boot parameter area {OLDMEM_BASE:#x}"
    as_it_lies = "memory is taken as it lies, a capture kernel's own included"
    try:
        base, size = struct.unpack(">QQ", current.read(OLDMEM_BASE, 16))
    except ReadError as e:
        problems.note(f"{place}: {e}; {as_it_lies}")
        return None
    if not base and not size:
        problems.note(f"{place}: no crash region: this is no capture kernel; {as_it_lies}")
        return None
    if not size or base % PAGE or size % PAGE or base < size or base + size > 1 << 64:
        problems.note(f"{place}: crash region {base:#x}+{size:#x} is not possible; {as_it_lies}")
        return None
    crash = Range(base, base + size)
    missing = RangeSet([crash, (0, size)]) - ram
    if missing:
        problems.note(f"{place}: crash region {crash}: of it and the low memory that it holds, {missing} is not there")
    return crash
