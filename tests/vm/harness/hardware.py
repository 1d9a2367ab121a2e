# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machines that guests run on, as words for QEMU: processors, memory with its backing files, firmware."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from .memory import Device, Dimm, MiB
from .qemu import PROGRAM, Hardware

# The TCG of QEMU 7.2 spoils EFLAGS where an interrupt follows cmpxchg16b: one boot in twenty ends with an oops in
# __kmalloc. Without cx16 the kernel does not use it. With thread=multi, or -cpu max, 7.x still oopses now and then.
ACCELERATOR = "tcg,thread=single"
CPU = "qemu64,-cx16"
ALIGNMENT_SLACK = 1024 * MiB  # q35 aligns the region of each memory device, to 1 GiB at most
CONSOLE = ("-serial", "chardev:console")

Machine = Literal["q35", "microvm"]


class Board(NamedTuple):
    """An x86_64 machine: *memory* bytes of boot RAM, of which *below_4g* lie below 4 GiB; *dimms* have empty slots at
    first; *hint* is ``-device vmcoreinfo``, which keeps the address of the note for the capture kernel; *numa*: there
    is a node, hence a SRAT; *firmware* is an image instead of QEMU's own SeaBIOS."""

    memory: int
    below_4g: int
    smp: int
    devices: Sequence[Device] = ()
    dimms: Sequence[Dimm] = ()
    balloon: bool = False
    hint: bool = True
    numa: bool = True
    firmware: Path | None = None


def q35(board: Board) -> Hardware:
    """A PC with PCI Express, SMBIOS and ACPI."""
    added = [*(device.size for device in board.devices), *(dimm.size for dimm in board.dimms)]
    most = board.memory + sum(size + ALIGNMENT_SLACK for size in added)
    size = f"{board.memory // MiB}M"
    if added:
        size += f",maxmem={most // MiB}M" + (f",slots={len(board.dimms)}" if board.dimms else "")
    options = _common(board, size)
    machine = f"q35,max-ram-below-4g={board.below_4g}"
    if board.numa:
        # without a node there is no SRAT
        options += ["-machine", machine, "-numa", f"node,nodeid=0,memdev=ram,cpus=0-{board.smp - 1}"]
    else:
        options += ["-machine", f"{machine},memory-backend=ram"]
    for device in board.devices:
        options += virtio_mem("virtio-mem-pci", device, **({"node": 0} if board.numa else {}))
    if board.balloon:
        options += ["-device", "virtio-balloon-pci"]
    return Hardware([PROGRAM], options, CONSOLE, "virtio-blk-pci")


def microvm(board: Board) -> Hardware:
    """A machine without PCI: disks over virtio-mmio, ACPI without SRAT, no SMBIOS (QEMU docs/system/i386/microvm.rst).
    Memory cannot be added to it, and all of it is below 4 GiB."""
    if board.devices or board.dimms or board.balloon or board.firmware or board.below_4g < board.memory:
        raise ValueError("a microvm has no memory above 4 GiB, no memory devices, no balloon and no other firmware")
    options = _common(board, f"{board.memory // MiB}M")
    options += ["-machine", "microvm,memory-backend=ram"]
    return Hardware([PROGRAM], options, CONSOLE, "virtio-blk-device")


def _common(board: Board, size: str) -> list[str]:
    options = ["-accel", ACCELERATOR, "-cpu", CPU, "-smp", str(board.smp), "-m", size, *ram_backend(board.memory)]
    if board.hint:
        options += ["-device", "vmcoreinfo"]
    if board.firmware:
        options += ["-bios", str(board.firmware)]
    return options


def ram_backend(memory: int) -> list[str]:
    """Boot RAM in a file of QEMU's folder."""
    return ["-object", f"memory-backend-file,id=ram,size={memory},mem-path=ram,share=on"]


def virtio_mem(kind: str, device: Device, **properties: object) -> list[str]:
    """*device* as QEMU's device type *kind*, its memory in a file of QEMU's folder."""
    name, size, requested, block_size = device
    backend = f"memory-backend-file,id=mem-{name},size={size},mem-path={name},share=on,reserve=off"
    # prealloc: a plugged block is populated at once, so the file's extents are the plug bitmap
    words = [f"{kind},id={name},memdev=mem-{name},block-size={block_size},prealloc=on,requested-size={requested}"]
    words += [f"{key}={value}" for key, value in properties.items()]
    return ["-object", backend, "-device", ",".join(words)]
