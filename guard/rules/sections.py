# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory sections that the kernel did not have online (include/linux/mmzone.h): memory blocks that were taken offline,
or added and never brought online. Nothing of the kernel's is in them."""

from __future__ import annotations

from guard.ranges import RangeSet
from guard.registry import RAM, Rule, deny_rule
from guard.witness.sections import Sections

NAME = "offline section"
_PLAUSIBLE_SHARE = 0.5


def rule(sections: Sections, system_ram: RangeSet, page_size: int = 4096) -> Rule | None:
    """Refuses what of *system_ram* lies in no online section. None where that would be most of it: then the sections
    are not what they were taken for."""
    refused = (system_ram - sections.online).inner_pages(page_size)
    if refused.size > system_ram.size * _PLAUSIBLE_SHARE:
        return None
    return deny_rule(NAME, refused, "was offline in the dead kernel", page_size)._replace(trouble=RAM)
