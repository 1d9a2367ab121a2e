# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the command says, on a console that may be full, closed or gone: that must not cost the dump."""

from __future__ import annotations

import contextlib
import io
import os
import sys

from capture.sources.report import one_line
from guard import whole_file
from guard.errors import Error


def tell(line: str) -> None:
    """A line on standard error; a console that takes none must not cost the dump."""
    with contextlib.suppress(OSError):
        print(f"oldmem: {one_line(line)}", file=sys.stderr)


def say(line: str) -> None:
    """A line on standard output, now: what comes next may be another kernel. As with :func:`tell`, what takes none must
    not cost the dump: the line is dropped."""
    try:
        print(f"oldmem: {one_line(line)}", flush=True)
    except OSError:
        kept = os.dup(1)
        give_up(1)
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def warn(line: str) -> None:
    tell(f"warning: {line}")


def write_out(data: bytes, path: str) -> None:
    """Put *data* into the file *path* as a whole or not at all, or write it to standard output where that is "-", and
    into what is no regular file. Raises Error."""
    if path == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        whole_file.write(path, data)
    except OSError as e:
        raise Error(f"{path}: {e.strerror}") from None


def fill_standard_descriptors() -> None:
    """A caller may have closed some: the next file opened would take their place and be written to. Now writing to
    them fails as it does with a closed one. Names of files are any bytes: none must fail for how it is spelled."""
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def give_up(fd: int) -> None:
    """What could not be written would be tried again, with a traceback, when the interpreter ends."""
    os.close(fd)  # there may be no descriptor to be had else, and there may be no /dev/null
    sink = os.memfd_create("oldmem")
    if sink != fd:
        os.dup2(sink, fd)
        os.close(sink)
