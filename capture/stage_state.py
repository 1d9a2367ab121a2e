# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one stage tells the next, as files in the folder STATE of its initramfs."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

from capture import newc
from capture.newc import Entry
from guard.errors import Error
from guard.ranges import Range

STATE = "/etc/oldmem-stage"

MEANT = "meant.json"
HEAD = "vmcore.head"  # the first bytes of /proc/vmcore, up to where memory begins
ORIGINAL = "elfcorehdr"  # what was where the header of stage 2 lies now
MAP, GUARD = "map.json", "guard.json"
WHY = "why"  # stage 2 was gone back from


class Meant(NamedTuple):
    """What stage 2 is to be, and the way back. *cmdline* is that of the capture kernel, *elfcorehdr* the physical
    address of its prepared header, *size* that of the vmcore in bytes; *given_up* the number of runs of readable memory
    that had no room, and their bytes; *lost* what was left out because nothing told its state. Without a /proc/vmcore
    of the capture kernel nothing tells which p_align it gives its PT_NOTE (*knows_note_align*)."""

    cmdline: str
    elfcorehdr: int | None
    size: int
    kernel: str
    initramfs: str | None
    given_up: tuple[int, int]
    lost: tuple[Range, ...]
    knows_note_align: bool = True

    def encode(self) -> bytes:
        return json.dumps(self._asdict()).encode()


def decode(data: bytes) -> Meant:
    """Raises Error where it is not what :meth:`Meant.encode` writes."""
    try:
        found: dict[str, Any] = json.loads(data)
        if found.keys() - set(Meant._fields):
            raise KeyError
        lost = tuple(Range(_int(start), _int(end)) for start, end in found["lost"])
        runs, size = found["given_up"]
        return Meant(
            _text(found["cmdline"]),
            None if found["elfcorehdr"] is None else _int(found["elfcorehdr"]),
            _int(found["size"]),
            _text(found["kernel"]),
            None if found["initramfs"] is None else _text(found["initramfs"]),
            (_int(runs), _int(size)),
            lost,
            bool(found.get("knows_note_align", True)),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise Error(f"{STATE}/{MEANT}: not what the stage before writes: {type(e).__name__}") from None


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def archive(files: Mapping[str, bytes]) -> bytes:
    """*files* of STATE as the first part of an initramfs."""
    folder = STATE.strip("/")
    entries = [Entry(path, stat.S_IFDIR | 0o755) for path in ("dev", os.path.dirname(folder), folder)]
    # what a mounted /dev hides of a running root that is packed again: the kernel opens it for init
    entries.append(Entry("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)))
    return newc.archive([*entries, *(Entry(f"{folder}/{name}", stat.S_IFREG | 0o600, d) for name, d in files.items())])


def read() -> dict[str, bytes]:
    """The files that the stage before has left; empty where there are none. Raises Error."""
    try:
        found = {}
        for name in os.listdir(STATE):
            with open(f"{STATE}/{name}", "rb") as file:
                found[name] = file.read()
        return found
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise Error(f"{e.filename}: {e.strerror}") from None
