# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the library in front of libc in a collector is told, and what it tells (capture/csrc/plan.h): two memfds of this
process, which every process of the collector's finds by way of /proc."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from capture.dump import Dump
from capture.elfcore import page_align
from guard import procvmcore
from guard._core import ffi, lib
from guard.compiled import ALIGN, compile_guard
from guard.errors import Error
from guard.pageset import PageSet
from guard.physmem import ABSENT, CORE, Fault, Segment
from guard.ranges import Range

if TYPE_CHECKING:
    from guard._core import CData
    from guard.corefile import CoreFile

MFD_NOEXEC_SEAL = 8  # include/uapi/linux/memfd.h
_WORD = 64


def _memfd(name: str) -> int:
    for flags in (MFD_NOEXEC_SEAL, 0):  # since 6.3, where vm.memfd_noexec may insist on it
        try:
            return os.memfd_create(name, flags | os.MFD_CLOEXEC)
        except OSError as e:
            if e.errno != errno.EINVAL or not flags:
                raise Error(f"no memory files, which the collector's library needs: {e.strerror}") from None
    raise AssertionError


def _numbers(fd: int) -> tuple[int, int]:
    known = os.fstat(fd)
    return os.major(known.st_dev) << 32 | os.minor(known.st_dev), known.st_ino


def _mapped_as(segment: Segment, page_size: int) -> tuple[int, int]:
    """Device (major << 32 | minor) and inode by which /proc/<pid>/maps calls the file of *segment*: what fstat(2) says,
    but for file systems that have others for each file (btrfs, overlayfs)."""
    device, inode = _numbers(segment.fd)
    try:
        flags, prot = mmap.MAP_SHARED, mmap.PROT_READ
        page = mmap.mmap(segment.fd, page_size, flags, prot, offset=segment.offset)
    except (OSError, ValueError):  # one that cannot be mapped has no faults either
        return device, inode
    with page, open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        start = f"{int(ffi.cast('uintptr_t', ffi.from_buffer('char[]', page))):x}-"
        for line in maps:
            if line.lstrip("0").startswith(start):
                _, _, _, numbers, number, *_ = line.split()
                major, minor = numbers.split(":")
                device, inode = int(major, 16) << 32 | int(minor, 16), int(number)
    return device, inode


class Plan:
    """What the library is told about *dump*, to whose vmcore the descriptor *vmcore* leads any program. Where no file
    has the name that programs open it by, *name* is that. Close it when the command has ended. Raises Error."""

    def __init__(self, dump: Dump, vmcore: int, name: str) -> None:
        self._fds: list[int] = []
        self._core: CData | None = None
        try:
            self.fd = self._new("oldmem plan")
            self._tally = self._new("oldmem tally")
            self._write(dump, vmcore, os.fsencode(name))
        except BaseException:
            self.close()
            raise

    def _new(self, name: str) -> int:
        self._fds.append(_memfd(name))
        return self._fds[-1]

    def _write(self, dump: Dump, vmcore: int, name: bytes) -> None:
        if len(name) >= lib.PLAN_NAME:
            raise Error(f"{os.fsdecode(name)}: a path of more than {lib.PLAN_NAME - 1} bytes")
        page_size, core, rules = dump.registry.page_size, dump.core, list(dump.registry)
        if len(rules) > lib.PLAN_RULES:
            raise Error(f"{len(rules)} rules: the library takes at most {lib.PLAN_RULES}")
        extents = ffi.new("struct view_extent[]", len(core.extents))
        for c, e in zip(extents, core.extents, strict=True):
            c.offset, c.size, c.paddr = e
        self._segments = self._in_place(self._mappable(dump), dump.machine.core)
        segments, files = self._tables(page_size)
        plan = ffi.new("struct plan *")
        plan.layout, plan.pid = ffi.sizeof("struct plan"), os.getpid()
        plan.tally_fd, plan.vmcore_fd = self._tally, vmcore
        shown = os.fstat(vmcore)
        plan.dev, plan.ino = shown.st_dev, shown.st_ino
        plan.page_shift, plan.size, plan.name = page_size.bit_length() - 1, core.size, name
        with open(self.fd, "wb", closefd=False) as file:
            file.write(ffi.buffer(plan))
            plan.files, plan.n_files = file.tell(), len(files)
            file.write(ffi.buffer(files))
            plan.extents, plan.n_extents = file.tell(), len(extents)
            file.write(ffi.buffer(extents))
            plan.segments, plan.n_segments = file.tell(), len(segments)
            file.write(ffi.buffer(segments))
            file.write(bytes(-file.tell() % ALIGN))
            guard = compile_guard(dump.registry)
            plan.guard, plan.guard_size = file.tell(), len(guard)
            file.write(guard)
            del guard
            plan.head, plan.head_size = page_align(file.tell(), page_size), len(core.header)
            file.seek(plan.head)
            file.write(core.header)
            plan.plan_size = page_align(file.tell(), page_size)
            file.truncate(plan.plan_size)
            file.seek(0)
            file.write(ffi.buffer(plan))
        self._failed_at = ffi.offsetof("struct plan_tally", "failed")
        os.truncate(self._tally, max(self._failed_at + (self._firsts[-1] + _WORD - 1) // _WORD * 8, plan.layout))

    @staticmethod
    def _mappable(dump: Dump) -> list[Segment]:
        """What of memory can be mapped; the rest the server reads."""
        page_size = dump.registry.page_size
        found = dump.machine.to_map(dump.memory.segments)
        return [s for s in found if s.how != ABSENT and not s.offset % page_size]

    def _tables(self, page_size: int) -> tuple[CData, CData]:
        """The segments, and their files behind this plan's own."""
        segments = ffi.new("struct plan_segment[]", len(self._segments))
        index: dict[int, int] = {self.fd: 0}
        known = [(self.fd, *_numbers(self.fd))]
        self._firsts = list(accumulate((s.size // page_size for s in self._segments), initial=0))
        for c, s, first in zip(segments, self._segments, self._firsts, strict=False):
            if s.fd not in index:
                index[s.fd] = len(known)
                known.append((s.fd, *_mapped_as(s, page_size)))
            c.paddr, c.size, c.offset, c.file, c.first_page = s.paddr, s.size, s.offset, index[s.fd], first
        files = ffi.new("struct plan_file[]", len(known))
        for c, (fd, device, inode) in zip(files, known, strict=True):
            stands = os.fstat(fd)
            c.fd, c.dev, c.ino, c.maps_dev, c.maps_ino = fd, stands.st_dev, stands.st_ino, device, inode
        return segments, files

    def _in_place(self, segments: list[Segment], core: CoreFile | None) -> list[Segment]:
        """*segments*, those of the kernel's own vmcore where they are in that file now.

        It is open from here on until the command has ended, as it is for a collector of the kernel's own file. So no
        device dump can come in between where the kernel refuses it meanwhile (6.14+); where it does not,
        check_in_place() tells."""
        if core is None or not any(s.how == CORE for s in segments):
            return segments
        self._core = core.settled()
        fd, shift = self._core.fd, self._core.shift
        return [s._replace(fd=fd, offset=s.offset + shift) if s.how == CORE else s for s in segments]

    def account(self, dump: Dump) -> None:
        """Add what the library saw to what *dump* has read."""
        shift = dump.registry.page_size.bit_length() - 1
        self._end()
        tally = ffi.new("struct plan_tally *")
        ffi.buffer(tally)[:] = os.pread(self._tally, self._failed_at, 0)
        refused = [tally.refused[i] for i, _ in enumerate(dump.registry)]
        faults = chain(self._faults(dump.registry.page_size), self._cut(dump))
        dump.memory.account(tally.pages_shown << shift, refused, faults)

    def _failed(self) -> Iterator[Range]:
        """Numbers of the pages that failed when they were touched. Only what was written to of the file takes memory,
        and is looked at."""
        at = self._failed_at
        while True:
            try:
                start = max(os.lseek(self._tally, at, os.SEEK_DATA), self._failed_at)
            except OSError:  # nothing more
                return
            at = os.lseek(self._tally, start, os.SEEK_HOLE)
            words = array("Q", os.pread(self._tally, at - start, start))
            first, bits = (start - self._failed_at) * 8, len(words) * _WORD
            for run in PageSet(0, bits, words, bits, 1, 0).ranges(0, bits):
                yield Range(first + run.start, first + run.end)

    def _faults(self, page_size: int) -> Iterator[Fault]:
        """Of what was mapped, what was not there when it was touched."""
        for start, end in self._failed():
            while start < end:
                i = bisect_right(self._firsts, start) - 1
                segment, first = self._segments[i], self._firsts[i]
                stop = min(end, first + segment.size // page_size)
                at = segment.paddr + (start - first) * page_size
                yield Fault(Range(at, at + (stop - start) * page_size), errno.EFAULT)
                start = stop

    def _cut(self, dump: Dump) -> Iterator[Fault]:
        """Pages that a file ends in by now: what it lacks of them the kernel maps as zeros, without a signal."""
        page_size = dump.registry.page_size
        for s in self._segments:
            found = os.fstat(s.fd)
            inside = found.st_size - s.offset
            if stat.S_ISREG(found.st_mode) and 0 < inside < s.size and inside % page_size:
                at = s.paddr + inside // page_size * page_size
                if dump.registry.pfn_is_ram(at // page_size):
                    yield Fault(Range(at, at + page_size), errno.EFAULT)

    def check_in_place(self) -> None:
        """Raises Error if what the command has mapped of the kernel's own vmcore was not what it was taken for."""
        if self._core is not None and not lib.corefile_in_place(self._core):
            raise Error(
                f"{procvmcore.PATH}: a device dump was added to it while the command ran, and memory was shifted under "
                "its mappings: do not trust what it has read; run it again"
            )

    def _end(self) -> None:
        """Whoever is left of the collector gets an error from here on where a page fails, for nobody is told of it."""
        os.pwrite(self._tally, struct.pack("=Q", 1), ffi.offsetof("struct plan_tally", "ended"))

    def close(self) -> None:
        if len(self._fds) == 2:
            self._end()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        if self._core is not None:
            lib.corefile_rest(self._core)
