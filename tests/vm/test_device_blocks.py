# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block by block against the in-kernel driver: what virtio_mem in kdump mode lets through /proc/vmcore, and what the
guard does. The host fills every page of every device first, plugged or not, so that zeros can only be a refusal."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from guard.ranges import Range, RangeSet
from tests.vm import truth
from tests.vm.conftest import MakeGuest
from tests.vm.harness import Device, Guest, MiB

PAGE = 4096
CHUNK = 2 * MiB
DEVICES = (
    Device("fragmented", 512 * MiB, 512 * MiB),
    Device("coarse", 256 * MiB, 256 * MiB, block_size=4 * MiB),
    Device("emptied", 128 * MiB, 128 * MiB),
)


def pattern(start: int, end: int) -> bytes:
    """What the host writes to [start, end): in no page a zero word, and no page like another."""
    return b"".join(struct.pack("<Q", paddr | 1) * (PAGE // 8) for paddr in range(start, end, PAGE))


def fill(g: Guest) -> None:
    """Writes the pattern over all devices, plugged or not: whatever the dead kernel had there is gone."""
    for file in g.ram_files:
        if file.name in g.devices:
            with open(file.path, "r+b") as stream:
                for at in range(0, file.size, CHUNK):
                    stream.seek(file.offset + at)
                    stream.write(pattern(file.paddr + at, file.paddr + at + CHUNK))


def shown(vmcore: Path, span: Range) -> RangeSet:
    """The pages of *span* that *vmcore* shows as the host wrote them; every other one is all zeros."""
    found = []
    with open(vmcore, "rb") as stream:
        for offset, load in truth.pt_loads(vmcore):
            for at in range(max(load.start, span.start), min(load.end, span.end), PAGE):
                page = os.pread(stream.fileno(), PAGE, offset + at - load.start)
                if page == pattern(at, at + PAGE):
                    found.append((at, at + PAGE))
                else:
                    assert page == bytes(PAGE), f"{vmcore} at {at:#x}: neither what is there nor zeros"
    return RangeSet(found)


def let_through(g: Guest, source: str, regions: RangeSet) -> RangeSet:
    g.sh(f"dd if={source} of=/dev/scratch bs=1M && sync", timeout=300)
    return RangeSet(page for region in regions for page in shown(g.scratch, region))


@pytest.mark.parametrize("kernel", ["6.12", "7"])
def test_every_block_is_let_through_by_us_exactly_if_the_kernels_driver_does(guest: MakeGuest, kernel: str) -> None:
    g = guest(kernel, devices=DEVICES, online="kernel")
    # kexec_load(2): its header goes on listing all that is plugged now, so that every block can be asked for later
    g.load("c")
    assert g.resize("emptied", 0) == 0
    g.fragment("fragmented", 64 * MiB)
    g.resize("coarse", 32 * MiB)
    g.crash()
    before = g.plug_truth()
    regions = {name: Range(device.memaddr, device.memaddr + device.max_size) for name, device in before.items()}
    all_regions = RangeSet(regions.values())
    plugged = truth.plugged(g)
    for name in ("fragmented", "coarse"):
        assert len(plugged & RangeSet([regions[name]])) >= 8, f"{name}: hardly any borders to be wrong about"

    asked = json.loads(g.sh("oldmem plug --json"))["devices"]
    entries = json.loads(g.sh("oldmem map --json 2>/dev/null"))["entries"]
    g.sh("oldmem init -q --layout kernel && umount /proc/vmcore", timeout=200)  # ours stays at /run/oldmem
    with g.paused():
        fill(g)
    ours = let_through(g, "/run/oldmem/vmcore.direct", all_regions)
    # is_kdump_kernel() is true: there is a /proc/vmcore. Elsewhere the driver would unplug everything.
    g.bind_in_kdump_mode()
    kernels = let_through(g, "/proc/vmcore", all_regions)
    listed = RangeSet(load for _, load in truth.pt_loads(g.scratch))
    assert g.plug_truth() == before

    for name, region in regions.items():
        assert listed.covers(*region), f"{name}: the kernel's header does not list all of it, so nothing was asked"
        size = before[name].block_size
        for start in range(region.start, region.end, size):
            block = RangeSet([(start, start + size)])
            assert kernels & block == plugged & block, f"{name}: block at {start:#x}"
    assert ours == kernels
    assert RangeSet((start, end) for device in asked for start, end in device["plugged"]) == kernels
    assert RangeSet((e["start"], e["end"]) for e in entries if not e["refused_by"]) & all_regions == kernels
