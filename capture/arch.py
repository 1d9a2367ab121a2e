# SPDX-License-Identifier: LGPL-2.1-or-later
"""What differs by machine architecture, asked in one place: whose memory is whose, what the dead kernel's records say,
and what a header has beyond the ranges of memory. One subclass each, in its own file."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from capture.elfcore import Load
from guard.errors import Error
from guard.physmem import Segment
from guard.ranges import Range, RangeSet
from guard.witness.vmcoreinfo import Vmcoreinfo

if TYPE_CHECKING:
    from capture.compatibility import Added
    from capture.dump import Dump
    from capture.machine import Machine
    from guard.witness.dead_kernel import DeadKernel


class Note(NamedTuple):
    """ELF notes, and the physical address where old memory has the same bytes; None if it has not. A device dump can be
    of many megabytes: *data* is a view of the one copy that there is of it."""

    data: bytes | memoryview
    paddr: int | None = None


class Shape(NamedTuple):
    """What a header says beyond which memory there is. *machine* is e_machine, *page_offset* the virtual address of
    physical 0, *align* the p_align of PT_LOADs and *note_align* that of the merged PT_NOTE."""

    machine: int
    byteorder: str
    text: Load | None
    page_offset: int
    notes: tuple[Note, ...]
    align: int
    note_align: int

    def merged_notes(self) -> bytes:
        return b"".join(note.data for note in self.notes)

    def within(self, header: bytes, offset: int) -> Shape:
        """The same, with notes that are views of *header*, which has them from *offset* on: no second copy of them is
        kept."""
        notes, view = [], memoryview(header)
        for note in self.notes:
            notes.append(note._replace(data=view[offset : offset + len(note.data)]))
            offset += len(note.data)
        return self._replace(notes=tuple(notes))

    def load(self, r: Range) -> Load:
        return Load(r.start, (self.page_offset + r.start) % (1 << 64), r.size, self.align)


class Arch:
    """One machine's architecture, and what is known of its dead kernel once :meth:`hear` has listened to it.

    *info* is its VMCOREINFO, *dead* its records by page walk, *system_ram* what a sound resource tree has as RAM,
    *reserved* the crash reservations; each may be missing or empty. *doubts* are memory that is refused though its
    records contradict each other, and why."""

    name = ""
    kernel_builds_header = False
    """The capture kernel makes the header of /proc/vmcore after the crash, by itself."""
    search_time = 120.0
    """Seconds that memory may be searched for a note that nothing tells; 0: not at all."""
    compatibility = True
    """Add lines for older collectors to the VMCOREINFO that is served (capture/compatibility.py)."""
    added: tuple[Added, ...] = ()
    """The lines that were added."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.info: Vmcoreinfo | None = None
        self.dead: DeadKernel | None = None
        self.system_ram = RangeSet()
        self.reserved = RangeSet()
        self.doubts: list[tuple[RangeSet, str]] = []

    def look(self, segments: list[Segment]) -> None:
        """Learn from images of memory as it lies now, before anything is made of them; *segments* ascend."""

    def use_vmlinux(self, path: str) -> None:
        """Take the vmlinux at *path* for what the dead kernel's VMCOREINFO does not tell. Raises Error."""
        raise Error(f"--vmlinux: not for {self.name}, whose notes are found without")

    def own(self) -> RangeSet:
        """What belongs to the capture kernel, in addresses of the dead machine."""
        raise NotImplementedError

    def old_view(self, segments: list[Segment]) -> list[Segment]:
        """*segments* of memory as it lies now, by the addresses that the dead machine had for it; ascending."""
        return segments

    def hear_platform(self, dump: Dump) -> None:
        """Install the rules that need no dead kernel; no old memory has been opened yet. Raises Error."""

    def hear(self, dump: Dump) -> None:
        """Ask the dead kernel's own records, and install the rules that follow from them."""
        raise NotImplementedError

    def shape(self, dump: Dump) -> Shape:
        raise NotImplementedError

    def kernel_ranges(self, dump: Dump) -> list[Range] | None:
        """The PT_LOADs that the kernel itself would make, in its order; None where that cannot be known."""
        raise NotImplementedError
