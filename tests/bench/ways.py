# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each way of handing the vmcore over costs from the crash to the closed dump, against plain kdump in the same
run, and the smallest crashkernel= in which it works (docs/ways.md)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.vm.harness import ConsoleError, Device, Guest, GuestError, MiB

ROUNDS = 3
DEVICE = Device("vm0", 1024 * MiB, 480 * MiB)
DUMP = "makedumpfile-testing -F -l -d 31 /proc/vmcore > /dev/scratch && sync"
COPY = "dd-dynamic if=/proc/vmcore of=/dev/scratch bs=1M && sync"
LARGEST, STEP = 320, 16  # MiB


class Way(NamedTuple):
    """*prepare* comes before the collector, which runs *under* a command; *append* is for the capture kernel."""

    name: str
    prepare: Callable[[Guest], object]
    under: str = ""
    append: str = ""


def nothing(g: Guest) -> None:
    """Plain kdump: the kernel's own vmcore as it is."""


def serve(g: Guest) -> None:
    g.sh("oldmem init -q")


def stage2(g: Guest) -> None:
    g.next_stage("oldmem stage2 -q")
    g.sh("oldmem init")


WAYS = (
    Way("plain kdump", nothing),
    Way("FUSE", serve),
    Way("oldmem run", nothing, "oldmem run -q -- "),
    Way("stage 2", stage2),
)
SMALLER = (*WAYS, Way("stage 2, swiotlb=512", stage2, append="swiotlb=512"))


class Cost(NamedTuple):
    """Seconds of the host's clock: from the crash until the collector can start, and of each collector."""

    ready: float
    dump: float
    copy: float


@contextmanager
def boot(crashkernel: str, way: Way) -> Iterator[Guest]:
    """A guest about to crash."""
    memory, below = 1280 * MiB, 1024 * MiB
    devices = (DEVICE,)
    with Guest("6.12", memory=memory, below_4g=below, crashkernel=crashkernel, devices=devices, testing=True) as g:
        g.load("s", way.append)
        yield g


def hand_over(g: Guest, way: Way) -> float:
    """Crash the guest; seconds until a collector can start. What stage 2 goes to, a capture initramfs would have
    brought along: copying it in does not count."""
    start = time.monotonic()
    g.crash(timeout=45)
    before = time.monotonic() - start
    if way.prepare is stage2:
        g.put_boot_files()
    start = time.monotonic()
    way.prepare(g)
    return before + time.monotonic() - start


def timed(g: Guest, way: Way, collector: str) -> float:
    g.sh("echo 3 > /proc/sys/vm/drop_caches")
    start = time.monotonic()
    g.sh(f"{way.under}sh -c '{collector}' 2>/dev/null", timeout=300)
    return time.monotonic() - start


def cost(way: Way) -> Cost:
    with boot("384M", way) as g:
        return Cost(hand_over(g, way), timed(g, way, DUMP), timed(g, way, COPY))


def served_natively() -> tuple[float, float]:
    """Time of both collectors in stage 2 over their time in the capture kernel before it: the best of ROUNDS each, in
    one guest, with one round before to warm the host's memory."""
    first, last = WAYS[0], WAYS[-1]
    with boot("384M", first) as g:
        g.crash()
        before = [[timed(g, first, collector) for _ in range(ROUNDS + 1)] for collector in (DUMP, COPY)]
        g.put_boot_files()
        last.prepare(g)
        after = [[timed(g, last, collector) for _ in range(ROUNDS + 1)] for collector in (DUMP, COPY)]
    dump, copy = (min(a[1:]) / min(b[1:]) for a, b in zip(after, before, strict=True))
    return dump, copy


def smallest(way: Way) -> int:
    """The smallest crashkernel= in MiB, by steps down, in which *way* ends with a closed dump."""
    size = LARGEST
    while size > STEP:
        try:
            with boot(f"{size - STEP}M", way) as g:
                hand_over(g, way)
                timed(g, way, DUMP)
        except (ConsoleError, GuestError):
            break
        size -= STEP
    return size


def report(row: Callable[[str, str, str], None]) -> None:
    costs = {way.name: [cost(way) for _ in range(ROUNDS)] for way in WAYS}

    def ratio(name: str, seconds: Callable[[Cost], float]) -> str:
        ours, plain = (statistics.median(map(seconds, costs[which])) for which in (name, WAYS[0].name))
        return f"{ours / plain:.2f}"

    for name in list(costs)[1:]:
        row(f"crash to collector: {name} / plain kdump", ratio(name, lambda c: c.ready), "")
        for collector, whole, alone in (
            ("makedumpfile -d 31", lambda c: c.ready + c.dump, lambda c: c.dump),
            ("dd of all", lambda c: c.ready + c.copy, lambda c: c.copy),
        ):
            value = f"{ratio(name, whole)}; collector alone {ratio(name, alone)}"
            row(f"crash to closed dump, {collector}: {name} / plain kdump", value, "")
    dump, copy = served_natively()
    row("makedumpfile -d 31: time in stage 2 / in the capture kernel before it", f"{dump:.2f}", "1.0")
    row("dd of all: time in stage 2 / in the capture kernel before it", f"{copy:.2f}", "1.0")
    for way in SMALLER:
        row(f"smallest crashkernel=: {way.name}", f"{smallest(way)}M", "")


def main() -> None:
    """This part of the bench alone."""
    report(lambda what, value, budget: print(f"{what:<72} {value:<34} {budget}", flush=True))


if __name__ == "__main__":
    main()
