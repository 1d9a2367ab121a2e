# SPDX-License-Identifier: LGPL-2.1-or-later
"""Struct pages of a dead kernel: which pages it had marked, by the bytes of its memory map."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import example, given
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
    shape = Shape(64, 0, 48, 8, 1 << bit, mask, value, 48, 1, 2)  # no word is of HugeTLB
    data = b"".join(struct.pack("<QQ32xI12x", flags, head, word) for flags, word, head in pages)
    poisoned, offline = bytearray(5), bytearray(5)
    found = lib.memmap_scan(
        ffi.new("struct memmap_shape *", shape._asdict()),
        ffi.new("struct memmap_pass *"),
        ffi.from_buffer("uint8_t[]", data),
        len(pages),
        *(ffi.from_buffer("uint8_t[]", bits) for bits in (poisoned, offline)),
    )
    bad = sum(1 << i for i, (flags, _, _) in enumerate(pages) if flags >> bit & 1)
    gone = sum(1 << i for i, (_, word, head) in enumerate(pages) if mask and word & mask == value and not head & 1)
    assert (int.from_bytes(poisoned, "little"), int.from_bytes(offline, "little")) == (bad, gone)
    assert found == bool(bad | gone)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, (0, 0, 0)),
        ({"NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)": "-201326592"}, (48, 0xFF000000, 0xF4000000)),  # 6.12 on
        ({"NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)": "-2049"}, (48, 0xF0000800, 0xF0000000)),  # 6.9
        ({"NUMBER(PG_hugetlb)": "8"}, (64, 0x100, 0x100)),  # 6.6 to 6.8
        ({"NUMBER(HUGETLB_PAGE_DTOR)": "2", "OFFSET(folio._folio_dtor)": "80"}, (80, 0xFF, 2)),  # 6.3 to 6.5
        ({"NUMBER(HUGETLB_PAGE_DTOR)": "2", "OFFSET(page.compound_dtor)": "17"}, (80, 0xFF00, 0x200)),  # 6.1
        ({"NUMBER(HUGETLB_PAGE_DTOR)": "2"}, (0, 0, 0)),
        ({"NUMBER(HUGETLB_PAGE_DTOR)": "2", "OFFSET(page.compound_dtor)": "64"}, (0, 0, 0)),
        ({"NUMBER(HUGETLB_PAGE_DTOR)": "256", "OFFSET(page.compound_dtor)": "16"}, (0, 0, 0)),
        ({"NUMBER(PG_hugetlb)": "64"}, (0, 0, 0)),
    ],
)
def test_hugetlb_folios_are_told_as_the_kernel_of_those_keys_does(
    keys: dict[str, str], told: tuple[int, int, int]
) -> None:
    info = Vmcoreinfo("".join(f"{key}={value}\n" for key, value in (STRUCT_PAGE_KEYS | keys).items()).encode())
    assert shape_of(info)[-4:] == (*told, 1 << 18)


class Page(NamedTuple):
    """A struct page of 64 bytes, as the tests below lay it out."""

    flagged: bool = False
    tail: bool = False
    kind: int = 0
    """What tells HugeTLB, in whichever struct page that is: 7 in the lowest byte does."""

    def packed(self) -> bytes:
        return struct.pack("<QQI28xI12x", self.flagged << 20, VMEMMAP * self.tail | self.tail, self.kind, self.kind)


NOT_TOLD, BY_HEAD, BY_SECOND = (0, 0, 0), (48, 0xFF, 7), (64 + 16, 0xFF, 7)


def poisoned_of(pages: list[Page], told: tuple[int, int, int], longest: int) -> set[int]:
    """The model: numbers of the pages of one unbroken run that are poisoned."""
    found = set()
    for number, page in enumerate(pages):
        if not page.flagged:
            continue
        found.add(number)
        behind = number + 1
        while behind < len(pages) and pages[behind].tail and behind - number < longest:
            behind += 1
        whole = told == NOT_TOLD
        if told == BY_HEAD:
            whole = page.kind & 0xFF == 7
        if told == BY_SECOND and behind > number + 1:
            whole = pages[number + 1].kind & 0xFF == 7
        if whole and not page.tail:
            found |= set(range(number, behind))
    return found


folios = st.builds(
    lambda first, length, second, flagged, kind: [
        Page(first, False, kind),
        *(Page(number in flagged, True, second if number == 1 else 0) for number in range(1, length)),
    ],
    st.booleans(),
    st.integers(1, 20),
    st.sampled_from([0, 7]),
    st.sets(st.integers(1, 20), max_size=2),
    st.sampled_from([0, 7, 0x107]),
)
maps = st.lists(folios, max_size=12).map(lambda found: [page for folio in found for page in folio])
anything = st.lists(st.builds(Page, st.booleans(), st.booleans(), st.sampled_from([0, 7])), max_size=60)


@given(
    maps | anything,
    st.sampled_from([NOT_TOLD, BY_HEAD, BY_SECOND]),
    st.sampled_from([1, 2, 9, 1 << 18]),
    st.dictionaries(st.integers(1, 200), st.booleans(), max_size=8),
)
@example([Page(True), Page(tail=True, kind=7), Page(tail=True)], BY_SECOND, 9, {1: False})
@example([Page(True), Page(tail=True, kind=7), Page(tail=True)], BY_SECOND, 9, {1: True})
@example([Page(True, kind=7), Page(tail=True), Page(tail=True)], BY_HEAD, 9, {2: True})
def test_poisoned_folios_are_whole_also_where_the_memory_map_is_read_in_pieces(
    pages: list[Page], told: tuple[int, int, int], longest: int, cuts: dict[int, bool]
) -> None:
    """*cuts*: where a piece ends, and whether there is a gap behind it."""
    shape = Shape(64, 0, 48, 8, 1 << 20, 0, 0, *told, longest)
    c_shape, state = ffi.new("struct memmap_shape *", shape._asdict()), ffi.new("struct memmap_pass *")
    borders = [0, *sorted(cut for cut in cuts if cut < len(pages)), len(pages)]
    expected: set[int] = set()
    found: set[int] = set()
    run_start = 0
    for start, end in pairwise(borders):
        if cuts.get(start):
            state.left = 0
            expected |= {run_start + n for n in poisoned_of(pages[run_start:start], told, longest)}
            run_start = start
        data = b"".join(page.packed() for page in pages[start:end])
        bits, offline = bytearray((end - start + 7) // 8), bytearray((end - start + 7) // 8)
        c = [ffi.from_buffer("uint8_t[]", part) for part in (data, bits, offline)]
        any_found = lib.memmap_scan(c_shape, state, c[0], end - start, *c[1:])
        here = {start + n for n in range(end - start) if bits[n // 8] >> n % 8 & 1}
        assert (bool(any_found), any(offline)) == (bool(here), False)
        found |= here
    expected |= {run_start + n for n in poisoned_of(pages[run_start:], told, longest)}
    assert found == expected
    assert state.flagged == sum(page.flagged for page in pages)


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


HUGE = {"NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)": "-201326592"}
HEAD = struct.pack("<QQ32xI12x", 1 << 20 | 1 << 6, 0, 0xF4000000)
THP_HEAD = struct.pack("<QQ32xI12x", 1 << 20 | 1 << 6, 0, 0xFFFFFFFF)
TAIL = struct.pack("<QQ32xI12x", 0, (-(64 << 9) & (1 << 64) - 1) | 1, 0xFFFFFFFF)
POISONED_TAIL = struct.pack("<Q", 1 << 20) + TAIL[8:]
GIB_PAGES = 1 << 18


def test_hugetlb_folio_of_1_gib_is_refused_whole_and_nothing_beyond_it() -> None:
    kernel = DyingKernel()
    kernel.keys |= HUGE
    numbers = list(range(8, 18))
    marked = {8 << 15: HEAD, 1 + (8 << 15): TAIL * 32767} | {number << 15: TAIL * 32768 for number in range(9, 17)}
    kernel.memmap(numbers, marked)
    marks, problems = scanned(kernel, [0, *numbers], RangeSet([(8 * SECTION, 18 * SECTION)]))
    # the tails go on for another section, but no folio does
    assert runs(marks)[0] == RangeSet([(8 * SECTION, 16 * SECTION)])
    assert list(problems) == []
    assert marks.poisoned is not None
    assert len(marks.poisoned.data) == 2


def test_only_the_broken_pages_of_other_large_folios_are_refused() -> None:
    kernel = DyingKernel()
    kernel.keys |= HUGE
    kernel.memmap([0], {0: THP_HEAD + TAIL * 511, 512: HEAD + TAIL * 511, 1024: TAIL * 7 + POISONED_TAIL + TAIL * 9})
    poisoned, _ = runs(scanned(kernel, [0], RangeSet([(0, SECTION)]))[0])
    assert poisoned == RangeSet([(0, PAGE), (512 * PAGE, 1041 * PAGE)])  # 1024 on: tails of the same head


def test_broken_page_of_a_folio_that_is_not_poisoned_itself_is_refused_alone() -> None:
    kernel = DyingKernel()
    kernel.keys |= HUGE
    clean = struct.pack("<Q", 1 << 6) + HEAD[8:]
    kernel.memmap([0], {512: clean + TAIL * 6 + POISONED_TAIL + TAIL * 504})
    assert runs(scanned(kernel, [0], RangeSet([(0, SECTION)]))[0])[0] == RangeSet([(519 * PAGE, 520 * PAGE)])


def test_any_poisoned_folio_is_refused_whole_where_hugetlb_cannot_be_told() -> None:
    kernel = DyingKernel()
    kernel.memmap([0], {512: THP_HEAD + TAIL * 511, 2048: POISONED_PAGE})
    for key in HUGE:
        del kernel.keys[key]
    poisoned, _ = runs(scanned(kernel, [0], RangeSet([(0, SECTION)]))[0])
    assert poisoned == RangeSet([(512 * PAGE, 1024 * PAGE), (2048 * PAGE, 2049 * PAGE)])


def test_heads_that_repeat_every_64_pages_cover_their_hugetlb_folio() -> None:
    """hugetlb_optimize_vmemmap before 7.1: all struct pages of the folio lie in one page, mapped eight times."""
    kernel = DyingKernel()
    kernel.keys |= HUGE
    kernel.memmap([0], {512: (HEAD + TAIL * 63) * 8})
    assert runs(scanned(kernel, [0], RangeSet([(0, SECTION)]))[0])[0] == RangeSet([(512 * PAGE, 1024 * PAGE)])


def test_poisoned_folio_ends_where_struct_pages_are_missing() -> None:
    kernel = DyingKernel()
    kernel.keys |= HUGE
    kernel.memmap([0, 2], {32000: HEAD + TAIL * 767, 65536: TAIL * 100})
    marks, problems = scanned(kernel, [0, 1, 2], RangeSet([(0, 3 * SECTION)]))
    assert runs(marks)[0] == RangeSet([(32000 * PAGE, 32768 * PAGE)])
    assert marks.unread == RangeSet([(SECTION, 2 * SECTION)])
    assert len(problems) == 1


def test_poisoned_folio_ends_where_nothing_more_was_asked_for() -> None:
    kernel = DyingKernel()
    kernel.keys |= HUGE
    kernel.memmap([0], {512: HEAD + TAIL * 511})
    wanted = RangeSet([(0, 600 * PAGE), (700 * PAGE, SECTION)])
    assert runs(scanned(kernel, [0], wanted)[0])[0] == RangeSet([(512 * PAGE, 600 * PAGE)])


def test_large_poisoned_folios_are_plausible_however_much_they_hold() -> None:
    kernel = DyingKernel()
    kernel.keys |= HUGE
    kernel.memmap([0], {0: (HEAD + TAIL * 511) * 64})
    marks, problems = scanned(kernel, [0], RangeSet([(0, SECTION)]))
    assert runs(marks)[0] == RangeSet([(0, SECTION)])
    assert list(problems) == []


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


@pytest.mark.parametrize("online", [10, 8, 6, 1])
def test_offline_sections_are_refused_however_many_they_are(online: int) -> None:
    ram = RangeSet([(0, 10 * SECTION)])
    known = Sections(SECTION, ram, RangeSet([(0, online * SECTION)]))
    rule = sections.rule(known)
    assert rule.deny
    assert RangeSet(rule.pages.ranges(0, 1 << 46)) == RangeSet([Range(online * SECTION, 10 * SECTION)])
    assert known.doubtful(ram) == (online < 5)


def test_memory_of_devices_is_no_reason_to_doubt_the_sections() -> None:
    ram, device = RangeSet([(0, 2 * SECTION)]), RangeSet([(8 * SECTION, 80 * SECTION)])
    known = Sections(SECTION, ram | device, ram)
    assert not known.doubtful(ram)
    assert known.doubtful(ram | device)


def test_ram_in_a_section_that_is_not_there_is_told_and_not_refused() -> None:
    known = Sections(SECTION, RangeSet([(0, 4 * SECTION)]), RangeSet([(0, 3 * SECTION)]), None, "root 7 is left out")
    problems = Problems()
    missing = sections.without_section(known, RangeSet([(0, 2 * SECTION), (3 * SECTION, 5 * SECTION)]), problems)
    assert missing == RangeSet([(4 * SECTION, 5 * SECTION)])
    assert not RangeSet(sections.rule(known).pages.ranges(0, 1 << 46)) & missing
    (line,) = problems
    assert "0x8000000 bytes of System RAM (0x20000000-0x27ffffff)" in line
    assert "root 7" in line
    assert sections.without_section(known, RangeSet([(0, SECTION)]), problems) == RangeSet()
    assert len(problems) == 1


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
