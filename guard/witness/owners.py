# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose a page is, by its struct page: the kernel's own, or one that holds (or held) what belongs to users.

Asked before a page of old memory is written into a bug report. A page is taken for the kernel's own only if it is
neither on the lists of reclaimable memory (PG_lru), nor has an owner in page.mapping (an address_space, or anonymous
memory), nor is mapped into any process (page._mapcount), nor is free, offline or HugeTLB (include/linux/mm_types.h and
page-flags.h). Of slab pages page.mapping is another field (mm/slab.h), so they are told first. All numbers are those of
VMCOREINFO. What the kernel keeps of users in memory of its own (a file name in a slab, say) is not told by this, nor
are the few free pages that each CPU holds back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.ranges import Range, RangeSet
from guard.witness.pagewalk import MAX_READ, PageWalk
from guard.witness.vmcoreinfo import Vmcoreinfo

_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1
_PAGE_TYPE_BASE = 0xF0000000
_MAX_FREE_ORDER = 16
"""Of the blocks on free lists (MAX_PAGE_ORDER is 10 where nobody changed it)."""
_MAX_ORDER = 24
"""Pages of a compound page at most, as a power of two: 64 GiB of 4 KiB pages."""
_NOT_KERNEL_TYPES = ("PAGE_OFFLINE_MAPCOUNT_VALUE", "PAGE_HUGETLB_MAPCOUNT_VALUE")


class Owners(NamedTuple):
    """Physical bytes, whole pages: *others* are not the kernel's own, of *unseen* the struct pages cannot be read."""

    others: RangeSet
    unseen: RangeSet


class _Fields(NamedTuple):
    """Of one struct page: page.flags, page.mapping, page.private, page._mapcount and page._refcount as they stand, and
    the word that leads from a tail page to its head."""

    flags: int
    mapping: int
    private: int
    mapcount: int
    refcount: int
    head: int


class _Layout:
    """Where the fields are, and what they mean, by *info*. Raises WitnessError where it does not tell."""

    def __init__(self, info: Vmcoreinfo) -> None:
        self.size = _need(info.size("page"), "SIZE(page)")
        head = "compound_info" if info.offset("page.compound_info") is not None else "compound_head"  # renamed in 7.1
        names = (("flags", 8), ("mapping", 8), ("private", 8), ("_mapcount", 4), ("_refcount", 4), (head, 8))
        self._at = [(_need(info.offset(f"page.{name}"), f"OFFSET(page.{name})"), width) for name, width in names]
        if (
            self.size % 8
            or not 32 <= self.size <= 512
            or any(at % width or at + width > self.size for at, width in self._at)
        ):
            raise WitnessError(f"vmcoreinfo: struct page of {self.size} bytes has fields outside of itself")
        self.lru = 1 << (_need(info.number("PG_lru"), "NUMBER(PG_lru)") & 63)
        slab = info.number("PG_slab")  # a flag until it became a type
        self.slab_flag = 0 if slab is None else 1 << (slab & 63)
        self.slab_type = _type_test(info.number("PAGE_SLAB_MAPCOUNT_VALUE"))
        self.buddy_type = _type_test(info.number("PAGE_BUDDY_MAPCOUNT_VALUE"))
        self.not_kernel_types = [_type_test(info.number(name)) for name in _NOT_KERNEL_TYPES]

    def fields(self, data: bytes) -> Iterator[_Fields]:
        """Of each struct page in *data*."""
        views = {8: memoryview(data).cast("Q"), 4: memoryview(data).cast("I")}
        columns = [views[width][at // width :: self.size // width].tolist() for at, width in self._at]
        return map(_Fields._make, zip(*columns, strict=True))

    def head_of(self, at: int, value: int) -> int:
        """Virtual address of the struct page that a tail page at *at* belongs to, whose word *value* has bit 0 set: a
        pointer; or, since 7.1 and where struct page is a power of two in size, a mask of addresses."""
        value &= ~1
        distance = -value & _U64
        mask = self.size <= distance <= self.size << _MAX_ORDER and not distance & (distance - 1)
        return at & value if mask else value

    def is_kernels(self, page: _Fields) -> bool | None:
        """None for a tail page, which its head speaks for."""
        flags, mapping, _, kind, _, head = page
        if head & 1:
            return None
        if flags & self.slab_flag or self.slab_type(kind):
            return True
        if not any(page):
            return True  # never initialised, so that its page was never given out
        if flags & self.lru or mapping or kind < 1 << 31:
            return False
        return not any(test(kind) for test in self.not_kernel_types)

    def free_pages(self, page: _Fields) -> int:
        """How many pages the free block has that begins with this one; 0 if none does. Of the others in it nothing says
        that they are free: they look like those of a block that is in use as a whole, as memory maps are."""
        return 1 << page.private if self.buddy_type(page.mapcount) and page.private <= _MAX_FREE_ORDER else 0


def _need(value: int | None, key: str) -> int:
    if value is None:
        raise WitnessError(f"vmcoreinfo has no {key}: whose a page is cannot be told")
    return value


def _type_test(exported: int | None) -> Callable[[int], bool]:
    """Whether the word page._mapcount is that of a page of the type with this exported value (guard.witness.memmap)."""
    if exported is None:
        return lambda word: False
    value = exported & _U32
    if not value & 0xFFFFFF:
        return lambda word: word >> 24 == value >> 24
    mask = _PAGE_TYPE_BASE | (~value & _U32)
    return lambda word: word & mask == _PAGE_TYPE_BASE


def look(walk: PageWalk, info: Vmcoreinfo, memmap: int, pages: RangeSet) -> Owners:
    """Whose *pages* (physical bytes, whole pages) are; *memmap* is the virtual address of the struct page of pfn 0.

    Raises WitnessError where VMCOREINFO does not tell how struct pages lie."""
    layout = _Layout(info)
    page_size = info.page_size or 4096
    others: list[Range] = []
    unseen: list[Range] = []
    heads: dict[int, bool | None] = {}
    step = MAX_READ // layout.size
    for start, end in pages:
        pending = [
            (first, min(end // page_size, first + step))
            for first in reversed(range(start // page_size, end // page_size, step))
        ]
        while pending:
            first, last = pending.pop()
            at = memmap + first * layout.size
            try:
                data = walk.read(at, (last - first) * layout.size)
            except (WitnessError, ReadError):
                if last - first == 1:
                    unseen.append(Range(first * page_size, last * page_size))
                else:
                    middle = (first + last) // 2
                    pending += [(middle, last), (first, middle)]
                continue
            free_until = _free_until(walk, layout, memmap, first)
            for i, page in enumerate(layout.fields(data)):
                free_until = max(free_until, first + i + layout.free_pages(page))
                kernels = free_until <= first + i and layout.is_kernels(page)
                if kernels is None:
                    kernels = _head(walk, layout, layout.head_of(at + i * layout.size, page.head), heads)
                if not kernels:
                    pfn = first + i
                    (unseen if kernels is None else others).append(Range(pfn * page_size, (pfn + 1) * page_size))
    return Owners(RangeSet(others), RangeSet(unseen))


def _free_until(walk: PageWalk, layout: _Layout, memmap: int, pfn: int) -> int:
    """The end of the free block that *pfn* is in behind its first page, or *pfn*: as mm/page_alloc.c has it in
    is_free_buddy_page(), a block starts at a multiple of its size."""
    for order in range(1, _MAX_FREE_ORDER + 1):
        start = pfn >> order << order
        if start == pfn:
            continue
        try:
            page = next(layout.fields(walk.read(memmap + start * layout.size, layout.size)))
        except (WitnessError, ReadError):
            continue
        if start + layout.free_pages(page) > pfn:
            return start + layout.free_pages(page)
    return pfn


def _head(walk: PageWalk, layout: _Layout, address: int, known: dict[int, bool | None]) -> bool | None:
    """As is_kernels() for the head page whose struct page is at *address*; None if it cannot be told."""
    if address not in known:
        if len(known) > 1 << 12:
            known.clear()
        try:
            known[address] = layout.is_kernels(next(layout.fields(walk.read(address, layout.size))))
        except (WitnessError, ReadError):
            known[address] = None
    return known[address]
