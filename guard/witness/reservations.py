# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that the dead kernel had set aside for its capture kernel, and which is therefore no part of the dump.

crashk_res and crashk_low_res are struct resource; crashk_cma_ranges[] (6.17+, crashkernel=...,cma) holds crashk_cma_cnt
items of struct range {u64 start, end}, ends inclusive (kernel/crash_reserve.c)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
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


def read_reservations(walk: PageWalk, symbols: Mapping[str, int], problems: Problems) -> list[Reservation]:
    """The reservations of the kernel whose *symbols* are given; what cannot be read is told in *problems*."""
    found: list[Reservation] = []
    for name in ("crashk_res", "crashk_low_res"):
        if name not in symbols:
            continue
        try:
            start, end = resource_at(walk, symbols[name])
        except (WitnessError, ReadError) as error:
            problems.note(f"{name}: left out: {error}")
            continue
        if start < end:
            found.append(Reservation(name, start, end))
    if "crashk_cma_ranges" in symbols and "crashk_cma_cnt" in symbols:
        try:
            found += _cma(walk, symbols["crashk_cma_ranges"], symbols["crashk_cma_cnt"], problems)
        except (WitnessError, ReadError) as error:
            problems.note(f"crashk_cma_ranges: left out: {error}")
    return found


def _cma(walk: PageWalk, ranges_at: int, count_at: int, problems: Problems) -> list[Reservation]:
    count = walk.read_u32(count_at)
    if count > _MAX_CMA_RANGES:
        raise WitnessError(f"crashk_cma_cnt is {count}, at most {_MAX_CMA_RANGES} was expected")
    found: list[Reservation] = []
    for number, (start, end) in enumerate(struct.iter_unpack("<2Q", walk.read(ranges_at, 16 * count))):
        if start > end:
            problems.note(f"crashk_cma_ranges[{number}]: start {start:#x} is behind end {end:#x}, left out")
        else:
            found.append(Reservation(f"crashk_cma_ranges[{number}]", start, end + 1))
    return found
