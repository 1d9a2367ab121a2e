# SPDX-License-Identifier: LGPL-2.1-or-later
"""Old memory for other Python programs: a read-only view by physical address, through the rules.

It looks like a sequence of bytes and is none: there are holes, pages that must not be read, pages that cannot be. All
of these read as zeros and are counted, as the kernel has it for /proc/vmcore; who has to know asks why(), or
read_exact(). So there is no buffer of it to be had: what it gives are copies."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, overload

from guard._core import ffi, lib
from guard.compiled import open_guard
from guard.errors import SourceError
from guard.physmem import PREAD, Fault, OldMemory, Segment
from guard.ranges import Range
from guard.registry import Registry

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_END = 1 << 64


class Image(NamedTuple):
    """A file that holds *size* bytes (None: all that there are) of memory from physical address *paddr* on, at byte
    *offset* of it. Whole pages."""

    path: str
    paddr: int = 0
    offset: int = 0
    size: int | None = None


class Counters(NamedTuple):
    """Of all reads but read_exact(): bytes of RAM that were copied, bytes that some rule refused, and the pages that
    each rule did. What is read twice counts twice."""

    bytes_read: int
    bytes_refused: int
    pages_refused: dict[str, int]


class GuardedMemory:
    """Reads of *memory*; *close* is called once when this is closed. Addresses are physical bytes, pfns those over the
    page size.

    Any number of threads may use one object: reads take turns. For reads at the same time, give each thread its own.

    >>> with GuardedMemory.open("machine.guard", [Image("ram.raw")]) as mem:
    ...     mem[0x1000:0x1010], mem.why(1), mem.counters()
    """

    def __init__(self, memory: OldMemory, close: Callable[[], None] | None = None) -> None:
        self.page_size = memory.registry.page_size
        self._memory = memory
        self._registry = memory.registry
        self._registry.opened = True
        self._shown = memory.covered
        self._close = close
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def open(cls, rules: str | Registry, images: Iterable[Image]) -> GuardedMemory:
        """The memory in *images* under *rules*: a compiled guard's file, or a registry.

        Raises SourceError, one line, where a file cannot be opened or is no guard, and where images overlap, are not
        whole pages, or have no bytes."""
        registry = open_guard(rules) if isinstance(rules, str) else rules
        with ExitStack() as opened:
            segments = [_segment(image, opened) for image in images]
            memory = OldMemory(sorted(segments, key=lambda s: s.paddr), registry)
            opened.callback(memory.close)
            return cls(memory, opened.pop_all().close)

    def __enter__(self) -> GuardedMemory:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Every later read raises ValueError. May be called again."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed and self._close:
            self._close()

    def read(self, paddr: int, size: int) -> bytes:
        """*size* bytes from *paddr* on; what is refused, not there or not readable is zeros. Raises ValueError where
        that leaves the 64-bit address space."""
        _check(paddr, size)
        with self._lock:
            self._check_open()
            return self._memory.read(paddr, size) if size else b""

    def read_exact(self, paddr: int, size: int) -> bytes:
        """*size* bytes of RAM. Raises ReadError, with address and reason, if any of them is refused, not there or not
        readable; ValueError as read()."""
        _check(paddr, size)
        with self._lock:
            self._check_open()
            return self._memory.read_exact(paddr, size) if size else b""

    def readinto(self, paddr: int, buffer: WriteableBuffer) -> int:
        """As read(), into all of *buffer*, without a copy between; returns its size in bytes. Raises TypeError for a
        buffer that is read-only or not contiguous."""
        with memoryview(buffer) as given:
            if given.readonly:
                raise TypeError("readinto() needs a buffer that can be written to")
            with given.cast("B") as view:
                _check(paddr, len(view))
                with self._lock:
                    self._check_open()
                    if view:
                        lib.physmem_read(self._memory.c, paddr, ffi.from_buffer("uint8_t[]", view), len(view))
                        lib.physmem_rest(self._memory.c)
                return len(view)

    def view(self, paddr: int, size: int) -> memoryview:
        """read() as a read-only memoryview: a copy of what memory is now, for what wants a buffer."""
        return memoryview(self.read(paddr, size))

    @property
    def end(self) -> int:
        """Behind the last byte that some file shows."""
        return max((r.end for r in self._shown), default=0)

    def __len__(self) -> int:
        """:attr:`end`, holes counted in."""
        return self.end

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> bytes: ...
    def __getitem__(self, at: int | slice) -> int | bytes:
        """``mem[paddr]`` and ``mem[paddr:end]``, which is cut at :attr:`end` as that of any sequence. Raises ValueError
        for negative addresses and for steps: nothing is counted from the end backwards."""
        if not isinstance(at, slice):
            if not 0 <= at < self.end:
                raise IndexError(f"physical address {at:#x} is not between 0 and {self.end - 1:#x}")
            return self.read(at, 1)[0]
        start, stop = at.start or 0, self.end if at.stop is None else at.stop
        if start < 0 or stop < 0 or at.step not in (None, 1):
            raise ValueError("old memory is sliced by physical addresses from 0 on, without a step")
        stop = min(stop, self.end)
        return self.read(start, stop - start) if start < stop else b""

    def is_ram(self, pfn: int) -> bool:
        """May the page be read by the rules? Whether some file shows it is another question. Raises ValueError beyond
        the last page of a 64-bit address space."""
        return self._registry.pfn_is_ram(pfn)

    def why(self, pfn: int) -> str | None:
        """Why the page reads as zeros; None where it is RAM and shown. That it can be read only reading tells."""
        rule = self._registry.refuser(pfn)
        if rule:
            return f"{rule.name}: {rule.reason}"
        return None if pfn * self.page_size in self._shown else "no file shows it"

    def __iter__(self) -> Iterator[Range]:
        """The ranges that are RAM and shown: whole pages, ascending, one at a time, as long as each can be."""
        for shown in self._shown:
            yield from (run for run, rule in self._registry.verdicts(*shown) if rule is None)

    def covers(self, paddr: int, size: int) -> bool:
        """Is every byte of that RAM and shown? Raises ValueError as read()."""
        _check(paddr, size)
        if not size:
            return True
        first, end = paddr // self.page_size, (paddr + size - 1) // self.page_size + 1
        return self._shown.covers(paddr, paddr + size) and self._registry.next_refused(first, end) == end

    def __contains__(self, paddr: object) -> bool:
        """Is the byte RAM and shown?"""
        return isinstance(paddr, int) and 0 <= paddr < _END and self.covers(paddr, 1)

    def counters(self) -> Counters:
        """What reads have met so far."""
        return Counters(self._memory.bytes_read, self._memory.bytes_refused, self._registry.counters())

    def faults(self) -> list[Fault]:
        """Pages that the rules allow and that could not be read so far, ascending: zeros were given for them. All of
        them where :attr:`unlisted_faults` is 0."""
        return self._memory.faults()

    @property
    def unlisted_faults(self) -> int:
        """Reads of pages that failed and for which :meth:`faults` had no room; what is read twice counts twice."""
        return self._memory.unlisted_faults

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this memory is closed")


def _check(paddr: int, size: int) -> None:
    if paddr < 0 or size < 0 or paddr + size > _END:
        raise ValueError(f"{size} bytes from {paddr:#x} on are not in the 64-bit address space")


def _segment(image: Image, opened: ExitStack) -> Segment:
    path, paddr, offset, size = image
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        opened.callback(os.close, fd)
        if size is None:
            size = os.lseek(fd, 0, os.SEEK_END) - offset
    except OSError as e:
        raise SourceError(f"{path}: {e.strerror}") from None
    return Segment(paddr, size, fd, offset, PREAD, path)
