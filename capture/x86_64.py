# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is particular to x86_64 in a vmcore: kernel text PT_LOAD, direct map addresses, notes, and which ranges the
kernel itself would put into the header (arch/x86/kernel/crash.c, kernel/crash_core.c). The dead kernel's records are
found through its VMCOREINFO note and its page tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from capture import compatibility, envelope, memory_map, note_search, notes, programs, x86_platform
from capture.arch import Arch, Shape
from capture.dump import CUT, PRELOADED
from capture.elfcore import Load
from capture.sources import report
from guard import procvmcore
from guard.errors import Error, ReadError, SourceError, WitnessError
from guard.physmem import covered
from guard.ranges import Range, RangeSet
from guard.registry import deny_rule
from guard.rules import hwpoison, machine_check, page_offline, sections
from guard.witness import e820
from guard.witness.dead_kernel import DeadKernel
from guard.witness.proof import place_of
from guard.witness.sections import Sections, contradictions
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
            dump.envelope = envelope.unwitnessed(dump.envelope, RangeSet())
            memory_map.settle(dump.registry, dump.envelope, RangeSet())

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
        # before any driver of hot-plugged memory starts, and is never loaded into that. What firmware's tables lack of
        # boot RAM, images of a recorded machine may hold; what the kernel's own header alone has may be unplugged by
        # now, and is not searched
        env = dump.envelope
        boot = dump.registry.ram((env.boot | (env.heard & self.machine.images)) & dump.memory.covered)
        wanted = note_search.Wanted(
            self.machine.vmcoreinfo_paddr,
            self.machine.reports["iomem"].ranges(report.OWN_RAM) - RangeSet([LOW_MEMORY]),
            self.machine.own_vmcoreinfo,
            self.search_time,
            self.vmlinux is None,
        )
        search = note_search.Place(dump.exact.untracked(), boot & dump.memory.recorded)
        self.info, dead = note_search.find(dump.exact, self.notes, boot, wanted, dump.problems, search)
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
        own = self.own() if self.machine.reports["iomem"].available else None
        if not reserved and dead.symbols() and own and own - envelope.FIRST_MIB:
            dump.problems.note("the dead kernel tells of no crash reservation; only what this kernel owns is left out")
        self.reserved = memory_map.plausible_reservations(reserved, own, dump.problems)
        listed = dump.preloaded_ranges() if self.machine.core_header and dump.mode != PRELOADED else RangeSet()
        if wrong := self.reserved & listed:
            dump.problems.note(
                f"{wrong} would have been set aside for this kernel, but the header that it was given lists it as old "
                "memory; it is read"
            )
            self.reserved -= wrong
        memory_map.install_reservations(dump.registry, self.reserved - dump.backed_up())
        dead = self._reach_tree(dump, dead)
        self._locate_devices(dump, dead)
        self._settle(dump, dead)
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

    def _reach_tree(self, dump: Dump, dead: DeadKernel) -> DeadKernel:
        """Nodes of the resource tree may lie in memory that was plugged after the header was prepared, where nothing is
        read until that tree has told what is there. Where it cannot be read otherwise, the records are followed into
        the hotplug window, for as long as it takes."""
        window = dump.envelope.window
        if not _flaw(dead) or not window or self.machine.unlocated:
            return dead
        rule = next(rule for rule in dump.registry if rule.name == memory_map.HOTPLUG)
        dump.registry.replace(deny_rule(memory_map.HOTPLUG, RangeSet(), rule.reason, dump.registry.page_size))
        try:
            again = DeadKernel(dump.exact, dead.info, self.symbols)  # which has not failed to read anything yet
            if not _flaw(again):
                self.dead = again
                return again
        except (WitnessError, ReadError):
            pass
        dump.registry.replace(rule)
        return dead

    def _settle(self, dump: Dump, dead: DeadKernel) -> None:
        """Take the dead kernel's word on what was RAM, as far as it can be taken."""
        env, known = dump.envelope, dead.sections()
        if flaw := _flaw(dead):
            dump.problems.note(f"the dead kernel's resource tree does not count: {flaw}")
            dump.envelope = envelope.unwitnessed(env, e820.ram(dead.e820()))
            memory_map.settle(dump.registry, dump.envelope, RangeSet())
            return
        system_ram = RangeSet((r.start, r.end) for r in dead.system_ram())
        env = dump.envelope = envelope.witnessed(env, system_ram, known, dump.problems)
        dump.show(env.admitted.inner_pages(dump.registry.page_size))
        self.system_ram = system_ram = system_ram | self._lost_to_damage(dump, known, system_ram)
        memory_map.settle(dump.registry, env, system_ram)

    def _lost_to_damage(self, dump: Dump, known: Sections | None, system_ram: RangeSet) -> RangeSet:
        """Boot RAM that a damaged tree, which passes for sound, must have lost, for it was online, which is a record of
        its own: the prepared header, a snapshot of the tree, has it, or it is a whole section. What is less certain
        becomes a doubt."""
        page_size, env = dump.registry.page_size, dump.envelope
        online = bare = RangeSet()
        if known and not known.flaw:
            online, bare = known.online, contradictions(known, system_ram).without_ram
        listed = dump.preloaded_ranges() if self.machine.core_header else RangeSet()
        lacking = (((listed | bare) & env.boot) - system_ram - self.reserved - self.own()).inner_pages(page_size)
        kept = lacking & online
        if kept:
            dump.problems.note(f"the dead kernel's resource tree lacks {kept}, which was online boot RAM; it is read")
        self.doubts += [
            (lacking - kept, "the kernel's own header has it, and the dead kernel's resource tree does not"),
            ((bare & (env.window | env.disputed)).inner_pages(page_size), "it was online, but no resource tree has it"),
        ]
        return kept

    def _hear_marks(self, dump: Dump, dead: DeadKernel) -> None:
        """Pages that the dead kernel itself would not have touched: offline sections, marks in struct pages, the
        address of a fatal machine check. Each rule stands on its own evidence, whatever the resource tree says."""
        if self.machine.machine_checks is None:
            self.machine.machine_checks = dead.machine_checks()
        checks = self.machine.machine_checks & dump.envelope.all
        rules = [machine_check.rule(checks, dump.registry.page_size)]
        known = dead.sections()
        marks = None
        if known:
            rules.append(sections.rule(known, dump.registry.page_size))
            torn = sections.without_section(known, self.system_ram, dump.problems)
            offline = known.offline & (self.system_ram or dump.envelope.boot)
            if known.doubtful(dump.envelope.all):
                why = "most of memory would have been offline, which damage is more likely to say"
                self.doubts.append((offline, why))
            elif torn or known.flaw:
                self.doubts.append((offline, "it would have been offline, by sections that cannot be right elsewhere"))
            marks = dead.marks(dump.envelope.all - self.own())
        if marks:
            rules += [hwpoison.rule(marks), page_offline.rule(marks)]
        for rule in rules:
            if rule:
                dump.registry.register(rule)
        if known is None or marks is None or marks.offline is None:
            return
        looked_at = (known.online & dump.envelope.all) - marks.unread
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
            dump.envelope = env.with_region(region)
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
        less low memory and the crash reservations. None where that tree lacks what may be read."""
        if not (self.dead and self.system_ram):
            dump.problems.note("layout kernel needs the dead kernel's resource tree; laid out by the memory map")
            return None
        tree = RangeSet((r.start, r.end) for r in self.dead.system_ram())
        covered = tree.outer_pages(dump.registry.page_size)
        lacking = next((run for run in dump.readable_runs() if not covered.covers(*run)), None)
        if lacking:
            dump.problems.note(
                f"layout kernel: the dead kernel's resource tree lacks memory at {lacking}; laid out by the memory map"
            )
            return None
        excluded = RangeSet([LOW_MEMORY]) | self.reserved
        return [piece for r in self.dead.system_ram() for piece in RangeSet([(r.start, r.end)]) - excluded]


def _flaw(dead: DeadKernel) -> str | None:
    """Why the resource tree of *dead* is not to be relied on; None where it is sound, and has the page tables, through
    which it was read, as System RAM."""
    root = dead.walk.root_paddr
    if flaw := dead.tree().flaw:
        return flaw
    return None if any(r.start <= root < r.end for r in dead.system_ram()) else f"it has no System RAM at {root:#x}"
