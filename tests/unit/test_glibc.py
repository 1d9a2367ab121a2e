# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is built runs on the oldest C library that is still in the field: glibc 2.28 (RHEL 8, Debian 10), which is also
what manylinux_2_28 promises. A symbol that glibc has changed since binds a file to the later version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

import capture
import guard._core
from tests.c import missing, run

OLDEST = (2, 28)
CORE = Path(str(guard._core.__file__))
PRELOAD = Path(os.path.dirname(str(capture.__file__))) / "_preload.abi3.so"


def needed(path: Path) -> dict[str, set[str]]:
    """The versions of symbols that the file needs, by library."""
    with path.open("rb") as stream:
        found = [s for s in ELFFile(stream).iter_sections() if isinstance(s, GNUVerNeedSection)]
        return {str(need.name): {str(v.name) for v in versions} for s in found for need, versions in s.iter_versions()}


def too_new(path: Path) -> list[str]:
    """Those that glibc 2.28 does not have, each with its library."""
    versions = {(library, version) for library, names in needed(path).items() for version in names}
    assert versions, f"{path} needs nothing of libc"
    return sorted(f"{version} of {library}" for library, version in versions if not is_old(version))


def is_old(version: str) -> bool:
    name, _, number = version.partition("_")
    if name != "GLIBC":
        return name == "GCC"
    try:
        return tuple(map(int, number.split("."))) <= (*OLDEST, 0)
    except ValueError:  # GLIBC_ABI_DT_RELR (2.36), GLIBC_PRIVATE
        return False


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("GLIBC_2.2.5", True),
        ("GLIBC_2.28", True),
        ("GLIBC_2.29", False),
        ("GLIBC_2.34", False),
        ("GLIBC_ABI_DT_RELR", False),
        ("GLIBC_PRIVATE", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, old: bool) -> None:
    assert is_old(version) == old


def test_core_runs_with_glibc_2_28() -> None:
    assert too_new(CORE) == []


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_c_library_runs_with_glibc_2_28(tmp_path: Path) -> None:
    run("make", "-s", "lib", f"LIB_OUT={tmp_path}")
    assert too_new(tmp_path / "liboldmem_guard.so.0") == []


def test_library_inside_of_collectors_runs_with_glibc_2_28() -> None:
    assert too_new(PRELOAD) == []
