# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hardware poison: pages that the kernel had taken out of use after a memory error (mm/memory-failure.c). Reading one
raises a machine check, which the capture kernel may not survive."""

from __future__ import annotations

from guard.ranges import Range
from guard.registry import RAM, Rule
from guard.witness.memmap import Marks

NAME = "hwpoison"


def rule(marks: Marks) -> Rule | None:
    """Refuses every page whose struct page has PG_hwpoison, and all of a HugeTLB folio where its head has it; None
    where the kernel knows no such flag."""
    if marks.poisoned is None:
        return None
    return Rule(NAME, Range(0, 1 << 64), marks.poisoned, True, "the dead kernel had it marked as broken", RAM)
