# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a machine to its vmcore: the one line that the data takes.

sources -> envelope and rules -> gated memory -> the dead kernel's records -> memory map -> header -> vmcore."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, NamedTuple

from capture import elfcore, envelope, losses, memory_map
from capture.arch import Shape
from capture.elfcore import Core, Extent, Load
from capture.machine import Machine
from capture.memory_map import Entry
from capture.sources import report
from capture.vmcore import Vmcore
from guard import procvmcore
from guard.errors import SourceError
from guard.physmem import ExactMemory, OldMemory, layer, only
from guard.ranges import Range, RangeSet
from guard.registry import Registry, Rule
from guard.witness import e820
from guard.witness.memory import Problems

if TYPE_CHECKING:
    from guard.plugins import Plugin

CUT, KERNEL = "cut", "kernel"
DYNAMIC, PRELOADED = "dynamic", "preloaded"

# A header's PT_LOADs at most, as in the kernel's own (CRASH_MAX_MEMORY_RANGES): each costs memory in the capture kernel
MAX_LOADS = 8192


class Difference(NamedTuple):
    """A range in which the preloaded header and the memory map do not agree."""

    range: Range
    what: str  # "missing" from the preloaded header, or "too much" in it
    why: str


class Dump:
    """Everything about one dump; *rules* and those of *plugins* are asked besides its own. Raises SourceError or Error
    if there is nothing to build it from; whatever else is wrong is a line in ``problems`` and the rest goes on."""

    def __init__(
        self,
        machine: Machine,
        layout: str = CUT,
        mode: str = DYNAMIC,
        rules: Sequence[Rule] = (),
        plugins: Sequence[Plugin] = (),
    ) -> None:
        self.machine, self.layout, self.mode = machine, layout, mode
        self.shape: Shape | None = None  # of a header that was built, not taken over
        self.left_out = RangeSet()
        """What may be read and the header has no room for; of very much the first runs."""
        self.arch = machine.arch
        if machine.header_is_the_kernels and mode != PRELOADED:
            self.mode = PRELOADED
            machine.remarks.note(f"this kernel built the header of {procvmcore.PATH} itself: it is taken as it is")
        self.problems: Problems = machine.problems
        self.registry = Registry(machine.page_size)
        devices = machine.devices
        for source in machine.reports.values():
            for line in source.damage:
                self.problems.note(line)
        self.envelope = envelope.envelope(
            machine.reports,
            RangeSet(d.region for d in devices),
            machine.images,
            self.preloaded_ranges() if machine.core_header else RangeSet(),
            self.problems,
            machine.header_is_the_kernels,
        )
        if not self.envelope.boot | self.envelope.disputed:
            lines = [line for name in envelope.RAM_SOURCES for line in machine.reports[name].problems]
            why = (
                "; ".join(lines) or f"by {', '.join(envelope.RAM_SOURCES)} there is none, or something else lies there"
            )
            raise SourceError(f"no source tells where the dead machine's RAM was: {why}")
        memory_map.install_rules(self.registry, self.envelope, self._foreign(), devices)
        for rule in rules:
            self.registry.register(rule)
        self.arch.hear_platform(self)
        wanted = self.envelope.all.inner_pages(machine.page_size)
        segments = machine.open_segments(wanted)
        if self.mode == PRELOADED and machine.core_fd is not None and machine.core_header is not None:
            # low memory that kexec backed up: only the kernel's own header knows where it went
            kernels = procvmcore.segments(machine.core_fd, machine.core_header, machine.page_size)
            own = machine.own.outer_pages(machine.page_size)  # System RAM may begin and end inside of a page
            segments = layer(only(kernels, own), only(segments, wanted - own))
        self.memory = OldMemory(segments, self.registry, machine.core)
        self.exact = ExactMemory(self.memory, machine.touched)
        self.unknown: list[str] = self._ask(plugins) if plugins else []
        """Lines on rule plug-ins by which nobody knows what they would have refused: it was not."""
        self.early_rules = tuple(self.registry)
        """Those in force before the dead kernel was heard: it was read by them."""
        self.arch.hear(self)
        self.core = self._preloaded() if self.mode == PRELOADED else self._dynamic()
        self.vmcore = Vmcore(self.core, self.memory)
        self.registry.opened = True
        hidden = RangeSet(losses.hidden(self))
        for piece, line in machine.unmapped:
            (self.problems if hidden & RangeSet([piece]) else machine.remarks).note(line)
        if self.arch.dead:
            for line in self.arch.dead.problems:
                self.problems.note(line)
        for device in devices:
            for line in device.problems:
                self.problems.note(f"{device.name}: {line}")

    def _ask(self, plugins: Sequence[Plugin]) -> list[str]:
        """Before the dead kernel's records are read: what a plug-in refuses must not be read for them either."""
        from guard.plugins import Context, install

        m = self.machine
        context = Context(self.exact, self.envelope.all, m.page_size, m.root, self.arch.name, m.vmcoreinfo_paddr)
        return install(plugins, context, self.registry, self.problems)

    def _foreign(self) -> RangeSet:
        """What must not be read as old memory because it is the capture kernel's."""
        return self.machine.own - self.backed_up()

    def backed_up(self) -> RangeSet:
        """Taken as it is, the preloaded header may list memory that kexec copied away before this kernel took it."""
        return self.preloaded_ranges() if self.mode == PRELOADED else RangeSet()

    def readable_runs(self) -> Iterator[Range]:
        """What may be read of old memory, in whole pages, ascending, one run at a time."""
        for span in self.envelope.all.inner_pages(self.machine.page_size):
            yield from (run for run, rule in self.registry.verdicts(*span) if rule is None)

    def readable(self) -> RangeSet:
        """All of :meth:`readable_runs` at once."""
        return RangeSet(self.readable_runs())

    def _dynamic(self) -> Core:
        shape = self.arch.shape(self)
        shape = shape._replace(text=self._text_inside(shape.text))
        ranges = self.arch.kernel_ranges(self) if self.layout == KERNEL else None
        if ranges is not None:
            ranges = self._inside(ranges)
        else:
            ranges = self._ranges()
        core = self.served(shape, ([shape.text] if shape.text else []) + [shape.load(r) for r in ranges])
        self.shape = shape.within(core.header, core.phdrs[0].offset)
        return core

    def _ranges(self) -> list[Range]:
        """The PT_LOAD ranges of layout cut; tells what a header of that size cannot have."""
        bridges = self.envelope.all - self.machine.own
        if found := memory_map.merged(self.readable_runs, bridges, MAX_LOADS):
            ranges, gap = found
            if gap:
                self.problems.note(
                    f"memory in more than {MAX_LOADS} runs: PT_LOADs bridge gaps of up to {gap:#x} bytes; "
                    "what lies in them is refused and reads as zeros"
                )
            return ranges
        ranges, count, size = memory_map.largest(self.readable_runs(), MAX_LOADS)
        self.problems.note(
            f"memory in more than {MAX_LOADS} runs, no memory between: {count} of them, {size:#x} bytes, are left out"
        )
        listed = set(ranges)
        self.left_out = RangeSet(islice((run for run in self.readable_runs() if run not in listed), losses.MOST))
        return ranges

    def _inside(self, ranges: list[Range]) -> list[Range]:
        """*ranges*, which are the dead kernel's word, as far as they lie in the envelope, whose ends need not be those
        of pages; tells what does not."""
        env = self.envelope.all.outer_pages(self.machine.page_size)
        if outside := RangeSet(ranges) - env:
            self.problems.note(
                f"the dead kernel's records have RAM at {outside}, where nothing else has any: not listed"
            )
        return [piece for r in ranges for piece in RangeSet([r]) & env]

    def _text_inside(self, text: Load | None) -> Load | None:
        """*text*, which is the dead kernel's word, as far as it lies in one piece of RAM; tells what does not. Where
        the kernel builds its header by itself, ours is that one, and RAM is what an image holds, maybe a part."""
        if text is None or self.arch.kernel_builds_header:
            return text
        ram = self.envelope.all & self.arch.system_ram if self.arch.system_ram else self.envelope.all
        ram -= self.machine.own | self.arch.reserved
        place = ram.outer_pages(self.machine.page_size).find(text.paddr)
        if place and text.paddr + text.size <= place.end:
            return text
        size = place.end - text.paddr if place else 0
        then = f"cut to {size:#x} bytes" if size else "left out"
        self.problems.note(f"kernel text of {text.size:#x} bytes at {text.paddr:#x} is not all in RAM; {then}")
        return text._replace(size=size) if size else None

    def served(self, shape: Shape, loads: list[Load]) -> Core:
        """The vmcore with these PT_LOADs, as this kernel lays it out."""
        align = self.machine.phdr_note_align
        note_align = shape.note_align if align is None else align
        notes = [note.data for note in shape.notes]
        return elfcore.build(shape.machine, notes, loads, note_align, self.machine.page_size, shape.byteorder)

    def _preloaded(self) -> Core:
        data = self.machine.core_header_bytes()
        header = self.machine.core_header
        assert header is not None
        extents = []
        for p in header.loads:
            start, end = procvmcore.shown_by(p, self.machine.page_size)
            extents.append(Extent(p.offset + start - p.paddr, end - start, start))
        extents.sort()
        for a, b in pairwise(extents):
            if a.offset + a.size > b.offset:
                raise SourceError(
                    f"{procvmcore.PATH}: memory at {a.paddr:#x} and {b.paddr:#x} overlap in the file at {b.offset:#x}: "
                    "the preloaded header cannot be taken as it is"
                )
        size = max((e.offset + e.size for e in extents), default=len(data))
        return Core(data, tuple(extents), size, header.phdrs)

    def map(self) -> Iterator[Entry]:
        """The memory map with provenance, ascending."""
        shown = self.memory.covered
        return memory_map.entries(self.registry, self.envelope, self.machine.devices, self._claims(), shown)

    def _claims(self) -> dict[str, RangeSet]:
        """Who calls what memory."""
        claims = {name: r.ranges(report.RAM) for name, r in self.machine.reports.items()}
        if dead := self.arch.dead:
            sections = dead.sections()
            claims["dead e820"] = e820.ram(dead.e820())
            claims["dead iomem"] = self.arch.system_ram
            claims["dead sections"] = sections.online & self.envelope.all if sections else RangeSet()
        if self.machine.core_header:
            claims["preloaded"] = self.preloaded_ranges()
        return {name: ranges for name, ranges in claims.items() if ranges}

    def preloaded_ranges(self) -> RangeSet:
        """What the kernel's own header covers. Raises SourceError where there is none."""
        header = self.machine.core_header
        if header is None:
            raise SourceError(f"{procvmcore.PATH}: the kernel made none: there is no preloaded header to compare with")
        return RangeSet((p.paddr, p.paddr + p.memsz) for p in header.loads)

    def compare(self) -> list[Difference]:
        """Range by range, what the preloaded header misses of what can be read, or has too much."""
        preloaded = self.preloaded_ranges()
        readable = self.readable()
        found = [Difference(r, "missing", "RAM that the preloaded header does not list") for r in readable - preloaded]
        for r in (preloaded - readable).outer_pages(self.machine.page_size):
            for run, rule in self.registry.verdicts(*r):
                if rule:
                    found.append(Difference(run, "too much", f"{rule.name}: {rule.reason}"))
        return sorted(found)

    def show(self, more: RangeSet) -> None:
        """Read old memory from the files that show *more* (whole pages) too, as far as there are any."""
        more -= self.memory.covered
        if more:
            with contextlib.suppress(SourceError):  # what no file shows is told as lost
                self.memory.add(self.machine.open_segments(more))

    def lost(self) -> RangeSet:
        """RAM that is missing from the vmcore, or zeros in it; capture/losses.py says which, and why."""
        return RangeSet(loss.range for loss in losses.losses(self))

    def close(self) -> None:
        self.memory.close()
        self.machine.close()


def build(
    machine: Machine,
    layout: str = CUT,
    mode: str = DYNAMIC,
    rules: Sequence[Rule] = (),
    plugins: Sequence[Plugin] = (),
) -> Dump:
    """A Dump, with the machine closed again if that fails."""
    try:
        return Dump(machine, layout, mode, rules, plugins)
    except BaseException:
        machine.close()
        raise
