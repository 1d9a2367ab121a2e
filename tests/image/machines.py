# SPDX-License-Identifier: LGPL-2.1-or-later
"""A recorded machine, made up: sparse images with a small dead kernel in them, the /sys and /proc files that its
capture environment would show, and what a right dump of it must hold, worked out without the code under test."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guard.witness.resources import BUSY, EXCLUSIVE, SYSTEM_RAM
from tests.pace import patience
from tests.unit.witness_memory import OFFLINE_PAGE, PRSTATUS, DyingKernel, vmcoreinfo_note

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4096
SECTION_BITS = 27
PRESENT, HAS_MEM_MAP, ONLINE = 1, 2, 4
Span = tuple[int, int]

LOW = (0, 2 * GIB)
HIGH = (4 * GIB, 8 * GIB)
BOOT = [(0, 639 * KIB), (1 * MIB, 2 * GIB - 128 * KIB), HIGH]
RESERVED = [(639 * KIB, 640 * KIB), (960 * KIB, 1 * MIB), (2 * GIB - 128 * KIB, 2 * GIB)]
CRASH = (0x60000000, 0x6C000000)
OWN = [(0x1000, 639 * KIB), (CRASH[0], CRASH[1] - 64 * KIB)]
DEVICE = (16 * GIB, 16 * GIB + 512 * MIB)
WINDOW = (16 * GIB, 32 * GIB)
BLOCK = 2 * MIB
PLUGGED = [(0, 64), (70, 1), (80, 26), (200, 40)]
STALE = 128 * MIB
"""How much of the device was plugged when the crash kernel was loaded."""

VMCOREINFO_AT = 0x11000000
POISON = b"POISON!!"

RAM_TREE = SYSTEM_RAM | BUSY


def plugged_spans(runs: Iterable[Span] = PLUGGED) -> list[Span]:
    return [(DEVICE[0] + first * BLOCK, DEVICE[0] + (first + count) * BLOCK) for first, count in runs]


def minus(spans: Iterable[Span], taken: Iterable[Span]) -> list[Span]:
    """The plainest way to cut: one cut at a time."""
    left = list(spans)
    for start, end in taken:
        left = [piece for a, b in left for piece in ((a, min(b, start)), (max(a, end), b)) if piece[0] < piece[1]]
    return sorted(left)


SMALL = [(0x2000000, 0x7000000), (0x10000000, 0x12000000), (HIGH[0], HIGH[0] + 16 * MIB)]
"""Boot RAM of a machine that was shrunk, without the first MiB: little more than its kernel."""

READABLE = minus([*BOOT, *plugged_spans()], [(0, MIB), CRASH])
"""What a right dump reads of the machine as it is built by default."""


class Phdr(NamedTuple):
    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


def phdrs_of(data: bytes) -> list[Phdr]:
    """Program headers of an ELF64 LSB file, read by nothing but its specification."""
    (phoff,) = struct.unpack_from("<Q", data, 32)
    (phnum,) = struct.unpack_from("<H", data, 56)
    if phnum == 0xFFFF:
        (shoff,) = struct.unpack_from("<Q", data, 40)
        (phnum,) = struct.unpack_from("<I", data, shoff + 44)
    return [Phdr(*struct.unpack_from("<IIQQQQQQ", data, phoff + 56 * i)) for i in range(phnum)]


def device_load(vmcore: Path) -> Phdr:
    """The PT_LOAD of the virtio-mem device that a RecordedKernel has."""
    with open(vmcore, "rb") as file:
        (device,) = [p for p in phdrs_of(file.read(1 << 16)) if p.paddr == DEVICE[0]]
    return device


def copied(machine: Path, to: Path) -> Path:
    """A copy of a machine's folder, to be changed; images have their holes there too."""
    subprocess.run(["cp", "-r", "--sparse=always", machine, to], check=True, timeout=patience(60))
    return to


def vmcore_header(loads: Sequence[Span], notes: bytes = b"", vaddr: int = 0xFFFF888000000000) -> bytes:
    """What /proc/vmcore starts with for these ranges, in the kernel's own layout."""
    head = (64 + 56 * (len(loads) + 1) + PAGE - 1) // PAGE * PAGE
    offset = head + (len(notes) + PAGE - 1) // PAGE * PAGE
    data = bytearray(offset)
    struct.pack_into(
        "<16sHHIQQQIHHHHHH", data, 0, b"\x7fELF\2\1\1", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(loads) + 1, 0, 0, 0
    )
    struct.pack_into("<IIQQQQQQ", data, 64, 4, 0, head, 0, 0, len(notes), len(notes), 4)
    data[head : head + len(notes)] = notes
    for i, (start, end) in enumerate(loads):
        inside = start % PAGE
        struct.pack_into(
            "<IIQQQQQQ",
            data,
            64 + 56 * (i + 1),
            1,
            7,
            offset + inside,
            vaddr + start,
            start,
            end - start,
            end - start,
            0,
        )
        offset += (end + PAGE - 1) // PAGE * PAGE - start // PAGE * PAGE
    return bytes(data)


def srat(entries: Iterable[tuple[int, int, int]]) -> bytes:
    """An SRAT with memory affinity entries (start, end, flags)."""
    body = b"".join(struct.pack("<BBIHQQIIQ", 1, 40, 0, 0, a, b - a, 0, flags, 0) for a, b, flags in entries)
    table = bytearray(struct.pack("<4sIBB", b"SRAT", 48 + len(body), 3, 0).ljust(48, b"\0") + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def smbios(spans: Iterable[Span]) -> bytes:
    """A DMI table with a type 19 structure for each range."""
    data = b""
    for i, (start, end) in enumerate(spans):
        data += struct.pack("<BBHIIHBQQ", 19, 31, 0x1300 + i, start >> 10, (end - 1) >> 10, 0x1000, 1, 0, 0) + b"\0\0"
    return data + struct.pack("<BBH", 127, 4, 0x7F00) + b"\0\0"


class RecordedKernel:
    """A machine to be recorded. Change what is to be different, then write() it."""

    def __init__(self) -> None:
        self.kernel = DyingKernel()
        self.tree: list[tuple[int, int, str, int, list[object]]] = [
            (0x1000, 639 * KIB - 1, "System RAM", RAM_TREE, []),
            (
                1 * MIB,
                2 * GIB - 128 * KIB - 1,
                "System RAM",
                RAM_TREE,
                [(CRASH[0], CRASH[1] - 1, "Crash kernel", BUSY | 0x200, [])],
            ),
            (HIGH[0], HIGH[1] - 1, "System RAM", RAM_TREE, []),
            (
                DEVICE[0],
                DEVICE[1] - 1,
                "virtio0",
                SYSTEM_RAM | EXCLUSIVE,
                [(DEVICE[0], DEVICE[1] - 1, "System RAM (virtio_mem)", RAM_TREE, [])],
            ),
        ]
        self.notes: list[bytes | None] = [PRSTATUS, PRSTATUS]
        self.desc_tail = b"CRASHTIME=1760000000\n"
        self.plugged = list(PLUGGED)
        self.marked: dict[int, bytes] = {}
        """Struct pages from a pfn on that are not all zero."""
        self.offline_sections: set[int] = set()
        self.pages: dict[int, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.document: dict[str, Any] = {
            "format": 1,
            "arch": "x86_64",
            "capture_release": "6.12.107",
            "phdr_note_align": 4,
            "ram": [
                {"image": "ram.raw", "offset": 0, "paddr": LOW[0], "size": LOW[1] - LOW[0]},
                {"image": "ram.raw", "offset": LOW[1], "paddr": HIGH[0], "size": HIGH[1] - HIGH[0]},
            ],
            "root": "root",
            "virtio_mem": [
                {
                    "addr": DEVICE[0],
                    "region_size": DEVICE[1] - DEVICE[0],
                    "usable_region_size": DEVICE[1] - DEVICE[0],
                    "block_size": BLOCK,
                    "plugged_size": sum(count for _, count in PLUGGED) * BLOCK,
                    "requested_size": sum(count for _, count in PLUGGED) * BLOCK,
                    "node_id": 0,
                    "plugged": [list(run) for run in PLUGGED],
                    "image": "vm0.raw",
                    "offset": 0,
                }
            ],
        }
        self._root_files()

    def _root_files(self) -> None:
        e820 = [(a, b, 1) for a, b in BOOT] + [(a, b, 2) for a, b in RESERVED]
        self.put(
            "sys/firmware/qemu_fw_cfg/by_name/etc/e820/raw",
            b"".join(struct.pack("<QQI", a, b - a, t) for a, b, t in e820),
        )
        note = struct.pack("<HHIQ", 0, 1, 0x1024, VMCOREINFO_AT)
        self.put("sys/firmware/qemu_fw_cfg/by_name/etc/vmcoreinfo/raw", note)
        self.put("sys/firmware/acpi/tables/SRAT", srat([*((a, b, 1) for a, b in BOOT), (*WINDOW, 3)]))
        self.put("sys/firmware/dmi/tables/DMI", smbios(BOOT))
        memmap = [(a, b, "System RAM") for a, b in OWN] + [(a, b, "Reserved") for a, b in RESERVED]
        for i, (start, end, kind) in enumerate(sorted(memmap)):
            folder = f"sys/firmware/memmap/{i}"
            self.put(f"{folder}/start", f"{start:#x}\n".encode())
            self.put(f"{folder}/end", f"{end - 1:#x}\n".encode())
            self.put(f"{folder}/type", f"{kind}\n".encode())
        lines = [(a, b, "System RAM") for a, b in OWN] + [(a, b, "Reserved") for a, b in RESERVED]
        lines.append((CRASH[1], CRASH[1] + 64 * MIB - CRASH[1] % (64 * MIB), "RAM buffer"))
        text = "".join(f"{a:08x}-{b - 1:08x} : {name}\n" for a, b, name in sorted(lines) if a < b)
        self.put("proc/iomem", text.encode())
        self.put("proc/cmdline", b"root=/dev/vda elfcorehdr=0x6bff0000 console=ttyS0\n")
        self.put("sys/devices/system/memory/block_size_bytes", b"8000000\n")
        self.put_header(BOOT)

    def put(self, name: str, data: bytes) -> None:
        """A file below root."""
        self.files[name] = data

    def put_header(self, ram: Iterable[Span]) -> None:
        """The kernel's own header, prepared when less of the device was plugged."""
        stale = minus([*ram, (DEVICE[0], DEVICE[0] + STALE)], [(0, MIB), CRASH])
        self.put("proc/vmcore", vmcore_header(stale))

    def resize(self, ram: list[Span]) -> None:
        """Other boot RAM behind the first MiB, by firmware and by the kernel's tree."""
        boot = [(0, 639 * KIB), *ram]
        entries = b"".join(struct.pack("<QQI", a, b - a, 1) for a, b in boot)
        self.put("sys/firmware/qemu_fw_cfg/by_name/etc/e820/raw", entries)
        self.put("sys/firmware/acpi/tables/SRAT", srat([*((a, b, 1) for a, b in boot), (*WINDOW, 3)]))
        self.put("sys/firmware/dmi/tables/DMI", smbios(boot))
        self.tree[1:3] = [(a, b - 1, "System RAM", RAM_TREE, []) for a, b in ram]
        self.put_header(boot)

    def shrink(self) -> None:
        """So little RAM that reading all of it, holes too, is no matter. It has no room for a prepared header."""
        self.resize(SMALL)
        self.put("proc/cmdline", b"root=/dev/vda console=ttyS0\n")

    def finish_kernel(self) -> bytes:
        """Write the dead kernel's records; returns its vmcoreinfo text."""
        kernel = self.kernel
        kernel.iomem(self.tree)
        kernel.variable("crashk_res", kernel.resource(CRASH[0], CRASH[1] - 1, 0, BUSY | 0x200, 0, 0, 0))
        kernel.pointer("page_offset_base", kernel.page_offset)
        kernel.per_cpu_notes(self.notes, vmalloc=0xFFFFC90000000000)
        kernel.uts("6.12.0-test")
        numbers = self._ram_sections()
        kernel.sections({n: PRESENT | HAS_MEM_MAP | (0 if n in self.offline_sections else ONLINE) for n in numbers})
        devices = self.document.get("virtio_mem", [])
        plugged = plugged_spans(devices[0]["plugged"] if devices else self.plugged)
        unplugged = [at for at in range(*DEVICE, BLOCK) if not any(a <= at < b for a, b in plugged)]
        offline = {at // PAGE: OFFLINE_PAGE * (BLOCK // PAGE) for at in unplugged}
        kernel.memmap(numbers, offline | self.marked)
        desc = kernel.finish().desc + self.desc_tail
        self.put_note(desc)
        return desc

    def _ram_sections(self) -> list[int]:
        found: set[int] = set()
        todo = list(self.tree)
        while todo:
            start, end, name, _, children = todo.pop()
            todo.extend(children)  # type: ignore[arg-type]
            if name.startswith("System RAM") and end < 1 << 40:
                found.update(range(start >> SECTION_BITS, (end >> SECTION_BITS) + 1))
        return sorted(found)

    def put_note(self, desc: bytes) -> None:
        self.kernel.mem.write(VMCOREINFO_AT, vmcoreinfo_note(desc))

    def symbol(self, name: str) -> int:
        """Virtual address of a symbol of the finished kernel."""
        return next(address for _, known, address in self.kernel.symbols if known == name)

    def content(self) -> dict[int, bytes]:
        """Pages with something in them, by physical address: the kernel's own, and marks where borders are."""
        pages = {number * PAGE: bytes(page) for number, page in self.kernel.mem.pages.items()}
        for a, b in [LOW, HIGH, CRASH, DEVICE, *BOOT, *RESERVED, *OWN, *plugged_spans(self.plugged)]:
            for paddr in (a & -PAGE, (a & -PAGE) - PAGE, b & -PAGE, (b - 1) & -PAGE):
                if paddr not in pages and paddr >= 0:
                    pages[paddr] = struct.pack("<Q", paddr | 1) * (PAGE // 8)
        plugged = plugged_spans(self.plugged)
        for paddr in range(*DEVICE, BLOCK):
            if not any(a <= paddr < b for a, b in plugged):
                pages[paddr] = pages[paddr + BLOCK - PAGE] = POISON * (PAGE // 8)
        return pages

    def write(self, folder: Path) -> Path:
        """Everything into *folder*."""
        pages = self.pages = self.content()
        with (folder / "ram.raw").open("wb") as ram, (folder / "vm0.raw").open("wb") as device:
            ram.truncate(LOW[1] - LOW[0] + HIGH[1] - HIGH[0])
            device.truncate(DEVICE[1] - DEVICE[0])
            for paddr, page in sorted(pages.items()):
                for stream, start, end, offset in (
                    (ram, *LOW, 0),
                    (ram, *HIGH, LOW[1] - LOW[0]),
                    (device, *DEVICE, 0),
                ):
                    if start <= paddr < end and page.strip(b"\0"):
                        stream.seek(offset + paddr - start)
                        stream.write(page)
        (folder / "machine.json").write_text(json.dumps(self.document))
        for name, data in self.files.items():
            path = folder / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder


class Result(NamedTuple):
    status: int
    out: str
    lines: list[str]  # of standard error

    @property
    def warnings(self) -> list[str]:
        prefix = "oldmem: warning: "
        return [line.removeprefix(prefix) for line in self.lines if line.startswith(prefix)]


def oldmem(*arguments: str | Path, timeout: float = 60.0) -> Result:
    """Run the command; a traceback fails the test, whatever it was about."""
    done = subprocess.run(
        [sys.executable, "-m", "capture", *map(str, arguments)],
        capture_output=True,
        timeout=patience(timeout),
        env={**os.environ, "COLUMNS": "120"},
    )
    err = done.stderr.decode()
    assert "Traceback" not in err, err
    return Result(done.returncode, done.stdout.decode("utf-8", "replace"), err.splitlines())


def assert_memory(dump: Path, pages: dict[int, bytes], readable: Iterable[Span]) -> None:
    """Every page of every PT_LOAD of *dump* is what *pages* has there if it lies in *readable*, else zeros; pages that
    are not in *pages* are zeros. Holes of *dump* are taken as the zeros that they are."""
    spans = list(readable)
    with dump.open("rb") as stream:
        loads = [p for p in phdrs_of(stream.read(32 << 20)) if p.type == 1]
        begin = min(p.offset & -PAGE for p in loads)
        end = max(p.offset - p.paddr % PAGE + -(-(p.paddr % PAGE + p.memsz) // PAGE) * PAGE for p in loads)
        assert dump.stat().st_size == end
        expected: dict[int, tuple[int, bytes]] = {}
        for p in loads:
            for paddr, page in pages.items():
                if p.paddr & -PAGE <= paddr < p.paddr + p.memsz and any(a <= paddr < b for a, b in spans) and any(page):
                    expected[(p.offset & -PAGE) + paddr - (p.paddr & -PAGE)] = paddr, page
        for start, stop in data_extents(dump, end):
            for offset in range(max(start, begin), stop, PAGE):
                stream.seek(offset)
                found = stream.read(PAGE)
                paddr, page = expected.pop(offset, (-1, bytes(PAGE)))
                assert found == page, f"file offset {offset:#x}, physical {paddr:#x}"
    assert not expected, f"missing: {[hex(paddr) for paddr, _ in expected.values()][:8]}"


def data_extents(path: Path, size: int) -> list[Span]:
    """Where a sparse file has data."""
    found: list[Span] = []
    with path.open("rb") as stream:
        at = 0
        while at < size:
            try:
                start = os.lseek(stream.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(stream.fileno(), start, os.SEEK_HOLE)
            found.append((start, at))
    return found
