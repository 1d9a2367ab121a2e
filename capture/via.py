# SPDX-License-Identifier: LGPL-2.1-or-later
"""By which of the three ways oldmem init hands the vmcore over (docs/ways.md): FUSE, inside the collector, stage 2."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from capture import stage2
from capture.dump import Dump
from capture.programs import is_static
from capture.report import bytes_text
from guard.errors import Error

AUTO, FUSE, RUN, STAGE2 = "auto", "fuse", "run", "stage2"


class Choice(NamedTuple):
    """The way, why it is that one in a line, and the plan of stage 2 if it is that."""

    way: str
    why: str
    plan: stage2.Plan | None = None


def choose(dump: Dump, command: Sequence[str], options: stage2.Options) -> Choice:
    """What this machine allows, the cheapest way to full speed first: no server and no boot inside of a collector that
    takes a library; stage 2 for all others; FUSE where neither is to be had."""
    have_fuse = os.path.exists("/dev/fuse")
    if command and have_fuse and not is_static(command[0]):
        return Choice(RUN, f"{command[0]} takes a library, and maps at the kernel's speed without another boot")
    why_not_run = "no command that could take a library"
    if command:
        why_not_run = f"{command[0]} is statically linked" if have_fuse else "no /dev/fuse"
    try:
        plan = stage2.plan(dump, options)
        stage2.check_memory(plan)
    except Error as e:
        return Choice(FUSE, f"{why_not_run}; no stage 2: {e}")
    if plan.given_up.runs:
        size = bytes_text(plan.given_up.size)
        return Choice(FUSE, f"{why_not_run}; stage 2 has no room for {plan.given_up.runs} runs of {size}")
    if gated := dump.registry.ram(stage2.gated_by_driver(dump)):
        size = bytes_text(gated.size)
        return Choice(FUSE, f"{why_not_run}; stage 2 would leave out {size} that the kernel's own driver gates")
    if mounted := stage2.mounted_for_writing():
        return Choice(FUSE, f"{why_not_run}; no stage 2 while {mounted[0]} is mounted for writing")
    return Choice(STAGE2, f"{why_not_run}; the kernel itself can serve {len(plan.loads)} PT_LOADs", plan)
