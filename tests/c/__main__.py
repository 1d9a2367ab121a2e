# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make sanitize``: the C core and the C tests with AddressSanitizer and UBSan, with ThreadSanitizer, and under
valgrind where there is one; and tests in Python, among them those with threads, over a core that has ASan and UBSan. A
line for each run; what any of them finds ends it with status 1."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from guard.compiled import compile_guard
from tests.c import ROOT, build_other, build_static, example, missing, run, write_damages, write_files
from tests.c.plans import planned

FATAL = "-fno-sanitize-recover=all"
MODES = {
    "ASan and UBSan": ("-fsanitize=address,undefined", FATAL),
    "TSan": ("-fsanitize=thread", FATAL),
    "valgrind": (),
}
VALGRIND = (
    *("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full"),
    "--vex-iropt-register-updates=allregs-at-mem-access",  # an instruction that failed is tried again
)
BATCH = 500  # files that one run is given
IN_PYTHON = [
    f"tests/unit/test_{name}.py"
    for name in ("registry_threads", "physmem", "corefile", "gate", "vmcore", "compiled", "witness_memmap")
]


def check(mode: str, folder: Path) -> None:
    guard, image, damaged = write_files(folder)
    under = VALGRIND if mode == "valgrind" else ()
    # all damages at once say nothing about threads, and take valgrind minutes
    damages = write_damages(folder, compile_guard(example())) if mode == "ASan and UBSan" else [damaged]
    runs: dict[str, list[str | Path]] = {
        "api": [guard, image, damaged],
        "verdicts": [guard, "0", "80"],
        "dd": [guard, image, "0", "0x50000"],
        "gates": [image],
    }
    for name, arguments in runs.items():
        run(*under, build_static(folder, name, *MODES[mode]), *arguments, timeout=300)
        print(f"{mode}: {name}: clean", flush=True)
    cut = Path(shutil.copy(image, folder / "cut"))
    with planned(folder, cut) as (plan, expected):
        run(*under, build_static(folder, "windows", *MODES[mode]), plan, expected, cut, timeout=300)
        print(f"{mode}: windows: clean", flush=True)
    other = build_other(folder, *MODES[mode])
    step = "1201" if mode == "valgrind" else "41"
    run(*under, build_static(folder, "sigbus", *MODES[mode]), guard, other, step, timeout=300)
    print(f"{mode}: sigbus: clean", flush=True)
    fuzz = build_static(folder, "fuzz", *MODES[mode])
    for i in range(0, len(damages), BATCH):
        run(*under, fuzz, guard, *damages[i : i + BATCH], timeout=300)
    print(f"{mode}: fuzz, {len(damages)} damaged files: clean", flush=True)


def check_in_python(folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_core.c")
    for name in ("guard", "capture", "tests/image", "tests/unit"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("tests/__init__.py", "tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    flags = " ".join(("-g", "-O1", "-fno-omit-frame-pointer", *MODES["ASan and UBSan"]))
    build = ("-W", "ignore", "setup.py", "--quiet", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp")
    run("env", f"CFLAGS={flags}", f"LDFLAGS={flags}", sys.executable, *build)
    runtime = [run("gcc", f"-print-file-name=lib{name}.so").stdout.decode().strip() for name in ("asan", "ubsan")]
    # Python's own allocator would hide what is freed; what Python never frees is no leak of ours
    under = (f"LD_PRELOAD={' '.join(runtime)}", "PYTHONMALLOC=malloc", "ASAN_OPTIONS=detect_leaks=0")
    options = ("-q", "-p", "no:cacheprovider", "-o", "timeout=400", "--hypothesis-profile=ci")
    run("env", "-C", folder, *under, sys.executable, "-m", "pytest", *options, *IN_PYTHON, timeout=480)
    print(f"ASan and UBSan: {len(IN_PYTHON)} files of tests in Python: clean", flush=True)


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
                if mode == "ASan and UBSan":
                    check_in_python(Path(folder) / "python")
            except AssertionError as e:
                print(f"{mode}: {e}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
