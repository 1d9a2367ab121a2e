# SPDX-License-Identifier: LGPL-2.1-or-later
"""C programs that use oldmem_guard.h and nothing else (but ``gates`` and ``windows``, which look inside), the files
they are run with, and how they are built: against the shared library as users have it, or with the sources in one, for
the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from guard.compiled import compile_guard
from guard.ranges import Range, RangeSet
from guard.registry import Registry, bitmap_rule, deny_rule
from tests.pace import patience

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PROGRAMS = ("api", "dd", "fuzz", "verdicts")
CORE = ("liboldmem_guard", "guardfile", "sum64", "bulk", "gate", "pageset", "corefile", "tally", "sigbus", "physmem")
SOURCES = [ROOT / "guard/csrc" / f"{name}.c" for name in CORE]
# of the library that "oldmem run" preloads, but for the functions that it puts in front of libc's
INSIDE = [ROOT / "capture/csrc" / f"{name}.c" for name in ("composer", "compose", "window", "faults", "vma")]
WARNINGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")
PAGE = 4096
TIMEOUT = 1500.0  # seconds, of one run with sanitizers on a machine that is busy with other things
FATAL = "-fno-sanitize-recover=all"
ASAN_FLAGS = ("-fsanitize=address,undefined", FATAL)


def missing(*tools: str) -> str | None:
    """Why nothing can be built here, and run with *tools*; None where it can."""
    absent = [tool for tool in ("gcc", "make", *tools) if not shutil.which(tool)]
    return f"no {absent[0]}" if absent else None


def run(*command: str | Path, status: int = 0, timeout: float = 120) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=patience(timeout), check=False)
    if done.returncode != status:
        told = (done.stdout[-2000:] + done.stderr[-4000:]).decode(errors="replace")
        raise AssertionError(f"{' '.join(map(str, command))[:500]}: status {done.returncode}\n{told}")
    return done


def build_shared(into: Path) -> None:
    """The library as ``make lib`` makes it, and every program linked with it."""
    run("make", "-s", "lib", f"LIB_OUT={into}")
    for name in PROGRAMS:
        libs = (f"-L{into}", "-loldmem_guard", f"-Wl,-rpath,{into}")
        run("gcc", "-O2", *WARNINGS, "-pthread", "-Iinclude", HERE / f"{name}.c", *libs, "-o", into / name)


OPTIONS = (
    *("-g", "-O1", "-fno-omit-frame-pointer", *WARNINGS, "-pthread"),
    *("-Iinclude", "-Iguard/csrc", "-Icapture/csrc"),
)


def build_all(into: Path, *flags: str) -> Path:
    """All sources of the library and the inside of "oldmem run" in one object, for many programs."""
    out = into / "all.o"
    run("gcc", *OPTIONS, *flags, "-r", *SOURCES, *INSIDE, "-o", out, timeout=600)
    return out


def build_static(into: Path, name: str, *flags: str, built: Path | None = None) -> Path:
    """One program with all sources of the library in it, which may have been *built* already with the same flags."""
    out = into / name
    run("gcc", *OPTIONS, *flags, HERE / f"{name}.c", built or build_all(into, *flags), "-o", out, timeout=600)
    return out


def build_other(into: Path, *flags: str) -> Path:
    """The library once more, for a program that has it already."""
    out = into / "other.so"
    run("gcc", *OPTIONS, *flags, "-shared", "-fPIC", "-fvisibility=hidden", *SOURCES, "-o", out, timeout=600)
    return out


def example() -> Registry:
    """What api.c expects."""
    registry = Registry()
    registry.register(deny_rule("balloon", RangeSet([(4 * PAGE, 8 * PAGE)]), "given back"))
    registry.register(bitmap_rule("device", Range(16 * PAGE, 32 * PAGE), 2 * PAGE, b"\xaa", "unplugged"))
    return registry


def write_files(folder: Path) -> tuple[Path, Path, Path]:
    """The example's guard, an image that ends behind page 59, and a guard that is cut."""
    guard, image, damaged = folder / "example.guard", folder / "image", folder / "cut.guard"
    compiled = compile_guard(example())
    guard.write_bytes(compiled)
    damaged.write_bytes(compiled[:-1])
    image.write_bytes(b"".join(bytes([page + 1]) * PAGE for page in range(60)))
    return guard, image, damaged


def write_damages(folder: Path, compiled: bytes) -> list[Path]:
    """*compiled* cut at every byte, and with every bit flipped: a file each."""
    made = []
    for cut in range(len(compiled)):
        made.append(folder / f"cut{cut}")
        made[-1].write_bytes(compiled[:cut])
    for bit in range(len(compiled) * 8):
        made.append(folder / f"flip{bit}")
        changed = bytearray(compiled)
        changed[bit // 8] ^= 1 << bit % 8
        made[-1].write_bytes(changed)
    return made
