# SPDX-License-Identifier: LGPL-2.1-or-later
"""One page of locked memory whose physical address a device can be told.

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


class PinnedPage:
    """A zeroed, locked page of PAGE_SIZE bytes; ``view`` is its content.

    It is shared anonymous memory: a private page could be replaced by a copy after a fork.
    Raises DeviceError if the page cannot be locked or its physical address is hidden (needs CAP_SYS_ADMIN)."""

    __slots__ = ("_map", "_paddr", "_pagemap", "_vaddr", "view")

    def __init__(self, pagemap: str = "/proc/self/pagemap") -> None:
        self._pagemap = pagemap
        self._paddr = 0
        self._map = mmap.mmap(-1, PAGE_SIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        # The cffi object lives for this expression only: one that stays would keep the mapping from being closed.
        self._vaddr = int(ffi.cast("uintptr_t", ffi.from_buffer("char[]", self._map)))
        self.view = memoryview(self._map)
        try:
            self._lock()
            self.paddr()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        if lib.mlock(ffi.cast("void *", self._vaddr), PAGE_SIZE):
            raise DeviceError(f"cannot lock one page of memory for a device: {os.strerror(ffi.errno)}")

    def _lookup(self) -> int:
        try:
            fd = os.open(self._pagemap, os.O_RDONLY | os.O_CLOEXEC)
            try:
                raw = os.pread(fd, 8, self._vaddr // PAGE_SIZE * 8)
            finally:
                os.close(fd)
        except OSError as error:
            raise DeviceError(f"{self._pagemap}: {error.strerror}: no physical address to give to a device") from None
        if len(raw) != 8:
            raise DeviceError(f"{self._pagemap}: {len(raw)} bytes read instead of 8 for the locked page")
        (entry,) = struct.unpack("=Q", raw)
        if not entry & _PRESENT:
            raise DeviceError(f"{self._pagemap}: the locked page is not present (entry {entry:#x})")
        pfn = int(entry & _PFN_MASK)
        if not pfn:
            raise DeviceError(f"{self._pagemap}: the kernel hides the pfn (CAP_SYS_ADMIN is needed)")
        return pfn * PAGE_SIZE

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
