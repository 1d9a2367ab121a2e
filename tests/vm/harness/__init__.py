# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real Debian guests under QEMU (TCG), for tests: boot one, plug and unplug its memory, crash it, work in its capture
kernel, and compare with what the host sees. ``python -m tests.vm.harness.fetch`` downloads all it needs beforehand.

A test asks for the fixture ``guest`` (booted) or ``crashed_guest`` (at the capture kernel's shell), as often as it
likes; guests end with the test::

    from tests.vm.conftest import MakeCrashedGuest
    from tests.vm.harness import Device, MiB

    def test_stale_header(crashed_guest: MakeCrashedGuest) -> None:
        g = crashed_guest(
            "6.12",                                              # or "6.1", "7"
            devices=[Device("vm0", 1024 * MiB, 256 * MiB)],      # name, size, requested, block_size
            load="c",                                            # kexec_load(2); "s": kexec_file_load(2)
            after_load=lambda g: g.resize("vm0", 480 * MiB),
        )
        assert "..." in g.sh("oldmem map")
        assert g.extents("vm0").size == 480 * MiB

In the guest: ``sh`` (output, or GuestError), ``run`` (status and output), ``put`` and ``get`` (files), ``resize``,
``fragment``, ``load``, ``crash``; ``put_boot_files`` and ``next_stage`` to kexec once more. ``modprobe`` knows the
modules of ``images.MODULES``; the capture kernel has virtio_pci, virtio_blk, fuse and qemu_fw_cfg loaded, never
virtio_mem. From the host: ``plug_truth`` (QEMU's word),
``extents``, ``populated`` and ``allocated`` (which blocks have host memory behind them: the plugged ones and any other
that was touched), ``ram_files`` (every byte; inside ``with g.paused()`` it holds still), ``console_tail``.

Modules: ``guest`` (class Guest), ``qemu`` (the process), ``memory`` (files and extents), ``qmp`` and ``serial`` (two
ways to talk to it), ``images`` (the initramfs), ``debian``, ``apt`` and ``cache`` (stock kernels and tools from
Debian). tests/s390x has a guest of its own on the same ground."""

from .apt import FetchError
from .debian import SUITES, Kernel, prefetch
from .guest import Guest, GuestError
from .memory import Device, GiB, KiB, MiB, Plugged, RamFile
from .qemu import QemuError, missing
from .qmp import QmpError
from .serial import ConsoleError, Ready, Result

GENERATIONS = tuple(SUITES)

__all__ = [
    "GENERATIONS",
    "ConsoleError",
    "Device",
    "FetchError",
    "GiB",
    "Guest",
    "GuestError",
    "Kernel",
    "KiB",
    "MiB",
    "Plugged",
    "QemuError",
    "QmpError",
    "RamFile",
    "Ready",
    "Result",
    "missing",
    "prefetch",
]
