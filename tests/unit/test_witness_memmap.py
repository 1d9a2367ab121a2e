# SPDX-License-Identifier: LGPL-2.1-or-later
"""Struct pages of a dead kernel: which pages it had marked, by the bytes of its memory map."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard._core import ffi, lib
from guard.errors import WitnessError
from guard.ranges import Range, RangeSet
from guard.rules import hwpoison, page_offline, sections
from guard.witness.memmap import Collected, Marks, Shape, scan, shape_of
from guard.witness.memory import Problems
from guard.witness.pagewalk import x86_64
from guard.witness.sections import Sections, read_sections
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.unit.witness_memory import OFFLINE_PAGE, POISONED_PAGE, STRUCT_PAGE_KEYS, VMEMMAP, DyingKernel

PAGE = 4096
SECTION = 1 << 27
ONLINE = 7


def info_of(**changes: str | None) -> Vmcoreinfo:
    """VMCOREINFO with STRUCT_PAGE_KEYS, changed by name without the parts that no Python name can have."""
    keys = dict(STRUCT_PAGE_KEYS.items())
    for name, value in changes.items():
        full = next(key for key in [*STRUCT_PAGE_KEYS, "OFFSET(page.compound_info)"] if name in key)
        if value is None:
            del keys[full]
        else:
            keys[full] = value
    return Vmcoreinfo("".join(f"{key}={value}\n" for key, value in keys.items()).encode())


@pytest.mark.parametrize(
    ("exported", "mask", "value"),
    [
        ("-251658240", 0xFF000000, 0xF1000000),  # 6.12 on: type in the top byte
        ("-257", 0xF0000100, 0xF0000000),  # 6.1: ~PG_offline, the bit is cleared in a page that is of the type
        ("-134217729", 0xFFFFFFFF, 0xF7FFFFFF),  # neither: only the very word
    ],
)
def test_page_type_is_read_as_the_kernel_of_that_encoding_does(exported: str, mask: int, value: int) -> None:
    shape = shape_of(info_of(PAGE_OFFLINE=exported))
    assert (shape.offline_mask, shape.offline) == (mask, value)


def test_compound_info_goes_before_compound_head() -> None:
    assert shape_of(info_of()).head == 8
    assert shape_of(info_of(compound_info="16")).head == 16


def test_kernel_without_a_mark_has_no_rule_for_it() -> None:
    shape = shape_of(info_of(PG_hwpoison=None, PAGE_OFFLINE=None))
    assert (shape.poison, shape.offline_mask) == (0, 0)
    marks = Marks(None, None, RangeSet(), 0)
    assert hwpoison.rule(marks) is None
    assert page_offline.rule(marks) is None


@pytest.mark.parametrize(
    "changes",
    [{"SIZE": None}, {"SIZE": "0"}, {"SIZE": "60"}, {"SIZE": "100000"}, {"flags": "60"}, {"flags": "4"}]
    + [{"mapcount": "64"}, {"mapcount": "18446744073709551615"}, {"compound_head": None}, {"PG_hwpoison": "64"}],
)
def test_layout_that_cannot_be_is_refused(changes: dict[str, str | None]) -> None:
    with pytest.raises(WitnessError, match="vmcoreinfo"):
        shape_of(info_of(**changes))


words = st.sampled_from([0, 1, 0xF1000000, 0xF1000007, 0xF0000000, 0xFFFFFFFF, 0xFFFFFEFF, 0xF00000FF])


@given(
    st.lists(st.tuples(st.integers(0, (1 << 64) - 1), words, st.integers(0, 3)), max_size=40),
    st.sampled_from([(0xFF000000, 0xF1000000), (0xF0000100, 0xF0000000), (0xFFFFFFFF, 0xFFFFFEFF), (0, 0)]),
    st.integers(0, 63),
)
def test_scan_marks_exactly_the_pages_that_say_so(
    pages: list[tuple[int, int, int]], kind: tuple[int, int], bit: int
) -> None:
    mask, value = kind
    shape = Shape(64, 0, 48, 8, 1 << bit, mask, value)
    data = b"".join(struct.pack("<QQ32xI12x", flags, head, word) for flags, word, head in pages)
    poisoned, offline = bytearray(5), bytearray(5)
    found = lib.memmap_scan(
        ffi.new("struct memmap_shape *", shape._asdict()),
        ffi.from_buffer("uint8_t[]", data),
        len(pages),
        *(ffi.from_buffer("uint8_t[]", bits) for bits in (poisoned, offline)),
    )
    bad = sum(1 << i for i, (flags, _, _) in enumerate(pages) if flags >> bit & 1)
    gone = sum(1 << i for i, (_, word, head) in enumerate(pages) if mask and word & mask == value and not head & 1)
    assert (int.from_bytes(poisoned, "little"), int.from_bytes(offline, "little")) == (bad, gone)
    assert found == bool(bad | gone)


def scanned(kernel: DyingKernel, numbers: list[int], wanted: RangeSet, **more: float) -> tuple[Marks, Problems]:
    kernel.sections(dict.fromkeys(numbers, ONLINE))
    info = kernel.finish()
    walk, problems = x86_64(kernel.mem, info), Problems()
    return scan(walk, info, read_sections(walk, info, problems), wanted, problems, **more), problems


def runs(marks: Marks) -> tuple[RangeSet, RangeSet]:
    assert marks.poisoned is not None
    assert marks.offline is not None
    return RangeSet(marks.poisoned.ranges(0, 1 << 46)), RangeSet(marks.offline.ranges(0, 1 << 46))


def test_poisoned_and_offline_pages_are_found_also_across_sections() -> None:
    kernel = DyingKernel()
    end = 3 * SECTION // PAGE
    numbers = [0, 1, 2, 3]
    kernel.memmap(numbers, {7: POISONED_PAGE, end - 512: OFFLINE_PAGE * 512, end: OFFLINE_PAGE * 3 + POISONED_PAGE})
    marks, problems = scanned(kernel, numbers, RangeSet([(0, 4 * SECTION)]))
    poisoned, offline = runs(marks)
    assert poisoned == RangeSet([(7 * PAGE, 8 * PAGE), ((end + 3) * PAGE, (end + 4) * PAGE)])
    assert offline == RangeSet([((end - 512) * PAGE, (end + 3) * PAGE)])
    assert (list(problems), marks.unread, marks.scanned) == ([], RangeSet(), 4 << 21)


def test_pages_that_were_not_asked_for_are_not_looked_at() -> None:
    kernel = DyingKernel()
    kernel.memmap([0], {7: POISONED_PAGE * 2})
    marks, _ = scanned(kernel, [0], RangeSet([(8 * PAGE, 9 * PAGE)]))
    assert runs(marks)[0] == RangeSet([(8 * PAGE, 9 * PAGE)])
    assert marks.scanned == 64


def test_tail_page_has_a_poison_flag_of_its_own_but_no_type() -> None:
    kernel = DyingKernel()
    tail = struct.pack("<QQ32xI12x", 1 << 20, VMEMMAP | 1, 0xF1000000)
    kernel.memmap([0], {100: tail})
    poisoned, offline = runs(scanned(kernel, [0], RangeSet([(0, SECTION)]))[0])
    assert poisoned == RangeSet([(100 * PAGE, 101 * PAGE)])
    assert offline == RangeSet()


def test_struct_pages_that_cannot_be_had_refuse_nothing_and_are_told() -> None:
    kernel = DyingKernel()
    kernel.memmap([0, 2], {7: POISONED_PAGE})
    marks, problems = scanned(kernel, [0, 1, 2], RangeSet([(0, 3 * SECTION)]))
    assert marks.unread == RangeSet([(SECTION, 2 * SECTION)])
    assert runs(marks)[0] == RangeSet([(7 * PAGE, 8 * PAGE)])
    (line,) = problems
    assert line.startswith("struct pages of 0x8000000-0xfffffff could not be read at all")


def test_scan_ends_when_its_time_is_over() -> None:
    kernel = DyingKernel()
    kernel.memmap([0], {7: POISONED_PAGE})
    marks, problems = scanned(kernel, [0], RangeSet([(0, SECTION)]), time_limit=-1)
    assert marks.unread == RangeSet([(0, SECTION)])
    assert runs(marks) == (RangeSet(), RangeSet())
    assert "could not be read in -1 s" in problems[0]


def test_memory_map_that_calls_everything_broken_does_not_count() -> None:
    kernel = DyingKernel()
    kernel.memmap([0], {0: POISONED_PAGE * 4096})
    marks, problems = scanned(kernel, [0], RangeSet([(0, SECTION)]))
    assert (marks.poisoned, marks.offline) == (None, None)
    assert problems == ["4096 of 32768 struct pages have PG_hwpoison: no sound memory map, no mark counts"]


def test_unplugged_memory_that_the_kernel_used_is_a_contradiction() -> None:
    kernel = DyingKernel()
    kernel.memmap([0], {16: OFFLINE_PAGE * 16})
    marks, _ = scanned(kernel, [0], RangeSet([(0, SECTION)]))
    assert marks.offline is not None
    unplugged = RangeSet([(8 * PAGE, 40 * PAGE), (2 * SECTION, 3 * SECTION)])
    used = RangeSet([(8 * PAGE, 16 * PAGE), (32 * PAGE, 40 * PAGE)])
    assert page_offline.unmarked(marks.offline, unplugged, RangeSet([(0, SECTION)])) == (used, 16 * PAGE)


def test_scattered_marks_are_kept_as_a_bitmap_and_few_as_runs() -> None:
    kernel = DyingKernel()
    kernel.memmap([0, 1], {0: (OFFLINE_PAGE + bytes(64)) * 16384, 32768 + 64: POISONED_PAGE})
    marks, _ = scanned(kernel, [0, 1], RangeSet([(0, 2 * SECTION)]))
    assert runs(marks)[1] == RangeSet((pfn * PAGE, (pfn + 1) * PAGE) for pfn in range(0, 32768, 2))
    assert marks.offline is not None
    assert marks.poisoned is not None
    assert len(marks.offline.data) * 8 == 32768 // 8
    assert len(marks.poisoned.data) == 2


def test_offline_sections_are_refused_unless_that_were_most_of_memory() -> None:
    ram = RangeSet([(0, 10 * SECTION)])
    known = Sections(SECTION, ram, RangeSet([(0, 8 * SECTION)]))
    rule = sections.rule(known, ram)
    assert rule is not None
    assert rule.deny
    assert RangeSet(rule.pages.ranges(0, 1 << 46)) == RangeSet([Range(8 * SECTION, 10 * SECTION)])
    assert sections.rule(known._replace(online=RangeSet([(0, SECTION)])), ram) is None


def test_memory_map_is_found_through_mem_section_where_vmcoreinfo_does_not_name_it() -> None:
    kernel = DyingKernel()
    kernel.memmap([0], {7: POISONED_PAGE})
    del kernel.keys["SYMBOL(vmemmap)"]
    marks, problems = scanned(kernel, [0], RangeSet([(0, SECTION)]))
    assert (runs(marks)[0], list(problems)) == (RangeSet([(7 * PAGE, 8 * PAGE)]), [])


pfns = st.lists(st.integers(0, 700), max_size=30).map(lambda borders: sorted(set(borders)))


@given(pfns, st.sets(st.integers(0, 700)), st.booleans())
def test_collected_marks_are_the_same_as_runs_and_as_bitmap(
    borders: list[int], marked: set[int], everything: bool
) -> None:
    """Pieces between borders, wherever these lie; with *everything* many runs, so that it becomes a bitmap."""
    base = 1 << 20
    collected = Collected(PAGE)
    expected: set[int] = set()
    for first, end in zip(borders[::2], borders[1::2], strict=False):
        chosen = {p for p in range(first, end) if p in marked or (everything and p % 2)}
        expected |= chosen
        bits = sum(1 << (p - first) for p in chosen)
        collected.add(base + first, end - first, bytearray(bits.to_bytes((end - first + 7) // 8, "little")))
    found = collected.pageset()
    assert {pfn - base for pfn in range(base - 64, base + 1000) if found.has(pfn)} == expected
    assert collected.pages == len(expected)
