# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pinned page and the queue in it."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import DeviceError
from guard.pinned import PAGE_SIZE, PinnedPage, address, frames, lock
from guard.virtio_queue import queue_layout

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="pagemap shows pfns to root only")


@needs_root
def test_pinned_page_has_a_stable_page_aligned_physical_address() -> None:
    with PinnedPage() as page:
        first = page.paddr()
        assert first
        assert first % PAGE_SIZE == 0
        page.view[:4] = b"data"
        page.check_still_there()
        assert page.paddr() == first
        assert len(page.view) == PAGE_SIZE


@needs_root
def test_pinned_page_is_locked_in_memory() -> None:
    def locked_kib() -> int:
        return int(Path("/proc/self/status").read_text().split("VmLck:")[1].split()[0])

    before = locked_kib()
    with PinnedPage():
        assert locked_kib() - before == PAGE_SIZE // 1024
    assert locked_kib() == before


class FakePagemap:
    """A file in the place of /proc/self/pagemap that shows ``entry`` wherever it is read."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entry = b""
        path.touch()
        self.path = str(path)
        monkeypatch.setattr(os, "pread", lambda fd, size, offset: self.entry)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (1 << 63, "hides the pfn"),
        (0x1234, "not present"),
        (1 << 62 | 5, "not present"),
    ],
)
def test_page_without_a_known_address_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: int, words: str
) -> None:
    pagemap = FakePagemap(tmp_path / "pagemap", monkeypatch)
    pagemap.entry = entry.to_bytes(8, "little")
    with pytest.raises(DeviceError, match=words):
        PinnedPage(pagemap.path)


def test_page_that_moved_is_noticed_until_its_address_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pagemap = FakePagemap(tmp_path / "pagemap", monkeypatch)
    pagemap.entry = (1 << 63 | 0x100).to_bytes(8, "little")
    with PinnedPage(pagemap.path) as page:
        assert page.paddr() == 0x100 * PAGE_SIZE
        pagemap.entry = (1 << 63 | 0x200).to_bytes(8, "little")
        with pytest.raises(DeviceError, match=f"moved from {0x100 * PAGE_SIZE:#x} to {0x200 * PAGE_SIZE:#x}"):
            page.check_still_there()
        assert page.paddr() == 0x200 * PAGE_SIZE
        page.check_still_there()
        pagemap.entry = b"\0\0\0"
        with pytest.raises(DeviceError, match="3 bytes read instead of 8"):
            page.check_still_there()


PRESENT = 1 << 63


def pagemap_of(path: Path, *entries: int) -> str:
    """A pagemap of a process whose pages from 0 on have these entries."""
    path.write_bytes(struct.pack(f"={len(entries)}Q", *entries))
    return str(path)


def test_frames_are_the_pfns_of_the_pages_asked_for(tmp_path: Path) -> None:
    path = pagemap_of(tmp_path / "pagemap", *(PRESENT | 1 << 55 | pfn for pfn in (9, 7, (1 << 55) - 1, 3)), 0)
    assert frames(0, 4, path) == [9, 7, (1 << 55) - 1, 3]
    assert frames(PAGE_SIZE, 2, path) == [7, (1 << 55) - 1]
    assert frames(2 * PAGE_SIZE + 5, 1, path) == [(1 << 55) - 1]


@needs_root
def test_frames_of_locked_pages_are_those_of_pagemap() -> None:
    memory = mmap.mmap(-1, 9 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    vaddr = address(memory)
    lock(vaddr, 9 * PAGE_SIZE)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(vaddr // PAGE_SIZE * 8)
        raw = file.read(9 * 8)
    assert frames(vaddr, 9) == [entry & (1 << 55) - 1 for (entry,) in struct.iter_unpack("=Q", raw)]
    memory.close()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (PRESENT, "the kernel hides the pfn"),
        (1 << 62 | 5, "a locked page is not present"),
        (0, "a locked page is not present"),
    ],
)
def test_one_page_without_a_known_frame_spoils_all(entry: int, words: str, tmp_path: Path) -> None:
    path = pagemap_of(tmp_path / "pagemap", PRESENT | 1, PRESENT | 2, entry, PRESENT | 3)
    with pytest.raises(DeviceError, match=f"^{path}: {words}"):
        frames(0, 4, path)
    with pytest.raises(DeviceError, match=f"^{path}: 8 bytes read instead of 16 for 2 locked pages$"):
        frames(3 * PAGE_SIZE, 2, path)


def test_memory_that_cannot_be_locked_is_a_device_error() -> None:
    with pytest.raises(DeviceError, match=rf"^cannot lock {PAGE_SIZE} bytes of memory: Cannot allocate memory$"):
        lock(0, PAGE_SIZE)


def test_missing_pagemap_is_a_device_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="No such file"):
        PinnedPage(str(tmp_path / "pagemap"))


@given(entries=st.integers(2, 32768), page_size=st.sampled_from([4096, 16384, 65536]))
def test_queue_parts_are_aligned_apart_and_inside_the_page(entries: int, page_size: int) -> None:
    layout = queue_layout(page_size, entries, 24, 10)
    assert layout.entries & (layout.entries - 1) == 0
    assert layout.entries <= entries
    assert layout.slots == layout.entries // 2
    assert 16 * layout.entries <= layout.avail
    assert layout.avail % 2 == layout.used % 4 == 0
    assert layout.avail + 6 + 2 * layout.entries <= layout.used
    assert layout.used + 6 + 8 * layout.entries <= layout.buffers
    assert layout.buffers + layout.slots * layout.stride <= page_size
    assert layout.stride >= 34


def test_one_page_of_4096_bytes_carries_32_requests_at_once() -> None:
    assert queue_layout(4096, 128, 24, 10).slots == 32


@pytest.mark.parametrize("entries", [0, 1])
def test_queue_that_cannot_carry_a_request_is_refused(entries: int) -> None:
    with pytest.raises(DeviceError, match="cannot carry a request"):
        queue_layout(4096, entries, 24, 10)
