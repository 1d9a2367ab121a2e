# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dead kernel's e820 table, memory sections and register notes, sound and damaged; and random bytes as any
record."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import ReadError, WitnessError
from guard.ranges import RangeSet
from guard.witness.crash_notes import read_crash_notes
from guard.witness.e820 import read_e820
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk, x86_64
from guard.witness.reservations import read_reservations
from guard.witness.resources import (
    walk_resources,
)
from guard.witness.sections import Sections, contradictions, read_sections
from tests.unit.witness_memory import PRSTATUS, DyingKernel, RandomMemory, elf_note


def walk_of(kernel: DyingKernel) -> PageWalk:
    return x86_64(kernel.mem, kernel.info())


def symbols_of(kernel: DyingKernel) -> dict[str, int]:
    return {name: address for _, name, address in kernel.symbols}


def e820_kernel(entries: list[tuple[int, int, int]], count: int | None = None) -> tuple[DyingKernel, int]:
    kernel = DyingKernel()
    table = struct.pack("<I", len(entries) if count is None else count)
    table += b"".join(struct.pack("<QQI", *entry) for entry in entries)
    return kernel, kernel.pointer("e820_table_firmware", kernel.heap(table))


def test_the_firmware_map_comes_back_in_its_order() -> None:
    kernel, variable = e820_kernel([(0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (0x100000, 0x7FEE0000, 1)])
    problems = Problems()
    assert read_e820(walk_of(kernel), variable, problems) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0xA0000, 2),
        (0x100000, 0x7FFE0000, 1),
    ]
    assert problems == []


def test_e820_entries_that_make_no_sense_are_left_out() -> None:
    kernel, variable = e820_kernel([(0, 0, 1), ((1 << 64) - 1, 2, 1), ((1 << 64) - 1, 1, 7), (0x1000, 0x1000, 1)])
    problems = Problems()
    assert read_e820(walk_of(kernel), variable, problems) == [((1 << 64) - 1, 1 << 64, 7), (0x1000, 0x2000, 1)]
    assert len(problems) == 2


@pytest.mark.parametrize("count", [0, 3201, 0xFFFFFFFF])
def test_an_e820_table_of_absurd_size_is_refused(count: int) -> None:
    kernel, variable = e820_kernel([(0, 0x1000, 1)], count)
    with pytest.raises(WitnessError, match=f"{count} entries"):
        read_e820(walk_of(kernel), variable, Problems())


def test_an_e820_pointer_to_nowhere_is_an_error() -> None:
    kernel = DyingKernel()
    for value in (0, 0xDEAD000000000000, kernel.page_offset + (1 << 30)):
        with pytest.raises((WitnessError, ReadError)):
            read_e820(walk_of(kernel), kernel.pointer("e820_table_firmware", value), Problems())


SECTION = 1 << 27


def test_section_states_become_ranges() -> None:
    kernel = DyingKernel()
    kernel.sections({0: 0xF, 1: 0xF, 2: 0x3, 3: 0x1, 10: 0x7, 300: 0x27, 301: 0x6, 302: 0xF})
    problems = Problems()
    found = read_sections(walk_of(kernel), kernel.info(), problems)
    assert found.section_size == SECTION
    assert found.present == RangeSet((n * SECTION, (n + 1) * SECTION) for n in (0, 1, 2, 3, 10, 300, 302))
    assert found.online == RangeSet((n * SECTION, (n + 1) * SECTION) for n in (0, 1, 10, 300, 302))
    assert problems == []


@settings(max_examples=40, deadline=None)
@given(
    states=st.dictionaries(st.integers(0, 127), st.integers(0, 63), max_size=40),
    extreme=st.booleans(),
    size=st.sampled_from((16, 24, 32)),
    by_value=st.booleans(),
)
def test_random_section_states_come_back(states: dict[int, int], extreme: bool, size: int, by_value: bool) -> None:
    kernel = DyingKernel()
    states[0] = 7  # the kernel itself lies there
    kernel.sections(states, extreme, size=size, by_value=by_value)
    found = read_sections(walk_of(kernel), kernel.info(), Problems())
    assert found.present == RangeSet((n * SECTION, (n + 1) * SECTION) for n, s in states.items() if s & 1)
    assert found.online == RangeSet((n * SECTION, (n + 1) * SECTION) for n, s in states.items() if s & 7 == 7)


def test_a_root_of_sections_that_cannot_be_read_counts_as_absent() -> None:
    kernel = DyingKernel()
    kernel.sections({0: 7, 128: 7, 256: 7})
    walk = walk_of(kernel)
    roots = int(kernel.keys["SYMBOL(mem_section)"], 16)
    kernel.write(roots + 8, struct.pack("<Q", 0xDEAD000000000000))
    problems = Problems()
    found = read_sections(walk, kernel.info(), problems)
    assert found.online == RangeSet([(0, SECTION), (256 * SECTION, 257 * SECTION)])
    assert len(problems) == 1
    assert "root 1" in problems[0]
    assert f"mem_section: {found.flaw}" == problems[0]
    assert found.offline == RangeSet()


def test_sections_in_more_runs_than_memory_can_have_are_cut_off() -> None:
    kernel = DyingKernel()
    kernel.sections({0: 7})
    walk = walk_of(kernel)
    roots = int(kernel.keys["SYMBOL(mem_section)"], 16)
    alternating = kernel.heap((struct.pack("<Q", 7) + bytes(56)) * 64, 4096)
    kernel.write(roots, struct.pack("<Q", alternating) * 4096)
    problems = Problems()
    found = read_sections(walk, kernel.info(), problems)
    assert 1 << 14 <= len(found.online) <= (1 << 14) + 128
    assert len(problems) == 1
    assert found.flaw is not None


@pytest.mark.parametrize("state", [0, 3, 5])
def test_the_section_that_the_kernel_lies_in_is_online_and_a_flaw_where_its_state_says_otherwise(state: int) -> None:
    """Sections of 32 MiB: the image lies in section 1, the page tables in section 3."""
    kernel = DyingKernel()
    kernel.sections({1: state, 3: 7, 4: 3}, section_bits=25)
    problems = Problems()
    found = read_sections(walk_of(kernel), kernel.info(), problems)
    assert found.online == RangeSet([(1 << 25, 2 << 25), (3 << 25, 4 << 25)])
    assert found.offline == RangeSet([(4 << 25, 5 << 25)])
    assert found.flaw == "section 1, which the kernel image lies in, is not online; it is taken as online"
    assert len(problems) == 1


def test_sound_sections_have_no_flaw() -> None:
    kernel = DyingKernel()
    kernel.sections({0: 7, 1: 3})
    found = read_sections(walk_of(kernel), kernel.info(), Problems())
    assert found.flaw is None
    assert found.offline == RangeSet([(SECTION, 2 * SECTION)])


def test_tree_and_sections_contradict_each_other_where_one_has_what_the_other_lacks() -> None:
    def sections(*numbers: int) -> RangeSet:
        return RangeSet((n * SECTION, (n + 1) * SECTION) for n in numbers)

    known = Sections(SECTION, sections(0, 1, 2, 5), sections(0, 1, 5))
    ram = RangeSet([(0x1000, 0x9F000), (SECTION + 0x5000, SECTION + 0x6000), (2 * SECTION, 4 * SECTION)])
    assert contradictions(known, ram) == (sections(5), sections(3))
    assert contradictions(known, ram - sections(3) | sections(5)) == (RangeSet(), RangeSet())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("LENGTH(mem_section)", "7"),
        ("LENGTH(mem_section)", str((1 << 64) - 1)),
        ("SIZE(mem_section)", "0"),
        ("SIZE(mem_section)", "30"),
        ("SIZE(mem_section)", str(1 << 60)),
        ("OFFSET(mem_section.section_mem_map)", "32"),
        ("OFFSET(mem_section.section_mem_map)", "4"),
        ("NUMBER(SECTION_SIZE_BITS)", "-1"),
        ("NUMBER(SECTION_SIZE_BITS)", "3"),
        ("NUMBER(SECTION_SIZE_BITS)", "64"),
        ("NUMBER(MAX_PHYSMEM_BITS)", "70000"),
        ("NUMBER(MAX_PHYSMEM_BITS)", "64"),
        ("PAGESIZE", "12345"),
    ],
)
def test_impossible_section_keys_are_refused(key: str, value: str) -> None:
    kernel = DyingKernel()
    kernel.sections({0: 7})
    kernel.keys[key] = value
    before = kernel.mem.reads
    with pytest.raises(WitnessError):
        read_sections(walk_of(kernel), kernel.info(), Problems())
    assert kernel.mem.reads - before < 10
    del kernel.keys[key]
    with pytest.raises(WitnessError, match="has no"):
        read_sections(walk_of(kernel), kernel.info(), Problems())


@pytest.mark.parametrize("vmalloc", [0, 0xFFFFC90000000000])
def test_every_possible_cpu_has_its_notes(vmalloc: int) -> None:
    kernel = DyingKernel()
    two = PRSTATUS + elf_note(b"LINUX\0", 0x202, bytes(10))
    paddrs = kernel.per_cpu_notes([PRSTATUS, b"", None, two], vmalloc=vmalloc)
    problems = Problems()
    found = read_crash_notes(walk_of(kernel), symbols_of(kernel), problems)
    assert found == [(0, paddrs[0], PRSTATUS), (1, paddrs[1], b""), (3, paddrs[2], two)]
    assert problems == []


@pytest.mark.parametrize("sizes", [(5, 0xFFFFFFFF), (0xFFFFFFFF, 0), (5, 4096), (0x80000000, 0x80000000)])
def test_notes_of_absurd_size_are_dropped_and_those_before_kept(sizes: tuple[int, int]) -> None:
    kernel = DyingKernel()
    kernel.per_cpu_notes([PRSTATUS + struct.pack("<III", *sizes, 1), PRSTATUS])
    problems = Problems()
    found = read_crash_notes(walk_of(kernel), symbols_of(kernel), problems)
    assert [n.notes for n in found] == [PRSTATUS, PRSTATUS]
    assert len(problems) == 1
    assert "CPU 0" in problems[0]


def test_notes_without_an_end_stop_at_the_page() -> None:
    kernel = DyingKernel()
    tiny = struct.pack("<III", 1, 0, 9) + b"x\0\0\0"
    kernel.per_cpu_notes([tiny * 256])
    found = read_crash_notes(walk_of(kernel), symbols_of(kernel), Problems())
    assert found[0].notes == tiny * 256


def test_a_cpu_whose_buffer_is_nowhere_is_left_out() -> None:
    kernel = DyingKernel()
    kernel.per_cpu_notes([PRSTATUS, PRSTATUS])
    kernel.write(symbols_of(kernel)["__per_cpu_offset"], struct.pack("<Q", 0x1234567890ABCDEF))
    problems = Problems()
    found = read_crash_notes(walk_of(kernel), symbols_of(kernel), problems)
    assert [n.cpu for n in found] == [1]
    assert len(problems) == 1


def test_per_cpu_arithmetic_wraps_as_the_kernels_does() -> None:
    kernel = DyingKernel()
    kernel.per_cpu_notes([PRSTATUS], base=0xFFFFFFFF9A000000)
    assert read_crash_notes(walk_of(kernel), symbols_of(kernel), Problems())[0].notes == PRSTATUS


@pytest.mark.parametrize("count", [0, 8193, 0xFFFFFFFF])
def test_an_absurd_number_of_cpus_is_refused(count: int) -> None:
    kernel = DyingKernel()
    kernel.per_cpu_notes([PRSTATUS])
    kernel.write(symbols_of(kernel)["nr_cpu_ids"], struct.pack("<I", count))
    with pytest.raises(WitnessError, match="nr_cpu_ids"):
        read_crash_notes(walk_of(kernel), symbols_of(kernel), Problems())


@pytest.mark.parametrize(
    ("absent", "cpus", "lines"),
    [
        ({"nr_cpu_ids"}, [0, 2], 1),
        ({"__cpu_possible_mask"}, [0, 2], 2),
        ({"nr_cpu_ids", "__cpu_possible_mask"}, [0], 0),
    ],
)
def test_kernels_without_the_cpu_variables_give_what_can_be_known(
    absent: set[str], cpus: list[int], lines: int
) -> None:
    kernel = DyingKernel()
    kernel.per_cpu_notes([PRSTATUS, None, PRSTATUS])
    symbols = {name: at for name, at in symbols_of(kernel).items() if name not in absent}
    problems = Problems()
    assert [n.cpu for n in read_crash_notes(walk_of(kernel), symbols, problems)] == cpus
    assert len(problems) == lines


@pytest.mark.parametrize("name", ["crash_notes", "__per_cpu_offset"])
def test_crash_notes_without_their_symbols_are_an_error(name: str) -> None:
    kernel = DyingKernel()
    kernel.per_cpu_notes([PRSTATUS])
    symbols = symbols_of(kernel)
    del symbols[name]
    with pytest.raises(WitnessError, match=name):
        read_crash_notes(walk_of(kernel), symbols, Problems())


READERS: list[Callable[[PageWalk, DyingKernel, Problems], object]] = [
    lambda walk, kernel, problems: walk_resources(walk, kernel.text_vaddr, problems),
    lambda walk, kernel, problems: read_e820(walk, kernel.text_vaddr, problems),
    lambda walk, kernel, problems: read_reservations(walk, symbols_of(kernel), problems),
    lambda walk, kernel, problems: read_crash_notes(walk, symbols_of(kernel), problems),
    lambda walk, kernel, problems: read_sections(walk, kernel.info(), problems),
]


@settings(max_examples=150, deadline=None)
@given(content=st.binary(min_size=8, max_size=4096), reader=st.sampled_from(READERS))
def test_random_bytes_as_records_end_quickly(
    content: bytes, reader: Callable[[PageWalk, DyingKernel, Problems], object]
) -> None:
    kernel = DyingKernel()
    kernel.sections({0: 7})
    kernel.per_cpu_notes([PRSTATUS])
    kernel.variable("crashk_res", bytes(64))
    mem = RandomMemory(content)
    problems = Problems()
    try:
        reader(x86_64(mem, kernel.info()), kernel, problems)
    except (WitnessError, ReadError):
        pass
    assert mem.reads < 400_000
    assert len(problems) <= 65
