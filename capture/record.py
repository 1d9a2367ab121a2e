# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writing the machine's state as a folder for --machine: what the capture environment knows, without the memory.

The memory is the host's to give: a guest's RAM file or a copy of it, put beside machine.json under the names that it
has. As QEMU lays its RAM out, one file holds what is below 4 GiB first and what is above behind it."""

from __future__ import annotations

import os

from capture.dump import Dump
from capture.machine import LiveMachine
from capture.recorded import RamImage, RecordedMachine, VirtioMemState, save
from capture.sources import report
from capture.x86_platform import BOOT_PARAMS, EFI_TABLES, PCI
from guard.errors import Error
from guard.procvmcore import PATH as PROC_VMCORE
from guard.ranges import RangeSet
from guard.rules import gart

FOUR_GIB = 1 << 32
MAX_FILE = 1 << 20

# What the sources read (capture/sources), and what a person looks for first in a bug report
FILES = ("proc/iomem", "proc/cmdline", "proc/version", "sys/firmware/acpi/tables/SRAT", "sys/firmware/dmi/tables/DMI")
PLATFORM = (EFI_TABLES, BOOT_PARAMS, *(f"{PCI}/{address}/config" for address in gart.NODES))
FOLDERS = ("sys/firmware/memmap", "sys/devices/system/memory")
FW_CFG = "sys/firmware/qemu_fw_cfg/by_name/"
FW_CFG_FILES = ("etc/e820/raw", "etc/e820/size", "etc/vmcoreinfo/raw", "etc/vmcoreinfo/size")


def _copy(source: str, target: str) -> bool:
    try:
        with open(source, "rb") as file:
            data = file.read(MAX_FILE)
    except OSError:
        return False
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "wb") as file:
        file.write(data)
    return True


def _copy_root(root: str) -> int:
    """Copy the facts below /; returns how many files."""
    names = [*FILES, *PLATFORM, *(FW_CFG + name for name in FW_CFG_FILES)]
    for folder in FOLDERS:
        for path, folders, files in os.walk("/" + folder):
            # sysfs folders link back to their parents; one level of entries is all there is to read
            folders[:] = [f for f in folders if not os.path.islink(os.path.join(path, f)) and f != "power"]
            readable = [f for f in files if f in _WANTED]
            names += [os.path.join(path, f).lstrip("/") for f in readable]
    return sum(_copy("/" + name, os.path.join(root, name)) for name in names)


_WANTED = {"start", "end", "type", "block_size_bytes", "state", "phys_index"}


def ram_images(boot: RangeSet) -> list[RamImage]:
    """RAM of QEMU's boot map as one image: offset is address below 4 GiB, the rest follows without the hole."""
    low_end = max((r.end for r in boot if r.end <= FOUR_GIB), default=0)
    return [
        RamImage("ram.raw", r.start if r.end <= FOUR_GIB else r.start - FOUR_GIB + low_end, r.start, r.size)
        for r in boot
    ]


def record(dump: Dump, folder: str) -> list[str]:
    """Write machine.json and root/ into *folder*; returns what was done, as lines. Raises Error."""
    machine = dump.machine
    if not isinstance(machine, LiveMachine):
        raise Error("record writes down the machine that this capture kernel came from; --machine names one that is")
    if machine.header_is_the_kernels:
        raise Error(f"on {machine.arch.name} nothing needs recording: an image of all RAM is enough (--image)")
    info = dump.arch.info
    unknown = [d.name for d in machine.devices if d.bitmap is None]
    if unknown:
        raise Error(f"the plug state of {', '.join(unknown)} is not known: a record of it would be wrong")
    root = os.path.join(folder, "root")
    try:
        os.makedirs(root, exist_ok=True)
        files = _copy_root(root)
        if machine.core_header is not None:
            os.makedirs(os.path.join(root, "proc"), exist_ok=True)
            with open(root + PROC_VMCORE, "wb") as file:
                file.write(machine.core_header_bytes())
    except OSError as e:
        raise Error(f"{e.filename or root}: {e.strerror}") from None
    firmware = machine.reports["fw_cfg"].ranges(report.RAM) or dump.envelope.boot
    ram = ram_images(firmware)
    virtio = [
        VirtioMemState(
            d.region.start,
            d.region.size,
            *(d.usable, d.block_size, d.plugged_size, d.requested_size, d.node_id),
            tuple(((r.start - d.region.start) // d.block_size, r.size // d.block_size) for r in d.plugged),
            f"vm{i}.raw",
        )
        for i, d in enumerate(machine.devices)
    ]
    save(
        folder,
        RecordedMachine(
            folder,
            machine.arch.name,
            tuple(ram),
            tuple(virtio),
            capture_release=os.uname().release,
            page_size=machine.page_size,
            phdr_note_align=machine.phdr_note_align,
            vmcoreinfo_paddr=info.paddr if info else None,
        ),
    )
    lines = [f"{files} files of /sys and /proc and {folder}/machine.json written"]
    lines += [f"put the RAM at {r.paddr:#x}+{r.size:#x} into {r.image} at offset {r.offset:#x}" for r in ram]
    lines += [f"put the virtio-mem region at {v.addr:#x}+{v.region_size:#x} into {v.image}" for v in virtio]
    return lines
