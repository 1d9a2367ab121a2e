# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of a recorded machine: copies of what the sources read of /sys and /proc (capture/sources/files.py), but
for what says whose machine it is.

Serial numbers, asset tags and UUIDs are in the SMBIOS table (DSP0134, section 6.1.3 and chapter 7): of its structures,
those on memory are kept, of all others the header alone, and no string of any. Dots stand for what is left out, so that
structures stay where they are, and messages on them what they are."""

from __future__ import annotations

import os
from struct import Struct

from capture.sources.files import Seen

_DMI = "sys/firmware/dmi/"
_HEADER = Struct("<BBH")
# Physical memory array, memory device, the addresses of both
_KEPT = (16, 17, 19, 20)
_END = 127
_DOTS = b"\0" + b"." * 255

MAX_FILE = 1 << 20
FOR_PEOPLE = ("proc/version",)
"""What no source reads, and who looks at a record wants to know first."""


def write(folder: str, root: str, seen: Seen) -> int:
    """Write *seen* into *folder*, and of the files below *root* those FOR_PEOPLE; returns how many files there are."""
    files = dict(seen)
    for name in FOR_PEOPLE:
        found = _read(os.path.join(root, name))
        if found is not None:
            files[name] = found
    os.makedirs(folder, exist_ok=True)
    count = 0
    for name, data in files.items():
        path = os.path.join(folder, name)
        if data is None:
            os.makedirs(path, exist_ok=True)
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            if isinstance(data, int):
                file.truncate(data)
                continue
            file.write(nameless(data) if name.startswith(_DMI) else data)
            count += 1
    return count


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_FILE)
    except OSError:
        return None


def nameless(table: bytes) -> bytes:
    """The SMBIOS structures *table*, as long as before, with dots for all but NULs, headers, and what is on memory."""
    out = bytearray(table.translate(_DOTS))
    at = 0
    while at + _HEADER.size <= len(table):
        kind, length, _ = _HEADER.unpack_from(table, at)
        end = at + max(_HEADER.size, length if kind in _KEPT else 0)
        out[at:end] = table[at:end]
        strings_end = table.find(b"\0\0", at + length)
        if length < _HEADER.size or kind == _END or strings_end < 0:
            break
        at = strings_end + 2
    return bytes(out)
