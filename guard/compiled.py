# SPDX-License-Identifier: LGPL-2.1-or-later
"""A registry's rules as a file that a C program maps and asks (liboldmem_guard): writing one, and reading one back.

The format is that of guard/csrc/guardfile.c, which also checks what is read; docs/design.md, "A compiled guard", has it
byte by byte. The same rules are the same bytes, whoever writes them."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from array import array
from typing import TYPE_CHECKING

from guard import whole_file
from guard._core import ffi, lib
from guard.errors import Error, SourceError
from guard.pageset import PageSet
from guard.ranges import Range
from guard.registry import Registry, Rule

if TYPE_CHECKING:
    from guard._core import CData

MAGIC, BYTE_ORDER_MARK = b"OLDMEMGD", 0x01020304
HEADER = struct.Struct("=8sIIQIIQQ16x")
ENTRY = struct.Struct("=7Q6I")
SUM = struct.Struct("=Q")
DENY = 1
VERSION, ALIGN, MAX_RULES = lib.GUARDFILE_VERSION, lib.GUARDFILE_ALIGN, lib.GUARDFILE_MAX_RULES
WHY = 256  # bytes for the one line that says what is wrong


def _text(text: str) -> bytes:
    """One line, whatever a rule was called: what is not printable is escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode("utf-8", "backslashreplace")


def _array(c: CData) -> bytes:
    """The words of a struct pageset; bits of the last one behind the bitmap's end are 0."""
    if not c.pages_per_bit:
        return bytes(ffi.buffer(c.data, c.n * 16)) if c.n else b""
    words = bytearray(ffi.buffer(c.data, (c.n + 63) // 64 * 8) if c.n else b"")
    if c.n % 64:
        SUM.pack_into(words, len(words) - 8, SUM.unpack_from(words, len(words) - 8)[0] & (1 << c.n % 64) - 1)
    return bytes(words)


def _pad(data: bytearray) -> None:
    data.extend(bytes(-len(data) % ALIGN))


def compile_guard(registry: Registry) -> bytes:
    """The bytes of a compiled guard of the rules in force, in the byte order of this machine.

    What a rule answered in trouble is in its pages; policies and troubled ranges are not kept. Raises Error if there
    are too many rules, or one that no file can say."""
    rules, gate = registry.in_force()
    if len(rules) > MAX_RULES:
        raise Error(f"{len(rules)} rules: a compiled guard has at most {MAX_RULES}")
    texts = bytearray()
    texts_at = HEADER.size + len(rules) * ENTRY.size
    places = []
    for rule in rules:
        for text in (_text(rule.name), _text(rule.reason)):
            places += [texts_at + len(texts), len(text)]
            texts += text + b"\0"
    texts_size = len(texts)
    data = bytearray(texts_at) + texts
    del texts
    _pad(data)
    for i, rule in enumerate(rules):
        c = gate.rules[i]
        shape = (c.first, c.end, c.set.first, c.set.end, c.set.pages_per_bit, c.set.n, len(data))
        ENTRY.pack_into(data, HEADER.size + i * ENTRY.size, *shape, *places[4 * i : 4 * i + 4], DENY * rule.deny, 0)
        data += _array(c.set)
        _pad(data)
    shift = registry.page_size.bit_length() - 1
    size = len(data) + SUM.size
    HEADER.pack_into(data, 0, MAGIC, BYTE_ORDER_MARK, VERSION, size, shift, len(rules), texts_at, texts_size)
    data += SUM.pack(lib.guardfile_sum(ffi.from_buffer("char[]", data), len(data)))
    why = ffi.new("char[]", WHY)
    if lib.guardfile_check(ffi.new("struct guardfile *"), ffi.from_buffer("char[]", data), len(data), why, WHY):
        raise Error(f"these rules cannot be compiled: {_line(why)}")
    return bytes(data)


def write_guard(registry: Registry, path: str) -> None:
    """Put a compiled guard at *path*, all of it or nothing: who has the earlier one open keeps that.

    Raises Error where it cannot be written, or where something that is no file is there."""
    data = compile_guard(registry)
    path = os.path.realpath(path)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise Error(f"{path}: is no regular file, and will not be replaced by one")
        whole_file.replace(path, data)
    except OSError as e:
        raise Error(f"{path}: {e.strerror}") from None


def _line(text: CData) -> str:
    return ffi.string(text).decode("utf-8", "backslashreplace")


def open_guard(path: str) -> Registry:
    """The rules of the compiled guard at *path*, as a registry of its own that no longer needs the file.

    Raises SourceError with one line where it is none, damaged, or of another version or byte order."""
    f = ffi.new("struct guardfile *")
    why = ffi.new("char[]", WHY)
    if lib.guardfile_open(f, os.fsencode(path), why, WHY):
        raise SourceError(f"{path}: {_line(why)}")
    try:
        return _registry(f)
    except ValueError as e:
        raise SourceError(f"{path}: {e}") from None
    finally:
        lib.guardfile_close(f)


def parse_guard(data: bytes) -> Registry:
    """As :func:`open_guard`, of the bytes that :func:`compile_guard` makes."""
    f = ffi.new("struct guardfile *")
    why = ffi.new("char[]", WHY)
    mapped = ffi.from_buffer("char[]", data)
    if lib.guardfile_check(f, mapped, len(data), why, WHY):
        raise SourceError(_line(why))
    try:
        return _registry(f)
    except ValueError as e:
        raise SourceError(str(e)) from None


def _registry(f: CData) -> Registry:
    registry = Registry(1 << f.page_shift)
    for i in range(f.n):
        registry.register(_rule(f, i))
    return registry


def _rule(f: CData, i: int) -> Rule:
    c, texts = ffi.new("struct gate_rule *"), ffi.new("char *[2]")
    lib.guardfile_rule(f, i, c, texts, texts + 1)
    n, per = c.set.n, c.set.pages_per_bit
    words = array("Q")
    words.frombytes(ffi.buffer(c.set.data, (n + 63) // 64 * 8 if per else n * 16))
    pages = PageSet(c.set.first, c.set.end, words, n, per, f.page_shift)
    domain = Range(c.first << f.page_shift, c.end << f.page_shift)
    return Rule(_line(texts[0]), domain, pages, bool(c.deny), _line(texts[1]))
