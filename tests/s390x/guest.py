# SPDX-License-Identifier: LGPL-2.1-or-later
"""An s390x guest: two kernels that may differ, the one that dies and the one that captures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.s390x import images, kernel, pieces
from tests.s390x.images import Contents
from tests.vm.harness import Device, MiB
from tests.vm.harness.guest import AnyGuest
from tests.vm.harness.hardware import ram_backend, virtio_mem
from tests.vm.harness.qemu import Hardware, Qemu

CONSOLE = "console=ttysclp0"
# QEMU aligns the region of a memory device to its size, at most to that of a page table of the host
ALIGNMENT_SLACK = 1024 * MiB


class Guest(AnyGuest):
    """*crashed* and *capturing* are names of ``kernel.SOURCES``; *memory* is boot RAM in bytes, *cpu* QEMU's model,
    *bus* where *devices* are ("ccw" or "pci"), *contents* what the dying kernel's initramfs has, *to_capture* what the
    capture kernel's has."""

    capture_append = CONSOLE
    usual_boot = 30.0

    def __init__(
        self,
        crashed: str,
        capturing: str,
        *,
        memory: int,
        crashkernel: str,
        smp: int,
        cpu: str = "max",
        bus: str = "ccw",
        devices: Sequence[Device] = (),
        append: str = "",
        contents: Contents = "tools",
        to_capture: Contents = "tools",
    ) -> None:
        self.devices = {device.name: device for device in devices}
        self._vmlinuz = kernel.build(crashed)
        self._initramfs = images.initramfs(contents)
        self._to_load = kernel.build(capturing), images.initramfs(to_capture)
        self._append = f"{CONSOLE} crashkernel={crashkernel} memhp_default_state=online_kernel {append}".rstrip()
        self._memory = memory
        most = memory + sum(device.size + ALIGNMENT_SLACK for device in devices)
        options = ["-machine", "s390-ccw-virtio,accel=tcg,memory-backend=ram", "-cpu", cpu, "-smp", str(smp)]
        options += ["-m", f"{memory // MiB}M,maxmem={most // MiB}M" if devices else f"{memory // MiB}M"]
        options += ram_backend(memory)
        for device in devices:
            options += virtio_mem(f"virtio-mem-{bus}", device)
        self._hardware = Hardware(pieces.qemu(), options, ["-device", "sclpconsole,chardev=console"], "virtio-blk-ccw")

    @property
    def command(self) -> list[str]:
        """The words that started QEMU."""
        return self._qemu.command

    @property
    def console(self) -> str:
        """All that the guest ever printed."""
        return self.serial.log

    def image(self, name: str) -> Path:
        """The file with the memory of device *name*, or with boot RAM ("ram"). Holds still inside ``paused()``."""
        return self._qemu.ram_path(name)

    @property
    def _capture(self) -> tuple[Path, bytes]:
        return self._to_load

    def _start(self) -> Qemu:
        return Qemu(self._hardware, vmlinuz=self._vmlinuz, initramfs=self._initramfs, append=self._append)
