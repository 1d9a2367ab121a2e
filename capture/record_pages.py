# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory of a minimal record: the pages that map, header and guard asked for, and no page of a user's.

Each page's struct page is looked at first (guard/witness/owners.py): none is written that is not the kernel's own. All
go back to back into one image, and the ranges that they are of say which they have (`held` in machine.json)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from capture.dump import Dump
from capture.memory_map import WHOLE
from capture.recorded import RamImage, Runs, VirtioMemState
from guard.errors import Error, ReadError, SourceError, WitnessError
from guard.physmem import FIRMWARE, LOG, ExactMemory, OldMemory
from guard.ranges import Range, RangeSet
from guard.registry import Registry, allow_rule
from guard.witness import owners
from guard.witness.owners import Owners
from guard.witness.pagewalk import x86_64

IMAGE = "pages.raw"
MAX_RUNS = 1 << 18
"""Runs of pages in one record: machine.json may have 16 MiB. A machine of 16 TiB has some ten thousand."""
HARDWARE_ERRORS = ("hwpoison", "machine check")
"""Rules whose pages are never read again."""
_PIECE = 1 << 20


class Reader:
    """Old memory as the witness read it, to be read once more: most of its pages as anything is read; some that its own
    records refuse in the end (an offline section, say) by the rules of before; *firmware*, which was read already, from
    firmware. A page with a hardware error is not tried again."""

    def __init__(self, dump: Dump, firmware: RangeSet) -> None:
        page_size = dump.machine.page_size
        self.early = Registry(page_size)
        for rule in dump.early_rules:
            self.early.register(rule)
        for rule in dump.registry:
            if rule.name in HARDWARE_ERRORS:
                self.early.register(rule)
        tables = Registry(page_size)
        tables.register(allow_rule("firmware", WHOLE, firmware, "not read before", page_size))
        try:
            segments = dump.machine.firmware_segments(firmware) if firmware else []
        except SourceError:
            segments = []
        core = dump.machine.core
        ways = (dump.exact.untracked(), ExactMemory(OldMemory(dump.memory.segments, self.early, core)))
        self._ways = (*ways, ExactMemory(OldMemory(segments, tables, core)))

    def read(self, paddr: int, size: int) -> bytes:
        """As guard.witness.memory.Memory."""
        for way in self._ways[:-1]:
            with contextlib.suppress(ReadError):
                return way.read(paddr, size)
        return self._ways[-1].read(paddr, size)


class Choice(NamedTuple):
    """What of the touched pages is written, and what is not because it is not the kernel's own, because nothing tells
    whose it is, because it is the log's. Physical bytes, whole pages; *firmware* lies outside of what a dump reads."""

    pages: RangeSet
    firmware: RangeSet
    others: RangeSet
    unseen: RangeSet
    log: RangeSet


def choose(dump: Dump, with_log: bool, force: bool) -> Choice:
    """Look whose the touched pages are; *force* takes those too of which nothing tells. Raises Error where that is of
    none of them."""
    touched = dump.machine.touched
    if touched is None:
        raise Error("nobody noted which pages were read")
    for _ in dump.map():  # some records are read when they are asked for
        pass
    asked = touched.pages(*(tag for tag in touched.tags() if tag not in (LOG, FIRMWARE)))
    log = RangeSet() if with_log else touched.pages(LOG) - asked
    asked |= touched.pages(LOG) - log
    asked &= dump.memory.recorded
    reader = Reader(dump, touched.pages(FIRMWARE))
    pages = dump.registry.ram(asked) | reader.early.ram(asked)
    firmware = touched.pages(FIRMWARE) - pages
    try:
        found = _owners(dump, pages, reader)
    except WitnessError as e:
        if not force:
            count = pages.size // dump.machine.page_size
            raise Error(f"{e}: nothing tells whose {count} pages are (--force: write them all the same)") from None
        found = Owners(RangeSet(), RangeSet())
    unseen = RangeSet() if force else found.unseen
    return Choice(pages - found.others - unseen, firmware, found.others, unseen, log)


def _owners(dump: Dump, pages: RangeSet, reader: Reader) -> Owners:
    if not pages:
        return Owners(RangeSet(), RangeSet())
    dead, info = dump.arch.dead, dump.arch.info
    if dead is None or info is None:
        raise WitnessError("no records of the dead kernel")
    sections = dead.sections()
    memmap = info.symbol("vmemmap") or (sections.memmap if sections else None)
    if memmap is None:
        raise WitnessError("neither vmcoreinfo nor mem_section tells where struct pages are")
    # a walk of its own: what is looked at only here need not be in the record
    return owners.look(x86_64(reader, info), info, memmap, pages)


class Written(NamedTuple):
    """The ranges of the recorded machine; *ram* and *virtio_mem* have IMAGE in their place."""

    ram: tuple[RamImage, ...]
    virtio_mem: tuple[VirtioMemState, ...]
    pages: RangeSet


def write(dump: Dump, choice: Choice, devices: Iterable[VirtioMemState], image: BinaryIO) -> Written:
    """Write the pages of *choice* into *image*; *devices* are the machine's, as they are recorded without memory.

    Raises Error."""
    machine = dump.machine
    page = machine.page_size
    writer = _Writer(image, page, Reader(dump, choice.firmware))
    pages = choice.pages | choice.firmware
    ram: list[RamImage] = []
    virtio: list[VirtioMemState] = []
    for entry in _ram(dump):
        offset = image.tell()
        ram.append(entry._replace(image=IMAGE, offset=offset, held=writer.write(pages, entry)))
    for device in devices:
        offset = image.tell()
        region = RamImage(IMAGE, 0, device.addr, device.region_size)
        shown = device.shown
        if machine.record is None:
            there = dump.memory.covered & RangeSet([_span(region)])
            shown = None if there.covers(*_span(region)) else _runs(there, region.paddr, page)
        elif device.image is None:
            shown = ()
        if shown == ():
            virtio.append(device._replace(image=None))
            continue
        held = writer.write(pages, region)
        virtio.append(device._replace(image=IMAGE, offset=offset, held=held, shown=shown))
    for piece in choice.firmware - RangeSet(_span(r) for r in ram):
        offset = image.tell()
        entry = RamImage(IMAGE, offset, piece.start, piece.size)
        ram.append(entry._replace(held=writer.write(pages, entry)))
    writer.finish()
    return Written(tuple(ram), tuple(virtio), RangeSet(writer.written))


def _span(r: RamImage) -> Range:
    return Range(r.paddr, r.paddr + r.size)


def _ram(dump: Dump) -> list[RamImage]:
    """The ranges of memory, without devices': as they are recorded already, or what the capture kernel was shown."""
    machine = dump.machine
    if machine.record is not None:
        return list(machine.record.ram)
    shown = dump.memory.covered - RangeSet(d.region for d in machine.devices)
    return [RamImage(IMAGE, 0, r.start, r.size) for r in shown]


def _runs(pages: RangeSet, start: int, page: int) -> Runs:
    return tuple(((r.start - start) // page, r.size // page) for r in pages)


class _Writer:
    def __init__(self, image: BinaryIO, page: int, memory: Reader) -> None:
        self._image = image
        self._page = page
        self._memory = memory
        self.written: list[Range] = []

    def write(self, pages: RangeSet, entry: RamImage) -> Runs:
        """Append those of *pages* that lie in *entry* and can be read; returns which they were, from its start on."""
        if entry.paddr % self._page:
            if pages & RangeSet([_span(entry)]):
                raise Error(f"memory at {entry.paddr:#x} does not start with a page: pages of it cannot be recorded")
            return ()
        found: list[Range] = []
        for run in (pages & RangeSet([_span(entry)])).inner_pages(self._page):
            for start, data in self._read(run):
                self._append(data)
                found.append(Range(start, start + len(data)))
                if len(found) > MAX_RUNS:
                    found = list(RangeSet(found))
                if len(self.written) + len(found) > MAX_RUNS:
                    raise Error(
                        f"more than {MAX_RUNS} runs of pages were read: no sound dead kernel, no minimal record"
                    )
        held = RangeSet(found)
        self.written += held
        return _runs(held, entry.paddr, self._page)

    def _read(self, run: Range) -> Iterator[tuple[int, bytes]]:
        """What of *run* can be read, piece by piece; where one fails page by page."""
        for start in range(run.start, run.end, _PIECE):
            end = min(run.end, start + _PIECE)
            try:
                yield start, self._memory.read(start, end - start)
                continue
            except ReadError:
                pass
            for at in range(start, end, self._page):
                try:
                    yield at, self._memory.read(at, self._page)
                except ReadError:
                    continue

    def _append(self, data: bytes) -> None:
        """Pages of zeros become holes."""
        for at in range(0, len(data), self._page):
            page = data[at : at + self._page]
            if page.count(0) == len(page):
                self._image.seek(len(page), 1)
            else:
                self._image.write(page)

    def finish(self) -> None:
        """The file is as large as what was written to it, though it may end with a hole."""
        self._image.truncate(self._image.tell())
