# SPDX-License-Identifier: LGPL-2.1-or-later
"""How fs/proc/vmcore.c (6.1 to 6.12) reads old memory, written down page by page: slow, and nothing to get wrong.

Names are the kernel's. Where oldmem means to differ, the model does as oldmem does, and a comment that begins with
OURS says what the kernel does instead."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

PAGE = 4096
LAST = 1 << 64  # one byte beyond the last physical address


class VmcoreCb(NamedTuple):
    """struct vmcore_cb; its name is ours."""

    name: str
    pfn_is_ram: Callable[[int], bool]


class OldmemFile:
    """Where copy_oldmem_page() finds the pages [first, first + pages): from page *offset* of a file on."""

    def __init__(self, first: int, pages: int, offset: int, data: bytes, mapped: bool, broken: bool) -> None:
        self.first, self.pages, self.offset = first, pages, offset
        self.data = data
        self.mapped, self.broken = mapped, broken

    def copy(self, paddr: int, n: int) -> bytes | int:
        """*n* bytes of one page, or the errno."""
        at = paddr - self.first * PAGE + self.offset * PAGE
        if self.broken:
            return errno.EACCES if self.mapped else errno.EBADF
        if self.mapped:
            if at // PAGE * PAGE >= len(self.data):
                return errno.EFAULT  # SIGBUS
            return self.data[at : at + n].ljust(n, b"\0")  # the last page of a mapped file is filled up with zeros
        return self.data[at : at + n] if at + n <= len(self.data) else errno.ENODATA


class Chunk(NamedTuple):
    """An entry of vmcore_list: whole pages at *offset* of the file."""

    paddr: int
    size: int
    offset: int


Mapped = tuple[str, int]
"""A page of a mapping: ("header", file offset), ("oldmem", pfn) or ("zero page", 0)."""


class Kernel:
    """The list of callbacks, and old memory behind it. Counters are what oldmem tells; the kernel counts nothing."""

    def __init__(self, files: list[OldmemFile]) -> None:
        self.files = files
        self.vmcore_cb_list: list[VmcoreCb] = []
        self.vmcore_opened = False
        self.refused: dict[str, int] = {}
        self.bytes_read = self.bytes_refused = self.fault_pages = 0
        self.faults: set[tuple[int, int]] = set()  # (errno, pfn)

    def register_vmcore_cb(self, cb: VmcoreCb) -> bool:
        """Whether the kernel warns."""
        self.vmcore_cb_list.append(cb)
        self.refused[cb.name] = 0
        return self.vmcore_opened

    def unregister_vmcore_cb(self, name: str) -> bool:
        """Whether the kernel warns."""
        if self.vmcore_opened:
            # OURS: the rule stays in force. The kernel takes it out, and a hole opens under the reader; 5.16 alone had
            # vmcore_cb_unstable, which turned every later read into zeros (facts B.7, L7).
            return True
        self.vmcore_cb_list = [cb for cb in self.vmcore_cb_list if cb.name != name]
        del self.refused[name]
        return False

    def refuser(self, pfn: int) -> str | None:
        """Who ends the loop of pfn_is_ram(); None where it returns true."""
        for cb in self.vmcore_cb_list:
            if not cb.pfn_is_ram(pfn):
                return cb.name
        return None

    def copy_oldmem_page(self, paddr: int, n: int) -> bytes | int:
        for file in self.files:
            if file.first <= paddr // PAGE < file.first + file.pages:
                return file.copy(paddr, n)
        return errno.ENXIO

    def read_from_oldmem(self, paddr: int, count: int) -> bytes:
        found = b""
        while count and paddr < LAST:
            n = min(count, PAGE - paddr % PAGE)
            refuser = self.refuser(paddr // PAGE)
            if refuser is not None:
                found += bytes(n)
                self.refused[refuser] += 1
                self.bytes_refused += n
            else:
                copied = self.copy_oldmem_page(paddr, n)
                if isinstance(copied, int):
                    # OURS: zeros, logged, and the read goes on. The kernel fails the whole call with -EFAULT (L3).
                    self.faults.add((copied, paddr // PAGE))
                    self.fault_pages += 1
                    copied = bytes(n)
                else:
                    self.bytes_read += n
                found += copied
            paddr += n
            count -= n
        # OURS: beyond the last address there are zeros; the kernel has no such address.
        return found + bytes(count)


class ProcVmcore:
    """The file: the header, then the pages of each PT_LOAD (paddr, size in bytes), back to back."""

    def __init__(self, kernel: Kernel, header: bytes, loads: list[tuple[int, int]]) -> None:
        self.kernel, self.header = kernel, header
        self.vmcore_list: list[Chunk] = []
        self.vmcore_size = len(header)
        for paddr, size in loads:  # process_ptload_program_headers_elf64()
            start, end = paddr // PAGE * PAGE, -(-(paddr + size) // PAGE) * PAGE
            self.vmcore_list.append(Chunk(start, end - start, self.vmcore_size))
            self.vmcore_size += end - start

    def read_vmcore(self, fpos: int, count: int) -> bytes:
        """Nothing beyond the end, short only there; across all borders else."""
        count = max(0, min(count, self.vmcore_size - fpos))
        found = self.header[fpos : fpos + count]
        for m in self.vmcore_list:
            start, end = max(fpos + len(found), m.offset), min(fpos + count, m.offset + m.size)
            if start < end:
                found += self.kernel.read_from_oldmem(m.paddr + start - m.offset, end - start)
        return found

    def mmap_vmcore(self, start: int, size: int) -> list[Mapped]:
        """remap_oldmem_pfn_checked(): every pfn is asked now, and never again for this mapping (B6.4, B6.5, L4)."""
        pages: list[Mapped] = []
        for at in range(start, start + size, PAGE):
            if at < len(self.header):
                pages.append(("header", at))
            else:
                m = next(m for m in self.vmcore_list if m.offset <= at < m.offset + m.size)
                pfn = (m.paddr + at - m.offset) // PAGE
                pages.append(("zero page", 0) if self.kernel.refuser(pfn) else ("oldmem", pfn))
        return pages

    def shown(self, page: Mapped) -> bytes:
        """What a page of a mapping shows when it is touched."""
        what, where = page
        if what == "header":
            return self.header[where : where + PAGE]
        if what == "zero page":
            return bytes(PAGE)
        copied = self.kernel.copy_oldmem_page(where * PAGE, PAGE)
        # OURS: what composes a mapping by a compiled guard reads zeros there. With the kernel's the reader gets SIGBUS.
        return bytes(PAGE) if isinstance(copied, int) else copied
