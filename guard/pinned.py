# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locked memory whose physical address is known; one page of it for a device.

The address comes from /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst: 64-bit entries, bit 63 present,
bits 0-54 pfn). mlock(2) keeps a page in RAM but not in place: compaction may still migrate it, so whoever handed the
address to a device checks again before each request and after each answer."""

from __future__ import annotations

import mmap
import os
import struct

from guard._core import ffi, lib
from guard.errors import DeviceError

PAGE_SIZE = mmap.PAGESIZE
_PRESENT = 1 << 63
_PFN_MASK = (1 << 55) - 1
_PAGEMAP = "/proc/self/pagemap"


def address(memory: mmap.mmap) -> int:
    """Virtual address of a mapping. The cffi object lives for this call only: one that stays would keep it open."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer("char[]", memory)))


def lock(vaddr: int, size: int) -> None:
    """mlock(2) of *size* bytes. Raises DeviceError."""
    if lib.mlock(ffi.cast("void *", vaddr), size):
        raise DeviceError(f"cannot lock {size} bytes of memory: {os.strerror(ffi.errno)}")


def frames(vaddr: int, count: int, pagemap: str = _PAGEMAP) -> list[int]:
    """The pfns of the *count* pages from *vaddr* on, all of them present. Raises DeviceError where one is not, or where
    the kernel hides them (needs CAP_SYS_ADMIN)."""
    size = 8 * count
    try:
        fd = os.open(pagemap, os.O_RDONLY | os.O_CLOEXEC)
        try:
            raw = os.pread(fd, size, vaddr // PAGE_SIZE * 8)
        finally:
            os.close(fd)
    except OSError as error:
        raise DeviceError(f"{pagemap}: {error.strerror}: no physical addresses to be had") from None
    if len(raw) != size:
        raise DeviceError(f"{pagemap}: {len(raw)} bytes read instead of {size} for {count} locked pages")
    found = []
    for (entry,) in struct.iter_unpack("=Q", raw):
        if not entry & _PRESENT:
            raise DeviceError(f"{pagemap}: a locked page is not present (entry {entry:#x})")
        if not entry & _PFN_MASK:
            raise DeviceError(f"{pagemap}: the kernel hides the pfn (CAP_SYS_ADMIN is needed)")
        found.append(entry & _PFN_MASK)
    return found


class PinnedPage:
    """A zeroed, locked page of PAGE_SIZE bytes; ``view`` is its content.

    It is shared anonymous memory: a private page could be replaced by a copy after a fork.
    Raises DeviceError if the page cannot be locked or its physical address is hidden (needs CAP_SYS_ADMIN)."""

    __slots__ = ("_map", "_paddr", "_pagemap", "_vaddr", "view")

    def __init__(self, pagemap: str = _PAGEMAP) -> None:
        self._pagemap = pagemap
        self._paddr = 0
        self._map = mmap.mmap(-1, PAGE_SIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self._vaddr = address(self._map)
        self.view = memoryview(self._map)
        try:
            lock(self._vaddr, PAGE_SIZE)
            self.paddr()
        except BaseException:
            self.close()
            raise

    def _lookup(self) -> int:
        return frames(self._vaddr, 1, self._pagemap)[0] * PAGE_SIZE

    def paddr(self) -> int:
        """Physical address of the page now, in bytes; check_still_there() compares with the last one returned."""
        self._paddr = self._lookup()
        return self._paddr

    def check_still_there(self) -> None:
        """Raise DeviceError if the page is no longer at the address that paddr() returned last."""
        now = self._lookup()
        if now != self._paddr:
            raise DeviceError(f"the page shared with the device moved from {self._paddr:#x} to {now:#x}")

    def close(self) -> None:
        """Unmap (and so unlock) the page; no device may know its address any more."""
        self.view.release()
        self._map.close()

    def __enter__(self) -> PinnedPage:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
