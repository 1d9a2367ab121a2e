# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that the dead kernel had set aside for its capture kernel, and which is therefore no part of the dump.

crashk_res and crashk_low_res are struct resource; crashk_cma_ranges[] (6.17+, crashkernel=...,cma) holds crashk_cma_cnt
items of struct range, ends inclusive (kernel/crash_reserve.c)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.witness.btf import Layout
from guard.witness.layouts import FIXED, unpacker
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk
from guard.witness.resources import resource_at

SYMBOLS = frozenset({"crashk_res", "crashk_low_res", "crashk_cma_ranges", "crashk_cma_cnt"})

_MAX_CMA_RANGES = 64
"""CRASHKERNEL_CMA_RANGES_MAX is 4; a count far above it is damage, not a newer kernel."""


class Reservation(NamedTuple):
    """A reserved half-open physical range [start, end), in bytes, and the kernel variable that says so."""

    name: str
    start: int
    end: int


def read_reservations(
    walk: PageWalk, symbols: Mapping[str, int], problems: Problems, layouts: Mapping[str, Layout] = FIXED
) -> list[Reservation]:
    """The reservations of the kernel whose *symbols* are given; what cannot be read is told in *problems*."""
    found: list[Reservation] = []
    for name in ("crashk_res", "crashk_low_res"):
        if name not in symbols:
            continue
        try:
            start, end = resource_at(walk, symbols[name], layouts["resource"])
        except (WitnessError, ReadError) as error:
            problems.note(f"{name}: left out: {error}")
            continue
        if start < end:
            found.append(Reservation(name, start, end))
    if "crashk_cma_ranges" in symbols and "crashk_cma_cnt" in symbols:
        try:
            ranges_at, count_at = symbols["crashk_cma_ranges"], symbols["crashk_cma_cnt"]
            found += _cma(walk, ranges_at, count_at, problems, layouts["range"])
        except (WitnessError, ReadError) as error:
            problems.note(f"crashk_cma_ranges: left out: {error}")
    return found


def _cma(walk: PageWalk, ranges_at: int, count_at: int, problems: Problems, layout: Layout) -> list[Reservation]:
    count = walk.read_u32(count_at)
    if count > _MAX_CMA_RANGES:
        raise WitnessError(f"crashk_cma_cnt is {count}, at most {_MAX_CMA_RANGES} was expected")
    found: list[Reservation] = []
    limits = unpacker(layout, "start", "end")
    for number in range(count):
        start, end = limits(walk.read(ranges_at + number * layout.size, layout.size))
        if start > end:
            problems.note(f"crashk_cma_ranges[{number}]: start {start:#x} is behind end {end:#x}, left out")
        else:
            found.append(Reservation(f"crashk_cma_ranges[{number}]", start, end + 1))
    return found
