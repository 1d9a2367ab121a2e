# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose pages are, by struct pages made here: a user's page must never be taken for the kernel's."""

from __future__ import annotations

import struct

import pytest

from guard.errors import WitnessError
from guard.ranges import RangeSet
from guard.witness import owners
from guard.witness.owners import Owners
from guard.witness.pagewalk import x86_64
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.unit.witness_memory import VMEMMAP, DyingKernel

PAGE = 4096
LRU, SLAB_FLAG = 1 << 5, 1 << 7
NO_TYPE, OFFLINE, BUDDY, HUGETLB, SLAB = 0xFFFFFFFF, 0xF1000000, 0xF0000000, 0xF4000000, 0xF5000000
FIRST = 1 << 15
"""The first pfn of the one section that the kernel here has."""


def page(flags: int = 0, head: int = 0, mapping: int = 0, private: int = 0, kind: int = NO_TYPE) -> bytes:
    return struct.pack("<QQQQQQII", flags, head, 0, mapping, 0, private, kind, 1).ljust(64, b"\0")


def look(marked: dict[int, bytes], start: int, count: int, **keys: str | None) -> Owners:
    """Whose the *count* pages from FIRST + *start* on are; *marked* are struct pages by number, others are zeros."""
    kernel = DyingKernel()
    kernel.memmap([1], {FIRST + i: data for i, data in marked.items()})
    for name, value in keys.items():
        key = next(k for k in [*kernel.keys, "OFFSET(page.compound_info)", "NUMBER(PG_slab)"] if name in k)
        if value is None:
            del kernel.keys[key]
        else:
            kernel.keys[key] = value
    info = kernel.finish()
    found = RangeSet([((FIRST + start) * PAGE, (FIRST + start + count) * PAGE)])
    return owners.look(x86_64(kernel.mem, info), info, VMEMMAP, found)


def others(marked: dict[int, bytes], start: int, count: int, **keys: str | None) -> list[int]:
    found = look(marked, start, count, **keys)
    assert not found.unseen
    return [at // PAGE - FIRST for r in found.others for at in range(r.start, r.end, PAGE)]


@pytest.mark.parametrize(
    ("made", "kernels"),
    [
        (page(), True),
        (page(flags=LRU), False),
        (page(mapping=0xFFFF888000001001), False),  # anonymous
        (page(mapping=0xFFFF888000001000), False),  # page cache
        (page(kind=0), False),  # mapped once
        (page(kind=17), False),
        (page(mapping=0xFFFF888000001000, kind=SLAB), True),  # of slabs that is a list
        (page(kind=SLAB | 0x1234), True),
        (page(kind=OFFLINE), False),
        (page(kind=HUGETLB), False),
        (page(kind=0xF2000000), True),  # a page table
        (bytes(64), True),  # never initialised
    ],
)
def test_page_is_the_kernels_own_or_not(made: bytes, kernels: bool) -> None:
    assert others({7: made}, 7, 1) == ([] if kernels else [7])
    assert others({7: made}, 0, 20) == ([] if kernels else [7])


def test_slab_of_an_older_kernel_is_told_by_its_flag() -> None:
    keys = {"PG_slab": "7", "PAGE_SLAB": None}
    made = page(flags=SLAB_FLAG, mapping=0xFFFF888000001000)
    assert others({3: made}, 3, 1, **keys) == []
    assert others({3: page(mapping=0xFFFF888000001000)}, 3, 1, **keys) == [3]


def test_types_of_an_older_kernel_are_cleared_bits() -> None:
    keys = {"PAGE_OFFLINE": "-257", "PAGE_BUDDY": "-129", "PAGE_HUGETLB": None, "PAGE_SLAB": None}
    made = {0: page(kind=0xFFFFFEFF), 1: page(kind=0xFFFFFF7F), 2: page(kind=0xFFFFFDFF), 3: page()}
    assert others(made, 0, 4, **keys) == [0, 1]


@pytest.mark.parametrize("order", [0, 1, 4, 10])
def test_all_pages_of_a_free_block_are_nobodys_wherever_one_starts_to_look(order: int) -> None:
    start, size = 1024, 1 << order
    made = {start: page(kind=BUDDY, private=order), **{start + i: page() for i in range(1, size)}}
    made[start + size] = page()
    for first in {start, start + 1, start + size // 2, start + size - 1} & set(range(start, start + size)):
        assert others(made, first, start + size + 1 - first) == list(range(first, start + size))
    assert others(made, start + size, 1) == []


def test_block_in_use_as_a_whole_is_no_free_one() -> None:
    assert others({i: page() for i in range(512)}, 3, 500) == []


@pytest.mark.parametrize(("head", "kernels"), [(page(kind=SLAB), True), (page(flags=LRU), False)])
def test_tail_pages_are_whose_their_head_is(head: bytes, kernels: bool) -> None:
    at = VMEMMAP + (FIRST + 8) * 64
    tail = page(head=at | 1, mapping=0xDEAD000000000400)
    made = {8: head, **{8 + i: tail for i in range(1, 8)}}
    assert others(made, 10, 3) == ([] if kernels else [10, 11, 12])
    masked = page(head=-(64 << 3) & (1 << 64) - 1 | 1, mapping=0xDEAD000000000400)
    made |= {8 + i: masked for i in range(1, 8)}
    assert others(made, 10, 3, compound_info="8") == ([] if kernels else [10, 11, 12])


def test_tail_page_that_leads_nowhere_is_not_taken_for_the_kernels() -> None:
    found = look({5: page(head=0xFFFF123400000001)}, 4, 3)
    assert found.unseen == RangeSet([((FIRST + 5) * PAGE, (FIRST + 6) * PAGE)])
    assert not found.others
    two = {5: page(head=VMEMMAP + (FIRST + 6) * 64 | 1), 6: page(head=VMEMMAP + (FIRST + 5) * 64 | 1)}
    assert look(two, 5, 2).unseen.size == 2 * PAGE


def test_pages_without_struct_page_are_not_taken_for_the_kernels() -> None:
    found = look({}, 32766, 4)
    assert found.unseen == RangeSet([(2 * FIRST * PAGE, (2 * FIRST + 2) * PAGE)])


@pytest.mark.parametrize(
    "keys",
    [{"SIZE(page)": None}, {"SIZE(page)": "20"}, {"SIZE(page)": "60"}, {"page.mapping": None}, {"PG_lru": None}]
    + [{"page.mapping": "60"}, {"page.mapping": "12"}, {"compound_head": None}],
)
def test_layout_that_is_not_told_is_an_error(keys: dict[str, str | None]) -> None:
    with pytest.raises(WitnessError, match="vmcoreinfo"):
        look({}, 0, 1, **keys)


def test_no_bytes_of_vmcoreinfo_are_too_wild() -> None:
    keys = ("SIZE(page)=64", "OFFSET(page.flags)=0", "OFFSET(page.mapping)=24", "OFFSET(page.private)=40")
    info = Vmcoreinfo("\n".join([*keys, "OFFSET(page._mapcount)=18446744073709551612\n"]).encode())
    kernel = DyingKernel()
    kernel.memmap([1])
    walk = x86_64(kernel.mem, kernel.finish())
    with pytest.raises(WitnessError):
        owners.look(walk, info, VMEMMAP, RangeSet([(FIRST * PAGE, (FIRST + 1) * PAGE)]))
