# SPDX-License-Identifier: LGPL-2.1-or-later
"""A dead s390x machine, made up: sparse images of its memory as the capture kernel's purgatory swapped it, and what the
capture kernel would make a header of. Works by the documented layouts alone (arch/s390/include/asm: lowcore.h,
os_info.h, setup.h) and shares nothing with the code under test."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.image.s390x_oracle import PAGE, Header, Registers, Span, Text, checksum, elf_note

MIB, GIB = 1 << 20, 1 << 30

MAGIC_AT, OLDMEM_BASE_AT, OLDMEM_SIZE_AT = 0x10008, 0x10418, 0x10420
NOTE_POINTER, OS_INFO_POINTER = 0xE0C, 0xE18
MCESAD, SAVE_AREA, LOWCORE_SIZE = 0x11B0, 0x1200, 0x2000
FIRST_FREE = 0x14000
"""Nothing is placed below: absolute lowcore and the boot parameter area are there."""
HEAD = 0x10000
"""From what KASLR counts from to the first byte of the kernel image."""


def merged(spans: Iterable[Span]) -> list[Span]:
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start == out[-1][1]:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def without(spans: Iterable[Span], hole: Span | None) -> list[Span]:
    if hole is None:
        return list(spans)
    pieces = [p for a, b in spans for p in ((a, min(b, hole[0])), (max(a, hole[1]), b))]
    return [p for p in pieces if p[0] < p[1]]


class Device(NamedTuple):
    """virtio-mem; *plugged* are block numbers."""

    addr: int
    blocks: int
    block_size: int
    plugged: frozenset[int]
    usable_blocks: int

    def sections(self, section: int) -> list[Span]:
        """The driver's loop (virtio_mem_vmcore_get_device_ram()): chunk by chunk, one STATE request for each."""
        chunk, found = max(section, self.block_size), list[Span]()
        at, end = self.addr, self.addr + self.usable_blocks * self.block_size
        while at < end:
            following = min((at // chunk + 1) * chunk, end)
            first, last = ((x - self.addr) // self.block_size for x in (at, following - 1))
            if any(block in self.plugged for block in range(first, last + 1)):
                found.append((at, following))
            at = following
        return merged(found)

    def runs(self) -> list[Span]:
        size = self.block_size
        return merged((self.addr + n * size, self.addr + n * size + size) for n in self.plugged)

    def document(self, image: str) -> dict[str, object]:
        runs = [[(a - self.addr) // self.block_size, (b - a) // self.block_size] for a, b in self.runs()]
        plugged = len(self.plugged) * self.block_size
        return {
            "addr": self.addr,
            "region_size": self.blocks * self.block_size,
            "usable_region_size": self.usable_blocks * self.block_size,
            "block_size": self.block_size,
            "plugged_size": plugged,
            "requested_size": plugged,
            "node_id": 0,
            "plugged": runs,
            "image": image,
            "offset": 0,
        }


class Cpu(NamedTuple):
    """*online*: it was started, so that its prefix register is its *lowcore*. *mcesa* has its vector registers."""

    lowcore: int
    registers: Registers
    mcesa: int


class S390xMachine:
    """Change what is to be different, lay() it out, spoil what lies there, write() it.

    All addresses are the dead machine's; :meth:`now` tells where a byte lies since the swap. *os_info*: "6.10" has all
    13 entries, "6.1" two, "" is none. *edit* changes the VMCOREINFO text, for all who know of it. *cpus* are CPU
    numbers, the first one that which entered the capture kernel; those in *offline* were never started."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.ram: list[Span] = [(0, 32 * MIB)]
        self.crash: Span | None = (20 * MIB, 24 * MIB)
        self.cpus: Sequence[int] = (0, 1)
        self.offline: Sequence[int] = ()
        self.possible = 4
        self.vector = True
        self.os_info = "6.10"
        self.identity_base = 0
        self.image = Text(0x3FFE0068000, 0x468000, 0x180000)
        self.lowcore_note = True
        self.os_info_vmcoreinfo = False
        self.release = "7.2.13-test"
        self.capture_release: str | None = "7.2.13-test"
        self.capture_os_info = "6.10"
        self.section_bits: int | None = None
        self.devices: list[Device] = []
        self.filler = 600
        self.edit: Callable[[bytes], bytes] = bytes
        self.pages: dict[int, bytearray] = {}
        self.used: list[Span] = []
        self.found: dict[int, Cpu] = {}
        self.at: dict[str, int] = {}
        self.text = b""

    def __repr__(self) -> str:
        return str({name: value for name, value in vars(self).items() if name not in ("pages", "text", "found")})

    def now(self, paddr: int) -> int:
        if self.crash is None:
            return paddr
        base, size = self.crash[0], self.crash[1] - self.crash[0]
        if base <= paddr < base + size:
            return paddr - base
        return paddr + base if paddr < size else paddr

    def put(self, paddr: int, data: bytes) -> None:
        while data:
            number, at = divmod(paddr, PAGE)
            piece, data = data[: PAGE - at], data[PAGE - at :]
            self.pages.setdefault(number, bytearray(PAGE))[at : at + len(piece)] = piece
            paddr += len(piece)

    def get(self, paddr: int, size: int) -> bytes:
        numbers = range(paddr // PAGE, (paddr + size - 1) // PAGE + 1)
        whole = b"".join(self.pages.get(number, bytes(PAGE)) for number in numbers)
        return whole[paddr % PAGE :][:size]

    def poke(self, paddr: int, value: int) -> None:
        self.put(paddr, struct.pack(">Q", value))

    def put_now(self, paddr: int, data: bytes) -> None:
        """Into the capture kernel's memory, within a page."""
        assert paddr % PAGE + len(data) <= PAGE
        self.put(self.now(paddr), data)

    def room(self, size: int, align: int) -> int:
        """Free memory anywhere in RAM, and now and then across the border of what was swapped."""
        ram = without(merged(self.ram), self.crash)
        for _ in range(1000):
            start, end = self.rng.choice(ram)
            at = self.rng.randrange(start, end)
            if self.crash and self.rng.random() < 0.3:
                at = self.crash[1] - self.crash[0] - self.rng.randrange(1, size + 1)
            at -= at % align
            if at < FIRST_FREE or not any(a <= at and at + size <= b for a, b in ram):
                continue
            if all(at + size <= a or b <= at for a, b in self.used):
                self.used.append((at, at + size))
                return at
        raise AssertionError("no room")

    def _registers(self, prefix: int) -> Registers:
        data = self.rng.randbytes
        control = int.from_bytes(data(8), "big") & ~(1 << 17) | self.vector << 17
        ctrs = struct.pack(">Q", control) + data(120)
        parts = (data(4), data(4), data(8), data(8), data(64), ctrs)
        return Registers(data(128), data(128), data(16), prefix, *parts, data(512) if self.vector else None)

    def lay(self) -> S390xMachine:
        """Write the dead kernel's records and the capture kernel's own."""
        vm = self.os_info == "6.10"
        if vm:
            self.used.append((self.image.paddr, self.image.paddr + self.image.size))
        for cpu in self.cpus:
            self._lay_cpu(cpu)
        array = self.room(8 * self.possible, 8)
        symbol = array
        if vm:
            symbol = self.image.vaddr + self.rng.randrange(0, self.image.size - 8 * self.possible, 8)
            array = self.image.paddr + symbol - self.image.vaddr
        self.at["lowcore_ptr"] = array
        base = self.identity_base if vm else 0
        pointers = [self.found[n].lowcore + base if n in self.found else 0 for n in range(self.possible)]
        self.put(array, struct.pack(f">{self.possible}Q", *pointers))
        self.text = self._vmcoreinfo(symbol, vm)
        if self.lowcore_note:
            # the pointer is to where the note was allocated; old kernels did not align it to a page
            self.at["note"] = self.room(24 + len(self.text) + 16, 4)
            self.put(self.at["note"], elf_note(b"VMCOREINFO", 0, self.text) + bytes(12))
        self.poke(NOTE_POINTER, self.at.get("note", 0))
        if self.os_info:
            self._lay_os_info(vm)
        self.poke(OS_INFO_POINTER, self.at.get("os_info", 0))
        self.put(MAGIC_AT, b"S390EP")
        if self.crash:
            self._lay_capture_kernel(self.crash)
        return self

    def _lay_cpu(self, number: int) -> None:
        first = not self.found
        lowcore = self.room(LOWCORE_SIZE, LOWCORE_SIZE)
        registers = self._registers(0 if number in self.offline else lowcore)
        mcesa = self.room(1024, 1024)
        self.put(mcesa, registers.vector or self.rng.randbytes(512))
        # the low bits say how long the area is (Principles of Operation, "Machine-Check Extended-Save-Area Address")
        used = self.vector or self.rng.random() < 0.5
        self.poke(lowcore + MCESAD, mcesa | self.rng.choice([0, 10, 11]) if used else 0)
        self.put(lowcore + SAVE_AREA, registers.save_area())
        if first:
            self.put(lowcore + SAVE_AREA, self.rng.randbytes(512))  # an older status: not to be used
            self.put(SAVE_AREA, registers.save_area())
        self.found[number] = Cpu(lowcore, registers, mcesa)

    def _vmcoreinfo(self, lowcore_ptr: int, vm: bool) -> bytes:
        lines = [f"OSRELEASE={self.release}", "PAGESIZE=4096", f"SYMBOL(lowcore_ptr)={lowcore_ptr:x}"]
        lines += [f"LENGTH(lowcore_ptr)={self.possible}", "X=" + "x" * self.filler]
        if vm:
            lines += [f"IDENTITYBASE={self.identity_base:x}", f"KERNELOFFSET={self.image.vaddr - HEAD:x}"]
            lines.append(f"KERNELOFFPHYS={self.image.paddr - HEAD:x}")
        return self.edit("".join(line + "\n" for line in [*lines, "CRASHTIME=1795350966"]).encode())

    def _lay_os_info(self, vm: bool) -> None:
        at = self.at["os_info"] = self.room(PAGE, PAGE)
        entries = [(0, 0, 0)] * 13
        if self.os_info_vmcoreinfo:
            data = self.at["vmcoreinfo"] = self.room(len(self.text), 1)
            self.put(data, self.text)
            entries[0] = (data, len(self.text), checksum(self.text))
        if vm:
            values = {4: self.identity_base, 5: self.image.vaddr - HEAD, 6: self.image.paddr - HEAD, 7: 0x37200000000}
            values |= {10: self.image.vaddr, 11: self.image.vaddr + self.image.size, 12: self.image.paddr}
            for i, value in values.items():
                entries[i] = (value, 0, 0)
        self.put(at, os_info_page(entries, self.crash))

    def seal(self) -> None:
        """The right checksum for os_info as it lies now."""
        at = self.at["os_info"]
        self.put(at + 8, struct.pack(">I", checksum(self.get(at + 12, PAGE - 12))))

    def poke_entry(self, index: int, value: int, size: int | None = None) -> None:
        """Another value in os_info's entry, with all checksums of the page right."""
        at = self.at["os_info"] + 32 + 20 * index
        self.poke(at, value)
        if size is not None:
            self.poke(at + 8, size)
        self.seal()

    def _lay_capture_kernel(self, crash: Span) -> None:
        self.put_now(MAGIC_AT, b"S390EP")
        self.put_now(OLDMEM_BASE_AT, struct.pack(">QQ", crash[0], crash[1] - crash[0]))
        self.put_now(NOTE_POINTER, bytes(8))
        if self.capture_release is not None:
            self.put_now(NOTE_POINTER, struct.pack(">Q", 0x14100))
            text = f"OSRELEASE={self.capture_release}\nPAGESIZE=4096\n"
            text += f"NUMBER(SECTION_SIZE_BITS)={self.section_bits}\n" if self.section_bits else ""
            self.put_now(0x14100, elf_note(b"VMCOREINFO", 0, text.encode()))
        self.put_now(OS_INFO_POINTER, struct.pack(">Q", 0x15000))
        values = [(0, 0, 0)] * 4 + [(v, 0, 0) for v in (0, 0x3FFE0000000, 0, 0, 0, 0, 0x3FFE0100000, 0x3FFE0200000, 0)]
        self.put_now(0x15000, os_info_page(values if self.capture_os_info == "6.10" else [(0, 0, 0)] * 2, None))

    def expected(self, layout: str = "kernel") -> Header:
        """The header as the capture kernel makes it, or with PT_LOADs cut by what is plugged. Of a capture kernel whose
        release is not to be had, its own os_info tells whether it is a new one or an old one."""
        release = re.match(r"(\d+)\.(\d+)", self.capture_release or "")
        guess = (99, 0) if self.capture_os_info == "6.10" else (0, 0)
        since = (int(release[1]), int(release[2])) if release else guess
        vm = self.os_info == "6.10" and since >= (6, 10)
        ranges = without(merged(self.ram), self.crash)
        if layout == "cut":
            ranges = merged([*ranges, *(run for device in self.devices for run in device.runs())])
        elif since >= (6, 14):
            ranges += [run for device in self.devices for run in device.sections(1 << (self.section_bits or 27))]
        return Header(
            ranges,
            self.image if vm else None,
            self.identity_base if vm else 0,
            [cpu.registers for cpu in self.found.values() if cpu.registers.prefix],
            self.text if self.lowcore_note or (self.os_info_vmcoreinfo and self.os_info) else None,
            4 if since >= (6, 5) else 0,
        )

    def document(self) -> dict[str, object]:
        ram, offset = list[dict[str, object]](), 0
        for start, end in self.ram:
            ram.append({"image": "ram.raw", "offset": offset, "paddr": start, "size": end - start})
            offset += end - start
        devices = [device.document(f"vm{i}.raw") for i, device in enumerate(self.devices)]
        return {"format": 1, "arch": "s390x", "ram": ram, "virtio_mem": devices}

    def write(self, folder: Path) -> Path:
        """machine.json and images; with one range of RAM from 0 on, ram.raw is all that there is to know."""
        files = [(start, end, "ram.raw") for start, end in self.ram]
        files += [(d.addr, d.addr + d.blocks * d.block_size, f"vm{i}.raw") for i, d in enumerate(self.devices)]
        lying = {self.now(number * PAGE): bytes(page) for number, page in self.pages.items()}
        sizes = dict.fromkeys((name for _, _, name in files), 0)
        for start, end, name in files:
            with (folder / name).open("r+b" if sizes[name] else "wb") as stream:
                stream.truncate(sizes[name] + end - start)
                for paddr, page in lying.items():
                    if start <= paddr < end:
                        stream.seek(sizes[name] + paddr - start)
                        stream.write(page)
            sizes[name] += end - start
        (folder / "machine.json").write_text(json.dumps(self.document()))
        return folder


def os_info_page(entries: Sequence[tuple[int, int, int]], crash: Span | None) -> bytes:
    start, end = crash or (0, 0)
    rest = struct.pack(">HHQQ", 1, 1, start, end - start) + b"".join(struct.pack(">QQI", *entry) for entry in entries)
    rest = rest.ljust(PAGE - 12, b"\0")
    return struct.pack(">QI", 0x4F53494E464F535A, checksum(rest)) + rest
