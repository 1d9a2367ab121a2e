# SPDX-License-Identifier: LGPL-2.1-or-later
"""Searching old memory for the VMCOREINFO note: what counts as one, where it looks first, and when it ends."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.ranges import RangeSet
from guard.witness.proof import Proof
from guard.witness.scan import Candidate, likely, scan
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.unit.witness_memory import PAGE, FakeMemory, vmcoreinfo_note

MIB, GIB = 1 << 20, 1 << 30
TEXT = b"OSRELEASE=6.12.0-test\nPAGESIZE=4096\nCRASHTIME=1764000000\n"
NO_CRASH = TEXT.replace(b"CRASHTIME=1764000000\n", b"")
OLD_CRASH = TEXT.replace(b"CRASHTIME=1764000000\n", b"CRASHTIME=1700000000\n")
PROVEN = Proof(None)


class Zeros(FakeMemory):
    """What was not written is zeros; *asked* are the ranges that were read."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []

    def read(self, paddr: int, size: int) -> bytes:
        self.asked.append((paddr, paddr + size))
        self.reads += 1
        data = bytearray(size)
        for at in range(paddr & -PAGE, paddr + size, PAGE):
            if page := self.pages.get(at // PAGE):
                start, end = max(at, paddr), min(at + PAGE, paddr + size)
                data[start - paddr : end - paddr] = page[start - at : end - at]
        return bytes(data)


def memory_with(notes: dict[int, bytes], size: int) -> FakeMemory:
    mem = FakeMemory()
    for paddr in range(0, size, PAGE):
        mem.write(paddr, b"\0")
    for paddr, desc in notes.items():
        mem.write(paddr, vmcoreinfo_note(desc))
    return mem


def places(candidates: Sequence[Candidate]) -> list[int | None]:
    return [c.info.paddr for c in candidates]


def test_page_aligned_note_of_the_latest_crash_is_preferred() -> None:
    end = 3 * MIB
    mem = memory_with({0x3000: NO_CRASH, 0x20010: TEXT, 0x101000: OLD_CRASH, 0x180000: TEXT, 0x280000: NO_CRASH}, end)
    found = scan(mem, RangeSet([(0, end)]), own_paddr=0x280000).candidates
    assert places(found) == [0x180000, 0x101000, 0x3000, 0x20010]
    assert found[0].reasons == ("starts a page", "has CRASHTIME=1764000000")
    assert found[2].reasons[1] == "has no CRASHTIME="
    assert not found[3].page_aligned


def test_what_only_looks_like_a_note_is_none() -> None:
    mem = memory_with({}, MIB)
    mem.write(0x2000, b"VMCOREINFO\0" * 1000)
    mem.write(0x8000, vmcoreinfo_note(b"SOMETHING=else\n"))
    mem.write(0x9000, vmcoreinfo_note(TEXT).replace(b"\x0b", b"\x0c", 1))
    mem.write(0xA000, struct.pack("<III", 11, 1 << 30, 0) + b"VMCOREINFO\0\0OSRELEASE=")
    assert scan(mem, RangeSet([(0, MIB)])).candidates == []
    assert mem.reads < 20


def test_note_is_found_wherever_it_lies_around_the_border_of_a_read() -> None:
    for start in range(MIB - 40, MIB + 8, 4):
        mem = memory_with({start: TEXT}, MIB + 8192)
        assert places(scan(mem, RangeSet([(0, MIB + 8192)])).candidates) == [start]


def test_only_unreadable_pages_are_skipped() -> None:
    end = 2 * MIB
    mem = memory_with({0x5000: TEXT, 0x1F0000: OLD_CRASH}, end)
    for paddr in (0x4000, 0x7000, 0x1F2000):
        mem.drop(paddr)
    assert places(scan(mem, RangeSet([(0, end)])).candidates) == [0x5000, 0x1F0000]


def test_search_of_unreadable_memory_ends_after_a_bounded_number_of_reads() -> None:
    mem = FakeMemory()
    assert scan(mem, RangeSet([(0, GIB)])).candidates == []
    assert mem.reads < 1 << 17


def test_search_of_memory_full_of_notes_is_bounded() -> None:
    mem = memory_with(dict.fromkeys(range(0, 6 * MIB, PAGE), TEXT), 0)
    tried = []

    def prove(info: Vmcoreinfo) -> Proof:
        tried.append(info)
        return Proof(None, lacking="all")

    found = scan(mem, RangeSet([(0, 6 * MIB)]), prove=prove)
    assert 0 < len(found.candidates) <= 8
    assert mem.reads < 3000
    assert len(tried) <= 16


def test_search_ends_at_the_first_note_that_proves_itself() -> None:
    mem = memory_with({0x10000: TEXT, 2 * MIB: OLD_CRASH, 3 * MIB: TEXT, 40 * MIB: TEXT}, 41 * MIB)

    def prove(info: Vmcoreinfo) -> Proof:
        return Proof(None, against="is of another boot") if info.paddr != 2 * MIB else PROVEN

    found = scan(mem, RangeSet([(0, 41 * MIB)]), prove=prove, verify=mem)
    first, *rest = found.candidates
    assert first.proven
    assert first.info.paddr == 2 * MIB
    assert not any(c.proven for c in rest)
    # RAM from 16 MiB on is searched first, then what is left from 0 on, up to the MiB that has it
    assert found.size == 25 * MIB + 3 * MIB
    assert not found.late


def test_copy_that_does_not_start_a_page_is_never_asked_for_proof() -> None:
    mem = memory_with({0x10004: TEXT}, MIB)
    found = scan(mem, RangeSet([(0, MIB)]), prove=lambda _: PROVEN)
    assert [c.proven for c in found.candidates] == [False]


def test_note_that_its_own_kernel_contradicts_is_ranked_behind_one_of_which_nothing_is_known() -> None:
    mem = memory_with({0x10000: TEXT, 0x20000: OLD_CRASH}, MIB)

    def prove(info: Vmcoreinfo) -> Proof:
        return Proof(None, "x") if info.paddr == 0x10000 else Proof(None, lacking="y")

    assert places(scan(mem, RangeSet([(0, MIB)]), prove=prove).candidates) == [0x20000, 0x10000]


def test_time_limit_ends_the_search_with_what_there_is() -> None:
    mem = memory_with({0x10000: TEXT, 7 * MIB: TEXT}, 8 * MIB)
    clock = count()
    found = scan(mem, RangeSet([(0, 8 * MIB)]), time_limit=4, clock=lambda: float(next(clock)))
    assert found.late
    assert places(found.candidates) == [0x10000]
    assert found.size == 4 * MIB
    assert found.seconds >= 4


def test_time_limit_counts_where_no_read_succeeds_too() -> None:
    clock = count()
    found = scan(FakeMemory(), RangeSet([(0, 1 << 44)]), time_limit=50, clock=lambda: float(next(clock)))
    assert (found.late, found.size) == (True, 0)


def test_notes_are_read_from_the_memory_that_is_meant_for_it() -> None:
    mem, verify = memory_with({0x10000: TEXT}, MIB), memory_with({0x10000: OLD_CRASH}, MIB)
    found = scan(mem, RangeSet([(0, MIB)]), verify=verify)
    assert [c.info.crash_time for c in found.candidates] == [1700000000]
    assert verify.bytes_read < 1000
    assert mem.bytes_read == MIB


@pytest.mark.parametrize(
    ("ram", "note", "most"),
    [
        # where stock kernels had it, and how much may be read before
        ([(0x100000, 0x1FFDF000)], 0x1F44E000, 300 * MIB),  # 6.1, 512 MiB
        ([(0x100000, 0x3FFDF000)], 0x183A000, 16 * MIB),  # 7.3, 1 GiB
        ([(0x100000, 0x3FFDF000)], 0x32B70000, 300 * MIB),  # 6.12, 1 GiB
        ([(0x100000, 0x7FFDF000), (4 * GIB, 8 * GIB)], 0x1003CE000, 16 * MIB),  # 7.3
        ([(0x100000, 0x7FFDF000), (4 * GIB, 6 * GIB)], 0x17E1BC000, 300 * MIB),  # 6.12, 4 GiB
        ([(0x100000, 0x7FFDF000), (4 * GIB, 0x380000000)], 0x373DDE000, 300 * MIB),  # 6.1, 12 GiB
    ],
)
def test_places_where_kernels_were_seen_to_have_it_come_first(ram: list[tuple[int, int]], note: int, most: int) -> None:
    mem = Zeros()
    mem.write(note, vmcoreinfo_note(TEXT))
    found = scan(mem, RangeSet(ram), prove=lambda _: PROVEN)
    assert places(found.candidates) == [note]
    assert found.size <= most


spans = st.lists(
    st.tuples(st.integers(0, 1 << 23), st.integers(1, 1 << 19)).map(lambda p: (p[0] * PAGE, (p[0] + p[1]) * PAGE)),
    max_size=8,
)


@given(spans)
def test_each_byte_is_in_exactly_one_part_of_what_is_searched(ram: list[tuple[int, int]]) -> None:
    ranges = RangeSet(ram)
    parts = list(likely(ranges))
    assert sum(part.size for part in parts) == ranges.size
    assert RangeSet(r for part in parts for r in part) == ranges


def test_memory_is_read_once() -> None:
    mem = Zeros()
    ranges = RangeSet([(0x9000, 700 * MIB), (4 * GIB, 4 * GIB + 600 * MIB + PAGE)])
    found = scan(mem, ranges)
    assert found.size == sum(end - start for start, end in mem.asked) == ranges.size
    assert RangeSet(mem.asked) == ranges
