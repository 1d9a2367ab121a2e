# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs of the capture environment: where they are, what they are, running one."""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Sequence

from guard.errors import Error

EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2MSB, PT_INTERP = 4, 5, 2, 2, 3  # include/uapi/linux/elf.h


NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as env(1), nice(1) and timeout(1) end


class CommandError(Error):
    """The command cannot be run, and ends with *status*."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def why_not(command: str, error: OSError | ValueError) -> CommandError:
    """What starting *command* failed with, told as env(1) does. ValueError is how an empty name is refused."""
    number = error.errno or errno.EINVAL if isinstance(error, OSError) else errno.ENOENT
    status = NOT_FOUND if number == errno.ENOENT else NOT_EXECUTABLE
    return CommandError(f"{command or repr(command)}: {os.strerror(number)}", status)


def find(name: str) -> str | None:
    """Path of the program *name*, also where root's programs are if PATH leaves them out."""
    places = [os.path.join(folder, name) for folder in (*os.get_exec_path(), "/usr/sbin", "/sbin")]
    return next((path for path in places if os.access(path, os.X_OK) and not os.path.isdir(path)), None)


def is_static(command: str) -> bool:
    """Is it a program that the dynamic linker has no part in? Of what cannot be read or is a script, False."""
    paths = [command] if "/" in command else [os.path.join(folder or ".", command) for folder in os.get_exec_path()]
    for path in paths:
        try:
            with open(path, "rb") as file:
                start = file.read(4096)
        except OSError:
            continue
        if len(start) < 64 or not start.startswith(b"\x7fELF") or start[EI_CLASS] != ELFCLASS64:
            return False
        order = ">" if start[EI_DATA] == ELFDATA2MSB else "<"
        (phoff,) = struct.unpack_from(order + "Q", start, 32)
        size, count = struct.unpack_from(order + "HH", start, 54)
        places = range(phoff, min(phoff + size * count, len(start) - 4), max(size, 1))
        return not any(struct.unpack_from(order + "I", start, at)[0] == PT_INTERP for at in places)
    return False


def spawn(command: Sequence[str]) -> int:
    """Run *command* as it is; its exit status, as a shell tells it. Raises CommandError."""
    try:
        pid = os.posix_spawnp(command[0], list(command), os.environ)
    except (OSError, ValueError) as e:
        raise why_not(command[0], e) from None
    return wait(pid)


def wait(pid: int) -> int:
    """Exit status of the command, as a shell tells it."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
