# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from capture import elfcore
from capture.elfcore import Core, Load
from capture.vmcore import Vmcore
from guard.physmem import PREAD, OldMemory, Segment
from guard.ranges import RangeSet
from guard.registry import Registry, deny_rule

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
