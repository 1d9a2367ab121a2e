# SPDX-License-Identifier: LGPL-2.1-or-later
"""The x86_64 page walk: what is mapped translates, what is not says so, and damage ends in an error."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import ReadError, WitnessError
from guard.witness.pagewalk import MAX_READ, PageWalk, x86_64
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.unit.witness_memory import DyingKernel, FakeMemory, PageTables, RandomMemory

SME = 1 << 47
SHIFTS = (12, 21, 30)


def canonical(vaddr: int, levels: int) -> int:
    bits = 12 + 9 * levels
    vaddr &= (1 << bits) - 1
    return vaddr | ((1 << 64) - (1 << bits) if vaddr >> (bits - 1) else 0)


@settings(max_examples=60, deadline=None)
@given(
    levels=st.sampled_from((4, 5)),
    sme_mask=st.sampled_from((0, SME)),
    wanted=st.lists(
        st.tuples(st.integers(0, (1 << 57) - 1), st.sampled_from(SHIFTS), st.integers(0, (1 << 46) - 1)),
        min_size=1,
        max_size=12,
    ),
)
def test_random_mappings_translate_back(levels: int, sme_mask: int, wanted: list[tuple[int, int, int]]) -> None:
    mem = FakeMemory()
    tables = PageTables(mem, 0x100000, levels, sme_mask)
    mapped: dict[int, tuple[int, int, int]] = {}
    for raw, shift, paddr in wanted:
        vaddr = canonical(raw, levels)
        if vaddr >> 30 not in mapped:
            size = 1 << shift
            # PAT (bit 12) is set in large pages on purpose: it is no address bit.
            tables.map(vaddr & -size, paddr & -size, shift, extra=0x1000 if shift > 12 else 0)
            mapped[vaddr >> 30] = vaddr, shift, paddr & -size | vaddr & size - 1
    walk = PageWalk(mem, tables.root, levels, sme_mask)
    for vaddr, shift, paddr in mapped.values():
        assert walk.translate(vaddr) == paddr
        if shift < 30:
            with pytest.raises(WitnessError):
                walk.translate(vaddr ^ 1 << shift)


@pytest.mark.parametrize("levels", [4, 5])
def test_addresses_that_are_not_canonical_are_refused(levels: int) -> None:
    mem = FakeMemory()
    walk = PageWalk(mem, PageTables(mem, 0x100000, levels).root, levels)
    top = 1 << (12 + 9 * levels - 1)
    for vaddr in (top, (1 << 64) - 2 * top, (1 << 64) - top - 1, 1 << 64, -1):
        with pytest.raises(WitnessError, match="not a canonical"):
            walk.translate(vaddr)
    for vaddr in (0, top - 1, (1 << 64) - top, (1 << 64) - 1):
        with pytest.raises(WitnessError, match="not mapped"):
            walk.translate(vaddr)


def test_reads_cross_pages_and_merge_those_that_are_adjacent() -> None:
    mem = FakeMemory()
    tables = PageTables(mem, 0x100000, 4)
    for number, paddr in enumerate((0x8000, 0x9000, 0xA000, 0x3000)):
        tables.map(0xFFFFC90000000000 + number * 4096, paddr)
        mem.write(paddr, bytes((number + 1,)) * 4096)
    walk = PageWalk(mem, tables.root, 4)
    walk.translate(0xFFFFC90000000000)
    before = mem.reads
    data = walk.read(0xFFFFC90000000010, 4 * 4096 - 0x20)
    assert data == (b"\1" * 4096 + b"\2" * 4096 + b"\3" * 4096 + b"\4" * 4096)[0x10:-0x10]
    assert mem.reads - before == 2
    assert walk.read(0xFFFFC90000000000, 0) == b""
    with pytest.raises(WitnessError, match="not mapped"):
        walk.read(0xFFFFC90000000000 + 4 * 4096 - 1, 2)


def test_a_read_that_wraps_around_the_address_space_is_refused() -> None:
    mem = FakeMemory()
    tables = PageTables(mem, 0x100000, 4)
    tables.map((1 << 64) - 4096, 0x8000)
    tables.map(0, 0x9000)
    mem.write(0x8000, bytes(8192))
    with pytest.raises(WitnessError, match="not a canonical"):
        PageWalk(mem, tables.root, 4).read((1 << 64) - 8, 16)


@pytest.mark.parametrize("size", [-1, MAX_READ + 1, 1 << 63])
def test_reads_of_absurd_size_are_refused_before_anything_is_read(size: int) -> None:
    mem = FakeMemory()
    walk = PageWalk(mem, PageTables(mem, 0x100000, 4).root, 4)
    before = mem.reads
    with pytest.raises(WitnessError):
        walk.read(0, size)
    assert mem.reads == before


def test_strings_end_at_nul_and_need_no_page_behind_theirs() -> None:
    mem = FakeMemory()
    tables = PageTables(mem, 0x100000, 4)
    tables.map(0xFFFFC90000000000, 0x8000)
    mem.write(0x8FF0, b"fifteen letters\0")
    walk = PageWalk(mem, tables.root, 4)
    assert walk.read_cstring(0xFFFFC90000000FF0, 64) == b"fifteen letters"
    assert walk.read_cstring(0xFFFFC90000000FFF, 64) == b""
    with pytest.raises(WitnessError, match="no end within 8 bytes"):
        walk.read_cstring(0xFFFFC90000000FF0, 8)


def test_a_reserved_large_page_bit_is_refused() -> None:
    mem = FakeMemory()
    tables = PageTables(mem, 0x100000, 4)
    mem.write(tables.root, (0x200000 | 0x83).to_bytes(8, "little"))
    with pytest.raises(WitnessError, match="bit 7"):
        PageWalk(mem, tables.root, 4).translate(0)


def test_a_table_that_points_to_itself_translates_in_a_bounded_number_of_reads() -> None:
    mem = FakeMemory()
    mem.write(0x100000, (0x100000 | 0x63).to_bytes(8, "little") * 512)
    walk = PageWalk(mem, 0x100000, 5)
    assert walk.translate(0x123456) == 0x100456
    assert mem.reads == 1


def test_tables_outside_memory_are_a_read_error() -> None:
    mem = FakeMemory()
    mem.write(0x100000, (0xFFFFFFFFF000 | 0x63).to_bytes(8, "little") * 512)
    with pytest.raises(ReadError):
        PageWalk(mem, 0x100000, 4).translate(0)


def test_the_cache_of_tables_is_bounded() -> None:
    mem = FakeMemory()
    tables = PageTables(mem, 0x100000, 4)
    for number in range(100):
        tables.map(number << 39, 0x8000)
    walk = PageWalk(mem, tables.root, 4)
    for number in range(100):
        assert walk.translate(number << 39) == 0x8000
    assert len(walk._tables) <= 32


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("sme_mask", [0, SME])
@pytest.mark.parametrize("phys", [0x2000000, 0x3E000000])
def test_the_walk_is_built_from_vmcoreinfo(levels: int, sme_mask: int, phys: int) -> None:
    page_offset = 0xFF11000040000000 if levels == 5 else 0xFFFF888040000000
    kernel = DyingKernel(levels=levels, sme_mask=sme_mask, phys=phys, page_offset=page_offset)
    walk = x86_64(kernel.mem, kernel.info())
    assert walk.levels == levels
    assert walk.translate(page_offset + 0x1234) == 0x1234
    assert walk.translate(kernel.text_vaddr + 0x123) == phys + 0x123


def test_phys_base_may_be_printed_negative_or_as_its_unsigned_twin() -> None:
    kernel = DyingKernel(phys=0x1000000, kaslr=0x30000000)
    assert kernel.phys_base < 0
    twin = DyingKernel(phys=0x1000000, kaslr=0x30000000)
    twin.keys["NUMBER(phys_base)"] = str(kernel.phys_base + (1 << 64))
    for each in (kernel, twin):
        assert x86_64(each.mem, each.info()).translate(each.text_vaddr) == 0x1000000


def test_the_kernel_image_is_found_without_page_tables() -> None:
    kernel = DyingKernel()
    vaddr = kernel.image(b"still here")
    info = kernel.info()
    kernel.mem.drop(kernel.tables.root)
    assert x86_64(kernel.mem, info).read(vaddr, 10) == b"still here"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SYMBOL(init_top_pgt)", "0"),
        ("SYMBOL(init_top_pgt)", "ffffffffffffffff"),
        ("SYMBOL(init_top_pgt)", "ffffffff93a00123"),
        ("NUMBER(phys_base)", str(-(1 << 62))),
        ("NUMBER(phys_base)", str((1 << 62) - 1)),
        ("NUMBER(KERNEL_IMAGE_SIZE)", "0"),
        ("NUMBER(KERNEL_IMAGE_SIZE)", str(1 << 40)),
    ],
)
def test_vmcoreinfo_that_cannot_be_true_gives_no_walk(key: str, value: str) -> None:
    kernel = DyingKernel()
    kernel.keys[key] = value
    with pytest.raises(WitnessError):
        x86_64(kernel.mem, kernel.info())


@pytest.mark.parametrize("key", ["SYMBOL(init_top_pgt)", "NUMBER(phys_base)"])
def test_vmcoreinfo_without_the_keys_gives_no_walk(key: str) -> None:
    kernel = DyingKernel()
    del kernel.keys[key]
    with pytest.raises(WitnessError, match="no x86_64 page walk"):
        x86_64(kernel.mem, kernel.info())
    with pytest.raises(WitnessError):
        x86_64(FakeMemory(), Vmcoreinfo(b""))


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(min_size=8, max_size=8192), vaddr=st.integers(0, (1 << 64) - 1), levels=st.sampled_from((4, 5))
)
def test_random_memory_gives_an_address_or_an_error(content: bytes, vaddr: int, levels: int) -> None:
    mem = RandomMemory(content)
    walk = PageWalk(mem, 0x1000, levels)
    try:
        assert 0 <= walk.translate(vaddr) < 1 << 52
    except WitnessError:
        pass
    assert mem.reads <= levels
