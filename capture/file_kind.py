# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file is, by its first page: for the message to who names one where raw memory is wanted.

Signatures are those that the formats' own documents and writers give: ELF gABI; QEMU docs/interop/qcow2.rst and
migration/savevm.c; VMDK, VHD, VHDX and VDI specifications; LiME doc/README.md; AVML src/image.rs; makedumpfile
diskdump_mod.h and IMPLEMENTATION; s390-tools zdump; Windows crash dump and hibernation headers; RFC 1952, 8878."""

from __future__ import annotations

import os
from typing import NamedTuple

_PAGE = 4096


class Kind(NamedTuple):
    """*name* with its article, and what to do with such a file. *surely*: no raw memory begins so by chance."""

    name: str
    advice: str
    surely: bool = True


_READERS = "crash and drgn read it as it is"
_CONVERT = 'if it holds memory, "qemu-img convert -O raw" makes it raw'
_UNPACK = "unpack it first"
_VIRTUAL = "the hypervisor has memory of its own beside it, or can write it as ELF core"

KINDS: tuple[tuple[int, bytes, Kind], ...] = (
    (0, b"QFI\xfb", Kind("a qcow2 disk image", _CONVERT)),
    (0, b"KDMV", Kind("a VMDK disk image", _CONVERT)),
    (0, b"COWD", Kind("a VMDK disk image", _CONVERT)),
    (0, b"# Disk DescriptorFile", Kind("a VMDK descriptor", _CONVERT)),
    (0, b"vhdxfile", Kind("a VHDX disk image", _CONVERT)),
    (0, b"conectix", Kind("a VHD disk image", _CONVERT)),
    (64, b"\x7f\x10\xda\xbe", Kind("a VDI disk image", _CONVERT)),
    (0, b"EMiL", Kind("a LiME file", "each range lies behind a header of 32 bytes: name the offset of each")),
    (0, b"AVML", Kind("an AVML file", '"avml-convert --format raw" makes it raw')),
    (0, b"KDUMP   ", Kind("a kdump-compressed file of makedumpfile", f"{_READERS}, oldmem check looks at it")),
    (0, b"DISKDUMP", Kind("a diskdump file", f"{_READERS}, oldmem check looks at it")),
    (
        0,
        b"makedumpfile\0\0\0\0",
        Kind("a flattened file of makedumpfile", '"makedumpfile -R" puts it together, oldmem check looks at it'),
    ),
    (0, b"\xa8\x19\x01\x73\x61\x8f\x23\xfd", Kind("an s390 dump with its header", '"zgetdump -f elf" makes ELF of it')),
    (0, b"\xed\x23\x8f\x61\x73\x01\x19\xa8", Kind("an LKCD dump", "crash reads it as it is")),
    (0, b"PAGEDU64", Kind("a Windows crash dump", "its memory is no Linux kernel's")),
    (0, b"PAGEDUMP", Kind("a Windows crash dump", "its memory is no Linux kernel's")),
    (0, b"HIBR", Kind("a Windows hibernation file", "its memory is no Linux kernel's")),
    (0, b"hibr", Kind("a Windows hibernation file", "its memory is no Linux kernel's")),
    (_PAGE - 10, b"S1SUSPEND", Kind("a swap area with a hibernation image", "its memory is compressed")),
    (_PAGE - 10, b"SWAPSPACE2", Kind("a swap area", "there is no memory image in it")),
    (0, b"QEVM", Kind("a QEMU savevm or migration stream", _VIRTUAL)),
    (0, b"LibvirtQemud", Kind("a libvirt save file", '"virsh dump --memory-only" writes memory as ELF core')),
    (0, b"\x7fVirtualBox SavedState", Kind("a VirtualBox saved state", _VIRTUAL)),
    (0, b"\xd0\xbe\xd2\xbe", Kind("a VMware snapshot (vmss, vmsn)", _VIRTUAL)),
    (0, b"\xd1\xba\xd1\xba", Kind("a VMware snapshot (vmss, vmsn)", _VIRTUAL)),
    (0, b"\xd2\xbe\xd2\xbe", Kind("a VMware snapshot (vmss, vmsn)", _VIRTUAL)),
    (0, b"\xd3\xbe\xd3\xbe", Kind("a VMware snapshot (vmss, vmsn)", _VIRTUAL)),
    (0, b"\xfd7zXZ\0", Kind("an xz file", _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", Kind("a zstd file", _UNPACK)),
    (0, b"\x04\x22\x4d\x18", Kind("an lz4 file", _UNPACK)),
    (0, b"\xff\x06\0\0sNaPpY", Kind("a snappy stream", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", _UNPACK)),
    (0, b"PK\3\4", Kind("a zip archive", _UNPACK)),
    (257, b"ustar", Kind("a tar archive", _UNPACK)),
    (0, b"\x1f\x8b\x08", Kind("a gzip file", _UNPACK, surely=False)),
    (0, b"BZh", Kind("a bzip2 file", _UNPACK, surely=False)),
)

_ELFDATA2MSB, _ET_CORE = b"\2", 4


def of(head: bytes) -> Kind | None:
    """What a file is that begins with *head*, its first page; None where it may be anything, raw memory too."""
    if head.startswith(b"\x7fELF"):
        if int.from_bytes(head[16:18], "big" if head[5:6] == _ELFDATA2MSB else "little") == _ET_CORE:
            advice = f"{_READERS}; or name each PT_LOAD's p_offset as 'offset' (readelf -lW); oldmem check looks at it"
            return Kind("an ELF core", advice)
        return Kind("an ELF file", "no core, so there is no memory in it")
    for at, magic, kind in KINDS:
        if head[at : at + len(magic)] == magic:
            return kind
    return None


def of_file(path: str) -> Kind | None:
    """As of(); None also where the file cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return of(os.pread(fd, _PAGE, 0))
    except OSError:
        return None
    finally:
        os.close(fd)
