# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole dumps of machines damaged at random: no errors but our own, an end in good time, nothing read that firmware and
devices do not vouch for, and every page either what the image has or zeros."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capture import report
from capture.dump import Dump, build
from capture.image_machine import ImageMachine
from capture.recorded import load
from guard.errors import Error
from guard.physmem import covered
from guard.ranges import RangeSet
from tests.image.machines import DEVICE, HIGH, LOW, PAGE, SMALL, RecordedKernel, plugged_spans

"""One dump at most, on a busy machine; usual are 0.05."""

VOUCHED = RangeSet([*SMALL, *plugged_spans()])


class Machine:
    """A small recorded machine on disk, whose sound state can be had back."""

    def __init__(self, folder: Path) -> None:
        self.recorded = RecordedKernel()
        self.recorded.shrink()
        self.recorded.finish_kernel()
        self.folder = self.recorded.write(folder)
        self.pages = self.recorded.pages
        self.kernel = sorted(n * PAGE for n in self.recorded.kernel.mem.pages)
        self.names = sorted(self.recorded.files)

    @contextmanager
    def memory(self, damage: list[tuple[int, bytes]]) -> Iterator[dict[int, bytes]]:
        """Write at physical addresses below 4 GiB; gives all pages that are not zeros."""
        pages = dict(self.pages)
        fd = os.open(self.folder / "ram.raw", os.O_RDWR)
        touched = {at & -PAGE for at, _ in damage} | {(at + len(data) - 1) & -PAGE for at, data in damage}
        try:
            for at, data in damage:
                os.pwrite(fd, data, at)
            pages |= {at: os.pread(fd, PAGE, at) for at in touched}
            yield pages
        finally:
            for at in touched:
                os.pwrite(fd, self.pages.get(at, bytes(PAGE)), at)
            os.close(fd)

    @contextmanager
    def files(self, changed: dict[str, bytes]) -> Iterator[None]:
        try:
            for name, data in changed.items():
                (self.folder / "root" / name).write_bytes(data)
            yield
        finally:
            for name in changed:
                (self.folder / "root" / name).write_bytes(self.recorded.files[name])

    @contextmanager
    def document(self, document: object) -> Iterator[None]:
        path = self.folder / "machine.json"
        before = path.read_text()
        try:
            path.write_text(json.dumps(document))
            yield
        finally:
            path.write_text(before)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


def dump_of(machine: Machine, layout: str, mode: str, pages: dict[int, bytes], vouched: RangeSet | None) -> None:
    """Make the dump, ask it for everything, and check what it gives."""
    try:
        dump = build(ImageMachine(load(str(machine.folder))), layout, mode)
    except Error as e:
        error = str(e)
    else:
        error = ""
        try:
            check(dump, pages, vouched)
        finally:
            dump.close()
    assert "\n" not in error


def check(dump: Dump, pages: dict[int, bytes], vouched: RangeSet | None) -> None:
    assert all("\n" not in line for line in dump.problems)
    assert len(dump.problems) < 400
    readable = dump.readable()
    shown = covered(dump.memory.segments)
    assert not dump.registry.ram(shown) - dump.envelope.all
    if vouched is not None:
        assert not readable - vouched
        assert dump.vmcore.size < 8 * dump.envelope.all.size
    assert report.map_text(dump)
    report.as_json(report.map_json(dump))
    report.as_json(report.guard_json(dump))
    with suppress(Error):
        report.compare_text(dump.compare())
    for e in dump.core.extents:
        for paddr, page in pages.items():
            if e.paddr <= paddr and paddr + PAGE <= e.paddr + e.size:
                found = dump.vmcore.read(e.offset + paddr - e.paddr, PAGE)
                expected = page if paddr in readable and paddr in shown else bytes(PAGE)
                assert found == expected, hex(paddr)
    assert dump.vmcore.read(dump.vmcore.size, 1) == b""


def values(machine: Machine) -> st.SearchStrategy[bytes]:
    """What hurts most where a pointer, a size or a count is expected."""
    kernel = machine.recorded.kernel
    addresses = [kernel.page_offset, kernel.text_vaddr, 0xFFFFC90000000000, 0xFFFFFFFF80000000]
    pointers = st.builds(
        lambda base, more: (base + more) % (1 << 64), st.sampled_from(addresses), st.integers(0, 1 << 29)
    )
    known = st.sampled_from([address for _, _, address in kernel.symbols])
    edges = st.sampled_from([0, 1, 0xFF, 1 << 31, 1 << 32, 1 << 52, 1 << 63, (1 << 64) - 1, (1 << 64) - PAGE, HIGH[0]])
    words = st.one_of(pointers, known, edges, st.integers(0, (1 << 64) - 1)).map(lambda n: struct.pack("<Q", n))
    return st.one_of(words, st.binary(min_size=1, max_size=64), st.just(b"\xff" * PAGE), st.just(bytes(PAGE)))


fuzz = settings(deadline=None, suppress_health_check=list(HealthCheck))
modes = st.sampled_from([("cut", "dynamic"), ("kernel", "dynamic"), ("cut", "preloaded")])


@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_damaged_memory_of_the_dead_kernel(machine: Machine, data: st.DataObject) -> None:
    damage = []
    for _ in range(data.draw(st.integers(1, 8))):
        page = data.draw(st.sampled_from(machine.kernel))
        at = page + 8 * data.draw(st.integers(0, PAGE // 8 - 1))
        damage.append((at, data.draw(values(machine))[: page + PAGE - at]))
    layout, mode = data.draw(modes)
    with machine.memory(damage) as pages:
        dump_of(machine, layout, mode, pages, VOUCHED)


@settings(fuzz, max_examples=40)
@given(data=st.data())
def test_damaged_vmcoreinfo(machine: Machine, data: st.DataObject) -> None:
    """Each line of it names something that is then believed, so far as it is plausible."""
    note = bytearray(machine.pages[0x11000000])
    lines = [i for i, byte in enumerate(note) if byte == 0x3D]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(lines)) + data.draw(st.integers(-3, 12))
        change = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=6),
                st.text("0123456789abcdef-\n=", min_size=1, max_size=12).map(str.encode),
            )
        )
        note[at : at + len(change)] = change
    layout, mode = data.draw(modes)
    with machine.memory([(0x11000000, bytes(note[:PAGE]))]) as pages:
        dump_of(machine, layout, mode, pages, VOUCHED)


@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_damaged_files_of_sys_and_proc(machine: Machine, data: st.DataObject) -> None:
    changed = {}
    for name in data.draw(st.lists(st.sampled_from(machine.names), min_size=1, max_size=3, unique=True)):
        content = bytearray(machine.recorded.files[name])
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, max(0, min(len(content), 600) - 1)))
            change = data.draw(values(machine))[:64]
            kind = data.draw(st.sampled_from(["change", "insert", "cut"]))
            if kind == "cut":
                del content[at:]
            else:
                content[at : at + (len(change) if kind == "change" else 0)] = change
        changed[name] = bytes(content)
    layout, mode = data.draw(modes)
    with machine.files(changed):
        dump_of(machine, layout, mode, machine.pages, None)


def json_values() -> st.SearchStrategy[Any]:
    edges = [
        0,
        1,
        511,
        4096,
        1 << 21,
        1 << 31,
        1 << 40,
        1 << 52,
        1 << 63,
        (1 << 64) - 1,
        1 << 64,
        -1,
        *LOW,
        *HIGH,
        *DEVICE,
    ]
    return st.one_of(
        st.sampled_from(edges),
        st.sampled_from(
            [None, True, 1.5, "", "x", "ram.raw", "vm0.raw", "/dev/zero", "/", ".", "\0", [], {}, [[0, 1]]]
        ),
        st.integers(-(1 << 70), 1 << 70),
        st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(list), max_size=4),
    )


@settings(fuzz, max_examples=150)
@given(data=st.data())
def test_damaged_machine_json(machine: Machine, data: st.DataObject) -> None:
    document: Any = json.loads(json.dumps(machine.recorded.document))
    for _ in range(data.draw(st.integers(1, 4))):
        where: Any = data.draw(st.sampled_from([document, *document.get("ram", []), *document.get("virtio_mem", [])]))
        if not isinstance(where, dict) or not where:
            continue
        key = data.draw(st.sampled_from(sorted(where)))
        kind = data.draw(st.sampled_from(["replace", "delete", "swap"]))
        if kind == "delete":
            del where[key]
        elif kind == "swap":
            where[key] = where[data.draw(st.sampled_from(sorted(where)))]
        else:
            where[key] = data.draw(json_values())
        if not all(isinstance(document.get(name, []), list) for name in ("ram", "virtio_mem")):
            break
    layout, mode = data.draw(modes)
    with machine.document(document):
        dump_of(machine, layout, mode, {}, None)


def test_sound_machine_passes_the_same_check(machine: Machine) -> None:
    for layout, mode in (("cut", "dynamic"), ("kernel", "dynamic"), ("cut", "preloaded")):
        dump = build(ImageMachine(load(str(machine.folder))), layout, mode)
        check(dump, machine.pages, VOUCHED)
        assert dump.problems == []
        assert dump.readable() == VOUCHED
        dump.close()
