# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a VMCOREINFO note proves itself, and what tells the note of an earlier boot from the one that is wanted."""

from __future__ import annotations

import pytest

from guard.ranges import RangeSet
from guard.witness.proof import place_of, prove
from guard.witness.resources import BUSY, SYSTEM_RAM
from guard.witness.vmcoreinfo import Vmcoreinfo, note_at
from tests.unit.witness_memory import DyingKernel, vmcoreinfo_note

NOTE_AT = 0x11000000
CRASH = (0x30000000, 0x3C000000)
OWN = RangeSet([(CRASH[0], CRASH[1] - 0x10000)])
TAIL = b"CRASHTIME=1760000000\n"


class Kernel:
    """One that has a note at NOTE_AT; *pointer* is where its own variable says that the note is, as physical address;
    None: there is no such symbol."""

    def __init__(self, pointer: int | None = NOTE_AT, release: str = "6.12.0-test", tail: bytes = TAIL) -> None:
        kernel = DyingKernel()
        kernel.iomem([(0x100000, 0x3FFFFFFF, "System RAM", SYSTEM_RAM | BUSY, [])])
        kernel.variable("crashk_res", kernel.resource(CRASH[0], CRASH[1] - 1, 0, 0x200, 0, 0, 0))
        if pointer is not None:
            kernel.pointer("vmcoreinfo_note", kernel.page_offset + pointer)
        kernel.uts(release)
        note = vmcoreinfo_note(kernel.finish().desc + tail)
        kernel.mem.write(NOTE_AT, note)
        self.mem = kernel.mem
        self.info = note_at(kernel.mem, NOTE_AT)
        self.elsewhere = Vmcoreinfo(self.info.desc, self.info.note)


def test_note_that_its_kernel_leads_back_to_proves_itself() -> None:
    kernel = Kernel()
    proof = prove(kernel.mem, kernel.info, OWN)
    assert proof.proven
    assert proof.paddr == NOTE_AT
    assert proof.dead is not None


def test_kernel_without_the_symbol_proves_it_by_its_release() -> None:
    kernel = Kernel(pointer=None)
    assert prove(kernel.mem, kernel.info, OWN).proven
    kernel = Kernel(pointer=None, release="6.12.0-rest")
    assert prove(kernel.mem, kernel.info, OWN).against == "its kernel calls itself '6.12.0-rest'"


def test_copy_of_a_note_does_not_prove_itself() -> None:
    kernel = Kernel(pointer=NOTE_AT + 0x1000)
    assert prove(kernel.mem, kernel.info, OWN).against == "its kernel has its note at 0x11001000"


def test_kernel_of_an_earlier_boot_had_reserved_other_memory_than_this_kernel_runs_in() -> None:
    kernel = Kernel()
    proof = prove(kernel.mem, kernel.info, OWN | RangeSet([(0x20000000, 0x28000000)]))
    assert proof.against == "its kernel had not reserved 0x20000000-0x27ffffff, which this kernel runs in"


def test_kernel_that_did_not_crash_is_not_the_one_that_this_kernel_came_from() -> None:
    kernel = Kernel(tail=b"")
    proof = prove(kernel.mem, kernel.info, OWN)
    assert (proof.proven, proof.against, proof.lacking) == (False, "", "has no CRASHTIME=")


def test_image_of_a_running_machine_has_no_capture_kernel_to_compare_with() -> None:
    kernel = Kernel(tail=b"")
    assert prove(kernel.mem, kernel.info, RangeSet()).proven


@pytest.mark.parametrize("key", [b"NUMBER(phys_base)", b"SYMBOL(init_top_pgt)", b"SYMBOL(kallsyms_names)"])
def test_note_whose_kernel_cannot_be_found_is_not_proven_and_nothing_speaks_against_it(key: bytes) -> None:
    kernel = Kernel()
    desc = b"".join(line + b"\n" for line in kernel.info.desc.splitlines() if not line.startswith(key))
    proof = prove(kernel.mem, Vmcoreinfo(desc, vmcoreinfo_note(desc), NOTE_AT), OWN)
    assert (proof.proven, proof.against) == (False, "")
    assert proof.lacking


def test_damaged_page_of_the_note_does_not_speak_against_what_the_kernels_header_has_of_it() -> None:
    kernel = Kernel()
    assert prove(kernel.mem, kernel.elsewhere, OWN).paddr == NOTE_AT
    kernel.mem.write(NOTE_AT + 12, b"XXXX")
    proof = prove(kernel.mem, kernel.elsewhere, OWN)
    assert proof.proven
    assert proof.paddr is None
    kernel.mem.drop(NOTE_AT)
    assert prove(kernel.mem, kernel.elsewhere, OWN).proven


def test_place_of_a_note_is_known_only_where_its_very_bytes_are() -> None:
    kernel = Kernel()
    dead = prove(kernel.mem, kernel.info, OWN).dead
    assert dead is not None
    assert place_of(dead, kernel.elsewhere) == NOTE_AT
    assert place_of(dead, Vmcoreinfo(b"OSRELEASE=x\n", vmcoreinfo_note(b"OSRELEASE=x\n"))) is None
