# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is particular to x86_64 in a vmcore: kernel text PT_LOAD, direct map addresses, notes, and which ranges the
kernel itself would put into the header (arch/x86/kernel/crash.c, kernel/crash_core.c)."""

from __future__ import annotations

from typing import NamedTuple

from capture.elfcore import Load
from guard.ranges import Range, RangeSet
from guard.witness.dead_kernel import DeadKernel
from guard.witness.memory import Problems
from guard.witness.vmcoreinfo import Vmcoreinfo

EM_X86_64 = 62

# The kernel never lists it: firmware, real mode code, and the capture kernel itself live there
# (arch/x86/kernel/crash.c:elf_header_exclude_ranges)
LOW_MEMORY = Range(0, 1 << 20)

# PAGE_OFFSET of 4-level page tables without KASLR: the best guess where no witness tells
DEFAULT_PAGE_OFFSET = 0xFFFF888000000000


class Shape(NamedTuple):
    """What a header says beyond which memory there is. *page_offset* is the virtual address of physical 0."""

    machine: int
    text: Load | None
    page_offset: int
    notes: bytes

    def load(self, r: Range) -> Load:
        return Load(r.start, (self.page_offset + r.start) % (1 << 64), r.size)


def shape(dead: DeadKernel | None, info: Vmcoreinfo | None, problems: Problems) -> Shape:
    """Notes in the kernel's order: NT_PRSTATUS of each possible CPU that saved one, then VMCOREINFO."""
    notes = b""
    text = None
    page_offset = DEFAULT_PAGE_OFFSET
    if dead:
        page_offset = dead.page_offset()
        notes = b"".join(cpu.notes for cpu in dead.cpu_notes())
        if image := dead.text():
            text = Load(image.paddr, image.vaddr, image.size)
    else:
        problems.note(
            f"no page tables of the dead kernel: no CPU notes, no kernel text PT_LOAD, p_vaddr from {page_offset:#x}"
        )
    if info:
        notes += info.note
    return Shape(EM_X86_64, text, page_offset, notes)


def kernel_ranges(dead: DeadKernel, reserved: RangeSet) -> list[Range]:
    """The PT_LOAD ranges that kexec_file_load(2) writes: each System RAM resource by itself, in the tree's order,
    less low memory and the crash reservations."""
    excluded = RangeSet([LOW_MEMORY]) | reserved
    return [piece for r in dead.system_ram() for piece in RangeSet([(r.start, r.end)]) - excluded]
