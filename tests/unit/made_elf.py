# SPDX-License-Identifier: LGPL-2.1-or-later
"""A vmlinux for tests: an ELF file with a symbol table, the kernel's banner, its build ID, and BTF or no BTF."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

PROGBITS, SYMTAB, STRTAB, NOTE = 1, 2, 3, 7
ALLOC = 2


class Section(NamedTuple):
    name: str
    kind: int
    data: bytes
    flags: int = 0
    address: int = 0
    link: int = 0
    entry: int = 0


def build_id_note(build_id: str) -> bytes:
    """The .notes section of a kernel: a note of Xen's, and the build ID."""
    data = bytes.fromhex(build_id)
    return (
        struct.pack("<III4s8s", 4, 8, 7, b"Xen\0", b"xen-3.0\0")
        + struct.pack("<III4s", 4, len(data), 3, b"GNU\0")
        + data
    )


def symbol_sections(symbols: Iterable[tuple[str, str, int]], first: int) -> list[Section]:
    """.symtab and .strtab of *symbols*, by nm type letter, name and address; *first* is the number of the former."""
    strings, table = bytearray(b"\0"), bytearray(24)
    for letter, name, address in symbols:
        section = 0 if letter == "U" else 0xFFF1
        table += struct.pack("<IBBHQQ", len(strings), 0x11 if letter.isupper() else 0x01, 0, section, address, 0)
        strings += name.encode() + b"\0"
    return [
        Section(".symtab", SYMTAB, bytes(table), link=first + 1, entry=24),
        Section(".strtab", STRTAB, bytes(strings)),
    ]


def elf(sections: Iterable[Section], machine: int = 62) -> bytes:
    """An ELF64 LSB executable of nothing but these sections."""
    every = [Section("", 0, b""), *sections]
    names = bytearray()
    places = []
    for name in (*(s.name for s in every), ".shstrtab"):
        places.append(len(names))
        names += name.encode() + b"\0"
    every.append(Section(".shstrtab", STRTAB, bytes(names)))
    body, table = bytearray(64), b""
    for s, place in zip(every, places, strict=True):
        numbers = (place, s.kind, s.flags, s.address, len(body), len(s.data), s.link, 0, 1, s.entry)
        table += struct.pack("<IIQQQQIIQQ", *numbers)
        body += s.data
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    body[:64] = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, machine, 1, 0, 0, len(body), 0, 64, 0, 0, 64, len(every), len(every) - 1
    )
    return bytes(body) + table


def vmlinux(
    symbols: Iterable[tuple[str, str, int]],
    banner: tuple[int, bytes],
    notes: bytes = b"",
    btf: bytes = b"",
    more: Iterable[Section] = (),
) -> bytes:
    """A kernel's file: *symbols* as linked, the address and text of linux_banner, .notes, .BTF, and *more* sections."""
    at, text = banner
    sections = [
        Section(".rodata", PROGBITS, bytes(8) + text + b"\0" + bytes(8), ALLOC, at - 8),
        Section(".notes", NOTE, notes, ALLOC),
        *([Section(".BTF", PROGBITS, btf, ALLOC)] if btf else []),
        *more,
    ]
    return elf([*sections, *symbol_sections(symbols, len(sections) + 1)])
