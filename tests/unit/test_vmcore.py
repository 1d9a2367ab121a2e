# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file that does not exist, against a model of it in Python."""

from __future__ import annotations

import os
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from capture.elfcore import Core, Extent
from capture.vmcore import Vmcore
from guard._core import ffi, lib
from guard.physmem import PREAD, OldMemory, Segment
from guard.ranges import RangeSet
from guard.registry import Registry, deny_rule
from tests.unit.conftest import MakeVmcore

PAGE = 4096
MEMORY = random.Random(2).randbytes(64 * PAGE)


@st.composite
def cores(draw: st.DrawFn) -> Core:
    """A head, and extents behind it with or without gaps, not always whole pages, of memory that is there or not."""
    head = random.Random(1).randbytes(draw(st.integers(0, 3 * PAGE)))
    offset = len(head)
    extents = []
    for _ in range(draw(st.integers(0, 5))):
        offset += draw(st.sampled_from([0, 0, 1, PAGE, 5000]))
        size = draw(st.one_of(st.integers(0, 4), st.integers(1, 6).map(lambda n: n * PAGE), st.integers(1, 20_000)))
        extents.append(Extent(offset, size, draw(st.integers(0, 70 * PAGE))))
        offset += size
    return Core(head, tuple(extents), offset + draw(st.sampled_from([0, 0, 10, PAGE])), ())


@settings(max_examples=200, deadline=None)
@given(
    cores(),
    st.sets(st.integers(0, 63), max_size=20),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 1 << 17)), min_size=1, max_size=8),
)
def test_reads_are_those_of_the_model(core: Core, refused: set[int], asked: list[tuple[int, int]]) -> None:
    memory = bytearray(MEMORY.ljust(100 * PAGE, b"\0"))
    for page in refused:
        memory[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    model = bytearray(core.size)
    model[: len(core.header)] = core.header
    for e in core.extents:
        model[e.offset : e.offset + e.size] = memory[e.paddr : e.paddr + e.size]
    fd = os.memfd_create("memory")
    try:
        os.write(fd, MEMORY)
        registry = Registry()
        registry.register(deny_rule("refused", RangeSet((p * PAGE, p * PAGE + PAGE) for p in refused), "refused"))
        vmcore = Vmcore(core, OldMemory([Segment(0, len(MEMORY), fd, 0, PREAD, "memory")], registry))
        assert vmcore.size == len(model)
        for offset, size in [*asked, (0, len(model) + 10), (len(model), 1), (1 << 63, 5), ((1 << 64) - 1, 5)]:
            assert vmcore.read(offset, size) == model[offset : offset + size]
    finally:
        os.close(fd)


@given(st.binary(max_size=40), st.integers(0, 30))
def test_all_zero_is_true_for_nothing_but_zeros(tail: bytes, zeros: int) -> None:
    data = bytes(zeros) + tail
    assert bool(lib.all_zero(ffi.from_buffer("uint8_t[]", data), len(data))) == (not any(data))


def test_reading_in_pieces_of_any_size_gives_the_whole(make_vmcore: MakeVmcore) -> None:
    vmcore = make_vmcore(MEMORY)
    whole = vmcore.read(0, vmcore.size)
    assert whole[-len(MEMORY) :] == MEMORY
    for size in (1000, 4096, 65_537):
        assert b"".join(vmcore.read(at, size) for at in range(0, vmcore.size, size)) == whole
