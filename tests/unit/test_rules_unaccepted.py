# SPDX-License-Identifier: LGPL-2.1-or-later
"""EFI's table of unaccepted memory: finding it, reading it, and what is told of one that cannot be."""

from __future__ import annotations

import contextlib
import struct
import uuid
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ReadError, WitnessError
from guard.ranges import Range, RangeSet
from guard.registry import NOT_RAM, Registry
from guard.rules import unaccepted
from tests.unit.platform_tables import ACPI, GIB, GUID, MIB, SYSTAB, TABLE, TABLES, UNIT, system_table, table
from tests.unit.witness_memory import FakeMemory

KIB, TIB = 1 << 10, 1 << 40


def firmware(*guids: uuid.UUID, at: int = TABLE, count: int | None = None) -> FakeMemory:
    memory = FakeMemory()
    memory.write(SYSTAB, system_table(len(guids) if count is None else count))
    for i, guid in enumerate(guids):
        memory.write(TABLES + 24 * i, guid.bytes_le + struct.pack("<Q", at if guid == GUID else 0x1000 * i))
    return memory


def refused(memory: FakeMemory, ram_end: int = 64 * GIB, at: int = TABLE) -> RangeSet:
    rule = unaccepted.rule(memory, at, ram_end)
    assert (rule.name, rule.trouble, rule.troubled) == ("unaccepted", NOT_RAM, RangeSet())
    registry = Registry()
    registry.register(rule)
    return RangeSet([(0, 1 << 52)]) - registry.ram(RangeSet([(0, 1 << 52)]))


def with_table(data: bytes, at: int = TABLE) -> FakeMemory:
    memory = FakeMemory()
    memory.write(at, data)
    return memory


@pytest.mark.parametrize("before", [0, 1, 7, 40])
def test_table_is_found_by_its_guid_wherever_it_stands(before: int) -> None:
    guids = [ACPI] * before + [GUID, ACPI]
    assert unaccepted.find(firmware(*guids), SYSTAB, TABLES) == TABLE


def test_entry_beyond_the_count_is_none() -> None:
    assert unaccepted.find(firmware(ACPI, GUID, count=1), SYSTAB, TABLES) is None


class Damaged(NamedTuple):
    memory: FakeMemory
    line: str


def without(memory: FakeMemory, paddr: int) -> FakeMemory:
    memory.drop(paddr)
    return memory


def with_signature(signature: bytes) -> FakeMemory:
    memory = firmware(GUID)
    memory.write(SYSTAB, signature)
    return memory


@pytest.mark.parametrize(
    "case",
    [
        Damaged(with_signature(b"IBI SYSX"), "signature b'IBI SYSX', expected b'IBI SYST'"),
        Damaged(firmware(GUID, count=0), "0 configuration tables, expected 1 to 512"),
        Damaged(firmware(GUID, count=513), "513 configuration tables, expected 1 to 512"),
        Damaged(firmware(GUID, count=(1 << 32) - 1), "4294967295 configuration tables, expected 1 to 512"),
        Damaged(without(firmware(GUID), SYSTAB), f"no readable memory at {SYSTAB:#x}"),
    ],
)
def test_system_table_that_cannot_be_followed_is_told_with_its_address(case: Damaged) -> None:
    with pytest.raises(WitnessError) as told:
        unaccepted.find(case.memory, SYSTAB, TABLES)
    assert str(told.value) == f"EFI system table at {SYSTAB:#x}: {case.line}"


def test_array_of_configuration_tables_that_cannot_be_read_is_told() -> None:
    memory = firmware(*[ACPI] * 100)
    memory.drop(0x7FFE3000)
    with pytest.raises(WitnessError) as told:
        unaccepted.find(memory, SYSTAB, TABLES)
    assert str(told.value) == f"EFI configuration tables at {TABLES:#x}: no readable memory at 0x7ffe3000"


def test_set_bit_is_a_unit_that_is_refused_lsb_first() -> None:
    assert refused(with_table(table(b"\x01\x80\x00\xc0\x01"))) == RangeSet(
        (4 * GIB + first * UNIT, 4 * GIB + end * UNIT) for first, end in [(0, 1), (15, 16), (30, 33)]
    )


@given(
    st.binary(min_size=1, max_size=200),
    st.sampled_from([4 * KIB, 64 * KIB, UNIT, 16 * MIB]),
    st.integers(0, 1 << 20).map(lambda n: n * 4 * KIB),
    st.integers(0, 64 * GIB),
)
def test_what_is_refused_is_what_the_bits_say_up_to_the_end_of_ram(
    bitmap: bytes, unit: int, base: int, end: int
) -> None:
    """The plainest reading: a bit at a time."""
    expected = RangeSet(
        (base + i * unit, base + (i + 1) * unit)
        for i in range(len(bitmap) * 8)
        if bitmap[i // 8] >> i % 8 & 1 and base + i * unit < end
    )
    assert refused(with_table(table(bitmap, unit=unit, base=base)), end) == expected


def test_bitmap_is_read_no_further_than_there_is_ram() -> None:
    """The bitmap of 64 TiB is said to be there; the RAM ends at 5 GiB and so does what can be read."""
    memory = with_table(table(bytes(63) + b"\x80", size=4 * MIB))
    assert refused(memory, 5 * GIB) == RangeSet([(5 * GIB - UNIT, 5 * GIB)])
    assert memory.bytes_read == 24 + 64


def test_ram_that_ends_before_the_bitmap_starts_refuses_nothing() -> None:
    assert refused(with_table(table(b"\xff")), 4 * GIB) == RangeSet()


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (table(b"\xff", version=0), "version 0, expected 1"),
        (table(b"\xff", version=2), "version 2, expected 1"),
        (table(b"\xff", unit=0), "units of 0x0 bytes, expected a power of two of at least 0x1000"),
        (table(b"\xff", unit=2048), "units of 0x800 bytes, expected a power of two of at least 0x1000"),
        (table(b"\xff", unit=3 * MIB), "units of 0x300000 bytes, expected a power of two of at least 0x1000"),
        (table(b"\xff", base=4 * GIB + 8), "starts at 0x100000008, expected the physical address of a page"),
        (table(b"\xff", base=1 << 52), "starts at 0x10000000000000, expected the physical address of a page"),
        (
            table(b"\xff", base=(1 << 64) - 4096),
            "starts at 0xfffffffffffff000, expected the physical address of a page",
        ),
        (table(b""), "bitmap of 0x0 bytes for memory from 0x100000000 on is not possible"),
        (
            table(b"\xff", size=1 << 28),
            "bitmap of 0x10000000 bytes for memory from 0x100000000 on is not possible",
        ),
        (
            table(b"\xff", size=(1 << 64) - 1),
            "bitmap of 0xffffffffffffffff bytes for memory from 0x100000000 on is not possible",
        ),
        (
            table(b"\xff", unit=4096, size=1 << 33),
            "units of 0x1000 bytes are too many for RAM up to 0x400000000000",
        ),
    ],
)
def test_damaged_field_is_told_with_what_was_expected(data: bytes, line: str) -> None:
    with pytest.raises(WitnessError) as told:
        unaccepted.rule(with_table(data), TABLE, 64 * TIB)
    assert str(told.value) == f"EFI unaccepted memory table at {TABLE:#x}: {line}"


@pytest.mark.parametrize(
    ("memory", "at", "line"),
    [
        (FakeMemory(), TABLE, f"no readable memory at {TABLE:#x}"),
        (with_table(table(b"\xff" * 4096, size=8192)), TABLE, "no readable memory at 0x7fff2000"),
        (with_table(b"\1\0\0\0\0\0\x20\0", 0x7FFEFFF8), 0x7FFEFFF8, "no readable memory at 0x7fff0000"),
        (FakeMemory(), (1 << 64) - 8, "is beyond all physical addresses"),
    ],
)
def test_table_that_cannot_be_read_to_its_end_is_told(memory: FakeMemory, at: int, line: str) -> None:
    with pytest.raises(WitnessError) as told:
        unaccepted.rule(memory, at, 1 * TIB)
    assert str(told.value) == f"EFI unaccepted memory table at {at:#x}: {line}"


@given(st.binary(max_size=120))
def test_any_bytes_are_a_table_or_no_table(data: bytes) -> None:
    memory = with_table(b"\1\0\0\0\0\0\x20\0" + data)
    with contextlib.suppress(WitnessError):
        assert unaccepted.rule(memory, TABLE, 64 * TIB).domain.end <= 64 * TIB + UNIT


class LargeMemory:
    """A table of 64 TiB, every second unit not accepted."""

    def read(self, paddr: int, size: int) -> bytes:
        if paddr == TABLE:
            return table(b"", base=0, size=4 * MIB)
        if paddr != TABLE + 24:
            raise ReadError("not asked for", paddr)
        return b"\x55" * size


def test_bitmap_of_64_tib_is_taken_as_it_is() -> None:
    rule = unaccepted.rule(LargeMemory(), TABLE, 64 * TIB)
    assert rule.domain == Range(0, 64 * TIB)
    assert len(rule.pages.data) * 8 == 4 * MIB
    registry = Registry()
    registry.register(rule)
    assert [registry.pfn_is_ram((64 * TIB - i * UNIT) // 4096) for i in (1, 2, 3)] == [True, False, True]
