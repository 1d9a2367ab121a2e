# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a header for the next kernel can lie: in memory that neither this kernel nor the next takes for its own.

In place of the prepared one: kexec left its pages out of the memory map that it gave this kernel, and kexec once more
hands that map on. Or in pages of our own, locked, which memmap=SIZE$ADDR takes out of the next kernel's map."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from itertools import pairwise
from typing import Protocol

from capture import notes
from capture.dump import Dump
from capture.elfcore import page_align
from capture.sources import report
from guard import devmem, pinned, procvmcore
from guard.errors import DeviceError, Error, SourceError
from guard.ranges import Range, RangeSet

MOST = 4 << 20
"""Bytes beyond which no header is larger: e_phnum counts 65534 program headers of 56 bytes."""

ONE_MIB = 1 << 20  # below it the next kernel reserves all (arch/x86/realmode/init.c:reserve_real_mode)


class Place(Protocol):
    """Physical memory for a header: *addr*, *room* in bytes, and *what* it is. *is_own_ram*: it is System RAM of this
    kernel, so segments that are loaded may come to lie over it."""

    addr: int
    room: int
    what: str
    is_own_ram: bool

    def parameters(self) -> list[str]:
        """What the next kernel's command line needs to find the header there and to leave it alone."""

    def before(self, size: int) -> bytes:
        """What the next kernel has to put back to find the prepared header again: *size* bytes at most."""

    def put(self, data: bytes) -> None:
        """Write the header. Raises Error if it is not there afterwards."""

    def check(self) -> None:
        """Raises Error if what :meth:`put` wrote is not there any more."""

    def take_back(self) -> None:
        """What was there before :meth:`put` is there again."""


class Window:
    """[addr, addr + size) of /dev/mem, writable; whole pages, physical bytes. Raises SourceError."""

    def __init__(self, addr: int, size: int, path: str = devmem.PATH) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise SourceError(f"{path}: {e.strerror}") from None
        try:
            self.map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=addr)
        except (OSError, ValueError, OverflowError) as e:
            why = e.strerror if isinstance(e, OSError) else str(e)
            hint = ' ("RAM buffer" in /proc/iomem? iomem=relaxed cures it)' if isinstance(e, PermissionError) else ""
            raise SourceError(f"{path}: {Range(addr, addr + size)} cannot be mapped: {why}{hint}") from None
        finally:
            os.close(fd)

    def write(self, data: bytes) -> bool:
        """Write *data* at the start; is it there?"""
        self.map[: len(data)] = data
        return self.map[: len(data)] == data


class InPlace:
    """The prepared header's own place. Its room ends where this kernel's memory begins, the crash reservation ends,
    something else begins that the old header knows of (kexec's copy of low memory), or the first byte is not zero:
    whatever lies there, kexec has put it there. Raises SourceError where there is no such place."""

    what = "in place of the prepared one"
    is_own_ram = False

    def __init__(self, dump: Dump, path: str = devmem.PATH) -> None:
        page = dump.machine.page_size
        self.addr = prepared_at(dump)
        if self.addr % page:
            raise SourceError(f"the prepared header at {self.addr:#x} does not start a page")
        own = dump.machine.reports["iomem"].ranges(report.OWN_RAM).outer_pages(page)
        if self.addr in own:
            raise SourceError(f"the prepared header at {self.addr:#x} lies in memory of this kernel")
        end = min([r.start for r in own if r.start > self.addr] + [self.addr + MOST])
        reserved = dump.arch.reserved.find(self.addr)
        self._path = path
        self._window = Window(self.addr, page, path)
        try:
            header = procvmcore.parse_header(self._read, f"prepared header at {self.addr:#x}")
            used = procvmcore.EHDR_SIZE + len(header.phdrs) * procvmcore.PHDR_SIZE
            known = [p.offset for p in header.phdrs if p.offset > self.addr]
        except SourceError:
            used, known = page, []  # whatever it is, it is no longer needed
        # where no reservation is known, the pages that the old header begins on are all that is surely not old memory
        limit = reserved.end if reserved else self.addr + page_align(used, page)
        end = min([end, limit & -page, *known])
        size = (end - self.addr) & -page
        if size < page:
            raise SourceError(f"the prepared header at {self.addr:#x} has no whole page")
        self._window = Window(self.addr, size, path)
        self.original = b""
        behind = self._window.map[min(used, size) :]
        self.room = size - len(behind.lstrip(b"\0"))

    def _read(self, size: int, offset: int) -> bytes:
        """Of the prepared header, which may be larger than what is mapped so far."""
        if offset + size > MOST:
            raise SourceError(f"prepared header at {self.addr:#x}: {size} bytes at offset {offset:#x}")
        if offset + size > len(self._window.map):
            self._window = Window(self.addr, page_align(offset + size, mmap.PAGESIZE), self._path)
        return self._window.map[offset : offset + size]

    def parameters(self) -> list[str]:
        return [f"elfcorehdr={self.addr:#x}"]

    def before(self, size: int) -> bytes:
        return self._window.map[:size]

    def put(self, data: bytes) -> None:
        self.original = self.before(len(data))
        self._data = data
        if not self._window.write(data):
            self.take_back()
            raise Error(f"/dev/mem: what was written at {self.addr:#x} is not there")

    def check(self) -> None:
        if self.before(len(self._data)) != self._data:
            raise Error(f"the header at {self.addr:#x} has been changed")

    def take_back(self) -> None:
        self._window.write(self.original)


def prepared_at(dump: Dump) -> int:
    """Physical address of the prepared header. Raises SourceError where the command line names none."""
    at = notes.prepared_at(dump.machine)
    if at is None:
        raise SourceError("no elfcorehdr= on the command line: there is no prepared header")
    return at


class Pinned:
    """Locked pages of our own that are neighbours in physical memory, for as long as this process lives. Raises
    SourceError where no *size* bytes of them can be had.

    Locked pages stay in memory but not in place: compaction may move them, so :meth:`check` comes last."""

    what = "in pinned pages"
    is_own_ram = True
    _AT_LEAST = 4 << 20  # holds a whole huge page, aligned

    def __init__(self, size: int) -> None:
        self._size = page_align(size, mmap.PAGESIZE)
        self.room = self._size
        total = max(self._AT_LEAST, 2 * self._size)
        try:
            self._map = mmap.mmap(-1, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # no huge pages here; small ones are often neighbours too
            # A child that has the pages too makes the next write to them go to a copy elsewhere (madvise(2)); and the
            # kernel is loaded by a child
            self._map.madvise(mmap.MADV_DONTFORK)
            self._vaddr = pinned.address(self._map)
            pinned.lock(self._vaddr, total)
            self._pfns = pinned.frames(self._vaddr, total // mmap.PAGESIZE)
        except (OSError, DeviceError) as e:
            raise SourceError(f"no pinned pages: {e}") from None
        self._data = b""
        self.choose(())

    def choose(self, avoid: Iterable[Range]) -> None:
        """Take neighbours that lie in none of *avoid* (physical bytes). Raises SourceError if there are none."""
        page, count = mmap.PAGESIZE, self._size // mmap.PAGESIZE
        bad = RangeSet([*avoid, Range(0, ONE_MIB)]).outer_pages(page)
        start = 0
        for i, (pfn, following) in enumerate(pairwise([*self._pfns, 0])):
            if pfn * page in bad:
                start = i + 1
            elif i + 1 - start == count:
                self._first, self.addr = start, self._pfns[start] * page
                return
            elif following != pfn + 1:
                start = i + 1
        raise SourceError(f"no {self._size} bytes of physical neighbours among {len(self._pfns)} locked pages")

    def parameters(self) -> list[str]:
        return [f"memmap={self._size >> 10}K${self.addr:#x}", f"elfcorehdr={self.addr:#x}"]

    def before(self, size: int) -> bytes:
        return b""  # the prepared header stays where it is

    def put(self, data: bytes) -> None:
        at = self._first * mmap.PAGESIZE
        self._map[at : at + len(data)] = self._data = data
        self.check()

    def check(self) -> None:
        page = mmap.PAGESIZE
        at, count = self._first * page, self._size // page
        first = self.addr // page
        if pinned.frames(self._vaddr + at, count) != list(range(first, first + count)):
            raise Error(f"the pinned pages at {self.addr:#x} have been moved by the kernel")
        if self._map[at : at + len(self._data)] != self._data:
            raise Error(f"the pinned pages at {self.addr:#x} have been changed")

    def take_back(self) -> None:
        self._map.close()
