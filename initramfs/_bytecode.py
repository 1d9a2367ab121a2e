# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs inside the interpreter being packed: compiles the sources listed on standard input, without docstrings and
asserts.

Each line: source, name to appear in tracebacks, output file, separated by tabs. The output is the sourceless form
(importlib: SourcelessFileLoader), marked "unchecked hash" (PEP 552), so that no time stamp gets into it."""

from __future__ import annotations

import py_compile
import sys


def _compile(source: str, shown: str, output: str) -> int:
    try:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(source, output, shown, doraise=True, optimize=2, invalidation_mode=mode)
    except (OSError, py_compile.PyCompileError) as error:
        sys.stderr.write(f"{source}: {str(error).splitlines()[-1]}\n")
        return 1
    return 0


def main() -> int:
    for line in sys.stdin.read().splitlines():
        if _compile(*line.split("\t")):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
