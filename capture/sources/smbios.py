# SPDX-License-Identifier: LGPL-2.1-or-later
"""SMBIOS type 19, memory array mapped address: which physical ranges boot RAM answers at.

Layout: SMBIOS specification (DSP0134) section 7.20. Addresses are in KiB, both ends rounded outwards by the firmware;
from 4 TiB on the 32-bit fields hold 0xFFFFFFFF and 64-bit fields in bytes follow. QEMU makes one structure per RAM
entry of its boot map. Read from the whole table that the kernel shows, or else structure by structure as the
dmi-sysfs module does."""

from __future__ import annotations

from struct import Struct

from . import files, report
from .report import Finding, Problems, SourceReport

_TABLE = "sys/firmware/dmi/tables/DMI"
_ENTRIES = "sys/firmware/dmi/entries"
_HEADER = Struct("<BBH")
_MAPPED_ADDRESS = 19
_END_OF_TABLE = 127
_KIB = Struct("<II")
_BYTES = Struct("<QQ")
_SHORT, _EXTENDED = 0x0F, 0x1F
_IN_EXTENDED_FIELDS = 0xFFFFFFFF


def read(root: str) -> SourceReport:
    """Findings: one RAM range per type 19 structure."""
    problems = Problems()
    path = files.under(root, _TABLE)
    data = files.read_file(root, _TABLE, files.MAX_TABLE, problems)
    if data is not None:
        return SourceReport("smbios", path, tuple(parse(data, path, problems)), problems.lines(), available=True)
    prefix = f"{_MAPPED_ADDRESS}-"
    instances = files.numbered(root, _ENTRIES, prefix, problems)
    findings: list[Finding] = []
    for instance in instances or ():
        name = f"{_ENTRIES}/{prefix}{instance}/raw"
        raw = files.read_file(root, name, files.MAX_TABLE, problems)
        if raw is not None:
            findings += parse(raw, files.under(root, name), problems)
    if instances is not None:
        path = files.under(root, _ENTRIES)
    return SourceReport("smbios", path, tuple(findings), problems.lines(), instances is not None)


def parse(data: bytes, path: str, problems: Problems) -> list[Finding]:
    """The type 19 ranges in a run of structures; *path* names it in problems. Structures behind a broken one are
    ignored."""
    findings: list[Finding] = []
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
            _mapped_address(data[offset : offset + length], handle, where, findings, problems)
        if kind == _END_OF_TABLE:
            break
        strings_end = data.find(b"\0\0", offset + length)
        if strings_end < 0:
            problems.add(f"{path}: strings of the structure at offset {offset} do not end; the rest is ignored")
            break
        offset = strings_end + 2
    return findings


def _mapped_address(structure: bytes, handle: int, where: str, findings: list[Finding], problems: Problems) -> None:
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
    report.add_range(findings, problems, where, start, end, report.RAM, f"handle {handle:#06x}")
