# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a machine to its vmcore: the one line that the data takes.

sources -> envelope and rules -> gated memory -> the dead kernel's records -> memory map -> header -> vmcore."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import NamedTuple

from capture import elfcore, memory_map, x86_64
from capture.elfcore import Core, Extent
from capture.machine import Machine
from capture.memory_map import Entry
from capture.sources import report
from capture.vmcore import Vmcore
from guard import procvmcore
from guard.errors import Error, ReadError, SourceError, WitnessError
from guard.physmem import ExactMemory, OldMemory, covered, layer, only
from guard.ranges import Range, RangeSet
from guard.registry import Registry
from guard.witness.dead_kernel import DeadKernel
from guard.witness.memory import Problems
from guard.witness.scan import scan
from guard.witness.vmcoreinfo import Vmcoreinfo, note_at

CUT, KERNEL = "cut", "kernel"
DYNAMIC, PRELOADED = "dynamic", "preloaded"

# A header's PT_LOADs at most, as in the kernel's own (CRASH_MAX_MEMORY_RANGES): each costs memory in the capture kernel
MAX_LOADS = 8192

E820_RAM = 1  # arch/x86/include/asm/e820/types.h

# p_align of the merged PT_NOTE where no /proc/vmcore shows what the running kernel does: what current ones do
DEFAULT_NOTE_ALIGN = 4


class Difference(NamedTuple):
    """A range in which the preloaded header and the memory map do not agree."""

    range: Range
    what: str  # "missing" from the preloaded header, or "too much" in it
    why: str


class Dump:
    """Everything about one dump. Raises SourceError or Error if there is nothing to build it from; whatever else is
    wrong is a line in ``problems`` and the rest goes on."""

    def __init__(self, machine: Machine, layout: str = CUT, mode: str = DYNAMIC) -> None:
        if machine.arch != "x86_64":
            raise Error(f"machine architecture {machine.arch}: headers are built for x86_64 only")
        self.machine, self.layout, self.mode = machine, layout, mode
        self.problems: Problems = machine.problems
        self.registry = Registry(machine.page_size)
        devices = machine.devices
        for source in machine.reports.values():
            for line in source.damage:
                self.problems.note(line)
        self.envelope = memory_map.envelope(machine.reports, devices, machine.images, self.problems)
        self._widen_by_preloaded()
        if not self.envelope.boot:
            why = "; ".join(line for name in memory_map.RAM_SOURCES for line in machine.reports[name].problems)
            raise SourceError(f"no source tells where the dead machine's RAM was: {why}")
        memory_map.install_rules(self.registry, self.envelope, self._foreign(), devices)
        wanted = self.envelope.all.inner_pages(machine.page_size)
        segments = machine.open_segments(wanted)
        if mode == PRELOADED and machine.core_fd is not None and machine.core_header is not None:
            # low memory that kexec backed up: only the kernel's own header knows where it went
            kernels = procvmcore.segments(machine.core_fd, machine.core_header)
            segments = layer(only(kernels, machine.own), only(segments, wanted - machine.own))
        self.memory = OldMemory(segments, self.registry)
        self.exact = ExactMemory(self.memory)
        self.info = self._find_vmcoreinfo()
        self.dead = self._question(self.info)
        self.system_ram = RangeSet()
        self.reserved = RangeSet()
        if self.dead:
            self._hear_witness(self.dead)
        else:
            self._refuse_unlocated()
        self.core = self._preloaded() if mode == PRELOADED else self._dynamic()
        self.vmcore = Vmcore(self.core, self.memory)
        self.registry.opened = True
        lost = self.lost()
        for piece, line in machine.unmapped:
            (self.problems if lost & RangeSet([piece]) else machine.remarks).note(line)
        if self.dead:
            for line in self.dead.problems:
                self.problems.note(line)
        for device in devices:
            for line in device.problems:
                self.problems.note(f"{device.name}: {line}")

    def _widen_by_preloaded(self) -> None:
        """Without any firmware source the kernel's own header is the best there is; it was right once."""
        if self.envelope.boot or self.machine.core_header is None:
            return
        ram = self.preloaded_ranges() - self.envelope.regions
        self.envelope = self.envelope._replace(boot=ram, source="preloaded header", by_firmware=False)
        self.problems.note("no firmware source tells of boot RAM; the preloaded header's PT_LOADs are taken for it")

    def _foreign(self) -> RangeSet:
        """What must not be read as old memory because it is the capture kernel's."""
        return self.machine.own - self._backed_up()

    def _backed_up(self) -> RangeSet:
        """Taken as it is, the preloaded header may list memory that kexec copied away before this kernel took it."""
        return self.preloaded_ranges() if self.mode == PRELOADED else RangeSet()

    def _find_vmcoreinfo(self) -> Vmcoreinfo | None:
        paddr = self.machine.vmcoreinfo_paddr
        if paddr is not None:
            try:
                return note_at(self.exact, paddr)
            except (WitnessError, ReadError) as e:
                self.problems.note(f"VMCOREINFO note at {paddr:#x}, where it was said to be: {e}; searching for it")
        # in boot RAM only: the kernel allocates the page of its note (crash_save_vmcoreinfo_init, a subsys_initcall)
        # before any driver of hot-plugged memory starts
        searched = self.registry.ram(self.envelope.boot & self.memory.covered)
        found = scan(self.exact, searched, self.machine.own_vmcoreinfo)
        if not found:
            self.problems.note(f"no VMCOREINFO note in {searched.size >> 20} MiB of old memory: no notes, no symbols")
            return None
        best = found[0]
        self.problems.note(
            f"VMCOREINFO note found by searching at {best.info.paddr or 0:#x} ({', '.join(best.reasons)})"
        )
        return best.info

    def _question(self, info: Vmcoreinfo | None) -> DeadKernel | None:
        if info is None:
            return None
        try:
            return DeadKernel(self.exact, info)
        except (WitnessError, ReadError) as e:
            self.problems.note(f"dead kernel's records: {e}; firmware and devices alone are believed")
            return None

    def _hear_witness(self, dead: DeadKernel) -> None:
        reserved = [(r.name, r.start, r.end) for r in dead.reservations()]
        self.reserved = memory_map.plausible_reservations(reserved, self.machine.own, self.problems)
        memory_map.install_reservations(self.registry, self.reserved - self._backed_up())
        system_ram = RangeSet((r.start, r.end) for r in dead.system_ram())
        self._locate_devices(dead)
        witnessed = memory_map.witnessed_ram(self.envelope, system_ram, self.problems)
        if witnessed is not None:
            self.system_ram = system_ram
            memory_map.install_witness(self.registry, self.envelope, witnessed)
        shown = covered(s for s in self.memory.segments if s.name == procvmcore.PATH)
        for device in self.machine.devices:
            if device.gated_by_kernel:
                memory_map.install_kernel_gated(self.registry, device, self.system_ram, shown)
            unused = sum(run.size for run in device.plugged_runs() if not self.system_ram.covers(*run))
            if unused and self.system_ram:
                self.problems.note(
                    f"{device.name}: plugged runs of {unused:#x} bytes were not wholly System RAM of the dead kernel; "
                    "the device is believed"
                )

    def _locate_devices(self, dead: DeadKernel) -> None:
        """A virtio-mem device that we could not even ask where it is, the dead kernel's driver had claimed."""
        regions = dead.virtio_mem_regions()
        added = [r for r in dead.iomem() if r.name == "System RAM (virtio_mem)"]
        claimed = [Range(r.start, r.end) for r in [*regions, *added]]
        unlocated = self.machine.unlocated
        if len(regions) < len(unlocated):
            self._refuse_unlocated()
            claimed += self.envelope.window
        gated = bool(unlocated) and all(by_kernel for _, by_kernel in unlocated)
        for device in memory_map.unlocated_devices(claimed, self.envelope, gated):
            self.machine.devices.append(device)
            region = RangeSet([device.region])
            env = self.envelope
            self.envelope = env._replace(
                boot=env.boot - region, window=env.window - region, regions=env.regions | region
            )
            if rule := device.rule(self.registry.page_size):
                self.registry.register(rule)

    def _refuse_unlocated(self) -> None:
        """Nothing tells where the memory of some device is. The hotplug window, where it must be, is not read then; but
        where no firmware tells window from boot RAM, going on could touch what is unplugged. Raises Error there."""
        names = ", ".join(name for name, gated in self.machine.unlocated if not gated)
        if not names:
            return
        if not self.envelope.by_firmware:
            raise Error(f"nothing tells where the memory of {names} is: what is unplugged of it cannot be left alone")
        self.problems.note(f"nothing tells where the memory of {names} is: no hot-plugged memory is read")

    def readable_runs(self) -> Iterator[Range]:
        """What may be read of old memory, in whole pages, ascending, one run at a time."""
        for span in self.envelope.all.inner_pages(self.machine.page_size):
            yield from (run for run, rule in self.registry.verdicts(*span) if rule is None)

    def readable(self) -> RangeSet:
        """All of :meth:`readable_runs` at once."""
        return RangeSet(self.readable_runs())

    def _dynamic(self) -> Core:
        shape = x86_64.shape(self.dead, self.info, self.problems)
        if self.layout == KERNEL and self.dead and self.system_ram:
            ranges = x86_64.kernel_ranges(self.dead, self.reserved)
        else:
            if self.layout == KERNEL:
                self.problems.note("layout kernel needs the dead kernel's resource tree; laid out by the memory map")
            ranges, gap = memory_map.merged(self.readable_runs, self.envelope.regions, MAX_LOADS)
            if gap:
                self.problems.note(
                    f"memory in more than {MAX_LOADS} runs: PT_LOADs bridge gaps of up to {gap:#x} bytes; "
                    "what lies in them is refused and reads as zeros"
                )
        loads = ([shape.text] if shape.text else []) + [shape.load(r) for r in ranges]
        align = self.machine.phdr_note_align
        note_align = DEFAULT_NOTE_ALIGN if align is None else align
        return elfcore.build(shape.machine, shape.notes, loads, note_align, self.machine.page_size)

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
        return memory_map.entries(self.registry, self.envelope, self.machine.devices, self._claims())

    def _claims(self) -> dict[str, RangeSet]:
        """Who calls what memory."""
        claims = {name: r.ranges(report.RAM) for name, r in self.machine.reports.items()}
        if self.dead:
            e820 = self.dead.e820()
            sections = self.dead.sections()
            claims["dead e820"] = RangeSet((e.start, e.end) for e in e820 if e.type == E820_RAM)
            claims["dead iomem"] = self.system_ram
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

    def lost(self) -> RangeSet:
        """RAM that stays zero in the vmcore: no source shows it, or its device could not be asked what is plugged. Of
        a fragmented machine no more than MAX_LOADS runs are told."""
        shown = self.memory.covered
        hidden = islice((run for run in self.readable_runs() if not shown.covers(*run)), MAX_LOADS)
        unasked = self.system_ram & RangeSet(d.region for d in self.machine.devices if d.bitmap is None)
        return (RangeSet(hidden) - shown) | (unasked - self.registry.ram(unasked))

    def close(self) -> None:
        self.memory.close()
        self.machine.close()


def build(machine: Machine, layout: str = CUT, mode: str = DYNAMIC) -> Dump:
    """A Dump, with the machine closed again if that fails."""
    try:
        return Dump(machine, layout, mode)
    except BaseException:
        machine.close()
        raise
