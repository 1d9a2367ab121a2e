# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ranges that the user names, as /proc/iomem prints them: 40000000-4fffffff, hexadecimal, the end inclusive; 0x may
stand before a number. In a file one a line; what follows the range after white space or a # is for people."""

from __future__ import annotations

import os

from guard.errors import Error
from guard.ranges import Range, RangeSet
from guard.registry import Rule, allow_rule, deny_rule

DENIED, ALLOWED = "denied", "allowed"
_MAX_FILE = 16 << 20
_END = 1 << 64


def deny(ranges: RangeSet, page_size: int = 4096) -> Rule:
    """Refuses every page that *ranges* touches."""
    return deny_rule(DENIED, ranges, "denied by the user", page_size)


def allow(ranges: RangeSet, page_size: int = 4096) -> Rule:
    """Refuses every page that does not lie wholly in *ranges*."""
    return allow_rule(ALLOWED, Range(0, _END), ranges, "not among what the user allowed", page_size)


def parse(words: list[str]) -> RangeSet:
    """The union of all *words*, each a range, or the name of a file of ranges. Raises Error with file and line."""
    found: list[Range] = []
    for word in words:
        if (one := _range(word)) is not None:
            found.append(one)
        elif os.path.exists(word):
            found += _read(word)
        else:
            raise Error(f"{word}: neither a range (40000000-4fffffff, hexadecimal) nor a file")
    return RangeSet(found)


def _read(path: str) -> list[Range]:
    try:
        with open(path, encoding="ascii", errors="backslashreplace") as file:
            text = file.read(_MAX_FILE + 1)
    except OSError as e:
        raise Error(f"{path}: {e.strerror}") from None
    if len(text) > _MAX_FILE:
        raise Error(f"{path}: is larger than {_MAX_FILE >> 20} MiB")
    found: list[Range] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        one = _range(words[0])
        if one is None:
            raise Error(f"{path}:{number}: {words[0][:40]!r} is no range, expected one like 40000000-4fffffff")
        found.append(one)
    return found


def _range(word: str) -> Range | None:
    first, dash, last = word.partition("-")
    try:
        start, end = int(first, 16), int(last, 16) + 1
    except ValueError:
        return None
    return Range(start, end) if dash and 0 <= start < end <= _END else None
