# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file that is there as a whole or not at all, whatever becomes of its writer or of the machine."""

from __future__ import annotations

import contextlib
import os


def replace(path: str, data: bytes) -> None:
    """Puts *data* at *path*: written beside it, synced, then renamed, so that who has an earlier file open keeps that.

    Raises OSError, with nothing left beside *path* and what was at it as it was."""
    beside = f"{path}.{os.getpid()}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(beside)  # of an earlier process with our number
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.rename(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    # the rename is for the disk too; a file system that cannot sync a folder has done what it can
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
