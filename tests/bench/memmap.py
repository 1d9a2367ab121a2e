# SPDX-License-Identifier: LGPL-2.1-or-later
"""Struct pages: the pass in C beside memcpy of the same bytes, and the whole scan, through page walk and gate from an
image, beside pread of the same bytes. The machine has 8 GiB of RAM, of which a quarter was given away."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable

from guard._core import ffi, lib
from guard.physmem import PREAD, ExactMemory, OldMemory, Segment
from guard.ranges import Range, RangeSet
from guard.registry import Registry, allow_rule, deny_rule
from guard.witness.memmap import scan, shape_of
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk, x86_64
from guard.witness.sections import Sections
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.unit.witness_memory import OFFLINE_PAGE, POISONED_PAGE, STRUCT_PAGE_KEYS, VMEMMAP, DyingKernel

MiB, GiB = 1 << 20, 1 << 30
PAGE, STRUCT_PAGE = 4096, 64
RAM = 8 * GiB
MEMMAP = RAM // PAGE * STRUCT_PAGE
PIECE = 1 << 18
ROUNDS = 15
LAYOUT = STRUCT_PAGE_KEYS | {"SYMBOL(vmemmap)": f"{VMEMMAP:x}"}


def memmap() -> bytes:
    """Every fourth 2 MiB offline, and a few broken pages."""
    used = b"\x28\0\0\0\0\0\xff\x17".ljust(48, b"\0") + b"\xff" * 4 + b"\1".ljust(12, b"\0")
    part = used * 511 + POISONED_PAGE + used * 1024 + OFFLINE_PAGE * 512
    few = used * 512 + used * 1024 + OFFLINE_PAGE * 512
    return part + few * (MEMMAP // len(few) - 1)


class Dead:
    """A kernel whose memory is the image *fd*: its page tables, and a memory map in pages of 2 MiB."""

    def __init__(self, fd: int) -> None:
        kernel = DyingKernel()
        self.at = 1 * GiB
        for offset in range(0, MEMMAP, 2 * MiB):
            kernel.tables.map(VMEMMAP + offset, self.at + offset, 21)
        kernel.keys |= LAYOUT
        self.info: Vmcoreinfo = kernel.finish()
        for number, page in kernel.mem.pages.items():
            os.pwrite(fd, page, number * PAGE)
        os.pwrite(fd, memmap(), self.at)
        registry = Registry()
        registry.register(allow_rule("envelope", Range(0, 1 << 64), RangeSet([(0, RAM)]), "no RAM"))
        registry.register(deny_rule("capture kernel", RangeSet([(0, MiB)]), "not old"))
        self.memory = OldMemory([Segment(0, RAM, fd, 0, PREAD, "image")], registry)
        self.walk: PageWalk = x86_64(ExactMemory(self.memory), self.info)
        self.sections = Sections(128 * MiB, RangeSet([(0, RAM)]), RangeSet([(0, RAM)]))

    def scan(self) -> None:
        problems = Problems()
        marks = scan(self.walk, self.info, self.sections, RangeSet([(0, RAM)]), problems)
        if problems or marks.scanned != MEMMAP or not marks.offline or not marks.offline.has(1536):
            raise AssertionError(f"scanned {marks.scanned} bytes: {problems}")


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def compared(ours: Callable[[], None], peer: Callable[[], None]) -> str:
    """Ratio of speeds, best against best and pair by pair, and ours in bytes of memory map."""
    pairs = [(seconds(ours), seconds(peer)) for _ in range(ROUNDS)]
    best = min(a for a, _ in pairs)
    each = sorted(b / a for a, b in pairs)
    ratio = min(b for _, b in pairs) / best
    spread = f"{each[len(each) // 2]:.2f} ({each[0]:.2f} to {each[-1]:.2f})"
    return f"{ratio:.2f}; pairs {spread}; {MEMMAP / best / 1e9:.1f} GB/s"


def pass_in_c(info: Vmcoreinfo) -> str:
    data = memmap()
    c_data, view, copy = ffi.from_buffer("uint8_t[]", data), memoryview(data), memoryview(bytearray(MEMMAP))
    shape = ffi.new("struct memmap_shape *", shape_of(info)._asdict())
    pages = PIECE // STRUCT_PAGE
    state = ffi.new("struct memmap_pass *")
    bits = [ffi.new("uint8_t[]", pages // 8) for _ in range(2)]

    def ours() -> None:
        for at in range(0, MEMMAP, PIECE):
            lib.memmap_scan(shape, state, c_data + at, pages, *bits)

    def peer() -> None:
        for at in range(0, MEMMAP, PIECE):
            copy[at : at + PIECE] = view[at : at + PIECE]

    return compared(ours, peer)


def whole_scan(dead: Dead, fd: int) -> str:
    buffer = bytearray(PIECE)

    def peer() -> None:
        for at in range(dead.at, dead.at + MEMMAP, PIECE):
            os.preadv(fd, [buffer], at)

    return compared(dead.scan, peer)


def report(row: Callable[[str, str, str], None]) -> None:
    """A row for each figure."""
    with tempfile.TemporaryFile() as image:
        image.truncate(RAM)
        dead = Dead(image.fileno())
        row("struct pages: speed of the pass in C / of memcpy", pass_in_c(dead.info), ">= 1.5 GB/s")
        row("struct pages, read from an image: speed / of pread", whole_scan(dead, image.fileno()), ">= 1.5 GB/s")
        dead.memory.close()
