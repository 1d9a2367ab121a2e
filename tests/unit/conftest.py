# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capture import boot_image, elfcore, stage2
from capture.boot_image import Initramfs, Kernel
from capture.dump import Dump, build
from capture.elfcore import Core, Load
from capture.image_machine import ImageMachine
from capture.recorded import load
from capture.vmcore import Vmcore
from guard.physmem import PREAD, OldMemory, Segment
from guard.ranges import RangeSet
from guard.registry import Registry, deny_rule
from tests.image.machines import RecordedKernel
from tests.unit.stage_parts import LINE, MIB, MakePlan, Places

MakeVmcore = Callable[..., Vmcore]


@pytest.fixture
def make_vmcore() -> Iterator[MakeVmcore]:
    """Makes a vmcore of *data* at physical *start*, with *refused* pages; *size* may be more than there is data."""
    opened: list[int] = []

    def make(data: bytes, start: int = 1 << 20, refused: RangeSet | None = None, size: int = 0) -> Vmcore:
        fd = os.memfd_create("image")
        opened.append(fd)
        os.write(fd, data)
        registry = Registry()
        registry.register(deny_rule("test", refused or RangeSet(), "refused"))
        size = size or len(data)
        memory = OldMemory([Segment(start, size, fd, 0, PREAD, "image")], registry)
        core: Core = elfcore.build(62, b"notes", [Load(start, 0, size)], 4)
        return Vmcore(core, memory)

    yield make
    for fd in opened:
        os.close(fd)


@pytest.fixture(scope="session")
def recorded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded machine with little RAM and a virtio-mem device; nothing wrong with it. Not to be changed."""
    kernel = RecordedKernel()
    kernel.shrink()
    kernel.finish_kernel()
    return kernel.write(tmp_path_factory.mktemp("machine"))


@pytest.fixture
def live_dump(recorded_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dump]:
    """Of a recorded machine, as if it were the one that this runs on."""
    made = build(ImageMachine(load(str(recorded_folder))))
    monkeypatch.setattr(made.machine, "live", True)
    yield made
    made.close()


@pytest.fixture
def plan_of(live_dump: Dump, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """Makes a plan of stage 2 for a running command line, with *room* bytes in place of the prepared header."""

    def make(line: str = LINE, most_cmdline: int = 2047, room: int = 1 << 16, **options: str) -> stage2.Plan:
        kernel = Kernel("/boot/vmlinuz", 12 * MIB, 64 * MIB, most_cmdline, "6.12")
        monkeypatch.setattr(stage2, "running_cmdline", lambda: line)
        monkeypatch.setattr(boot_image, "find_kernel", lambda given, release: kernel)
        monkeypatch.setattr(boot_image, "find_initramfs", lambda given, release: Initramfs("/boot/initrd"))
        Places(monkeypatch, room)
        return stage2.plan(live_dump, stage2.Options(**options))

    return make
