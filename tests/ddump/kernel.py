# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels with device dumps in /proc/vmcore, built from Debian's source packages, and the module that adds one.

One configuration serves all (kernel.config, over allnoconfig). All that is built is kept in a cache folder (``ddump``
in ``OLDMEM_CACHE``, default ``.cache/ddump`` in the repository)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from tests.vm.harness.apt import FetchError, unpack
from tests.vm.harness.cache import ROOT, Cache, chosen_folder
from tests.vm.harness.debian import Kernel

SUITES = {"6.12": "trixie", "7": "trixie-backports"}
"""Generations, and the suites whose package ``linux-source`` is of them. In the first a device dump shifts an open
/proc/vmcore, in the second it cannot be added while one is open."""

METAPACKAGE = "linux-source"
TOOLS_SUITE = "bookworm"
TOOLS_PACKAGES = ("flex", "bison", "bc", "make", "libelf-dev")
# The C library goes with the loader, and that is the machine's own, whose headers it needs too
OF_THE_MACHINE = ("libc6_", "libc6-dev_", "libc-dev-bin_", "linux-libc-dev_", "libcrypt-dev_", "libcrypt1_")

CONFIG = Path(__file__).with_name("kernel.config")
MODULE = Path(__file__).with_name("module")
NEEDED = ("PROC_VMCORE_DEVICE_DUMP", "KEXEC_FILE", "VIRTIO_BLK", "FUSE_FS", "DEVMEM", "MODULES", "FW_CFG_SYSFS")
IMAGE = "arch/x86/boot/bzImage"
HOUR = 3600


def kernel(generation: str) -> Kernel:
    """The kernel of *generation*, a key of :data:`SUITES`, with the module ``ddump`` among its modules; built if it is
    not there. Raises FetchError."""
    recipe = (CONFIG.read_bytes(), *((path.name, path.read_bytes()) for path in sorted(MODULE.iterdir())))
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
    folder = _store().piece(f"kernel-{generation}-{digest}", lambda into: _build(generation, into))
    modules = next((folder / "lib/modules").iterdir())
    return Kernel(generation, modules.name, folder / "bzImage", modules)


def missing() -> str | None:
    """Why nothing can be built on this machine, or None."""
    for program in ("gcc", "perl", "xz"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return None


def _store() -> Cache:
    chosen = chosen_folder()
    return Cache(chosen / "ddump" if chosen else ROOT / ".cache" / "ddump")


def _build(generation: str, into: Path) -> None:
    work = into / "work"
    suite = _store().suite(SUITES[generation])
    package = next((name for name in suite.depends(METAPACKAGE) if name.startswith(f"linux-source-{generation}")), "")
    if not package:
        raise FetchError(f"{METAPACKAGE}: in {suite.name} it is not of {generation}")
    unpack(suite.download([package]), work / "package")
    tools = work / "tools"
    debs = _store().suite(TOOLS_SUITE).download_closure(TOOLS_PACKAGES)
    unpack((deb for deb in debs if not deb.name.startswith(OF_THE_MACHINE)), tools)
    _run(["tar", "-C", work, "-xf", work / f"package/usr/src/{package}.tar.xz"], into, tools)
    make: list[str | Path] = ["make", "-C", work / package, f"O={work}/out", f"-j{os.cpu_count()}"]
    _run([*make, f"KCONFIG_ALLCONFIG={CONFIG}", "allnoconfig"], into, tools)
    _check_config(work / "out/.config")
    _run([*make, "bzImage", "modules"], into, tools)
    shutil.copytree(MODULE, work / "module")
    _run([*make, f"M={work}/module", "modules"], into, tools)
    installed = [f"INSTALL_MOD_PATH={into}", "DEPMOD=true"]  # a module index is the test's own affair
    _run([*make, *installed, "modules_install"], into, tools)
    _run([*make, *installed, f"M={work}/module", "modules_install"], into, tools)
    for link in ("build", "source"):
        (next((into / "lib/modules").iterdir()) / link).unlink(missing_ok=True)
    (work / "out" / IMAGE).rename(into / "bzImage")
    (work / "out/.config").rename(into / "config")
    shutil.rmtree(work)


def _check_config(made: Path) -> None:
    """Kconfig drops what depends on what is not there without a word."""
    lines = set(made.read_text().splitlines())
    for name in NEEDED:
        if f"CONFIG_{name}=y" not in lines:
            raise FetchError(f"{CONFIG.name}: CONFIG_{name} did not come through")


def _run(command: list[str | Path], folder: Path, tools: Path) -> None:
    log = folder / "build.log"
    environment = {
        **os.environ,
        "PATH": f"{tools}/usr/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{tools}/usr/lib/x86_64-linux-gnu",
        "BISON_PKGDATADIR": f"{tools}/usr/share/bison",
        "M4": f"{tools}/usr/bin/m4",
        "HOSTCFLAGS": f"-I{tools}/usr/include",
        "HOSTLDFLAGS": f"-L{tools}/usr/lib/x86_64-linux-gnu",
    }
    with open(log, "ab") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=2 * HOUR, check=False)
    if done.returncode:
        end = " | ".join(log.read_text(errors="replace").splitlines()[-5:])
        raise FetchError(f"{command[0]} for the kernel: status {done.returncode}: {end[-500:]}")
