# SPDX-License-Identifier: LGPL-2.1-or-later
"""The gate against a straightforward model of the kernel's pfn_is_ram() list."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.pageset import PageSet
from guard.ranges import Range, RangeSet
from guard.registry import (
    NOT_RAM,
    RAM,
    GuardWarning,
    Registry,
    Rule,
    allow_rule,
    bitmap_rule,
    callback_rule,
    deny_rule,
)

PAGE = 4096
END = 200  # pfns that the models speak about

pfn_ranges = st.lists(st.tuples(st.integers(0, END), st.integers(0, END)), max_size=8)


def byte_ranges(pfns: list[tuple[int, int]]) -> RangeSet:
    return RangeSet((a * PAGE, b * PAGE) for a, b in pfns)


@given(pfn_ranges)
def test_pageset_of_runs_has_exactly_the_pages_of_the_ranges(pfns: list[tuple[int, int]]) -> None:
    ranges = byte_ranges(pfns)
    s = PageSet.of_ranges(ranges)
    assert [s.has(p) for p in range(END)] == [p * PAGE in ranges for p in range(END)]
    assert RangeSet(s.ranges(0, END * PAGE)) == ranges


@given(st.binary(max_size=30), st.integers(0, 250), st.integers(1, 5), st.integers(0, 9))
def test_pageset_of_bitmap_has_exactly_the_blocks_whose_bit_is_set(
    bitmap: bytes, blocks: int, pages_per_block: int, first: int
) -> None:
    s = PageSet.of_bitmap(first * PAGE, pages_per_block * PAGE, blocks, bitmap)

    def model(pfn: int) -> bool:
        block = (pfn - first) // pages_per_block
        return 0 <= block < min(blocks, len(bitmap) * 8) and bool(bitmap[block // 8] >> block % 8 & 1)

    end = first + blocks * pages_per_block + 70
    assert [s.has(p) for p in range(end)] == [model(p) for p in range(end)]
    assert RangeSet(s.ranges(0, end * PAGE)) == RangeSet((p * PAGE, p * PAGE + PAGE) for p in range(end) if model(p))


@st.composite
def rules(draw: st.DrawFn) -> tuple[Rule, set[int]]:
    """A rule, and the pfns below END that it refuses."""
    name = draw(st.text("abcdef", min_size=6, max_size=12))
    pfns = draw(pfn_ranges)
    listed = {p for a, b in pfns for p in range(a, b)}
    if draw(st.booleans()):
        return deny_rule(name, byte_ranges(pfns), "denied"), listed
    first, size, per_block = draw(st.integers(0, END)), draw(st.integers(0, END)), draw(st.integers(1, 7))
    domain = Range(first * PAGE, (first + size // per_block * per_block) * PAGE)
    inside = set(range(first, domain.end // PAGE))
    if draw(st.booleans()):
        return allow_rule(name, domain, byte_ranges(pfns), "not listed"), inside - listed
    bitmap = draw(st.binary(max_size=30))
    plugged = {p for p in inside if (i := (p - first) // per_block) < len(bitmap) * 8 and bitmap[i // 8] >> i % 8 & 1}
    return bitmap_rule(name, domain, per_block * PAGE, bitmap, "unplugged"), inside - plugged


@given(st.lists(rules(), max_size=5, unique_by=lambda r: r[0].name))
def test_registry_answers_as_the_kernels_list_of_callbacks_would(history: list[tuple[Rule, set[int]]]) -> None:
    registry = Registry()
    for rule, _ in history:
        registry.register(rule)
    model = [next((r.name for r, refused in history if p in refused), None) for p in range(END)]

    def name_of(pfn: int) -> str | None:
        rule = registry.refuser(pfn)
        return rule.name if rule else None

    assert [name_of(p) for p in range(END)] == model
    assert [registry.pfn_is_ram(p) for p in range(END)] == [name is None for name in model]
    runs = list(registry.verdicts(0, END * PAGE))
    assert [(r.name if r else None) for run, r in runs for _ in range(run.size // PAGE)] == model
    assert all(a[1] is not b[1] for a, b in pairwise(runs)), "runs are maximal"
    for p in range(0, END, 7):
        assert registry.next_ram(p, END) == next((q for q in range(p, END) if model[q] is None), END)
        assert registry.next_refused(p, END) == next((q for q in range(p, END) if model[q] is not None), END)


def test_page_beyond_every_rule_is_ram() -> None:
    assert Registry().pfn_is_ram((1 << 52) - 1)


def test_registering_after_open_warns_and_takes_effect() -> None:
    registry = Registry()
    registry.opened = True
    with pytest.warns(GuardWarning, match="registered after"):
        registry.register(deny_rule("late", RangeSet([(0, PAGE)]), "late"))
    assert not registry.pfn_is_ram(0)


def test_unregistering_before_open_removes_the_rule() -> None:
    registry = Registry()
    registry.register(deny_rule("r", RangeSet([(0, PAGE)]), "r"))
    registry.unregister("r")
    assert registry.pfn_is_ram(0)


def test_replaced_rule_keeps_its_place_and_says_something_else() -> None:
    registry = Registry()
    for name in ("first", "second"):
        registry.register(deny_rule(name, RangeSet([(0, 4096)]), "test"))
    registry.replace(deny_rule("first", RangeSet([(8192, 12288)]), "test"))
    assert [rule.name for rule in registry] == ["first", "second"]
    assert [(r := registry.refuser(pfn)) and r.name for pfn in range(3)] == ["second", None, "first"]
    with pytest.raises(KeyError, match="third"):
        registry.replace(deny_rule("third", RangeSet(), "test"))
    registry.opened = True
    with pytest.raises(ValueError, match="'first' cannot be replaced"):
        registry.replace(deny_rule("first", RangeSet(), "test"))
    assert registry.refuser(2) is not None


def test_unregistering_after_open_warns_and_keeps_refusing() -> None:
    registry = Registry()
    registry.register(deny_rule("r", RangeSet([(0, PAGE)]), "r"))
    registry.opened = True
    with pytest.warns(GuardWarning, match="stays in force"):
        registry.unregister("r")
    assert not registry.pfn_is_ram(0)


def test_two_rules_of_one_name_are_refused() -> None:
    registry = Registry()
    registry.register(deny_rule("r", RangeSet(), "r"))
    with pytest.raises(ValueError, match="registered already"):
        registry.register(deny_rule("r", RangeSet(), "r"))


@pytest.mark.parametrize(("trouble", "expected"), [(NOT_RAM, False), (RAM, True)])
def test_callback_that_raises_or_answers_nonsense_is_decided_by_its_policy(trouble: str, expected: bool) -> None:
    def is_ram(paddr: int) -> bool:
        if paddr == 0:
            raise OSError("no answer")
        return "maybe" if paddr == 2 * PAGE else False  # type: ignore[return-value]

    rule = callback_rule("plugin", Range(0, 6 * PAGE), 2 * PAGE, is_ram, "said so", trouble)
    registry = Registry()
    registry.register(rule)
    assert [registry.pfn_is_ram(p) for p in range(6)] == [expected] * 4 + [False] * 2
    assert rule.troubled == RangeSet([(0, 4 * PAGE)])


def test_callback_is_asked_once_for_each_block_and_never_by_reads() -> None:
    asked: list[int] = []

    def is_ram(paddr: int) -> bool:
        asked.append(paddr)
        return True

    rule = callback_rule("plugin", Range(0, 8 * PAGE), 4 * PAGE, is_ram, "x")
    registry = Registry()
    registry.register(rule)
    for p in range(8):
        registry.pfn_is_ram(p)
    assert asked == [0, 4 * PAGE]
