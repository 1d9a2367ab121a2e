# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guard for C programs: the library as ``make lib`` builds it, C programs that know its header alone, and their
answers against those of Python."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings

from guard.compiled import compile_guard
from guard.ranges import Range
from guard.registry import Registry, bitmap_rule
from tests.c import ROOT, build_other, build_shared, build_static, example, missing, run, write_damages, write_files
from tests.c.plans import planned
from tests.unit.guard_files import PAGE, damages, registries, shown

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

HEADER = ROOT / "include/oldmem_guard.h"

# Three times one more mapping of both, of pages that the image does not have; then one of nobody's.
BOTH = """
import mmap, os, sys
from pathlib import Path
from guard.physmem import MMAP, OldMemory, Segment
from guard.registry import Registry
from tests.unit.guard_library import Library

folder, guard, image, first = sys.argv[1:]
PAGE = 4096
fd = os.open(image, os.O_RDONLY)
memories = []
handle = Library(Path(folder)).open(guard)

def python(at):
    memories.append(OldMemory([Segment(at, PAGE, fd, 60 * PAGE, MMAP, "image")], Registry()))

def library(at):
    handle.add_segment(fd, 60 * PAGE, at, PAGE, 1)

for turn in range(3):
    for add in (python, library) if first == "python" else (library, python):
        add((60 + turn) * PAGE)
    for m in memories:
        assert m.read(60 * PAGE, 3 * PAGE) == handle.read(60 * PAGE, 3 * PAGE) == bytes(3 * PAGE)
    print([f.errno for m in memories for f in m.faults() if f.errno != 6], handle.counters()[3], flush=True)
with open("/proc/self/fd/%d" % os.memfd_create("x"), "r+b") as file:
    file.truncate(PAGE)
    mapped = mmap.mmap(file.fileno(), PAGE)
    file.truncate(0)
mapped[0]
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the shared library and the programs."""
    folder = tmp_path_factory.mktemp("lib")
    build_shared(folder)
    return folder


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that opens files, with AddressSanitizer and UBSan."""
    return build_static(
        tmp_path_factory.mktemp("asan"), "fuzz", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    )


@pytest.mark.parametrize(
    "command",
    [
        ("gcc", "-std=c99", "-x", "c"),
        ("gcc", "-std=c17", "-x", "c"),
        pytest.param(
            ("g++", "-std=c++11", "-x", "c++"),
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here"),
        ),
    ],
    ids=lambda command: command[1],
)
def test_header_stands_alone_in_every_dialect(command: tuple[str, ...]) -> None:
    run(*command, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", HEADER)


def test_library_exports_the_functions_of_the_header_with_their_version_and_nothing_else(built: Path) -> None:
    declared = set(re.findall(r"\b(oldmem_guard_\w+)\(const|\b(oldmem_guard_\w+)\((?=oldmem)", HEADER.read_text()))
    names = {a or b for a, b in declared}
    library = built / "liboldmem_guard.so.0"
    lines = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[2] for line in lines.splitlines()} - {"OLDMEM_GUARD_0.1"}
    assert len(names) == 16
    assert exported == {f"{name}@@OLDMEM_GUARD_0.1" for name in names}
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    assert "Library soname: [liboldmem_guard.so.0]" in dynamic


def test_installed_library_is_found_by_its_pkg_config_file(built: Path, tmp_path: Path) -> None:
    run("make", "-s", "install-lib", f"LIB_OUT={built}", f"DESTDIR={tmp_path}/root", "PREFIX=/usr")
    root = tmp_path / "root/usr"
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir()) == [
        "include/oldmem_guard.h",
        "lib/liboldmem_guard.so",
        "lib/liboldmem_guard.so.0",
        "lib/pkgconfig/oldmem-guard.pc",
    ]
    text = (root / "lib/pkgconfig/oldmem-guard.pc").read_text()
    assert "@" not in text
    values = dict(re.findall(r"^(\w+)[=:] *(.*)$", text, re.MULTILINE))
    assert (values["prefix"], values["libdir"], values["Version"]) == ("/usr", "/usr/lib", "0.1.0")
    include, libs = f"-I{root}/include", f"-L{root}/lib"
    run("gcc", include, ROOT / "tests/c/dd.c", libs, "-loldmem_guard", "-o", tmp_path / "dd")


def test_every_function_with_right_and_wrong_arguments_and_many_threads(built: Path, tmp_path: Path) -> None:
    assert run(built / "api", *write_files(tmp_path)).stdout == b"all as it should be\n"


def test_each_copy_of_the_library_gets_its_own_faults_and_the_program_all_others(tmp_path: Path) -> None:
    guard, _, _ = write_files(tmp_path)
    program, other = build_static(tmp_path, "sigbus"), build_other(tmp_path)
    assert run(program, guard, other, "41").stdout == b"all as it should be\n"


@pytest.mark.parametrize("first", ["python", "library"])
def test_guards_for_python_and_for_c_catch_their_faults_in_one_process(built: Path, tmp_path: Path, first: str) -> None:
    guard, image, _ = write_files(tmp_path)
    done = run(sys.executable, "-c", BOTH, built, guard, image, first, status=-signal.SIGBUS)
    assert done.stdout.decode().splitlines() == ["[14] 3", "[14, 14] 9", "[14, 14, 14] 18"]


@pytest.mark.parametrize(("paddr", "size"), [(0, 60 * PAGE), (0, 70 * PAGE), (3 * PAGE + 100, 40 * PAGE + 7), (5, 0)])
def test_dd_of_an_image_gives_what_may_be_read_and_zeros(built: Path, tmp_path: Path, paddr: int, size: int) -> None:
    guard, image, _ = write_files(tmp_path)
    registry = example()
    pages = image.read_bytes().ljust(80 * PAGE, b"\0")
    shown_pages = (pages[p * PAGE : (p + 1) * PAGE] if registry.pfn_is_ram(p) else bytes(PAGE) for p in range(80))
    done = run(built / "dd", guard, image, str(paddr), str(size))
    assert done.stdout == b"".join(shown_pages)[paddr : paddr + size]
    touched = range(paddr // PAGE, (paddr + size + PAGE - 1) // PAGE if size else 0)
    refused = [rule.name for p in touched if (rule := registry.refuser(p))]
    told = done.stderr.decode()
    for name in ("balloon", "device"):
        assert (f"{name}: {refused.count(name)} pages refused: " in told) == (name in refused)
    assert f"{sum(p >= 60 for p in touched)} pages failed" in told


def test_dd_with_a_damaged_guard_is_one_line(built: Path, tmp_path: Path) -> None:
    _, image, damaged = write_files(tmp_path)
    done = run(built / "dd", damaged, image, "0", "4096", status=1)
    assert done.stdout == b""
    assert done.stderr.decode().splitlines() == [f"dd: {damaged}: has 0x{damaged.stat().st_size:x} bytes where its "
                                                 f"header says 0x{damaged.stat().st_size + 1:x}"]  # fmt: skip


def answers(registry: Registry, start: int, end: int) -> str:
    """What verdicts.c prints of the same rules."""
    names = [rule.name for rule in registry]
    lines = [f"{shown(rule.name)}: {shown(rule.reason)}" for rule in registry]
    for pfn in range(start, end):
        rule = registry.refuser(pfn)
        index = names.index(rule.name) if rule else -1
        lines.append(f"{index} {registry.next_ram(pfn, end)} {registry.next_refused(pfn, end)}")
    return "".join(line + "\n" for line in lines)


@pytest.mark.parametrize("pages_per_block", [1, 2, 3, 64])
def test_c_answers_as_python_does_across_the_words_of_a_bitmap(
    built: Path, tmp_path: Path, pages_per_block: int
) -> None:
    registry = Registry()
    domain = Range(7 * PAGE, (7 + 300 * pages_per_block) * PAGE)
    bitmap = random.Random(3).randbytes(40)
    registry.register(bitmap_rule("device", domain, pages_per_block * PAGE, bitmap, "unplugged"))
    guard = tmp_path / "guard"
    guard.write_bytes(compile_guard(registry))
    assert run(built / "verdicts", guard, "0", "400").stdout.decode() == answers(registry, 0, 400)


@settings(deadline=None)
@given(registries())
def test_c_answers_as_python_does_for_any_rules(built: Path, registry: Registry) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(compile_guard(registry))
        file.flush()
        for start, end in ((0, 420), ((1 << 52) - 70, 1 << 52)):
            done = run(built / "verdicts", file.name, str(start), str(end))
            assert done.stdout.decode() == answers(registry, start, end)


def statuses(fuzz: Path, *files: str | Path) -> list[int]:
    """What opening them gave; nothing else was printed, and a line each."""
    done = run(fuzz, *files)
    assert done.stderr == b""
    lines = done.stdout.decode().splitlines()
    assert len(lines) == len(files)
    return [int(line.split()[0]) for line in lines]


@pytest.mark.slow
def test_every_cut_and_every_flipped_bit_is_refused_under_asan(fuzz: Path, tmp_path: Path) -> None:
    files = write_damages(tmp_path, compile_guard(example()))
    for i in range(0, len(files), 500):
        assert set(statuses(fuzz, *files[i : i + 500])) <= {3, 4}


@settings(deadline=None, max_examples=60)
@given(damages(compile_guard(example())))
def test_damage_under_a_right_checksum_is_harmless_under_asan(fuzz: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        assert statuses(fuzz, file.name)[0] in {0, 3, 4}


def test_windows_of_a_collector_have_the_vmcores_bytes_in_every_thread(tmp_path: Path) -> None:
    _, image, _ = write_files(tmp_path)
    program = build_static(tmp_path, "windows", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    with planned(tmp_path, image) as (plan, expected):
        run(program, plan, expected, image)
