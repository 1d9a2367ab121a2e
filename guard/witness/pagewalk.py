# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtual addresses of a dead x86_64 kernel: its own page tables, read from old memory.

Layout: Intel SDM vol. 3 chapter 4 (4 and 5 levels, 1 GiB and 2 MiB pages); the root comes from SYMBOL(init_top_pgt)
and NUMBER(phys_base) in vmcoreinfo (arch/x86/kernel/vmcore_info_64.c). The kernel image itself is mapped at one fixed
distance (__pa_symbol, arch/x86/include/asm/page.h), so it is found without a walk, and even where page tables are
damaged."""

from __future__ import annotations

import struct

from guard.errors import WitnessError
from guard.witness.memory import Memory
from guard.witness.vmcoreinfo import Vmcoreinfo

START_KERNEL_MAP = 0xFFFFFFFF80000000
"""Virtual address of the kernel image mapping (__START_KERNEL_map)."""
MAX_READ = 1 << 20
"""Largest single read, in bytes."""

_U64 = (1 << 64) - 1
_PAGE = 4096
_PRESENT = 1 << 0
_PSE = 1 << 7
_ADDRESS = 0x000FFFFFFFFFF000
_MAX_IMAGE = 1 << 30
_CACHED_TABLES = 32


class PageWalk:
    """The kernel's address space, read through *mem*.

    *root_paddr* is the physical address of the top table, *levels* 4 or 5, *sme_mask* the memory encryption bit that
    the entries carry. Virtual addresses in [START_KERNEL_MAP, START_KERNEL_MAP + *image_size*) are taken as vaddr -
    START_KERNEL_MAP + *phys_base*, without the tables; image_size 0 turns that off. Every method raises WitnessError
    for an address that is not mapped and ReadError for memory that cannot be read."""

    __slots__ = ("_address_mask", "_image_size", "_phys_base", "_tables", "_vaddr_bits", "levels", "mem", "root_paddr")

    def __init__(
        self, mem: Memory, root_paddr: int, levels: int, sme_mask: int = 0, phys_base: int = 0, image_size: int = 0
    ) -> None:
        if levels not in (4, 5) or root_paddr % _PAGE or not 0 <= root_paddr <= _ADDRESS:
            raise WitnessError(f"page walk: {levels} levels from a table at {root_paddr:#x} are not plausible")
        self.mem = mem
        self.root_paddr = root_paddr
        self.levels = levels
        self._vaddr_bits = 12 + 9 * levels
        self._address_mask = _ADDRESS & ~sme_mask
        self._phys_base = phys_base
        self._image_size = image_size
        self._tables: dict[int, bytes] = {}

    def through(self, mem: Memory) -> PageWalk:
        """The same address space, read through *mem*."""
        return PageWalk(
            mem, self.root_paddr, self.levels, _ADDRESS & ~self._address_mask, self._phys_base, self._image_size
        )

    def translate(self, vaddr: int) -> int:
        """Physical address of virtual address *vaddr*."""
        return self._mapping(vaddr)[0]

    def read(self, vaddr: int, size: int) -> bytes:
        """*size* bytes (at most MAX_READ) from virtual address *vaddr*."""
        if not 0 <= size <= MAX_READ:
            raise WitnessError(f"page walk: {size} bytes at {vaddr:#x} asked for, at most {MAX_READ} are read")
        parts: list[bytes] = []
        run_start = run_size = 0
        while size:
            paddr, room = self._mapping(vaddr)
            step = min(size, room)
            if run_size and paddr == run_start + run_size:
                run_size += step
            else:
                if run_size:
                    parts.append(self.mem.read(run_start, run_size))
                run_start, run_size = paddr, step
            vaddr += step
            size -= step
        if run_size:
            parts.append(self.mem.read(run_start, run_size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_u32(self, vaddr: int) -> int:
        """The unsigned 32-bit value at *vaddr*."""
        return int.from_bytes(self.read(vaddr, 4), "little")

    def read_u64(self, vaddr: int) -> int:
        """The unsigned 64-bit value, or pointer, at *vaddr*."""
        return int.from_bytes(self.read(vaddr, 8), "little")

    def read_cstring(self, vaddr: int, limit: int) -> bytes:
        """The bytes from *vaddr* up to a NUL (not included). WitnessError if none stands within *limit* bytes."""
        text = b""
        while len(text) < limit:
            here = vaddr + len(text)
            # Page by page: the page after the string's own need not be mapped.
            piece = self.read(here, min(limit - len(text), 64, _PAGE - here % _PAGE))
            end = piece.find(b"\0")
            if end >= 0:
                return text + piece[:end]
            text += piece
        raise WitnessError(f"page walk: string at {vaddr:#x} has no end within {limit} bytes")

    def _mapping(self, vaddr: int) -> tuple[int, int]:
        """(physical address, bytes from there to the end of the mapped page)."""
        image_offset = vaddr - START_KERNEL_MAP
        if 0 <= image_offset < self._image_size:
            paddr = image_offset + self._phys_base
            if not 0 <= paddr <= _ADDRESS:
                raise WitnessError(f"page walk: kernel address {vaddr:#x} would be at physical {paddr:#x}")
            return paddr, self._image_size - image_offset
        top = vaddr >> (self._vaddr_bits - 1)
        if not 0 <= vaddr <= _U64 or top not in (0, _U64 >> (self._vaddr_bits - 1)):
            raise WitnessError(f"page walk: {vaddr:#x} is not a canonical address with {self.levels} levels")
        table, shift = self.root_paddr, self._vaddr_bits
        while True:
            shift -= 9
            entry = struct.unpack_from("<Q", self._table(table), (vaddr >> shift & 511) * 8)[0]
            if not entry & _PRESENT:
                raise WitnessError(f"page walk: {vaddr:#x} is not mapped (entry {entry:#x} in the table at {table:#x})")
            table = entry & self._address_mask
            if shift == 12 or entry & _PSE:
                break
        if shift > 30:
            raise WitnessError(f"page walk: {vaddr:#x}: reserved bit 7 is set in entry {entry:#x}")
        # Bit 12 of a large page's entry is PAT, not address: the page's own size cuts it off.
        in_page = vaddr & ((1 << shift) - 1)
        return (table >> shift << shift) | in_page, (1 << shift) - in_page

    def _table(self, paddr: int) -> bytes:
        table = self._tables.get(paddr)
        if table is None:
            if len(self._tables) >= _CACHED_TABLES:
                del self._tables[next(iter(self._tables))]
            table = self._tables[paddr] = self.mem.read(paddr, _PAGE)
        return table


def x86_64(mem: Memory, info: Vmcoreinfo) -> PageWalk:
    """The walk of the kernel that *info* describes. WitnessError if vmcoreinfo lacks what is needed for it."""
    top, phys_base = info.symbol("init_top_pgt"), info.number("phys_base")
    if top is None or phys_base is None:
        raise WitnessError("vmcoreinfo has no SYMBOL(init_top_pgt) or no NUMBER(phys_base): no x86_64 page walk")
    if phys_base >= 1 << 63:
        phys_base -= 1 << 64
    image_size = info.number("KERNEL_IMAGE_SIZE") or 0
    if not 0 < image_size <= _MAX_IMAGE or not 0 <= top - START_KERNEL_MAP < image_size:
        raise WitnessError(
            f"vmcoreinfo: init_top_pgt {top:#x} is not in a kernel image of {image_size:#x} bytes "
            f"at {START_KERNEL_MAP:#x}"
        )
    return PageWalk(
        mem,
        top - START_KERNEL_MAP + phys_base,
        5 if info.number("pgtable_l5_enabled") == 1 else 4,
        info.number("sme_mask") or 0,
        phys_base,
        image_size,
    )
