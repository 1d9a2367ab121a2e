# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real crash as a fixture: the pages of it that map, header and guard touch, as `oldmem record --minimal` writes.

base.tar.xz is a q35 guest of QEMU with a 7.3 kernel, made by make.py from a record with all of the memory:

    RAM 0-0x1fffffff and 0x100000000-0x10fffffff, crashkernel 0xa000000-0x15ffffff
    virtio-mem at 0x140000000 (480 MiB of 1 GiB plugged) and 0x180000000 (64 MiB of 512 MiB), 64 MiB of balloon
    fw_cfg, SMBIOS and an SRAT; VMCOREINFO at 0x1008cc000

truth.json is what the live kernel said of itself before the crash: "hwpoison", "offline" and "nopage", half-open ranges
of physical bytes. What the tests change of firmware's tables or of memory, they change in a copy: see Field."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ARCHIVE = HERE / "base.tar.xz"
MACHINE, TRUTH = "machine", "truth.json"

PAGE = 4096
Span = tuple[int, int]

LOW, HIGH = (0x0, 0x20000000), (0x100000000, 0x110000000)
CRASH = (0xA000000, 0x16000000)
BOOT = [(0x100000, CRASH[0]), (CRASH[1], 0x1FFDA000), HIGH]
"""Of boot RAM, what a right vmcore has."""
WINDOW = (0x140000000, 0x220000000)
"""Hot-pluggable by the SRAT; both devices lie in it."""
NOTE = 0x1008CC000
FW_CFG, DMI, SRAT = "sys/firmware/qemu_fw_cfg", "sys/firmware/dmi", "sys/firmware/acpi/tables/SRAT"
E820, NOTE_PLACE = FW_CFG + "/by_name/etc/e820", FW_CFG + "/by_name/etc/vmcoreinfo"


def unpack(folder: Path) -> Path:
    """The recorded machine, unpacked into *folder*; beside it is truth.json."""
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:  # in Python 3.11.2 extractall() has no filters, in 3.12 it warns where none is given
            path = folder / member.name
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            elif source := archive.extractfile(member):
                with source, path.open("wb") as file:
                    shutil.copyfileobj(source, file)
    return folder / MACHINE


def truth(machine: Path) -> dict[str, list[Span]]:
    """The live kernel's word on the machine that unpack() has returned."""
    found = json.loads((machine.parent / TRUTH).read_text())
    return {name: [(a, b) for a, b in spans] for name, spans in found.items()}


class Field:
    """A copy of the machine *base* in *folder*, to be changed: files below root/, *document* (machine.json), memory.

    Call write() when it is as it should be."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(base / "root", folder / "root")
        self.document: dict[str, Any] = json.loads((base / "machine.json").read_text())
        for image in base.glob("*.raw"):
            try:
                os.link(image, folder / image.name)
            except OSError:  # another file system
                shutil.copy(image, folder / image.name)

    def put(self, name: str, data: bytes) -> None:
        """A file below root."""
        path = self.folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def drop(self, *names: str) -> None:
        """Files or folders below root."""
        for name in names:
            path = self.folder / "root" / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def put_e820(self, entries: Iterable[tuple[int, int, int]]) -> None:
        """fw_cfg's etc/e820 of (start, end, type)."""
        data = b"".join(struct.pack("<QQI", a, b - a, kind) for a, b, kind in entries)
        self.put(f"{E820}/raw", data)
        self.put(f"{E820}/size", b"%d\n" % len(data))

    def without_note(self) -> None:
        """Nobody tells where VMCOREINFO is."""
        self.drop(NOTE_PLACE)
        self.document.pop("vmcoreinfo_paddr", None)

    def without_header(self) -> None:
        """The kernel has no /proc/vmcore, and nobody tells where the header that it was booted with is."""
        self.drop("proc/vmcore")
        self.put("proc/cmdline", b"console=ttyS0\n")

    def _held(self) -> Iterator[tuple[int, int, str, int]]:
        """(physical address, bytes, image, offset in it) of each run of pages that are held."""
        for entry in [*self.document["ram"], *self.document["virtio_mem"]]:
            start, offset = entry["paddr" if "paddr" in entry else "addr"], entry.get("offset", 0)
            for first, count in entry.get("held", ()):
                yield start + first * PAGE, count * PAGE, entry["image"], offset
                offset += count * PAGE

    def _at(self, paddr: int) -> tuple[Path, int]:
        """Image, and offset in it, of a held byte. Raises LookupError."""
        for start, size, image, offset in self._held():
            if start <= paddr < start + size:
                return self.folder / image, offset + paddr - start
        raise LookupError(f"{paddr:#x} is not held")

    def peek(self, paddr: int, size: int) -> bytes:
        """Bytes of memory within one page."""
        path, offset = self._at(paddr)
        with path.open("rb") as image:
            image.seek(offset)
            return image.read(size)

    def poke(self, paddr: int, data: bytes) -> None:
        """Change bytes of memory within one page."""
        path, offset = self._at(paddr)
        if path.stat().st_nlink > 1:
            copy = path.with_suffix(".copy")
            shutil.copy(path, copy)
            copy.rename(path)
        with path.open("r+b") as image:
            image.seek(offset)
            image.write(data)

    def pages(self) -> Iterator[int]:
        """Physical addresses of all pages that are held."""
        for start, size, _, _ in self._held():
            yield from range(start, start + size, PAGE)

    def write(self) -> Path:
        """machine.json into the folder, which is returned."""
        (self.folder / "machine.json").write_text(json.dumps(self.document))
        return self.folder
