# SPDX-License-Identifier: LGPL-2.1-or-later
"""The live machine's way back to the kernel's own rules, where it must not read around them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from capture.machine import SOURCES, LiveMachine
from capture.sources.report import SourceReport
from guard import devmem, procvmcore, virtio_mem
from guard.corefile import CoreFile
from guard.errors import Error
from guard.ranges import RangeSet
from guard.witness.memory import Problems
from tests.image.machines import vmcore_header

needs_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="of another machine the kernel makes the header")
WHY = "table at 0x7000: version 2, expected 1"


def live(source: str, core_fd: int | None = None) -> LiveMachine:
    """A machine whose construction, which wants a capture environment, is left out."""
    machine = object.__new__(LiveMachine)
    machine._wanted_source, machine.core_fd = source, core_fd
    machine.problems, machine._fds = Problems(), []
    return machine


def test_devmem_is_given_up_for_the_kernels_vmcore() -> None:
    with tempfile.TemporaryFile() as core:
        machine = live("auto", core.fileno())
        machine.only_through_kernel(WHY)
    assert machine.problems == [f"{WHY}; /proc/vmcore alone is read, where the kernel has the same rule"]
    assert not machine.around_kernel()


@pytest.mark.parametrize(("source", "core_fd"), [("auto", None), ("devmem", 3), ("vmcore", None)])
def test_without_the_kernels_vmcore_nothing_is_read(source: str, core_fd: int | None) -> None:
    with pytest.raises(Error) as told:
        live(source, core_fd).only_through_kernel(WHY)
    assert str(told.value) == f"{WHY}: old memory is read through /proc/vmcore then or not at all"


def test_memory_is_read_around_the_kernel_where_dev_mem_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devmem, "PATH", "/dev/null")
    assert live("auto").around_kernel()
    assert live("devmem").around_kernel()
    assert not live("vmcore").around_kernel()
    monkeypatch.setattr(devmem, "PATH", "/nonexistent")
    assert not live("auto").around_kernel()


@pytest.fixture
def dev_mem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 1 MiB in place of /dev/mem, for a kernel that owns none of it."""
    opened, memory = devmem.open_devmem, tmp_path / "mem"
    memory.touch()
    os.truncate(memory, 1 << 20)
    monkeypatch.setattr(LiveMachine, "own", RangeSet())
    monkeypatch.setattr(
        devmem, "open_devmem", lambda wanted, own, buffers: opened(wanted, own, buffers, path=str(memory))
    )


def test_firmware_memory_is_shown_by_dev_mem_and_its_file_closed_with_the_machine(dev_mem: None) -> None:
    machine = live("auto")
    (segment,) = machine.firmware_segments(RangeSet([(0x3000, 0x5000)]))
    assert (segment.paddr, segment.size, segment.offset) == (0x3000, 0x2000, 0x3000)
    machine.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(segment.fd)


def test_one_descriptor_of_dev_mem_is_kept_however_often_it_is_read(dev_mem: None) -> None:
    machine = live("auto")
    before = len(os.listdir("/proc/self/fd"))
    segments = [s for at in range(8) for s in machine.firmware_segments(RangeSet([(at << 13, at + 1 << 13)]))]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len({s.fd for s in segments}) == 1
    assert [s.offset for s in segments] == [at << 13 for at in range(8)]
    machine.close()
    assert len(os.listdir("/proc/self/fd")) == before


def _read_below(read: Callable[[str], SourceReport], folder: str, _: str) -> SourceReport:
    return read(folder)


@pytest.fixture
def capture_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A capture environment by the files below the folder that is given: proc/iomem is to be put there."""
    (tmp_path / "proc").mkdir()
    for name, read in list(SOURCES.items()):
        monkeypatch.setitem(SOURCES, name, partial(_read_below, read, str(tmp_path)))
    monkeypatch.setattr(procvmcore, "PATH", str(tmp_path / "proc/vmcore"))
    monkeypatch.setattr(virtio_mem, "query_all", lambda root, allow_bound: [])
    (tmp_path / "proc/vmcore").write_bytes(vmcore_header([(0, 4096)], bytes(100)))
    return tmp_path


NOT_TOLD = "; without it own memory cannot be told from old memory"


@needs_x86
@pytest.mark.parametrize(
    ("iomem", "why"),
    [
        (b"00000000-00000fff : Reserved\n", "has no System RAM, expected this kernel's own"),
        (b"00000000-00000fff : Reserved\nnonsense\n", "has no System RAM, expected this kernel's own"),
        (b"000a0000-000bffff : PCI Bus 0000:00\n  000a0000-000bffff : 0000:00:02.0\n", "has no System RAM, expected"),
        (b"", "tells of no resource at all, expected the kernel's own memory; ignored"),
        (b"00000000-00000000 : System RAM\n", "all addresses read as zero, expected real ones"),
        (None, "absent"),
    ],
)
def test_capture_kernel_that_tells_no_memory_of_its_own_is_one_line(
    iomem: bytes | None, why: str, capture_kernel: Path
) -> None:
    if iomem is not None:
        (capture_kernel / "proc/iomem").write_bytes(iomem)
    with pytest.raises(Error) as told:
        LiveMachine()
    assert str(told.value).startswith(f"{capture_kernel}/proc/iomem: {why}")
    assert str(told.value).endswith(NOT_TOLD)
    assert "\n" not in str(told.value)


@needs_x86
def test_live_machine_is_what_the_capture_environment_tells(capture_kernel: Path) -> None:
    (capture_kernel / "proc/iomem").write_text("01000000-017fffff : System RAM\n")
    machine = LiveMachine()
    assert machine.live
    assert RangeSet([(0x1000000, 0x1800000)]) & machine.own == RangeSet([(0x1000000, 0x1800000)])
    assert machine.core_header is not None
    assert machine.devices == []
    machine.close()


def with_core(path: Path, data: bytes) -> LiveMachine:
    path.write_bytes(data)
    machine = live("auto")
    machine.core = CoreFile(str(path), "/proc/vmcore")
    machine._fds.append(machine.core.fd)
    return machine


def test_device_dumps_that_came_too_late_are_told(tmp_path: Path) -> None:
    machine = with_core(tmp_path / "vmcore", vmcore_header([(0, 4096)], bytes(100)))
    assert machine.late_dumps() == []
    (tmp_path / "vmcore").write_bytes(vmcore_header([(0, 4096)], bytes(8292)))
    assert machine.late_dumps() == ["/proc/vmcore: 8192 bytes of device dumps were added too late for this vmcore"]
    (tmp_path / "vmcore").write_bytes(vmcore_header([(0, 4096), (8192, 16384)], bytes(100)))
    assert machine.late_dumps() == ["/proc/vmcore: 8192 bytes of memory were added too late for this vmcore"]
    (tmp_path / "vmcore").write_bytes(b"")
    assert machine.late_dumps() == [
        "/proc/vmcore: ends at 0x0, expected 64 bytes at 0x0: whether a driver has added a device dump is not known"
    ]
    machine.close()


def test_machine_without_the_kernels_vmcore_has_no_late_dumps() -> None:
    machine = live("auto")
    assert machine.late_dumps() == []
    with pytest.raises(Error, match="/proc/vmcore: the kernel made none: it has no notes either"):
        machine.read_core(64, 0)


def test_kernels_own_header_and_notes_are_read_by_offset(tmp_path: Path) -> None:
    header = vmcore_header([(0, 4096)], b"notes")
    machine = with_core(tmp_path / "vmcore", header)
    assert machine.read_core(5, 4096) == b"notes"
    assert machine.core_header_bytes() == header
    machine.close()
