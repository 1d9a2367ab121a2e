# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ELF header of a vmcore, byte for byte as /proc/vmcore starts.

Layout of fs/proc/vmcore.c: ELF header and program headers, padded to a page; all notes merged into one PT_NOTE,
phdr 0, padded to a page; then each PT_LOAD's pages back to back, p_offset in the page where p_paddr is in its page.
Knows neither where the ranges come from nor what machine they are of."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from guard.errors import Error
from guard.procvmcore import EHDR_SIZE, PHDR_SIZE, PN_XNUM, PT_LOAD, PT_NOTE, ProgramHeader

ET_CORE = 4
EV_CURRENT = 1
PF_RWX = 7


class Load(NamedTuple):
    """A PT_LOAD to be: physical and virtual address, size in file and memory, p_align; all in bytes."""

    paddr: int
    vaddr: int
    size: int
    align: int = 0


class Extent(NamedTuple):
    """[offset, offset + size) of the file is old memory from physical address paddr on; whole pages, bytes."""

    offset: int
    size: int
    paddr: int


class Core(NamedTuple):
    """A vmcore to be: the bytes before memory begins, where memory lies behind them, and the file's size."""

    header: bytes
    extents: tuple[Extent, ...]
    size: int
    phdrs: tuple[ProgramHeader, ...]


def ehdr(machine: int, count: int, byteorder: str) -> bytes:
    """The ELF header of a core file with *count* program headers behind it. Raises Error for more than the 16 bits of
    e_phnum count."""
    if count >= PN_XNUM:
        raise Error(f"{count} program headers where an ELF header counts at most {PN_XNUM - 1}")
    ident = b"\x7fELF" + bytes((2, 1 if byteorder == "<" else 2, EV_CURRENT)) + bytes(9)
    return struct.pack(
        byteorder + "16sHHIQQQIHHHHHH",
        *(ident, ET_CORE, machine, EV_CURRENT, 0, EHDR_SIZE, 0, 0, EHDR_SIZE, PHDR_SIZE, count, 0, 0, 0),
    )


def page_align(n: int, page_size: int) -> int:
    return (n + page_size - 1) & -page_size


def build(
    machine: int,
    notes: bytes | Sequence[bytes | memoryview],
    loads: list[Load],
    note_align: int,
    page_size: int = 4096,
    byteorder: str = "<",
) -> Core:
    """Lay out a vmcore. *machine* is e_machine, *notes* the merged notes without an empty one at the end, in pieces or
    as one.

    *note_align* is the merged PT_NOTE's p_align: 4 in current kernels, 0 up to some release after 6.1. Raises Error as
    :func:`ehdr`."""
    pieces = [notes] if isinstance(notes, bytes) else notes
    notes_size = sum(map(len, pieces))
    count = len(loads) + 1
    start_of_file = ehdr(machine, count, byteorder)
    note_offset = page_align(EHDR_SIZE + count * PHDR_SIZE, page_size)
    offset = note_offset + page_align(notes_size, page_size)
    phdrs = [ProgramHeader(PT_NOTE, 0, note_offset, 0, 0, notes_size, notes_size, note_align)]
    extents = []
    for load in loads:
        start = load.paddr & -page_size
        size = page_align(load.paddr + load.size, page_size) - start
        p_offset = offset + load.paddr - start
        phdrs.append(ProgramHeader(PT_LOAD, PF_RWX, p_offset, load.vaddr, load.paddr, load.size, load.size, load.align))
        extents.append(Extent(offset, size, start))
        offset += size
    head = bytearray(note_offset)
    head[: len(start_of_file)] = start_of_file
    for i, p in enumerate(phdrs):
        struct.pack_into(byteorder + "IIQQQQQQ", head, EHDR_SIZE + i * PHDR_SIZE, *p)
    # notes can be many megabytes (device dumps): joined once, never copied again
    header = b"".join([head, *pieces, bytes(-notes_size % page_size)])
    return Core(header, tuple(extents), offset, tuple(phdrs))
