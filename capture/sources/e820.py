# SPDX-License-Identifier: LGPL-2.1-or-later
"""The types of an x86 boot memory map (e820): by number, as firmware has them, and by name, as Linux prints them.

Numbers: ACPI 6.5 section 15, "Address Range Types"; 12 and 0xefffffff are from Linux
(arch/x86/include/asm/e820/types.h). Names: arch/x86/kernel/e820.c:e820_type_to_string(), for /sys/firmware/memmap and
/proc/iomem alike. What is in neither table is of kind UNKNOWN: a range of a type that the reader does not know is no
RAM."""

from __future__ import annotations

from . import report

BY_NUMBER = {
    1: report.RAM,
    2: report.RESERVED,
    3: report.ACPI,
    4: report.NVS,
    5: report.UNUSABLE,
    7: report.PERSISTENT,
    12: report.PERSISTENT,
    0xEFFFFFFF: report.SOFT_RESERVED,
}

BY_NAME = {
    "System RAM": report.RAM,
    "Reserved": report.RESERVED,
    # Documentation/ABI/testing/sysfs-firmware-memmap, and /proc/iomem of other architectures than x86
    "reserved": report.RESERVED,
    "ACPI Tables": report.ACPI,
    "ACPI Non-volatile Storage": report.NVS,
    "Unusable memory": report.UNUSABLE,
    "Persistent Memory": report.PERSISTENT,
    "Persistent Memory (legacy)": report.PERSISTENT,
    "Soft Reserved": report.SOFT_RESERVED,
    "Unknown E820 type": report.UNKNOWN,
}
