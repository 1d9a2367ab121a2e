# SPDX-License-Identifier: LGPL-2.1-or-later
"""mount(2), and what is mounted where by the kernel's list (/proc/self/mountinfo): a server that is dead or hangs is
asked nothing but in a child process."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from guard import child
from guard._core import ffi, lib
from guard.errors import Error

if TYPE_CHECKING:
    from guard._core import CData

# include/uapi/linux/mount.h, fs.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND = 1, 2, 4, 8, 4096
MNT_DETACH = 2

KIND = "fuse.oldmem"
"""Type of the mounts that are ours, also of what is bind-mounted from them."""

_LIST = "/proc/self/mountinfo"
_ANSWER = 5.0  # seconds that a living server may take for a word about itself
_MOST_LINKS = 40  # as the kernel follows (include/linux/namei.h:MAXSYMLINKS)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    """mount(2). Raises Error naming the target and the reason."""

    def encode(text: str | None) -> CData:
        return ffi.NULL if text is None else ffi.new("char[]", os.fsencode(text))

    if lib.mount(encode(source), encode(target), encode(kind), flags, encode(options)):
        raise Error(f"cannot mount on {target}: {os.strerror(ffi.errno)}")


def unmount(target: str) -> None:
    """Detach the topmost mount on *target*; what still has files open keeps them. No mount there is no error."""
    lib.umount2(os.fsencode(target), MNT_DETACH)


class Mounted(NamedTuple):
    """A mount, as mountinfo tells it: major:minor, the file system's type, and what mount(2) was given as source; its
    number, and that of the mount that it lies on."""

    device: str
    kind: str
    source: str
    number: int
    parent: int


def resolved(path: str) -> str:
    """*path* absolute and without symbolic links. Only the folders above it are looked into: what is mounted there
    itself may not answer."""
    for _ in range(_MOST_LINKS):
        path = path.rstrip("/")
        name = os.path.basename(path)
        if name in ("", ".", ".."):
            return os.path.realpath(path or "/")
        folder = os.path.realpath(os.path.dirname(path) or ".")
        path = os.path.join(folder, name)
        try:
            path = os.path.join(folder, os.readlink(path))
        except OSError:
            return path
    return path


def mounts_on(target: str) -> list[Mounted]:
    """What is mounted on *target*, the topmost last; not what a mount over a folder above it hides, and no path leads
    to. Raises Error where there is no /proc to tell."""
    wanted = os.fsencode(resolved(target))
    listed = list(_listed())
    below = {(mounted.parent, point): mounted for point, mounted in listed if mounted.parent != mounted.number}
    # the root lies on what is not listed, or on itself (an initramfs)
    others = {mounted.number for mounted in below.values()}
    here = next((m.number for point, m in listed if point == b"/" and m.parent not in others), None)
    if here is None:  # the root is a folder of a mount that is not listed
        return [mounted for point, mounted in listed if point == wanted]
    found: list[Mounted] = []
    at = b""
    for name in wanted.rstrip(b"/").split(b"/"):  # as the kernel walks the path
        at = at.rstrip(b"/") + b"/" + name
        while mounted := below.get((here, at)):
            here = mounted.number
            if at == wanted:
                found.append(mounted)
    return found


def mount_points(kind: str) -> list[str]:
    """Where file systems of this type are mounted. Raises Error where there is no /proc to tell."""
    return [os.fsdecode(point) for point, mounted in _listed() if mounted.kind == kind]


def _listed() -> Iterator[tuple[bytes, Mounted]]:
    """All mounts that this process sees, each with the place that it is mounted on."""
    try:
        file = open(_LIST, "rb")  # noqa: SIM115
    except OSError as e:
        raise Error(f"{_LIST}: {e.strerror}: nothing tells what is mounted") from None
    with file:
        for line in file:
            fields = line.split()
            rest = fields.index(b"-", 6)
            kind, source = (os.fsdecode(_unescaped(field)) for field in fields[rest + 1 : rest + 3])
            yield _unescaped(fields[4]), Mounted(fields[2].decode(), kind, source, int(fields[0]), int(fields[1]))


def _unescaped(field: bytes) -> bytes:
    """Blanks and the like are written as \\040 (fs/proc_namespace.c:mangle())."""
    first, *others = field.split(b"\\")
    return first + b"".join(bytes([int(other[:3], 8)]) + other[3:] for other in others)


def unmount_all(targets: list[str], source: str) -> None:
    """Take the mounts of ours that have this *source* away from *targets*, last one first; what else is mounted there
    stays."""
    for target in reversed(targets):
        there = mounts_on(target)
        if there and (there[-1].kind, there[-1].source) == (KIND, source):
            unmount(target)


def make_room(target: str, tell: Callable[[str], None]) -> None:
    """Take mounts away from *target* whose servers are dead, a line to *tell* for each: after a crash of theirs the
    next start has to work. Raises Error where a server is alive: the second of two would hide the first one, and its
    end."""
    while (there := mounts_on(target)) and there[-1].kind == KIND:
        dead, why = _is_dead(target)
        if not dead:
            state = f"does not answer ({why})" if why else "is alive"
            raise Error(
                f"{target} is served already, by another oldmem that {state}: end that first, by oldmem done or "
                f"umount -l {target}"
            )
        tell(f"{target}: the oldmem that served it is dead; its mount is taken away")
        unmount(target)
        if mounts_on(target) == there:
            raise Error(f"{target}: cannot take the mount of a dead oldmem away: {os.strerror(ffi.errno)}")


def _is_dead(target: str) -> tuple[bool, str]:
    """Has the server on *target* gone? And why it did not tell, if it did not. statfs(2) is what the kernel always asks
    the server about: stat(2) it may answer by itself."""
    hear, say = os.pipe()
    os.set_blocking(hear, False)

    def ask() -> None:
        try:
            os.statvfs(target)
        except OSError as e:
            if e.errno == errno.ENOTCONN:
                os.write(say, b"dead")

    try:
        why = child.run(ask, _ANSWER)
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(hear, 4)), why
        return False, why
    finally:
        os.close(hear)
        os.close(say)
