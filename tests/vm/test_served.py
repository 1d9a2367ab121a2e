# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unmodified collectors over the served /proc/vmcore: what they get, and what they make the host populate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import drgn
from elftools.elf.elffile import ELFFile

from tests.vm import truth
from tests.vm.conftest import MakeCrashedGuest, MakeGuest
from tests.vm.harness import Device, Guest, MiB

DEVICES = (Device("vm0", 1024 * MiB, 256 * MiB), Device("vm1", 512 * MiB, 384 * MiB, block_size=4 * MiB))
READERS = (
    "cp /proc/vmcore /dev/null",
    "dd if=/proc/vmcore of=/dev/null bs=1M",
    "dd if=/run/oldmem/vmcore.direct of=/dev/null bs=1M",
    "makedumpfile -F -d 0 /proc/vmcore > /dev/null",
    "makedumpfile -F -l -d 31 /proc/vmcore > /dev/null",
)


# the flags of each descriptor of /proc/vmcore (fdinfo, octal), whoever has it
OF_VMCORE = """for fd in /proc/[0-9]*/fd/*; do
    [ "$(readlink $fd)" != /proc/vmcore ] || sed -n 's/^flags://p' ${fd%/fd/*}/fdinfo/${fd##*/}
done"""


def resize(g: Guest) -> None:
    assert g.resize("vm0", 480 * MiB) == 480 * MiB
    assert g.resize("vm1", 64 * MiB) == 64 * MiB


def populated(g: Guest) -> int:
    """Bytes of host memory behind the devices beyond what is plugged."""
    return sum(g.allocated(name) - plugged.size for name, plugged in g.plug_truth().items())


def test_guarded_collectors_populate_nothing_and_unguarded_ones_hundreds_of_mib(
    crashed_guest: MakeCrashedGuest,
) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=resize)
    g.sh("grep -q virtio_mem /proc/modules && exit 1; oldmem init -q")
    for reader in READERS:
        g.sh(reader, timeout=200)
        assert populated(g) == 0, reader
    peaks = g.sh("for p in $(pidof oldmem); do grep VmHWM /proc/$p/status; done").split()
    assert 0 < max(int(word) for word in peaks if word.isdigit()) <= 16 * 1024
    g.sh("umount /proc/vmcore /run/oldmem")
    g.sh("dd if=/proc/vmcore of=/dev/null bs=1M", timeout=200)
    assert populated(g) >= 200 * MiB


def test_saved_vmcore_has_every_cpu_and_reads_as_the_dead_kernel(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=resize, smp=2)
    g.sh("oldmem init -q")
    g.sh("makedumpfile --dump-dmesg /proc/vmcore /tmp/dmesg && head -1 /tmp/dmesg | grep -q 'Linux version'")
    assert "sysrq: Trigger a crash" in g.sh("cat /tmp/dmesg")
    g.sh("dd if=/proc/vmcore of=/dev/scratch bs=1M && sync", timeout=200)
    size = int(g.sh("stat -c %s /proc/vmcore"))

    saved = g.ram_files[0].path.parent / "vmcore"
    shutil.copy(g.scratch, saved)
    with open(saved, "r+b") as file:
        file.truncate(size)
    notes = subprocess.run(["readelf", "-nW", saved], capture_output=True, text=True, timeout=60, check=True).stdout
    assert notes.count("NT_PRSTATUS") == 2
    assert "VMCOREINFO" in notes
    command = [sys.executable, "-m", "capture", "check", str(saved)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
    assert "2 NT_PRSTATUS" in checked.stdout

    info = truth.vmcoreinfo(saved)
    program = drgn.Program()
    program.set_core_dump(saved)
    uts = int(info["SYMBOL(init_uts_ns)"], 16) + int(info["OFFSET(uts_namespace.name)"])
    release = program.read(uts + 2 * 65, 65).split(b"\0")[0].decode()  # struct new_utsname: sysname, nodename, release
    assert release == info["OSRELEASE"] == g.kernel.release
    _, last = truth.pt_loads(saved)[-1]
    assert program.read(last.start, 4096, physical=True) == truth.host_bytes(g, last.start, 4096)


def test_makedumpfile_mem_usage_accepts_the_saved_vmcore(crashed_guest: MakeCrashedGuest, guest: MakeGuest) -> None:
    dead = crashed_guest(devices=DEVICES, load="c", after_load=resize)
    dead.sh("oldmem save -q -o /dev/scratch && sync", timeout=200)
    with guest(oldmem=False) as healthy:  # --mem-usage wants a kernel with crashkernel= reserved, as this one has
        shutil.copy(dead.scratch, healthy.scratch)
        table = healthy.sh("makedumpfile --mem-usage /dev/scratch 2>&1", timeout=200)
    words = [line.split() for line in table.splitlines()]
    rows = {w[0]: int(w[1]) for w in words if len(w) > 2 and w[1].isdigit()}
    assert rows["KERN_DATA"] > 10_000
    total = next(int(line.split(":")[1]) for line in table.splitlines() if line.startswith("Total pages"))
    with open(dead.scratch, "rb") as stream:
        loads = [s.header for s in ELFFile(stream).iter_segments("PT_LOAD")]
    assert total == sum(h["p_memsz"] // 4096 for h in loads)


def test_kernels_vmcore_is_open_only_while_it_is_read(crashed_guest: MakeCrashedGuest) -> None:
    """Else a driver could not add its device dump (fs/proc/vmcore.c:vmcore_add_device_dump(), 6.14+)."""
    g = crashed_guest("7", memory=512 * MiB)
    for source in ("auto", "vmcore"):
        g.sh(f"oldmem init -q --source {source} && dd if=/run/oldmem/vmcore.direct of=/dev/null bs=1M count=64")
        flags = [int(word, 8) for word in g.sh(OF_VMCORE).split()]
        assert flags
        assert all(f & os.O_PATH for f in flags)
        report = json.loads(g.sh("cat /run/oldmem/guard.json"))
        assert (report["unreadable"], report["late_dumps"]) == ([], [])
        g.sh("umount /proc/vmcore /run/oldmem")


# of the processes called oldmem, the one whose child is another one
SERVER = """all=$(pidof oldmem)
for p in $all; do
    q=$(sed -n 's/^PPid:.//p' /proc/$p/status)
    case " $all " in *" $q "*) echo $q ;; esac
done"""

# A reader into a pipe that is not emptied before the server has been killed: then it is in the middle of its work
UNDER_KILLS = """{ %s; echo $? >/tmp/status; } 2>/tmp/log | {
    dd bs=4k count=250 iflag=fullblock 2>/dev/null
    for n in 1 2 3; do
        for i in $(seq 600); do pid=$(sh /tmp/server); [ -z "$pid" ] || break; sleep 0.1; done
        kill -%s "$pid" || echo not killed
        dd bs=4k count=250 iflag=fullblock 2>/dev/null
    done
    cat
} | md5sum; cat /tmp/status"""

DUMPS = (
    "dd if=/proc/vmcore bs=64k",
    "dd if=/run/oldmem/vmcore.direct bs=1M",
    "makedumpfile -E -F -d 31 /proc/vmcore",
)


def test_dump_in_progress_goes_on_when_its_servers_are_killed(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(memory=512 * MiB)
    kernels = g.sh("stat -c %s /proc/vmcore")
    g.sh("oldmem init -q")
    g.put({"/tmp/server": SERVER.encode()})
    for dump in DUMPS:
        undisturbed = g.sh(f"{dump} 2>/dev/null | md5sum", timeout=400).split()[0]
        for number in ("KILL", "TERM") if dump == DUMPS[0] else ("KILL",):
            told = g.sh(UNDER_KILLS % (dump, number), timeout=600).split()
            assert told == [undisturbed, "-", "0"], (dump, number, g.sh("tail -5 /tmp/log"))
    assert json.loads(g.sh("cat /run/oldmem/guard.json"))["unreadable"] == []

    # all of them at once: an error for who reads, no zeros; and what the unit ends with gives the kernel's own back
    assert g.sh("grep -c fuse.oldmem /proc/mounts").strip() == "2"
    g.sh("pids=$(pidof oldmem); kill -STOP $pids; kill -KILL $pids; while pidof oldmem; do sleep 0.1; done", timeout=60)
    assert "not connected" in g.sh("cat /proc/vmcore 2>&1 >/dev/null; true")
    g.sh("umount -a -l -t fuse.oldmem")
    assert "oldmem" not in g.sh("cat /proc/mounts")
    assert g.sh("stat -c %s /proc/vmcore") == kernels
    assert g.sh("head -c 4 /proc/vmcore | od -An -tx1").split() == ["7f", "45", "4c", "46"]


def test_servers_that_are_ended_give_the_kernels_own_vmcore_back(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=resize)
    kernels = g.sh("stat -c %s /proc/vmcore")
    g.sh("oldmem init -q")
    assert g.sh("stat -c %s /proc/vmcore") != kernels
    # as systemd ends them, and as the OOM killer would if it could
    g.sh("kill -TERM $(pidof oldmem); while pidof oldmem; do sleep 0.1; done", timeout=60)
    assert g.sh("stat -c %s /proc/vmcore") == kernels
    assert "oldmem" not in g.sh("cat /proc/mounts")
    g.sh("oldmem init -q")
    for name, wanted in (("oom_score_adj", "-1000"), ("status", "VmLck")):
        told = g.sh(f"for p in $(pidof oldmem); do cat /proc/$p/{name}; done")
        assert told.count(wanted) == 2
    assert "VmLck:\t       0 kB" not in g.sh("for p in $(pidof oldmem); do grep VmLck /proc/$p/status; done")
    header = g.sh("head -c 4 /proc/vmcore | od -An -tx1")
    assert header.split() == ["7f", "45", "4c", "46"]
