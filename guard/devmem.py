# SPDX-License-Identifier: LGPL-2.1-or-later
"""/dev/mem as a source of old memory: mapped, never read(2).

read(2) of it ends at the capture kernel's own high_memory, while mmap(2) reaches whatever is not System RAM *of the
running kernel* (x86: arch/x86/mm/init.c:devmem_is_allowed() under CONFIG_STRICT_DEVMEM; the old machine's RAM is
not). Two things close it: lockdown refuses to open it, and an exclusive or busy line of /proc/iomem refuses the
mapping. "RAM buffer" is such a line: the kernel pads the end of its RAM with it up to the next 64 MiB border
(arch/x86/kernel/e820.c:ram_alignment()), and behind a crash region that is old memory."""

from __future__ import annotations

import errno
import mmap
import os
from typing import NamedTuple

from guard.errors import SourceError
from guard.physmem import MAX_FILE_SIZE, MMAP, Segment
from guard.ranges import Range, RangeSet

PATH = "/dev/mem"


class Opened(NamedTuple):
    fd: int
    segments: list[Segment]
    refused: list[tuple[Range, str]]  # what cannot be mapped, and the line that says why


def can_map(fd: int, paddr: int, page_size: int) -> int:
    """0 if the page at *paddr* can be mapped, else the errno. Maps it, does not touch it."""
    try:
        mmap.mmap(fd, page_size, mmap.MAP_SHARED, mmap.PROT_READ, offset=paddr).close()
    except OSError as e:
        return e.errno or errno.EIO
    return 0


def open_devmem(wanted: RangeSet, own: RangeSet, buffers: RangeSet, page_size: int = 4096, path: str = PATH) -> Opened:
    """Open /dev/mem for the old memory *wanted*.

    *own* is System RAM of the running kernel and *buffers* its "RAM buffer" lines (/proc/iomem): the first is never
    old memory, the second is but cannot be mapped without iomem=relaxed, which is tried. Raises SourceError if
    /dev/mem cannot be used at all; the message says why."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        hint = " (lockdown closes it)" if e.errno == errno.EPERM else ""
        raise SourceError(f"{path}: {e.strerror}{hint}") from None
    refused: list[tuple[Range, str]] = []
    wanted = (wanted - own).inner_pages(page_size)
    for piece in wanted & buffers.outer_pages(page_size):
        if can_map(fd, piece.start, page_size):
            why = (
                f'{path}: {piece} is a "RAM buffer" line of /proc/iomem and cannot be mapped; '
                "iomem=relaxed on the capture kernel's command line cures it"
            )
            refused.append((piece, why))
    ranges = wanted - RangeSet(piece for piece, _ in refused)
    for piece in ranges:
        if err := can_map(fd, piece.start, page_size) if piece.end <= MAX_FILE_SIZE else errno.EOVERFLOW:
            refused.append((piece, f"{path}: {piece} cannot be mapped: {os.strerror(err)}"))
    ranges -= RangeSet(piece for piece, _ in refused)
    if wanted and not ranges:
        os.close(fd)
        raise SourceError(f"{path}: nothing of {wanted.size:#x} bytes can be mapped: {refused[0][1]}")
    return Opened(fd, [Segment(r.start, r.size, fd, r.start, MMAP, path) for r in ranges], refused)
