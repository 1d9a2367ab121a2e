# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of the physical address space may be RAM, and whose word that is.

docs/design.md has the rule as a table: each source, what it may add, what it may take away, whom it overrides. Made in
two steps, because the dead kernel can be questioned only through what is known before: :func:`envelope` puts together
what firmware, sysfs and the kernel's own header say; :func:`witnessed` adds what a sound resource tree of the dead
kernel used as System RAM, and drops what nobody but the kernel's header had called RAM."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from capture.sources import report
from capture.sources.report import SourceReport
from guard.ranges import RangeSet
from guard.witness.memory import Problems

if TYPE_CHECKING:
    from guard.witness.sections import Sections

RAM_SOURCES = ("fw_cfg", "smbios", "srat")

FIRST_MIB = RangeSet([(0, 1 << 20)])
"""Each source has its own idea of it, and it is never old memory: the capture kernel uses it."""


class Envelope(NamedTuple):
    """What may be RAM at all, as sets of bytes, physical.

    *boot* is RAM that firmware told of, *window* where more may have been plugged (DIMMs), *regions* virtio-mem.
    *disputed* is called RAM by one source where another one speaks against it, *heard* by the kernel's own header
    or an image of a recorded machine alone: the dead kernel's records are looked up there too, but it is dumped only if
    they confirm it. *admitted* is System RAM of the dead kernel that no source here knows of. Outside lie *no_ram*,
    which is known to be something else, *decoded*, which a bus may decode and no source calls RAM, and *absent*, of
    which a recorded machine has no image."""

    boot: RangeSet
    window: RangeSet
    regions: RangeSet
    source: str
    by_firmware: bool = True
    disputed: RangeSet = RangeSet()
    heard: RangeSet = RangeSet()
    admitted: RangeSet = RangeSet()
    no_ram: RangeSet = RangeSet()
    decoded: RangeSet = RangeSet()
    absent: RangeSet = RangeSet()
    confirmed: bool = False
    """A sound resource tree of the dead kernel has been asked."""

    @property
    def all(self) -> RangeSet:
        return self.boot | self.window | self.regions | self.disputed | self.heard | self.admitted

    @property
    def unsettled(self) -> RangeSet:
        """What only the dead kernel's resource tree could have settled, while there is no sound one."""
        return RangeSet() if self.confirmed else self.window | self.disputed

    def with_region(self, region: RangeSet) -> Envelope:
        """The envelope with one more virtio-mem region, which then is nothing else."""
        return self._replace(
            boot=self.boot - region,
            window=self.window - region,
            regions=self.regions | region,
            disputed=self.disputed - region,
            heard=self.heard - region,
        )


class Claims(NamedTuple):
    """What each source that is asked for boot RAM says, in bytes, physical."""

    fw_cfg: RangeSet
    smbios: RangeSet
    srat: RangeSet
    hot: RangeSet
    """Hot-pluggable entries of SRAT: some firmware (Hyper-V, servers whose memory boards can be taken out) flags boot
    RAM too, so that the flag says "may be RAM", no more."""

    @property
    def any(self) -> RangeSet:
        return self.fw_cfg | self.smbios | self.srat

    @property
    def by_two(self) -> RangeSet:
        pairs = combinations((self.fw_cfg, self.smbios, self.srat), 2)
        return RangeSet(r for a, b in pairs for r in a & b)


def envelope(
    reports: Mapping[str, SourceReport],
    regions: RangeSet,
    images: RangeSet,
    header: RangeSet,
    problems: Problems,
    header_by_kernel: bool = False,
) -> Envelope:
    """The envelope before the dead kernel is questioned.

    *regions* are those of the virtio-mem devices, *images* what a recorded machine has RAM images of (empty if live),
    *header* the PT_LOADs of the kernel's own /proc/vmcore: prepared once and perhaps stale, unless *header_by_kernel*.
    """
    srat = reports["srat"]
    says = srat.ram() | srat.ranges(report.HOTPLUG_WINDOW)
    claims = Claims(
        reports["fw_cfg"].ram(),
        reports["smbios"].ram(),
        *((RangeSet(), RangeSet()) if srat.narrows_only else (srat.ram(), srat.ranges(report.HOTPLUG_WINDOW))),
    )
    boot, source = _boot(claims, says, images, problems)
    by_firmware = True
    if not boot and header:
        boot, source, by_firmware = header, "the kernel's header" if header_by_kernel else "preloaded header", False
        if not header_by_kernel:
            problems.note("no firmware source tells of boot RAM; the preloaded header's PT_LOADs are taken for it")
    no_ram, special = _other_uses(reports)
    # a host bridge may decode, a system board reserve, what is RAM: no RAM in the capture kernel's tree objects
    decoded = reports["iomem"].ranges(report.BUS_WINDOW) - claims.by_two
    out = regions | no_ram | special
    claimed = boot if claims.fw_cfg else boot | claims.any  # images and the kernel's header are a source too
    boot -= out | decoded
    absent = RangeSet()
    if images:
        absent = boot - images
        boot &= images
    window = claims.hot - boot - regions - no_ram
    disputed = (claimed & decoded if claims.fw_cfg else claimed) - out - absent - boot - window
    decoded -= claimed | claims.any
    heard = (header | images) - regions - no_ram - decoded - boot - disputed
    return Envelope(
        boot,
        window,
        regions,
        source,
        by_firmware or header_by_kernel,
        disputed,
        heard,
        no_ram=no_ram,
        decoded=decoded,
        absent=absent,
    )


def _boot(claims: Claims, srat: RangeSet, images: RangeSet, problems: Problems) -> tuple[RangeSet, str]:
    """Boot RAM and who says so. QEMU's fw_cfg has the true boot map; elsewhere SMBIOS and SRAT are both coarse, so what
    both say; *srat* are the entries of SRAT, hot-pluggable or not."""
    if claims.fw_cfg:
        for name, other in (("smbios", claims.smbios), ("srat", srat if claims.srat else RangeSet())):
            if other and (missing := claims.fw_cfg - other - FIRST_MIB):
                problems.note(f"{name} does not have {missing}, which fw_cfg calls RAM; fw_cfg is believed")
        return claims.fw_cfg, "fw_cfg"
    if both := claims.smbios & srat:
        return both, "smbios and srat"
    if claims.smbios or claims.srat:
        return claims.smbios | claims.srat, "smbios" if claims.smbios else "srat"
    return (images, "images") if images else (RangeSet(), "nothing")


def _other_uses(reports: Mapping[str, SourceReport]) -> tuple[RangeSet, RangeSet]:
    """What is known to be no RAM, and what is memory of a special purpose: RAM only if the dead kernel made it so
    (drivers/dax/kmem.c). kexec hands the reserved entries of /sys/firmware/memmap to the capture kernel unchanged,
    unlike RAM."""
    no_ram, special = reports["iomem"].ranges(report.DEVICE), RangeSet()
    for name in ("fw_cfg", "firmware_memmap"):
        no_ram |= reports[name].ranges(*report.NO_RAM)
        special |= reports[name].ranges(report.PERSISTENT, report.SOFT_RESERVED)
    return no_ram, special


def witnessed(env: Envelope, system_ram: RangeSet, known: Sections | None, problems: Problems) -> Envelope:
    """*env* after a sound resource tree of the dead kernel has told its *system_ram*; *known* are its memory sections,
    if they are.

    System RAM that no other source has (CXL and soft-reserved memory, DIMMs, boot RAM that coarse tables cut off) is
    admitted where two records that have nothing to do with each other agree on it, the tree and the sections, in whole
    sections, as all memory is added, and nothing that firmware or the capture kernel shows is a device there. The
    kernel's own header is no second witness, for it is a snapshot of that tree."""
    beyond = system_ram - (env.boot | env.window | env.regions | env.disputed | env.no_ram | env.decoded | env.absent)
    admitted = beyond & known.online & system_ram.inner_pages(known.section_size) if known else RangeSet()
    if admitted:
        problems.note(
            f"{admitted} was System RAM that no firmware table here calls RAM: read, on the dead kernel's word"
        )
    return env._replace(admitted=admitted, heard=RangeSet(), confirmed=True)


def unwitnessed(env: Envelope, e820_ram: RangeSet) -> Envelope:
    """*env* where the dead kernel has no sound resource tree: of the hotplug window its copy of firmware's memory map
    (e820_table_firmware) still tells what was boot RAM, *e820_ram*; memory that was hot-plugged is not in it."""
    boot = env.window & e820_ram
    return env._replace(boot=env.boot | boot, window=env.window - boot, heard=RangeSet())
