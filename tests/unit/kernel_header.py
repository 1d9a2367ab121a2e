# SPDX-License-Identifier: LGPL-2.1-or-later
"""How fs/proc/vmcore.c makes the header of /proc/vmcore of the prepared one, written down once more, with nothing of
the code under test."""

from __future__ import annotations

import struct

from guard.witness.memory import Memory

PAGE = 4096
PHDR = "IIQQQQQQ"  # type, flags, offset, vaddr, paddr, filesz, memsz, align


def up(n: int) -> int:
    return -(-n // PAGE) * PAGE


def real_notes(data: bytes, order: str) -> bytes:
    """update_note_header_size_elf64(): the notes up to an empty one, or to one that would reach beyond *data*."""
    at = 0
    while True:
        name_size, desc_size, _ = struct.unpack_from(order + "III", data, at)
        size = 12 + (name_size + 3) // 4 * 4 + (desc_size + 3) // 4 * 4
        if name_size == 0 or at + size > len(data):
            return data[:at]
        at += size


def vmcore_of(addr: int, memory: Memory, note_align: int) -> bytes:
    """parse_crash_elf64_headers() with elfcorehdr=*addr*: header and notes as /proc/vmcore begins with them."""
    start = memory.read(addr, 64)
    order = "<" if start[5] == 1 else ">"
    assert start[:7] == b"\x7fELF\2" + start[5:6] + b"\1"
    kind, _, version, _, phoff, _, _, ehsize, phentsize, phnum, *_ = struct.unpack_from(
        order + "HHIQQQIHHHHHH", start, 16
    )
    assert (kind, version, phoff, ehsize, phentsize) == (4, 1, 64, 64, 56)
    assert phnum
    phdrs = [struct.unpack(order + PHDR, memory.read(addr + 64 + 56 * i, 56)) for i in range(phnum)]
    notes = [real_notes(memory.read(p[2], p[6]), order) for p in phdrs if p[0] == 4]
    assert sum(map(len, notes)), "merge_note_headers_elf64() ends with -ENOMEM: no /proc/vmcore without any note"
    loads = [p for p in phdrs if p[0] == 1]
    count = phnum - len(notes) + 1
    note_offset, size = up(64 + 56 * count), sum(map(len, notes))
    table = struct.pack(order + PHDR, 4, 0, note_offset, 0, 0, size, size, note_align)
    reached = note_offset + up(size)
    for p_type, flags, offset, vaddr, paddr, filesz, memsz, align in loads:
        floor = offset // PAGE * PAGE
        table += struct.pack(order + PHDR, p_type, flags, reached + offset - floor, vaddr, paddr, filesz, memsz, align)
        reached += up(offset + memsz) - floor
    head = start[:56] + struct.pack(order + "H", count) + start[58:] + table
    return head.ljust(note_offset, b"\0") + b"".join(notes).ljust(up(size), b"\0")
