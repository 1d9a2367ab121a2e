# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses of uncorrected machine checks, from the text of the dead kernel's log.

The panic path of a fatal machine check marks the page since 6.8 only (mce_panic(), arch/x86/kernel/cpu/mce/core.c);
before, the log is all that names it. Two kinds of lines do:

- print_mce() in that file: ``[Hardware Error]: CPU 3: Machine Check Exception: 5 Bank 7: be00000001010091``, then ``TSC
  ... ADDR ... MISC ...``, then ``PROCESSOR vendor:cpuid ...``. The numbers are MSRs (Intel SDM volume 3, "Machine-Check
  Architecture"; AMD64 APM volume 2, "Machine Check Architecture").
- ghes_print_estatus() and cper_print_mem() (drivers/acpi/apei/ghes.c, drivers/firmware/efi/cper.c), where firmware
  hears of errors first: ``{1}[Hardware Error]:`` with ``Error 0, type: fatal``, ``section_type: memory error``,
  ``physical_address: 0x...``.

Only errors of that boot count. What the banks, or the BERT table, kept of the boot before is printed too: the former
without "Exception" (bit MCIP of the status is clear), the latter without the number in braces."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from guard.ranges import Range, RangeSet
from guard.witness.memory import Problems
from guard.witness.printk_log import HW_ERR, Record

_MCIP = 1 << 2
# MCi_STATUS
_VALID, _UNCORRECTED, _MISC_VALID, _ADDRESS_VALID, _AMD_PHYSICAL = 1 << 63, 1 << 61, 1 << 59, 1 << 58, 1 << 54
_PHYSICAL = 2
"""MCi_MISC bits 8:6: the address is a physical one."""
_AMD, _HYGON = 2, 9
"""X86_VENDOR_*, arch/x86/include/asm/processor.h."""
_UMC = 0x96
"""HWID of AMD's unified memory controllers, in bits 43:32 of MCA_IPID (smca_hwid_mcatypes, mce/amd.c)."""
_PADDR = (1 << 52) - 1
_LARGEST = 1 << 21
"""Bytes. A coarser address tells nothing of what is broken; then the page that it names is taken."""
_MAX_ADDRESSES = 1024
_MAX_OPEN = 4096
"""Errors of which the lines are put together at a time; of a fatal one, one processor prints them all."""

# compiled when first used, which is hardly ever
_CHECK = rb"CPU \d{1,5}: Machine Check[^:]{0,40}: ([0-9a-f]{1,16}) Bank \d{1,3}: ([0-9a-f]{1,16})\b"
_REGISTER = rb"\b(ADDR|MISC|IPID) ([0-9a-f]{1,16})\b"
_VENDOR = rb"\bPROCESSOR (\d{1,3}):"
_FIRMWARE = rb"\{(\d{1,10})\}\[Hardware Error\]: (.*)"
_SECTION = rb"\s*Error \d{1,5}, type: (.*)"
_FIELD = rb"\s*(section_type|physical_address|physical_address_mask): (.*)"


class _Check:
    """One machine check, of which the lines come one by one."""

    __slots__ = ("global_status", "registers", "status", "vendor")

    def __init__(self, global_status: int, status: int) -> None:
        self.global_status, self.status = global_status, status
        self.vendor: int | None = None
        self.registers: dict[bytes, int] = {}


class _Section(NamedTuple):
    """What was said so far in one section of one of firmware's reports."""

    uncorrected: bool = False
    memory: bool = False
    address: int | None = None
    mask: int = 0


def named_in(records: Iterable[Record], problems: Problems, page_size: int = 4096, sme_mask: int = 0) -> RangeSet:
    """The physical memory that *records*, in their order, name as broken, in whole pages. *sme_mask* is the memory
    encryption bit, which may stand in an address. Whether anything of that is memory is not looked at."""
    checks: dict[int, _Check] = {}
    sections: dict[bytes, _Section] = {}
    found: list[Range] = []
    for record in records:
        if record.facility:
            continue  # user space wrote it: the kernel's own facility is 0 (devkmsg_write(), kernel/printk/printk.c)
        for line in record.text.split(b"\n"):
            if report := re.match(_FIRMWARE, line):
                _hear_firmware(sections, report[1], report[2], found)
            elif (check := re.search(_CHECK, line)) and HW_ERR in line:
                old = checks.pop(record.caller, None)
                if old:
                    _conclude(old, found, problems)
                if len(checks) == _MAX_OPEN:
                    del checks[next(iter(checks))]
                checks[record.caller] = _Check(int(check[1], 16), int(check[2], 16))
            elif checks:
                _hear_check(checks, record.caller, line, found, problems)
    for rest in checks.values():
        _conclude(rest, found, problems)
    for section in sections.values():
        _conclude_section(section, found)
    if len(found) > _MAX_ADDRESSES:
        problems.note(f"the log names {len(found)} addresses of hardware errors; the last {_MAX_ADDRESSES} count")
        del found[:-_MAX_ADDRESSES]
    return RangeSet((r.start & ~sme_mask, r.end - (r.start & sme_mask)) for r in found).outer_pages(page_size)


def _hear_check(checks: dict[int, _Check], caller: int, line: bytes, found: list[Range], problems: Problems) -> None:
    """A line that may continue a machine check. It is one record, or several where other processors printed in between
    (pr_cont()); and before 5.15 lines of an NMI may be printed by another caller (kernel/printk/printk_safe.c)."""
    registers = re.findall(_REGISTER, line)
    vendor = re.search(_VENDOR, line)
    if not registers and not vendor:
        return
    if caller not in checks:
        if HW_ERR not in line:
            return
        caller = next(reversed(checks))
    check = checks[caller]
    for name, value in registers:
        check.registers.setdefault(name, int(value, 16))
    if vendor:
        check.vendor = int(vendor[1])
        _conclude(checks.pop(caller), found, problems)


def _conclude(check: _Check, found: list[Range], problems: Problems) -> None:
    needed = _VALID | _UNCORRECTED | _ADDRESS_VALID
    address = check.registers.get(b"ADDR")
    if not check.global_status & _MCIP or check.status & needed != needed or address is None:
        return
    address &= _PADDR
    amd = check.vendor in (_AMD, _HYGON)
    ipid = check.registers.get(b"IPID", 0)
    if amd and ipid >> 32 & 0xFFF == _UMC and not check.status & _AMD_PHYSICAL:
        # amd_mce_usable_address(): these count from the start of their channel
        problems.note(
            f"machine check of a memory controller, at {address:#x} of its own memory: not known which page that is"
        )
        return
    size = 1
    misc = check.registers.get(b"MISC", 0)
    # AMD's MISC is another register (thresholds), and print_mce() shows an address without its invalid bits
    if not amd and check.status & _MISC_VALID and misc >> 6 & 7 == _PHYSICAL and 1 << (misc & 0x3F) <= _LARGEST:
        size = 1 << (misc & 0x3F)
    # What is not said to be physical counts as a page all the same: so it does in mce_panic() since 6.8, and one page
    # is a small price where reading it might cost the dump.
    start = address & -size
    found.append(Range(start, start + size))


def _hear_firmware(sections: dict[bytes, _Section], number: bytes, line: bytes, found: list[Range]) -> None:
    section = sections.get(number, _Section())
    if kind := re.fullmatch(_SECTION, line):
        _conclude_section(section, found)
        # CPER's "recoverable" is an uncorrected error that need not be the end (UEFI, "Error Severity")
        section = _Section(kind[1].strip() in (b"fatal", b"recoverable"))
    elif field := re.fullmatch(_FIELD, line):
        name, value = field[1], field[2].strip()
        if name == b"section_type":
            section = section._replace(memory=value == b"memory error")
        elif not re.fullmatch(rb"0x[0-9a-f]{1,16}", value):
            return
        elif name == b"physical_address":
            section = section._replace(address=int(value, 16))
        else:
            section = section._replace(mask=int(value, 16))
    else:
        return
    if len(sections) < _MAX_OPEN or number in sections:
        sections[number] = section


def _conclude_section(section: _Section, found: list[Range]) -> None:
    if not (section.uncorrected and section.memory) or section.address is None:
        return
    size = (~section.mask & (1 << 64) - 1) + 1
    if size > _LARGEST or size & (size - 1):
        size = 1  # no mask, or none of an address
    start = section.address & _PADDR & -size
    found.append(Range(start, start + size))
