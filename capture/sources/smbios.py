# SPDX-License-Identifier: LGPL-2.1-or-later
"""SMBIOS type 19, memory array mapped address: which physical ranges boot RAM answers at; and type 16, physical memory
array: whether the array behind such a range is system memory at all, or flash, video memory and such.

Layout: SMBIOS specification (DSP0134) sections 7.20 and 7.17. Addresses are in KiB, both ends rounded outwards by the
firmware; from 4 TiB on the 32-bit fields hold 0xFFFFFFFF and 64-bit fields in bytes follow. QEMU makes one structure
per RAM entry of its boot map. Read from the whole table that the kernel shows, or else structure by structure as the
dmi-sysfs module does."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from struct import Struct

from . import files, report
from .report import Finding, Problems, SourceReport

_TABLE = "sys/firmware/dmi/tables/DMI"
_ENTRIES = "sys/firmware/dmi/entries"
_HEADER = Struct("<BBH")
_MEMORY_ARRAY = 16
_MAPPED_ADDRESS = 19
_END_OF_TABLE = 127
_KIB = Struct("<II")
_HANDLE = Struct("<H")
_BYTES = Struct("<QQ")
_ARRAY_HANDLE = 0x0C
_SHORT, _EXTENDED = 0x0F, 0x1F
_IN_EXTENDED_FIELDS = 0xFFFFFFFF
_USE = 5
_UNKNOWN_USE, _SYSTEM_MEMORY = 2, 3


class _Structures:
    """What the structures of the types looked for say: *arrays* (handle, use), *mapped* (range, handle of its
    array, where it stands)."""

    def __init__(self) -> None:
        self.arrays: list[tuple[int, int]] = []
        self.mapped: list[tuple[Finding, int, str]] = []


def read(root: str) -> SourceReport:
    """Findings: one range per type 19 structure, of kind RAM or OTHER_MEMORY; see :func:`parse`."""
    problems = Problems()
    path = files.under(root, _TABLE)
    data = files.read_file(root, _TABLE, files.MAX_TABLE, problems)
    if data is not None:
        return SourceReport("smbios", path, tuple(parse(data, path, problems)), problems.lines(), available=True)
    found = _Structures()
    mapped = files.numbered(root, _ENTRIES, f"{_MAPPED_ADDRESS}-", problems)
    arrays = files.numbered(root, _ENTRIES, f"{_MEMORY_ARRAY}-", problems) if mapped else None
    for kind, instances in ((_MEMORY_ARRAY, arrays), (_MAPPED_ADDRESS, mapped)):
        for instance in instances or ():
            name = f"{_ENTRIES}/{kind}-{instance}/raw"
            raw = files.read_file(root, name, files.MAX_TABLE, problems)
            if raw is not None:
                _collect(raw, files.under(root, name), found, problems)
    if mapped is not None:
        path = files.under(root, _ENTRIES)
    return SourceReport("smbios", path, tuple(_findings(found, problems)), problems.lines(), mapped is not None)


def parse(data: bytes, path: str, problems: Problems) -> list[Finding]:
    """The type 19 ranges in a run of structures; *path* names it in problems. Structures behind a broken one are
    ignored.

    RAM is every range but those of an array whose use is told not to be system memory; a range that leads to no array
    is believed. The others are OTHER_MEMORY, which takes RAM away (SourceReport.ram()), but only where that is what
    firmware means: flash below 4 GiB inside a range that runs from 0 to the end of memory, as if there were no hole.
    One that is the same as a system memory range, encloses it or overlaps its border contradicts it; then it is RAM,
    for to lose it would cost more than to believe it."""
    found = _Structures()
    _collect(data, path, found, problems)
    return _findings(found, problems)


def _findings(found: _Structures, problems: Problems) -> list[Finding]:
    system = {handle for handle, use in found.arrays if use == _SYSTEM_MEMORY}
    if not system:
        # Every machine has an array of system memory (DSP0134, section 6.2): here firmware does not tell which it is.
        system = {handle for handle, use in found.arrays if use == _UNKNOWN_USE}
    other = {handle for handle, _ in found.arrays} - system
    ram = [finding for finding, array, _ in found.mapped if array not in other]
    spans = {(f.start, f.end) for f in ram}
    starts, ends = sorted(start for start, _ in spans), sorted(end for _, end in spans)
    findings = []
    for finding, array, where in found.mapped:
        start, end = finding.start, finding.end
        if array not in other:
            findings.append(finding)
        elif (start, end) in spans or _any_between(starts, start, end) or _any_between(ends, start, end):
            problems.add(
                f"{where}: array {array:#06x} is no system memory, another one that is has the same range; ignored"
            )
        else:
            findings.append(finding._replace(kind=report.OTHER_MEMORY))
    return findings


def _any_between(ascending: list[int], start: int, end: int) -> bool:
    """Is any of the numbers above *start* and below *end*?"""
    return bisect_right(ascending, start) < bisect_left(ascending, end)


def _collect(data: bytes, path: str, found: _Structures, problems: Problems) -> None:
    offset = 0
    while offset < len(data):
        left = len(data) - offset
        if left < _HEADER.size:
            problems.add(f"{path}: {left} bytes left at offset {offset}, expected at least {_HEADER.size}; ignored")
            break
        kind, length, handle = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= length <= left:
            problems.add(
                f"{path}: structure at offset {offset} has length {length}, expected {_HEADER.size} to {left}; "
                "it and the rest are ignored"
            )
            break
        if kind == _MAPPED_ADDRESS:
            where = f"{path}: type 19 structure at offset {offset}"
            _mapped_address(data[offset : offset + length], handle, where, found, problems)
        elif kind == _MEMORY_ARRAY and length > _USE:
            found.arrays.append((handle, data[offset + _USE]))
        if kind == _END_OF_TABLE:
            break
        strings_end = data.find(b"\0\0", offset + length)
        if strings_end < 0:
            problems.add(f"{path}: strings of the structure at offset {offset} do not end; the rest is ignored")
            break
        offset = strings_end + 2


def _mapped_address(structure: bytes, handle: int, where: str, found: _Structures, problems: Problems) -> None:
    if len(structure) < _SHORT:
        problems.add(f"{where}: has length {len(structure)}, expected at least {_SHORT}; ignored")
        return
    first, last = _KIB.unpack_from(structure, 4)
    if first != _IN_EXTENDED_FIELDS:
        start, end = first << 10, (last + 1) << 10
    elif len(structure) >= _EXTENDED:
        start, last_byte = _BYTES.unpack_from(structure, 15)
        end = last_byte + 1
    else:
        problems.add(
            f"{where}: addresses are in the extended fields, but its length is {len(structure)}, "
            f"expected {_EXTENDED}; ignored"
        )
        return
    (array,) = _HANDLE.unpack_from(structure, _ARRAY_HANDLE)
    findings: list[Finding] = []
    report.add_range(findings, problems, where, start, end, report.RAM, f"handle {handle:#06x}")
    found.mapped += [(finding, array, where) for finding in findings]
