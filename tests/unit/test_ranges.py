# SPDX-License-Identifier: LGPL-2.1-or-later
"""The range algebra against sets of integers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guard.ranges import Range, RangeSet

END = 64

pairs = st.lists(st.tuples(st.integers(0, END), st.integers(0, END)), max_size=8)


def members(ranges: list[tuple[int, int]]) -> set[int]:
    return {n for a, b in ranges for n in range(a, b)}


@given(pairs)
def test_a_range_set_is_ascending_disjoint_and_has_exactly_the_bytes_given(ranges: list[tuple[int, int]]) -> None:
    s = RangeSet(ranges)
    assert {n for r in s for n in range(r.start, r.end)} == members(ranges)
    assert all(r.start < r.end for r in s)
    assert all(a.end < b.start for a, b in zip(list(s), list(s)[1:], strict=False)), "touching ranges are one"
    assert s.size == len(members(ranges))
    assert len(s) == len(list(s))
    assert bool(s) == bool(members(ranges))
    assert s == RangeSet(reversed(ranges))
    assert hash(s) == hash(RangeSet(reversed(ranges)))


@given(pairs, pairs)
def test_union_intersection_and_difference_are_those_of_sets(
    a: list[tuple[int, int]], b: list[tuple[int, int]]
) -> None:
    left, right = RangeSet(a), RangeSet(b)
    assert left | right == RangeSet((n, n + 1) for n in members(a) | members(b))
    assert left & right == RangeSet((n, n + 1) for n in members(a) & members(b))
    assert left - right == RangeSet((n, n + 1) for n in members(a) - members(b))


@given(pairs, st.integers(-1, END + 1))
def test_find_gives_the_range_around_an_address(ranges: list[tuple[int, int]], address: int) -> None:
    s = RangeSet(ranges)
    hit = s.find(address)
    assert (address in s) == (address in members(ranges)) == (hit is not None)
    if hit is not None:
        assert hit in list(s)
        assert hit.start <= address < hit.end


@given(pairs, st.integers(0, END), st.integers(0, END))
def test_covers_means_every_byte(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    assert RangeSet(ranges).covers(start, end) == (set(range(start, end)) <= members(ranges))


@given(pairs, st.sampled_from([1, 2, 4, 16]))
def test_inner_pages_lie_wholly_inside_and_outer_pages_are_touched(ranges: list[tuple[int, int]], page: int) -> None:
    s = RangeSet(ranges)
    pages = range(0, END + page, page)
    inner = {p for p in pages if set(range(p, p + page)) <= members(ranges)}
    outer = {p for p in pages if set(range(p, p + page)) & members(ranges)}
    assert s.inner_pages(page) == RangeSet((p, p + page) for p in inner)
    assert s.outer_pages(page) == RangeSet((p, p + page) for p in outer)


def test_text_is_with_inclusive_ends_as_in_proc_iomem_and_does_not_flood() -> None:
    assert str(Range(0x1000, 0x3000)) == "0x1000-0x2fff"
    many = RangeSet((n * 0x2000, n * 0x2000 + 0x1000) for n in range(1000))
    assert str(many) == "0x0-0xfff, 0x2000-0x2fff, 0x4000-0x4fff, 0x6000-0x6fff and 996 more"
    assert repr(RangeSet([(0, 1)])) == "RangeSet([0x0-0x0])"


def test_addresses_up_to_the_end_of_the_address_space_are_held() -> None:
    top = RangeSet([((1 << 64) - 4096, 1 << 64)])
    assert (1 << 64) - 1 in top
    assert 1 << 64 not in top
    assert top.inner_pages(4096) == top
