# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sets of physical addresses as sorted, disjoint, half-open byte ranges: the one range algebra of the project.

Kernel files mostly print *inclusive* ends; readers convert at the border, nothing in here is inclusive."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Range(NamedTuple):
    """Half-open range of physical addresses [start, end), in bytes."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end - 1:#x}"


def merged(ranges: Iterable[tuple[int, int]]) -> Iterator[Range]:
    """*ranges*, which ascend by their starts, with those that overlap or touch made one and the empty ones left out."""
    start = end = 0
    for next_start, next_end in ranges:
        if next_start >= next_end:
            continue
        if start < end and next_start <= end:
            end = max(end, next_end)
            continue
        if start < end:
            yield Range(start, end)
        start, end = next_start, next_end
    if start < end:
        yield Range(start, end)


class RangeSet:
    """Immutable set of bytes, kept as ascending, non-touching :class:`Range` items; empty and negative ones vanish."""

    __slots__ = ("_items",)

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._items = tuple(merged(sorted(ranges)))

    @classmethod
    def of_ascending(cls, ranges: Iterable[tuple[int, int]]) -> RangeSet:
        """As ``RangeSet(ranges)`` where they ascend by their starts already, without a list of them all."""
        new = cls.__new__(cls)
        new._items = tuple(merged(ranges))
        return new

    def __iter__(self) -> Iterator[Range]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __bool__(self) -> bool:
        return bool(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self._items == other._items

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return f"RangeSet([{', '.join(str(r) for r in self._items)}])"

    def __str__(self) -> str:
        """The ranges one by one; of many the first few and how many more."""
        shown = ", ".join(map(str, self._items[:4]))
        return shown + (f" and {len(self._items) - 4} more" if len(self._items) > 4 else "")

    @property
    def size(self) -> int:
        """Number of bytes in the set."""
        return sum(r.size for r in self._items)

    def __or__(self, other: RangeSet) -> RangeSet:
        return RangeSet([*self._items, *other._items])

    def __and__(self, other: RangeSet) -> RangeSet:
        out: list[tuple[int, int]] = []
        if not self._items or not other._items:
            return RangeSet()
        # a single range against very many is common, and must not walk all of them
        i, j = self._reaching(other._items[0].start), other._reaching(self._items[0].start)
        while i < len(self._items) and j < len(other._items):
            a, b = self._items[i], other._items[j]
            out.append((max(a.start, b.start), min(a.end, b.end)))
            if a.end < b.end:
                i += 1
            else:
                j += 1
        return RangeSet.of_ascending(out)

    def __sub__(self, other: RangeSet) -> RangeSet:
        out: list[tuple[int, int]] = []
        j = other._reaching(self._items[0].start) if self._items else 0
        for start, end in self._items:
            while j < len(other._items) and other._items[j].end <= start:
                j += 1
            k = j
            while k < len(other._items) and other._items[k].start < end:
                out.append((start, other._items[k].start))
                start = max(start, other._items[k].end)
                k += 1
            out.append((start, end))
        return RangeSet.of_ascending(out)

    def _reaching(self, addr: int) -> int:
        """Index of the first range that ends behind *addr*."""
        return bisect_right(self._items, addr, key=lambda r: r.end)

    def find(self, addr: int) -> Range | None:
        """The range that holds byte *addr*, or None."""
        i = bisect_right(self._items, (addr, 1 << 65)) - 1
        if i >= 0 and self._items[i].start <= addr < self._items[i].end:
            return self._items[i]
        return None

    def __contains__(self, addr: int) -> bool:
        return self.find(addr) is not None

    def covers(self, start: int, end: int) -> bool:
        """True if every byte of [start, end) is in the set."""
        hit = self.find(start)
        return start >= end or (hit is not None and end <= hit.end)

    def inner_pages(self, page_size: int) -> RangeSet:
        """The whole pages (of *page_size* bytes, a power of two) that lie inside the set."""
        mask = page_size - 1
        if not self._has_part_pages(mask):
            return self
        return RangeSet.of_ascending(((r.start + mask) & ~mask, r.end & ~mask) for r in self._items)

    def outer_pages(self, page_size: int) -> RangeSet:
        """The pages (of *page_size* bytes, a power of two) that the set touches at all."""
        mask = page_size - 1
        if not self._has_part_pages(mask):
            return self
        return RangeSet.of_ascending((r.start & ~mask, (r.end + mask) & ~mask) for r in self._items)

    def _has_part_pages(self, mask: int) -> bool:
        return any((start | end) & mask for start, end in self._items)
