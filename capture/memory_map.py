# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory map of the dead machine, with provenance, and the rules that make it.

Nothing outside of the envelope (envelope.py) is ever read, for it may be MMIO. The device is the truth about what a
virtio-mem region holds. The dead kernel is a witness: where it and firmware differ about what was RAM, the narrower
answer is read and the difference is told."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from capture.envelope import FIRST_MIB, Envelope
from guard.pageset import PageSet
from guard.ranges import Range, RangeSet
from guard.registry import Registry, Rule, allow_rule, bitmap_rule, deny_rule
from guard.witness.memory import Problems

WHOLE = Range(0, 1 << 64)

HOTPLUG = "hotplug window"
"""Name of the rule that keeps it closed."""

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


class Entry(NamedTuple):
    """One line of the map: a range with one verdict and one provenance. *shown*: some file shows its bytes."""

    range: Range
    kind: str
    refused_by: str  # "" for what may be read
    shown: bool
    known_from: tuple[str, ...]


def plausible_reservations(
    reserved: Iterable[tuple[str, int, int]], own: RangeSet | None, problems: Problems
) -> RangeSet:
    """The crash reservations that agree with the memory *own* which the capture kernel really owns: a part of each, as
    it is given all of them (arch/x86/kernel/crash.c:crash_setup_memmap_entries()). None: nothing tells what it owns (a
    host's dump of a guest whose capture kernel never ran); then the dead kernel's word is all there is."""
    good = RangeSet()
    for name, start, end in reserved:
        span = RangeSet([(start, end)])
        if own is not None and ((span - own).size > MAX_RESERVED_BEYOND_OWN or not span & (own - FIRST_MIB)):
            problems.note(
                f"{name} {Range(start, end)} of the dead kernel is not what this kernel owns; only its own is left out"
            )
            continue
        good |= span
    return good


def install_rules(registry: Registry, env: Envelope, own: RangeSet, devices: Iterable[Device]) -> None:
    """What firmware and devices know, in the order in which it is asked."""
    page_size = registry.page_size
    registry.register(_envelope_rule(env, page_size))
    registry.register(deny_rule("capture kernel", own, "belongs to the capture kernel", page_size))
    for device in devices:
        if rule := device.rule(page_size):
            _register(registry, rule, device)
    if env.window:
        closed = env.window - env.heard
        registry.register(deny_rule(HOTPLUG, closed, "nothing tells what was plugged there", page_size))


def _envelope_rule(env: Envelope, page_size: int) -> Rule:
    return allow_rule("envelope", WHOLE, env.all, "firmware does not call it RAM", page_size)


def unlocated_devices(claimed: Iterable[Range], known: Envelope, gated: bool) -> list[Device]:
    """virtio-mem regions that only the dead kernel tells of: of the devices behind them no plug state is known.

    *claimed* are its driver's resources; they count only outside of what firmware calls RAM, as no firmware calls such
    a region that (virtio specification, "Memory Device"). *gated* if the in-kernel driver gates all such devices."""
    why = "known from the dead kernel only"
    elsewhere = known.regions | known.boot if known.by_firmware else known.regions
    found = RangeSet(claimed) - elsewhere
    if len(found) > MAX_UNLOCATED:  # no tree of a sound kernel: nothing of what it could speak about is believed
        first, *_, last = found
        found = (known.window | RangeSet([(first.start, last.end)])) - elsewhere
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


def settle(registry: Registry, env: Envelope, system_ram: RangeSet) -> None:
    """Put what the dead kernel has told in force. Of an *env* that its resource tree confirmed, nothing is read but
    *system_ram*; else what only that tree could have settled stays closed."""
    page_size = registry.page_size
    registry.replace(_envelope_rule(env, page_size))
    if any(rule.name == HOTPLUG for rule in registry):
        registry.unregister(HOTPLUG)
    if env.confirmed:
        known = env.boot | env.window | env.disputed
        if refused := (known - system_ram).inner_pages(page_size):
            registry.register(deny_rule("dead kernel", refused, "was not System RAM", page_size))
        return
    if env.window:
        registry.register(deny_rule(HOTPLUG, env.window, "nothing tells what was plugged there", page_size))
    if env.disputed:
        reason = "one source calls it RAM, another speaks against it"
        registry.register(deny_rule("disputed", env.disputed, reason, page_size))


def merged(runs: Callable[[], Iterator[Range]], bridges: RangeSet, most: int) -> tuple[list[Range], int] | None:
    """The ascending *runs*, at most *most* of them: those with the smallest gaps between become one, as long as the gap
    lies in *bridges*. Also returns the largest gap that was bridged, 0 if none; *runs* is asked anew for each try, so
    that no list of all has to be held. None where too few gaps lie in *bridges*."""
    gap = 0
    while gap <= WHOLE.end:
        found: list[Range] = []
        for run in runs():
            last = found[-1] if found else None
            if last and run.start - last.end <= gap and bridges.covers(last.end, run.start):
                found[-1] = Range(last.start, run.end)
            elif len(found) == most:
                break
            else:
                found.append(run)
        else:
            return found, gap
        gap = 2 * gap or SMALLEST_BRIDGE
    return None


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
    registry: Registry, env: Envelope, devices: Iterable[Device], claims: dict[str, RangeSet], shown: RangeSet
) -> Iterator[Entry]:
    """The map, ascending: everything in the envelope and everything that some source of *claims* (name -> ranges)
    calls memory, cut wherever verdict or provenance changes, or what the files show (*shown*) ends. One at a time: a
    fragmented machine has very many."""
    page = registry.page_size
    spans = env.all
    for ranges in claims.values():
        spans |= ranges
    ram = env.boot | env.disputed | env.admitted
    parts = (*claims.values(), ram, env.window, env.regions, shown)
    borders = sorted({b for ranges in parts for r in ranges for b in r})
    kinds: list[tuple[str, Callable[[int], bool]]] = [
        ("virtio-mem", env.regions.__contains__),
        ("ram", ram.__contains__),
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
                refused_by = rule.name if rule else ""
                entry = Entry(Range(start, end), kind, refused_by, bool(rule) or inside in shown, tuple(names))
                if pending and pending[1:] == entry[1:] and pending.range.end == start:
                    entry = entry._replace(range=Range(pending.range.start, end))
                elif pending:
                    yield pending
                pending = entry
    if pending:
        yield pending
