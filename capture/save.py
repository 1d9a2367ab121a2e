# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copying a vmcore out: sparse, with progress in makedumpfile's words, no half file under the final name."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

from capture.vmcore import Vmcore
from guard import whole_file
from guard._core import ffi, lib
from guard.errors import Error

CHUNK = 1 << 20
SPARSE_UNIT = 4096


class Progress:
    """``Copying data : [ 42.1 %] / eta: 1m3s``, at most once a second; one line each where there is no terminal.

    The format is makedumpfile's (print_info.c), which kdump scripts and consoles know."""

    def __init__(self, total: int, out: TextIO) -> None:
        self.total, self.out = total, out
        self.start = self.last = time.monotonic()
        self.end = "\r" if out.isatty() else "\n"

    def show(self, done: int, final: bool = False) -> None:
        now = time.monotonic()
        if not final and now - self.last < 1:
            return
        self.last = now
        share = done / self.total if self.total else 1.0
        eta = int((now - self.start) * (1 - share) / share) if share else 0
        left = f"{eta // 60}m{eta % 60}s" if eta >= 60 else f"{eta}s"
        with contextlib.suppress(OSError):  # a console that takes no progress must not cost the dump
            self.out.write(f"Copying data : [{100 * share:5.1f} %] / eta: {left}  {self.end}")
            if final and self.end == "\r":
                self.out.write("\n")
            self.out.flush()


def _quiet(_: str) -> None:
    pass


def _data_runs(buffer: bytearray, size: int, c_buffer: object) -> list[tuple[int, int]]:
    """The parts of the buffer that are not whole zero pages, as [start, end)."""
    runs: list[tuple[int, int]] = []
    base = ffi.cast("uint8_t *", c_buffer)
    for at in range(0, size, SPARSE_UNIT):
        length = min(SPARSE_UNIT, size - at)
        if lib.all_zero(base + at, length):
            continue
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + length)
        else:
            runs.append((at, at + length))
    return runs


def copy(vmcore: Vmcore, fd: int, sparse: bool, progress: Progress) -> None:
    """Copy the whole vmcore to *fd*; with *sparse*, zero pages become holes (a regular file only)."""
    buffer = bytearray(CHUNK)
    c_buffer = ffi.from_buffer("uint8_t[]", buffer)
    view = memoryview(buffer)
    offset = 0
    if sparse:
        os.ftruncate(fd, vmcore.size)  # where that is more than the file system holds, it is better known now
    while size := vmcore.read_into(offset, c_buffer, CHUNK):
        if not sparse:
            whole_file.write_all(fd, view[:size])
        elif not lib.all_zero(c_buffer, size):
            for start, end in _data_runs(buffer, size, c_buffer):
                os.lseek(fd, offset + start, os.SEEK_SET)
                whole_file.write_all(fd, view[start:end])
        offset += size
        progress.show(offset)
    progress.show(offset, final=True)


def refuse_existing(out: str) -> None:
    """Raises Error where a file is at *out*, or a link that leads nowhere. Devices and pipes are written to."""
    try:
        if out != "-" and os.path.lexists(out) and not whole_file.is_special(out):
            raise Error(f"{out}: is there already (--overwrite: replace it)")
    except OSError as e:
        raise Error(f"{out}: {e.strerror}") from None


def save(vmcore: Vmcore, out: str, err: TextIO, overwrite: bool = False, tell: Callable[[str], None] = _quiet) -> None:
    """Write the vmcore to the file *out*, or stream it where that is "-", a device or a pipe. Raises Error with the
    reason; so also where there is such a file and *overwrite* is False.

    The file is written as OUT-incomplete, synced, then renamed: a name without that ending is a whole dump. What was
    removed for that is told."""
    progress = Progress(vmcore.size, err)
    part = out + "-incomplete"
    try:
        if out == "-":
            sys.stdout.flush()
            copy(vmcore, sys.stdout.fileno(), False, progress)
        elif whole_file.is_special(out):
            fd = whole_file.open_special(out)
            try:
                copy(vmcore, fd, False, progress)
            finally:
                os.close(fd)
        else:
            if not overwrite:
                refuse_existing(out)
            begun = whole_file.Begun(part)
            try:
                if begun.replaced:
                    tell(f"{part} was left by an earlier save that did not end: it is replaced")
                copy(vmcore, begun.fd, True, progress)
                begun.put(out, overwrite)
            finally:
                begun.close()
    except BrokenPipeError:
        raise Error("output: the reader closed the pipe before the vmcore was complete") from None
    except OSError as e:
        hint = f"; {part} has what fitted" if e.errno == errno.ENOSPC and os.path.exists(part) else ""
        raise Error(f"{e.filename or ('standard output' if out == '-' else out)}: {e.strerror}{hint}") from None
