# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make bench``: ratios against a peer, both measured in turn in the same guest; and the footprint against the budget.

Never bare times: under TCG and on shared machines they say nothing, ratios of one run do."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from initramfs.builder import Builder
from tests.bench import guard, memmap, s390x, ways
from tests.bench.footprint import footprint
from tests.vm.harness import Device, Guest, MiB, missing, prefetch

ROUNDS = 9
PLUG_SCRIPT = Path(__file__).with_name("plug.py")
KERNELS, OURS = "/proc/vmcore", "/run/oldmem"


RUN = "oldmem run -q -- "
TIMED = b"""#!/bin/sh
echo 3 > /proc/sys/vm/drop_caches
read a _ < /proc/uptime
sh -c "$1" >/dev/null 2>&1
status=$?
read b _ < /proc/uptime
echo $a $b
exit $status
"""


def seconds(g: Guest, command: str, under: str = "") -> float:
    """The guest's own clock around *command*, with its page cache dropped first. *under* which other command all of
    that runs; what that one needs before and afterwards does not count."""
    start, end = map(float, g.sh(f"{under}/tmp/timed '{command}'", timeout=300).split())
    return end - start


class Ratios:
    """Time of *ours* over time of *peer*, in turn. One unmeasured round first warms the host's memory.

    Noise only ever adds time, so the best of each over the best of the other is the steadier figure on a shared
    machine; the median of the pairs and how far they spread stand beside it."""

    def __init__(self, g: Guest, ours: str, peer: str, under: str = "") -> None:
        seconds(g, ours, under), seconds(g, peer)
        pairs = [(seconds(g, ours, under), seconds(g, peer)) for _ in range(ROUNDS)]
        self.pairs = [a / b for a, b in pairs]
        self.best = min(a for a, _ in pairs) / min(b for _, b in pairs)

    def __str__(self) -> str:
        return f"{self.best:.2f}; pairs {spread(self.pairs)}"

    def speed(self) -> str:
        """The same as ratios of speed."""
        return f"{1 / self.best:.2f}; pairs {spread([1 / r for r in self.pairs])}"


def row(what: str, value: str, budget: str) -> None:
    print(f"{what:<72} {value:<34} {budget}", flush=True)


def spread(values: list[float]) -> str:
    """Median, and from which to which."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def crashed(crashkernel: str) -> Guest:
    """A guest that dies with 480 of 1024 MiB plugged."""
    devices = (Device("vm0", 1024 * MiB, 480 * MiB),)
    below = 768 * MiB if crashkernel == "320M" else 1024 * MiB
    return Guest("6.12", memory=1280 * MiB, below_4g=below, crashkernel=crashkernel, devices=devices, testing=True)


def serving() -> None:
    # makedumpfile reads 250 MB through the page cache: in 320M its pages push out each other, and the ratio tells
    for crashkernel in ("512M", "320M"):
        with crashed(crashkernel) as g:
            g.load("s")
            g.crash()
            g.put({"/tmp/timed": TIMED})
            # the kernel's own file stays reachable beside ours
            g.sh("oldmem init -q && umount /proc/vmcore")
            if crashkernel == "512M":
                copy = "dd if={} of=/dev/null bs=1M"
                ratios = Ratios(g, copy.format(f"{OURS}/vmcore.direct"), copy.format(KERNELS))
                row("dd bs=1M: speed of vmcore.direct / of the kernel's /proc/vmcore", ratios.speed(), ">= 1.6")
                for copy in ("dd-dynamic if={} of=/dev/null bs=1M", "cp-dynamic {} /dev/null"):
                    ratios = Ratios(g, copy.format(KERNELS), copy.format(KERNELS), RUN)
                    what = f"{copy.split('-')[0]}: speed under oldmem run / of the same over the kernel's"
                    row(what, ratios.speed(), ">= 1")
            dump = "makedumpfile-testing -F -l -d 31 {} >/dev/null"
            ratios = Ratios(g, dump.format(f"{OURS}/vmcore"), dump.format(KERNELS))
            what = f"makedumpfile -d 31: time over vmcore / over the kernel's, {crashkernel}"
            row(what, str(ratios), "<= 2.2")
            ratios = Ratios(g, dump.format(KERNELS), dump.format(KERNELS), RUN)
            what = f"makedumpfile -d 31: time under oldmem run / over the kernel's, {crashkernel}"
            row(what, str(ratios), "<= 1.1")
            peaks = g.sh("for p in $(pidof oldmem); do grep VmHWM /proc/$p/status; done").split()
        most = max(int(word) for word in peaks if word.isdigit())
        row(f"oldmem init: peak memory of its server, {crashkernel}", f"{most / 1024:.1f} MB", "<= 16 MB")


def plug_queries() -> None:
    devices = (Device("vm0", 1024 * MiB, 1024 * MiB),)
    with Guest("6.12", memory=512 * MiB, below_4g=512 * MiB, devices=devices, online="kernel") as g:
        g.load("s")
        g.fragment("vm0", 16 * MiB, keep=5000)
        g.crash()
        g.put({"/tmp/plug.py": PLUG_SCRIPT})
        interpreter = g.sh("ls /usr/bin/python3.*").split()[0]
        numbers = [line.split() for line in g.sh(f"{interpreter} -IS /tmp/plug.py", timeout=200).splitlines()]
    blocks, runs = numbers[0][4:6]
    what = f"plug bitmap of {blocks} blocks in {runs} runs:"
    row(f"{what} requests, one by one / ours", spread([int(n[1]) / int(n[0]) for n in numbers]), ">= 4")
    row(f"{what} time, one by one / ours", spread([float(n[3]) / float(n[2]) for n in numbers]), ">= 5")


def sizes() -> None:
    cost = footprint("import guard")
    row(
        "import guard, over the bare interpreter",
        f"{cost.cpu_ms:.0f} ms, {cost.rss_kib / 1024:.1f} MB",
        "<= 25 ms, 3 MB",
    )
    builder = Builder()
    builder.add_python()
    python = next(part for part in builder.sizes("zstd") if part.part == "python")
    row(
        "Python in the initramfs",
        f"{python.unpacked / 1e6:.1f} MB, {python.packed / 1e6:.2f} MB zstd",
        "<= 12 MB, 4.2 MB zstd",
    )


def large_header() -> None:
    cost = s390x.cost(4096, 512)
    what = "s390x header, 32 TiB in 4096 ranges, 512 CPUs"
    row(what, f"{cost.build:.0f} ms; as a command {cost.command:.0f} ms", "<= 500 ms")
    row(f"{what}: over half of it all", f"{cost.growth:.2f}", "about 2")


def guard_from_c() -> None:
    guard.report(row)


def struct_pages() -> None:
    memmap.report(row)


def whole_ways() -> None:
    ways.report(row)


def main() -> int:
    steps: list[Callable[[], None]] = [sizes, guard_from_c, struct_pages, large_header]
    if reason := missing():
        print(f"bench: no guests: {reason}", file=sys.stderr)
    else:
        prefetch()
        steps += [plug_queries, serving, whole_ways]
    row("what", "measured", "budget")
    for step in steps:
        step()
    return 0


if __name__ == "__main__":
    sys.exit(main())
