# SPDX-License-Identifier: LGPL-2.1-or-later
"""PageOffline: pages that the kernel had given away or never took (include/linux/page-flags.h): inflated into a balloon
(virtio-balloon, Hyper-V, VMware, Xen), unplugged inside a block of virtio-mem. Their content is stale, and reading them
may make the hypervisor populate them, or fail."""

from __future__ import annotations

from guard.pageset import PageSet
from guard.ranges import Range, RangeSet
from guard.registry import RAM, Rule
from guard.witness.memmap import Marks

NAME = "PageOffline"


def rule(marks: Marks) -> Rule | None:
    """Refuses every page whose struct page is of that type; None where the kernel knows no such type."""
    if marks.offline is None:
        return None
    return Rule(NAME, Range(0, 1 << 64), marks.offline, True, "the dead kernel had given it away", RAM)


def unmarked(offline: PageSet, unplugged: RangeSet, looked_at: RangeSet) -> RangeSet:
    """What of *unplugged* memory the kernel had not marked, of the memory whose struct pages were *looked_at*: there
    device and kernel contradict each other. The device is to be believed."""
    suspects = unplugged & looked_at
    return suspects - RangeSet(run for r in suspects for run in offline.ranges(*r))
