# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the runs are made of that Debian has ready: a QEMU that knows virtio-mem on s390x (10 or later), a cross
compiler with the tools that a kernel build needs, and an s390x sysroot. Kept in a cache folder (``s390x`` in
``OLDMEM_CACHE``, default ``.cache/s390x`` in the repository)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from tests.vm.harness.apt import unpack
from tests.vm.harness.cache import ROOT, Cache, chosen_folder

QEMU = "qemu-system-s390x"
QEMU_SUITE, QEMU_BASE = "bookworm-backports", "bookworm"
VIRTIO_MEM = "virtio-mem-ccw"

TOOLS_SUITE = "bookworm"
TOOLS_PACKAGES = ("gcc-12-s390x-linux-gnu", "binutils-s390x-linux-gnu", "flex", "bison", "bc", "make", "libelf-dev")
COMPILER_VERSION = "12"
TRIPLET = "s390x-linux-gnu"

SYSROOT_SUITE = "trixie"
SYSROOT_NAME = "sysroot"
PYTHON = "python3.13"
SYSROOT_PACKAGES = (
    *("kexec-tools", "makedumpfile", "busybox-static"),
    *("python3-cffi-backend", "libpython3.13-dev", "libc6-dev"),
    *("python3-pytest", "python3-hypothesis", "python3-pyelftools"),
)

# The C library goes with the loader, and that is the machine's own, whose headers it needs too
OF_THE_MACHINE = ("libc6_", "libc6-dev_", "libc-dev-bin_", "linux-libc-dev_", "libcrypt-dev_", "libcrypt1_")


def store() -> Cache:
    """The cache of all that is made once."""
    chosen = chosen_folder()
    return Cache(chosen / "s390x" if chosen else ROOT / ".cache" / "s390x")


def digest(recipe: object) -> str:
    """Goes into the name of a piece, so that it is made anew when its recipe changes."""
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]


def qemu() -> list[str]:
    """The words that start QEMU: the machine's own one if it will do. Raises FetchError."""
    found = shutil.which(QEMU)
    if found and VIRTIO_MEM in _devices([found]):
        return [found]
    root = store().piece("qemu", lambda into: _unpack_for_this_machine(QEMU_SUITE, (QEMU,), into, QEMU_BASE))
    program = str(root / "usr/bin" / QEMU)
    return ["env", f"LD_LIBRARY_PATH={_libraries(root)}", program, "-L", str(root / "usr/share/qemu")]


def tools_environment() -> dict[str, str]:
    """The environment in which the compiler :func:`compiler` and the tools of a kernel build run. Raises FetchError."""
    root = _tools()
    return {
        **os.environ,
        "PATH": f"{root}/cross:{root}/usr/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": _libraries(root),
        "BISON_PKGDATADIR": f"{root}/usr/share/bison",
        "M4": f"{root}/usr/bin/m4",
        "HOSTCFLAGS": f"-I{root}/usr/include",
        "HOSTLDFLAGS": f"-L{root}/usr/lib/x86_64-linux-gnu",
        "ARCH": "s390",
        "CROSS_COMPILE": f"{TRIPLET}-",
    }


def compiler() -> str:
    """The cross compiler, to be run in :func:`tools_environment`."""
    return str(_tools() / "cross" / f"{TRIPLET}-gcc")


def sysroot() -> Path:
    """Root of an s390x tree with kexec, makedumpfile, busybox, Python and what C code for them needs. Raises
    FetchError."""

    def make(into: Path) -> None:
        unpack(store().suite(SYSROOT_SUITE, "s390x").download_closure(SYSROOT_PACKAGES), into / SYSROOT_NAME)

    return store().piece(f"sysroot-{digest(SYSROOT_PACKAGES)}", make) / SYSROOT_NAME


def missing() -> str | None:
    """Why nothing can be run on this machine, or None."""
    for program in ("setpriv", "gcc", "perl", "xz", "readelf", "zstd"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return None if Path("/dev/shm").is_dir() else "/dev/shm: no such folder"


def _tools() -> Path:
    def make(into: Path) -> None:
        _unpack_for_this_machine(TOOLS_SUITE, TOOLS_PACKAGES, into)
        (into / "cross").mkdir()
        for program in ("gcc", "cpp"):
            name = f"{TRIPLET}-{program}"
            (into / "cross" / name).symlink_to(f"../usr/bin/{name}-{COMPILER_VERSION}")

    return store().piece(f"tools-{digest(TOOLS_PACKAGES)}", make)


def _unpack_for_this_machine(suite: str, packages: tuple[str, ...], into: Path, base: str | None = None) -> None:
    """Programs of another release, to be run on this one."""
    debs = store().suite(suite, base=base).download_closure(packages)
    unpack((deb for deb in debs if not deb.name.startswith(OF_THE_MACHINE)), into)


def _libraries(root: Path) -> str:
    return str(root / "usr/lib/x86_64-linux-gnu")


def _devices(program: list[str]) -> str:
    return subprocess.run([*program, "-device", "help"], capture_output=True, text=True, check=False).stdout
