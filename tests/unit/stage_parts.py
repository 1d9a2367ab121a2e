# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of stage 2 have in common: stand-ins for a dump, a kernel image, kexec; unpacking of archives."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from capture import stage2
from capture.dump import Dump
from capture.header_place import InPlace, Pinned
from capture.sources import report
from capture.sources.report import Finding, SourceReport
from guard.errors import SourceError
from guard.ranges import Range, RangeSet

PAGE, MIB = 4096, 1 << 20
Span = tuple[int, int]
MakePlan = Callable[..., stage2.Plan]
PLACE_AT = 0x6BFF0000
LINE = f"root=/dev/vda elfcorehdr={PLACE_AT:#x} nr_cpus=1"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: device nodes, and pagemap without hidden pfns")
needs_cpio = pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio tool")


def source(name: str, *findings: tuple[int, int, str]) -> SourceReport:
    return SourceReport(name, name, tuple(Finding(a, b, kind, "") for a, b, kind in findings), (), True)


def header_dump(elfcorehdr: int | None, own: Sequence[Span] = (), reserved: Sequence[Span] = ()) -> Dump:
    """As much of a dump as a place for a header is found by."""
    headers = [] if elfcorehdr is None else [(elfcorehdr, elfcorehdr, report.ELFCOREHDR)]
    reports = {
        "iomem": source("iomem", *((a, b, report.OWN_RAM) for a, b in own)),
        "cmdline": source("cmdline", *headers),
    }
    machine = SimpleNamespace(page_size=PAGE, reports=reports)
    return cast(Dump, SimpleNamespace(machine=machine, arch=SimpleNamespace(reserved=RangeSet(reserved))))


class FakePlace:
    """A place for a header (header_place.Place) that notes in *events* what is done with it."""

    def __init__(self, what: str, addr: int, room: int, events: list[str] | None = None) -> None:
        self.what, self.addr, self.room = what, addr, room
        self.is_own_ram = what == Pinned.what
        self.events = [] if events is None else events
        self.data = b""

    def parameters(self) -> list[str]:
        return [*(["memmap=64K$0x1"] if self.is_own_ram else []), f"elfcorehdr={self.addr:#x}"]

    def before(self, size: int) -> bytes:
        return b"" if self.is_own_ram else b"o" * size

    def put(self, data: bytes) -> None:
        self.events.append("put")
        self.data = data

    def check(self) -> None:
        self.events.append("check")

    def take_back(self) -> None:
        self.events.append("take back")

    def choose(self, avoid: Iterable[Range]) -> None:
        self.events.append(f"choose not {RangeSet(avoid)}")
        self.addr += MIB


class Places:
    """What there is for a header: *in_place* bytes in place of the prepared one, *pinned* or no pinned pages; None:
    why not. *asked* are the sizes that pinned pages were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, in_place: int | None, pinned: bool = True) -> None:
        self.asked: list[int] = []
        self.looked = 0

        def at_prepared(dump: Dump) -> FakePlace:
            self.looked += 1
            if in_place is None:
                raise SourceError("no such place")
            return FakePlace(InPlace.what, PLACE_AT, in_place)

        def of_our_own(size: int) -> FakePlace:
            self.asked.append(size)
            if not pinned:
                raise SourceError("no pinned pages")
            return FakePlace(Pinned.what, 16 * MIB, size)

        monkeypatch.setattr(stage2, "InPlace", at_prepared)
        monkeypatch.setattr(stage2, "Pinned", of_our_own)


def bz_image(
    release: str, most_cmdline: int = 2047, init_size: int = 64 * MIB, version: int = 0x20F, name: int = 0x3000
) -> bytes:
    """The head of a bzImage, by Documentation/arch/x86/boot.rst; the kernel's version is told at 0x200 + *name*, or not
    at all (0)."""
    data = bytearray(0x9000)
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", data, 0x206, version)
    struct.pack_into("<H", data, 0x20E, name)
    struct.pack_into("<I", data, 0x238, most_cmdline)
    struct.pack_into("<I", data, 0x260, init_size)
    text = f"{release} (builder@host) #1 SMP".encode() + b"\0behind"
    if name:
        data[0x200 + name : 0x200 + name + len(text)] = text
    return bytes(data)


def unpacked(data: bytes, folder: Path, *patterns: str) -> Path:
    """*data* as the cpio tool unpacks it into the new *folder*; all, or what *patterns* name."""
    folder.mkdir()
    subprocess.run(["cpio", "-idm", "--quiet", *patterns], input=data, cwd=folder, check=True, timeout=60)
    return folder


def open_files() -> int:
    """Descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd"))
