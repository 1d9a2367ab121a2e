# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from guard.witness.resources import EXCLUSIVE, SYSTEM_RAM
from tests.image import field
from tests.image.machines import BLOCK, DEVICE, RAM_TREE, RecordedKernel, oldmem


class Recorded(NamedTuple):
    """A machine as it lies on disk: folder, the pages that are not zeros, the VMCOREINFO text of its kernel."""

    folder: Path
    pages: dict[int, bytes]
    desc: bytes


@pytest.fixture(scope="session")
def image_machine(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """6 GiB of sparse RAM, a fragmented virtio-mem device, a dead kernel; nothing wrong with it. Not to be changed."""
    kernel = RecordedKernel()
    desc = kernel.finish_kernel()
    folder = kernel.write(tmp_path_factory.mktemp("machine"))
    return Recorded(folder, kernel.pages, desc)


@pytest.fixture(scope="session")
def field_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real crash (tests/image/field), with the pages that map, header and guard touch. Not to be
    changed: tests.image.field.Field makes copies that are."""
    return field.unpack(tmp_path_factory.mktemp("field"))


@pytest.fixture
def as_root() -> None:
    if os.geteuid():
        pytest.skip("needs root")


@pytest.fixture
def loop_driver(as_root: None) -> None:
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("no /dev/loop-control")


@pytest.fixture(scope="session")
def small_machine(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """The same with little RAM, and a device of 32 blocks, 0-15 and 20-23 of them plugged. Not to be changed."""
    kernel = RecordedKernel()
    kernel.shrink()
    size, runs = 32 * BLOCK, [[0, 16], [20, 4]]
    kernel.plugged = [(first, count) for first, count in runs]
    kernel.document["virtio_mem"][0] |= {"region_size": size, "usable_region_size": size, "plugged": runs}
    kernel.document["virtio_mem"][0] |= {"plugged_size": 20 * BLOCK, "requested_size": 20 * BLOCK}
    ram: list[object] = [(DEVICE[0], DEVICE[0] + size - 1, "System RAM (virtio_mem)", RAM_TREE, [])]
    kernel.tree[-1] = (DEVICE[0], DEVICE[0] + size - 1, "virtio0", SYSTEM_RAM | EXCLUSIVE, ram)
    desc = kernel.finish_kernel()
    folder = kernel.write(tmp_path_factory.mktemp("small"))
    return Recorded(folder, kernel.pages, desc)


@pytest.fixture(scope="session")
def saved_small(small_machine: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `oldmem save --layout kernel` makes of it: with unplugged blocks inside of a PT_LOAD."""
    out = tmp_path_factory.mktemp("saved") / "vmcore"
    assert oldmem("save", "--layout", "kernel", "--machine", small_machine.folder, "-o", out).status == 0
    return out
