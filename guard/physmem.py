# SPDX-License-Identifier: LGPL-2.1-or-later
"""Old memory by physical address: segments of files, read through the gate."""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from guard import shared
from guard._core import ffi, lib
from guard.errors import ReadError, SourceError
from guard.ranges import Range, RangeSet
from guard.registry import Registry

if TYPE_CHECKING:
    from guard._core import CData
    from guard.corefile import CoreFile

PREAD: int = lib.PHYSMEM_PREAD
MMAP: int = lib.PHYSMEM_MMAP
ABSENT: int = lib.PHYSMEM_ABSENT
CORE: int = lib.PHYSMEM_CORE

# 256 KiB of page tables for each window of /dev/mem, 4 MiB for all of them, whatever the machine's size
WINDOW_SIZE = 128 << 20
MAX_FAULTS: int = lib.TALLY_FAULTS
MAX_END, MAX_FILE_SIZE = 1 << 64, 1 << 63


class Segment(NamedTuple):
    """A file's view of [paddr, paddr + size): whole pages, found at *offset* bytes of *fd*. Of ABSENT ones, memory that
    is known to have been there and was not recorded, neither counts, and every read fails."""

    paddr: int
    size: int
    fd: int
    offset: int
    how: int  # PREAD, MMAP, ABSENT, or CORE: of the CoreFile that memory is read with, fd being its O_PATH descriptor
    name: str  # for messages

    @property
    def end(self) -> int:
        return self.paddr + self.size

    def part(self, piece: Range) -> Segment:
        """The part that shows *piece*, which lies inside."""
        if self.how == ABSENT:
            return self._replace(paddr=piece.start, size=piece.size)
        return self._replace(paddr=piece.start, size=piece.size, offset=self.offset + piece.start - self.paddr)


class Fault(NamedTuple):
    """Pages that could not be read and were given out as zeros."""

    range: Range
    errno: int


def absent(paddr: int, size: int, name: str) -> Segment:
    """Memory of which there is nothing but that it was there; *name* is what messages call the record of it."""
    return Segment(paddr, size, -1, 0, ABSENT, name)


def covered(segments: Iterable[Segment]) -> RangeSet:
    """What some segment speaks for, the absent ones too."""
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

    Processes that are forked from the one that made it count into the same counters and log as it does, and so may all
    read, also at the same time. *core* is the file of segments that are read by CORE."""

    def __init__(self, segments: list[Segment], registry: Registry, core: CoreFile | None = None) -> None:
        if err := lib.physmem_catch_sigbus():
            raise SourceError(f"cannot catch SIGBUS: {os.strerror(-err)}")
        self.registry = registry
        self._core = core
        self._tally, self._log = shared.new("struct physmem_tally"), shared.new("struct physmem_log")
        self._reader = core.reader() if core else ffi.NULL
        self.c: CData = ffi.new("struct physmem *")
        self.c.gate = registry.slot
        self.c.core = self._reader
        self.c.page_shift = registry.page_size.bit_length() - 1
        self.c.window_size = WINDOW_SIZE
        self.c.tally, self.c.log = self._tally, self._log
        self._show(segments)

    def add(self, segments: list[Segment]) -> None:
        """Show what *segments* show too; not while another thread reads. Raises SourceError as the constructor, with
        all as it was."""
        self._show(sorted([*self.segments, *segments]))

    def _show(self, segments: list[Segment]) -> None:
        registry, core = self.registry, self._core
        mask = registry.page_size - 1
        for s, following in zip(segments, [*segments, None][1:], strict=True):
            if (s.paddr | s.size | (s.offset if s.how == MMAP else 0)) & mask:
                raise SourceError(f"{s.name}: {s.paddr:#x}+{s.size:#x} at offset {s.offset:#x} is not whole pages")
            in_file = s.how == ABSENT or s.offset + s.size <= MAX_FILE_SIZE
            if s.paddr < 0 or s.size <= 0 or s.end > MAX_END or s.offset < 0 or not in_file:
                raise SourceError(f"{s.name}: {s.paddr:#x}+{s.size:#x} at offset {s.offset:#x} is not possible")
            if following and following.paddr < s.end:
                raise SourceError(f"{s.name} and {following.name} both claim {following.paddr:#x}")
            if s.how == CORE and (core is None or core.fd != s.fd):
                raise SourceError(f"{s.name}: memory at {s.paddr:#x} is read by way of another file than there is")
        lib.physmem_unmap(self.c)  # windows point to their segments
        self.segments = segments
        self._c_segments = ffi.new("struct physmem_segment[]", len(segments))
        for c, s in zip(self._c_segments, segments, strict=True):
            c.paddr, c.size, c.offset, c.fd, c.how = s.paddr, s.size, s.offset, s.fd, s.how
        self.c.n, self.c.segments = len(segments), self._c_segments

    @property
    def covered(self) -> RangeSet:
        """What some segment speaks for, refused or not, recorded or absent."""
        return covered(self.segments)

    @property
    def recorded(self) -> RangeSet:
        """Of that, what some file has: all of it, but for a record of the touched pages alone."""
        return covered(s for s in self.segments if s.how != ABSENT)

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
            why = f"refused by {rule.name}" if rule else self._why(at, -err)
            raise ReadError(f"old memory at {at:#x}: {why}", at)
        return bytes(ffi.buffer(buffer, size))

    def _why(self, paddr: int, error: int) -> str:
        if error == errno.ENXIO:
            return "no source shows it"
        at = bisect_right(self.segments, paddr, key=lambda s: s.paddr) - 1
        if error == errno.ENODATA and at >= 0 and self.segments[at].how == ABSENT:
            return "not recorded"
        return os.strerror(error)

    def faults(self) -> list[Fault]:
        """The pages that could not be read so far, ascending: all of them where :attr:`unlisted_faults` is 0."""
        shift, log = self.c.page_shift, self._log[0]
        runs: dict[int, list[Range]] = {}
        for f in log.faults[0 : log.n]:
            if f.error:
                runs.setdefault(f.error, []).append(Range(f.first << shift, f.end << shift))
        return sorted(Fault(r, error) for error, found in runs.items() for r in RangeSet(found))

    @property
    def unlisted_faults(self) -> int:
        """Reads of pages that failed too, and are not in :meth:`faults`, which has room for MAX_FAULTS runs (half of
        them for pages that no source shows); a page that is read twice counts twice."""
        return int(self._tally[0].unlisted)

    @property
    def bytes_read(self) -> int:
        return int(self._tally[0].bytes_read)

    @property
    def bytes_refused(self) -> int:
        return int(self._tally[0].bytes_refused)

    def account(self, bytes_read: int, refused: list[int], faults: Iterable[Fault], unlisted_faults: int = 0) -> None:
        """Count what another process read of this memory by the same rules: bytes, refused pages by rule, faults, and
        page reads that failed beyond those."""
        shift, tally, gate = self.c.page_shift, self._tally, self.registry.c
        lib.tally_add(ffi.addressof(tally[0], "bytes_read"), bytes_read)
        lib.tally_add(ffi.addressof(tally[0], "bytes_refused"), sum(refused) << shift)
        for i, pages in enumerate(refused):
            lib.tally_add(gate.rules[i].refused, pages)
        for (start, end), error in faults:
            lib.tally_failed(tally, self._log, start >> shift, end >> shift, error)
        lib.tally_add(ffi.addressof(tally[0], "fault_pages"), unlisted_faults)
        lib.tally_add(ffi.addressof(tally[0], "unlisted"), unlisted_faults)

    def close(self) -> None:
        """Unmap what is mapped; the file descriptors belong to the caller."""
        lib.physmem_unmap(self.c)


LOG, FIRMWARE = "log", "firmware"
"""Tags: who reads the dead kernel's printk log, which is for people to give away; who reads memory that firmware keeps
its tables in, outside of what a dump reads."""


class Touched:
    """Which pages exact reads have asked for, by who asked: ready for a record of those alone.

    A *tag* names who; "" is the witness at large. Pages count as touched whether or not they could be read, for a
    replay has to fail at the same one."""

    __slots__ = ("_most", "_page_size", "_runs")

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._runs: dict[str, list[tuple[int, int]]] = {}
        self._most = 1 << 12

    def add(self, paddr: int, size: int, tag: str = "") -> None:
        """*size* bytes from physical address *paddr* on were asked for."""
        if size <= 0:
            return
        mask = self._page_size - 1
        start, end = paddr & ~mask, (paddr + size + mask) & ~mask
        runs = self._runs.setdefault(tag, [])
        if runs and runs[-1][0] <= start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
            return
        runs.append((start, end))
        if len(runs) > self._most:
            self._runs[tag] = list(RangeSet(runs))
            self._most = max(self._most, 2 * len(self._runs[tag]))

    def tags(self) -> list[str]:
        """Who has asked for anything."""
        return list(self._runs)

    def pages(self, *tags: str) -> RangeSet:
        """What any of *tags* asked for, in whole pages (physical bytes)."""
        return RangeSet(run for tag in tags for run in self._runs.get(tag, ()))


class ExactMemory:
    """Old memory as the witness reads it: every byte real, or ReadError.

    With *touched*, each page that is asked for is noted there under *tag*. A search through all of memory must go
    through :meth:`untracked`, and :meth:`touch` what it finds."""

    __slots__ = ("_memory", "_tag", "_touched")

    def __init__(self, memory: OldMemory, touched: Touched | None = None, tag: str = "") -> None:
        self._memory = memory
        self._touched = touched
        self._tag = tag

    def read(self, paddr: int, size: int) -> bytes:
        self.touch(paddr, size)
        return self._memory.read_exact(paddr, size)

    def touch(self, paddr: int, size: int) -> None:
        """Note as read what was read already, through :meth:`untracked`."""
        if self._touched is not None:
            self._touched.add(paddr, size, self._tag)

    def tagged(self, tag: str) -> ExactMemory:
        """The same memory for a reader called *tag*."""
        return ExactMemory(self._memory, self._touched, tag)

    def untracked(self) -> ExactMemory:
        """The same memory for a search, which touches everything and means nothing by it."""
        return ExactMemory(self._memory)
