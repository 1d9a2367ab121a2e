# SPDX-License-Identifier: LGPL-2.1-or-later
"""The header that a kernel is given with elfcorehdr=, from which it makes the one of its /proc/vmcore.

As kernel/crash_core.c:crash_prepare_elf64_headers() writes it: p_offset is a physical address, of notes too, and notes
end with an empty one. fs/proc/vmcore.c reads it once, at boot: it merges the notes, rounds each PT_LOAD to pages and
lays them back to back, which is what elfcore.build() does. So what the kernel will serve is known beforehand."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from capture.arch import Note, Shape
from capture.elfcore import PF_RWX, Load, ehdr
from guard.errors import ReadError
from guard.procvmcore import EHDR_SIZE, PHDR_SIZE, PN_XNUM, PT_LOAD, PT_NOTE
from guard.witness.memory import Memory

EMPTY_NOTE = bytes(12)
"""Elf64_Nhdr of no name; up to it the notes of a PT_NOTE count (fs/proc/vmcore.c:update_note_header_size_elf64())."""


class Prepared(NamedTuple):
    """How a header is to be: *there* are notes that old memory holds with an empty one behind, *copied* those that the
    header has to bring along."""

    shape: Shape
    there: tuple[Note, ...]
    copied: bytes

    @property
    def fixed(self) -> int:
        """Bytes beside the PT_LOADs."""
        count = len(self.there) + bool(self.copied)
        return EHDR_SIZE + count * PHDR_SIZE + (len(self.copied) + len(EMPTY_NOTE) if self.copied else 0)

    def size(self, loads: int) -> int:
        """Bytes of a header with so many PT_LOADs."""
        return self.fixed + loads * PHDR_SIZE

    def most(self, room: int) -> int:
        """PT_LOADs that fit with all else into *room* bytes; negative where not even the rest does."""
        return min((room - self.fixed) // PHDR_SIZE, PN_XNUM - 2 - len(self.there))

    def build(self, loads: Sequence[Load], addr: int) -> bytes:
        """The header for the physical address *addr*. Raises Error for more program headers than can be counted."""
        notes = [(note.paddr or 0, len(note.data) + len(EMPTY_NOTE)) for note in self.there]
        count = len(notes) + bool(self.copied) + len(loads)
        behind = EHDR_SIZE + count * PHDR_SIZE
        tail = b""
        if self.copied:
            tail = self.copied + EMPTY_NOTE
            notes.append((addr + behind, len(tail)))
        parts = [ehdr(self.shape.machine, count, self.shape.byteorder)]
        phdr = struct.Struct(self.shape.byteorder + "IIQQQQQQ")
        parts += [phdr.pack(PT_NOTE, 0, paddr, 0, paddr, size, size, 0) for paddr, size in notes]
        for load in loads:
            parts.append(
                phdr.pack(PT_LOAD, PF_RWX, load.paddr, load.vaddr, load.paddr, load.size, load.size, load.align)
            )
        return b"".join([*parts, tail])


def prepare(shape: Shape, memory: Memory) -> Prepared:
    """Which notes of *shape* the next kernel can read where they are in old memory (56 bytes of header for each), and
    which the header has to bring along: those whose place is not known, or holds something else now.

    The kernel merges notes in the order of their PT_NOTEs, so from the first copied one on all are copied."""
    there: list[Note] = []
    for note in shape.notes:
        if note.paddr is None or not _holds(memory, note.paddr, note.data):
            break
        there.append(note)
    copied = b"".join(note.data for note in shape.notes[len(there) :])
    return Prepared(shape, tuple(there), copied)


def _holds(memory: Memory, paddr: int, notes: bytes) -> bool:
    """Are *notes* there, and behind them what ends them? All that the kernel will read must be readable."""
    ended = notes + EMPTY_NOTE[:4]  # of an empty note n_namesz alone counts
    try:
        return memory.read(paddr, len(notes) + len(EMPTY_NOTE))[: len(ended)] == ended
    except ReadError:
        return False
