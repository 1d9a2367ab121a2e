# SPDX-License-Identifier: LGPL-2.1-or-later
"""The header that a kernel is given with elfcorehdr=, from which it makes the one of its /proc/vmcore.

As kernel/crash_core.c:crash_prepare_elf64_headers() writes it: p_offset is a physical address, of notes too, and notes
end with an empty one. fs/proc/vmcore.c reads it once, at boot: it merges the notes, rounds each PT_LOAD to pages and
lays them back to back, which is what elfcore.build() does. So what the kernel will serve is known beforehand."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from capture.arch import Note, Shape
from capture.elfcore import PF_RWX, Load, ehdr
from guard.errors import ReadError
from guard.procvmcore import EHDR_SIZE, PHDR_SIZE, PN_XNUM, PT_LOAD, PT_NOTE
from guard.witness.memory import Memory

EMPTY_NOTE = bytes(12)
"""Elf64_Nhdr of no name; up to it the notes of a PT_NOTE count (fs/proc/vmcore.c:update_note_header_size_elf64())."""


MOST_COPIED = 1 << 20
"""Bytes of notes that a header brings along at most. The kernel allocates the room for what is behind one PT_NOTE in
one piece (fs/proc/vmcore.c:update_note_header_size_elf64(), kmalloc), at boot, in little memory; if it gets none there
is no /proc/vmcore."""


class Prepared(NamedTuple):
    """How a header is to be: *parts* are the notes in their order, those with an address where old memory holds them
    with an empty one behind, those without to be brought along. *left_out* are notes that it has no room for; *shape*
    is without them."""

    shape: Shape
    parts: tuple[Note, ...]
    left_out: tuple[Note, ...] = ()

    @property
    def there(self) -> tuple[Note, ...]:
        return tuple(part for part in self.parts if part.paddr is not None)

    @property
    def copied(self) -> tuple[Note, ...]:
        return tuple(part for part in self.parts if part.paddr is None)

    @property
    def fixed(self) -> int:
        """Bytes beside the PT_LOADs."""
        return EHDR_SIZE + len(self.parts) * PHDR_SIZE + sum(_room(part) for part in self.copied)

    def size(self, loads: int) -> int:
        """Bytes of a header with so many PT_LOADs."""
        return self.fixed + loads * PHDR_SIZE

    def most(self, room: int) -> int:
        """PT_LOADs that fit with all else into *room* bytes; negative where not even the rest does."""
        return min((room - self.fixed) // PHDR_SIZE, PN_XNUM - 1 - len(self.parts))

    def build(self, loads: Sequence[Load], addr: int) -> bytes:
        """The header for the physical address *addr*. Raises Error for more program headers than can be counted."""
        count = len(self.parts) + len(loads)
        behind = addr + EHDR_SIZE + count * PHDR_SIZE
        notes, tail = [], []
        for part in self.parts:
            if part.paddr is not None:
                notes.append((part.paddr, _room(part)))
                continue
            notes.append((behind, _room(part)))
            tail += [part.data, EMPTY_NOTE]
            behind += _room(part)
        parts: list[bytes | memoryview] = [ehdr(self.shape.machine, count, self.shape.byteorder)]
        phdr = struct.Struct(self.shape.byteorder + "IIQQQQQQ")
        parts += [phdr.pack(PT_NOTE, 0, paddr, 0, paddr, size, size, 0) for paddr, size in notes]
        for load in loads:
            parts.append(
                phdr.pack(PT_LOAD, PF_RWX, load.paddr, load.vaddr, load.paddr, load.size, load.size, load.align)
            )
        return b"".join([*parts, *tail])


def _room(note: Note) -> int:
    return len(note.data) + len(EMPTY_NOTE)


def prepare(shape: Shape, memory: Memory) -> Prepared:
    """Which notes of *shape* the next kernel can read where they are in old memory (56 bytes of header for each), and
    which the header has to bring along: those whose place is not known, or holds something else now. Of the latter the
    largest are left out where they are more than MOST_COPIED bytes together: device dumps."""
    parts: list[Note] = []
    for note in shape.notes:
        if note.paddr is None or not _holds(memory, note.paddr, note.data):
            note = note._replace(paddr=None)
        parts.append(note)
    left_out: list[int] = []
    size = sum(_room(part) for part in parts if part.paddr is None)
    for i in sorted(range(len(parts)), key=lambda i: -len(parts[i].data)):
        if size > MOST_COPIED and parts[i].paddr is None:
            left_out.append(i)
            size -= _room(parts[i])
    kept = [i for i in range(len(parts)) if i not in left_out]
    served = shape._replace(notes=tuple(shape.notes[i] for i in kept))
    return Prepared(served, _together(parts[i] for i in kept), tuple(shape.notes[i] for i in sorted(left_out)))


def _together(parts: Iterable[Note]) -> tuple[Note, ...]:
    """What is copied, neighbours in one."""
    found: list[Note] = []
    for part in parts:
        if part.paddr is None and found and found[-1].paddr is None:
            found[-1] = Note(bytes(found[-1].data) + bytes(part.data))
        else:
            found.append(part)
    return tuple(found)


def _holds(memory: Memory, paddr: int, notes: bytes | memoryview) -> bool:
    """Are *notes* there, and behind them what ends them? All that the kernel will read must be readable."""
    end = len(notes) + len(EMPTY_NOTE[:4])  # of an empty note n_namesz alone counts
    try:
        found = memory.read(paddr, len(notes) + len(EMPTY_NOTE))
    except ReadError:
        return False
    return found[: len(notes)] == notes and not any(found[len(notes) : end])
