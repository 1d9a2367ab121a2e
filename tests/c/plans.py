# SPDX-License-Identifier: LGPL-2.1-or-later
"""A plan of ``oldmem run`` for ``windows``: the example's rules over an image that ends before its memory does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from capture.elfcore import Load, build
from capture.plan import Plan
from capture.vmcore import Vmcore
from guard.physmem import PREAD, OldMemory, Segment
from tests.c import PAGE, example

EM_X86_64 = 62


@contextlib.contextmanager
def planned(folder: Path, image: Path) -> Iterator[tuple[str, Path]]:
    """Path of a plan, for as long as the context lasts, and the file that has the bytes of its vmcore."""
    registry = example()
    fd = os.open(image, os.O_RDONLY)
    memory = OldMemory([Segment(0, 64 * PAGE, fd, 0, PREAD, str(image))], registry)
    core = build(EM_X86_64, b"", [Load(2 * PAGE, 0, 30 * PAGE), Load(40 * PAGE, 0, 24 * PAGE)], 4)
    vmcore = Vmcore(core, memory)
    expected = folder / "expected"
    expected.write_bytes(vmcore.read(0, vmcore.size))
    machine = SimpleNamespace(to_map=lambda segments: segments, core=None)
    dump: Any = SimpleNamespace(machine=machine, registry=registry, memory=memory, core=core, vmcore=vmcore)
    plan = Plan(dump, fd, "/proc/vmcore")  # no server here: the image stands for what it would serve
    try:
        yield f"/proc/{os.getpid()}/fd/{plan.fd}", expected
    finally:
        plan.close()
        memory.close()
        os.close(fd)
