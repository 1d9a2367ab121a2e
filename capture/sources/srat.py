# SPDX-License-Identifier: LGPL-2.1-or-later
"""ACPI System Resource Affinity Table: boot RAM by NUMA node, and the window where memory may be hot-plugged.

Layout: ACPI specification section 5.2.16, Linux include/acpi/actbl3.h. A 36-byte table header, 12 reserved bytes,
then subtables {u8 type, u8 length, ...}. QEMU describes the whole device-memory window (pc-dimm and virtio-mem) by
one entry that is enabled and hot-pluggable, so enabled does not mean that there is memory. Present only if NUMA is
configured."""

from __future__ import annotations

from struct import Struct

from . import files, report
from .report import Finding, Problems, SourceReport

_PATH = "sys/firmware/acpi/tables/SRAT"
_HEADER = Struct("<4sI")
_FIRST_SUBTABLE = 48
_MEMORY_AFFINITY = 1
_MEMORY = Struct("<BBIHQQIIQ")
_ENABLED, _HOT_PLUGGABLE, _NON_VOLATILE = 1, 2, 4


def read(root: str) -> SourceReport:
    """Findings: RAM, HOTPLUG_WINDOW and PERSISTENT ranges of the enabled memory affinity entries."""
    problems = Problems()
    path = files.under(root, _PATH)
    data = files.read_file(root, _PATH, files.MAX_TABLE, problems)
    findings, sound = ([], True) if data is None else parse(data, path, problems)
    return SourceReport("srat", path, tuple(findings), problems.lines(), data is not None, narrows_only=not sound)


def parse(data: bytes, path: str, problems: Problems) -> tuple[list[Finding], bool]:
    """The enabled memory affinity entries of a table, and whether its checksum is right; *path* names it in problems.
    A table that is not of the right signature and length is ignored as a whole; of one with a broken chain of
    subtables, those before the break are used. ACPI (5.2.6) would have a table ignored that fails its checksum, but
    what it does not call memory is still better not read."""
    findings: list[Finding] = []
    if len(data) < _FIRST_SUBTABLE:
        problems.add(f"{path}: has {len(data)} bytes, expected at least {_FIRST_SUBTABLE}; ignored")
        return findings, True
    signature, length = _HEADER.unpack_from(data)
    if signature != b"SRAT":
        problems.add(f"{path}: signature is {signature!r}, expected b'SRAT'; ignored")
        return findings, True
    if not _FIRST_SUBTABLE <= length <= len(data):
        problems.add(f"{path}: length at offset 4 is {length}, expected {_FIRST_SUBTABLE} to {len(data)}; ignored")
        return findings, True
    checksum = sum(memoryview(data)[:length]) & 0xFF
    if checksum:
        problems.add(
            f"{path}: bytes sum up to {checksum:#04x}, expected 0x00 (bad checksum); it may narrow what others call "
            "memory, and adds nothing"
        )
    offset = _FIRST_SUBTABLE
    while offset < length:
        size = data[offset + 1] if offset + 1 < length else 0
        if size < 2 or offset + size > length:
            problems.add(
                f"{path}: subtable at offset {offset} has length {size}, expected 2 to {length - offset}; "
                "it and the rest are ignored"
            )
            break
        if data[offset] == _MEMORY_AFFINITY:
            _memory_affinity(data, offset, size, path, findings, problems)
        offset += size
    return findings, not checksum


def _memory_affinity(
    data: bytes, offset: int, size: int, path: str, findings: list[Finding], problems: Problems
) -> None:
    where = f"{path}: memory affinity entry at offset {offset}"
    if size < _MEMORY.size:
        problems.add(f"{where}: has length {size}, expected {_MEMORY.size}; ignored")
        return
    _, _, proximity, _, base, length, _, flags, _ = _MEMORY.unpack_from(data, offset)
    if not flags & _ENABLED:
        return
    if flags & _NON_VOLATILE:
        kind = report.PERSISTENT
    elif flags & _HOT_PLUGGABLE:
        kind = report.HOTPLUG_WINDOW
    else:
        kind = report.RAM
    report.add_range(findings, problems, where, base, base + length, kind, f"proximity domain {proximity}")
