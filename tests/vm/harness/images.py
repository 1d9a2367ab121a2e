# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guests' initramfs, the same for the first and the capture kernel: busybox, kexec and makedumpfile of the trixie
sysroot, kernel modules, guest/init, and (unless told otherwise) oldmem with the interpreter that this runs under and
cp-dynamic and dd-dynamic."""

from __future__ import annotations

import functools
import stat
from collections.abc import Mapping
from pathlib import Path

from capture import newc
from initramfs.builder import Builder
from initramfs.compress import compress, default_method
from initramfs.kmod import ModuleTree

from . import debian

INIT = Path(__file__).resolve().parent / "guest" / "init"
MODULES = (
    *("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_mem", "virtio_balloon", "fuse", "qemu_fw_cfg", "loop"),
    *("dax_hmem", "device_dax", "kmem", "nd_e820", "nd_pmem", "dax_pmem"),
)
DYNAMIC = ("cp", "dd")  # of this machine, for what is put into a collector: busybox is static
TOOLS = ("/usr/sbin/kexec", "/usr/bin/makedumpfile")
LEVEL = 3  # the image is made anew for each test run, and one level more or less does not matter to the guest


@functools.cache
def initramfs(
    kernel: debian.Kernel, oldmem: bool = True, testing: bool = False, modules: tuple[str, ...] = MODULES
) -> bytes:
    """Compressed archive for *kernel*, with *modules* of it; with *testing* it has makedumpfile-testing too. Raises
    FetchError, guard.errors.Error."""
    sysroot = debian.sysroot()
    builder = Builder(str(debian.cache() / "build"))
    builder.add_init(str(INIT))
    builder.add_busybox(str(sysroot / "usr/bin/busybox"))
    if oldmem:
        builder.add_symlink("/usr/bin/python3", builder.add_python())
        for name in DYNAMIC:
            builder.add_binary(f"/usr/bin/{name}", name=f"{name}-dynamic")
    for tool in TOOLS:
        builder.add_binary(tool, sysroot=str(sysroot))
    # what ends threads is loaded when it is needed, hence named by no program
    (libgcc,) = sysroot.glob("usr/lib/*/libgcc_s.so.1")
    builder.add_file(f"/opt/{sysroot.resolve().name}/lib/{libgcc.name}", str(libgcc))
    if testing:
        newer = str(debian.testing_sysroot())
        builder.add_binary("/usr/bin/makedumpfile", sysroot=newer, name="makedumpfile-testing")
    builder.add_modules(str(kernel.modules), list(modules))
    _add_module_index(builder, kernel, list(modules))
    return compress(builder.archive(), default_method(), LEVEL)


def table_upgrades(tables: Mapping[str, bytes]) -> bytes:
    """An archive for the front of an initramfs, from which the kernel takes ACPI *tables* before it reads the
    firmware's (drivers/acpi/tables.c:acpi_table_upgrade(); Documentation/admin-guide/acpi/initrd_table_override.rst):
    instead of one with the same identifiers and a lower OEM revision. It must not be compressed."""
    entries = [newc.Entry(f"kernel/firmware/acpi/{n}.aml", stat.S_IFREG | 0o644, data) for n, data in tables.items()]
    return newc.archive(entries) if entries else b""


def _add_module_index(builder: Builder, kernel: debian.Kernel, modules: list[str]) -> None:
    """What modprobe needs: packages bring no modules.dep, depmod would make it at installation."""
    tree = ModuleTree(str(kernel.modules))
    lines: list[str] = []
    for module in tree.load_order(modules):
        needs = [need.path for need in tree.load_order([module.name])][-2::-1]
        lines.append(" ".join([f"{module.path}:", *needs]))
    folder = f"/lib/modules/{kernel.release}"
    builder.add_bytes(f"{folder}/modules.dep", "\n".join([*lines, ""]).encode())
    builder.add_file(f"{folder}/modules.builtin", str(kernel.modules / "modules.builtin"))
