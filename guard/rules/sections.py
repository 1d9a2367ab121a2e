# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory sections that the kernel had, but not online (include/linux/mmzone.h): memory blocks that were taken offline,
or added and never brought online. Nothing of the kernel's is in them.

The section's own state is the evidence, and nothing else is: neither what the resource tree says, nor how much of the
machine it is about, nor a section that is not there at all."""

from __future__ import annotations

from guard.ranges import RangeSet
from guard.registry import RAM, Rule, deny_rule
from guard.witness.memory import Problems
from guard.witness.sections import Sections, contradictions

NAME = "offline section"


def rule(sections: Sections, page_size: int = 4096) -> Rule:
    """Refuses what lies in sections that are present and not online, also where that is most of memory: then
    ``sections.doubtful()`` is true, and whoever serves the dump has to say so."""
    return deny_rule(NAME, sections.offline, "was offline in the dead kernel", page_size)._replace(trouble=RAM)


def without_section(sections: Sections, system_ram: RangeSet, problems: Problems) -> RangeSet:
    """What of *system_ram* of a sound tree (physical bytes) lies in no section that is present. That cannot be, and one
    of the two is damaged; it is not refused, but told in *problems* and returned."""
    missing = contradictions(sections, system_ram).without_section
    if missing:
        why = f" ({sections.flaw})" if sections.flaw else ""
        problems.note(
            f"mem_section: {missing.size:#x} bytes of System RAM ({missing}) lie in no section that is there{why}; "
            "they are read, but not known to be free of broken pages"
        )
    return missing
