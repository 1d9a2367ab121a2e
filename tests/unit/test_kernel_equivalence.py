# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same random histories for oldmem and for a model of the kernel: callbacks come and go, files are opened, read,
mapped and cut; every byte, every warning and every counter must be the same. A history ends with its rules compiled,
and a C program's view of them."""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from capture import elfcore
from capture.elfcore import Load
from capture.vmcore import Vmcore
from guard._core import ffi, lib
from guard.compiled import write_guard
from guard.physmem import MMAP, PREAD, Fault, OldMemory, Segment
from guard.ranges import Range, RangeSet
from guard.registry import NOT_RAM, RAM, GuardWarning, Registry, Rule, allow_rule, bitmap_rule, callback_rule, deny_rule
from tests.c import missing
from tests.unit.guard_library import Handle, Library
from tests.unit.kernel_model import LAST, PAGE, Kernel, Mapped, OldmemFile, ProcVmcore, VmcoreCb

if TYPE_CHECKING:
    from guard._core import CData

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

END = 40  # pages that there is something in
TOP = LAST // PAGE
PLUGGED, UNPLUGGED, MIXED, ERROR = "plugged", "unplugged", "mixed", "error"
USED = b"\xa5" * 16
BROKEN = [False, False, False, True]
PAGES = random.Random(4).randbytes((END + 3) * PAGE)

pages = st.integers(0, END)
addresses = st.one_of(
    st.integers(0, (END + 2) * PAGE), pages.map(lambda p: p * PAGE), st.integers(-2, 2).map(lambda n: LAST - PAGE + n)
)
sizes = st.one_of(
    st.sampled_from([0, 1, 7, PAGE - 1, PAGE, PAGE + 1, END * PAGE, (END + 4) * PAGE]),
    st.integers(1, END * PAGE),
    st.integers(2, 20).map(lambda n: n * PAGE),
)


class Callback(NamedTuple):
    """The same for both."""

    kernels: VmcoreCb
    ours: Rule


def byte_ranges(draw: st.DrawFn) -> RangeSet:
    """Whole pages and others, also behind the last byte that there is anything in."""
    border = st.one_of(pages.map(lambda p: p * PAGE), st.integers(0, END * PAGE))
    return RangeSet(draw(st.lists(st.tuples(border, border), min_size=1, max_size=6)))


def domains(draw: st.DrawFn, block: int) -> Range:
    first = draw(pages)
    return Range(first * PAGE, first * PAGE + draw(st.integers(1, END * PAGE // block)) * block)


@st.composite
def denied(draw: st.DrawFn, name: str) -> Callback:
    """As GART and unaccepted memory: these pages, and those that lie only partly in there, are not RAM."""
    refused = byte_ranges(draw)
    if draw(st.booleans()):
        refused |= RangeSet([(LAST - draw(st.integers(1, 3)) * PAGE, LAST)])
    cb = VmcoreCb(name, lambda pfn: not refused & RangeSet([(pfn * PAGE, (pfn + 1) * PAGE)]))
    return Callback(cb, deny_rule(name, refused, "denied"))


@st.composite
def allowed(draw: st.DrawFn, name: str) -> Callback:
    """Inside its own region only whole pages of what is listed; RAM everywhere else (L1)."""
    domain, ram = domains(draw, PAGE), byte_ranges(draw)

    def pfn_is_ram(pfn: int) -> bool:
        return not domain.start <= pfn * PAGE < domain.end or ram.covers(pfn * PAGE, (pfn + 1) * PAGE)

    return Callback(VmcoreCb(name, pfn_is_ram), allow_rule(name, domain, ram, "not listed"))


@st.composite
def virtio_mem(draw: st.DrawFn, name: str) -> Callback:
    """virtio_mem_vmcore_pfn_is_ram() (C6.2, L5, L6): PLUGGED alone is RAM; a device with nothing plugged is not asked;
    blocks beyond the usable region answer ERROR."""
    size = draw(st.sampled_from([1, 2, 3, 8])) * PAGE
    region = domains(draw, size)
    usable = region.size // size - draw(st.sampled_from([0, 0, 1]))
    kinds = st.sampled_from([PLUGGED, PLUGGED, UNPLUGGED, MIXED, ERROR])
    states = draw(st.lists(kinds, min_size=usable, max_size=usable))
    plugged_size = size * states.count(PLUGGED)

    def pfn_is_ram(pfn: int) -> bool:
        block = (pfn * PAGE - region.start) // size
        if not region.start <= pfn * PAGE < region.end:
            return True
        return plugged_size > 0 and (states[block] if block < usable else ERROR) == PLUGGED

    bits = sum(1 << block for block, state in enumerate(states) if state == PLUGGED)
    bitmap = bits.to_bytes((usable + 7) // 8, "little")
    return Callback(VmcoreCb(name, pfn_is_ram), bitmap_rule(name, region, size, bitmap, "unplugged"))


@st.composite
def asked(draw: st.DrawFn, name: str) -> Callback:
    """As Xen's, for which trouble is RAM, or as a driver for which it is not (L5)."""
    trouble = draw(st.sampled_from([RAM, NOT_RAM]))
    domain = domains(draw, PAGE)
    answers = draw(st.lists(st.sampled_from([True, True, False, None]), min_size=1, max_size=50))

    def answer(paddr: int) -> bool:
        found = answers[paddr // PAGE % len(answers)]
        if found is None:
            raise OSError("hypercall failed")
        return found

    def pfn_is_ram(pfn: int) -> bool:
        # OURS: asked when it is registered. The kernel asks at each read, and would see an answer that changes.
        try:
            return not domain.start <= pfn * PAGE < domain.end or answer(pfn * PAGE)
        except OSError:
            return trouble == RAM

    return Callback(VmcoreCb(name, pfn_is_ram), callback_rule(name, domain, PAGE, answer, "said so", trouble))


def callbacks(name: str) -> st.SearchStrategy[Callback]:
    return st.one_of(denied(name), allowed(name), virtio_mem(name), asked(name))


@st.composite
def files(draw: st.DrawFn) -> list[OldmemFile]:
    """Physical memory with holes between the segments; some files are cut, some cannot be read at all."""
    borders = sorted(draw(st.sets(pages, min_size=2, max_size=8)))
    found = []
    for i, (first, end) in enumerate(zip(borders[::2], borders[1::2], strict=False)):
        offset, mapped = draw(st.integers(0, 2)), draw(st.booleans())
        whole = PAGES[i * PAGE :][: (offset + end - first) * PAGE]
        there = draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
        found.append(OldmemFile(first, end - first, offset, whole[:there], mapped, draw(st.sampled_from(BROKEN))))
    if draw(st.booleans()):
        found.append(OldmemFile(TOP - 1, 1, 0, PAGES[:PAGE], False, False))
    return found


def used(size: int) -> CData:
    """A buffer that is not zeros, with some bytes behind it."""
    return ffi.new("uint8_t[]", USED[:1] * size + USED)


def same(ours: bytes, kernels: bytes) -> None:
    """Equal; says where they are not, for nobody reads two times forty pages."""
    if ours != kernels:
        at = next((i for i, (a, b) in enumerate(zip(ours, kernels, strict=False)) if a != b), -1)
        raise AssertionError(f"{len(ours)} bytes where the kernel has {len(kernels)}, first different at {at:#x}")


loads = st.lists(st.tuples(st.integers(0, END * PAGE), st.integers(1, 12 * PAGE)), min_size=1, max_size=4)


class Histories(RuleBasedStateMachine):
    library: Library

    @initialize(files=files(), loads=loads, notes=st.binary(max_size=5000))
    def boot(self, files: list[OldmemFile], loads: list[tuple[int, int]], notes: bytes) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.fds: list[int] = []
        self.segments = [self.segment(file) for file in files]
        self.registry = Registry()
        self.memory = OldMemory(self.segments, self.registry)
        self.memory.c.window_size = 4 * PAGE
        self.kernel = Kernel(files)
        self.core = elfcore.build(62, notes, [Load(paddr, 0, size) for paddr, size in loads], 4)
        self.loads = loads
        self.opened: list[tuple[Vmcore, ProcVmcore]] = []
        self.mapped: list[tuple[Handle, ProcVmcore, int, list[Mapped]]] = []
        self.named = 0

    def segment(self, file: OldmemFile) -> Segment:
        fd = os.memfd_create("oldmem")
        self.fds.append(fd)
        os.write(fd, file.data)
        if file.broken:
            fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
            self.fds.append(fd)
        how = MMAP if file.mapped else PREAD
        return Segment(file.first * PAGE, file.pages * PAGE, fd, file.offset * PAGE, how, "image")

    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        self.named += 1
        cb = data.draw(callbacks(f"rule {self.named}"))
        warned = self.kernel.register_vmcore_cb(cb.kernels)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.registry.register(cb.ours)
        assert [w.category for w in caught] == [GuardWarning] * warned

    @precondition(lambda self: self.kernel.vmcore_cb_list)
    @rule(data=st.data())
    def register_twice(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([cb.name for cb in self.kernel.vmcore_cb_list]))
        # OURS: an error. The kernel adds the same list entry twice, and the list is no longer one.
        with pytest.raises(ValueError, match="registered already"):
            self.registry.register(deny_rule(name, RangeSet([(0, LAST)]), "again"))

    @precondition(lambda self: self.kernel.vmcore_cb_list)
    @rule(data=st.data())
    def unregister(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([cb.name for cb in self.kernel.vmcore_cb_list]))
        warned = self.kernel.unregister_vmcore_cb(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.registry.unregister(name)
        assert [w.category for w in caught] == [GuardWarning] * warned

    @precondition(lambda self: len(self.opened) < 3)
    @rule()
    def open(self) -> None:
        self.kernel.vmcore_opened = self.registry.opened = True
        ours, kernels = Vmcore(self.core, self.memory), ProcVmcore(self.kernel, self.core.header, self.loads)
        assert ours.size == kernels.vmcore_size
        self.opened.append((ours, kernels))

    @rule(paddr=addresses, size=sizes)
    def read_from_oldmem(self, paddr: int, size: int) -> None:
        buffer = used(size)
        lib.physmem_read(self.memory.c, paddr, buffer, size)
        same(bytes(ffi.buffer(buffer, size + len(USED))), self.kernel.read_from_oldmem(paddr, size) + USED)

    @precondition(lambda self: self.opened)
    @rule(data=st.data(), size=sizes)
    def read(self, data: st.DataObject, size: int) -> None:
        ours, kernels = self.opened[data.draw(st.integers(0, len(self.opened) - 1))]
        borders = [0, len(self.core.header), ours.size, *(m.offset for m in kernels.vmcore_list)]
        near = st.tuples(st.sampled_from(borders), st.integers(-5, 5)).map(lambda t: max(0, sum(t)))
        fpos = data.draw(st.one_of(near, st.integers(0, ours.size + PAGE), st.just((1 << 63) - 1)))
        buffer = used(size)
        n = ours.read_into(fpos, buffer, size)
        same(bytes(ffi.buffer(buffer, n + len(USED))), kernels.read_vmcore(fpos, size) + USED)

    @precondition(lambda self: self.opened and len(self.mapped) < 3)
    @rule(data=st.data())
    def mmap(self, data: st.DataObject) -> None:
        """A mapping is composed by a compiled guard: as that is now, it stays."""
        ours, kernels = self.opened[data.draw(st.integers(0, len(self.opened) - 1))]
        start = data.draw(st.integers(0, ours.size // PAGE - 1))
        end = data.draw(st.integers(start + 1, ours.size // PAGE))
        handle = self.compiled(f"mapped {len(self.mapped)}")
        mapping = kernels.mmap_vmcore(start * PAGE, (end - start) * PAGE)
        self.mapped.append((handle, kernels, start * PAGE, mapping))
        assert list(self.composed(handle, start * PAGE, end * PAGE)) == mapping

    def compiled(self, name: str) -> Handle:
        path = Path(self.folder.name) / name
        write_guard(self.registry, str(path))
        handle = self.library.open(path)
        for s in self.segments:
            handle.add_segment(s.fd, s.offset, s.paddr, s.size, s.how)
        return handle

    def composed(self, handle: Handle, start: int, end: int) -> Iterator[Mapped]:
        """Run by run, as who maps RAM in as few pieces as there are."""
        for at in range(start, min(end, len(self.core.header)), PAGE):
            yield "header", at
        for e in self.core.extents:
            pfn = (e.paddr + max(0, start - e.offset)) // PAGE
            stop = (e.paddr + min(e.size, max(0, end - e.offset))) // PAGE
            while pfn < stop:
                ram = handle.next_ram(pfn, stop)
                yield from [("zero page", 0)] * (ram - pfn)
                pfn = handle.next_refused(ram, stop)
                yield from (("oldmem", page) for page in range(ram, pfn))

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        """What was decided when it was mapped still holds, whatever was registered since."""
        handle, kernels, start, mapping = self.mapped[data.draw(st.integers(0, len(self.mapped) - 1))]
        end = start + len(mapping) * PAGE
        assert list(self.composed(handle, start, end)) == mapping
        shown = []
        for at in range(start, end, PAGE):
            e = next((e for e in self.core.extents if e.offset <= at < e.offset + e.size), None)
            shown.append(handle.read(e.paddr + at - e.offset, PAGE) if e else self.core.header[at : at + PAGE])
        same(b"".join(shown), b"".join(map(kernels.shown, mapping)))

    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        """A file becomes shorter while it is open, and mapped."""
        i = data.draw(st.integers(0, len(self.segments) - 1))
        file = self.kernel.files[i]
        there = data.draw(st.integers(0, len(file.data)))
        os.truncate(f"/proc/self/fd/{self.segments[i].fd}", there)
        file.data = file.data[:there]

    @invariant()
    def counters_are_equal(self) -> None:
        memory, kernel = self.memory, self.kernel
        assert self.registry.counters() == kernel.refused
        assert (memory.bytes_read, memory.bytes_refused) == (kernel.bytes_read, kernel.bytes_refused)
        assert int(memory.c.tally.fault_pages) == kernel.fault_pages
        by_error: dict[int, list[tuple[int, int]]] = {}
        for error, pfn in kernel.faults:
            by_error.setdefault(error, []).append((pfn * PAGE, (pfn + 1) * PAGE))
        assert memory.faults() == sorted(Fault(r, e) for e, found in by_error.items() for r in RangeSet(found))

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        try:
            handle = self.compiled("at the end")
            self.c_answers_as_the_kernel(handle)
            self.c_reads_as_the_kernel(handle)
            handle.close()
        finally:
            for handle, *_ in self.mapped:
                handle.close()
            self.memory.close()
            for fd in self.fds:
                os.close(fd)
            self.folder.cleanup()

    def c_answers_as_the_kernel(self, handle: Handle) -> None:
        names = [cb.name for cb in self.kernel.vmcore_cb_list]
        assert list(handle.refused()) == names
        for first, end in ((0, END + 70), (TOP - 70, TOP)):
            refusers = [self.kernel.refuser(pfn) for pfn in range(first, end)]
            ram = [name is None for name in refusers]
            assert [handle.is_ram(pfn) for pfn in range(first, end)] == ram
            assert [handle.why(pfn) for pfn in range(first, end)] == [
                -1 if n is None else names.index(n) for n in refusers
            ]
            assert handle.fill(first, end - first) == ram
            assert [self.registry.pfn_is_ram(pfn) for pfn in range(first, end)] == ram
            for pfn in range(first, end, 3):
                rest = ram[pfn - first :]
                assert handle.next_ram(pfn, end) == pfn + (rest.index(True) if True in rest else len(rest))
                assert handle.next_refused(pfn, end) == pfn + (rest.index(False) if False in rest else len(rest))

    def c_reads_as_the_kernel(self, handle: Handle) -> None:
        kernel = Kernel(self.kernel.files)
        for cb in self.kernel.vmcore_cb_list:
            kernel.register_vmcore_cb(cb)
        rng = random.Random(self.named)
        asked = [(0, (END + 2) * PAGE), (LAST - 2 * PAGE, 3 * PAGE)]
        asked += [(rng.randrange(END * PAGE), rng.randrange(9 * PAGE)) for _ in range(4)]
        for paddr, size in asked:
            same(handle.read(paddr, size), kernel.read_from_oldmem(paddr, size))
        refused = sum(kernel.refused.values())
        assert handle.refused() == kernel.refused
        assert handle.counters() == (kernel.bytes_read, kernel.bytes_refused, refused, kernel.fault_pages)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("lib"))


def test_every_history_reads_as_the_kernel_would_read_it(library: Library) -> None:
    machine = type("Histories", (Histories,), {"library": library})
    checks = (HealthCheck.too_slow, HealthCheck.data_too_large)
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=250, stateful_step_count=40, deadline=None, suppress_health_check=checks),
    )
