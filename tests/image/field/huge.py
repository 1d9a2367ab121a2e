# SPDX-License-Identifier: LGPL-2.1-or-later
"""A poisoned HugeTLB page, made of free memory of the recorded crash.

A memory error in a HugeTLB page that could not be dissolved: the kernel sets PG_hwpoison on the head page alone
(mm/memory-failure.c; commit 161df60e9e89). Struct pages are found by VMCOREINFO and the dead kernel's page tables, and
filled in as a kernel fills in its compound pages (include/linux/page-flags.h: a tail's compound_info is a mask that
leads to the head, and bit 0); nothing of the product is used."""

from __future__ import annotations

import struct
from typing import NamedTuple

from tests.image.field import NOTE, PAGE, Field, Span

START_KERNEL_MAP = 0xFFFFFFFF80000000  # arch/x86/include/asm/page_64_types.h
ADDRESS = (1 << 52) - PAGE
NR_PAGES = 56  # struct folio: _nr_pages, in the second struct page


class Kernel(NamedTuple):
    """The dead kernel of *machine*, by what its VMCOREINFO tells."""

    machine: Field
    info: dict[str, str]

    def number(self, key: str) -> int:
        return int(self.info[key])

    def symbol(self, name: str) -> int:
        return int(self.info[f"SYMBOL({name})"], 16)

    def u64(self, paddr: int) -> int:
        return int.from_bytes(self.machine.peek(paddr, 8), "little")

    def translate(self, vaddr: int) -> int:
        table = self.symbol("swapper_pg_dir") - START_KERNEL_MAP + self.number("NUMBER(phys_base)")
        for level in reversed(range(5 if self.number("NUMBER(pgtable_l5_enabled)") else 4)):
            shift = 12 + 9 * level
            entry = self.u64((table & ADDRESS) + (vaddr >> shift & 511) * 8)
            assert entry & 1
            if level == 0 or entry & 0x80:
                return (entry & ADDRESS & -1 << shift) | (vaddr & (1 << shift) - 1)
            table = entry
        raise AssertionError("no leaf")

    def struct_page(self, pfn: int) -> int:
        """Its physical address; section_mem_map, less its flags, is the virtual one of struct page 0."""
        section, size = pfn >> self.number("NUMBER(SECTION_SIZE_BITS)") - 12, self.number("SIZE(mem_section)")
        row = self.u64(self.translate(self.symbol("mem_section") + section // (PAGE // size) * 8))
        return self.translate(
            (self.u64(self.translate(row + section % (PAGE // size) * size)) & -PAGE) + pfn * self.size
        )

    @property
    def size(self) -> int:
        return self.number("SIZE(page)")

    def get(self, pfn: int, field: str, form: str = "<Q") -> int:
        at = self.struct_page(pfn) + self.number(f"OFFSET(page.{field})")
        (value,) = struct.unpack(form, self.machine.peek(at, struct.calcsize(form)))
        return int(value)

    def set(self, pfn: int, field: str, value: int, form: str = "<Q") -> None:
        self.machine.poke(self.struct_page(pfn) + self.number(f"OFFSET(page.{field})"), struct.pack(form, value))


def kernel_of(machine: Field) -> Kernel:
    namesz, descsz = struct.unpack("<II", machine.peek(NOTE, 8))
    text = machine.peek(NOTE + 12 + (namesz + 3 & -4), descsz).decode()
    return Kernel(machine, dict(line.split("=", 1) for line in text.splitlines() if "=" in line))


def make_huge_page_poisoned(machine: Field, within: Span, order: int = 9) -> Span:
    """Make free, aligned memory of *within* one HugeTLB page of 2 ** *order* pages with PG_hwpoison on its head;
    returns its physical bytes."""
    kernel, count = kernel_of(machine), 1 << order
    buddy, hugetlb = (kernel.number(f"NUMBER(PAGE_{x}_MAPCOUNT_VALUE)") & 0xFFFFFFFF for x in ("BUDDY", "HUGETLB"))
    head = next(
        pfn
        for pfn in range(within[0] // PAGE, within[1] // PAGE, count)
        if kernel.get(pfn, "_mapcount", "<I") == buddy and kernel.get(pfn, "private") >= order
    )
    flags = kernel.number("NUMBER(PG_head_mask)") | 1 << kernel.number("NUMBER(PG_hwpoison)")
    kernel.set(head, "flags", kernel.get(head, "flags") | flags)
    kernel.set(head, "_mapcount", hugetlb, "<I")
    kernel.set(head, "_refcount", 1, "<I")
    kernel.set(head + 1, "flags", kernel.get(head + 1, "flags") & ~0xFF | order)
    machine.poke(kernel.struct_page(head + 1) + NR_PAGES, struct.pack("<Q", count))
    for tail in range(head + 1, head + count):
        kernel.set(tail, "compound_info", -(kernel.size << order) & (1 << 64) - 1 | 1)
    return head * PAGE, (head + count) * PAGE
