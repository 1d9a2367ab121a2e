# SPDX-License-Identifier: LGPL-2.1-or-later
"""One scenario, run: what is kept of it is a folder.

vmcore         all of the capture kernel's own /proc/vmcore
ram.raw        the guest's boot RAM as it was at the capture kernel's shell
NAME.raw       the region of each virtio-mem device
machine.json   where there are devices: what RAM and devices there were, as QEMU and the host's files tell
console.log, cmd.txt, dmesg (of the capture kernel), makedumpfile.log (run on that /proc/vmcore)"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from capture import recorded
from capture.recorded import RamImage, RecordedMachine, VirtioMemState
from guard import procvmcore
from tests.pace import patience
from tests.s390x import pieces
from tests.s390x.guest import Guest
from tests.s390x.scenarios import Scenario
from tests.vm.harness import GuestError

PROBED = re.compile(r"virtio_mem virtio\d+: start address: (0x[0-9a-f]+)")
COPY_TIMEOUT = 300.0


def folder_of(name: str) -> Path:
    """Where the run of that name is kept."""
    return pieces.store().folder / "runs" / name


def run(scenario: Scenario) -> Path:
    """Runs *scenario* and returns its folder, which replaces that of an earlier run. Raises FetchError, QemuError,
    GuestError or ConsoleError."""
    final = folder_of(scenario.name)
    folder = final.with_name(f"{scenario.name}.partial")
    for old in (folder, final):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)
    with Guest(
        scenario.crashed,
        scenario.capturing,
        memory=scenario.memory,
        crashkernel=scenario.crashkernel,
        smp=scenario.smp,
        cpu=scenario.cpu,
        bus=scenario.bus,
        devices=scenario.devices,
        append=scenario.append,
        contents="tools" if scenario.shrink is None else "oldmem",
    ) as g:
        (folder / "cmd.txt").write_text(shlex.join(g.command) + "\n")
        try:
            crash(g, scenario)
            keep(g, folder)
            check_identity(folder / "vmcore", scenario.identity)
        finally:
            (folder / "console.log").write_text(g.console)
    folder.rename(final)
    return final


def crash(g: Guest, scenario: Scenario) -> None:
    """From the first kernel's shell to the capture kernel's."""
    if scenario.shrink is not None:
        g.fragment(scenario.devices[0].name, scenario.shrink)
    g.load(scenario.load)
    for cpu in scenario.offline:
        g.sh(f"echo 0 > /sys/devices/system/cpu/cpu{cpu}/online")
    mask = 1 << scenario.crash_on
    if not g.crash(command=f"taskset {mask:x} sh -c 'echo c > /proc/sysrq-trigger'").vmcore:
        raise GuestError("the capture kernel has no /proc/vmcore")


def keep(g: Guest, folder: Path) -> None:
    """Fills *folder* from a guest that is at its capture kernel's shell."""
    dmesg = g.sh("dmesg")
    (folder / "dmesg").write_text(dmesg)
    size = int(g.sh("dd if=/proc/vmcore of=/dev/scratch bs=1M 2>/dev/null && sync && stat -c %s /proc/vmcore"))
    status, said = g.run("makedumpfile -F -l -d 31 /proc/vmcore 2>&1 >/dev/null", COPY_TIMEOUT)
    (folder / "makedumpfile.log").write_text(f"{said}status {status}\n")
    copy(g.scratch, folder / "vmcore", size)
    with g.paused():
        for name in ("ram", *g.devices):
            copy(g.image(name), folder / f"{name}.raw")
        if g.devices:
            recorded.save(str(folder), machine(g, folder, dmesg))


def check_identity(vmcore: Path, wanted: bool | None) -> None:
    """The run must show what it is for: RAM is mapped at its own address, or it is not. Raises GuestError."""
    with open(vmcore, "rb") as file:
        last = procvmcore.read_header(file.fileno(), str(vmcore)).loads[-1]
    if wanted is not None and wanted != (last.vaddr != last.paddr):
        raise GuestError(f"RAM at {last.paddr:#x} is mapped at {last.vaddr:#x}: not what this scenario is for")


def copy(source: Path, target: Path, size: int | None = None) -> None:
    """A sparse copy of the first *size* bytes."""
    count = [] if size is None else [f"count={size}", "iflag=count_bytes"]
    command = ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=sparse", "status=none", *count]
    subprocess.run(command, check=True, timeout=patience(COPY_TIMEOUT))
    with open(target, "r+b") as file:  # a hole at the end is not made by dd
        file.truncate(source.stat().st_size if size is None else size)


def machine(g: Guest, folder: Path, dmesg: str) -> RecordedMachine:
    """What the machine had; its devices in the order in which the capture kernel probed them."""
    devices = {}
    for name, truth in g.plug_truth().items():
        block = truth.block_size
        runs = tuple((start // block, (end - start) // block) for start, end in g.extents(name))
        if sum(count for _, count in runs) * block != truth.size:
            raise GuestError(f"{name}: {truth.size} bytes plugged, but the host's file has {g.extents(name)}")
        devices[truth.memaddr] = VirtioMemState(
            addr=truth.memaddr,
            region_size=truth.max_size,
            usable_region_size=truth.max_size,
            block_size=block,
            plugged_size=truth.size,
            requested_size=truth.requested,
            node_id=0,
            plugged=runs,
            image=f"{name}.raw",
        )
    probed = [int(address, 16) for address in PROBED.findall(dmesg)]
    if sorted(probed) != sorted(devices):
        raise GuestError(f"the capture kernel has probed devices at {probed}, QEMU has them at {sorted(devices)}")
    ram = RamImage("ram.raw", 0, 0, (folder / "ram.raw").stat().st_size)
    return RecordedMachine(str(folder), "s390x", (ram,), tuple(devices[address] for address in probed))
