# SPDX-License-Identifier: LGPL-2.1-or-later
"""/sys/firmware/memmap/N/{start,end,type}: the memory map that the running kernel was given at boot (x86).

Layout: Linux drivers/firmware/memmap.c, types by their names (sources/e820.py); ends are inclusive. A
capture kernel is given a map cut down to its own memory, so RAM here is the machine's RAM only in a recording of the
crashed kernel; the Reserved entries of the crashed kernel survive."""

from __future__ import annotations

from . import e820, files, report
from .report import Finding, Problems, SourceReport

_FOLDER = "sys/firmware/memmap"


def read(root: str) -> SourceReport:
    """Findings: every entry of the map by its type; a type that no kernel is known to print is of kind UNKNOWN."""
    problems = Problems()
    path = files.under(root, _FOLDER)
    numbers = files.numbered(root, _FOLDER, "", problems)
    findings: list[Finding] = []
    for number in numbers or ():
        entry = f"{_FOLDER}/{number}"
        first = files.read_hexadecimal(root, f"{entry}/start", problems)
        last = files.read_hexadecimal(root, f"{entry}/end", problems)
        name = files.read_line(root, f"{entry}/type", problems)
        if first is None or last is None or name is None:
            continue
        kind = e820.BY_NAME.get(name, report.UNKNOWN)
        where = files.under(root, entry)
        report.add_range(findings, problems, where, first, last + 1, kind, f"entry {number}: {report.shown(name)}")
    return SourceReport("firmware_memmap", path, tuple(findings), problems.lines(), numbers is not None)
