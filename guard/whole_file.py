# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file that is there as a whole or not at all, whatever becomes of its writer or of the machine.

It is written beside its place, synced, renamed. Whoever writes holds a lock (flock(2)) on what is beside: a file that
nobody has locked was left by a writer that was killed, and is the next one's to remove. It is never written into, and
what is no regular file (a planted symbolic link, say) is neither followed nor removed. Only the user may read any of
them: they tell of a machine's memory, or hold it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from errno import EEXIST

_WRITE = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY
_TRIES = 16


class Begun:
    """A new, empty, locked file at *beside*, to be written to through *fd* and then put at its place.

    *replaced* tells that what a killed writer had left there was removed for it. Raises OSError; FileExistsError where
    something else is there, or a writer that lives."""

    def __init__(self, beside: str) -> None:
        self.beside, self.replaced = beside, False
        for _ in range(_TRIES):
            with contextlib.suppress(FileExistsError):
                self.fd = os.open(beside, _WRITE | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                if _locked(self.fd) and _is_at(self.fd, beside):
                    with contextlib.suppress(OSError):  # not every file system has modes
                        os.fchmod(self.fd, 0o600)  # the umask may have taken more away
                    return
                os.close(self.fd)  # somebody took it for left over before it was locked
                continue
            self.replaced = _remove_left_over(beside) or self.replaced
        raise FileExistsError(EEXIST, "is being written by other processes", beside)

    def put(self, path: str, overwrite: bool = True) -> None:
        """Sync what was written and give it the name *path*. Raises OSError; FileExistsError where that exists and
        *overwrite* is False."""
        os.fsync(self.fd)
        _sync_folder(path)
        if overwrite:
            os.rename(self.beside, path)
        else:
            _rename_where_nothing_is(self.beside, path)
        _sync_folder(path)

    def close(self) -> None:
        os.close(self.fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_left_over(path: str) -> bool:
    """Remove the file at *path* if its writer is gone; was there one? Raises OSError."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise FileExistsError(EEXIST, "is no regular file: neither written to nor removed", path)
        fd = os.open(path, _WRITE | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        if not _locked(fd):
            raise FileExistsError(EEXIST, "another process is writing it", path)
        if not _is_at(fd, path):
            return False
        os.unlink(path)
    finally:
        os.close(fd)
    return True


def _rename_where_nothing_is(beside: str, path: str) -> None:
    try:
        os.link(beside, path, follow_symlinks=False)
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError(EEXIST, os.strerror(EEXIST), path) from None
        os.rename(beside, path)  # a file system without hard links
    else:
        os.unlink(beside)


def _sync_folder(path: str) -> None:
    # a file system that cannot sync a folder has done what it can
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace(path: str, data: bytes) -> None:
    """Puts *data* at *path*, for the user alone to read; who has an earlier file open keeps that.

    Raises OSError about *path*, with nothing left beside it and what was at it as it was."""
    try:
        begun = _begun_beside(path)
        try:
            write_all(begun.fd, data)
            begun.put(path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(begun.beside)
            raise
        finally:
            begun.close()
    except OSError as e:
        raise OSError(e.errno, e.strerror, path) from None


def _begun_beside(path: str) -> Begun:
    """By a name of its own for each of those who write it at the same time: the last one wins."""
    for number in range(1, _TRIES):
        with contextlib.suppress(FileExistsError):
            return Begun(f"{path}.new{number}")
    return Begun(f"{path}.new{_TRIES}")


def is_special(path: str) -> bool:
    """Has what is at *path* no place that a file could be renamed to: a device, a pipe, a descriptor of this process
    (/dev/stdout, /dev/fd/3)? So has a folder. Raises OSError."""
    if _own_descriptor(path) is not None:
        return True
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def open_special(path: str) -> int:
    """A descriptor to write to *path*, which :func:`is_special`. Raises OSError; for a folder, too."""
    number = _own_descriptor(path)
    if number is not None:
        return os.dup(number)  # to open it anew would begin at the start of what it was redirected to
    fd = os.open(path, _WRITE)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileExistsError(EEXIST, "has just become a regular file", path)
    return fd


def _own_descriptor(path: str) -> int | None:
    """N where *path* leads to /proc/self/fd/N, whose links cannot be followed by name."""
    own = {os.path.realpath(folder) for folder in ("/proc/self/fd", "/proc/thread-self/fd")}
    for _ in range(_TRIES):
        folder, name = os.path.split(path)
        folder = os.path.realpath(folder)
        if folder in own and name.isdecimal():
            return int(name)
        try:
            path = os.path.join(folder, os.readlink(os.path.join(folder, name)))
        except OSError:
            break
    return None


def write(path: str, data: bytes) -> None:
    """Puts *data* at *path*: as :func:`replace` where that is a regular file, by way of links if need be, or nothing;
    into it where it is a device or a pipe. Raises OSError about *path*."""
    if not is_special(path):
        replace(os.path.realpath(path), data)
        return
    fd = open_special(path)
    try:
        write_all(fd, data)
    except OSError as e:
        raise OSError(e.errno, e.strerror, path) from None
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of *data*, however little the kernel takes at a time. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
