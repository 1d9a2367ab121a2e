# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/vmcore as a source of old memory: its PT_LOADs tell where physical memory lies in the file.

The way in where /dev/mem is closed (lockdown), and the kernel's own gate where its virtio_mem driver is bound in
kdump mode. Offsets follow fs/proc/vmcore.c:process_ptload_program_headers_elf64(): page-rounded at both ends."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from guard.errors import SourceError
from guard.physmem import PREAD, Segment, layer

PATH = "/proc/vmcore"
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF
EHDR_SIZE, PHDR_SIZE, SHDR_SIZE = 64, 56, 64
MAX_PHDRS = 1 << 20


class ProgramHeader(NamedTuple):
    """Elf64_Phdr, in bytes; p_paddr is what makes a core file one of physical memory."""

    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class CoreHeader(NamedTuple):
    machine: int  # e_machine
    byteorder: str  # struct prefix, "<" or ">"
    phdrs: tuple[ProgramHeader, ...]

    @property
    def loads(self) -> list[ProgramHeader]:
        return [p for p in self.phdrs if p.type == PT_LOAD]

    @property
    def size(self) -> int:
        """Where the header and notes end and memory begins in the file; 0 without any PT_LOAD."""
        return min((p.offset for p in self.loads), default=0)


def pread_exact(fd: int, size: int, offset: int, name: str) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.pread(fd, size - len(data), offset + len(data))
        if not piece:
            raise SourceError(f"{name}: ends at {offset + len(data):#x}, expected {size} bytes at {offset:#x}")
        data += piece
    return data


def read_header(fd: int, name: str) -> CoreHeader:
    """The ELF64 header and program headers of a core file. Raises SourceError where it is none."""
    ident = pread_exact(fd, EHDR_SIZE, 0, name)
    if ident[:4] != b"\x7fELF":
        raise SourceError(f"{name}: offset 0x0: no ELF magic")
    if ident[4] != 2 or ident[5] not in (1, 2):
        raise SourceError(f"{name}: offset 0x4: not a 64-bit ELF file of a known byte order")
    order = "<" if ident[5] == 1 else ">"
    kind, machine, _, _, phoff, shoff, _, _, phentsize, phnum = struct.unpack_from(order + "HHIQQQIHHH", ident, 16)
    if kind != 4:
        raise SourceError(f"{name}: offset 0x10: e_type {kind}, expected 4 (ET_CORE)")
    if phnum == PN_XNUM and shoff:
        phnum = struct.unpack_from(order + "I", pread_exact(fd, SHDR_SIZE, shoff, name), 44)[0]
    if phentsize != PHDR_SIZE or not 0 < phnum <= MAX_PHDRS:
        raise SourceError(f"{name}: offset 0x36: {phnum} program headers of {phentsize} bytes, expected {PHDR_SIZE}")
    table = pread_exact(fd, phnum * PHDR_SIZE, phoff, name)
    return CoreHeader(machine, order, tuple(map(ProgramHeader._make, struct.iter_unpack(order + "IIQQQQQQ", table))))


def segments(fd: int, header: CoreHeader, page_size: int = 4096, name: str = PATH) -> list[Segment]:
    """Where physical memory lies in /proc/vmcore; a page that two PT_LOADs show (kernel text) is taken once."""
    mask = page_size - 1
    found: list[Segment] = []
    for p in header.loads:
        start, end = p.paddr & ~mask, (p.paddr + p.memsz + mask) & ~mask
        if start < end:
            found = layer(found, [Segment(start, end - start, fd, p.offset - (p.paddr - start), PREAD, name)])
    return found
