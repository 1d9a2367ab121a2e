# SPDX-License-Identifier: LGPL-2.1-or-later
"""liboldmem_guard as a program without a C compiler would use it: by its header, through dlopen(3)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cffi import FFI

from tests.c import ROOT, run

HEADER = ROOT / "include/oldmem_guard.h"


class Library:
    """The shared library, built into *folder*."""

    def __init__(self, folder: Path) -> None:
        run("make", "-s", "lib", f"LIB_OUT={folder}")
        text = re.sub(r"#ifdef __cplusplus.*?#endif", "", HEADER.read_text(), flags=re.DOTALL)
        self.ffi: Any = FFI()
        self.ffi.cdef(re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE))
        self.lib: Any = self.ffi.dlopen(str(folder / "liboldmem_guard.so.0"))

    def open(self, guard: Path | str) -> Handle:
        return Handle(self, str(guard))


class Handle:
    """One handle with a compiled guard; every call must succeed."""

    def __init__(self, library: Library, guard: str) -> None:
        self._ffi, self._lib = library.ffi, library.lib
        made = self._ffi.new("oldmem_guard **")
        assert self._lib.oldmem_guard_new(made) == 0
        self._guard = made[0]
        self._good(self._lib.oldmem_guard_open(self._guard, guard.encode()))

    def close(self) -> None:
        self._lib.oldmem_guard_close(self._guard)

    def add_segment(self, fd: int, offset: int, paddr: int, size: int, how: int) -> None:
        self._good(self._lib.oldmem_guard_add_segment(self._guard, fd, offset, paddr, size, how))

    def is_ram(self, pfn: int) -> bool:
        return bool(self._answer("is_ram", "int *", pfn))

    def why(self, pfn: int) -> int:
        """Index of the rule, -1 where it is RAM."""
        return self._answer("why", "int *", pfn)

    def next_ram(self, pfn: int, end: int) -> int:
        return self._answer("next_ram", "uint64_t *", pfn, end)

    def next_refused(self, pfn: int, end: int) -> int:
        return self._answer("next_refused", "uint64_t *", pfn, end)

    def fill(self, pfn: int, n: int) -> list[bool]:
        words = self._ffi.new("uint64_t[]", (n + 63) // 64)
        self._good(self._lib.oldmem_guard_fill(self._guard, pfn, n, words))
        return [bool(words[i // 64] >> i % 64 & 1) for i in range(n)]

    def read(self, paddr: int, n: int) -> bytes:
        buffer = self._ffi.new("uint8_t[]", b"\xa5" * n)
        self._good(self._lib.oldmem_guard_read(self._guard, paddr, buffer, n))
        return bytes(self._ffi.buffer(buffer, n))

    def refused(self) -> dict[str, int]:
        """The rules in their order, with the pages that reads asked for and each turned into zeros."""
        name, pages = self._ffi.new("const char **"), self._ffi.new("uint64_t *")
        found = {}
        for i in range(self._answer("rules", "size_t *")):
            self._good(self._lib.oldmem_guard_rule(self._guard, i, name, self._ffi.NULL, pages))
            found[self._ffi.string(name[0]).decode()] = int(pages[0])
        return found

    def counters(self) -> tuple[int, int, int, int]:
        """bytes_read, bytes_refused, pages_refused, pages_failed."""
        c = self._ffi.new("oldmem_guard_counters *")
        self._good(self._lib.oldmem_guard_get_counters(self._guard, c, self._ffi.sizeof(c[0])))
        return c.bytes_read, c.bytes_refused, c.pages_refused, c.pages_failed

    def _answer(self, what: str, kind: str, *arguments: int) -> int:
        found = self._ffi.new(kind)
        self._good(getattr(self._lib, f"oldmem_guard_{what}")(self._guard, *arguments, found))
        return int(found[0])

    def _good(self, status: int) -> None:
        assert status == 0, self._ffi.string(self._lib.oldmem_guard_error(self._guard)).decode()
