# SPDX-License-Identifier: LGPL-2.1-or-later
"""The vmcore as a file that does not exist: header bytes, then old memory read through the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capture.elfcore import Core
from guard._core import ffi, lib
from guard.physmem import OldMemory

if TYPE_CHECKING:
    from guard._core import CData


class Vmcore:
    """What FUSE, save and Python callers read from. Keeps *memory* alive; one object serves one thread."""

    def __init__(self, core: Core, memory: OldMemory) -> None:
        self.core = core
        self.memory = memory
        self.size = core.size
        self._extents = ffi.new("struct view_extent[]", len(core.extents))
        for c, e in zip(self._extents, core.extents, strict=True):
            c.offset, c.size, c.paddr = e
        self.c: CData = ffi.new("struct view *")
        self.c.head, self.c.head_size = ffi.from_buffer("uint8_t[]", core.header), len(core.header)
        self.c.n, self.c.extents = len(core.extents), self._extents
        self.c.size = core.size
        self.c.mem = memory.c

    def read_into(self, offset: int, buffer: CData, size: int) -> int:
        """Fill a cffi buffer; the number of bytes read is less than *size* only at the end of the file."""
        read = int(lib.view_read(self.c, offset, buffer, size))
        lib.physmem_rest(self.memory.c)
        return read

    def read(self, offset: int, size: int) -> bytes:
        """*size* bytes of the file, fewer only at its end; refused and unreadable pages are zeros."""
        buffer = ffi.new("uint8_t[]", size)
        return bytes(ffi.buffer(buffer, self.read_into(offset, buffer, size)))
