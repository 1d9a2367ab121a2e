# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real crash (tests/image/field) with bits of its memory flipped, where the dead kernel's records are really read.

A run flips a few bits and makes the dump, in this process and without a file being written: the images are mapped, and
flipped back afterwards. Whatever was flipped, the law holds (:func:`breaches`):

- no exception but the project's own, which are one line; nothing endless: bytes read and processor time are bounded
- the header is one that pyelftools reads, and lists nothing outside of what firmware calls RAM and of device regions
- what it lists, or lets be read, beyond the sound machine's is told
- exit status 0 only where nothing of the sound machine's is missing

The mark of a page is the one exception from the last two: a flipped bit of its own struct page is the evidence."""

from __future__ import annotations

import io
import json
import mmap
import random
import signal
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from capture.dump import CUT, KERNEL, Dump, build
from capture.image_machine import ImageMachine
from capture.recorded import load
from guard.errors import Error
from guard.physmem import Touched
from guard.ranges import RangeSet
from guard.witness import dead_kernel, kallsyms
from guard.witness.memory import Memory, Problems
from guard.witness.pagewalk import PageWalk, x86_64
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.image.field import PAGE, truth

LAYOUTS = CUT, KERNEL
MOST_FLIPS = 8
MOST_LINES, LONGEST_LINE = 100, 1000
PROCESSOR_SECONDS = 30.0
"""Of one run, of which the usual ones take 0.05: what is endless ends here."""
MOST_READ = 3
"""Times what the sound machine has read of it."""
FOLIO = 1 << 18
"""Pages of the largest folio (1 GiB), all of which the mark of its head speaks for."""


class Flip(NamedTuple):
    """One bit of memory, by physical address."""

    paddr: int
    bit: int

    def __str__(self) -> str:
        return f"{self.paddr:#x}.{self.bit}"


class Run(NamedTuple):
    """Which bits are flipped, and how the dump is laid out."""

    layout: str
    flips: tuple[Flip, ...]

    def __str__(self) -> str:
        return f"{self.layout} {' '.join(map(str, self.flips))}"


def parse(text: str) -> Run:
    """What str() made of a Run."""
    layout, *flips = text.split()
    return Run(layout, tuple(Flip(int(at, 16), int(bit)) for at, bit in (flip.split(".") for flip in flips)))


class Asked(Touched):
    """Each read by itself, not only the pages."""

    __slots__ = ("reads",)

    def __init__(self, page_size: int) -> None:
        super().__init__(page_size)
        self.reads: list[tuple[int, int]] = []

    def add(self, paddr: int, size: int, tag: str = "") -> None:
        super().add(paddr, size, tag)
        if size > 0:
            self.reads.append((paddr, size))


class Images:
    """The pages that the record holds, to be changed in place."""

    def __init__(self, folder: Path) -> None:
        document: dict[str, Any] = json.loads((folder / "machine.json").read_text())
        self._runs: list[tuple[int, int, str, int]] = []
        self._maps: dict[str, mmap.mmap] = {}
        for entry in [*document["ram"], *document["virtio_mem"]]:
            start, offset = entry["paddr" if "paddr" in entry else "addr"], entry.get("offset", 0)
            for first, count in entry["held"]:
                self._runs.append((start + first * PAGE, count * PAGE, entry["image"], offset))
                offset += count * PAGE
            if entry["image"] not in self._maps:
                with open(folder / entry["image"], "r+b") as file:
                    self._maps[entry["image"]] = mmap.mmap(file.fileno(), 0)
        self._runs.sort()

    def holds(self, paddr: int) -> bool:
        return self._at(paddr) is not None

    def _at(self, paddr: int) -> tuple[mmap.mmap, int] | None:
        at = bisect_right(self._runs, paddr, key=lambda run: run[0]) - 1
        start, size, image, offset = self._runs[at]
        return (self._maps[image], offset + paddr - start) if at >= 0 and paddr < start + size else None

    def flip(self, flip: Flip) -> None:
        found = self._at(flip.paddr)
        assert found is not None, f"{flip} is not held"
        found[0][found[1]] ^= 1 << flip.bit

    @contextmanager
    def flipped(self, flips: tuple[Flip, ...]) -> Iterator[None]:
        done: list[Flip] = []
        try:
            for flip in flips:
                self.flip(flip)
                done.append(flip)
            yield
        finally:
            for flip in done:
                self.flip(flip)

    def close(self) -> None:
        for one in self._maps.values():
            one.close()


class Sound(NamedTuple):
    """What the untouched machine's dump has."""

    readable: RangeSet
    listed: RangeSet
    bytes_read: int


class Endless(BaseException):
    """A run took more processor time than it may."""


class WholeMachine:
    """The machine in *folder* (field.unpack() has returned it), which is changed while a run goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = Images(folder)
        self.poisoned = RangeSet(truth(folder)["hwpoison"])
        reads: set[tuple[int, int]] = set()
        self.sound: dict[str, Sound] = {}
        for layout in LAYOUTS:
            asked = Asked(PAGE)
            dump = self._dump(layout, asked)
            try:
                assert (dump.problems, dump.lost()) == ([], RangeSet())
                self.sound[layout] = Sound(dump.readable(), listed(dump), dump.memory.bytes_read)
                self.allowed = dump.envelope.boot | RangeSet(d.region for d in dump.machine.devices)
                self.own = dump.machine.own
                assert dump.arch.dead is not None
                self.struct_pages = StructPages(dump.arch.dead, self.allowed)
                self.symbols = Symbols(dump.arch.dead)
            finally:
                dump.close()
            reads.update(asked.reads)
        self.kinds = self._by_kind({(at, size) for at, size in reads if self.images.holds(at)})
        assert not self.sound[CUT].readable & self.poisoned

    def _by_kind(self, reads: set[tuple[int, int]]) -> list[tuple[float, list[tuple[int, int]]]]:
        """What was read, and how often runs are about it: a page of struct pages or of symbols has thousands of bits
        for each one of a pointer."""
        small = {read for read in reads if read[1] <= PAGE}
        struct_pages = {read for read in reads - small if self.struct_pages.have(read[0])}
        return [(0.75, sorted(small)), (0.15, sorted(struct_pages)), (0.1, sorted(reads - small - struct_pages))]

    def _dump(self, layout: str, touched: Touched | None = None) -> Dump:
        machine = ImageMachine(load(str(self.folder)))
        machine.touched = touched
        return build(machine, layout)

    def run(self, rng: random.Random) -> Run:
        """Flips for one run, in bytes that the sound machine's dump reads."""
        (kind,) = rng.choices([reads for _, reads in self.kinds], [often for often, _ in self.kinds])
        flips: dict[Flip, None] = {}
        for _ in range(1 + min(MOST_FLIPS - 1, int(rng.expovariate(0.6)))):
            at, size = rng.choice(kind)
            paddr = at + rng.randrange(size)
            if self.images.holds(paddr):
                flips[Flip(paddr, rng.randrange(8))] = None
        return Run(rng.choice(LAYOUTS), tuple(flips))

    def breaches(self, run: Run) -> list[str]:
        """Where the law does not hold for *run*: the kind of breach, a colon, what was seen."""
        try:
            with self.images.flipped(run.flips), within(PROCESSOR_SECONDS), self.symbols.known_unless(run.flips):
                try:
                    dump = self._dump(run.layout)
                except Error as e:
                    return list(bad_lines([str(e)]))
                try:
                    return list(self._breaches_of(dump, run))
                finally:
                    dump.close()
        except (Exception, Endless) as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            return [f"{type(e).__name__} in {Path(where.filename).name}:{where.lineno}: {e}"]

    def _breaches_of(self, dump: Dump, run: Run) -> Iterator[str]:
        yield from bad_lines(list(dump.problems))
        sound, lost = self.sound[run.layout], dump.lost()
        told = bool(dump.problems or lost)
        if dump.memory.bytes_read > MOST_READ * sound.bytes_read:
            yield f"too much is read: {dump.memory.bytes_read} bytes, {sound.bytes_read} of the sound machine"
        try:
            shown = listed(dump).outer_pages(PAGE)
        except (ELFError, AssertionError) as e:
            yield f"the header is not one: {e}"
            return
        if outside := shown - self.allowed.outer_pages(PAGE):
            yield f"listed outside of the envelope: {outside}"
        marked = self.struct_pages.of(run.flips)
        readable = dump.readable()
        if outside := readable - self.allowed:
            yield f"read outside of the envelope: {outside}"
        if more := readable & self.own:
            yield f"the capture kernel's own memory is read: {more}"
        if not told and (more := readable - sound.readable - marked):
            yield f"readable and not told: {more}"
        if not told and (more := shown - sound.listed - marked):
            yield f"listed and not told: {more}"
        if not lost and (less := sound.readable - readable - marked):
            rules = sorted({rule.name for r in less for _, rule in dump.registry.verdicts(*r) if rule})
            yield f"missing with status 0, {'and a line' if told else 'silently'}, by {', '.join(rules)}: {less}"
        if not lost and (less := sound.readable - shown - marked):
            yield f"not listed with status 0, {'and a line' if told else 'silently'}: {less}"

    def close(self) -> None:
        self.images.close()


class StructPages:
    """Which struct page of the dead kernel lies where."""

    def __init__(self, dead: dead_kernel.DeadKernel, ram: RangeSet) -> None:
        vmemmap, size = dead.info.symbol("vmemmap"), dead.info.size("page")
        assert vmemmap is not None
        assert size == 64
        self._of: dict[int, int] = {}
        for start, end in ram.outer_pages(PAGE):
            for pfn in range(start // PAGE & -64, end // PAGE, 64):
                with_none: int | None = None
                try:
                    with_none = dead.walk.translate(vmemmap + pfn * 64)
                except Error:
                    continue
                self._of[with_none] = pfn

    def have(self, paddr: int) -> bool:
        return paddr & -PAGE in self._of

    def of(self, flips: tuple[Flip, ...]) -> RangeSet:
        """Memory whose own marks *flips* may have changed."""
        pfns = [self._of[at & -PAGE] + at % PAGE // 64 for at, _ in flips if at & -PAGE in self._of]
        return RangeSet((pfn * PAGE, (pfn + 1) * PAGE) for pfn in pfns)


class Symbols:
    """kallsyms take most of a dump's time, and are the same where no flip is in what they are read from: then the
    sound machine's are given."""

    def __init__(self, dead: dead_kernel.DeadKernel) -> None:
        self._asked = Asked(PAGE)
        self._problems = Problems()
        mem = Recording(dead.walk.mem, self._asked)
        self._info = dead.info.desc
        self._found = kallsyms.lookup(x86_64(mem, dead.info), dead.info, dead_kernel.WANTED, self._problems)
        assert self._problems == []
        self._where = RangeSet((at, at + size) for at, size in self._asked.reads)

    @contextmanager
    def known_unless(self, flips: tuple[Flip, ...]) -> Iterator[None]:
        lookup = kallsyms.lookup

        def known(walk: PageWalk, info: Vmcoreinfo, names: frozenset[str], problems: Problems) -> dict[str, int]:
            if info.desc != self._info or any(flip.paddr in self._where for flip in flips):
                return lookup(walk, info, names, problems)
            return dict(self._found)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kallsyms, "lookup", known)
            yield


class Recording:
    """*mem*, with what is read of it noted."""

    def __init__(self, mem: Memory, asked: Asked) -> None:
        self._mem, self._asked = mem, asked

    def read(self, paddr: int, size: int) -> bytes:
        self._asked.add(paddr, size)
        return self._mem.read(paddr, size)


def listed(dump: Dump) -> RangeSet:
    """Physical memory of the header's PT_LOADs, as pyelftools reads them. Raises ELFError, or AssertionError where they
    contradict each other."""
    found = []
    end = 0
    loads = [s.header for s in ELFFile(io.BytesIO(dump.core.header)).iter_segments() if s.header.p_type == "PT_LOAD"]
    for p in sorted(loads, key=lambda p: int(p.p_offset)):
        assert p.p_filesz == p.p_memsz, f"{p.p_filesz:#x} bytes in the file, {p.p_memsz:#x} in memory"
        assert p.p_offset >= end, f"two PT_LOADs at {p.p_offset:#x} of the file"
        assert p.p_offset % PAGE == p.p_paddr % PAGE == p.p_vaddr % PAGE, f"{p.p_paddr:#x} at {p.p_offset:#x}"
        end = p.p_offset + p.p_filesz
        found.append((p.p_paddr, p.p_paddr + p.p_memsz))
    assert end <= dump.vmcore.size, f"the file ends at {dump.vmcore.size:#x}, its PT_LOADs at {end:#x}"
    return RangeSet(found)


def bad_lines(lines: list[str]) -> Iterator[str]:
    if len(lines) > MOST_LINES:
        yield f"too many lines: {len(lines)}"
    for line in lines:
        if "\n" in line or not line or len(line) > LONGEST_LINE:
            yield f"no line for people: {line[:200]!r}"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Endless in the block after *seconds* of processor time, which do not depend on what else runs."""

    def ends(number: int, frame: FrameType | None) -> None:
        raise Endless(f"{seconds:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, ends)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def shrunk(run: Run, breaks: Callable[[Run], bool]) -> Run:
    """*run* with those flips alone that it takes to have *breaks* say yes."""
    for flip in run.flips:
        fewer = run._replace(flips=tuple(f for f in run.flips if f != flip))
        if len(fewer.flips) < len(run.flips) and breaks(fewer):
            run = fewer
    return run
