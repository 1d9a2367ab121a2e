# SPDX-License-Identifier: LGPL-2.1-or-later
"""What really is, told by others than oldmem: the first kernel's /proc/iomem, QEMU, and the host's RAM files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from guard.ranges import Range, RangeSet
from tests.vm.harness import Guest

LOW = RangeSet([(0, 1 << 20)])
CHUNK = 1 << 20


def iomem(g: Guest, pattern: str) -> RangeSet:
    """The lines of the guest's /proc/iomem whose name matches *pattern* wholly."""
    found = []
    for line in g.sh("cat /proc/iomem").splitlines():
        span, _, name = line.strip().partition(" : ")
        if re.fullmatch(pattern, name):
            first, last = span.split("-")
            found.append((int(first, 16), int(last, 16) + 1))
    return RangeSet(found)


def boot_ram(g: Guest) -> RangeSet:
    """Before the crash: System RAM that is not virtio-mem's, less what is set aside for the capture kernel."""
    regions = RangeSet((t.memaddr, t.memaddr + t.max_size) for t in g.plug_truth().values())
    ram = iomem(g, "System RAM") - regions - iomem(g, "Crash kernel") - LOW
    return ram.inner_pages(4096)


def plugged(g: Guest) -> RangeSet:
    """The populated extents of the devices' files, after a check that they are as much as QEMU calls plugged."""
    found = RangeSet()
    for name, truth in g.plug_truth().items():
        populated = g.populated(name)
        assert populated.size == truth.size, f"{name}: the host's file is not the plug state"
        found |= populated
    return found


def pt_loads(file: Path) -> list[tuple[int, Range]]:
    """(p_offset, physical range) of each PT_LOAD but kernel text's, by pyelftools."""
    with open(file, "rb") as stream:
        headers = [s.header for s in ELFFile(stream).iter_segments() if s.header["p_type"] == "PT_LOAD"]
    return [
        (h["p_offset"], Range(h["p_paddr"], h["p_paddr"] + h["p_memsz"]))
        for h in headers
        if h["p_vaddr"] < 0xFFFFFFFF80000000
    ]


def vmcoreinfo(file: Path) -> dict[str, str]:
    """The note's lines, by pyelftools."""
    with open(file, "rb") as stream:
        notes = [n for s in ELFFile(stream).iter_segments() if isinstance(s, NoteSegment) for n in s.iter_notes()]
    data = next(n["n_descdata"] for n in notes if n["n_name"] == "VMCOREINFO")
    return dict(line.split("=", 1) for line in data.decode().splitlines())


def on_host(g: Guest) -> RangeSet:
    """Guest-physical memory that the host has populated."""
    found: list[tuple[int, int]] = []
    for file in g.ram_files:
        held = g.extents(file.name) & RangeSet([(file.offset, file.offset + file.size)])
        found += [(a - file.offset + file.paddr, b - file.offset + file.paddr) for a, b in held]
    return RangeSet(found)


def host_bytes(g: Guest, paddr: int, size: int) -> bytes:
    """Guest memory as the host's files have it."""
    for file in g.ram_files:
        if file.paddr <= paddr and paddr + size <= file.paddr + file.size:
            with open(file.path, "rb") as stream:
                return os.pread(stream.fileno(), size, file.offset + paddr - file.paddr)
    raise AssertionError(f"no RAM file has {paddr:#x}+{size:#x}")


def differing(g: Guest, vmcore: Path) -> Iterator[Range]:
    """Pieces of *vmcore*'s memory that are not what the host's files have."""
    with open(vmcore, "rb") as stream:
        for offset, span in pt_loads(vmcore):
            for at in range(span.start, span.end, CHUNK):
                size = min(CHUNK, span.end - at)
                if os.pread(stream.fileno(), size, offset + at - span.start) != host_bytes(g, at, size):
                    yield Range(at, at + size)
