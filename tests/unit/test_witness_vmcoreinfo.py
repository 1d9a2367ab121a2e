# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parsing VMCOREINFO, and reading its note."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ReadError, WitnessError
from guard.witness.vmcoreinfo import Vmcoreinfo, note_at
from tests.unit.witness_memory import PAGE, FakeMemory, vmcoreinfo_note

TEXT = (
    b"OSRELEASE=6.12.107+deb13-cloud-amd64\n"
    b"BUILD-ID=00112233445566778899aabbccddeeff00112233\n"
    b"PAGESIZE=4096\n"
    b"SYMBOL(_stext)=ffffffff93000000\n"
    b"NUMBER(phys_base)=-285212672\n"
    b"NUMBER(VMALLOC_START)=0xffffb0d480000000\n"
    b"SIZE(page)=64\n"
    b"OFFSET(page.flags)=0\n"
    b"LENGTH(mem_section)=2048\n"
    b"CONFIG_X86_PAE=y\n"
    b"KERNELOFFSET=12000000\n"
    b"CRASHTIME=1764000000\n"
)


def test_every_kind_of_key_is_parsed() -> None:
    info = Vmcoreinfo(TEXT)
    assert info.problems == []
    assert info.symbol("_stext") == 0xFFFFFFFF93000000
    assert info.number("phys_base") == -285212672
    assert info.number("VMALLOC_START") == 0xFFFFB0D480000000
    assert info.size("page") == 64
    assert info.offset("page.flags") == 0
    assert info.length("mem_section") == 2048
    assert info.text("OSRELEASE") == "6.12.107+deb13-cloud-amd64"
    assert info.text("KERNELOFFSET") == "12000000"
    assert info.page_size == 4096
    assert info.crash_time == 1764000000
    assert info.symbol("nothing") is None
    assert info.text("nothing") is None


def test_text_cut_at_any_byte_loses_only_what_is_cut() -> None:
    whole = Vmcoreinfo(TEXT)
    for end in range(len(TEXT)):
        info = Vmcoreinfo(TEXT[:end])
        complete = TEXT[:end].count(b"\n")
        keys = [line.split(b"=")[0].decode() for line in TEXT.split(b"\n")[:complete]]
        assert all(info.text(key) == whole.text(key) for key in keys)
        cut = end > 0 and TEXT[end - 1 : end] != b"\n"
        assert len(info.problems) == cut
        if complete < 12:
            assert info.crash_time is None


@pytest.mark.parametrize(
    "line",
    [
        b"SYMBOL(x)=1ffffffffffffffff",
        b"SYMBOL(x)=-1",
        b"SYMBOL(x)=0x12z",
        b"SYMBOL(x)=",
        b"SYMBOL(x)=1_0",
        b"NUMBER(x)=18446744073709551616",
        b"NUMBER(x)=-9223372036854775809",
        b"NUMBER(x)=12 ",
        b"NUMBER(x)=" + b"9" * 5000,
        b"SIZE(x)=0x10",
        b"SIZE(x)=-4",
        b"PAGESIZE=many",
        b"no equals sign",
        b"=no key",
        b"\xff\xfe=1",
        b"KEY=\x07",
    ],
)
def test_a_bad_line_is_reported_once_and_left_out(line: bytes) -> None:
    info = Vmcoreinfo(b"OSRELEASE=1\n" + line + b"\nSIZE(page)=64\n")
    assert len(info.problems) == 1
    assert len(info.problems[0]) < 200
    assert (info.symbol("x"), info.number("x"), info.size("x"), info.page_size) == (None, None, None, None)
    assert info.text("OSRELEASE") == "1"
    assert info.size("page") == 64


@pytest.mark.parametrize(
    ("line", "value"), [(b"-9223372036854775808", -(1 << 63)), (b"18446744073709551615", (1 << 64) - 1), (b"0x0", 0)]
)
def test_numbers_at_the_border_of_64_bits_are_taken(line: bytes, value: int) -> None:
    assert Vmcoreinfo(b"NUMBER(x)=" + line + b"\n").number("x") == value


def test_of_a_key_that_stands_twice_the_first_counts() -> None:
    info = Vmcoreinfo(b"SIZE(page)=64\nSIZE(page)=64\n")
    assert (info.size("page"), info.problems) == (64, [])
    info = Vmcoreinfo(b"SIZE(page)=64\nSIZE(page)=56\n")
    assert (info.size("page"), len(info.problems)) == (64, 1)


def test_problems_are_bounded() -> None:
    assert len(Vmcoreinfo(b"bad\n" * 100000).problems) < 20


def test_an_impossible_page_size_is_not_used() -> None:
    assert Vmcoreinfo(b"PAGESIZE=4095\n").page_size is None


@given(st.binary(max_size=300))
def test_any_bytes_are_parsed_without_an_error(desc: bytes) -> None:
    Vmcoreinfo(desc)


@pytest.mark.parametrize("size", [len(TEXT), 4096, 8192, 100_000])
def test_a_note_of_any_size_is_read_with_its_padding(size: int) -> None:
    desc = TEXT + b"X=1\n" * ((size - len(TEXT)) // 4)
    mem = FakeMemory()
    mem.write(0x7000, vmcoreinfo_note(desc))
    info = note_at(mem, 0x7000)
    assert info.desc == desc
    assert info.note == vmcoreinfo_note(desc)[:-12]
    assert info.paddr == 0x7000


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (struct.pack("<III", 12, 100, 0) + b"VMCOREINFO\0\0", "namesz 12"),
        (struct.pack("<III", 11, 100, 1) + b"VMCOREINFO\0\0", "type 1"),
        (struct.pack("<III", 11, 100, 0) + b"VMCOREINFX\0\0", "name"),
        (struct.pack("<III", 11, 0, 0) + b"VMCOREINFO\0\0", "descsz 0"),
        (struct.pack("<III", 11, (1 << 20) + 1, 0) + b"VMCOREINFO\0\0", "descsz 1048577"),
        (struct.pack("<III", 11, 0xFFFFFFFF, 0) + b"VMCOREINFO\0\0", "descsz 4294967295"),
    ],
)
def test_what_is_no_note_is_refused_with_a_reason(header: bytes, reason: str) -> None:
    mem = FakeMemory()
    mem.write(0x7000, header)
    with pytest.raises(WitnessError, match=reason):
        note_at(mem, 0x7000)
    assert mem.bytes_read < 4096


def test_a_note_larger_than_the_limit_is_refused() -> None:
    mem = FakeMemory()
    mem.write(0x7000, vmcoreinfo_note(TEXT))
    with pytest.raises(WitnessError, match=r"1 to 100 "):
        note_at(mem, 0x7000, limit=124)


def test_a_note_that_runs_out_of_memory_is_a_read_error() -> None:
    mem = FakeMemory()
    mem.write(0x7000, struct.pack("<III", 11, 8192, 0) + b"VMCOREINFO\0\0")
    with pytest.raises(ReadError):
        note_at(mem, 0x7000)


@pytest.mark.parametrize("size", [len(TEXT) - 5, len(TEXT) + 40, 1 << 31])
def test_a_note_that_changes_while_it_is_read_is_none(size: int) -> None:
    mem = FakeMemory()
    mem.write(0x1000, vmcoreinfo_note(TEXT) + bytes(PAGE))

    class Changing(FakeMemory):
        def read(self, paddr: int, size_: int) -> bytes:
            data = mem.read(paddr, size_)
            mem.write(0x1004, struct.pack("<I", size))
            return data

    with pytest.raises(WitnessError, match="vmcoreinfo at 0x1000: its header changed while it was read"):
        note_at(Changing(), 0x1000)
