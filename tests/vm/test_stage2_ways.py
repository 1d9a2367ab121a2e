# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ways of oldmem init in a real capture kernel, and every failure of stage 2: each leaves a vmcore."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from guard.ranges import Range, RangeSet
from initramfs.builder import Builder
from tests.image.machines import data_extents
from tests.vm.conftest import MakeCrashedGuest
from tests.vm.harness import Device, Guest, MiB, debian
from tests.vm.test_stage2 import ROOM, head

DEVICES = (Device("vm0", 1024 * MiB, 256 * MiB),)
LARGER: dict[str, Any] = {"memory": 1280 * MiB, "below_4g": 1024 * MiB, "crashkernel": "448M"}

# What a script in the guest begins with; it ends by running the command
SCRIPT = """import sys
from capture import cli, header_place, kexec, stage2
from guard.ranges import RangeSet
{}
sys.exit(cli.run(["stage2", *sys.argv[1:]]))
"""


def script(g: Guest, text: str) -> str:
    """The command that runs oldmem stage2 in the guest after the Python code *text*."""
    g.put({"/tmp/script.py": SCRIPT.format(text).encode()})
    return f"{g.sh('ls /usr/bin/python3.*').split()[0]} -IS /tmp/script.py"


# Writes zeros over the header that has just been placed, and goes on as if nothing had happened
SPOIL = """
def spoilt(place):
    window = place._map if place.is_own_ram else place._window.map
    start = place._first << 12 if place.is_own_ram else 0
    window[start:start + 64] = bytes(64)
header_place.InPlace.check = header_place.Pinned.check = spoilt
"""


@pytest.mark.parametrize("place", ["--in-place", "--pinned"])
def test_a_header_that_the_kernel_does_not_take_sends_back_once_to_the_vmcore_as_it_was(
    crashed_guest: MakeCrashedGuest, place: str
) -> None:
    g = crashed_guest(devices=DEVICES, **ROOM)
    before = head(g).read_bytes()
    command = script(g, SPOIL)
    g.put_boot_files()
    g.next_stage(f"{command} {place}")
    assert not g.ready.vmcore
    # no way back: served here
    status, said = g.run("oldmem init")
    assert status in (0, 4), said  # what /proc/vmcore alone shows ("RAM buffer") may be lost
    assert f"warning: no image of this kernel ({g.kernel.release}): none of " in said
    assert "; the vmcore is put in place here" in said
    g.sh("head -c 4 /run/oldmem/vmcore | grep -q ELF && umount /run/oldmem")
    g.put_boot_files()
    g.next_stage("oldmem init")
    assert g.ready.vmcore
    assert head(g).read_bytes() == before
    g.put_boot_files()
    assert g.run("oldmem stage2 -q") == (1, "oldmem: this kernel was come back to from stage 2: that is tried once\n")
    said = g.sh("oldmem init --via auto")
    assert "came back from stage 2: /proc/vmcore: the kernel made none" in said
    assert "fuse: no command that could take a library; no stage 2: this kernel was come back to" in said
    assert "guarded vmcore at /proc/vmcore" in said
    g.sh("makedumpfile --dump-dmesg /proc/vmcore /tmp/dmesg && grep -q 'Trigger a crash' /tmp/dmesg")


def served_as_before(g: Guest, before: bytes) -> bool:
    """Nothing is loaded, and the kernel's own vmcore is there."""
    return g.sh("cat /sys/kernel/kexec_loaded") == "0\n" and head(g).read_bytes() == before


def test_too_little_memory_costs_the_loading_process_and_nothing_else(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, crashkernel="256M", memory=1024 * MiB, below_4g=768 * MiB)
    before = head(g).read_bytes()
    command = script(g, "stage2.check_memory = lambda *_: None")
    g.put_boot_files()
    status, said = g.run("oldmem stage2")
    assert status == 1
    assert "of memory needed to load stage 2" in said
    status, said = g.run(command, timeout=200)
    assert status == 1
    assert "kexec_file_load(2): its process was ended by signal 9 (Killed); kexec -c: was ended by signal 9" in said
    assert served_as_before(g, before)
    said = g.sh("oldmem init --via auto")
    assert "fuse: no command that could take a library; no stage 2: " in said
    assert "of memory needed" in said
    assert g.sh("head -c 4 /proc/vmcore | od -An -tx1").split() == ["7f", "45", "4c", "46"]


def test_without_image_or_signature_or_a_tool_the_vmcore_is_served_over_fuse(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load_append="lockdown=integrity", **ROOM)
    before = head(g).read_bytes()
    status, said = g.run("oldmem stage2 -q")
    assert status == 1
    assert f"oldmem: no image of this kernel ({g.kernel.release}): none of /boot/vmlinuz-" in said
    g.put_boot_files()
    status, said = g.run("oldmem stage2 -q --in-place")
    assert (status, said) == (1, "oldmem: /dev/mem: Operation not permitted\n")
    status, said = g.run("oldmem stage2 -q")
    assert status == 1
    assert "kexec_file_load(2): Operation not permitted (lockdown" in said
    assert "kexec -c: kexec_load failed: Operation not permitted" in said
    status, said = g.run("mv /usr/bin/kexec /usr/bin/kexec.away; oldmem stage2 -q")
    assert "; no kexec-tools" in said
    assert served_as_before(g, before)
    status, said = g.run("oldmem init --via auto -q; s=$?; umount /proc/vmcore /run/oldmem; exit $s")
    assert status == 4, "the device could not be asked under lockdown"
    assert "stage2: no command that could take a library; the kernel itself can serve" in said
    assert "warning: no stage 2: kexec_file_load(2): Operation not permitted" in said
    assert "over FUSE instead" in said
    g.bind_in_kdump_mode()
    status, said = g.run("oldmem stage2 -n -q")
    assert status == 4
    start = g.plug_truth()["vm0"].memaddr
    assert f"left out: {Range(start, start + 256 * MiB)}, whose state nothing tells" in said
    said = g.sh("oldmem init --via auto -q")
    assert "fuse: no command that could take a library; stage 2 would leave out 256M that the kernel's own" in said
    assert g.sh("head -c 4 /proc/vmcore | od -An -tx1").split() == ["7f", "45", "4c", "46"]


# Where segments lie is chance, so the first load is said to lie over the header too; all else is real
IN_THE_WAY = """
load, told = kexec.load, []
def in_the_way(image, want_segments):
    found = load(image, want_segments)
    if not told:
        told.append(int(image.cmdline.split("elfcorehdr=")[1].split()[0], 16))
        cli.say("not there: %#x" % told[0])
        return found._replace(segments=found.segments | RangeSet([(told[0], told[0] + 4096)]))
    return found
kexec.load = in_the_way
"""


def test_a_header_in_the_way_of_a_segment_goes_elsewhere(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest("6.1", devices=DEVICES, load="c", **{**LARGER, "crashkernel": "512M"})
    command = script(g, IN_THE_WAY)
    g.put_boot_files()
    g.serial.send(f"{command} --pinned > /dev/ttyS0 2>&1")
    seen = g.serial.wait_said("oldmem: not there: 0x([0-9a-f]+)", 100)
    g.ready = g.serial.wait_ready(60)
    assert g.ready.vmcore
    assert f"elfcorehdr=0x{seen}" not in g.sh("cat /proc/cmdline")
    assert "the kernel serves the guarded vmcore" in g.sh("oldmem init")


def test_power_cut_between_load_and_jump_leaves_no_trace_on_the_disk(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, **ROOM)
    command = script(g, "import time\nkexec.jump = lambda: (open('/tmp/jumping', 'w').close(), time.sleep(1 << 30))")
    g.put_boot_files()
    g.sh(f"{command} > /tmp/said 2>&1 & until [ -e /tmp/jumping ]; do sleep 0.1; done")
    g.sh("grep -q 1 /sys/kernel/kexec_loaded")
    os.kill(g.pid, signal.SIGKILL)
    assert list(data_extents(g.scratch, g.scratch.stat().st_size)) == []


def test_init_takes_the_way_that_command_and_machine_allow_and_runs_the_command_there(
    crashed_guest: MakeCrashedGuest,
) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=lambda g: g.resize("vm0", 64 * MiB), **LARGER)
    said = g.sh("oldmem init --via auto -- dd-dynamic if=/proc/vmcore bs=1M of=/dev/null")
    assert "oldmem: run: dd-dynamic takes a library" in said
    assert g.run("oldmem init --via run") == (1, "oldmem: --via run needs a COMMAND to be inside of\n")
    # no initramfs anywhere: the running one is packed
    g.put({f"/boot/vmlinuz-{g.kernel.release}": g.kernel.vmlinuz})
    said = g.sh("oldmem stage2 -n")
    assert "initramfs: the running one, packed again" in said
    g.next_stage("oldmem init --via auto -- busybox cp /proc/vmcore /dev/null")
    assert "oldmem.stage=2" in g.sh("cat /proc/cmdline")
    said = g.sh("oldmem init --via auto -- sh -c 'head -c 4 /proc/vmcore | od -An -tx1'")
    assert "the kernel serves the guarded vmcore" in said
    assert said.split()[-4:] == ["7f", "45", "4c", "46"]
    assert g.run("oldmem init -- sh -c 'exit 7'").status == 7
    assert g.sh("oldmem map -q --compare") == "the preloaded header and the memory map agree\n"
    assert g.allocated("vm0") == 64 * MiB


def test_an_initramfs_of_the_builder_goes_to_stage_2_and_dumps_there(crashed_guest: MakeCrashedGuest) -> None:
    kernel, sysroot = debian.kernel("6.12"), debian.sysroot()
    builder = Builder(str(debian.cache() / "build"))
    builder.add_busybox(str(sysroot / "usr/bin/busybox"))
    builder.add_python()
    builder.add_binary("/usr/bin/makedumpfile", sysroot=str(sysroot))
    builder.add_modules(str(kernel.modules), ["virtio_blk", "fuse", "qemu_fw_cfg"])
    builder.add_stage2(str(kernel.vmlinuz))
    marker = 'echo "HARNESS-READY vmcore=yes release=$(uname -r) uptime=0"'
    shell = "stty -F /dev/ttyS0 raw -echo; while :; do sh < /dev/ttyS0 2>&1 | cat > /dev/ttyS0; done"
    builder.add_init(run=f"makedumpfile -l -d 31 /proc/vmcore /tmp/dump; status=$?\n{marker}; {shell}")
    folder = debian.cache() / "build" / "stage2.img"
    builder.write(str(folder), level=3)
    g = crashed_guest(devices=DEVICES, capture=folder.read_bytes(), **LARGER)
    assert "oldmem.stage=2" in g.sh("cat /proc/cmdline")
    report = json.loads(g.sh("cat /run/oldmem/guard.json"))
    unplugged = next(rule for rule in report["rules"] if rule["name"].startswith("virtio-mem"))
    assert RangeSet(Range(*r) for r in unplugged["refused"]).size == 768 * MiB
    assert int(g.sh("stat -c %s /tmp/dump")) > 10 * MiB
    assert g.allocated("vm0") == 256 * MiB
