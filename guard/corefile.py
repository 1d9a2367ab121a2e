# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own /proc/vmcore, found once and open only while it is read.

While it is open, Linux 6.14 and later refuse the device dumps that drivers add to it; before, such a dump shifts all
memory in the file under whoever has it open (fs/proc/vmcore.c:vmcore_add_device_dump()). csrc/corefile.c follows that
where old memory is read; here is what was read first, and what has come since."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from guard._core import ffi, lib
from guard.errors import SourceError
from guard.procvmcore import EHDR_SIZE, PHDR_SIZE, PT_LOAD, PT_NOTE, CoreHeader, pread_exact, read_header

if TYPE_CHECKING:
    from guard._core import CData


class Added(NamedTuple):
    """What drivers have added to the file since its header was read, in bytes: device dumps, and PT_LOADs (memory that
    a virtio_mem driver of s390x adds when it is loaded)."""

    dumps: int
    ram: int


class CoreFile:
    """The core file at *real_path*, which messages call *name*, with its header as it is now. Close it when done.

    Raises OSError if there is none, SourceError if it is no core file."""

    def __init__(self, real_path: str, name: str) -> None:
        self.name = name
        # opens nothing: neither does the kernel count it, nor can a FIFO of a recorded machine block
        self.fd = os.open(real_path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise SourceError(f"{name}: is not a regular file; taken as absent")
            with self._opened() as fd:
                self.header: CoreHeader = read_header(fd, name)
                self._c = self._as_it_is(fd)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The file itself, also where something is mounted over its name."""
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise SourceError(f"{self.name}: cannot be opened: {e.strerror}") from None
        try:
            yield fd
        finally:
            os.close(fd)

    def _as_it_is(self, fd: int) -> CData:
        header = self.header
        c = ffi.new("struct corefile *")
        c.path_fd, c.fd = self.fd, -1
        last: dict[int, int] = {p.type: i for i, p in enumerate(header.phdrs)}
        if PT_NOTE in last:
            note = header.phdrs[last[PT_NOTE]]
            size = min(note.filesz, lib.COREFILE_MARK)
            at = note.offset + note.filesz - size
            with suppress(SourceError):  # damaged: then there is no mark
                ffi.buffer(c.mark, size)[:] = pread_exact(fd, size, at, self.name)
                c.mark_at, c.mark_size = at, size
        if PT_LOAD in last:
            load = header.phdrs[last[PT_LOAD]]
            c.load_at = header.phoff + last[PT_LOAD] * PHDR_SIZE
            c.load_offset, c.load_paddr = load.offset, load.paddr
        end = max((p.offset + p.memsz for p in header.loads), default=0)
        # a recorded machine has the header alone; no byte is read to see it, for memory there may be gone
        c.end = EHDR_SIZE if os.fstat(fd).st_size < end else end
        return c

    def reader(self) -> CData:
        """A ``struct corefile``, closed. It may outlive this object only if nothing is read by it then."""
        return ffi.new("struct corefile *", self._c[0])

    def settled(self) -> CData:
        """A ``struct corefile`` that is open, with the place of memory looked up; closing it is the caller's affair.
        Raises SourceError where that is not to be made out."""
        c = self.reader()
        if err := lib.corefile_settle(c):
            lib.corefile_rest(c)
            raise SourceError(f"{self.name}: cannot be read again: {os.strerror(-err)}")
        return c

    def read(self, size: int, offset: int) -> bytes:
        """*size* bytes from *offset* on, of the header and the notes as they were. Raises SourceError where the file
        does not have them, or has been added to since."""
        with self._opened() as fd:
            data = pread_exact(fd, size, offset, self.name)
            if read_header(fd, self.name) != self.header:
                raise SourceError(f"{self.name}: a driver has just added a device dump or memory to it; start again")
        return data

    def added(self) -> Added:
        """What has been added since. Raises SourceError where that cannot be told."""
        with self._opened() as fd:
            now = read_header(fd, self.name)
        then = self.header
        return Added(_size(now, PT_NOTE) - _size(then, PT_NOTE), _size(now, PT_LOAD) - _size(then, PT_LOAD))

    def close(self) -> None:
        os.close(self.fd)


def _size(header: CoreHeader, kind: int) -> int:
    return sum(p.memsz for p in header.phdrs if p.type == kind)
