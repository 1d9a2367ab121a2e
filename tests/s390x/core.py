# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C core for s390x, by the cross compiler, as cffi_build.py has it built (warnings are errors): it must be right
on a big-endian machine too."""

from __future__ import annotations

import contextlib
import hashlib
import io
import subprocess
import tempfile
from pathlib import Path

from cffi_build import HERE, ffibuilder
from tests.s390x import pieces
from tests.vm.harness import FetchError


def build() -> Path:
    """The shared object of ``guard._core`` (abi3). Raises FetchError with what the compiler said."""
    folder = pieces.store().folder / "core"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        with contextlib.redirect_stdout(io.StringIO()):  # cffi tells what it does, verbose or not
            extension = ffibuilder.distutils_extension(work, verbose=False)
        sources = [Path(HERE, name) for name in extension.sources]
        flags = [*extension.extra_compile_args, *(f"-I{folder}" for folder in extension.include_dirs)]
        headers = [path for folder in extension.include_dirs for path in sorted(Path(folder).glob("*.h"))]
        contents = [path.read_bytes() for path in [*sources, *headers]]
        final = folder / f"{hashlib.sha256(b'|'.join([repr(flags).encode(), *contents])).hexdigest()}.so"
        if not final.exists():
            made = Path(work, "_core.so")
            _compile(flags, sources, made)
            made.rename(final)
    return final


def _compile(flags: list[str], sources: list[Path], output: Path) -> None:
    root = pieces.sysroot()
    include, library = root / "usr/include", root / "usr/lib" / pieces.TRIPLET
    command = [pieces.compiler(), *flags, "-fPIC", "-shared", f"--sysroot={root}", f"-B{library}", f"-L{library}"]
    for folder in (include / pieces.PYTHON, include / pieces.TRIPLET, include):
        command += ["-isystem", str(folder)]
    command += [*map(str, sources), "-o", str(output)]
    done = subprocess.run(command, env=pieces.tools_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"guard._core for s390x: {done.stderr.strip()[-2000:]}")
