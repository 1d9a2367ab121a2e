# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dead kernel as a witness: one front door to all of its records that this package can read.

Each record is read once, when first asked for. Nothing here is proof: a record that is missing or makes no sense comes
back empty, with a line in ``problems``, and whoever asks goes on with what firmware and devices say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar, cast

from guard.errors import ReadError, WitnessError
from guard.physmem import LOG, ExactMemory
from guard.ranges import RangeSet
from guard.witness import (
    crash_notes,
    e820,
    kallsyms,
    layouts,
    machine_check,
    memmap,
    reservations,
    resources,
    sections,
)
from guard.witness.btf import Layout
from guard.witness.crash_notes import CpuNotes
from guard.witness.e820 import E820Entry
from guard.witness.memmap import Marks
from guard.witness.memory import Memory, Problems
from guard.witness.pagewalk import START_KERNEL_MAP, PageWalk, x86_64
from guard.witness.printk_log import HW_ERR, Log, told
from guard.witness.reservations import Reservation
from guard.witness.resources import Resource, Tree
from guard.witness.sections import Sections
from guard.witness.vmcoreinfo import Vmcoreinfo

T = TypeVar("T")

WANTED = (
    frozenset({"_text", "_end", "iomem_resource", "page_offset_base", "vmcoreinfo_note"})
    | crash_notes.SYMBOLS
    | e820.SYMBOLS
    | layouts.SYMBOLS
    | reservations.SYMBOLS
)

_SYMBOLS = "symbols"
_MACHINE_CHECKS = "machine checks"
_NEWEST = 1 << 16
"""Records of the log that are looked through for machine checks: a fatal one stands at its end."""
_KERNEL_HALF = 0xFF00000000000000
_PAGE_OFFSET = {4: 0xFFFF888000000000, 5: 0xFF11000000000000}
"""Start of the direct map without KASLR, by page table levels (arch/x86/include/asm/page_64_types.h)."""


class KernelText(NamedTuple):
    """The kernel image from _text to _end: virtual address, physical address, size in bytes."""

    vaddr: int
    paddr: int
    size: int


class DeadKernel:
    """The records of the x86_64 kernel that *info* describes, read through *mem*. *symbols* are the addresses of those
    of WANTED that it has, where its vmlinux tells: its kallsyms are then not asked.

    Construction raises WitnessError if vmcoreinfo does not give a page walk; after that no method raises."""

    def __init__(self, mem: Memory, info: Vmcoreinfo, symbols: dict[str, int] | None = None) -> None:
        self.info = info
        self.walk: PageWalk = x86_64(mem, info)
        self.problems = Problems()
        self._known: dict[str, object] = {} if symbols is None else {_SYMBOLS: symbols}
        for line in info.problems:
            self.problems.note(line)

    def _once(self, what: str, read: Callable[[], T], otherwise: T, instead: str = "left out") -> T:
        if what not in self._known:
            try:
                self._known[what] = read()
            except (WitnessError, ReadError) as error:
                self.problems.note(f"dead kernel's {what} not known, {instead}: {error}")
                self._known[what] = otherwise
        return cast(T, self._known[what])

    def symbols(self) -> dict[str, int]:
        """Virtual addresses of those of WANTED that the kernel has, from one pass over kallsyms."""
        return self._once(_SYMBOLS, lambda: kallsyms.lookup(self.walk, self.info, WANTED, self.problems), {})

    def _symbol(self, name: str) -> int:
        address = self.symbols().get(name)
        if address is None:
            raise WitnessError(f"kallsyms has no {name}")
        return address

    def layouts(self) -> Mapping[str, Layout]:
        """How its structures lie that vmcoreinfo says nothing of."""
        return self._once(
            "BTF",
            lambda: layouts.of_dead_kernel(self.walk, self.symbols(), self.problems),
            layouts.FIXED,
            "fixed layouts are taken",
        )

    def release(self) -> str | None:
        """The release in init_uts_ns. It says the same as OSRELEASE= if vmcoreinfo, page walk and memory belong
        together; a difference is told in ``problems``."""
        return self._once("release", self._read_release, None)

    def _read_release(self) -> str:
        uts_ns, name = self.info.symbol("init_uts_ns"), self.info.offset("uts_namespace.name")
        if uts_ns is None or name is None:
            raise WitnessError("vmcoreinfo has no SYMBOL(init_uts_ns) or no OFFSET(uts_namespace.name)")
        at = self.layouts()["new_utsname"].members["release"]
        release = self.walk.read_cstring(uts_ns + name + at.offset, at.size).decode("ascii", "backslashreplace")
        if release != self.info.text("OSRELEASE"):
            self.problems.note(
                f"dead kernel's release in memory is {release!r}, vmcoreinfo has {self.info.text('OSRELEASE')!r}"
            )
        return release

    def note_vaddr(self) -> int | None:
        """Where the kernel itself has its VMCOREINFO note (kernel/vmcore_info.c:vmcoreinfo_note, a pointer): a virtual
        address, None if that cannot be had."""
        name = "vmcoreinfo_note"
        if name not in self.symbols():
            return None
        return self._once(name, lambda: self.walk.read_u64(self._symbol(name)), None)

    def text(self) -> KernelText | None:
        """Where the kernel image is."""
        return self._once("image extent", self._read_text, None)

    def _read_text(self) -> KernelText:
        start, end = self._symbol("_text"), self._symbol("_end")
        # the linker sees to it (arch/x86/kernel/vmlinux.lds.S), and KASLR moves it inside of that
        most = START_KERNEL_MAP + (self.info.number("KERNEL_IMAGE_SIZE") or 0)
        if not START_KERNEL_MAP <= start < end <= most:
            raise WitnessError(
                f"_text {start:#x} to _end {end:#x} is not plausible, expected {START_KERNEL_MAP:#x} to {most:#x}"
            )
        return KernelText(start, self.walk.translate(start), end - start)

    def page_offset(self) -> int:
        """Virtual address of physical address 0 in the direct map; the constant of a kernel without KASLR if the
        variable page_offset_base cannot be had."""
        constant = _PAGE_OFFSET[self.walk.levels]
        return self._once("page_offset_base", self._read_page_offset, constant, f"{constant:#x} is taken")

    def _read_page_offset(self) -> int:
        base = self.walk.read_u64(self._symbol("page_offset_base"))
        if base < _KERNEL_HALF or base % (1 << 30):
            raise WitnessError(f"page_offset_base is {base:#x}, expected a multiple of 1 GiB in the kernel's half")
        # The top page table is RAM, so the direct map shows it where page_offset_base says.
        if self.walk.translate(base + self.walk.root_paddr) != self.walk.root_paddr:
            raise WitnessError(f"page_offset_base is {base:#x}, but no direct map starts there")
        return base

    def tree(self) -> Tree:
        """All of iomem_resource, and whether it is sound."""
        return self._once(
            "iomem_resource",
            lambda: resources.read_tree(
                self.walk, self._symbol("iomem_resource"), self.problems, layout=self.layouts()["resource"]
            ),
            Tree([], "iomem_resource cannot be read"),
        )

    def iomem(self) -> list[Resource]:
        """All of iomem_resource, in the order of /proc/iomem."""
        return self.tree().resources

    def system_ram(self) -> list[Resource]:
        """What the kernel itself would put into a kexec header; see resources.system_ram."""
        return resources.system_ram(self.iomem())

    def virtio_mem_regions(self) -> list[Resource]:
        """Regions of virtio-mem devices; see resources.virtio_mem_regions."""
        return resources.virtio_mem_regions(self.iomem())

    def reservations(self) -> list[Reservation]:
        """Memory reserved for the capture kernel."""
        return self._once(
            "reservations",
            lambda: reservations.read_reservations(self.walk, self.symbols(), self.problems, self.layouts()),
            [],
        )

    def cpu_notes(self) -> list[CpuNotes]:
        """Register notes of every possible CPU, in the order of CPU numbers."""
        return self._once(
            "crash_notes",
            lambda: crash_notes.read_crash_notes(self.walk, self.symbols(), self.problems),
            [],
        )

    def e820(self) -> list[E820Entry]:
        """The firmware's memory map at boot."""
        return self._once(
            "e820_table_firmware",
            lambda: e820.read_e820(self.walk, self._symbol("e820_table_firmware"), self.problems, self.layouts()),
            [],
        )

    def marks(self, wanted: RangeSet) -> Marks | None:
        """What struct pages say of the pages of *wanted*, physical bytes."""
        known = self.sections()
        if known is None:
            return None
        read = lambda: memmap.scan(self.walk, self.info, known, wanted, self.problems)  # noqa: E731
        return self._once("struct pages", read, None)

    def sections(self) -> Sections | None:
        """Which memory sections were present and online."""
        return self._once("mem_section", lambda: sections.read_sections(self.walk, self.info, self.problems), None)

    def log(self) -> Log | None:
        """The kernel's log; None where it cannot be had, and without a line where that kernel has another kind."""
        if self.info.symbol("prb") is None:
            return None
        mem = self.walk.mem
        tagged = mem.tagged(LOG) if isinstance(mem, ExactMemory) else mem
        return self._once("log", lambda: Log(self.walk.through(tagged), self.info), None)

    def machine_checks(self) -> RangeSet:
        """Physical memory, in whole pages, that uncorrected machine checks named in the log."""
        return self._once(_MACHINE_CHECKS, self._read_machine_checks, RangeSet())

    def given_machine_checks(self, named: RangeSet) -> None:
        """Have :meth:`machine_checks` say *named*, and leave the log alone: what was recorded may lack its pages."""
        self._known[_MACHINE_CHECKS] = named

    def _read_machine_checks(self) -> RangeSet:
        log = self.log()
        if log is None or not log.mentions(HW_ERR):
            return RangeSet()
        sme_mask = self.info.number("sme_mask") or 0
        named = machine_check.named_in(log.newest(_NEWEST), self.problems, self.info.page_size or 4096, sme_mask)
        told(log, self.problems)
        return named
