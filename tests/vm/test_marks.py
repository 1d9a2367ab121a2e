# SPDX-License-Identifier: LGPL-2.1-or-later
"""Broken, ballooned and offline pages of a real guest, on three kernels: the guard refuses those that the live kernel
itself had told of, and no others; reading the vmcore gives no ballooned memory back to the guest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard.ranges import RangeSet
from tests.vm import truth
from tests.vm.conftest import MakeGuest
from tests.vm.harness import Device, Guest, MiB

PAGE = 4096
FLAGS = Path(__file__).with_name("flags.py")
BALLOON = 96 * MiB


def python(g: Guest, *arguments: str) -> str:
    interpreter = g.sh("ls /usr/bin/python3.*").split()[0]
    return g.sh(f"{interpreter} -IS /tmp/flags.py {' '.join(arguments)}", timeout=200)


def poison(g: Guest, count: int) -> set[int]:
    """Has the kernel take *count* free pages for broken, if it knows how to; returns their pfns."""
    if g.sh("[ -e /sys/devices/system/memory/hard_offline_page ] && echo yes || true").strip() != "yes":
        return set()
    pfns = {int(word) for word in python(g, "free", str(count)).split()}
    for pfn in pfns:
        g.sh(f"echo {pfn * PAGE:#x} > /sys/devices/system/memory/hard_offline_page")
    return pfns


def take_offline(g: Guest) -> RangeSet:
    """Takes one memory block offline, the highest that the kernel lets go; returns where it was."""
    script = (
        "cd /sys/devices/system/memory; for b in $(ls -d memory[0-9]* | sed s/memory// | sort -rn); do"
        " if echo offline > memory$b/state; then echo $b $(cat block_size_bytes); break; fi; done 2>/dev/null"
    )
    number, size = g.sh(script, timeout=120).split()
    start = int(number) * int(size, 16)
    return RangeSet([(start, start + int(size, 16))])


def told_before(g: Guest) -> dict[str, RangeSet]:
    runs: dict[str, list[tuple[int, int]]] = {"hwpoison": [], "nopage": [], "offline": []}
    for line in python(g).splitlines():
        name, first, end = line.split()
        runs[name].append((int(first) * PAGE, int(end) * PAGE))
    return {name: RangeSet(found) for name, found in runs.items()}


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7"])
def test_refused_is_what_the_live_kernel_had_marked_and_nothing_else(guest: MakeGuest, kernel: str) -> None:
    device = Device("vm0", 1024 * MiB, 384 * MiB)
    g = guest(kernel, devices=(device,), balloon=True)
    g.put({"/tmp/flags.py": FLAGS})
    g.load("s")
    g.sh("modprobe virtio_balloon")
    g.inflate(BALLOON)
    gone = take_offline(g)
    broken = poison(g, 2)
    before = told_before(g)
    assert before["hwpoison"] == RangeSet((pfn * PAGE, (pfn + 1) * PAGE) for pfn in broken)
    assert before["offline"].size >= BALLOON
    given_back = before["offline"] - truth.on_host(g)
    g.crash()

    told = json.loads(g.sh("oldmem map --json 2>/dev/null"))
    refused: dict[str, RangeSet] = {}
    for e in told["entries"]:
        name = (e["refused_by"] or "").split()[0] if e["refused_by"] else ""
        refused[name] = refused.get(name, RangeSet()) | RangeSet([(e["start"], e["end"])])
    by_others = RangeSet(r for name, ranges in refused.items() if name not in ("", "PageOffline") for r in ranges)
    assert refused.get("hwpoison", RangeSet()) == before["hwpoison"]
    assert refused.get("offline", RangeSet()) == gone
    assert refused["PageOffline"] == before["offline"] - by_others
    assert not before["offline"] & refused[""]
    assert [line for line in told["problems"] if "makedumpfile" not in line] == []

    g.sh("oldmem init -q && cp /proc/vmcore /dev/null", timeout=300)
    assert given_back.size >= BALLOON // 2
    assert not truth.on_host(g) & given_back
