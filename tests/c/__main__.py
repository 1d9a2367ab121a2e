# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make sanitize``: the C core and the C tests with AddressSanitizer and UBSan, with ThreadSanitizer, and under
valgrind where there is one. A line for each run; what any of them finds ends it with status 1."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from guard.compiled import compile_guard
from tests.c import build_static, example, missing, run, write_damages, write_files

FATAL = "-fno-sanitize-recover=all"
MODES = {
    "ASan and UBSan": ("-fsanitize=address,undefined", FATAL),
    "TSan": ("-fsanitize=thread", FATAL),
    "valgrind": (),
}
VALGRIND = ("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full")
BATCH = 500  # files that one run is given


def check(mode: str, folder: Path) -> None:
    guard, image, damaged = write_files(folder)
    under = VALGRIND if mode == "valgrind" else ()
    # all damages at once say nothing about threads, and take valgrind minutes
    damages = write_damages(folder, compile_guard(example())) if mode == "ASan and UBSan" else [damaged]
    runs: dict[str, list[str | Path]] = {
        "api": [guard, image, damaged],
        "verdicts": [guard, "0", "80"],
        "dd": [guard, image, "0", "0x50000"],
    }
    for name, arguments in runs.items():
        run(*under, build_static(folder, name, *MODES[mode]), *arguments, timeout=300)
        print(f"{mode}: {name}: clean", flush=True)
    fuzz = build_static(folder, "fuzz", *MODES[mode])
    for i in range(0, len(damages), BATCH):
        run(*under, fuzz, guard, *damages[i : i + BATCH], timeout=300)
    print(f"{mode}: fuzz, {len(damages)} damaged files: clean", flush=True)


def main() -> int:
    if reason := missing():
        print(f"sanitize: {reason}", file=sys.stderr)
        return 1
    for mode in MODES:
        if mode == "valgrind" and not shutil.which("valgrind"):
            print("valgrind: skipped: there is none", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(mode, Path(folder))
            except AssertionError as e:
                print(f"{mode}: {e}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
