# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every source of memory facts answers with: findings (physical ranges of one kind each) and problems (one line
each).

A source never raises for what it reads. What is absent, refused or malformed becomes a problem line that says which
file, which offset or line, what was expected and what was done instead; the rest of the source is still used."""

from __future__ import annotations

from typing import NamedTuple

from guard.ranges import RangeSet

RAM = "ram"
RESERVED = "reserved"
ACPI = "acpi tables"
NVS = "acpi nvs"
UNUSABLE = "unusable"
PERSISTENT = "persistent"
SOFT_RESERVED = "soft reserved"
UNKNOWN = "unknown"
"""Of a type that the reader does not know; to be treated as reserved (ACPI 6.5 section 15, "Address Range Types")."""
NO_RAM = (RESERVED, ACPI, NVS, UNUSABLE, UNKNOWN)
"""Kinds that say of an address range that it is not ordinary RAM, whoever calls it RAM. Persistent and soft-reserved
memory is not among them: it is no boot RAM, but can have become System RAM later (drivers/dax/kmem.c)."""
OTHER_MEMORY = "other memory"
"""Memory of another use than system memory, as flash: it takes away from the RAM of the same source only."""
HOTPLUG_WINDOW = "hotplug window"
"""Where memory may be hot-plugged: an address range set aside, not memory that is known to be there."""
OWN_RAM = "own ram"
"""System RAM of the kernel whose /proc/iomem was read. In a capture environment: never old memory."""
RAM_BUFFER = "ram buffer"
CRASH_KERNEL = "crash kernel"
DEVICE = "device"
"""Physical addresses that certainly belong to a device: never RAM, whatever another source says."""
BUS_WINDOW = "bus window"
"""Physical addresses that a bus decodes, or that a resource claims whose nature its name does not tell. Such a claim
can be too large and then covers RAM too (_CRS of a host bridge; system-board resources), so it is weaker than DEVICE:
no RAM, unless two other sources call it RAM."""
CXL_WINDOW = "cxl window"
"""Physical addresses through which CXL memory is reached, if there is any: memory then, not a device."""
DRIVER_CLAIM = "driver claim"
"""Region that the in-kernel virtio_mem driver claimed in normal mode; /dev/mem refuses it whatever iomem= says."""
ONLINE = "online"
OFFLINE = "offline"
VMCOREINFO = "vmcoreinfo"
"""The ELF note that the crashed kernel registered, header and padding included."""
ELFCOREHDR = "elfcorehdr"

PHYS_END = 1 << 56
"""No memory lies at or above this physical address: x86_64 has at most 52 bits, aarch64 56, s390x (Linux) 53."""

_NO_BOOT_RAM = (*NO_RAM, PERSISTENT, SOFT_RESERVED, OTHER_MEMORY)

_MAX_PROBLEMS = 16


class Finding(NamedTuple):
    """Physical bytes [start, end) that a source says are of one *kind*; *detail* tells a human which entry said so."""

    start: int
    end: int
    kind: str
    detail: str


class Absent(str):
    """A problem line that tells no more than that something is not there: that is how most machines are."""

    __slots__ = ()


class SourceReport(NamedTuple):
    """What one source told.

    *available* is False if there was nothing to read (file absent, refused, addresses hidden: a problem says which);
    a source that was read and had nothing to tell is available, with no findings. With *narrows_only* it is known to
    be damaged: it may take away from what others call memory, but what it alone calls memory is none."""

    name: str
    path: str
    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    available: bool
    narrows_only: bool = False

    def ranges(self, *kinds: str) -> RangeSet:
        """The bytes found to be of any of *kinds*."""
        return RangeSet((f.start, f.end) for f in self.findings if f.kind in kinds)

    def ram(self) -> RangeSet:
        """The bytes that this source calls RAM and nothing else: the way to ask for RAM. Where entries of a source
        overlap, the other type wins over RAM, as in Linux (arch/x86/kernel/e820.c:e820__update_table())."""
        return self.ranges(RAM) - self.ranges(*_NO_BOOT_RAM)

    @property
    def damage(self) -> list[str]:
        """The problems with what is there."""
        return [line for line in self.problems if not isinstance(line, Absent)]


class Problems:
    """Collects problem lines. Keeps the first few and counts the rest: bad bytes must not flood the console of a
    capture kernel, nor its memory. Every line is printable and stays one line, whatever bytes went into it."""

    __slots__ = ("_dropped", "_lines")

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._dropped = 0

    def add(self, line: str) -> None:
        """Tells of something that is there and not as expected."""
        self._append(one_line(line))

    def absent(self, path: str, why: str = "") -> None:
        """Tells that *path* is not there, and *why* that may be."""
        self._append(Absent(one_line(f"{path}: absent" + (f" ({why})" if why else ""))))

    def _append(self, line: str) -> None:
        if len(self._lines) == _MAX_PROBLEMS:
            self._dropped += 1
        else:
            self._lines.append(line)

    def lines(self) -> tuple[str, ...]:
        if not self._dropped:
            return tuple(self._lines)
        return (*self._lines, f"{self._dropped} more problems of the same source are not shown")


def one_line(text: str) -> str:
    """*text* itself if printable, else with everything outside printable ASCII escaped."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def shown(text: str) -> str:
    """*text* quoted for a problem line, cut to a readable length."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def add_range(
    findings: list[Finding], problems: Problems, where: str, start: int, end: int, kind: str, detail: str
) -> None:
    """Appends [start, end) to *findings*, unless no memory can be like that: then the problem is told as being at
    *where*. What is no RAM counts as far as there can be memory: it takes away from what is RAM."""
    if start < PHYS_END < end and kind in NO_RAM:
        problems.add(
            f"{where}: range {start:#x}-{end - 1:#x} ends beyond any physical address; cut off at {PHYS_END:#x}"
        )
        end = PHYS_END
    if start >= end:
        problems.add(
            f"{where}: range starts at {start:#x} and ends before {end:#x}, expected at least one byte; ignored"
        )
    elif end > PHYS_END:
        problems.add(f"{where}: range {start:#x}-{end - 1:#x} is beyond any physical address; ignored")
    else:
        findings.append(Finding(start, end, kind, detail))
