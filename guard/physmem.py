# SPDX-License-Identifier: LGPL-2.1-or-later
"""Old memory by physical address: segments of files, read through the gate."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from guard._core import ffi, lib
from guard.errors import ReadError, SourceError
from guard.ranges import Range, RangeSet
from guard.registry import Registry

if TYPE_CHECKING:
    from guard._core import CData
    from guard.corefile import CoreFile

PREAD: int = lib.PHYSMEM_PREAD
MMAP: int = lib.PHYSMEM_MMAP
CORE: int = lib.PHYSMEM_CORE

# 256 KiB of page tables for each window of /dev/mem, 4 MiB for all of them, whatever the machine's size
WINDOW_SIZE = 128 << 20
MAX_FAULTS = 4096
MAX_END, MAX_FILE_SIZE = 1 << 64, 1 << 63


class Segment(NamedTuple):
    """A file's view of [paddr, paddr + size): whole pages, found at *offset* bytes of *fd*."""

    paddr: int
    size: int
    fd: int
    offset: int
    how: int  # PREAD, MMAP, or CORE: of the CoreFile that the memory is read with, fd being its O_PATH descriptor
    name: str  # for messages

    @property
    def end(self) -> int:
        return self.paddr + self.size

    def part(self, piece: Range) -> Segment:
        """The part that shows *piece*, which lies inside."""
        return self._replace(paddr=piece.start, size=piece.size, offset=self.offset + piece.start - self.paddr)


class Fault(NamedTuple):
    """Pages that could not be read and were given out as zeros."""

    range: Range
    errno: int


def covered(segments: Iterable[Segment]) -> RangeSet:
    return RangeSet((s.paddr, s.end) for s in segments)


def layer(upper: list[Segment], lower: list[Segment]) -> list[Segment]:
    """*upper*, and where it has nothing *lower*: ascending and disjoint."""
    seen = covered(upper)
    rest = [s.part(piece) for s in lower for piece in RangeSet([(s.paddr, s.end)]) - seen]
    return sorted([*upper, *rest])


def only(segments: list[Segment], ranges: RangeSet) -> list[Segment]:
    """The parts of *segments* that show *ranges*."""
    found: list[Segment] = []
    for s in segments:
        if ranges.covers(s.paddr, s.end):
            found.append(s)
        else:
            found += [s.part(piece) for piece in RangeSet([(s.paddr, s.end)]) & ranges]
    return found


def whole_pages(segments: Iterable[Segment], page_size: int) -> list[Segment]:
    """*segments*, each cut down to the pages that it shows as a whole: a page in two files is read from neither."""
    return [s.part(r) for s in segments for r in RangeSet([(s.paddr, s.end)]).inner_pages(page_size)]


class OldMemory:
    """Guarded reads. Owns neither the registry nor the file descriptors; one object serves one thread at a time.

    *core* is the file of segments that are read by CORE."""

    def __init__(self, segments: list[Segment], registry: Registry, core: CoreFile | None = None) -> None:
        mask = registry.page_size - 1
        for s, following in zip(segments, [*segments, None][1:], strict=True):
            if (s.paddr | s.size | (s.offset if s.how == MMAP else 0)) & mask:
                raise SourceError(f"{s.name}: {s.paddr:#x}+{s.size:#x} at offset {s.offset:#x} is not whole pages")
            if s.paddr < 0 or s.size <= 0 or s.end > MAX_END or s.offset < 0 or s.offset + s.size > MAX_FILE_SIZE:
                raise SourceError(f"{s.name}: {s.paddr:#x}+{s.size:#x} at offset {s.offset:#x} is not possible")
            if following and following.paddr < s.end:
                raise SourceError(f"{s.name} and {following.name} both claim {following.paddr:#x}")
            if s.how == CORE and (core is None or core.fd != s.fd):
                raise SourceError(f"{s.name}: memory at {s.paddr:#x} is read by way of another file than there is")
        if err := lib.physmem_catch_sigbus():
            raise SourceError(f"cannot catch SIGBUS: {os.strerror(-err)}")
        self.segments = segments
        self.registry = registry
        self._c_segments = ffi.new("struct physmem_segment[]", len(segments))
        for c, s in zip(self._c_segments, segments, strict=True):
            c.paddr, c.size, c.offset, c.fd, c.how = s.paddr, s.size, s.offset, s.fd, s.how
        self._faults = ffi.new("struct physmem_fault[]", MAX_FAULTS)
        self.c: CData = ffi.new("struct physmem *")
        self.c.n, self.c.segments = len(segments), self._c_segments
        self.c.gate = registry.slot
        self._core = core.reader() if core else ffi.NULL
        self.c.core = self._core
        self.c.page_shift = registry.page_size.bit_length() - 1
        self.c.window_size = WINDOW_SIZE
        self.c.faults, self.c.max_faults = self._faults, MAX_FAULTS

    @property
    def covered(self) -> RangeSet:
        """What some segment shows, refused or not."""
        return covered(self.segments)

    def read(self, paddr: int, size: int) -> bytes:
        """*size* bytes from physical address *paddr* on; refused and unreadable pages are zeros."""
        buffer = ffi.new("uint8_t[]", size)
        lib.physmem_read(self.c, paddr, buffer, size)
        lib.physmem_rest(self.c)
        return bytes(ffi.buffer(buffer, size))

    def read_exact(self, paddr: int, size: int) -> bytes:
        """*size* bytes from physical address *paddr* on. Raises ReadError if any page is refused or unreadable."""
        buffer = ffi.new("uint8_t[]", size)
        bad = ffi.new("uint64_t *")
        err = lib.physmem_read_exact(self.c, paddr, buffer, size, bad)
        lib.physmem_rest(self.c)
        if err:
            at = int(bad[0])
            rule = self.registry.refuser(at // self.registry.page_size)
            absent = "no source shows it" if err == -errno.ENXIO else os.strerror(-err)
            why = f"refused by {rule.name}" if rule else absent
            raise ReadError(f"old memory at {at:#x}: {why}", at)
        return bytes(ffi.buffer(buffer, size))

    def faults(self) -> list[Fault]:
        """The pages that could not be read so far, ascending; of very many (MAX_FAULTS runs) only the first seen."""
        shift = self.c.page_shift
        runs: dict[int, list[Range]] = {}
        for f in self._faults[0 : self.c.n_faults]:
            runs.setdefault(f.error, []).append(Range(f.first << shift, f.end << shift))
        return sorted(Fault(r, error) for error, found in runs.items() for r in RangeSet(found))

    @property
    def bytes_read(self) -> int:
        return int(self.c.bytes_read)

    @property
    def bytes_refused(self) -> int:
        return int(self.c.bytes_refused)

    def account(self, bytes_read: int, refused: list[int], faults: Iterable[Fault]) -> None:
        """Count what another process read of this memory by the same rules: bytes, refused pages by rule, faults."""
        shift = self.c.page_shift
        self.c.bytes_read += bytes_read
        self.c.bytes_refused += sum(refused) << shift
        for i, pages in enumerate(refused):
            self.registry.c.rules[i].refused[0] += pages
        for fault, c in zip(faults, self._faults[self.c.n_faults : MAX_FAULTS], strict=False):
            c.first, c.end, c.error = fault.range.start >> shift, fault.range.end >> shift, fault.errno
            self.c.n_faults += 1

    def close(self) -> None:
        """Unmap what is mapped; the file descriptors belong to the caller."""
        lib.physmem_unmap(self.c)


class ExactMemory:
    """Old memory as the witness reads it: every byte real, or ReadError."""

    __slots__ = ("_memory",)

    def __init__(self, memory: OldMemory) -> None:
        self._memory = memory

    def read(self, paddr: int, size: int) -> bytes:
        return self._memory.read_exact(paddr, size)
