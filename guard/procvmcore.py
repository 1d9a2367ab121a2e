# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/vmcore as a source of old memory: its PT_LOADs tell where physical memory lies in the file.

The way in where /dev/mem is closed (lockdown), and the kernel's own gate where its virtio_mem driver is bound in
kdump mode. Offsets follow fs/proc/vmcore.c:process_ptload_program_headers_elf64(): page-rounded at both ends."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import NamedTuple

from guard.errors import SourceError
from guard.physmem import CORE, MAX_END, MAX_FILE_SIZE, Segment
from guard.ranges import Range

PATH = "/proc/vmcore"
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF
EHDR_SIZE, PHDR_SIZE, SHDR_SIZE = 64, 56, 64
MAX_PHDRS = 1 << 20
MAX_HEADER = 128 << 20  # bytes before the first PT_LOAD; so many program headers and 8192 CPUs' notes fit
MIN_PAGE = 4096


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
    phoff: int = EHDR_SIZE  # where these are in the file

    @property
    def loads(self) -> list[ProgramHeader]:
        return [p for p in self.phdrs if p.type == PT_LOAD]

    @property
    def size(self) -> int:
        """Where the header and notes end and memory begins in the file; 0 without any PT_LOAD."""
        return min((p.offset & -MIN_PAGE for p in self.loads), default=0)


def pread_exact(fd: int, size: int, offset: int, name: str) -> bytes:
    """*size* bytes from *offset* on. Raises SourceError where the file does not have them."""
    if offset + size > MAX_FILE_SIZE:
        raise SourceError(f"{name}: {size:#x} bytes at {offset:#x} are beyond the end of any file")
    data = bytearray()
    while len(data) < size:
        try:
            piece = os.pread(fd, min(size - len(data), 1 << 20), offset + len(data))
        except OSError as e:
            raise SourceError(f"{name}: {e.strerror} at {offset + len(data):#x}") from None
        if not piece:
            raise SourceError(f"{name}: ends at {offset + len(data):#x}, expected {size} bytes at {offset:#x}")
        data += piece
    return bytes(data)


def parse_header(read: Callable[[int, int], bytes], name: str) -> CoreHeader:
    """The ELF64 header and program headers of a core file, whose *read* gives exactly so many bytes from an offset on
    or raises SourceError. Raises SourceError where it is none."""
    ident = read(EHDR_SIZE, 0)
    if ident[:4] != b"\x7fELF":
        raise SourceError(f"{name}: offset 0x0: no ELF magic")
    if ident[4] != 2 or ident[5] not in (1, 2):
        raise SourceError(f"{name}: offset 0x4: not a 64-bit ELF file of a known byte order")
    order = "<" if ident[5] == 1 else ">"
    kind, machine, _, _, phoff, shoff, _, _, phentsize, phnum = struct.unpack_from(order + "HHIQQQIHHH", ident, 16)
    if kind != 4:
        raise SourceError(f"{name}: offset 0x10: e_type {kind}, expected 4 (ET_CORE)")
    if phnum == PN_XNUM and shoff:
        phnum = struct.unpack_from(order + "I", read(SHDR_SIZE, shoff), 44)[0]
    if phentsize != PHDR_SIZE or not 0 < phnum <= MAX_PHDRS:
        raise SourceError(f"{name}: offset 0x36: {phnum} program headers of {phentsize} bytes, expected {PHDR_SIZE}")
    table = read(phnum * PHDR_SIZE, phoff)
    phdrs = tuple(map(ProgramHeader._make, struct.iter_unpack(order + "IIQQQQQQ", table)))
    for i, p in enumerate(phdrs):
        if p.type == PT_LOAD and (p.paddr + p.memsz > MAX_END or p.offset + p.memsz > MAX_FILE_SIZE - MIN_PAGE):
            raise SourceError(
                f"{name}: program header {i}: {p.memsz:#x} bytes at offset {p.offset:#x} cannot be the memory "
                f"at {p.paddr:#x}"
            )
    return CoreHeader(machine, order, phdrs, phoff)


def read_header(fd: int, name: str) -> CoreHeader:
    """The ELF64 header and program headers of a core file. Raises SourceError where it is none."""
    header = parse_header(lambda size, offset: pread_exact(fd, size, offset, name), name)
    if header.size > MAX_HEADER:
        raise SourceError(f"{name}: memory begins at {header.size:#x}, expected a header of at most {MAX_HEADER:#x}")
    return header


def shown_by(p: ProgramHeader, page_size: int = 4096) -> Range:
    """The physical memory that the file shows for PT_LOAD *p*: its pages, unless kexec has put memory of another
    offset in the page there (a backup of low memory); then only what the header lists."""
    if (p.offset - p.paddr) % page_size:
        return Range(p.paddr, p.paddr + p.memsz)
    return Range(p.paddr & -page_size, (p.paddr + p.memsz + page_size - 1) & -page_size)


def segments(fd: int, header: CoreHeader, page_size: int = 4096, name: str = PATH, how: int = CORE) -> list[Segment]:
    """Where physical memory lies in /proc/vmcore, ascending; a page that two PT_LOADs show (kernel text) is taken
    once. *fd* is that of a guard.corefile.CoreFile, unless *how* says that it is open for good."""
    found: list[Segment] = []
    reached = 0
    for p in sorted(header.loads, key=lambda p: p.paddr):
        shown = shown_by(p, page_size)
        start, end = max(shown.start, reached), shown.end
        start, end = (start + page_size - 1) & -page_size, end & -page_size
        if start < end:
            found.append(Segment(start, end - start, fd, p.offset + start - p.paddr, how, name))
            reached = end
    return found
