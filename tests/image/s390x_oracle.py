# SPDX-License-Identifier: LGPL-2.1-or-later
"""The header that an s390x capture kernel builds, worked out by the documented layouts alone: what the built one is
compared with (arch/s390/kernel/crash_dump.c, asm/lowcore.h, include/uapi/linux/elf.h; fs/proc/vmcore.c for offsets).
Shares nothing with the code under test."""

from __future__ import annotations

import struct
from typing import NamedTuple

PAGE = 4096
U64 = (1 << 64) - 1
Span = tuple[int, int]


def checksum(data: bytes) -> int:
    """CKSM with seed 0, word by word as the instruction goes: 32-bit additions, each carry added at the right."""
    total = 0
    for at in range(0, len(data), 4):
        total += int.from_bytes(data[at : at + 4].ljust(4, b"\0"), "big")
        if total > 0xFFFFFFFF:
            total = total - 0x100000000 + 1
    return total


def elf_note(name: bytes, kind: int, desc: bytes) -> bytes:
    out = bytearray(struct.pack(">III", len(name) + 1, len(desc), kind) + name + b"\0")
    for part in (b"", desc):
        out += part
        while len(out) % 4:
            out += b"\0"
    return bytes(out)


class Registers(NamedTuple):
    """One CPU's, each as its bytes lie in storage; *vector* has V0 to V31, None where there are none."""

    fprs: bytes
    gprs: bytes
    psw: bytes
    prefix: int
    fpc: bytes
    todpreg: bytes
    timer: bytes
    todcmp: bytes
    acrs: bytes
    ctrs: bytes
    vector: bytes | None

    def save_area(self) -> bytes:
        """512 bytes, as store-status leaves them from 0x1200 of a lowcore on; what is not defined there is marked."""
        area = bytearray(b"\xee" * 512)
        places = {0: self.fprs, 0x80: self.gprs, 0x100: self.psw, 0x118: struct.pack(">I", self.prefix)}
        places |= {0x11C: self.fpc, 0x124: self.todpreg, 0x128: self.timer, 0x130: self.todcmp}
        places |= {0x140: self.acrs, 0x180: self.ctrs}
        for at, data in places.items():
            area[at : at + len(data)] = data
        return bytes(area)

    def notes(self, number: int) -> bytes:
        status = struct.pack(">3i h2x QQ 4i 64x", 0, 0, 0, 0, 0, 0, number, 0, 0, 0)
        status += self.psw + self.gprs + self.acrs + struct.pack(">Qi4x", 0, 0)
        assert len(status) == 336
        out = elf_note(b"CORE", 1, status)
        out += elf_note(b"CORE", 2, self.fpc + b"\0\0\0\0" + self.fprs)
        out += elf_note(b"LINUX", 0x301, self.timer) + elf_note(b"LINUX", 0x302, self.todcmp)
        out += elf_note(b"LINUX", 0x303, self.todpreg) + elf_note(b"LINUX", 0x304, self.ctrs)
        out += elf_note(b"LINUX", 0x305, struct.pack(">I", self.prefix))
        if self.vector is not None:
            registers = [self.vector[at : at + 16] for at in range(0, 512, 16)]
            out += elf_note(b"LINUX", 0x30A, b"".join(registers[16:]))
            out += elf_note(b"LINUX", 0x309, b"".join(register[8:] for register in registers[:16]))
        return out


class Text(NamedTuple):
    """The kernel image's PT_LOAD."""

    vaddr: int
    paddr: int
    size: int


class Header(NamedTuple):
    """What a header says; bytes() of it is the header."""

    ranges: list[Span]
    text: Text | None
    identity_base: int
    cpus: list[Registers]
    vmcoreinfo: bytes | None
    note_align: int = 4

    def notes(self) -> bytes:
        out = elf_note(b"CORE", 3, b"\0R".ljust(40, b"\0") + b"vmlinux".ljust(96, b"\0"))
        for number, registers in enumerate(self.cpus):
            out += registers.notes(number + 1)
        if self.vmcoreinfo is not None:
            out += elf_note(b"VMCOREINFO", 0, self.vmcoreinfo)
        return out

    def __bytes__(self) -> bytes:
        notes = self.notes()
        loads = [self.text] if self.text else []
        loads += [Text((self.identity_base + a) & U64, a, b - a) for a, b in self.ranges]
        table = 64 + 56 * (1 + len(loads))
        table += -table % PAGE
        data_at = table + len(notes) + -len(notes) % PAGE
        out = b"\x7fELF\2\2\1" + bytes(9)
        out += struct.pack(">HHIQQQIHHHHHH", 4, 22, 1, 0, 64, 0, 0, 64, 56, 1 + len(loads), 0, 0, 0)
        out += struct.pack(">IIQQQQQQ", 4, 0, table, 0, 0, len(notes), len(notes), self.note_align)
        offset = data_at
        for vaddr, paddr, size in loads:
            offset += paddr % PAGE
            out += struct.pack(">IIQQQQQQ", 1, 7, offset, vaddr, paddr, size, size, PAGE)
            offset += size
            offset += -offset % PAGE
        return (out.ljust(table, b"\0") + notes).ljust(data_at, b"\0")
