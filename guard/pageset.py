# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sets of page frames in the shape that the C core tests: ascending runs, or a bitmap of equally sized blocks."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from guard._core import ffi, lib
from guard.ranges import Range, RangeSet, merged

if TYPE_CHECKING:
    from guard._core import CData

_END = 1 << 64


class PageSet:
    """A set of page frames. Addresses are physical bytes, frames are pfns of *page_size* bytes.

    >>> PageSet.of_ranges(RangeSet([(0x1000, 0x3000)])).has(2)
    True
    """

    __slots__ = ("c", "data", "page_shift")

    def __init__(self, first: int, end: int, data: array[int], n: int, pages_per_bit: int, page_shift: int) -> None:
        self.data = data
        self.page_shift = page_shift
        words = ffi.from_buffer("uint64_t[]", data) if data else ffi.NULL
        self.c: CData = ffi.new(
            "struct pageset *",
            {"first": first, "end": end, "pages_per_bit": pages_per_bit, "n": n, "data": words},
        )

    @classmethod
    def of_ranges(cls, ranges: RangeSet, page_size: int = 4096) -> PageSet:
        """The pages that lie wholly inside *ranges* (bytes). Raises ValueError as :meth:`of_ascending`."""
        mask = page_size - 1
        return cls.of_ascending(((r.start + mask & ~mask, r.end & ~mask) for r in ranges), page_size)

    @classmethod
    def of_ascending(cls, ranges: Iterable[tuple[int, int]], page_size: int = 4096) -> PageSet:
        """The union of *ranges* (bytes, whole pages) that ascend by their starts, without a copy of them all.

        Raises ValueError where one of them leaves the 64-bit address space."""
        shift = page_size.bit_length() - 1
        data = array("Q")
        for start, end in merged(ranges):
            if start < 0 or end > _END:
                raise ValueError(f"{start:#x} to {end:#x} is not in the 64-bit address space")
            data.extend((start >> shift, end >> shift))
        return cls(0, 1 << 64 - shift, data, len(data) // 2, 0, shift)

    @classmethod
    def of_bitmap(cls, start: int, block_size: int, blocks: int, bitmap: bytes, page_size: int = 4096) -> PageSet:
        """Blocks of *block_size* bytes from *start* on, both page aligned; bit 0 of byte 0 is the first block.

        Bits beyond *blocks* are ignored; blocks beyond the end of *bitmap* are not in the set. Raises ValueError
        where blocks do not consist of whole pages, or leave the 64-bit address space."""
        if start < 0 or blocks < 0 or start + block_size * blocks > _END:
            raise ValueError(f"{blocks} blocks of {block_size:#x} bytes from {start:#x} on are not in the 64-bit space")
        if block_size <= 0 or block_size % page_size or start % page_size:
            raise ValueError(f"blocks of {block_size:#x} bytes from {start:#x} on are not whole pages")
        shift = page_size.bit_length() - 1
        data = array("Q", bitmap[: (blocks + 7) // 8].ljust((blocks + 63) // 64 * 8, b"\0"))
        if sys.byteorder == "big":
            data.byteswap()
        first = start >> shift
        end = (start + block_size * blocks) >> shift
        return cls(first, end, data, blocks, block_size >> shift, shift)

    def has(self, pfn: int) -> bool:
        return bool(lib.pageset_has(self.c, pfn))

    def ranges(self, start: int, end: int) -> Iterator[Range]:
        """The members inside [start, end) as ranges of bytes."""
        pfn, stop = start >> self.page_shift, end >> self.page_shift
        while (pfn := lib.pageset_next(self.c, pfn, stop, True)) < stop:
            hole = lib.pageset_next(self.c, pfn, stop, False)
            yield Range(pfn << self.page_shift, hole << self.page_shift)
            pfn = hole
