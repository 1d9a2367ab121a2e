# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory map of the dead machine, with provenance, and the rule that makes it.

Firmware is the authority: nothing outside its envelope is ever read, for it may be MMIO. The device is the truth
about what a virtio-mem region holds. The dead kernel is a witness: where it and firmware differ about what was RAM,
the narrower answer is read and the difference is told, as long as what it says is plausible at all."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from capture.sources import report
from capture.sources.report import SourceReport
from guard.pageset import PageSet
from guard.ranges import Range, RangeSet
from guard.registry import Registry, Rule, allow_rule, bitmap_rule, deny_rule
from guard.witness.memory import Problems

WHOLE = Range(0, 1 << 64)

RAM_SOURCES = ("fw_cfg", "smbios", "srat")

# The dead kernel's tree counts only if it has at least this share of what firmware calls boot RAM: a damaged or
# forged tree must not cost the dump. mem= halves a machine at worst in practice.
PLAUSIBLE_SHARE = 0.5

# Bytes; blocks of virtio-mem are at least this large in QEMU
SMALLEST_BRIDGE = 1 << 20

# Devices that only the dead kernel tells of; each is one more rule for every read. Machines have slots for some 30
MAX_UNLOCATED = 64

# What crashkernel= reserved beyond the capture kernel's own System RAM: elfcorehdr, purgatory, key areas
MAX_RESERVED_BEYOND_OWN = 64 << 20


class Device(NamedTuple):
    """A virtio-mem device. *bitmap* has bit i (LSB first) set for a plugged block i; None: it could not be asked,
    then *why* says so, and with *gated_by_kernel* the in-kernel driver answers instead of us. Bytes, physical."""

    name: str
    region: Range
    usable: int
    block_size: int
    plugged_size: int
    requested_size: int
    node_id: int
    bitmap: bytes | None
    why: str
    gated_by_kernel: bool = False
    problems: tuple[str, ...] = ()
    requests: int = 0

    def plugged_runs(self) -> Iterator[Range]:
        """What is plugged, by the device's own word, one run at a time: a large device can have very many."""
        if self.bitmap is not None:
            blocks = min(len(self.bitmap) * 8, self.region.size // self.block_size)
            pages = PageSet.of_bitmap(self.region.start, self.block_size, blocks, self.bitmap)
            yield from pages.ranges(*self.region)

    def unplugged_runs(self) -> Iterator[Range]:
        """What is not plugged, by the device's own word, one run at a time."""
        reached = self.region.start
        for run in self.plugged_runs():
            if reached < run.start:
                yield Range(reached, run.start)
            reached = run.end
        if self.bitmap is not None and reached < self.region.end:
            yield Range(reached, self.region.end)

    @property
    def plugged(self) -> RangeSet:
        """All of :meth:`plugged_runs` at once."""
        return RangeSet(self.plugged_runs())

    def rule(self, page_size: int) -> Rule | None:
        """What gates this region; None where the kernel's own driver does."""
        if self.gated_by_kernel:
            return None
        name = f"virtio-mem {self.region.start:#x}"
        if self.bitmap is None:
            return allow_rule(name, self.region, RangeSet(), f"unknown plug state: {self.why}", page_size)
        return bitmap_rule(name, self.region, self.block_size, self.bitmap, "unplugged", page_size)


class Envelope(NamedTuple):
    """What may be RAM at all. *boot* is RAM that firmware told of, *window* where more may have been plugged
    (DIMMs), *regions* virtio-mem."""

    boot: RangeSet
    window: RangeSet
    regions: RangeSet
    source: str
    by_firmware: bool = True

    @property
    def all(self) -> RangeSet:
        return self.boot | self.window | self.regions


class Entry(NamedTuple):
    """One line of the map: a range with one verdict and one provenance."""

    range: Range
    kind: str
    refused_by: str  # "" for what is read
    known_from: tuple[str, ...]


def envelope(
    reports: dict[str, SourceReport], devices: Iterable[Device], images: RangeSet, problems: Problems
) -> Envelope:
    """The envelope from what firmware says; *images* is what a recorded machine has RAM images of (empty if live).

    QEMU's fw_cfg has the true boot map; elsewhere SMBIOS and SRAT are both coarse, so what both say. Entries that
    /sys/firmware/memmap still calls reserved come off: kexec hands them to the capture kernel unchanged, unlike RAM."""
    regions = RangeSet(d.region for d in devices)
    srat = reports["srat"]
    window = srat.ranges(report.HOTPLUG_WINDOW) - regions
    fw_cfg, smbios, affinity = (reports[n].ranges(report.RAM) for n in RAM_SOURCES)
    if fw_cfg:
        boot, source = fw_cfg, "fw_cfg"
        for name, other in (("smbios", smbios), ("srat", affinity)):
            # of the first MiB each source has its own idea, and it is never old memory
            if other and (missing := boot - other - RangeSet([(0, 1 << 20)])):
                problems.note(f"{name} does not have {missing}, which fw_cfg calls RAM; fw_cfg is believed")
    elif smbios and affinity:
        boot, source = smbios & affinity, "smbios and srat"
    elif smbios or affinity:
        boot, source = smbios | affinity, "smbios" if smbios else "srat"
    elif images:
        boot, source = images, "images"
    else:
        boot, source = RangeSet(), "nothing"
    if images and (boot - regions) - images:
        problems.note(f"no image holds {(boot - regions) - images}, which {source} calls RAM; it is left out")
        boot &= images
    memmap = reports["firmware_memmap"]
    reserved = memmap.ranges(
        *(report.RESERVED, report.ACPI, report.NVS, report.UNUSABLE, report.PERSISTENT, report.SOFT_RESERVED)
    )
    return Envelope(boot - regions - reserved, window, regions, source)


def witnessed_ram(env: Envelope, system_ram: RangeSet, problems: Problems) -> RangeSet | None:
    """What of boot RAM and window the dead kernel used as System RAM; None if its word does not count."""
    if not system_ram:
        return None
    boot = env.boot & system_ram
    outside = system_ram - env.all
    if boot.size < env.boot.size * PLAUSIBLE_SHARE or outside.size > env.all.size:
        problems.note(
            f"the dead kernel's resource tree has {boot.size:#x} of {env.boot.size:#x} bytes of boot RAM and "
            f"{outside.size:#x} bytes elsewhere; that is not plausible, so firmware alone is believed"
        )
        return None
    if outside:
        problems.note(f"the dead kernel used {outside} as System RAM, outside of what firmware knows; not read")
    return boot | (env.window & system_ram)


def plausible_reservations(reserved: Iterable[tuple[str, int, int]], own: RangeSet, problems: Problems) -> RangeSet:
    """The crash reservations that agree with the memory which the capture kernel really owns."""
    good = RangeSet()
    for name, start, end in reserved:
        span = RangeSet([(start, end)])
        if (span - own).size > MAX_RESERVED_BEYOND_OWN:
            problems.note(
                f"{name} {Range(start, end)} of the dead kernel is not what this kernel owns; only its own is left out"
            )
            continue
        good |= span
    return good


def install_rules(registry: Registry, env: Envelope, own: RangeSet, devices: Iterable[Device]) -> None:
    """What firmware and devices know, in the order in which it is asked."""
    page_size = registry.page_size
    registry.register(allow_rule("envelope", WHOLE, env.all, "firmware does not call it RAM", page_size))
    registry.register(deny_rule("capture kernel", own, "belongs to the capture kernel", page_size))
    for device in devices:
        if rule := device.rule(page_size):
            _register(registry, rule, device)
    if env.window:
        registry.register(deny_rule("hotplug window", env.window, "nothing tells what was plugged there", page_size))


def unlocated_devices(claimed: Iterable[Range], known: Envelope, gated: bool) -> list[Device]:
    """virtio-mem regions that only the dead kernel tells of: of the devices behind them no plug state is known.

    *claimed* are its driver's resources; they count only outside of what firmware calls RAM, as no firmware calls such
    a region that (virtio specification, "Memory Device"). *gated* if the in-kernel driver gates all such devices."""
    why = "known from the dead kernel only"
    possible = known.window if known.by_firmware else known.window | known.boot
    found = RangeSet(claimed) & possible
    if len(found) > MAX_UNLOCATED:  # no tree of a sound kernel: nothing of what it could speak about is believed
        found = possible
    return [Device(f"virtio-mem {r.start:#x}", r, 0, 4096, 0, 0, 0, None, why, gated) for r in found]


def install_kernel_gated(registry: Registry, device: Device, system_ram: RangeSet, shown: RangeSet) -> None:
    """Of a region that the in-kernel driver gates, read what was System RAM, and only where /proc/vmcore shows it:
    the driver gates nothing else. Unplugged blocks in it then read as zeros, by the kernel."""
    ram = system_ram & shown
    reason = "gated by the kernel, and not in its own vmcore"
    name = f"virtio-mem {device.region.start:#x}"
    _register(registry, allow_rule(name, device.region, ram, reason, registry.page_size), device)


def _register(registry: Registry, rule: Rule, device: Device) -> None:
    """Two devices that claim one region have a rule each: what either refuses is refused."""
    if any(r.name == rule.name for r in registry):
        rule = rule._replace(name=f"{rule.name} ({device.name})")
    registry.register(rule)


def install_reservations(registry: Registry, reserved: RangeSet) -> None:
    """crashkernel= as the dead kernel reserved it: beyond the capture kernel's own RAM it holds the loaded header and
    such, which never were the dead machine's memory."""
    rule = deny_rule("crash reservation", reserved, "was reserved for the capture kernel", registry.page_size)
    registry.register(rule)


def install_witness(registry: Registry, env: Envelope, witnessed: RangeSet) -> None:
    """Narrow by the dead kernel's word, which also tells what of the hotplug window was memory."""
    if any(rule.name == "hotplug window" for rule in registry):
        registry.unregister("hotplug window")
    refused = ((env.boot | env.window) - witnessed).inner_pages(registry.page_size)
    if refused:
        registry.register(deny_rule("dead kernel", refused, "was not System RAM", registry.page_size))


def merged(runs: Callable[[], Iterator[Range]], bridges: RangeSet, most: int) -> tuple[list[Range], int]:
    """The ascending *runs*, at most about *most* of them: those with the smallest gaps between become one, as long as
    the gap lies in *bridges*. Also returns the largest gap that was bridged, 0 if none; *runs* is asked anew for each
    try, so that no list of all has to be held."""
    gap = 0
    while True:
        found: list[Range] = []
        for run in runs():
            last = found[-1] if found else None
            if last and run.start - last.end <= gap and bridges.covers(last.end, run.start):
                found[-1] = Range(last.start, run.end)
            elif len(found) == most and gap < WHOLE.end:
                break
            else:
                found.append(run)
        else:
            return found, gap
        gap = 2 * gap or SMALLEST_BRIDGE


def largest(runs: Iterable[Range], most: int) -> tuple[list[Range], int, int]:
    """The *most* largest of the ascending *runs*, ascending; how many others there are, and their bytes."""
    kept: list[Range] = []
    count = size = 0
    for run in runs:
        kept.append(run)
        count += 1
        size += run.size
        if len(kept) == 2 * most + 1:  # no list of all is held
            kept = sorted(kept, key=_size_of)[-most:] if most else []
    kept = sorted(sorted(kept, key=_size_of)[-most:] if most else [])
    return kept, count - len(kept), size - sum(run.size for run in kept)


def _size_of(run: Range) -> int:
    return run.size


def entries(
    registry: Registry, env: Envelope, devices: Iterable[Device], claims: dict[str, RangeSet]
) -> Iterator[Entry]:
    """The map, ascending: everything in the envelope and everything that some source of *claims* (name -> ranges)
    calls memory, cut wherever verdict or provenance changes. One at a time: a fragmented machine has very many."""
    page = registry.page_size
    spans = env.all
    for ranges in claims.values():
        spans |= ranges
    borders = sorted({b for ranges in (*claims.values(), env.boot, env.window, env.regions) for r in ranges for b in r})
    kinds: list[tuple[str, Callable[[int], bool]]] = [
        ("virtio-mem", env.regions.__contains__),
        ("ram", env.boot.__contains__),
        ("hotplug", env.window.__contains__),
    ]
    asked = [(d.name, d.region) for d in devices if d.bitmap is not None]
    pending: Entry | None = None
    for span in spans.outer_pages(page):
        for run, rule in registry.verdicts(*span):
            inner = borders[bisect_right(borders, run.start) : bisect_left(borders, run.end)]
            cuts = sorted({run.start, run.end, *(b & -page for b in inner)})
            for start, end in pairwise(cuts):
                inside = end - 1
                kind = next((name for name, has in kinds if has(inside)), "other")
                # a device speaks for its region by its rule: what that lets pass is plugged
                names = [name for name, region in asked if rule is None and region.start <= inside < region.end]
                names += [name for name, ranges in claims.items() if inside in ranges]
                entry = Entry(Range(start, end), kind, rule.name if rule else "", tuple(names))
                if pending and pending[1:] == entry[1:] and pending.range.end == start:
                    entry = entry._replace(range=Range(pending.range.start, end))
                elif pending:
                    yield pending
                pending = entry
    if pending:
        yield pending
