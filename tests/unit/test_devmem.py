# SPDX-License-Identifier: LGPL-2.1-or-later
"""/dev/mem as a source: what is mapped, what is refused, and how that is told. A file stands in for the device."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from guard import devmem
from guard.errors import SourceError
from guard.physmem import MMAP, OldMemory, covered
from guard.ranges import Range, RangeSet
from guard.registry import Registry

PAGE = 4096
NONE = RangeSet()


@pytest.fixture
def memory_file(tmp_path: Path) -> str:
    path = tmp_path / "mem"
    path.write_bytes(b"".join(bytes((page,)) * PAGE for page in range(64)))
    return str(path)


class Refusing:
    """can_map() as a kernel would answer that refuses these pages."""

    def __init__(self, refused: RangeSet) -> None:
        self.refused = refused
        self.asked: list[int] = []

    def __call__(self, _fd: int, paddr: int, _page_size: int) -> int:
        self.asked.append(paddr)
        return errno.EPERM if paddr in self.refused else 0


def pages(*spans: tuple[int, int]) -> RangeSet:
    return RangeSet((a * PAGE, b * PAGE) for a, b in spans)


def test_what_is_wanted_is_mapped_at_its_own_address_without_own_memory(memory_file: str) -> None:
    opened = devmem.open_devmem(pages((2, 10), (20, 30)), pages((4, 6)), NONE, path=memory_file)
    assert covered(opened.segments) == pages((2, 4), (6, 10), (20, 30))
    assert all((s.how, s.offset, s.name) == (MMAP, s.paddr, memory_file) for s in opened.segments)
    assert opened.refused == []
    memory = OldMemory(opened.segments, Registry())
    assert memory.read(7 * PAGE, 1) == b"\7"
    memory.close()
    os.close(opened.fd)


def test_partial_pages_at_the_border_of_own_memory_are_left_out(memory_file: str) -> None:
    opened = devmem.open_devmem(pages((2, 10)), RangeSet([(4 * PAGE + 1, 5 * PAGE)]), NONE, path=memory_file)
    assert covered(opened.segments) == pages((2, 4), (5, 10))
    os.close(opened.fd)


def test_ram_buffer_that_cannot_be_mapped_is_told_with_its_cure(
    memory_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devmem, "can_map", Refusing(pages((8, 10))))
    opened = devmem.open_devmem(pages((2, 20)), NONE, pages((8, 10)), path=memory_file)
    assert covered(opened.segments) == pages((2, 8), (10, 20))
    ((piece, line),) = opened.refused
    assert piece == Range(8 * PAGE, 10 * PAGE)
    assert "RAM buffer" in line
    assert "iomem=relaxed" in line
    os.close(opened.fd)


def test_ram_buffer_is_read_where_iomem_is_relaxed(memory_file: str) -> None:
    opened = devmem.open_devmem(pages((2, 20)), NONE, pages((8, 10)), path=memory_file)
    assert covered(opened.segments) == pages((2, 20))
    assert opened.refused == []
    os.close(opened.fd)


def test_other_refusals_are_told_with_the_reason_and_the_rest_is_used(
    memory_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devmem, "can_map", Refusing(pages((30, 31))))
    opened = devmem.open_devmem(pages((2, 20), (30, 40)), NONE, NONE, path=memory_file)
    assert covered(opened.segments) == pages((2, 20))
    assert opened.refused == [
        (Range(30 * PAGE, 40 * PAGE), f"{memory_file}: 0x1e000-0x27fff cannot be mapped: Operation not permitted")
    ]
    os.close(opened.fd)


def test_addresses_that_no_file_offset_reaches_are_refused_and_the_rest_is_used(memory_file: str) -> None:
    lie = RangeSet([((1 << 64) - 2 * PAGE, 1 << 64)])
    opened = devmem.open_devmem(pages((2, 4)) | lie, NONE, NONE, path=memory_file)
    assert covered(opened.segments) == pages((2, 4))
    assert len(opened.refused) == 1
    os.close(opened.fd)


def test_nothing_mappable_is_one_error_and_leaves_no_descriptor(
    memory_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devmem, "can_map", Refusing(pages((0, 64))))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SourceError, match=f"{memory_file}: nothing of 0x2000 bytes can be mapped: "):
        devmem.open_devmem(pages((2, 4)), NONE, NONE, path=memory_file)
    assert len(os.listdir("/proc/self/fd")) == before


def test_missing_device_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"mem: No such file or directory$"):
        devmem.open_devmem(pages((2, 4)), NONE, NONE, path=str(tmp_path / "mem"))


def test_lockdown_is_named(memory_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "open", locked)
    with pytest.raises(SourceError, match=r"Operation not permitted \(lockdown closes it\)"):
        devmem.open_devmem(pages((2, 4)), NONE, NONE, path=memory_file)


def test_can_map_tells_the_error_of_a_page_that_cannot_be_mapped(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    assert devmem.can_map(fd, 0, PAGE) == errno.ENODEV
    os.close(fd)
