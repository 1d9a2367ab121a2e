# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make bench``: ratios against a peer, both measured in turn in the same guest; and the footprint against the budget.

Never bare times: under TCG and on shared machines they say nothing, ratios of one run do."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from initramfs.builder import Builder
from tests.bench.footprint import footprint
from tests.vm.harness import Device, Guest, MiB, missing, prefetch

ROUNDS = 5
PLUG_SCRIPT = Path(__file__).with_name("plug.py")
KERNELS, OURS = "/proc/vmcore", "/run/oldmem"


def seconds(g: Guest, command: str) -> float:
    """The guest's own clock around *command*, with its page cache dropped first."""
    script = f"echo 3 > /proc/sys/vm/drop_caches; a=$(cut -d' ' -f1 /proc/uptime); {command} >/dev/null 2>&1; s=$?; "
    script += "b=$(cut -d' ' -f1 /proc/uptime); echo $a $b; exit $s"
    start, end = map(float, g.sh(script, timeout=300).split())
    return end - start


def ratio(g: Guest, ours: str, peer: str) -> list[float]:
    """Time of *ours* over time of *peer*, in turn. One unmeasured round first warms the host's memory."""
    seconds(g, ours), seconds(g, peer)
    return [seconds(g, ours) / seconds(g, peer) for _ in range(ROUNDS)]


def row(what: str, value: str, budget: str) -> None:
    print(f"{what:<68} {value:<24} {budget}", flush=True)


def spread(values: list[float]) -> str:
    """Median, and from which to which."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def serving() -> None:
    devices = (Device("vm0", 1024 * MiB, 480 * MiB),)
    # room for the page cache: in crashkernel=192M, with two sets of tools unpacked, makedumpfile's pages push out
    # each other, and the ratio tells of that
    guest = Guest("6.12", memory=1024 * MiB, below_4g=768 * MiB, crashkernel="320M", devices=devices, testing=True)
    with guest as g:
        g.load("s")
        g.crash()
        # the kernel's own file stays reachable beside ours
        g.sh("oldmem init -q && umount /proc/vmcore")
        copy = "dd if={} of=/dev/null bs=1M"
        times = ratio(g, copy.format(f"{OURS}/vmcore.direct"), copy.format(KERNELS))
        speeds = [1 / t for t in times]
        row("dd bs=1M: speed of vmcore.direct / of the kernel's /proc/vmcore", spread(speeds), ">= 1.6")
        dump = "makedumpfile-testing -F -l -d 31 {} >/dev/null"
        times = ratio(g, dump.format(f"{OURS}/vmcore"), dump.format(KERNELS))
        row("makedumpfile -d 31: time over vmcore / over the kernel's", spread(times), "<= 2.2")
        peaks = g.sh("for p in $(pidof oldmem); do grep VmHWM /proc/$p/status; done").split()
        most = max(int(word) for word in peaks if word.isdigit())
        row("oldmem init: peak memory of its server", f"{most / 1024:.1f} MB", "<= 16 MB")


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


def main() -> int:
    steps: list[Callable[[], None]] = [sizes]
    if reason := missing():
        print(f"bench: no guests: {reason}", file=sys.stderr)
    else:
        prefetch()
        steps += [plug_queries, serving]
    row("what", "measured", "budget")
    for step in steps:
        step()
    return 0


if __name__ == "__main__":
    sys.exit(main())
