# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shared libraries of an ELF file: judged by ldd on the host's own programs, and on small libraries made here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import Error
from initramfs.elfdeps import Elf, Searcher, read_elf

PROGRAM = os.path.realpath(sys.executable)
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


def make_library(path: Path, *arguments: str, uses: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.stem.removeprefix("lib")
    call = f"int {uses}(void); int {name}(void) {{ return {uses}(); }}" if uses else f"int {name}(void) {{ return 1; }}"
    command = ["gcc", "-shared", "-fPIC", "-nostdlib", "-x", "c", "-", "-o", str(path), f"-Wl,-soname,{path.name}"]
    subprocess.run([*command, "-Wl,--no-as-needed", *arguments], input=call.encode(), check=True)


@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd")
@pytest.mark.parametrize("program", [PROGRAM, "/usr/bin/git", "/usr/bin/gdb", "/usr/bin/qemu-system-x86_64"])
def test_closure_is_what_ldd_says(program: str) -> None:
    if not os.path.exists(program):
        pytest.skip(f"no {program}")
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    expected = {os.path.basename(a): os.path.realpath(b) for a, b in re.findall(r"(\S+) => (/\S+)", said)}
    closure = Searcher().closure(program)
    found = {library.name: library.path for library in closure.libraries}
    assert closure.interp is not None
    assert f"{closure.interp.name} (" in said or closure.interp.name in expected
    assert found == {name: path for name, path in expected.items() if not name.startswith("ld-")}


@needs_gcc
@pytest.mark.parametrize("tags", ["--enable-new-dtags", "--disable-new-dtags"])
def test_origin_in_runpath_and_rpath_leads_to_bundled_libraries(tmp_path: Path, tags: str) -> None:
    make_library(tmp_path / "pkg.libs" / "libinner.so")
    make_library(
        tmp_path / "pkg" / "libouter.so",
        f"-L{tmp_path}/pkg.libs",
        "-linner",
        f"-Wl,{tags},-rpath,$ORIGIN/../pkg.libs",
        uses="inner",
    )
    closure = Searcher().closure(str(tmp_path / "pkg" / "libouter.so"))
    assert closure.interp is None
    assert [tuple(library) for library in closure.libraries] == [
        ("libinner.so", str(tmp_path / "pkg.libs/libinner.so"))
    ]


@needs_gcc
@pytest.mark.parametrize(("tags", "found"), [("--disable-new-dtags", True), ("--enable-new-dtags", False)])
def test_rpath_is_inherited_by_libraries_of_libraries_and_runpath_is_not(
    tmp_path: Path, tags: str, found: bool
) -> None:
    libs = tmp_path / "libs"
    make_library(libs / "libc1.so")
    make_library(libs / "libb1.so", f"-L{libs}", "-lc1", uses="c1")
    make_library(tmp_path / "liba1.so", f"-L{libs}", "-lb1", f"-Wl,{tags},-rpath,$ORIGIN/libs", uses="b1")
    if found:
        names = [library.name for library in Searcher().closure(str(tmp_path / "liba1.so")).libraries]
        assert names == ["libb1.so", "libc1.so"]
    else:
        with pytest.raises(Error, match=r"libb1\.so: needs libc1\.so, which is not found"):
            Searcher().closure(str(tmp_path / "liba1.so"))


@needs_gcc
def test_a_library_of_another_machine_is_passed_over(tmp_path: Path) -> None:
    make_library(tmp_path / "right" / "libinner.so")
    foreign = bytearray((tmp_path / "right" / "libinner.so").read_bytes())
    foreign[18] = 22  # EM_S390
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "libinner.so").write_bytes(foreign)
    paths = f"-Wl,-rpath,{tmp_path}/wrong:{tmp_path}/right"
    make_library(tmp_path / "libouter.so", f"-L{tmp_path}/right", "-linner", paths, uses="inner")
    (library,) = Searcher().closure(str(tmp_path / "libouter.so")).libraries
    assert library.path == str(tmp_path / "right" / "libinner.so")


@needs_gcc
def test_absolute_links_and_ld_so_conf_stay_inside_the_sysroot(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make_library(root / "opt" / "deep" / "libinner.so")
    make_library(root / "usr" / "lib" / "libouter.so", f"-L{root}/opt/deep", "-linner", uses="inner")
    (root / "etc" / "ld.so.conf.d").mkdir(parents=True)
    (root / "etc" / "ld.so.conf").write_text("include /etc/ld.so.conf.d/*.conf\n")
    (root / "etc" / "ld.so.conf.d" / "deep.conf").write_text("# a comment\n/shallow\n")
    (root / "shallow").symlink_to("/opt/deep")
    (library,) = Searcher(str(root)).closure(str(root / "usr/lib/libouter.so")).libraries
    assert library.path == str(root / "opt/deep/libinner.so")


def test_a_link_that_leads_to_itself_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("/loop")
    assert Searcher(str(tmp_path)).locate("/loop") is None


def test_not_an_elf_file_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "collector"
    script.write_text("#!/bin/sh\n" * 20)
    with pytest.raises(Error) as caught:
        read_elf(str(script))
    assert str(caught.value) == f"{script}: not an ELF file"


with open("/bin/sh", "rb") as _file:
    SHELL = _file.read()


@given(st.lists(st.tuples(st.integers(0, 1023), st.integers(0, 255)), max_size=8), st.integers(0, len(SHELL)))
def test_a_damaged_file_gives_an_error_and_nothing_else(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(SHELL)
    for offset, value in changes:
        data[offset] = value
    message = "sh: "
    try:
        Elf(bytes(data[:length]), "sh").sections()
    except Error as error:
        message = str(error)
    assert message.startswith("sh: ")
    assert "\n" not in message
