# SPDX-License-Identifier: LGPL-2.1-or-later
"""The stock Debian pieces that the guests are made of, downloaded once into a cache folder (``OLDMEM_CACHE``, default
``.cache/vm`` in the repository): the cloud kernels of three generations, a trixie sysroot with kexec, makedumpfile and
busybox, and OVMF."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from .apt import FetchError, Suite, unpack
from .cache import ROOT, Cache, chosen_folder

SUITES = {"6.1": "bookworm", "6.12": "trixie", "7": "trixie-backports"}
METAPACKAGE = "linux-image-cloud-amd64"
# 7.x is split into image, modules, binary and base packages; older generations have the image package alone.
KERNEL_PACKAGE = re.compile(r"linux-(image|modules|binary|base)-\d")
SYSROOT_SUITE = "trixie"
SYSROOT_PACKAGES = ("kexec-tools", "makedumpfile", "busybox-static")
OVMF_PACKAGES = ("ovmf",)
TESTING_PACKAGES = ("makedumpfile",)


class Kernel(NamedTuple):
    """A stock kernel: its ``uname -r``, the image, and the folder of its (compressed) modules."""

    generation: str
    release: str
    vmlinuz: Path
    modules: Path


def cache() -> Path:
    """The cache folder; it may not exist yet."""
    return chosen_folder() or ROOT / ".cache" / "vm"


def kernel(generation: str) -> Kernel:
    """The Debian cloud kernel of *generation*, one of :data:`SUITES`. Raises FetchError."""
    suite = SUITES[generation]
    store = Cache(cache())
    root = store.piece(f"kernel-{generation}", lambda into: _fetch_kernel(store.suite(suite), into))
    modules = next((root / "usr/lib/modules").iterdir())
    candidates = (modules / "vmlinuz", root / "boot" / f"vmlinuz-{modules.name}")
    vmlinuz = next((path for path in candidates if path.is_file()), None)
    if vmlinuz is None:
        raise FetchError(f"{root}: no vmlinuz of {modules.name}")
    return Kernel(generation, modules.name, vmlinuz, modules)


def sysroot() -> Path:
    """Root of a tree that holds :data:`SYSROOT_PACKAGES` and their libraries. Raises FetchError."""
    return _unpacked("sysroot", SYSROOT_SUITE, SYSROOT_PACKAGES)


def testing_sysroot() -> Path:
    """As :func:`sysroot`, of Debian's testing suite: a makedumpfile that knows the page types of these kernels (1.7.6
    takes free pages for slab). Raises FetchError."""
    return _unpacked("testing", "testing", TESTING_PACKAGES)


def ovmf() -> Path:
    """EFI firmware for QEMU's PCs, code and an empty variable store in one image. Raises FetchError."""
    store = Cache(cache())
    root = store.piece("ovmf", lambda into: unpack(store.suite(SYSROOT_SUITE).download(OVMF_PACKAGES), into))
    return root / "usr/share/ovmf/OVMF.fd"


def _unpacked(name: str, suite: str, packages: tuple[str, ...]) -> Path:
    store = Cache(cache())
    return store.piece(name, lambda into: unpack(store.suite(suite).download_closure(packages), into))


def _fetch_kernel(suite: Suite, into: Path) -> None:
    wanted: list[str] = []
    todo = [METAPACKAGE]
    while todo:
        for name in suite.depends(todo.pop()):
            if KERNEL_PACKAGE.match(name) and name not in wanted:
                wanted.append(name)
                todo.append(name)
    if not wanted:
        raise FetchError(f"{METAPACKAGE}: {suite.name} has no such package, or it names no kernel")
    unpack(suite.download(wanted), into)


def prefetch() -> None:
    """Fetches all there is to fetch; milliseconds when it is there. Raises FetchError."""
    for generation in SUITES:
        kernel(generation)
    sysroot()
    testing_sysroot()
    ovmf()
