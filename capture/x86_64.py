# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is particular to x86_64 in a vmcore: kernel text PT_LOAD, direct map addresses, notes, and which ranges the
kernel itself would put into the header (arch/x86/kernel/crash.c, kernel/crash_core.c). The dead kernel's records are
found through its VMCOREINFO note and its page tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from capture import compatibility, memory_map, note_search, notes, programs, x86_platform
from capture.arch import Arch, Shape
from capture.dump import CUT, PRELOADED
from capture.elfcore import Load
from capture.sources import report
from guard import procvmcore
from guard.errors import Error, ReadError, SourceError, WitnessError
from guard.physmem import covered
from guard.ranges import Range, RangeSet
from guard.rules import hwpoison, page_offline, sections
from guard.witness.dead_kernel import DeadKernel
from guard.witness.proof import place_of
from guard.witness.vmcoreinfo import Vmcoreinfo

if TYPE_CHECKING:
    from capture.dump import Dump
    from capture.notes import ElfNote, Listed
    from guard.witness.vmlinux import Vmlinux

EM_X86_64 = 62

# The kernel never lists it: firmware, real mode code, and the capture kernel itself live there
# (arch/x86/kernel/crash.c:elf_header_exclude_ranges)
LOW_MEMORY = Range(0, 1 << 20)

# PAGE_OFFSET of 4-level page tables without KASLR: the best guess where no witness tells
DEFAULT_PAGE_OFFSET = 0xFFFF888000000000

# p_align of the merged PT_NOTE where no /proc/vmcore shows what the running kernel does: what current ones do
DEFAULT_NOTE_ALIGN = 4


class X86_64(Arch):
    name = "x86_64"

    vmlinux: Vmlinux | None = None
    symbols: dict[str, int] | None = None
    """Virtual addresses that the vmlinux tells, if one was given and fits."""

    def own(self) -> RangeSet:
        return self.machine.reports["iomem"].ranges(report.OWN_RAM) | RangeSet([LOW_MEMORY])

    def hear_platform(self, dump: Dump) -> None:
        x86_platform.install(dump)

    notes: Sequence[ElfNote] = ()
    """Those of the kernel's own header."""
    listed: Sequence[Listed] = ()
    """Where the header that it was booted with says that notes are."""

    def hear(self, dump: Dump) -> None:
        self._hear_header(dump)
        self.dead = self._find_dead(dump)
        if dump.mode == PRELOADED:
            self.notes = ()  # nothing is made of them
        if self.dead:
            self._hear_witness(dump, self.dead)
        else:
            self._refuse_unlocated(dump)

    def use_vmlinux(self, path: str) -> None:
        try:
            from guard.witness import made_note
        except ImportError:
            raise Error("--vmlinux is not part of a capture initramfs: use it where the dump is looked at") from None
        self.vmlinux = made_note.open_vmlinux(path)

    def _hear_header(self, dump: Dump) -> None:
        """What the kernel's own header says of notes. Read before anything else of the dead kernel, through the guard:
        the header lies in the crash reservation, which is refused once that is known."""
        self.notes, self.listed = notes.of_kernel(self.machine, dump.problems), []
        at = notes.prepared_at(self.machine)
        if at is None:
            return
        try:
            self.listed = notes.listed_by(dump.exact, at)
        except SourceError as e:
            self.machine.remarks.note(f"{e}; where notes lie is not known from it")
        if self.notes:
            self.notes = notes.located(self.notes, self.listed, dump.exact)
        else:
            self.notes = notes.of_memory(self.listed, dump.exact, dump.problems)

    def _find_dead(self, dump: Dump) -> DeadKernel | None:
        # in boot RAM only: the kernel allocates the page of its note (crash_save_vmcoreinfo_init, a subsys_initcall)
        # before any driver of hot-plugged memory starts, and is never loaded into that
        boot = dump.registry.ram(dump.envelope.boot & dump.memory.covered)
        wanted = note_search.Wanted(
            self.machine.vmcoreinfo_paddr,
            self.machine.reports["iomem"].ranges(report.OWN_RAM) - RangeSet([LOW_MEMORY]),
            self.machine.own_vmcoreinfo,
            self.search_time,
            self.vmlinux is None,
        )
        self.info, dead = note_search.find(dump.exact, self.notes, boot, wanted, dump.problems)
        if self.vmlinux:
            from guard.witness import made_note

            self.info, self.symbols = made_note.complete(self.vmlinux, self.info, dump.exact, boot, dump.problems)
        if self.info is None:
            return None
        try:
            dead = dead or DeadKernel(dump.exact, self.info, self.symbols)
        except (WitnessError, ReadError) as e:
            dump.problems.note(f"dead kernel's records: {e}; firmware and devices alone are believed")
            return None
        if self.info.paddr is None:
            self.info.paddr = place_of(dead, self.info)
        return dead

    def _hear_witness(self, dump: Dump, dead: DeadKernel) -> None:
        reserved = [(r.name, r.start, r.end) for r in dead.reservations()]
        self.reserved = memory_map.plausible_reservations(reserved, self.own(), dump.problems)
        memory_map.install_reservations(dump.registry, self.reserved - dump.backed_up())
        system_ram = RangeSet((r.start, r.end) for r in dead.system_ram())
        self._locate_devices(dump, dead)
        witnessed = memory_map.witnessed_ram(dump.envelope, system_ram, dump.problems)
        if witnessed is not None:
            self.system_ram = system_ram
            memory_map.install_witness(dump.registry, dump.envelope, witnessed)
        shown = covered(s for s in dump.memory.segments if s.name == procvmcore.PATH)
        for device in self.machine.devices:
            if device.gated_by_kernel:
                memory_map.install_kernel_gated(dump.registry, device, self.system_ram, shown)
            unused = sum(run.size for run in device.plugged_runs() if not self.system_ram.covers(*run))
            if unused and self.system_ram:
                dump.problems.note(
                    f"{device.name}: plugged runs of {unused:#x} bytes were not wholly System RAM of the dead kernel; "
                    "the device is believed"
                )
        self._hear_marks(dump, dead)

    def _hear_marks(self, dump: Dump, dead: DeadKernel) -> None:
        """Pages that the dead kernel itself would not have touched: offline sections, and marks in struct pages."""
        known = dead.sections()
        ram = self.system_ram & dump.envelope.all
        if known is None or not ram:
            return
        if rule := sections.rule(known, ram, dump.registry.page_size):
            dump.registry.register(rule)
        else:
            dump.problems.note("mem_section: most of System RAM is in no online section; the sections do not count")
            return
        marks = dead.marks(ram)
        if marks is None:
            return
        for rule in (hwpoison.rule(marks), page_offline.rule(marks)):
            if rule:
                dump.registry.register(rule)
        if marks.offline is None:
            return
        looked_at = (known.online & ram) - marks.unread
        for device in self.machine.devices:
            used, size = page_offline.unmarked(marks.offline, device.unplugged_runs(), looked_at)
            if used:
                dump.problems.note(
                    f"{device.name}: {size:#x} bytes ({used}) are not plugged, but the dead kernel had their pages in "
                    "use; the device is believed"
                )

    def _locate_devices(self, dump: Dump, dead: DeadKernel) -> None:
        """A virtio-mem device that we could not even ask where it is, the dead kernel's driver had claimed."""
        regions = dead.virtio_mem_regions()
        added = [r for r in dead.iomem() if r.name == "System RAM (virtio_mem)"]
        claimed = [Range(r.start, r.end) for r in [*regions, *added]]
        unlocated = self.machine.unlocated
        if len(regions) < len(unlocated):
            self._refuse_unlocated(dump)
            claimed += dump.envelope.window
        gated = bool(unlocated) and all(by_kernel for _, by_kernel in unlocated)
        for device in memory_map.unlocated_devices(claimed, dump.envelope, gated):
            self.machine.devices.append(device)
            region = RangeSet([device.region])
            env = dump.envelope
            dump.envelope = env._replace(
                boot=env.boot - region, window=env.window - region, regions=env.regions | region
            )
            if rule := device.rule(dump.registry.page_size):
                dump.registry.register(rule)

    def _refuse_unlocated(self, dump: Dump) -> None:
        """Nothing tells where the memory of some device is. The hotplug window, where it must be, is not read then; but
        where no firmware tells window from boot RAM, going on could touch what is unplugged. Raises Error there."""
        names = ", ".join(name for name, gated in self.machine.unlocated if not gated)
        if not names:
            return
        if not dump.envelope.by_firmware:
            raise Error(f"nothing tells where the memory of {names} is: what is unplugged of it cannot be left alone")
        dump.problems.note(f"nothing tells where the memory of {names} is: no hot-plugged memory is read")

    def shape(self, dump: Dump) -> Shape:
        """Notes in the kernel's order: its own, each with what of it the dead kernel's records know better."""
        found = self.notes
        text = None
        page_offset = DEFAULT_PAGE_OFFSET
        if self.dead:
            page_offset = self.dead.page_offset()
            found = notes.completed(found, self.dead.cpu_notes(), self.listed, self.machine.remarks)
            if image := self.dead.text():
                text = Load(image.paddr, image.vaddr, image.size)
        else:
            no_cpus = "" if any(note.is_cpu for note in found) else "no CPU notes, "
            dump.problems.note(
                f"no page tables of the dead kernel: {no_cpus}no kernel text PT_LOAD, p_vaddr from {page_offset:#x}"
            )
        found = notes.with_vmcoreinfo(found, self._served_info(dump, self.info) if self.info else None)
        self.notes = ()  # they can be large, and the header has them now
        return Shape(EM_X86_64, "<", text, page_offset, notes.joined(found), 0, DEFAULT_NOTE_ALIGN)

    def _served_info(self, dump: Dump, info: Vmcoreinfo) -> Vmcoreinfo:
        """*info*, with lines for older collectors where the header is ours; tells what no line can help."""
        if self.compatibility and dump.layout == CUT:
            self.added = tuple(compatibility.missing(info))
        if self.added:
            info = compatibility.with_lines(info, self.added)
        for one in self.added:
            self.machine.remarks.note(f"VMCOREINFO is served with {one.line} added, for {one.whom}")
        if self.machine.live and (program := programs.find("makedumpfile")):
            for line in compatibility.wrong(info, program):
                dump.problems.note(line)
        return info

    def kernel_ranges(self, dump: Dump) -> list[Range] | None:
        """The PT_LOAD ranges that kexec_file_load(2) writes: each System RAM resource by itself, in the tree's order,
        less low memory and the crash reservations."""
        if not (self.dead and self.system_ram):
            dump.problems.note("layout kernel needs the dead kernel's resource tree; laid out by the memory map")
            return None
        excluded = RangeSet([LOW_MEMORY]) | self.reserved
        return [piece for r in self.dead.system_ram() for piece in RangeSet([(r.start, r.end)]) - excluded]
