# SPDX-License-Identifier: LGPL-2.1-or-later
"""After the collector: what reads have lost, and the end of the service.

`oldmem init` returns before anyone reads, so pages that fail later are in no exit status of its. The server counts
them; this asks it, takes its mounts away, and leaves the reports where they were served, as plain files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from capture.init import FOLDER, GUARD, MAP
from capture.losses import unlisted
from capture.mounts import KIND, mounts_on, unmount_all
from guard import child, procvmcore, whole_file
from guard.errors import Error
from guard.ranges import Range

_TIMEOUT = 30.0  # seconds
_MOST_REPORT = 64 << 20  # bytes
_PIECE = 1 << 20


def end(folder: str = FOLDER, over: str = procvmcore.PATH) -> tuple[list[str], str]:
    """End the service at *folder* and over the file *over*, if there is one; a line for all that the vmcore lacked,
    that reads lost, or that drivers added too late, and why the reports could not be kept ("": they were). To be called
    again it needs nothing but the reports. Raises Error where no report is to be had: then nothing tells what was lost.
    """
    there = mounts_on(folder)
    source = there[-1].source if there and there[-1].kind == KIND else None
    try:
        reports = {name: _read(f"{folder}/{name}") for name in (GUARD, MAP)}
    finally:
        if source:
            unmount_all([folder, over], source)
    not_kept = ""
    if source:
        try:
            for name, data in reports.items():
                whole_file.replace(f"{folder}/{name}", data)
        except OSError as e:
            not_kept = f"{e.filename or folder}: {e.strerror}: the report is not kept"
    return list(_lost(reports[GUARD], f"{folder}/{GUARD}")), not_kept


def _read(path: str) -> bytes:
    """A report, read in a child: a server that hangs must not hang us."""
    fd = os.memfd_create("oldmem report", os.MFD_CLOEXEC)
    try:
        why = child.run(lambda: _copy(path, fd), _TIMEOUT)
        size = os.lseek(fd, 0, os.SEEK_END)
        if why or not size:
            raise Error(f"{path}: no report, so that nothing tells what reads have lost{why and ': '}{why}")
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)


def _copy(path: str, fd: int) -> None:
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        size = 0
        while size < _MOST_REPORT and (data := file.read(_PIECE)):
            size += os.write(fd, data)


def _lost(data: bytes, path: str) -> Iterator[str]:
    try:
        found: dict[str, Any] = json.loads(data)
        yield from unlisted(int(found.get("unlisted_faults", 0)))
        for part, what in (("lost", "is lost"), ("unreadable", "could not be read and is zeros")):
            for item in found.get(part, []):
                yield f"{Range(item['start'], item['end'])} {what}: {item['why']}"
        yield from map(str, found.get("late_dumps", []))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Error(f"{path}: not a report of ours, so that nothing tells what reads have lost") from None
