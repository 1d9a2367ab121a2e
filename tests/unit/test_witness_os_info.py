# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checksum of os_info, and what is made of a page that says it is one."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.ranges import Range
from guard.witness.memory import Problems
from guard.witness.os_info import LOWCORE_POINTER, MAGIC, Image, OsInfo, cksm, read_os_info
from tests.image.s390x_oracle import checksum
from tests.unit.witness_memory import FakeMemory, RandomMemory

AT = 0x7000
BOTH = {4: 0x1000_0000, 5: 0x3FFE0000000, 6: 0x400000, 10: 0x3FFE0100000, 11: 0x3FFE0200000, 12: 0x500000}


def memory(values: dict[int, int], major: int = 1, crash: tuple[int, int] = (0x8000000, 0x4000000)) -> FakeMemory:
    """os_info with plain values in these entries."""
    page = bytearray(4096)
    struct.pack_into(">QIHHQQ", page, 0, 0x4F53494E464F535A, 0, major, 1, *crash)
    for index, value in values.items():
        struct.pack_into(">Q", page, 32 + 20 * index, value)
    struct.pack_into(">I", page, 8, checksum(bytes(page[12:])))
    mem = FakeMemory()
    mem.write(0, bytes(4096))
    mem.write(LOWCORE_POINTER, struct.pack(">Q", AT))
    mem.write(AT, bytes(page))
    return mem


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"\x12\x34\x56\x78", 0x12345678),
        (b"\x12", 0x12000000),
        (b"\xff\xff\xff\xff\0\0\0\1", 1),
        (b"\xff\xff\xff\xff" * 2, 0xFFFFFFFF),
        (b"\xff\xff\xff\xff" * 2 + b"\0\0\0\1", 1),
        (bytes(4084), 0),
    ],
)
def test_checksum_is_what_the_cksm_instruction_gives(data: bytes, expected: int) -> None:
    assert cksm(data) == expected


@given(data=st.binary(max_size=300) | st.integers(0, 5000).map(lambda n: b"\xff" * n))
def test_checksum_is_that_of_a_plain_loop_over_words(data: bytes) -> None:
    assert cksm(data) == checksum(data)


def test_values_of_a_kernel_that_tells_of_its_virtual_layout() -> None:
    problems = Problems()
    image = Image(0x3FFE0100000, 0x3FFE0200000, 0x500000)
    found = read_os_info(memory(BOTH), problems)
    assert found == OsInfo(AT, Range(0x8000000, 0xC000000), None, image, 0x1000_0000)
    assert problems == []


def test_kernel_before_6_10_has_zeros_where_newer_ones_have_values() -> None:
    problems = Problems()
    assert read_os_info(memory({}), problems) == OsInfo(AT, Range(0x8000000, 0xC000000), None, None, 0)
    assert problems == []


def test_layout_counts_only_with_a_kaslr_offset() -> None:
    found = read_os_info(memory({k: v for k, v in BOTH.items() if k != 5}), Problems())
    assert found
    assert (found.image, found.identity_base) == (None, 0)


@pytest.mark.parametrize("crash", [(0, 0), ((1 << 64) - 0x1000, 0x2000)], ids=["none", "wraps"])
def test_crash_region_that_is_none(crash: tuple[int, int]) -> None:
    found = read_os_info(memory(BOTH, crash=crash), Problems())
    assert found
    assert found.crash is None


def test_page_at_the_last_address_is_read_whole_or_not_at_all() -> None:
    mem = memory(BOTH)
    mem.write(LOWCORE_POINTER, struct.pack(">Q", (1 << 64) - 4096))
    problems = Problems()
    assert read_os_info(mem, problems) is None
    assert len(problems) == 1


@settings(max_examples=200)
@given(content=st.binary(min_size=1, max_size=200))
def test_any_memory_gives_a_result_and_few_lines(content: bytes) -> None:
    problems, mem = Problems(), RandomMemory(content)
    read_os_info(mem, problems)
    assert len(problems) <= 2
    assert mem.reads <= 3
    assert all("\n" not in line for line in problems)


@settings(max_examples=200)
@given(data=st.data())
def test_sealed_page_of_any_content_gives_a_result_and_few_lines(data: st.DataObject) -> None:
    """The checksum is no protection from somebody who can write it too."""
    edges = st.sampled_from([0, 1, 4096, 1 << 20, 1 << 63, (1 << 64) - 1, (1 << 64) - 4096, AT, AT + 1])
    values = edges | st.integers(0, (1 << 64) - 1)
    page = bytearray(4096)
    places = st.sampled_from([16, 24, *(32 + 20 * i + at for i in range(13) for at in (0, 8))])
    for at, value in data.draw(st.lists(st.tuples(places, values), max_size=12)):
        struct.pack_into(">Q", page, at, value)
    struct.pack_into(">QIHH", page, 0, MAGIC, 0, data.draw(st.integers(0, 3)), 1)
    struct.pack_into(">I", page, 8, checksum(bytes(page[12:])))
    mem = memory({})
    mem.write(AT, bytes(page))
    problems = Problems()
    found = read_os_info(mem, problems)
    assert len(problems) <= 2
    if found and found.image:
        assert found.image.size > 0
        assert found.image.paddr + found.image.size <= 1 << 64
