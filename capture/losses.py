# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was RAM of the dead machine and is not in its vmcore, and why: exit status 0 means that there is nothing of it.

Not lost is what a rule refuses on evidence of its own: broken, unplugged, given away, the capture kernel's own. Lost is
what is refused only because no source calls it RAM or nothing tells its state, and what may be read but no file
shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from capture.envelope import FIRST_MIB, RAM_SOURCES
from capture.sources import report
from guard.errors import ReadError, WitnessError
from guard.physmem import MAX_FAULTS
from guard.ranges import Range, RangeSet
from guard.registry import NOT_RAM

if TYPE_CHECKING:
    from capture.dump import Dump

MOST = 8192
"""Runs told of a fragmented machine."""


class Loss(NamedTuple):
    """Physical bytes that were RAM, or may have been, and are missing or zeros in the vmcore; *why* says which source
    cut them."""

    range: Range
    why: str


def unlisted(page_reads: int) -> list[str]:
    """A line about the reads of pages that failed and are not among the runs that are listed, if there are any."""
    if not page_reads:
        return []
    return [f"{page_reads} reads of pages failed beyond the {MAX_FAULTS} runs that can be listed, and gave zeros"]


def losses(dump: Dump) -> list[Loss]:
    """All that is lost of *dump*, ascending."""
    found = [Loss(r, _why_hidden(dump, r)) for r in hidden(dump)]
    found += [Loss(r, "a header has no room for so many pieces") for r in dump.left_out]
    found += cut(dump)
    return sorted(found)


def cut(dump: Dump) -> list[Loss]:
    """What is refused without evidence of its own, and therefore missing from the vmcore."""
    env, arch = dump.envelope, dump.arch
    left: list[Loss] = []
    told = RangeSet()

    def add(ranges: RangeSet, why: str) -> None:
        nonlocal told
        left.extend(Loss(r, why) for r in ranges - told)
        told |= ranges

    add(unasked(dump), "nothing tells its state")
    theirs = (dump.machine.own | FIRST_MIB | arch.reserved).outer_pages(dump.machine.page_size)
    ram = (arch.system_ram - theirs).inner_pages(dump.machine.page_size)
    if arch.reserved:  # else nothing tells the capture kernel's place from what it has added to it
        taken = (arch.system_ram & dump.machine.own) - arch.reserved - FIRST_MIB
        add(taken, "this kernel has taken it for its own (acpi_no_memhotplug keeps it from that)")
    add(ram & env.no_ram, "the dead kernel used it as System RAM, but firmware or this kernel has something else there")
    add(ram & env.decoded, "the dead kernel used it as System RAM, but this kernel has a bus there")
    add(ram & env.absent, "no image holds it")
    add(ram - env.all, f"the dead kernel used it as System RAM, but {env.source} does not have it")
    for ranges, why in arch.doubts:
        add(ranges - theirs, why)
    add(_unfounded(dump), "the kernel's own header has it, and nothing else tells of it")
    if not env.confirmed and not dump.machine.header_is_the_kernels:
        _add_unconfirmed(dump, theirs, add)
    return left


def _add_unconfirmed(dump: Dump, theirs: RangeSet, add: Callable[[RangeSet, str], None]) -> None:
    """What may have been RAM, where no dead kernel tells."""
    env, machine = dump.envelope, dump.machine

    def old(ranges: RangeSet) -> RangeSet:
        return (ranges - theirs).inner_pages(machine.page_size)

    add(old(env.absent), f"{env.source} calls it RAM, but no image holds it")
    add(old(env.disputed), "one source calls it RAM, another speaks against it, and no dead kernel tells")
    add(env.window, "nothing tells what was hot-plugged there")
    if not machine.reports["fw_cfg"].ram():  # which knows all boot RAM: other pages of an image are those of a hole
        held = machine.images - (env.all | env.no_ram | env.decoded)
        add(old(held), "an image holds it, and nothing tells what it is")
    if machine.core_header:
        listed = dump.preloaded_ranges() & env.no_ram
        add(old(listed), "the kernel's own header has it, but firmware or this kernel has something else there")
    told = RangeSet(r for name in RAM_SOURCES for r in machine.reports[name].ram()) or machine.images
    devices = told & machine.reports["iomem"].ranges(report.DEVICE)
    add(old(devices), f"{env.source} calls it RAM, but this kernel has a device there")
    records = RangeSet((paddr, paddr + 1) for paddr in _records(dump)).outer_pages(machine.page_size)
    add(records - env.all, f"the dead kernel's records lie there, but {env.source} does not have it")


def _records(dump: Dump) -> Iterator[int]:
    """Physical addresses at which the dead kernel must have had RAM: of its note, as firmware was told; of the nodes of
    its resource tree; of its page tables and image, but only where these lie in what is known to be no RAM, for
    elsewhere a damaged phys_base is more likely."""
    machine, dead = dump.machine, dump.arch.dead
    if machine.vmcoreinfo_paddr is not None:
        yield machine.vmcoreinfo_paddr
    if dead is None:
        return
    yield from dead.tree().unread
    places = [dead.walk.root_paddr]
    if (stext := dead.info.symbol("_stext")) is not None:
        with contextlib.suppress(WitnessError, ReadError):  # it is asked about by others, who tell
            places.append(dead.walk.translate(stext))
    yield from (paddr for paddr in places if paddr in dump.envelope.no_ram)


def missing(dump: Dump) -> RangeSet:
    """What the kernel's own header has and this vmcore would lack, though no rule refuses it on its own evidence."""
    return _unfounded(dump) | (_listed(dump) & RangeSet(hidden(dump)))


def _unfounded(dump: Dump) -> RangeSet:
    """What the kernel's own header has and is refused without evidence."""
    env = dump.envelope
    listed = _listed(dump)
    beyond = listed - env.all
    if env.confirmed:
        beyond &= dump.arch.system_ram  # what a sound tree lacks is gone: this header is stale
    unfounded = beyond | listed & RangeSet(r for ranges in (env.unsettled, *doubts(dump)) for r in ranges)
    return unfounded - dump.registry.ram(unfounded)


def _listed(dump: Dump) -> RangeSet:
    """The kernel's own header, as far as it is not known to be something else than the dead machine's memory."""
    machine = dump.machine
    if machine.core_header is None or machine.header_is_the_kernels:
        return RangeSet()
    theirs = machine.own | FIRST_MIB | dump.arch.reserved | dump.envelope.no_ram
    return (dump.preloaded_ranges() - theirs.outer_pages(machine.page_size)).inner_pages(machine.page_size)


def doubts(dump: Dump) -> list[RangeSet]:
    """Memory that is refused though the dead kernel's records contradict each other there."""
    return [ranges for ranges, _ in dump.arch.doubts]


def hidden(dump: Dump) -> Iterator[Range]:
    """What may be read, but no source shows: it is zeros. Of a fragmented machine no more than MOST runs."""
    registry = dump.registry
    unshown = dump.envelope.all.inner_pages(registry.page_size) - dump.memory.covered
    return islice((run for span in unshown for run, rule in registry.verdicts(*span) if rule is None), MOST)


def _why_hidden(dump: Dump, run: Range) -> str:
    if dump.machine.live:
        return "no source shows it"
    device = next((d for d in dump.machine.devices if d.region.start <= run.start < d.region.end), None)
    return f"there is no image of {device.name}" if device else "no image holds it"


def unasked(dump: Dump) -> RangeSet:
    """What was System RAM and is refused only because what was to be asked about it did not answer."""
    silent = RangeSet(d.region for d in dump.machine.devices if d.bitmap is None)
    for rule in dump.registry:
        if rule.trouble == NOT_RAM:
            silent |= rule.troubled
    if dump.envelope.confirmed:
        silent &= dump.arch.system_ram
    return silent - dump.registry.ram(silent)
