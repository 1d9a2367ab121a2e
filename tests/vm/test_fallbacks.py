# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the usual way is closed: lockdown, the in-kernel driver, no preloaded header, and what must not be started."""

from __future__ import annotations

import json

from tests.vm import truth
from tests.vm.conftest import MakeCrashedGuest
from tests.vm.harness import Device, Guest, MiB

DEVICES = (Device("vm0", 512 * MiB, 384 * MiB),)


def shrink(g: Guest) -> None:
    assert g.resize("vm0", 64 * MiB) == 64 * MiB


def extra(g: Guest) -> int:
    return g.allocated("vm0") - g.plug_truth()["vm0"].size


def test_under_lockdown_nothing_of_an_unqueried_device_is_read(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load="c", load_append="lockdown=integrity", after_load=shrink)
    status, output = g.run("oldmem init")
    assert "lockdown" in output
    assert status == 4, "memory was lost that was readable RAM, for its plug state is unknown\n" + output
    g.sh("dd if=/proc/vmcore of=/dev/null bs=1M", timeout=200)
    assert extra(g) == 0
    g.sh("makedumpfile --dump-dmesg /proc/vmcore /tmp/dmesg && grep -q 'Trigger a crash' /tmp/dmesg")


def test_under_lockdown_the_in_kernel_driver_gates(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load="c", load_append="lockdown=integrity", after_load=shrink)
    g.bind_in_kdump_mode()
    part = "dd-dynamic if=/proc/vmcore bs=1M skip=100 2>/dev/null | sha256sum"
    inside = g.sh(f"oldmem run -q -- {part}", timeout=200)
    assert extra(g) == 0
    output = g.sh("oldmem init; oldmem plug --json 2>/dev/null; true")
    assert "the in-kernel driver gates it" in output
    assert g.sh(part, timeout=200) == inside
    g.sh("dd if=/proc/vmcore of=/dev/scratch bs=1M && sync", timeout=200)
    assert extra(g) == 0
    with g.paused():
        memory = {span.start for span in truth.differing(g, g.scratch)}
    assert not memory & {r.start for r in truth.plugged(g)}


def test_driver_bound_in_kdump_mode_is_asked_and_bound_again(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=shrink)
    g.bind_in_kdump_mode()
    g.sh("ls /sys/bus/virtio/drivers/virtio_mem/ | grep -q virtio")
    device = json.loads(g.sh("oldmem plug --json"))["devices"][0]
    assert sum(end - start for start, end in device["plugged"]) == 64 * MiB
    g.sh("ls /sys/bus/virtio/drivers/virtio_mem/ | grep -q virtio")
    assert extra(g) == 0
    assert g.allocated("vm0") == 64 * MiB, "nothing was unplugged by binding again"


def test_without_a_preloaded_header_the_vmcore_is_at_run_oldmem(crashed_guest: MakeCrashedGuest) -> None:
    # ELFCORE_ADDR_ERR: kdump mode, but the kernel makes no /proc/vmcore, so nothing else shows "RAM buffer" lines
    append = "elfcorehdr=0xfffffffffffffffe iomem=relaxed"
    g = crashed_guest(devices=DEVICES, load="s", load_append=append, after_load=shrink)
    g.sh("test ! -e /proc/vmcore && modprobe qemu_fw_cfg")
    inside = g.sh("oldmem run -q -- dd-dynamic if=/proc/vmcore bs=4 count=1 2>/dev/null | od -An -tx1")
    assert inside.split() == ["7f", "45", "4c", "46"]
    assert "guarded vmcore at /run/oldmem/vmcore" in g.sh("oldmem init")
    g.sh("makedumpfile --dump-dmesg /run/oldmem/vmcore /tmp/dmesg && grep -q 'Trigger a crash' /tmp/dmesg")
    assert extra(g) == 0


def test_init_refuses_where_virtio_mem_would_unplug_everything(crashed_guest: MakeCrashedGuest) -> None:
    append = "elfcorehdr=0xffffffffffffffff"  # ELFCORE_ADDR_MAX: is_kdump_kernel() is false
    g = crashed_guest(devices=DEVICES, load="s", load_append=append)
    status, output = g.run("oldmem init")
    assert status == 3, output
    assert "no capture environment" in output
    g.sh("modprobe virtio_mem; true")
    status, output = g.run("oldmem init --force")
    assert status == 1, output
    assert "virtio_mem" in output
    assert len(output.splitlines()) == 1
    g.sh("test ! -d /run/oldmem")


def test_nothing_is_searched_where_the_kernels_own_header_has_the_note(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load="s")
    g.sh("oldmem header -q --layout kernel -o /tmp/told; rmmod qemu_fw_cfg")
    output = g.sh("oldmem header -v --layout kernel -o /tmp/ours 2>&1")
    assert "searching" not in output
    # Debian's 1.7.6 on its own 6.12
    assert "makedumpfile is too old for this kernel: it takes free and offline pages for slab" in output
    g.sh("cmp /tmp/told /tmp/ours")


def test_vmcoreinfo_is_found_by_searching_where_nothing_tells(crashed_guest: MakeCrashedGuest) -> None:
    append = "elfcorehdr=0xfffffffffffffffe iomem=relaxed"  # as above: there is no header of the kernel's
    g = crashed_guest(devices=DEVICES, load="s", load_append=append)
    g.sh("modprobe qemu_fw_cfg; oldmem header -q --layout kernel -o /tmp/told; rmmod qemu_fw_cfg")
    output = g.sh("oldmem header --layout kernel -o /tmp/searched 2>&1", timeout=200)
    assert "(it proves itself)" in output
    g.sh("cmp /tmp/told /tmp/searched")
