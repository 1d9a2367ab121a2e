# SPDX-License-Identifier: LGPL-2.1-or-later
"""s390x lowcores: what each CPU of the dead machine left of its registers (arch/s390/include/asm/lowcore.h, smp.c).

CPU 0, the IPL CPU, enters the capture kernel whoever crashed (smp_call_ipl_cpu()): its status was stored at absolute
0x1200. Each other CPU's stands at the same place of its own lowcore, and ``lowcore_ptr``, one pointer per possible
CPU, tells where that is. Vector registers lie in the machine check extended save area, where a CPU had them enabled."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.witness.memory import Memory, Problems
from guard.witness.vmcoreinfo import Vmcoreinfo, note_at

VMCOREINFO_POINTER = 0xE0C
"""Physical address of the (unaligned) pointer to the VMCOREINFO note; its place is frozen for dump tools."""
SIZE = 0x2000
MCESAD = 0x11B0
SAVE_AREA = 0x1200
SAVE_AREA_SIZE = 0x200
IPL_CPU = 0
_MCESA_ORIGIN = ~0x3FF & (1 << 64) - 1
_VECTOR_SIZE = 0x200
_CR0_VECTOR = 1 << 17
"""Control register 0, bit 46: vector facility control (z/Architecture Principles of Operation)."""
_MAX_CPUS = 8192

Translate = Callable[[int], int]
"""From a virtual address of the dead kernel to its physical one; bytes."""


class SaveArea(NamedTuple):
    """Registers of one CPU, as its status was stored at *paddr* (bytes, physical): what lowcore has from 0x1200 on.

    *raw* is 512 bytes of it. *vector* has the 32 vector registers of 16 bytes each, None if they were not in use."""

    cpu: int
    paddr: int
    raw: bytes
    vector: bytes | None

    @property
    def prefix(self) -> int:
        """The prefix register: where the CPU's lowcore is; 0 for a CPU that never was started."""
        return int.from_bytes(self.raw[0x118:0x11C], "big")


def vmcoreinfo_note(mem: Memory) -> Vmcoreinfo:
    """The VMCOREINFO note that lowcore points to. Raises ReadError, or WitnessError where there is none."""
    paddr = struct.unpack(">Q", mem.read(VMCOREINFO_POINTER, 8))[0]
    if not paddr:
        raise WitnessError(f"lowcore {VMCOREINFO_POINTER:#x}: the pointer is 0")
    return note_at(mem, paddr, byteorder=">")


def read_save_areas(mem: Memory, info: Vmcoreinfo | None, translate: Translate, problems: Problems) -> list[SaveArea]:
    """The registers of every CPU that was ever started, the IPL CPU first. What cannot be found or read is left out,
    with one line in *problems* each."""
    lowcores = _lowcores(mem, info, translate, problems)
    found = [_save_area(mem, IPL_CPU, SAVE_AREA, lowcores.pop(IPL_CPU, None), problems)]
    for cpu, lowcore in lowcores.items():
        found.append(_save_area(mem, cpu, lowcore + SAVE_AREA, lowcore, problems))
    return [area for area in found if area and area.prefix]


def _save_area(mem: Memory, cpu: int, paddr: int, lowcore: int | None, problems: Problems) -> SaveArea | None:
    try:
        raw = mem.read(paddr, SAVE_AREA_SIZE)
    except ReadError as e:
        problems.note(f"CPU {cpu}: save area at {paddr:#x}: {e}; its register notes are left out")
        return None
    area = SaveArea(cpu, paddr, raw, None)
    if not area.prefix:
        return area
    if lowcore is None:
        lowcore = area.prefix
    elif area.prefix != lowcore:
        problems.note(
            f"CPU {cpu}: save area at {paddr:#x}: prefix {area.prefix:#x}, expected its lowcore at {lowcore:#x}; "
            "taken as it is"
        )
    if not int.from_bytes(raw[0x180:0x188], "big") & _CR0_VECTOR:
        return area
    return area._replace(vector=_vector(mem, area, lowcore, problems))


def _lowcores(mem: Memory, info: Vmcoreinfo | None, translate: Translate, problems: Problems) -> dict[int, int]:
    """Physical address of the lowcore of each CPU that has one, as far as lowcore_ptr can be had."""
    symbol = info.symbol("lowcore_ptr") if info else None
    count = info.length("lowcore_ptr") if info else None
    told = "VMCOREINFO" if info is None or info.paddr is None else f"VMCOREINFO at {info.paddr:#x}"
    try:
        if symbol is None or count is None:
            raise WitnessError(f"{told} does not tell of it" if info else "no VMCOREINFO tells of it")
        if not 0 < count <= _MAX_CPUS:
            raise WitnessError(f"{told} has {count} CPUs, expected 1 to {_MAX_CPUS}")
        pointers = struct.unpack(f">{count}Q", mem.read(translate(symbol), 8 * count))
    except (ReadError, WitnessError) as e:
        problems.note(f"lowcore_ptr: {e}; only the IPL CPU's registers are known")
        return {}
    found: dict[int, int] = {}
    for cpu, pointer in enumerate(pointers):
        if not pointer:
            continue
        paddr = translate(pointer)
        if paddr % SIZE:
            lost = "" if cpu == IPL_CPU else "; the CPU's register notes are left out"
            problems.note(
                f"lowcore_ptr[{cpu}]: {pointer:#x} is at physical {paddr:#x}, expected a multiple of {SIZE:#x}{lost}"
            )
            continue
        found[cpu] = paddr
    return found


def _vector(mem: Memory, area: SaveArea, lowcore: int, problems: Problems) -> bytes | None:
    place = f"CPU {area.cpu}: lowcore {lowcore + MCESAD:#x}"
    try:
        origin = struct.unpack(">Q", mem.read(lowcore + MCESAD, 8))[0] & _MCESA_ORIGIN
        if not origin:
            raise WitnessError("no machine check extended save area")
        return mem.read(origin, _VECTOR_SIZE)
    except (ReadError, WitnessError) as e:
        problems.note(f"{place}: {e}; its vector register notes are left out")
        return None
