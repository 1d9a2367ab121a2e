# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which pages a collector may leave out, told by a program that shares nothing with oldmem and nothing with collectors:
it walks the dead kernel's page tables in the host's RAM files, reads every struct page, and judges each page by the
head of the compound page that it is part of, as the kernel does (include/linux/page-flags.h: compound_head(),
folio_test_anon(), page types). What the levels mean is makedumpfile(8), ``-d``.

Of VMCOREINFO it wants the keys of a kernel with page types in the top byte of ``_mapcount`` (commit 4ffca5a96678,
6.12+). A kdump-compressed file's bitmaps are those of makedumpfile's IMPLEMENTATION and diskdump_mod.h."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PAGE = 4096
START_KERNEL_MAP = 0xFFFFFFFF80000000  # arch/x86/include/asm/page_64_types.h
ADDRESS = (1 << 52) - PAGE
PRESENT_WITH_MAP_AND_ONLINE = (
    7  # include/linux/mmzone.h: SECTION_MARKED_PRESENT, SECTION_HAS_MEM_MAP, SECTION_IS_ONLINE
)
ANON = 1  # include/linux/page-flags.h: FOLIO_MAPPING_ANON


class Piece(NamedTuple):
    """*size* bytes at *offset* of file *path* are physical memory from *paddr* on."""

    path: Path
    offset: int
    paddr: int
    size: int


class Memory:
    """Physical memory, the page tables over it, and what VMCOREINFO says."""

    def __init__(self, pieces: Iterable[Piece], vmcoreinfo: str) -> None:
        self._maps: list[tuple[int, int, mmap.mmap]] = []
        for piece in pieces:
            with open(piece.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), piece.size, prot=mmap.PROT_READ, offset=piece.offset)
            self._maps.append((piece.paddr, piece.paddr + piece.size, mapped))
        self.info = dict(line.split("=", 1) for line in vmcoreinfo.splitlines() if "=" in line)
        self._tables: dict[int, tuple[int, ...]] = {}

    def number(self, name: str) -> int:
        return int(self.info[f"NUMBER({name})"], 0)

    def offset(self, name: str) -> int:
        return int(self.info[f"OFFSET({name})"])

    def symbol(self, name: str) -> int:
        return int(self.info[f"SYMBOL({name})"], 16)

    def physical(self, paddr: int, size: int) -> bytes:
        for start, end, mapped in self._maps:
            if start <= paddr and paddr + size <= end:
                return mapped[paddr - start : paddr - start + size]
        raise LookupError(f"no file has {paddr:#x}+{size:#x}")

    def translate(self, virtual: int) -> int:
        """Physical address of *virtual*."""
        table = self.symbol("swapper_pg_dir") - START_KERNEL_MAP + self.number("phys_base")
        for level in reversed(range(5 if self.number("pgtable_l5_enabled") else 4)):
            shift = 12 + 9 * level
            if table not in self._tables:
                self._tables[table] = struct.unpack("<512Q", self.physical(table, PAGE))
            entry = self._tables[table][virtual >> shift & 511]
            if not entry & 1:
                raise LookupError(f"nothing mapped at {virtual:#x}")
            if level == 0 or entry & 0x80:
                return (entry & ADDRESS & -1 << shift) | (virtual & (1 << shift) - 1)
            table = entry & ADDRESS
        raise AssertionError("no leaf")

    def virtual(self, address: int, size: int) -> bytes:
        found = b""
        while len(found) < size:
            at = address + len(found)
            found += self.physical(self.translate(at), min(PAGE - at % PAGE, size - len(found)))
        return found


class Pages(NamedTuple):
    """Sets of pfns. ``user``, ``cache``, ``free`` and ``broken`` (poisoned or offline) are what levels 8, 2 + 4, 16 and
    any level exclude; ``seconds`` the second page of each compound page that is no user's."""

    all: set[int]
    user: set[int]
    cache: set[int]
    free: set[int]
    broken: set[int]
    seconds: set[int]

    def kept(self, level: int) -> set[int]:
        """What a dump of *level* has to have, pages of zeros apart."""
        kept = self.all - self.broken
        for bits, pages in ((8, self.user), (2 | 4, self.cache), (16, self.free)):
            if level & bits == bits:
                kept -= pages
        return kept


def _sections(memory: Memory) -> Iterator[tuple[int, int]]:
    """First pfn and ``section_mem_map`` of each section with struct pages (SPARSEMEM_EXTREME)."""
    per_root, roots = PAGE // int(memory.info["SIZE(mem_section)"]), int(memory.info["LENGTH(mem_section)"])
    table = memory.virtual(memory.symbol("mem_section"), 8 * roots)
    for number, root in enumerate(struct.unpack(f"<{roots}Q", table)):
        if root:
            rows = memory.virtual(root, PAGE)
            for index in range(per_root):
                (coded,) = struct.unpack_from("<Q", rows, index * PAGE // per_root)
                if coded & PRESENT_WITH_MAP_AND_ONLINE == PRESENT_WITH_MAP_AND_ONLINE:
                    yield (number * per_root + index) << memory.number("SECTION_SIZE_BITS") - 12, coded


def judge(memory: Memory) -> Pages:
    """Every page that has a struct page."""
    size = int(memory.info["SIZE(page)"])
    flags_at, mapping_at, private_at = (memory.offset(f"page.{name}") // 8 for name in ("flags", "mapping", "private"))
    info_at = int(memory.info.get("OFFSET(page.compound_info)") or memory.info["OFFSET(page.compound_head)"]) // 8
    type_at = memory.offset("page._mapcount") // 4
    lru, poison, swapcache, swapbacked = (
        1 << memory.number(f"PG_{n}") for n in ("lru", "hwpoison", "swapcache", "swapbacked")
    )
    head_flag = memory.number("PG_head_mask")
    hugetlb, buddy, offline = (
        memory.number(f"PAGE_{name}_MAPCOUNT_VALUE") & 0xFFFFFFFF for name in ("HUGETLB", "BUDDY", "OFFLINE")
    )
    words_each, halves_each = size // 8, size // 4
    count = 1 << memory.number("SECTION_SIZE_BITS") - 12
    pages = Pages(set(), set(), set(), set(), set(), set())
    for first, coded in _sections(memory):
        base = coded & -64  # struct page of pfn 0
        raw = memoryview(memory.virtual(base + first * size, count * size))
        words, halves = raw.cast("Q"), raw.cast("I")
        pages.all.update(range(first, first + count))
        index = 0
        while index < count:
            # a head, or a page by itself: what is a tail has been passed over
            flags, kind = words[index * words_each + flags_at], halves[index * halves_each + type_at]
            typed = 0xF0 <= kind >> 24 < 0xFF
            order = 0
            if kind == buddy:
                order = words[index * words_each + private_at]
            elif flags & head_flag:
                order = words[(index + 1) * words_each + flags_at] & 0xFF
                for tail in range(index + 1, index + (1 << order)):
                    value = words[tail * words_each + info_at]
                    # since 7.1 what a tail has may be a mask that leads to its head (struct page: compound_info)
                    head = base + (first + tail) * size & value if value >> 40 == 0xFFFFFF else value - 1
                    assert (value & 1, head) == (1, base + (first + index) * size), f"pfn {first + tail:#x}: {value:#x}"
            span = range(first + index, first + index + (1 << order))
            if kind == buddy:
                pages.free.update(span)
            elif kind == offline:
                pages.broken.update(span)
            elif kind == hugetlb or (not typed and words[index * words_each + mapping_at] & ANON):
                pages.user.update(span)
            else:
                if flags & lru or (flags & swapbacked and flags & swapcache):
                    pages.cache.update(span)
                if order:
                    pages.seconds.add(span.start + 1)
            pages.broken.update(pfn for pfn in span if words[(pfn - first) * words_each + flags_at] & poison)
            index += 1 << order
    return pages


def bitmaps(file: Path) -> tuple[set[int], set[int]]:
    """Of a kdump-compressed file: pfns of the memory that it is about, and of the pages that are in it."""
    with open(file, "rb") as stream:
        head = stream.read(PAGE)
        assert head[:8] == b"KDUMP   "
        block, sub, blocks = struct.unpack_from("<3I", head, 428)
        stream.seek((1 + sub) * block)
        bits = stream.read(blocks * block)
    half = len(bits) // 2
    return _set_bits(bits[:half]), _set_bits(bits[half:])


def _set_bits(bits: bytes) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1}
