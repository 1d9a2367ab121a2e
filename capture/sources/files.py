# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bounded reading of /sys and /proc files below a root: "/" or the root folder of a recorded machine.

A recorded machine may come from anybody, so nothing in it may lead out of its root, block (a FIFO) or be read without
bound."""

from __future__ import annotations

import os
import stat

from .report import Problems, shown

MAX_TABLE = 1 << 20
"""Bytes: the largest firmware table worth reading; real ones have a few KiB."""

_MAX_ENTRIES = 1 << 17

Seen = dict[str, bytes | int | None]
"""What was there of all that was asked for, by its name below the root: the bytes of a file, the size of one that was
too large to be read, None for a folder."""

seen: Seen | None = None
"""Where set before anything is read, it has in the end what a record needs to give the same answers."""


def _saw(relative: str, data: bytes | int | None) -> None:
    if seen is not None:
        seen[relative] = data


def under(root: str, relative: str) -> str:
    """The path to show and to open for *relative* (never starting with a slash) below *root*."""
    return os.path.join(root, relative)


def resolve(root: str, relative: str) -> str:
    """The real path of *relative* below *root*; PermissionError if a symbolic link leads out of *root*."""
    base = os.path.realpath(root)
    real = os.path.realpath(os.path.join(base, relative))
    if not real.startswith(base.rstrip("/") + "/"):
        raise PermissionError(0, f"symbolic link leads out of {root}")
    return real


def read_file(root: str, relative: str, limit: int, problems: Problems) -> bytes | None:
    """The whole of a regular file of at most *limit* bytes; otherwise None, and a problem says why."""
    path = under(root, relative)
    try:
        real = resolve(root, relative)
        status = os.stat(real)
        if not stat.S_ISREG(status.st_mode):
            problems.add(f"{path}: is not a regular file; ignored")
            return None
        # sysfs and procfs files may state a size of 0, so a size that is too large is only the early way out.
        data = _read_up_to(real, limit + 1) if status.st_size <= limit else None
    except OSError as error:
        _refused(path, "read", error, problems)
        return None
    _saw(relative, status.st_size if data is None else data)
    if data is None or len(data) > limit:
        size = f"{status.st_size} bytes" if data is None else f"more than {limit} bytes"
        problems.add(f"{path}: has {size}, expected at most {limit}; ignored")
        return None
    return data


def _refused(path: str, done: str, error: OSError, problems: Problems) -> None:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        problems.absent(path)
    else:
        problems.add(f"{path}: cannot be {done} ({error.strerror}); ignored")


def _read_up_to(path: str, limit: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        data = bytearray()
        while len(data) < limit:
            chunk = os.read(fd, min(65536, limit - len(data)))
            if not chunk:
                break
            data += chunk
        return bytes(data)
    finally:
        os.close(fd)


def read_line(root: str, relative: str, problems: Problems) -> str | None:
    """The text of a one-value sysfs attribute without its newline, None (and a problem) if it cannot be read."""
    data = read_file(root, relative, 4096, problems)
    return None if data is None else data.decode("ascii", "backslashreplace").rstrip("\n")


def is_folder(root: str, relative: str) -> bool:
    """True if *relative* is a folder below *root*."""
    try:
        there = os.path.isdir(resolve(root, relative))
    except OSError:
        return False
    if there:
        _saw(relative, None)
    return there


def numbered(root: str, relative: str, prefix: str, problems: Problems) -> list[int] | None:
    """Ascending numbers N of the entries called prefixN in a folder, None (and a problem) if it cannot be listed."""
    path = under(root, relative)
    found: list[int] = []
    try:
        with os.scandir(resolve(root, relative)) as entries:
            _saw(relative, None)
            for entry in entries:
                number = decimal(entry.name[len(prefix) :]) if entry.name.startswith(prefix) else None
                if number is None:
                    continue
                if len(found) == _MAX_ENTRIES:
                    problems.add(f"{path}: has more than {_MAX_ENTRIES} entries {prefix}N; the rest is ignored")
                    break
                found.append(number)
                if seen is not None and entry.is_dir():
                    _saw(f"{relative}/{entry.name}", None)
    except OSError as error:
        _refused(path, "listed", error, problems)
        return None
    return sorted(found)


def decimal(text: str) -> int | None:
    """The number in *text*, which is nothing but its decimal digits without leading zeros; None if it is anything
    else."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        return None
    return int(text) if text == "0" or text[0] != "0" else None


def hexadecimal(text: str) -> int | None:
    """The number in *text*: 1 to 16 hexadecimal digits, with or without 0x; None if it is anything else."""
    digits = text.removeprefix("0x")
    if not 1 <= len(digits) <= 16 or digits.strip("0123456789abcdefABCDEF"):
        return None
    return int(digits, 16)


def read_hexadecimal(root: str, relative: str, problems: Problems) -> int | None:
    """The value of a one-number sysfs attribute in hexadecimal; None (and a problem) if it cannot be read or is
    none."""
    text = read_line(root, relative, problems)
    if text is None:
        return None
    value = hexadecimal(text)
    if value is None:
        problems.add(f"{under(root, relative)}: expected a hexadecimal number, found {shown(text)}; ignored")
    return value
