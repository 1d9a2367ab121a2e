# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `oldmem map` makes of a recorded machine, and firmware's tables as machines in the field have them.

SMBIOS structures: DSP0134, sections 7.17 (memory array) and 7.20 (its mapped address); from 4 TiB on addresses stand in
64-bit fields."""

from __future__ import annotations

import contextlib
import io
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from capture import cli
from guard.ranges import RangeSet
from tests.image.field import DMI, Field, Span

SYSTEM_MEMORY, VIDEO, FLASH, CACHE = 3, 4, 5, 7
"""Uses of a memory array."""


class Answer(NamedTuple):
    """Exit status; what may be read and some image shows; all lines of the console without prefix."""

    status: int
    readable: RangeSet
    warnings: list[str]
    document: dict[str, Any]

    @property
    def lost(self) -> RangeSet:
        """What the console says is lost."""
        spans = []
        for line in self.warnings:
            if " is lost: " in line:
                first, last = line.split(" ")[0].split("-")
                spans.append((int(first, 16), int(last, 16) + 1))
        return RangeSet(spans)

    def says(self, *words: str) -> bool:
        """Is there a line with all of these words?"""
        return any(all(word in line for word in words) for line in self.warnings)


def look(folder: Path, *arguments: str) -> Answer:
    """`oldmem map` of the machine in *folder*, in this process: whatever it raises fails the test."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run(["map", "--json", "--machine", str(folder), *arguments])
        out.flush()
    text = out.buffer.getvalue()
    document: dict[str, Any] = json.loads(text) if text else {"entries": []}
    found = RangeSet((e["start"], e["end"]) for e in document["entries"] if not e["refused_by"] and e["shown"])
    prefixes = ("oldmem: warning: ", "oldmem: ")
    lines = []
    for line in err.getvalue().splitlines():
        prefix = next(p for p in prefixes if line.startswith(p))
        lines.append(line.removeprefix(prefix))
    return Answer(status, found, lines, document)


def type_19(spans: Iterable[Span], array: int = 0x1000) -> bytes:
    """A mapped address of *array* for each range."""
    data = b""
    for i, (start, end) in enumerate(spans):
        last = end - 1
        if last >> 10 < 0xFFFFFFFF:
            data += struct.pack("<BBHIIHBQQ", 19, 31, 0x1300 + i, start >> 10, last >> 10, array, 1, 0, 0)
        else:
            data += struct.pack("<BBHIIHBQQ", 19, 31, 0x1300 + i, 0xFFFFFFFF, 0xFFFFFFFF, array, 1, start, last)
        data += b"\0\0"
    return data


def type_16(handle: int, use: int) -> bytes:
    """A memory array of that use."""
    return struct.pack("<BBHBBBIHHQ", 16, 23, handle, 3, use, 3, 0x80000000, 0xFFFE, 1, 0) + b"\0\0"


END_OF_TABLE = struct.pack("<BBH", 127, 4, 0x7F00) + b"\0\0"


def put_smbios(machine: Field, spans: Iterable[Span]) -> None:
    """System memory at these ranges."""
    machine.drop(DMI)
    machine.put(DMI + "/tables/DMI", type_16(0x1000, SYSTEM_MEMORY) + type_19(spans) + END_OF_TABLE)
