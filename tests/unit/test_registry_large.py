# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of a million overlapping ranges, and rules and questions at the end of the address space: answers are those of
the plainest model, a byte for each page, and memory stays in proportion."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.compiled import compile_guard, parse_guard
from guard.pageset import PageSet
from guard.physmem import OldMemory
from guard.ranges import Range, RangeSet, merged
from guard.registry import Registry, Rule, allow_rule, bitmap_rule, deny_rule

PAGE = 4096
MILLION = 1_000_000
PAGES = 6 * MILLION
END = 1 << 64
LAST = (1 << 52) - 1


class Model:
    """For each page the number of the rule that refuses it, counted from 1 in order of registration; 0 is RAM."""

    def __init__(self) -> None:
        self.refuser = bytearray(PAGES)
        self.registry = Registry()

    def add(self, rule: Rule, refused: bytearray) -> None:
        self.registry.register(rule)
        number = len(list(self.registry))
        # where it is RAM so far, and the new one refuses; as one large number, to be done in this life
        ours = int.from_bytes(refused, "little")
        taken = int.from_bytes(self.refuser.translate(bytes([0]) + b"\1" * 255), "little")
        new = (ours & ~taken) * number
        self.refuser = bytearray((int.from_bytes(self.refuser, "little") | new).to_bytes(PAGES, "little"))

    def answer(self) -> bytearray:
        """What the registry says, page by page, from its runs; they must be maximal and without gaps."""
        found = bytearray(PAGES)
        numbers = {rule.name: i for i, rule in enumerate(self.registry, 1)}
        reached, earlier = 0, None
        for run, rule in self.registry.verdicts(0, PAGES * PAGE):
            number = numbers[rule.name] if rule else 0
            assert (run.start, number != earlier, run.size > 0) == (reached, True, True)
            if number:
                found[run.start // PAGE : run.end // PAGE] = bytes([number]) * (run.size // PAGE)
            reached, earlier = run.end, number
        assert reached == PAGES * PAGE
        return found


def overlapping(seed: int, longest: int, most: int = PAGES) -> tuple[RangeSet, bytearray]:
    """A million ranges in pages below *most*, in no order, up to *longest* pages long, and a byte for each page that
    one of them has."""
    choice = random.Random(seed)
    marked = bytearray(PAGES)
    ranges = []
    for _ in range(MILLION):
        start = choice.randrange(most)
        end = min(start + 1 + choice.randrange(longest), most)
        marked[start:end] = b"\1" * (end - start)
        ranges.append((start * PAGE, end * PAGE))
    return RangeSet(ranges), marked


@pytest.fixture(scope="module")
def model() -> Model:
    made = Model()
    denied, marked = overlapping(1, 3)
    made.add(deny_rule("denied", denied, "x"), marked)
    domain = Range(MILLION * PAGE, 5 * MILLION * PAGE)
    allowed, marked = overlapping(2, 9)
    outside = bytearray(PAGES)
    inside = marked[MILLION : 5 * MILLION].translate(bytes([1, 0]) + bytes(254))
    outside[MILLION : 5 * MILLION] = inside
    made.add(allow_rule("allowed", domain, allowed, "x"), outside)
    bits = random.Random(3).randbytes(MILLION // 8)
    blocks = bytes(1 - (bits[i // 8] >> i % 8 & 1) for i in range(MILLION))
    refused = bytearray(PAGES)
    refused[2 * MILLION : 4 * MILLION : 2] = refused[2 * MILLION + 1 : 4 * MILLION : 2] = blocks
    made.add(bitmap_rule("bits", Range(2 * MILLION * PAGE, 4 * MILLION * PAGE), 2 * PAGE, bits, "x"), refused)
    return made


@pytest.mark.slow
def test_three_rules_of_a_million_overlapping_ranges_answer_as_the_model(model: Model) -> None:
    assert set(model.refuser) == {0, 1, 2, 3}
    assert model.answer() == model.refuser


@pytest.mark.slow
def test_single_questions_to_them_answer_as_the_model(model: Model) -> None:
    names = [None, *(rule.name for rule in model.registry)]
    choice = random.Random(4)
    pfns = [0, 1, PAGES - 1, *(choice.randrange(PAGES) for _ in range(20_000))]
    for pfn in pfns:
        rule = model.registry.refuser(pfn)
        assert (rule.name if rule else None) == names[model.refuser[pfn]]
        assert model.registry.pfn_is_ram(pfn) == (not model.refuser[pfn])
    refused = model.refuser.translate(bytes([0]) + b"\1" * 255)
    for pfn in pfns[:5_000]:
        end = min(PAGES, pfn + choice.randrange(1, 2000))
        for ask, wanted in ((model.registry.next_ram, b"\0"), (model.registry.next_refused, b"\1")):
            found = refused.find(wanted, pfn, end)
            assert ask(pfn, end) == (end if found < 0 else found)


@pytest.mark.slow
def test_what_may_be_read_and_what_is_compiled_of_them_is_the_same(model: Model) -> None:
    ram = model.registry.ram(RangeSet([(0, PAGES * PAGE)]))
    found = bytearray(b"\1" * PAGES)
    for start, end in ram:
        found[start // PAGE : end // PAGE] = bytes((end - start) // PAGE)
    assert found == model.refuser.translate(bytes([0]) + b"\1" * 255)
    data = compile_guard(model.registry)
    again = Model()
    again.registry = parse_guard(data)
    assert again.answer() == model.refuser


# Peak memory in KiB before and after rules are made of a million ranges
COST = """
from guard.ranges import Range, RangeSet
from guard.registry import Registry, allow_rule, deny_rule
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
inside = {inside}
ranges = RangeSet.of_ascending((i * 12288 + inside, i * 12288 + 8192 - inside) for i in range(1_000_000))
before = peak()
registry = Registry()
registry.register(deny_rule("d", ranges, "x"))
registry.register(allow_rule("a", Range(0, 1 << 64), ranges, "x"))
assert sum(1 for _ in registry.verdicts(0, 1 << 64)) in (2_000_000, 2_000_001)
print(peak() - before)
"""


@pytest.mark.parametrize("inside", [0, 100])
def test_rules_of_a_million_ranges_cost_their_arrays_and_no_copy_of_the_ranges(inside: int) -> None:
    command = [sys.executable, "-c", COST.format(inside=inside)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    assert int(out) <= 48 * 1024  # two arrays of 16 MB, and what growing them takes


# The end of the address space


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_rules_reach_the_last_page_and_questions_do_not_go_beyond(page_size: int) -> None:
    pfns = END // page_size
    top = Range(END - 8 * page_size, END)
    last = RangeSet([(END - page_size, END)])
    for rule, refused in (
        (deny_rule("d", last, "x", page_size), [7]),
        (deny_rule("d", RangeSet([(END - 1, END)]), "x", page_size), [7]),
        (allow_rule("a", top, last, "x", page_size), [0, 1, 2, 3, 4, 5, 6]),
        (allow_rule("a", Range(0, END), last, "x", page_size), [0, 1, 2, 3, 4, 5, 6]),
        (bitmap_rule("b", top, 2 * page_size, b"\x08", "x", page_size), [0, 1, 2, 3, 4, 5]),
        (bitmap_rule("b", top, 2 * page_size, b"", "x", page_size), list(range(8))),
        (deny_rule("d", RangeSet([(0, END)]), "x", page_size), list(range(8))),
    ):
        registry = Registry(page_size)
        registry.register(rule)
        for asked in (registry, parse_guard(compile_guard(registry))):
            found = [i for i in range(8) if not asked.pfn_is_ram(pfns - 8 + i)]
            assert found == refused
            assert asked.next_refused(pfns - 8, pfns) == pfns - 8 + refused[0]
            ram = [i for i in range(8) if i not in refused]
            assert asked.next_ram(pfns - 8, pfns) == (pfns - 8 + ram[0] if ram else pfns)
            runs = [(r.start, r.end) for r, by in asked.verdicts(*top) if by]
            groups = [list(g) for _, g in groupby(enumerate(refused), lambda pair: pair[1] - pair[0])]
            expected = [(top.start + g[0][1] * page_size, top.start + (g[-1][1] + 1) * page_size) for g in groups]
            assert runs == expected
            assert sum(r.size for r, _ in asked.verdicts(0, END)) == END
            for beyond in (pfns, pfns + 1, 1 << 64, 1 << 80, -1, -pfns):
                for ask in (asked.pfn_is_ram, asked.refuser):
                    with pytest.raises(ValueError, match=f"is not between 0 and {pfns - 1:#x}"):
                        ask(beyond)
            for beyond in (pfns + 1, 1 << 64, -1):
                for next_one in (asked.next_ram, asked.next_refused):
                    with pytest.raises(ValueError, match=f"is not between 0 and {pfns:#x}"):
                        next_one(0, beyond)
                    with pytest.raises(ValueError, match=f"is not between 0 and {pfns:#x}"):
                        next_one(beyond, pfns)
            assert asked.next_ram(pfns, pfns) == asked.next_refused(pfns, pfns) == pfns
            for start, end in ((0, END + page_size), (-page_size, 0)):
                with pytest.raises(ValueError, match="is not between"):
                    list(asked.verdicts(start, end))


def test_nothing_of_what_lies_beyond_the_last_address_is_read() -> None:
    registry = Registry()
    memory = OldMemory([], registry)
    assert memory.read(END - PAGE, 3 * PAGE) == bytes(3 * PAGE)
    assert [(f.range.start, f.range.end) for f in memory.faults()] == [(END - PAGE, END)]


@pytest.mark.parametrize(
    "ranges", [[(0, END + 1)], [(-1, PAGE)], [(-2 * PAGE, -PAGE)], [(END, END + PAGE)], [(1 << 100, 1 << 101)]]
)
def test_ranges_that_leave_the_address_space_make_no_rule(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="not in the 64-bit address space"):
        deny_rule("d", RangeSet(ranges), "x")
    whole = RangeSet(ranges).outer_pages(PAGE)
    with pytest.raises(ValueError, match="not in the 64-bit address space"):
        allow_rule("a", Range(0, END), whole, "x")


@pytest.mark.parametrize(
    ("start", "block", "blocks"), [(END - PAGE, PAGE, 2), (-PAGE, PAGE, 1), (0, PAGE, -1), (0, 1 << 63, 3)]
)
def test_bitmaps_that_leave_the_address_space_make_no_rule(start: int, block: int, blocks: int) -> None:
    with pytest.raises(ValueError, match="not in the 64-bit space"):
        PageSet.of_bitmap(start, block, blocks, b"\xff")


@pytest.mark.parametrize("domain", [(-PAGE, 0), (0, END + 1), (2 * PAGE, PAGE), (END + PAGE, END + 2 * PAGE)])
def test_a_domain_that_is_none_is_refused(domain: tuple[int, int]) -> None:
    registry = Registry()
    with pytest.raises(ValueError, match="rule 'r': no domain goes from"):
        registry.register(deny_rule("r", RangeSet(), "x")._replace(domain=Range(*domain)))
    assert list(registry) == []


def test_a_rule_made_for_pages_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="rule 'r' is made for pages of 65536 bytes, here they have 4096"):
        Registry().register(deny_rule("r", RangeSet([(0, 65536)]), "x", 65536))


def test_a_page_that_a_domain_has_a_part_of_is_in_it_at_both_ends() -> None:
    registry = Registry()
    registry.register(allow_rule("a", Range(PAGE + 5, 3 * PAGE + 5), RangeSet(), "x"))
    assert [registry.pfn_is_ram(p) for p in range(5)] == [True, False, False, False, True]


# The sets that rules are made of


pairs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


@given(pairs)
def test_sets_of_ascending_ranges_are_those_of_any_order(ranges: list[tuple[int, int]]) -> None:
    model = {at for a, b in ranges for at in range(a, b)}
    found = list(merged(sorted(ranges)))
    assert {at for a, b in found for at in range(a, b)} == model
    assert all(a.end < b.start for a, b in pairwise(found))
    assert RangeSet(ranges) == RangeSet.of_ascending(sorted(ranges)) == RangeSet(reversed(ranges))
    byte_ranges = sorted((a * PAGE, b * PAGE) for a, b in ranges)
    pages = PageSet.of_ascending(byte_ranges)
    assert {p for p in range(70) if pages.has(p)} == model
    assert pages.data.tolist() == PageSet.of_ranges(RangeSet(byte_ranges)).data.tolist()


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), max_size=9), st.sampled_from([1, 2, 4, 8, 16]))
def test_whole_and_touched_pages_of_a_set(ranges: list[tuple[int, int]], page: int) -> None:
    has = {at for a, b in ranges for at in range(a, b)}
    inner = {p for p in range(100) if all(at in has for at in range(p * page, (p + 1) * page))}
    outer = {at // page for at in has}
    found = RangeSet(ranges)
    for pages, model in ((found.inner_pages(page), inner), (found.outer_pages(page), outer)):
        assert {p for a, b in pages for p in range(a // page, b // page)} == model
        assert all(a.end < b.start for a, b in pairwise(pages))


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), max_size=9))
def test_rules_allow_whole_pages_only_and_refuse_every_page_that_is_touched(ranges: list[tuple[int, int]]) -> None:
    quarters = {at for a, b in ranges for at in range(a, b)}
    found = RangeSet((a * PAGE // 4, b * PAGE // 4) for a, b in ranges)
    registry = Registry()
    registry.register(allow_rule("allowed", Range(0, END), found, "x"))
    assert [registry.pfn_is_ram(p) for p in range(30)] == [
        all(q in quarters for q in range(4 * p, 4 * p + 4)) for p in range(30)
    ]
    registry = Registry()
    registry.register(deny_rule("denied", found, "x"))
    assert [registry.pfn_is_ram(p) for p in range(30)] == [
        all(q not in quarters for q in range(4 * p, 4 * p + 4)) for p in range(30)
    ]
