# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs inside the interpreter being packed: compiles the sources listed on standard input, without docstrings and
asserts.

Tracebacks have the lines of our own code; the tables for that of the standard library are left out, some 100 KB.

Each line: source, name to appear in tracebacks, output file, separated by tabs. The output is the sourceless form
(importlib: SourcelessFileLoader), marked "unchecked hash" (PEP 552), so that no time stamp gets into it."""

from __future__ import annotations

import marshal
import py_compile
import sys
import sysconfig
from types import CodeType

_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + "/"
_HEADER = 16  # bytes before the marshalled code (PEP 552)


def _without_lines(code: CodeType) -> CodeType:
    """*code* whose places have no line: an empty table is one that ends before any (Objects/locations.md, 3.11+)."""
    constants = (_without_lines(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_linetable=b"", co_consts=tuple(constants))


def _compile(source: str, shown: str, output: str) -> int:
    try:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(source, output, shown, doraise=True, optimize=2, invalidation_mode=mode)
    except (OSError, py_compile.PyCompileError) as error:
        sys.stderr.write(f"{source}: {str(error).splitlines()[-1]}\n")
        return 1
    if source.startswith(_STANDARD_LIBRARY):
        with open(output, "rb") as file:
            data = file.read()
        with open(output, "wb") as file:
            file.write(data[:_HEADER] + marshal.dumps(_without_lines(marshal.loads(data[_HEADER:]))))
    return 0


def main() -> int:
    for line in sys.stdin.read().splitlines():
        if _compile(*line.split("\t")):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
