# SPDX-License-Identifier: LGPL-2.1-or-later
"""Register save areas of s390x CPUs, found through lowcore_ptr."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import ReadError, WitnessError
from guard.witness.lowcore import MCESAD, SAVE_AREA, VMCOREINFO_POINTER, read_save_areas, vmcoreinfo_note
from guard.witness.memory import Problems
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.image.s390x_oracle import elf_note
from tests.unit.witness_memory import FakeMemory, RandomMemory

ARRAY = 0x30000
INFO = Vmcoreinfo(b"SYMBOL(lowcore_ptr)=30000\nLENGTH(lowcore_ptr)=4\n")
LIMIT = 64
"""Of lines, in Problems."""


def area(prefix: int, mark: int, vector: bool = True) -> bytes:
    raw = bytearray([mark]) * 512
    struct.pack_into(">I", raw, 0x118, prefix)
    struct.pack_into(">Q", raw, 0x180, vector << 17)
    return bytes(raw)


def memory(lowcores: list[int], vector: bool = True) -> FakeMemory:
    """CPU n's registers are bytes n + 1, its vector registers bytes 0x80 + n."""
    mem = FakeMemory()
    mem.write(0, bytes(0x2000))
    mem.write(ARRAY, struct.pack(f">{len(lowcores)}Q", *lowcores).ljust(4096, b"\0"))
    for cpu, lowcore in enumerate(lowcores):
        if lowcore:
            mem.write(lowcore, bytes(0x2000))
            mem.write(lowcore + MCESAD, struct.pack(">Q", 0x40000 + 0x400 * cpu + 0xB))
            mem.write(0x40000 + 0x400 * cpu, bytes([0x80 + cpu]) * 0x400)
            mem.write(SAVE_AREA + lowcore * bool(cpu), area(lowcore, cpu + 1, vector))
    return mem


def as_it_is(vaddr: int) -> int:
    return vaddr


def test_first_cpu_is_where_its_status_was_stored_and_others_in_their_lowcores() -> None:
    problems = Problems()
    found = read_save_areas(memory([0x8000, 0, 0xC000, 0x6000]), INFO, as_it_is, problems)
    assert [(a.cpu, a.paddr, a.prefix, a.raw[0]) for a in found] == [
        (0, 0x1200, 0x8000, 1),
        (2, 0xD200, 0xC000, 3),
        (3, 0x7200, 0x6000, 4),
    ]
    assert [a.vector for a in found] == [bytes([0x80 + cpu]) * 512 for cpu in (0, 2, 3)]
    assert problems == []


def test_vector_registers_count_only_where_they_were_enabled() -> None:
    found = read_save_areas(memory([0x8000, 0xA000], vector=False), INFO, as_it_is, Problems())
    assert [a.vector for a in found] == [None, None]


def test_cpu_that_never_was_started_is_left_out_without_a_word() -> None:
    mem, problems = memory([0x8000, 0xA000, 0xC000]), Problems()
    mem.write(0xA000 + SAVE_AREA, area(0, 2))
    assert [a.cpu for a in read_save_areas(mem, INFO, as_it_is, problems)] == [0, 2]
    assert problems == []


@pytest.mark.parametrize("text", [None, b"", b"SYMBOL(lowcore_ptr)=30000\n", b"LENGTH(lowcore_ptr)=4\n"])
def test_first_cpu_is_found_without_lowcore_ptr(text: bytes | None) -> None:
    problems = Problems()
    info = None if text is None else Vmcoreinfo(text)
    found = read_save_areas(memory([0x8000, 0xA000]), info, as_it_is, problems)
    assert [(a.cpu, a.vector) for a in found] == [(0, b"\x80" * 512)]
    assert len(problems) == 1


def test_pointers_are_translated() -> None:
    mem = memory([0x8000, 0xA000])
    mem.write(ARRAY, struct.pack(">4Q", 0x5_0000_8000, 0x5_0000_A000, 0, 0))
    found = read_save_areas(mem, INFO, lambda vaddr: vaddr & 0xFFFFFFFF, Problems())
    assert [a.raw[0] for a in found] == [1, 2]


def test_note_is_found_by_an_unaligned_pointer() -> None:
    mem = memory([])
    mem.write(VMCOREINFO_POINTER, struct.pack(">Q", 0x50002))
    mem.write(0x50002, elf_note(b"VMCOREINFO", 0, b"OSRELEASE=1\n"))
    assert vmcoreinfo_note(mem).text("OSRELEASE") == "1"


def test_pointer_0_is_no_note() -> None:
    with pytest.raises(WitnessError, match="lowcore 0xe0c: the pointer is 0"):
        vmcoreinfo_note(memory([]))


def infos() -> st.SearchStrategy[Vmcoreinfo | None]:
    number = st.sampled_from([0, 1, 0x1200, ARRAY, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1)
    texts = st.tuples(number, number | st.integers(1, 300)).map(
        lambda pair: f"SYMBOL(lowcore_ptr)={pair[0]:x}\nLENGTH(lowcore_ptr)={pair[1]}\n"
    )
    return st.none() | (texts.map(str.encode) | st.binary(max_size=60)).map(Vmcoreinfo)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(min_size=1, max_size=200), info=infos(), base=st.integers(0, (1 << 64) - 1))
def test_any_memory_gives_a_result_and_few_lines(content: bytes, info: Vmcoreinfo | None, base: int) -> None:
    problems, mem = Problems(LIMIT), RandomMemory(content)
    found = read_save_areas(mem, info, lambda vaddr: (vaddr - base) % (1 << 64), problems)
    assert len(problems) <= LIMIT + 1
    assert len(found) <= 8192
    assert all(len(a.raw) == 512 and len(a.vector or bytes(512)) == 512 and a.prefix for a in found)
    assert mem.reads <= 1 + 3 * 8192


@settings(max_examples=100, deadline=None)
@given(pointers=st.lists(st.sampled_from([0, 1, 0x2000, 0x8000, 1 << 40, (1 << 64) - 0x2000]), min_size=4, max_size=4))
def test_sparse_memory_gives_a_result_and_a_line_for_each_that_is_lost(pointers: list[int]) -> None:
    mem, problems = memory([0x8000, 0xA000]), Problems(LIMIT)
    mem.write(ARRAY, struct.pack(">4Q", *pointers))
    found = read_save_areas(mem, INFO, as_it_is, problems)
    assert found[0].cpu == 0
    assert len(problems) <= 8


@settings(max_examples=200)
@given(content=st.binary(min_size=1, max_size=100))
def test_any_note_is_one_or_none(content: bytes) -> None:
    mem = RandomMemory(content)
    with suppress(ReadError, WitnessError):
        assert vmcoreinfo_note(mem).desc
    assert mem.reads <= 3
