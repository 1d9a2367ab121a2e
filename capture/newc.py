# SPDX-License-Identifier: LGPL-2.1-or-later
"""The "newc" cpio format that the kernel unpacks as its initramfs
(Documentation/driver-api/early-userspace/buffer-format.rst).

Written without root and without touching a file system: device nodes are only headers. Output depends on the entries
alone: sorted by path, owner 0:0, mtime 0, inode numbers counted from 1."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import NamedTuple

from guard.errors import Error

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
BLOCK = 512
"""Archives are padded to this many bytes, as the cpio tool does; concatenated archives stay aligned."""


class Entry(NamedTuple):
    """One member: *path* without leading slash, *mode* with the file type bits, *data* the bytes of a file or the
    target of a symbolic link, *rdev* the (major, minor) of a device node."""

    path: str
    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)


def _pad4(size: int) -> bytes:
    return bytes(-size % 4)


def member(ino: int, entry: Entry, linked: bool = False) -> bytes:
    """The bytes of one entry. *linked*: other members with the same *ino* are the same file; the first of them has its
    data. Raises Error for a file that is too large for the format."""
    name = entry.path.encode("utf-8", "surrogateescape") + b"\0"
    if len(entry.data) > 0xFFFFFFFF:
        raise Error(f"{entry.path}: {len(entry.data)} bytes do not fit the cpio format, whose size field ends at 4 GiB")
    nlink = 2 if linked or stat.S_ISDIR(entry.mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (ino, entry.mode, 0, 0, nlink, 0, len(entry.data), 0, 0, *entry.rdev, len(name), 0)
    header = MAGIC + b"".join(b"%08X" % field for field in fields)
    return b"".join((header, name, _pad4(len(header) + len(name)), entry.data, _pad4(len(entry.data))))


def trailer(size: int) -> bytes:
    """What ends an archive of *size* bytes."""
    last = member(0, Entry(TRAILER, 0))
    return last + bytes(-(size + len(last)) % BLOCK)


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of *entries*, in path order, so that every folder precedes what is in it.

    Raises Error when a path comes twice, is empty or absolute, or when a file is too large for the format."""
    parts: list[bytes] = []
    last = ""
    for ino, entry in enumerate(sorted(entries), start=1):
        if not entry.path or entry.path.startswith("/") or "\0" in entry.path or entry.path == TRAILER:
            raise Error(f"{entry.path!r}: not a usable path in a cpio archive")
        if entry.path == last:
            raise Error(f"{entry.path}: twice in the archive")
        last = entry.path
        parts.append(member(ino, entry))
    parts.append(trailer(sum(map(len, parts))))
    return b"".join(parts)
