# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guard from C: questions, one by one and in batches, guarded reads beside plain ones, and compiled guards.

The machines: one with a virtio-mem device of 1 TiB of which every second block at random is plugged, behind the rules
that a dump has; one of 64 TiB in a million transitions; and one that changes at every page, the worst that can be."""

from __future__ import annotations

import os
import random
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from guard.compiled import write_guard
from guard.pageset import PageSet
from guard.ranges import Range, RangeSet
from guard.registry import Registry, Rule, allow_rule, bitmap_rule, deny_rule
from tests.c import WARNINGS, missing, run

MiB, GiB, TiB = 1 << 20, 1 << 30, 1 << 40
PAGE = 4096
IMAGE_SIZE = 256 * MiB


class Figure(NamedTuple):
    what: str
    measured: str
    budget: str


def fragmented_device() -> Registry:
    device = Range(1 * TiB, 2 * TiB)
    registry = Registry()
    registry.register(
        allow_rule("envelope", Range(0, 1 << 64), RangeSet([(0, 3 * GiB), (4 * GiB, 64 * GiB), device]), "no RAM")
    )
    registry.register(deny_rule("capture kernel", RangeSet([(0, MiB), (2 * GiB, 2 * GiB + 256 * MiB)]), "not old"))
    bitmap = random.Random(1).randbytes(TiB // (2 * MiB) // 8)
    registry.register(bitmap_rule("virtio-mem", device, 2 * MiB, bitmap, "unplugged"))
    registry.register(deny_rule("crash reservation", RangeSet([(2 * GiB, 2 * GiB + 256 * MiB)]), "set aside"))
    return registry


def runs_of_pages(end: int, transitions: int) -> Registry:
    """RAM up to *end* (bytes), of which every second stretch is refused."""
    step = end // PAGE // transitions
    runs = array("Q")
    for start in range(0, end // PAGE, 2 * step):
        runs.extend((start, start + step))
    registry = Registry()
    registry.register(Rule("pages", Range(0, end), PageSet(0, 1 << 52, runs, len(runs) // 2, 0, 12), False, "absent"))
    return registry


def pages_at_random(pages: int) -> Registry:
    registry = Registry()
    bitmap = random.Random(2).randbytes(pages // 8)
    registry.register(bitmap_rule("pages", Range(0, pages * PAGE), PAGE, bitmap, "absent"))
    return registry


def figures() -> list[Figure]:
    """Raises AssertionError if something cannot be built or run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("make", "-s", "lib", f"LIB_OUT={folder}")
        libs = (f"-L{folder}", "-loldmem_guard", f"-Wl,-rpath,{folder}")
        program = folder / "bench"
        run("gcc", "-O2", *WARNINGS, "-Iinclude", Path(__file__).with_suffix(".c"), *libs, "-o", program)

        def best(what: str, registry: Registry, *numbers: int) -> float:
            guard = folder / "guard"
            write_guard(registry, str(guard))
            return float(run(program, what, guard, *map(str, numbers), timeout=300).stdout)

        device = fragmented_device()
        first, end = TiB // PAGE, 2 * TiB // PAGE
        machine = runs_of_pages(64 * TiB, 1_000_000)
        asking, opening = best("ask", device, first, end), best("open", machine)
        size = os.path.getsize(folder / "guard")
        found = [
            batch("1 TiB device", best("fill", device, first, end)),
            batch("64 TiB in a million transitions", best("fill", machine, 0, 1 << 28)),
            batch("every other page", best("fill", runs_of_pages(4 * GiB, 1 << 20), 0, 1 << 20)),
            batch("bitmap of pages at random", best("fill", pages_at_random(1 << 24), 0, 1 << 24)),
            Figure("is_ram, one by one, fragmented 1 TiB device", f"{asking:.1f} ns", "<= 10 ns"),
            Figure("compiled guard of 64 TiB in a million transitions: size", f"{size / 1e6:.1f} MB", "< 20 MB"),
            Figure("the same: time to open", f"{opening:.2f} ms", "< 5 ms"),
        ]
        found.append(reads(folder, program))
    return found


def batch(what: str, speed: float) -> Figure:
    return Figure(f"pfn_is_ram in batches, {what}", f"{speed:.0f} million/s", ">= 300 million/s")


def reads(folder: Path, program: Path) -> Figure:
    with open(folder / "image", "wb") as image:
        for _ in range(IMAGE_SIZE // MiB):
            image.write(os.urandom(MiB))
    registry = fragmented_device()
    registry.unregister("capture kernel")  # all of the image is RAM: both read the same bytes
    write_guard(registry, str(folder / "guard"))
    lines = run(program, "read", folder / "guard", folder / "image", timeout=300).stdout.decode().splitlines()
    pairs = [(float(guarded), float(plain)) for guarded, plain in (line.split() for line in lines)]
    ratio = min(plain for _, plain in pairs) / min(guarded for guarded, _ in pairs)
    each = sorted(plain / guarded for guarded, plain in pairs)
    measured = f"{ratio:.2f}; pairs {each[len(each) // 2]:.2f} ({each[0]:.2f} to {each[-1]:.2f})"
    return Figure("sequential read of an image: guarded speed / speed of pread", measured, ">= 0.95")


def report(row: Callable[[str, str, str], None]) -> None:
    """A row for each figure."""
    if reason := missing():
        row("guard for C programs", f"not measured: {reason}", "")
        return
    for figure in figures():
        row(*figure)
