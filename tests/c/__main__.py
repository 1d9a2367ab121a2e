# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make sanitize``: every C program of this folder with AddressSanitizer and UBSan, with ThreadSanitizer, and under
valgrind; and tests in Python, those that serve vmcores to other processes among them, over a core and a library of
``oldmem run`` that have ASan and UBSan. A line for each run; what any of them finds ends it with status 1, and so does
a program, a source or a tool that would be left out."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from guard.compiled import compile_guard
from tests.c import (
    ASAN_FLAGS,
    FATAL,
    HERE,
    TIMEOUT,
    build_all,
    build_other,
    build_static,
    example,
    in_python,
    missing,
    run,
    write_damages,
    write_files,
)
from tests.c.plans import planned

ASAN, TSAN, VALGRIND = "ASan and UBSan", "TSan", "valgrind"
MODES = {
    ASAN: ASAN_FLAGS,
    TSAN: ("-fsanitize=thread", FATAL),
    VALGRIND: (),
}
UNDER_VALGRIND = (
    *("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full"),
    "--vex-iropt-register-updates=allregs-at-mem-access",  # an instruction that failed is tried again
)
BATCH = 500  # files that one run is given


class Built:
    """The sources built for one mode, and the files that programs are run with."""

    def __init__(self, mode: str, folder: Path) -> None:
        folder.mkdir()
        self.mode, self.folder = mode, folder
        self.flags = MODES[mode]
        self._all = build_all(folder, *self.flags)
        self.guard, self.image, self.damaged = write_files(folder)

    def run(self, name: str, *arguments: str | Path) -> None:
        program = self.folder / name
        if not program.exists():
            build_static(self.folder, name, *self.flags, built=self._all)
        run(*(UNDER_VALGRIND if self.mode == VALGRIND else ()), program, *arguments, timeout=TIMEOUT)


def _windows(b: Built) -> None:
    cut = Path(shutil.copy(b.image, b.folder / "cut"))
    with planned(b.folder, cut) as (plan, expected):
        b.run("windows", plan, expected, cut)


def _sigbus(b: Built) -> None:
    b.run("sigbus", b.guard, build_other(b.folder, *b.flags), "1201" if b.mode == VALGRIND else "41")


def _fuzz(b: Built) -> None:
    # all damages at once say nothing about threads, and take valgrind minutes
    damages = write_damages(b.folder, compile_guard(example())) if b.mode == ASAN else [b.damaged]
    for i in range(0, len(damages), BATCH):
        b.run("fuzz", b.guard, *damages[i : i + BATCH])


PROGRAMS: dict[str, Callable[[Built], None]] = {
    "api": lambda b: b.run("api", b.guard, b.image, b.damaged),
    "dd": lambda b: b.run("dd", b.guard, b.image, "0", "0x50000"),
    "fuzz": _fuzz,
    "gates": lambda b: b.run("gates", b.image),
    "sigbus": _sigbus,
    "verdicts": lambda b: b.run("verdicts", b.guard, "0", "80"),
    "windows": _windows,
}


def check(mode: str, folder: Path) -> None:
    built = Built(mode, folder)
    for name, work in PROGRAMS.items():
        work(built)
        print(f"{mode}: {name}: clean", flush=True)


def check_in_python(folder: Path) -> None:
    told = in_python.check(folder)
    print(f"{ASAN}: {len(in_python.TESTS)} kinds of tests in Python: clean: {told}", flush=True)


def main() -> int:
    reason = missing("valgrind")
    if left := {p.stem for p in HERE.glob("*.c")} ^ set(PROGRAMS):
        reason = f"not run, or not there: {', '.join(sorted(left))}"
    if reason:
        print(f"sanitize: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(check_in_python, Path(folder) / "python"): "in Python"}
        jobs |= {pool.submit(check, mode, Path(folder) / mode.replace(" ", "-")): mode for mode in MODES}
        for job in wait(jobs, return_when=FIRST_EXCEPTION).not_done:
            job.cancel()
    failed = {what: error for job, what in jobs.items() if not job.cancelled() and (error := job.exception())}
    for what, error in failed.items():
        print(f"{what}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
