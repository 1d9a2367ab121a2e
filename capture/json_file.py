# SPDX-License-Identifier: LGPL-2.1-or-later
"""A JSON file that may come from anybody, looked at value by value: each complaint names its place in the file."""

from __future__ import annotations

import json
import os
import stat
from typing import Any, NoReturn

from capture.sources.report import one_line, shown
from guard.errors import SourceError

U64 = (1 << 64) - 1


def error(line: str) -> SourceError:
    """The error with this line, made fit for one."""
    return SourceError(one_line(line))


def found(value: object) -> str:
    """What *value* is, in the words of JSON."""
    if isinstance(value, str):
        return f"string {shown(value)}"
    if value is None or isinstance(value, bool | float):
        return json.dumps(value)
    return "an array" if isinstance(value, list) else "an object" if isinstance(value, dict) else "a number"


class Object:
    """A JSON object being checked. Knows its place in the file, so that every complaint can name it."""

    __slots__ = ("_file", "_items", "_path")

    def __init__(self, file: str, path: str, value: object) -> None:
        self._file = file
        self._path = path
        if not isinstance(value, dict):
            raise error(f"{file}: {path or 'top level'}: {found(value)} found, expected an object")
        self._items: dict[str, Any] = value

    def place(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def fail(self, key: str, why: str) -> NoReturn:
        raise error(f"{self._file}: {self.place(key)}: {why}")

    def has(self, key: str) -> bool:
        """True if *key* is there and not null."""
        return self._items.get(key) is not None

    def _get(self, key: str) -> Any:
        if key not in self._items:
            self.fail(key, "is missing")
        return self._items[key]

    def integer(self, key: str, default: int | None = None, high: int = U64) -> int:
        value = default if default is not None and key not in self._items else self._get(key)
        return self.checked_integer(key, value, high)

    def checked_integer(self, place: str, value: object, high: int = U64) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(place, f"{found(value)} found, expected an integer")
        if not 0 <= value <= high:
            # str() of a number of thousands of digits may raise, hex() does not.
            self.fail(place, f"{shown(hex(value))} is out of range, expected 0 to {high:#x}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A non-empty string that can be a path."""
        value = default if default is not None and key not in self._items else self._get(key)
        if not isinstance(value, str):
            self.fail(key, f"{found(value)} found, expected a string")
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            value = ""
        if not value or "\0" in value:
            self.fail(key, "this string can be no file name: it is empty, or has NUL or lone surrogates in it")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self._items.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"{found(value)} found, expected true or false")
        return value

    def array(self, key: str) -> list[Any]:
        value = self._get(key)
        if not isinstance(value, list):
            self.fail(key, f"{found(value)} found, expected an array")
        return value

    def objects(self, key: str, required: bool = True) -> list[Object]:
        items = self.array(key) if required or key in self._items else []
        return [Object(self._file, f"{self.place(key)}[{i}]", item) for i, item in enumerate(items)]


def read(file: str, most: int) -> object:
    """What the regular file *file*, of at most *most* bytes, holds. Raises SourceError."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{file}: is not a regular file")
        if status.st_size > most:
            raise error(f"{file}: has {status.st_size} bytes, expected at most {most}")
        with open(file, "rb") as stream:
            data = stream.read(most)
    except OSError as e:
        raise error(f"{file}: {e.strerror}") from None
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        column = e.start - data.rfind(b"\n", 0, e.start)
        raise error(f"{file}:{line}:{column}: byte is not UTF-8") from None
    except json.JSONDecodeError as e:
        raise error(f"{file}:{e.lineno}:{e.colno}: not JSON: {e.msg}") from None
    except ValueError:
        raise error(f"{file}: holds a number of more digits than Python converts") from None
    except RecursionError:
        raise error(f"{file}: is nested too deeply") from None
