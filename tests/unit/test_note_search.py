# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which VMCOREINFO note is taken: the kernel's own header, then the address that was told, and a search only then."""

from __future__ import annotations

import re

import pytest

from capture import note_search, notes
from capture.note_search import Found, Place, Wanted
from capture.notes import ElfNote
from guard.ranges import RangeSet
from guard.witness.memory import Problems
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.unit.test_witness_proof import NOTE_AT, OWN, Kernel
from tests.unit.witness_memory import FakeMemory, vmcoreinfo_note

BOOT = RangeSet([(0x10000000, 0x12000000)])
OTHER_AT = 0x10800000


class NoSearch(FakeMemory):
    def read(self, paddr: int, size: int) -> bytes:
        raise AssertionError("searched")


def header(info: Vmcoreinfo, paddr: int | None = None) -> list[ElfNote]:
    return notes.parse(info.note, "notes", Problems(), paddr)


def find(
    kernel: Kernel,
    known: list[ElfNote],
    hint: int | None = None,
    search: FakeMemory | None = None,
    seconds: float = 60.0,
    provable: bool = True,
) -> tuple[Found, list[str]]:
    problems = Problems()
    wanted = Wanted(hint, OWN, None, seconds, provable)
    place = Place(search or NoSearch(), BOOT)
    return note_search.find(kernel.mem, known, BOOT, wanted, problems, place), problems


def other_kernel() -> tuple[Kernel, Vmcoreinfo]:
    """A kernel, and another's note at OTHER_AT, which does not prove itself."""
    kernel = Kernel()
    desc = kernel.info.desc.replace(b"6.12.0-test", b"6.11.0-kexec")
    kernel.mem.write(OTHER_AT, vmcoreinfo_note(desc))
    return kernel, Vmcoreinfo(desc, vmcoreinfo_note(desc)[:-12], OTHER_AT)


def whole(kernel: Kernel) -> FakeMemory:
    """Its memory, with no page missing in BOOT."""
    for paddr in range(0x10000000, 0x12000000, 0x1000):
        kernel.mem.write(paddr, b"")
        if paddr // 0x1000 not in kernel.mem.pages:
            kernel.mem.write(paddr, b"\0")
    return kernel.mem


def test_note_of_the_kernels_header_is_taken_without_a_look_at_memory() -> None:
    kernel = Kernel()
    before = kernel.mem.bytes_read
    found, problems = find(kernel, header(kernel.info))
    assert (found.info and found.info.desc, problems) == (kernel.info.desc, [])
    assert kernel.mem.bytes_read == before


def test_address_that_was_told_is_the_headers_notes_where_its_bytes_are_there() -> None:
    kernel = Kernel()
    found, problems = find(kernel, header(kernel.info), NOTE_AT)
    assert (found.info and found.info.paddr, problems) == (NOTE_AT, [])


def test_damaged_memory_does_not_cost_the_headers_note() -> None:
    kernel = Kernel()
    kernel.mem.write(NOTE_AT, bytes(16))
    found, (line,) = find(kernel, header(kernel.info), NOTE_AT)
    assert (found.info and found.info.desc) == kernel.info.desc
    assert line.startswith("VMCOREINFO note at 0x11000000, where it was said to be: vmcoreinfo at 0x11000000: namesz 0")
    assert line.endswith("; the one of /proc/vmcore is used")


def test_address_that_another_kernel_has_left_is_not_believed() -> None:
    kernel, _ = other_kernel()
    found, problems = find(kernel, header(kernel.info), OTHER_AT)
    assert (found.info and found.info.desc) == kernel.info.desc
    assert found.dead is not None
    assert problems == [
        "VMCOREINFO note at 0x10800000, where it was said to be, is not the note of /proc/vmcore, which proves itself "
        "and is used"
    ]


def test_header_whose_note_is_anothers_yields_to_the_one_that_proves_itself() -> None:
    kernel, other = other_kernel()
    found, (line,) = find(kernel, header(other), NOTE_AT)
    assert (found.info and found.info.paddr) == NOTE_AT
    assert re.fullmatch(
        r"VMCOREINFO note at 0x11000000 proves itself, and is not the note of /proc/vmcore \(.+\); it is used", line
    )


def test_where_neither_proves_itself_the_header_is_believed() -> None:
    kernel, other = other_kernel()
    for tables in range(0x6000000, 0x6010000, 0x1000):
        kernel.mem.drop(tables)
    found, (line,) = find(kernel, header(other), NOTE_AT)
    assert (found.info and found.info.desc) == other.desc
    assert line.endswith("which is believed and is used")


def test_told_address_alone_is_taken_without_a_search() -> None:
    kernel = Kernel()
    found, problems = find(kernel, [], NOTE_AT)
    assert (found.info and found.info.paddr, problems) == (NOTE_AT, [])
    assert found.dead is not None, "its kernel was asked, and need not be asked again"


def test_told_address_whose_own_kernel_contradicts_it_is_searched_beyond() -> None:
    kernel, _ = other_kernel()
    found, problems = find(kernel, [], OTHER_AT, whole(kernel))
    assert (found.info and found.info.paddr) == NOTE_AT
    assert problems[0] == (
        "VMCOREINFO note at 0x10800000, where it was said to be: its kernel has its note at 0x11000000; searching for "
        "another one"
    )
    assert re.fullmatch(
        r"VMCOREINFO note found by searching at 0x11000000 \(it proves itself\)",
        problems[1],
    )


def test_earlier_boots_note_is_not_taken_though_it_comes_first() -> None:
    kernel, _ = other_kernel()
    found, problems = find(kernel, [], None, whole(kernel))
    assert (found.info and found.info.paddr) == NOTE_AT
    assert len(problems) == 1


def test_without_proof_the_best_is_used_and_what_is_lacking_is_told() -> None:
    kernel = Kernel(tail=b"")
    found, (line,) = find(kernel, [], None, whole(kernel))
    assert (found.info and found.info.paddr) == NOTE_AT
    assert "at 0x11000000 (not proven; starts a page, has no CRASHTIME=)" in line


def test_search_can_be_forbidden() -> None:
    found, problems = find(Kernel(), [], None, seconds=0)
    assert found.info is None
    assert problems == [
        "nothing tells where the VMCOREINFO note is, and memory is not searched for it: no notes, no symbols"
    ]


def test_end_of_the_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    found, (line,) = find(kernel, [], None, whole(kernel), seconds=1e-9)
    assert found.info is None
    assert line == (
        "no VMCOREINFO note in 1 of 32 MiB of old memory: the time for it was over (--search-time): "
        "no notes, no symbols"
    )


def test_note_that_a_vmlinux_has_to_complete_is_not_asked_for_proof() -> None:
    kernel, other = other_kernel()
    found, problems = find(kernel, [], OTHER_AT, provable=False)
    assert (found.info and found.info.desc, found.dead, problems) == (other.desc, None, [])
