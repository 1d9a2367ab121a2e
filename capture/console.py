# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the command says, on a console that may be full, closed or gone: that must not cost the dump."""

from __future__ import annotations

import contextlib
import os
import sys

from guard import whole_file
from guard.errors import Error


def tell(line: str) -> None:
    """A line on standard error; a console that takes none must not cost the dump."""
    with contextlib.suppress(OSError):
        print(f"oldmem: {line}", file=sys.stderr)


def say(line: str) -> None:
    """A line on standard output, now: what comes next may be another kernel."""
    print(f"oldmem: {line}", flush=True)


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
    them fails as it does with a closed one."""
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def give_up(fd: int) -> None:
    """What could not be written would be tried again, with a traceback, when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
