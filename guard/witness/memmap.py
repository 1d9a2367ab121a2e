# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the dead kernel's struct pages say of its pages: hardware poison, PageOffline (include/linux/page-flags.h).

VMCOREINFO alone tells how to read them: where the memory map is (vmemmap, or through mem_section), the size of struct
page, the offsets of its fields, the number of the flag and the value of the page type. Both kinds of type words are
understood: a type is a cleared bit (before 6.12), or the top byte (since). Only sections that were online are looked
at: elsewhere struct pages may never have been initialised.

A poisoned HugeTLB folio has the flag on its head alone, so all of it counts; guard/csrc/memmap.c says why and how."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from guard._core import ffi, lib
from guard.errors import ReadError, WitnessError
from guard.pageset import PageSet
from guard.ranges import Range, RangeSet
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk
from guard.witness.sections import Sections
from guard.witness.vmcoreinfo import Vmcoreinfo

_PIECE = 1 << 18
"""Bytes of memory map read at a time."""
_RUN_SIZE = 16
"""Bytes that a run costs in a PageSet."""
_PAGE_TYPE_BASE = 0xF0000000
_SMALL_FLAGS = 0xFFF
_MAX_POISONED, _MAX_POISONED_SHARE = 1024, 1 / 16
"""More pages than both with the flag are no hardware failure but a memory map that is not one."""
_LARGEST_FOLIO = 1 << 30
"""Bytes: what one entry of a PUD maps (arch/x86/mm/hugetlbpage.c)."""


class Shape(NamedTuple):
    """How to read a struct page; see guard/csrc/memmap.h. A *poison* or *offline_mask* of 0: the kernel has none; a
    *huge_mask* of 0: HugeTLB folios cannot be told from others."""

    size: int
    flags: int
    type: int
    head: int
    poison: int
    offline_mask: int
    offline: int
    huge_at: int = 0
    huge_mask: int = 0
    huge: int = 0
    folio_pages: int = 1


class Marks(NamedTuple):
    """Physical memory by the marks of its struct pages; *unread* is online memory whose struct pages could not be had.

    The two sets of pages are None where the kernel has no such mark, or its evidence is not sound."""

    poisoned: PageSet | None
    offline: PageSet | None
    unread: RangeSet
    scanned: int  # bytes of memory map


def shape_of(info: Vmcoreinfo) -> Shape:
    """Raises WitnessError where VMCOREINFO lacks what is needed, or contradicts itself."""
    size = info.size("page")
    flags, kind = info.offset("page.flags"), info.offset("page._mapcount")
    head = info.offset("page.compound_info")  # 7.1+, bit 0 has kept its meaning
    if head is None:
        head = info.offset("page.compound_head")
    if size is None or flags is None or kind is None or head is None:
        raise WitnessError("vmcoreinfo has no layout of struct page: its marks are not known")
    fields = ((flags, 8), (kind, 4), (head, 8))
    if not 32 <= size <= 512 or size % 8 or any(at % width or at + width > size for at, width in fields):
        raise WitnessError(f"vmcoreinfo: struct page of {size} bytes with fields at {flags}, {kind}, {head}")
    bit = info.number("PG_hwpoison")
    if bit is not None and not 0 <= bit < 64:
        raise WitnessError(f"vmcoreinfo: PG_hwpoison is bit {bit}")
    poison = 0 if bit is None else 1 << bit
    offline = _page_type(info.number("PAGE_OFFLINE_MAPCOUNT_VALUE"))
    longest = _LARGEST_FOLIO // (info.page_size or 4096)
    return Shape(size, flags, kind, head, poison, *offline, *_hugetlb(info, size, flags, kind), longest)


def _hugetlb(info: Vmcoreinfo, size: int, flags: int, kind: int) -> tuple[int, int, int]:
    """(offset from the head's struct page, mask, value) of the 32-bit word that tells a HugeTLB folio. It is the type
    of the head (6.9+, commit d99e3140a4d3), a flag of the second struct page (6.6+, 9c5ccf2db04b), or before that the
    number of the folio's destructor, a byte of the second struct page."""
    mask, value = _page_type(info.number("PAGE_HUGETLB_MAPCOUNT_VALUE"))
    if mask:
        return kind, mask, value
    bit = info.number("PG_hugetlb")
    if bit is not None and 0 <= bit < 32:
        return size + flags, 1 << bit, 1 << bit
    number = info.number("HUGETLB_PAGE_DTOR")
    at = info.offset("folio._folio_dtor")  # 6.3 to 6.5: from the head
    if at is None:
        at = info.offset("page.compound_dtor")
        at = None if at is None else at + size
    if number is not None and at is not None and 0 < number < 256 and size <= at < 2 * size:
        shift = at % 4 * 8
        return at & -4, 0xFF << shift, number << shift
    return 0, 0, 0


def _page_type(exported: int | None) -> tuple[int, int]:
    """(mask, value) of the type word, from the value that the kernel exports."""
    if exported is None:
        return 0, 0
    value = exported & 0xFFFFFFFF
    if not value & 0xFFFFFF:
        return 0xFF000000, value  # 6.12+: one type in the top byte, the rest is free for data
    flag = ~value & 0xFFFFFFFF
    if flag & ~_SMALL_FLAGS:
        return 0xFFFFFFFF, value
    return _PAGE_TYPE_BASE | flag, _PAGE_TYPE_BASE  # before: the type's bit is cleared


def scan(
    walk: PageWalk, info: Vmcoreinfo, sections: Sections, wanted: RangeSet, problems: Problems, time_limit: float = 60.0
) -> Marks:
    """The marks of all pages of *wanted* (physical bytes) in online sections, in one pass. What cannot be read in
    *time_limit* seconds or at all is in ``unread``, and told in *problems*. A poisoned folio ends where that begins,
    and where *wanted* does.

    Raises WitnessError where there is nothing to go by."""
    shape = shape_of(info)
    vmemmap = info.symbol("vmemmap") or sections.memmap  # 6.1 has no such line
    if vmemmap is None:
        raise WitnessError("neither vmcoreinfo nor mem_section tells where struct pages are")
    page_size = info.page_size or 4096
    c_shape = ffi.new("struct memmap_shape *", shape._asdict())
    c_pass = ffi.new("struct memmap_pass *")
    poisoned, offline = Collected(page_size), Collected(page_size)
    unread: list[Range] = []
    deadline = time.monotonic() + time_limit
    why = "at all"
    pages = scanned = reached = 0
    looked_at = sections.online & wanted
    for piece in _pieces(looked_at, shape.size, page_size):
        first, count = piece.start // page_size, piece.size // page_size
        if time.monotonic() > deadline:
            unread += looked_at & RangeSet([(piece.start, 1 << 64)])
            why = f"in {time_limit:g} s"
            break
        try:
            data = walk.read(vmemmap + first * shape.size, count * shape.size)
        except (WitnessError, ReadError):
            if unread and unread[-1].end == piece.start:
                piece = Range(unread.pop().start, piece.end)
            unread.append(piece)
            continue
        pages += count
        scanned += len(data)
        if piece.start != reached:
            c_pass.left = 0
        reached = piece.end
        bits = bytearray((count + 7) // 8), bytearray((count + 7) // 8)
        if lib.memmap_scan(c_shape, c_pass, ffi.from_buffer("uint8_t[]", data), count, *(_c(b) for b in bits)):
            poisoned.add(first, count, bits[0])
            offline.add(first, count, bits[1])
    missing = RangeSet(unread)
    if missing:
        problems.note(f"struct pages of {missing} could not be read {why}: not known what is marked, nothing refused")
    if c_pass.flagged > max(_MAX_POISONED, pages * _MAX_POISONED_SHARE):
        problems.note(f"{c_pass.flagged} of {pages} struct pages have PG_hwpoison: no sound memory map, no mark counts")
        return Marks(None, None, missing, scanned)
    return Marks(
        poisoned.pageset() if shape.poison else None,
        offline.pageset() if shape.offline_mask else None,
        missing,
        scanned,
    )


def _c(bits: bytearray) -> object:
    return ffi.from_buffer("uint8_t[]", bits)


def _pieces(ranges: RangeSet, struct_size: int, page_size: int) -> Iterator[Range]:
    """*ranges* in pieces whose struct pages are at most _PIECE bytes."""
    step = _PIECE // struct_size * page_size
    for start, end in ranges.inner_pages(page_size):
        while start < end:
            stop = min(end, (start // step + 1) * step)
            yield Range(start, stop)
            start = stop


class Collected:
    """Marked pages, kept as bits of the pieces that have any, until it is known how many there are."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._bits: list[tuple[int, int, bytes]] = []
        self.pages = 0

    def add(self, first: int, count: int, bits: bytearray) -> None:
        found = int.from_bytes(bits, "little").bit_count()
        if found:
            self.pages += found
            self._bits.append((first, count, bytes(bits)))

    def pageset(self) -> PageSet:
        """All of them; as runs where these are few, as they are where memory was given away in large pieces, else as
        one bitmap: this lives in a capture kernel."""
        size = self._page_size
        if not self._bits:
            return PageSet.of_ranges(RangeSet(), size)
        # the pieces start anywhere, and two may share a byte of the bitmap
        start, end = self._bits[0][0] & -64, sum(self._bits[-1][:2])
        runs = sum((number & ~(number << 1)).bit_count() for number in self._numbers())
        if runs * _RUN_SIZE < (end - start) // 8:
            return PageSet.of_ascending(self._runs(), size)
        whole = bytearray((end - start + 7) // 8)
        for first, _, bits in self._bits:
            at, shift = divmod(first - start, 8)
            there = slice(at, at + (len(bits) * 8 + shift + 7) // 8)
            number = int.from_bytes(whole[there], "little") | int.from_bytes(bits, "little") << shift
            whole[there] = number.to_bytes(len(whole[there]), "little")
        return PageSet.of_bitmap(start * size, size, end - start, bytes(whole), size)

    def _numbers(self) -> Iterator[int]:
        return (int.from_bytes(bits, "little") for _, _, bits in self._bits)

    def _runs(self) -> Iterator[Range]:
        size = self._page_size
        for first, count, bits in self._bits:
            part = PageSet.of_bitmap(first * size, size, count, bits, size)
            yield from part.ranges(first * size, (first + count) * size)
