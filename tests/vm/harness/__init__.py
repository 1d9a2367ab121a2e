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
``fragment``, ``load``, ``crash``; ``bind_in_kdump_mode`` (the driver, in the capture kernel); ``put_boot_files`` and
``next_stage`` to kexec once more. ``modprobe`` knows the modules of ``images.MODULES``; the capture kernel has
virtio_pci, virtio_blk, fuse and qemu_fw_cfg loaded, never virtio_mem. From the host: ``plug_truth`` (QEMU's word),
``extents``, ``populated`` and ``allocated`` (which blocks have host memory behind them: the plugged ones and any other
that was touched), ``ram_files`` (every byte; inside ``with g.paused()`` it holds still), ``ram_map`` (which physical
addresses QEMU calls RAM), ``console_tail``. Time-outs are in seconds of the usual machine (tests/pace.py).

Unless told otherwise a guest is a machine that tells all: a PC with SMBIOS and SRAT whose fw_cfg is read, and which
keeps the address of VMCOREINFO. Machines that tell less, or something else, are made by parameters that combine::

    Guest("7", machine="microvm", memory=1 * GiB, below_4g=1 * GiB)   # no PCI, SMBIOS, SRAT; all RAM below 4 GiB
    Guest("6.12", hint=False, fw_cfg=False, numa=False)               # a PC without vmcoreinfo device, fw_cfg, SRAT
    Guest("6.12", firmware="ovmf")                                    # EFI boot
    Guest("6.12", tables={"SRAT": data})                              # an ACPI table, in both kernels' initramfs
    g = Guest("6.12", dimms=[Dimm("d0", 256 * MiB)])                  # a slot; g.plug("d0") puts the module into it

``monitor`` takes commands of QEMU's monitor, ``mce`` for one, after which ``wait_crashed`` waits as ``crash`` does.
A DIMM's slot is seen by the capture kernel too, which takes its memory for itself unless ``acpi_no_memhotplug`` is on
its command line (Documentation/admin-guide/kernel-parameters.txt); RAM of up to some GiB costs a guest nothing, its
files are sparse.

Modules: ``guest`` (class Guest), ``qemu`` (the process), ``hardware`` (what QEMU is to make), ``memory`` (files and
extents), ``qmp`` and ``serial`` (two ways to talk to it), ``images`` (the initramfs), ``debian``, ``apt`` and ``cache``
(stock kernels, tools and firmware from Debian). tests/s390x has a guest of its own on the same ground."""

from .apt import FetchError
from .debian import SUITES, Kernel, prefetch
from .guest import Guest, GuestError
from .memory import Device, Dimm, GiB, KiB, MiB, Plugged, RamFile
from .qemu import QemuError, missing
from .qmp import QmpError
from .serial import ConsoleError, Ready, Result

GENERATIONS = tuple(SUITES)

__all__ = [
    "GENERATIONS",
    "ConsoleError",
    "Device",
    "Dimm",
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
