# SPDX-License-Identifier: LGPL-2.1-or-later
"""The header, against the kernel's own and against the host's truth, on three kernel generations."""

from __future__ import annotations

import pytest

from guard.ranges import RangeSet
from tests.vm import truth
from tests.vm.conftest import MakeCrashedGuest
from tests.vm.harness import GENERATIONS, Device, Guest, MiB

DEVICES = (Device("vm0", 1024 * MiB, 256 * MiB), Device("vm1", 512 * MiB, 256 * MiB, block_size=4 * MiB))


def resize(g: Guest) -> None:
    assert g.resize("vm0", 480 * MiB) == 480 * MiB
    assert g.resize("vm1", 64 * MiB) == 64 * MiB


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_kernel_layout_is_byte_identical_with_what_the_kernel_serves(
    crashed_guest: MakeCrashedGuest, kernel: str
) -> None:
    g = crashed_guest(kernel, devices=DEVICES, load="s")
    g.sh("oldmem header --layout kernel -o /tmp/ours")
    g.sh("head -c $(wc -c < /tmp/ours) /proc/vmcore > /tmp/kernels")
    files = g.get("/tmp/ours", "/tmp/kernels")
    ours, kernels = (files / f"tmp/{name}" for name in ("ours", "kernels"))
    assert len(ours.read_bytes()) >= 8192
    assert ours.read_bytes() == kernels.read_bytes()
    assert g.sh("oldmem map -q --compare") == "the preloaded header and the memory map agree\n"


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_cut_layout_is_boot_ram_and_plugged_blocks_byte_for_byte(crashed_guest: MakeCrashedGuest, kernel: str) -> None:
    boot: list[RangeSet] = []

    def before_crash(g: Guest) -> None:
        resize(g)
        boot.append(truth.boot_ram(g))

    g = crashed_guest(kernel, devices=DEVICES, load="c", after_load=before_crash)
    expected = boot[0] | truth.plugged(g)
    g.sh("oldmem save -q -o /dev/scratch && sync")
    header = g.scratch
    listed = RangeSet(span for _, span in truth.pt_loads(header))
    assert listed - expected == RangeSet(), "too much"
    assert expected - listed == RangeSet(), "missing"
    with g.paused():
        assert list(truth.differing(g, header)) == []
    compared = g.sh("oldmem map -q --compare")
    assert "missing           0x150000000-0x15dffffff  224M" in compared
    assert "too much          0x184000000-0x18fffffff  192M" in compared
    assert truth.plugged(g) == expected - boot[0], "reading changed what is populated"
