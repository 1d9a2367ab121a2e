# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dead kernel's VMCOREINFO note: ``KEY=value`` lines that tell where its own records are and how they are laid out.

Note layout: include/linux/vmcore_info.h and kernel/vmcore_info.c. The size of the text is that of the kernel's page, or
larger since 7.1, so only the note's own descsz counts."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from guard.errors import WitnessError
from guard.witness.memory import Memory, Problems

NOTE_NAME = b"VMCOREINFO\0"
HEADER_SIZE = 24
"""Bytes before the text: Elf64_Nhdr (12) and the name padded to 12."""
MAX_DESC = 1 << 20
"""Largest text accepted, in bytes; QEMU refuses notes of 1 MiB and more too."""

_HEXADECIMAL = ("KERNELOFFSET", "KERNELOFFPHYS", "IDENTITYBASE")
_U64 = 1 << 64
_MAX_LINES = 4096


class Vmcoreinfo:
    """Parsed VMCOREINFO. Never raises: a line that cannot be used is left out and told in :attr:`problems`.

    ``desc`` is the text as found, ``note`` the whole ELF note as it stands in memory (header, name, text, padding) and
    ``paddr`` the note's physical address in bytes, None if the text came from somewhere else."""

    __slots__ = ("_numbers", "_texts", "desc", "note", "paddr", "problems")

    def __init__(self, desc: bytes, note: bytes = b"", paddr: int | None = None) -> None:
        self.desc = desc
        self.note = note
        self.paddr = paddr
        self.problems = Problems(16)
        self._numbers: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        lines = desc.rstrip(b"\0").split(b"\n", _MAX_LINES)
        last = lines.pop()
        if len(lines) == _MAX_LINES and last:
            self._problem(f"more than {_MAX_LINES} lines, the rest is left out")
        elif last:
            self._problem(f"text ends without a newline, its last line {_shown(last)} is left out")
        for line in lines:
            if line:
                self._parse(line)

    def _problem(self, what: str) -> None:
        where = "" if self.paddr is None else f" at {self.paddr:#x}"
        self.problems.note(f"vmcoreinfo{where}: {what}")

    def _parse(self, line: bytes) -> None:
        raw_key, equals, raw_value = line.partition(b"=")
        try:
            key, value = raw_key.decode("ascii"), raw_value.decode("ascii")
        except UnicodeDecodeError:
            key = ""
        if not key or not equals or not key.isprintable() or not value.isprintable():
            self._problem(f"line {_shown(line)} is not KEY=value, left out")
            return
        if key in self._texts:
            if self._texts[key] != value:
                self._problem(f"{key} stands twice with different values, the first is used")
            return
        kind = key.partition("(")[0] if key.endswith(")") else ""
        try:
            if kind == "SYMBOL" or key in _HEXADECIMAL:
                self._numbers[key] = _number(value, 16, 0)
            elif kind in ("SIZE", "OFFSET", "LENGTH") or key in ("PAGESIZE", "CRASHTIME"):
                self._numbers[key] = _number(value, 10, 0)
            elif kind == "NUMBER":
                # The macro prints %ld, but many arch files print 0x%lx by hand.
                self._numbers[key] = _number(value, 16 if value.startswith("0x") else 10, -(_U64 >> 1))
        except ValueError:
            self._problem(f"{key} is {_shown(raw_value)}, not a 64-bit number, left out")
            return
        self._texts[key] = value

    def symbol(self, name: str) -> int | None:
        """SYMBOL(*name*): a virtual address of the dead kernel."""
        return self._numbers.get(f"SYMBOL({name})")

    def number(self, name: str) -> int | None:
        """NUMBER(*name*): may be negative."""
        return self._numbers.get(f"NUMBER({name})")

    def size(self, name: str) -> int | None:
        """SIZE(*name*) of a structure, in bytes."""
        return self._numbers.get(f"SIZE({name})")

    def offset(self, name: str) -> int | None:
        """OFFSET(*structure.field*), in bytes."""
        return self._numbers.get(f"OFFSET({name})")

    def length(self, name: str) -> int | None:
        """LENGTH(*name*) of an array, in items."""
        return self._numbers.get(f"LENGTH({name})")

    def address(self, key: str) -> int | None:
        """The value of a line like ``KERNELOFFSET=``: hexadecimal, in bytes."""
        return self._numbers.get(key) if key in _HEXADECIMAL else None

    def text(self, key: str) -> str | None:
        """The value of *key* as it is written, for example ``text("OSRELEASE")`` or ``text("BUILD-ID")``."""
        return self._texts.get(key)

    @property
    def texts(self) -> Mapping[str, str]:
        """All lines that can be used, as they are written, in their order."""
        return self._texts

    @property
    def page_size(self) -> int | None:
        """PAGESIZE in bytes; None unless it is a power of two between 4 KiB and 64 KiB."""
        size = self._numbers.get("PAGESIZE")
        return size if size in (0x1000, 0x2000, 0x4000, 0x8000, 0x10000) else None

    @property
    def crash_time(self) -> int | None:
        """CRASHTIME, seconds since 1970. Only a kernel that really took the crash path has written it."""
        return self._numbers.get("CRASHTIME")


def _number(text: str, base: int, lowest: int) -> int:
    # int() alone also takes "1_000", " 1" and "+1", and needs quadratic time for endless digits.
    digits = text.removeprefix("-").removeprefix("0x") if base == 16 else text.removeprefix("-")
    if not digits.isalnum() or len(digits) > 20:
        raise ValueError
    value = int(text, base)
    if not lowest <= value < _U64:
        raise ValueError
    return value


def _shown(raw: bytes) -> str:
    text = raw[:40].decode("ascii", "backslashreplace")
    return repr(text) + ("..." if len(raw) > 40 else "")


def note_of(desc: bytes) -> bytes:
    """The ELF note, little-endian, that has the text *desc*."""
    return struct.pack("<III", len(NOTE_NAME), len(desc), 0) + NOTE_NAME + bytes(1) + desc + bytes(-len(desc) % 4)


def note_at(mem: Memory, paddr: int, limit: int = HEADER_SIZE + MAX_DESC, byteorder: str = "<") -> Vmcoreinfo:
    """The VMCOREINFO note at physical address *paddr*; *limit* bounds the whole note in bytes.

    Raises WitnessError if no plausible note stands there, ReadError if it cannot be read."""
    head = mem.read(paddr, 12)
    namesz, descsz, kind = struct.unpack(byteorder + "III", head)
    if (namesz, kind) != (len(NOTE_NAME), 0):
        raise WitnessError(f"vmcoreinfo at {paddr:#x}: namesz {namesz} and type {kind} where 11 and 0 were expected")
    size = HEADER_SIZE + ((descsz + 3) & ~3)
    if not descsz or descsz > MAX_DESC or size > limit:
        room = min(limit - HEADER_SIZE, MAX_DESC)
        raise WitnessError(f"vmcoreinfo at {paddr:#x}: descsz {descsz} where 1 to {room} was expected")
    note = mem.read(paddr, size)
    if note[:12] != head:
        raise WitnessError(f"vmcoreinfo at {paddr:#x}: its header changed while it was read")
    if note[12:23] != NOTE_NAME:
        raise WitnessError(f"vmcoreinfo at {paddr:#x}: name {note[12:23]!r} where VMCOREINFO was expected")
    return Vmcoreinfo(note[HEADER_SIZE : HEADER_SIZE + descsz], note, paddr)
