# SPDX-License-Identifier: LGPL-2.1-or-later
"""PageOffline: pages that the kernel had given away or never took (include/linux/page-flags.h): inflated into a balloon
(virtio-balloon, Hyper-V, VMware, Xen), unplugged inside a block of virtio-mem. Their content is stale, and reading them
may make the hypervisor populate them, or fail."""

from __future__ import annotations

from collections.abc import Iterable

from guard.pageset import PageSet
from guard.ranges import Range, RangeSet
from guard.registry import RAM, Rule
from guard.witness.memmap import Marks

NAME = "PageOffline"
_SHOWN = 16


def rule(marks: Marks) -> Rule | None:
    """Refuses every page whose struct page is of that type; None where the kernel knows no such type."""
    if marks.offline is None:
        return None
    return Rule(NAME, Range(0, 1 << 64), marks.offline, True, "the dead kernel had given it away", RAM)


def unmarked(offline: PageSet, unplugged: Iterable[Range], looked_at: RangeSet) -> tuple[RangeSet, int]:
    """What of *unplugged* memory, ascending, the kernel had not marked, where its struct pages were *looked_at*: there
    device and kernel contradict each other, and the device is to be believed. The first few, and bytes of all."""
    found: list[Range] = []
    size = 0
    for run in unplugged:
        for start, end in RangeSet([run]) & looked_at:
            for marked in (*offline.ranges(start, end), Range(end, end)):
                if start < marked.start:
                    size += marked.start - start
                    if len(found) < _SHOWN:
                        found.append(Range(start, marked.start))
                start = marked.end
    return RangeSet(found), size
