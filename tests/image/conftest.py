# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.image.machines import RecordedKernel


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


@pytest.fixture
def as_root() -> None:
    if os.geteuid():
        pytest.skip("needs root")


@pytest.fixture
def loop_driver(as_root: None) -> None:
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("no /dev/loop-control")
