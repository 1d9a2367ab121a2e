# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that a fatal machine check had named before the kernel died. Reading it may raise that check again, which the
capture kernel may not survive. Since 6.8 such a page has PG_hwpoison too; before, it stands in the log alone
(guard/witness/machine_check.py)."""

from __future__ import annotations

from guard.ranges import RangeSet
from guard.registry import RAM, Rule, deny_rule

NAME = "machine check"


def rule(named: RangeSet, page_size: int = 4096) -> Rule | None:
    """Refuses what was *named*, physical bytes; None if nothing was."""
    if not named:
        return None
    return deny_rule(NAME, named, "a fatal machine check named this address", page_size)._replace(trouble=RAM)
