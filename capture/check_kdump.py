# SPDX-License-Identifier: LGPL-2.1-or-later
"""What makedumpfile writes of a vmcore that is no ELF: kdump-compressed files, and flattened ones, for pipes.

Layout: makedumpfile's IMPLEMENTATION, diskdump_mod.h (struct disk_dump_header, struct kdump_sub_header, page_desc_t)
and makedumpfile.h (struct makedumpfile_header, struct makedumpfile_data_header); of machines of 64 bits."""

from __future__ import annotations

import io
import os
from struct import Struct
from typing import BinaryIO

PAGE = 4096
SIGNATURES = (b"KDUMP   ", b"DISKDUMP")
FLATTENED = b"makedumpfile\0\0\0\0"

_MAX_RECORDS = 1 << 20
_MAX_LINES = 32
_SUB_HEADER = 104
_DESC = "QIIQ"
# zlib, lzo, snappy, an excluded part of vmemmap, zstd
_KNOWN_FLAGS = 0x01 | 0x02 | 0x04 | 0x10 | 0x20
_INCOMPLETE = 0x08
_U64 = (1 << 64) - 1


def check(file: BinaryIO, wrong: list[str], has: list[str]) -> None:
    """Look at the kdump-compressed file *file*; what is wrong with it and what it has are added as lines."""
    _Kdump(file, wrong, has).check()


class _Kdump:
    def __init__(self, file: BinaryIO, wrong: list[str], has: list[str]) -> None:
        self._file, self._wrong, self._has = file, wrong, has
        self._size = file.seek(0, os.SEEK_END)

    def _tell(self, line: str) -> None:
        if len(self._wrong) < _MAX_LINES:
            self._wrong.append(line)
        elif len(self._wrong) == _MAX_LINES:
            self._wrong.append("and more")

    def _at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)

    def check(self) -> None:
        head = self._at(0, 464)
        if len(head) < 464:
            self._tell(f"the header ends at {len(head):#x}, expected 0x1d0 bytes")
            return
        self._order = "<" if 0 < int.from_bytes(head[8:12], "little") < 1 << 16 else ">"
        (version,) = Struct(f"{self._order}i").unpack_from(head, 8)
        status, block, sub_blocks, bitmap_blocks, max_mapnr = Struct(f"{self._order}IiiII").unpack_from(head, 424)
        release, machine = (head[12 + 65 * n : 77 + 65 * n].split(b"\0")[0].decode("ascii", "replace") for n in (2, 4))
        self._has.append(f"version {version}, kernel {release or 'unknown'} of {machine or 'an unknown machine'}")
        if version < 1:
            self._tell(f"offset 0x8: version {version}, expected 1 or more")
            return
        if block not in (1 << n for n in range(12, 17)):
            self._tell(f"offset 0x1ac: block size {block}, expected a power of two from 4096 to 65536")
            return
        if status & _INCOMPLETE:
            self._tell(f"offset 0x1a8: status {status:#x}: the dump is incomplete, its writer ran out of room")
        if sub_blocks < 1:
            self._tell(f"offset 0x1b0: {sub_blocks} blocks of sub header, expected at least 1")
            return
        sub = self._at(block, _SUB_HEADER)
        if len(sub) < _SUB_HEADER:
            self._tell(f"the sub header at {block:#x} ends with the file at {self._size:#x}")
            return
        split, first, end = 0, 0, _U64
        if version >= 2:
            (split,) = Struct(f"{self._order}i").unpack_from(sub, 12)
            first, end = Struct(f"{self._order}QQ").unpack_from(sub, 16)
        if version >= 6:
            first, end, max_mapnr = Struct(f"{self._order}QQQ").unpack_from(sub, 80)
        if not split:
            first, end = 0, max_mapnr
        self._check_texts(version, sub)
        self._check_pages(block, sub_blocks, bitmap_blocks, max_mapnr, first, min(end, max_mapnr))

    def _check_texts(self, version: int, sub: bytes) -> None:
        for since, at, what in ((3, 32, "VMCOREINFO"), (4, 48, "ELF notes"), (5, 64, "eraseinfo")):
            if version < since:
                continue
            offset, size = Struct(f"{self._order}QQ").unpack_from(sub, at)
            if not size:
                if what == "VMCOREINFO":
                    self._tell("no VMCOREINFO: crash and drgn know no symbols")
                continue
            if offset + size > self._size:
                self._tell(f"{what} at {offset:#x}+{size:#x}, but the file ends at {self._size:#x}")
            elif what == "VMCOREINFO" and not self._at(offset, min(size, 10)).startswith(b"OSRELEASE="):
                self._tell(f"VMCOREINFO at {offset:#x} does not begin with OSRELEASE=")

    def _check_pages(self, block: int, sub_blocks: int, bitmap_blocks: int, pages: int, first: int, end: int) -> None:
        """Two bitmaps, what memory there was and what of it was dumped; a descriptor of each page that was."""
        one = bitmap_blocks // 2 * block
        start = (1 + sub_blocks) * block
        if one * 8 < pages:
            self._tell(f"offset 0x1b4: {bitmap_blocks} blocks of bitmaps are too few for {pages} pages, twice")
            return
        if start + 2 * one > self._size:
            self._tell(f"the bitmaps end at {start + 2 * one:#x}, the file at {self._size:#x}")
            return
        there = dumped = 0
        for at in range(0, one, 1 << 20):
            size = min(1 << 20, one - at)
            exist, kept = (int.from_bytes(self._at(base + at, size), "little") for base in (start, start + one))
            if kept & ~exist:
                pfn = at * 8 + (kept & ~exist & -(kept & ~exist)).bit_length() - 1
                self._tell(f"page {pfn:#x} was dumped, but the first bitmap does not have it")
            there += exist.bit_count()
            low, high = max(first - at * 8, 0), min(end - at * 8, size * 8)
            if low < high:
                dumped += (kept >> low & (1 << high - low) - 1).bit_count()
        self._has.append(f"{dumped} of {there} pages of {block} bytes were dumped")
        self._check_descriptors(start + 2 * one, dumped, block)

    def _check_descriptors(self, start: int, count: int, block: int) -> None:
        desc = Struct(self._order + _DESC)
        end = start + count * desc.size
        if end > self._size:
            self._tell(f"{count} page descriptors end at {end:#x}, the file at {self._size:#x}")
            return
        for at in range(0, count, 1 << 14):
            data = self._at(start + at * desc.size, min(1 << 14, count - at) * desc.size)
            for i, (offset, size, flags, _) in enumerate(desc.iter_unpack(data)):
                where = f"page descriptor {at + i} at {start + (at + i) * desc.size:#x}"
                if offset + size > self._size:
                    self._tell(f"{where}: data at {offset:#x}+{size:#x}, but the file ends at {self._size:#x}")
                elif size > block or (size < block and not flags) or (flags & ~_KNOWN_FLAGS):
                    self._tell(f"{where}: {size} bytes with flags {flags:#x} for a page of {block} bytes")


class Flattened(io.RawIOBase):
    """A flattened file, put together: a stream of what makedumpfile -R would write. What is wrong with it is added to
    *wrong* when it is opened."""

    def __init__(self, file: BinaryIO, wrong: list[str]) -> None:
        super().__init__()
        self._file = file
        self._pieces: list[tuple[int, int, int]] = []  # offset, size, where in the file; later ones go before earlier
        self.size = self._position = 0
        end = file.seek(0, os.SEEK_END)
        record = Struct(">qq")
        at = PAGE
        while True:
            file.seek(at)
            data = file.read(record.size)
            if len(data) < record.size:
                wrong.append(f"the file ends at {end:#x} without an end record: it was cut off")
                break
            offset, size = record.unpack(data)
            if (offset, size) == (-1, -1):
                if at + record.size != end:
                    wrong.append(f"{end - at - record.size} bytes behind the end record at {at:#x}")
                break
            if offset < 0 or size <= 0 or size > end - at - record.size:
                wrong.append(f"record at {at:#x}: {size} bytes for offset {offset:#x}, the file ends at {end:#x}")
                break
            if len(self._pieces) == _MAX_RECORDS:
                wrong.append(f"more than {_MAX_RECORDS} records: what is from {at:#x} on was not looked at")
                break
            self._pieces.append((offset, size, at + record.size))
            self.size = max(self.size, offset + size)
            at += record.size + size

    @property
    def records(self) -> int:
        return len(self._pieces)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = self._position
        n = min(len(buffer), max(0, self.size - start))
        buffer[:n] = bytes(n)
        for offset, size, at in self._pieces:
            low, high = max(offset, start), min(offset + size, start + n)
            if low < high:
                self._file.seek(at + low - offset)
                buffer[low - start : high - start] = self._file.read(high - low)
        self._position += n
        return n
