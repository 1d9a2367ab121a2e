# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's memory as the host sees it: which file and offset holds which physical addresses, and which bytes of a
file are populated (lseek(2), SEEK_DATA and SEEK_HOLE)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from guard.ranges import RangeSet

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30


class Device(NamedTuple):
    """A virtio-mem device to give to a guest; sizes in bytes."""

    name: str
    size: int
    requested: int = 0
    block_size: int = 2 * MiB


class Dimm(NamedTuple):
    """A memory module with a slot in a guest that :meth:`Guest.plug` puts it into; bytes."""

    name: str
    size: int


class Plugged(NamedTuple):
    """What QEMU knows of a virtio-mem device (query-memory-devices): first physical address of its region, bytes
    plugged, bytes requested, bytes at most, bytes per block."""

    memaddr: int
    size: int
    requested: int
    max_size: int
    block_size: int


class RamFile(NamedTuple):
    """*size* bytes at *offset* of *path* are the guest's memory from physical address *paddr*."""

    name: str
    path: Path
    offset: int
    paddr: int
    size: int


def extents(path: Path) -> RangeSet:
    """The populated bytes of *path*, as file offsets."""
    found: list[tuple[int, int]] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        end = os.fstat(fd).st_size
        hole = 0
        while hole < end:
            try:
                data = os.lseek(fd, hole, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole up to the end
                break
            hole = os.lseek(fd, data, os.SEEK_HOLE)
            found.append((data, hole))
    finally:
        os.close(fd)
    return RangeSet(found)


def allocated(path: Path) -> int:
    """Bytes of host memory behind *path*."""
    return os.stat(path).st_blocks * 512
