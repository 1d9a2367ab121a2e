# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's initramfs: busybox, kexec and makedumpfile for s390x, guest/init, and more as wanted."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from initramfs.builder import Builder
from initramfs.compress import compress, default_method
from initramfs.elfdeps import Searcher
from tests.s390x import core, pieces
from tests.s390x.pieces import PYTHON

INIT = Path(__file__).resolve().parent / "guest" / "init"
ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("/usr/sbin/kexec", "/usr/bin/makedumpfile")
LEVEL = 3  # the image is made anew for each run
OPT = f"/opt/{pieces.SYSROOT_NAME}"
"""Where Builder.add_binary puts the programs of the sysroot with their libraries."""
LEFT_OUT = {"__pycache__", "config-3.13-s390x-linux-gnu", "ensurepip", "idlelib", "pydoc_data", "pygments", "test"}
LIBRARIES = {"libc.so.6", "libm.so.6", "libffi.so.8", "libz.so.1", "ld64.so.1"}
"""What extension modules may need; neither oldmem nor its tests use any that needs more."""

PROGRAM = ("guard", "capture")
SOURCE = "/src"
SOURCES = (*PROGRAM, "initramfs", "tests", "cffi_build.py", "pyproject.toml", "setup.py")
"""What of the repository lies in SOURCE for its tests."""

Contents = Literal["tools", "oldmem", "tests"]


@functools.cache
def initramfs(contents: Contents = "tools") -> bytes:
    """Compressed archive, the same for any kernel: the tools alone, or with Python and the command ``oldmem`` too, or
    with Python, pytest and the repository. Raises FetchError, guard.errors.Error."""
    sysroot = pieces.sysroot()
    builder = Builder(str(pieces.store().folder / "build"))
    builder.add_init(str(INIT))
    builder.add_file("/usr/bin/busybox", str(sysroot / "usr/bin/busybox"))
    builder.add_symlink("/usr/bin/sh", "busybox")
    for tool in TOOLS:
        builder.add_binary(tool, sysroot=str(sysroot))
    if contents != "tools":
        _add_python(builder, sysroot, contents == "tests")
    if contents == "oldmem":
        _add_sources(builder, f"{OPT}/lib/{PYTHON}", PROGRAM)
        command = "import sys; from capture.cli import main; sys.exit(main())"
        builder.add_bytes("/usr/bin/oldmem", f"#!/bin/sh\nexec python3 -ISc '{command}' \"$@\"\n".encode(), 0o755)
    elif contents == "tests":
        _add_sources(builder, SOURCE, SOURCES)
    return compress(builder.archive(), default_method(), LEVEL)


def _add_python(builder: Builder, sysroot: Path, pytest: bool) -> None:
    """The interpreter knows its library by the folder it is started in, so the one goes beside the other."""
    builder.add_binary(f"/usr/bin/{PYTHON}", sysroot=str(sysroot), name="python3")
    packages = sysroot / "usr/lib/python3/dist-packages"
    files = _files(sysroot / "usr/lib" / PYTHON) | (_files(packages) if pytest else {})
    backend = next(packages.glob("_cffi_backend.cpython-313-*.so"))
    files[f"lib-dynload/{backend.name}"] = backend
    searcher = Searcher(str(sysroot))
    for place, path in files.items():
        if path.suffix == ".so":
            needed = searcher.closure(str(path.resolve())).libraries
            if not LIBRARIES.issuperset(library.name for library in needed):
                continue
            for item in needed:
                builder.add_file(f"{OPT}/lib/{item.name}", item.path, 0o755, "collectors")
        builder.add_file(f"{OPT}/lib/{PYTHON}/{place}", str(path.resolve()), part="python")


def _add_sources(builder: Builder, target: str, names: Iterable[str]) -> None:
    """*names* of the repository, with the C core for s390x."""
    for name in names:
        path = ROOT / name
        for place, source in {name: path}.items() if path.is_file() else _files(path, f"{name}/").items():
            if source.suffix != ".so":
                builder.add_file(f"{target}/{place}", str(source), part="python")
    builder.add_file(f"{target}/guard/_core.abi3.so", str(core.build()), part="python")


def _files(folder: Path, prefix: str = "") -> dict[str, Path]:
    """The files below *folder*, by *prefix* and their paths in it."""
    found = {}
    for path in folder.rglob("*"):
        inner = path.relative_to(folder)
        if path.is_file() and not LEFT_OUT.intersection(inner.parts):
            found[f"{prefix}{inner}"] = path
    return found
