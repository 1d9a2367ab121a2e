# SPDX-License-Identifier: LGPL-2.1-or-later
"""The harness itself: guests boot, plug, crash and are captured, and what the host sees of their memory is true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from tests.pace import wait_until
from tests.vm.conftest import MakeCrashedGuest, MakeGuest
from tests.vm.harness import GENERATIONS, ConsoleError, Device, GuestError, MiB, Ready

DEVICES = (Device("vm0", 1024 * MiB, 256 * MiB), Device("vm1", 512 * MiB, 128 * MiB, block_size=4 * MiB))
SENTINEL = b"oldmem harness sentinel".ljust(32, b".")  # a divisor of the page size


@pytest.mark.parametrize("load", ["s", "c"])
@pytest.mark.parametrize("kernel", GENERATIONS)
def test_guest_crashes_into_its_capture_kernel(
    crashed_guest: MakeCrashedGuest, kernel: str, load: Literal["s", "c"]
) -> None:
    g = crashed_guest(kernel, devices=DEVICES, load=load, oldmem=False)
    assert g.ready == Ready(True, g.kernel.release, g.ready.uptime)
    assert g.run("grep -q virtio_mem /proc/modules").status == 1
    assert "elfcorehdr=" in g.sh("cat /proc/cmdline")
    g.sh("makedumpfile --dump-dmesg /proc/vmcore /tmp/dmesg")
    log = (g.get("/tmp/dmesg") / "tmp/dmesg").read_text()
    assert f"Linux version {g.kernel.release}" in log
    assert "sysrq: Trigger a crash" in log


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_extents_of_a_device_are_what_qemu_says_is_plugged(guest: MakeGuest, kernel: str) -> None:
    g = guest(kernel, devices=DEVICES, oldmem=False)
    assert {name: plugged.size for name, plugged in g.plug_truth().items()} == {"vm0": 256 * MiB, "vm1": 128 * MiB}
    for name, size in (("vm0", 480 * MiB), ("vm1", 0), ("vm0", 62 * MiB), ("vm1", 512 * MiB)):
        assert g.resize(name, size) == size
        assert g.extents(name).size == g.allocated(name) == g.plug_truth()[name].size == size


def test_host_sees_the_bytes_of_a_crashed_guest(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(before_load=lambda g: g.put({"/sentinel": SENTINEL * 1000}), oldmem=False)
    with g.paused():
        ram = g.ram_files[0].path.read_bytes()
    assert ram.count(SENTINEL) >= 1000


def test_reading_unplugged_memory_shows_as_extents(crashed_guest: MakeCrashedGuest) -> None:
    device = Device("vm0", 512 * MiB, 256 * MiB)
    g = crashed_guest(devices=[device], load="c", after_load=lambda g: g.resize("vm0", 64 * MiB), oldmem=False)
    assert g.allocated("vm0") == 64 * MiB
    g.sh("dd if=/proc/vmcore of=/dev/null bs=1M")
    assert g.allocated("vm0") > 64 * MiB


def test_fragmented_device_has_holes(guest: MakeGuest) -> None:
    device = Device("vm0", 512 * MiB, 512 * MiB)
    g = guest(memory=512 * MiB, below_4g=384 * MiB, crashkernel="128M", devices=[device], online="kernel")
    left = g.fragment("vm0", 32 * MiB)
    assert g.extents("vm0").size == left == g.plug_truth()["vm0"].size
    assert len(g.extents("vm0")) >= 8


def test_failing_command_and_silent_guest_are_reported_with_what_was_said(guest: MakeGuest) -> None:
    g = guest(oldmem=False)
    with pytest.raises(GuestError, match=r"status 3\nsaid this"):
        g.sh("echo said this; exit 3")
    with pytest.raises(ConsoleError, match=r"no end of `sleep 100000` in \d+ s"):
        g.sh("sleep 100000", timeout=1)


def test_guest_leaves_neither_process_nor_files(guest: MakeGuest) -> None:
    g = guest(devices=DEVICES, oldmem=False)
    folder = g.ram_files[0].path.parent
    assert folder.is_dir()
    g.close()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(g.pid, 0)


CHILD = """
import time
from tests.vm.harness import Guest
with Guest(oldmem=False) as g:
    print(g.pid, g.scratch.parent, flush=True)
    time.sleep(1 << 30)
"""


def test_guest_of_a_killed_test_run_leaves_neither_process_nor_files(vm_machine: None) -> None:
    root = Path(__file__).resolve().parents[2]
    child = subprocess.Popen([sys.executable, "-c", CHILD], cwd=root, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        pid, folder = child.stdout.readline().split()
        assert Path(folder).is_dir()
        child.kill()
    wait_until("files gone", lambda: not Path(folder).exists())
    wait_until("process gone", lambda: not Path(f"/proc/{pid}").exists())
