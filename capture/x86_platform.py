# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules that x86 platforms bring with them, whatever the dead kernel says, as the kernel registers them at boot before
/proc/vmcore can be opened: the GART aperture, EFI's unaccepted memory, Xen's ballooned pages. On a machine without the
feature each is a look for a file that is not there, and the module behind it is not loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capture.memory_map import WHOLE
from capture.sources import files, report
from guard.errors import ReadError, SourceError, WitnessError
from guard.physmem import FIRMWARE, OldMemory
from guard.ranges import RangeSet
from guard.registry import Registry, Rule, allow_rule

if TYPE_CHECKING:
    from capture.dump import Dump
    from capture.machine import Machine

PCI = "sys/bus/pci/devices"
NORTHBRIDGE = "0000:00:18.3"
"""Of node 0: without it there is none."""
CONFIG_SPACE = 4096

EFI_TABLES = "sys/firmware/efi/config_table"
BOOT_PARAMS = "sys/kernel/boot_params/data"
_EFI_INFO = 0x1C0
"""struct boot_params.efi_info (arch/x86/include/uapi/asm/bootparam.h): signature, then 32-bit words."""
_SYSTAB, _SYSTAB_HIGH, _EFI_INFO_END = 4, 24, 32

HYPERVISOR = "sys/hypervisor"


def install(dump: Dump) -> None:
    """Register what there is. Raises Error where going on would touch unaccepted memory."""
    for rule in (_gart(dump.machine), _unaccepted(dump), _xen(dump)):
        if rule:
            dump.registry.register(rule)


def _gart(machine: Machine) -> Rule | None:
    if not files.is_folder(machine.root, f"{PCI}/{NORTHBRIDGE}"):
        return None
    from guard.rules import gart

    configs = {}
    for address in gart.NODES:
        config = files.read_file(machine.root, f"{PCI}/{address}/config", CONFIG_SPACE, report.Problems())
        if config is not None:
            configs[address] = config
    return gart.rule(configs, machine.problems, machine.page_size)


class _Firmware:
    """Memory that firmware keeps its tables in, as far as *allowed*: it lies outside of what a dump reads."""

    def __init__(self, machine: Machine, allowed: RangeSet) -> None:
        self._machine = machine
        self._gate = Registry(machine.page_size)
        self._gate.register(allow_rule("firmware", WHOLE, allowed, "no memory of firmware's", machine.page_size))

    def read(self, paddr: int, size: int) -> bytes:
        pages = RangeSet([(paddr, paddr + size)]).outer_pages(self._machine.page_size)
        try:
            memory = OldMemory(self._machine.firmware_segments(pages), self._gate)
        except SourceError as e:
            raise ReadError(str(e), paddr) from None
        try:
            data = memory.read_exact(paddr, size)
        finally:
            memory.close()
        if self._machine.touched is not None:  # of what was allowed only: no record may widen that
            self._machine.touched.add(paddr, size, FIRMWARE)
        return data


def _efi(root: str) -> tuple[int, int] | None:
    """Physical addresses of the EFI system table and of the configuration tables. The running kernel has read both:
    kexec gave it the dead one's, for firmware tells them only once."""
    tables = files.read_hexadecimal(root, EFI_TABLES, report.Problems())
    info = (files.read_file(root, BOOT_PARAMS, 1 << 16, report.Problems()) or b"")[_EFI_INFO:][:_EFI_INFO_END]
    if tables is None or len(info) < _EFI_INFO_END or info[:4] != b"EL64":
        return None
    low, high = (int.from_bytes(info[at : at + 4], "little") for at in (_SYSTAB, _SYSTAB_HIGH))
    return high << 32 | low, tables


def _unaccepted(dump: Dump) -> Rule | None:
    machine = dump.machine
    efi = _efi(machine.root)
    if efi is None or not machine.around_kernel():
        return None
    from guard.rules import unaccepted

    page_size = machine.page_size
    acpi = RangeSet(r for name in ("firmware_memmap", "iomem") for r in machine.reports[name].ranges(report.ACPI))
    # the kernel's EFI stub allocates the table as ACPI reclaim memory; before commit e7761d827e99 it was RAM
    sizes = (page_size, unaccepted.MAX_TABLES * 24)
    theirs = RangeSet((at, at + size) for at, size in zip(efi, sizes, strict=True)).outer_pages(page_size)
    memory = _Firmware(machine, (theirs | acpi | dump.envelope.all) - machine.own)
    try:
        at = unaccepted.find(memory, *efi)
    except WitnessError as e:
        machine.remarks.note(f"{e}: not known whether memory was left unaccepted")
        return None
    if at is None:
        return None
    try:
        return unaccepted.rule(memory, at, max(r.end for r in dump.envelope.all), page_size)
    except WitnessError as e:
        machine.only_through_kernel(str(e))
        return None


def _xen(dump: Dump) -> Rule | None:
    machine = dump.machine
    kind = files.read_line(machine.root, f"{HYPERVISOR}/type", report.Problems())
    if kind != "xen" or not machine.live or not machine.around_kernel():
        return None
    if files.read_line(machine.root, f"{HYPERVISOR}/guest_type", report.Problems()) == "PV":
        return None
    from guard.rules import xen_hvm

    wanted = dump.registry.ram(dump.envelope.all)
    return xen_hvm.rule(wanted, machine.problems, machine.page_size)
