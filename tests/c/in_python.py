# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests in Python, those that serve vmcores to other processes among them, over a core and a library of ``oldmem run``
that have AddressSanitizer and UBSan. A part of ``make sanitize``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.c import ASAN_FLAGS, INSIDE, ROOT, SOURCES, TIMEOUT, run

# Each must match at least one file of tests
TESTS = (
    *("compiled", "corefile", "gate", "guarded_memory", "physmem", "registry_threads", "save", "vmcore"),
    *("witness_memmap", "../image/test_done", "../image/test_dump", "../image/test_fuse*", "../image/test_run*"),
)

# Not with ASan in all that they start, but whole without: test, and why
EXCEPT = {
    "tests/image/test_run_readers.py::test_common_program_gives_the_saved_bytes[curl]": "hangs, with or without us",
    "tests/image/test_run.py::test_collector_without_room_for_more_mappings_gets_the_bytes": "nor has ASan any",
    "tests/image/test_done.py::test_nothing_is_mounted_where_no_proc_could_tell_of_it": "ASan wants /proc",
}

# What tests look on with, that hangs too, and that need not have ASan
WITHOUT = ("pgrep",)

# dd and split ask for a size that is no multiple of the alignment, which glibc gives, and ASan ends them for that
SHIM = "#include <malloc.h>\nvoid *aligned_alloc(size_t alignment, size_t n) { return memalign(alignment, n); }\n"


def files() -> list[str]:
    """The files of TESTS."""
    found = []
    for name in TESTS:
        matches = sorted((ROOT / "tests/unit").glob(f"{name}.py" if "/" in name else f"test_{name}.py"))
        if not matches:
            raise AssertionError(f"no tests of the name {name}")
        found += [str(p.resolve().relative_to(ROOT)) for p in matches]
    return found


def build(folder: Path) -> None:
    """The tree with a core and a library that have the sanitizers. No C source may be in neither that nor a program."""
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_core.c")
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in ("build", "dist"):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=ignored)
        else:
            shutil.copy(path, folder)
    flags = " ".join(("-g", "-O1", "-fno-omit-frame-pointer", *ASAN_FLAGS, "-fsanitize-undefined-trap-on-error"))
    command = (
        "-W",
        "ignore",
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        folder,
        "--build-temp",
        folder / "temp",
    )
    run("env", f"CFLAGS={flags}", f"LDFLAGS={flags}", sys.executable, *command, timeout=TIMEOUT)
    sources = {p.stem for part in ("guard", "capture") for p in (ROOT / part / "csrc").glob("*.c")}
    if left := sources - {p.stem for p in (*folder.glob("temp/**/*.o"), *SOURCES, *INSIDE)}:
        raise AssertionError(f"built with no sanitizer: {', '.join(sorted(left))}")


def environment(folder: Path, reports: Path) -> dict[str, str]:
    """What each process of the tests must have, also those that know nothing of it."""
    shim = folder / "shim.so"
    gcc = ("gcc", "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", shim)
    subprocess.run(gcc, input=SHIM.encode(), timeout=TIMEOUT, check=True)
    (folder / "bin").mkdir()
    for name in WITHOUT:
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec env -u LD_PRELOAD {shutil.which(name)} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    runtime = run("gcc", "-print-file-name=libasan.so").stdout.decode().strip()
    # "oldmem run" puts its library in front of what is preloaded already, the runtime among it; that needs the runtime,
    # which is therefore initialised first all the same. What Python never frees is no leak of ours. A SIGBUS that is
    # passed on ends a process as it does without ASan. What servers and collectors write may be seen by nobody, so all
    # is written to files; for UBSan that is done by trapping, and by ASan, which tells of it.
    asan = f"detect_leaks=0:verify_asan_link_order=0:handle_sigbus=0:handle_sigill=1:log_path={reports}/report"
    return {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "LD_PRELOAD": f"{shim} {runtime}",
        "ASAN_OPTIONS": asan,
        "PYTHONMALLOC": "malloc",  # its own allocator would hide what is freed
        "PYTHONPATH": str(folder),
        "CI": "true",  # nothing may be skipped for want of something
    }


def check(folder: Path) -> str:
    """Run the tests; pytest's last line. Raises AssertionError for a test that fails, and for all that a sanitizer has
    found in any process."""
    build(folder)
    reports = folder / "reports"
    reports.mkdir()
    under = ("env", "-C", str(folder), *(f"{name}={value}" for name, value in environment(folder, reports).items()))
    where = "import os, capture.run, guard._core as c; os.chdir('/'); print(c.__file__, capture.run.LIBRARY, sep='\\n')"
    for path in run(*under, sys.executable, "-c", where).stdout.decode().split():
        if not path.startswith(f"{folder}/") or b"__asan_init" not in Path(path).read_bytes():
            raise AssertionError(f"{path}: has no sanitizer")
    collected = run(*under, sys.executable, "-m", "pytest", "--collect-only", "-q", *files(), timeout=TIMEOUT).stdout
    if gone := set(EXCEPT) - set(collected.decode().splitlines()):
        raise AssertionError(f"to be left out, but not there: {', '.join(sorted(gone))}")
    left_out = (f"--deselect={test}" for test in EXCEPT)
    options = ("-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider", "--hypothesis-profile=ci")
    command = (sys.executable, "-m", "pytest", *options, "-o", f"timeout={TIMEOUT:.0f}", *left_out)
    done = run(*under, *command, *files(), timeout=2 * TIMEOUT)
    for report in reports.iterdir():
        raise AssertionError(f"in some process of the tests:\n{report.read_text(errors='replace')[:4000]}")
    return done.stdout.decode().strip().splitlines()[-1]
