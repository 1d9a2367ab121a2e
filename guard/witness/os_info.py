# SPDX-License-Identifier: LGPL-2.1-or-later
"""os_info: what an s390x kernel leaves for those that come after it (arch/s390/include/asm/os_info.h, os_info.c).

One page, found by an absolute pointer in lowcore, sealed by a checksum. Entries are 20 bytes: an address and a size
with a checksum of what lies there, or a plain value in place of the address. Kernels before 6.10 fill two entries and
leave zeros in the others; the version field does not tell them apart."""

from __future__ import annotations

import struct
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.ranges import Range
from guard.witness.memory import Memory, Problems

LOWCORE_POINTER = 0xE18
"""Physical address of the pointer to it; one of the fields of lowcore whose place is frozen for dump tools."""
MAGIC = 0x4F53494E464F535A  # "OSINFOSZ"
MAX_MAJOR = 1
PAGE = 4096
MAX_DATA = 1 << 20
MAX_IMAGE = 1 << 30

# Indices of the entries that a header needs
VMCOREINFO, IDENTITY_BASE, KASLR_OFFSET, IMAGE_START, IMAGE_END, IMAGE_PHYS = 0, 4, 5, 10, 11, 12

_HEAD = struct.Struct(">QIHHQQ")  # magic, checksum, version major and minor, crashkernel address and size
_CHECKED_FROM = 12
_ENTRY = struct.Struct(">QQI")


class Image(NamedTuple):
    """The kernel image: virtual addresses of its start and end, physical address of its start; bytes."""

    start: int
    end: int
    paddr: int

    @property
    def size(self) -> int:
        return self.end - self.start


class OsInfo(NamedTuple):
    """*crash* is crashkernel= as reserved, physical; *vmcoreinfo* the sealed copy of the VMCOREINFO text.

    *image* is None for kernels that do not tell of a virtual layout (before 6.10); then *identity_base*, the virtual
    address of physical 0, is 0 too."""

    paddr: int
    crash: Range | None
    vmcoreinfo: bytes | None
    image: Image | None
    identity_base: int


def cksm(data: bytes) -> int:
    """What the CKSM instruction gives, seeded with 0 (z/Architecture Principles of Operation): the sum of 32-bit
    big-endian words with end-around carry, the last one padded with zeros."""
    data += bytes(-len(data) % 4)
    total: int = sum(struct.unpack(f">{len(data) // 4}I", data))
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total


def read_os_info(mem: Memory, problems: Problems) -> OsInfo | None:
    """What lowcore points to, checked as the kernel checks it (os_info_old_init()); None with a line in *problems* if
    it is not there or not sound. An entry that is damaged by itself is left out, also with a line."""
    try:
        paddr = struct.unpack(">Q", mem.read(LOWCORE_POINTER, 8))[0]
        if not paddr:
            raise WitnessError(f"lowcore {LOWCORE_POINTER:#x}: the pointer is 0")
        if paddr % PAGE:
            raise WitnessError(f"lowcore {LOWCORE_POINTER:#x}: the pointer {paddr:#x} is not to a page")
        page = mem.read(paddr, PAGE)
        magic, checksum, major, _, crash, crash_size = _HEAD.unpack_from(page)
        if magic != MAGIC:
            raise WitnessError(f"{paddr:#x}: magic {magic:#018x}, expected {MAGIC:#018x}")
        if (found := cksm(page[_CHECKED_FROM:])) != checksum:
            raise WitnessError(f"{paddr:#x}: checksum {checksum:#010x}, but its bytes give {found:#010x}")
        if major > MAX_MAJOR:
            raise WitnessError(f"{paddr:#x}: major version {major}, expected {MAX_MAJOR} or less")
    except (ReadError, WitnessError) as e:
        problems.note(f"os_info: {e}; left out: no kernel text PT_LOAD, and p_vaddr is p_paddr")
        return None
    entries = [_ENTRY.unpack_from(page, _HEAD.size + i * _ENTRY.size) for i in range(IMAGE_PHYS + 1)]
    image = _image(paddr, entries, problems) if entries[KASLR_OFFSET][0] else None
    return OsInfo(
        paddr,
        Range(crash, crash + crash_size) if crash_size and crash + crash_size <= 1 << 64 else None,
        _data(mem, paddr, entries[VMCOREINFO], problems),
        image,
        entries[IDENTITY_BASE][0] if entries[KASLR_OFFSET][0] else 0,
    )


def _image(paddr: int, entries: list[tuple[int, int, int]], problems: Problems) -> Image | None:
    start, end, phys = (entries[i][0] for i in (IMAGE_START, IMAGE_END, IMAGE_PHYS))
    image = Image(start, end, phys)
    if 0 < image.size <= MAX_IMAGE and not (start | phys) % PAGE and phys + image.size <= 1 << 64:
        return image
    problems.note(image_line(paddr, image))
    return None


def image_line(paddr: int, image: Image) -> str:
    """What is said of an *image*, told of by os_info at *paddr*, that cannot be."""
    return (
        f"os_info: {paddr:#x}: kernel image {image.start:#x}-{image.end:#x} at physical {image.paddr:#x} "
        "is not possible; left out: no kernel text PT_LOAD"
    )


def _data(mem: Memory, paddr: int, entry: tuple[int, int, int], problems: Problems) -> bytes | None:
    """The VMCOREINFO text of entry 0, checked by its own checksum; that it is empty is normal (6.1, 7.2)."""
    at, size, checksum = entry
    if not at:
        return None
    place = f"os_info: {paddr:#x}: VMCOREINFO entry"
    if not 0 < size <= MAX_DATA:
        problems.note(f"{place}: {size:#x} bytes, expected 1 to {MAX_DATA:#x}; left out, lowcore's note is used")
        return None
    try:
        data = mem.read(at, size)
    except ReadError as e:
        problems.note(f"{place}: {e}; left out, lowcore's note is used")
        return None
    if (found := cksm(data)) != checksum:
        problems.note(
            f"{place}: checksum {checksum:#010x}, but the {size:#x} bytes at {at:#x} give {found:#010x}; "
            "left out, lowcore's note is used"
        )
        return None
    return data
