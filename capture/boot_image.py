# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel and the initramfs that a capture kernel goes to once more: found where it runs, or given.

The kernel must be the running one: its vmcore code makes the header that was foreseen, its modules are in the
initramfs. Where no initramfs is found, the running one is packed again: its files are all there."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from capture import newc, stage_state
from capture.newc import Entry
from guard.errors import Error

# Where distributions keep them, with the release; below / and below /sysroot, where dracut mounts the real root
KERNELS = ("/boot/vmlinuz-{}", "/usr/lib/modules/{}/vmlinuz", "/lib/modules/{}/vmlinuz", "/boot/vmlinuz")
INITRAMFS = (
    "/boot/initramfs-{}kdump.img",  # Fedora, RHEL
    "/var/lib/kdump/initrd.img-{}",  # Debian, Ubuntu
    "/boot/initrd-{}-kdump",  # SUSE
    "/sys/firmware/initrd",  # retain_initrd on the command line: the very one
)
_ROOTS = ("", "/sysroot")

# Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header": offsets in the file
_MAGIC, _VERSION, _NAME, _CMDLINE_SIZE, _INIT_SIZE, _HEADER_END = 0x202, 0x206, 0x20E, 0x238, 0x260, 0x264
_SINCE_INIT_SIZE = 0x020A  # protocol 2.10

_UNPACKED_ROOTS = ("rootfs", "ramfs", "tmpfs")
_NOT_PACKED = ("/tmp", "/run", "/var/tmp", "/mnt")  # the folders, but not what is in them
_STEP = 1 << 20


class Kernel(NamedTuple):
    """A bzImage: bytes of its file, bytes that it needs in memory from its start on, longest command line that it
    takes without the NUL, and its ``uname -r``."""

    path: str
    size: int
    init_size: int
    most_cmdline: int
    release: str


def kernel_at(path: str) -> Kernel:
    """The facts of a kernel image. Raises Error where it is no bzImage, or one of before boot protocol 2.10."""
    try:
        with open(path, "rb") as file:
            head = file.read(0x8200)
            size = os.fstat(file.fileno()).st_size
    except OSError as e:
        raise Error(f"{path}: {e.strerror}") from None
    if len(head) < _HEADER_END or head[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise Error(f"{path}: offset {_MAGIC:#x}: no bzImage (expected HdrS)")
    version, name = struct.unpack_from("<H", head, _VERSION)[0], struct.unpack_from("<H", head, _NAME)[0]
    if version < _SINCE_INIT_SIZE:
        raise Error(
            f"{path}: offset {_VERSION:#x}: boot protocol {version >> 8}.{version & 255}, expected 2.10 or later"
        )
    most, init_size = struct.unpack_from("<I", head, _CMDLINE_SIZE)[0], struct.unpack_from("<I", head, _INIT_SIZE)[0]
    text = head[0x200 + name :].partition(b"\0")[0] if name else b""
    return Kernel(path, size, init_size, most, text.partition(b" ")[0].decode("ascii", "replace"))


def find_kernel(given: str | None, release: str) -> Kernel:
    """The image of the running kernel, at *given* if that is a path, else the first of where it may be that is one of
    *release*: others' images lie there too. Raises Error if there is none."""
    if given:
        return _kernel_of(given, release)
    paths = [root + path.format(release) for root in _ROOTS for path in KERNELS]
    others: list[str] = []
    for path in paths:
        if os.path.exists(path):
            try:
                return _kernel_of(path, release)
            except Error as e:
                others.append(str(e))
    why = "; ".join(others) or f"none of {', '.join(paths[: len(KERNELS)])}"
    raise Error(f"no image of this kernel ({release}): {why}; --kernel names it")


def _kernel_of(path: str, release: str) -> Kernel:
    kernel = kernel_at(path)
    if kernel.release != release:
        raise Error(f"{path}: is of kernel {kernel.release or 'of no name'}, expected the running one, {release}")
    return kernel


class Initramfs(NamedTuple):
    """Where the initramfs comes from; path None: the running one, packed again."""

    path: str | None

    def least_size(self) -> int:
        """Bytes that it will have at least; what packing makes of the running one nobody knows yet."""
        try:
            return os.stat(self.path).st_size if self.path else 0
        except OSError:
            return 0

    def __str__(self) -> str:
        return self.path or "the running one, packed again"


def find_initramfs(given: str | None, release: str) -> Initramfs:
    """The initramfs of this capture kernel. Raises Error if it is not to be had."""
    paths = [given] if given else [root + path.format(release) for root in _ROOTS for path in INITRAMFS]
    for path in paths:
        if os.path.isfile(path):
            return Initramfs(path)
    if given:
        raise Error(f"{given}: no such file")
    kind = _root_kind()
    if kind not in _UNPACKED_ROOTS:
        raise Error(
            f"no initramfs: none of {', '.join(paths[: len(INITRAMFS)])}, and / is {kind}; --initramfs names it"
        )
    return Initramfs(None)


def _root_kind() -> str:
    kind = "not mounted"
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
            for line in file:
                words = line.split()
                if len(words) > 2 and words[1] == "/":
                    kind = words[2]
    except OSError:
        pass
    return kind


def write_initramfs(initramfs: Initramfs, state: dict[str, bytes], fd: int) -> None:
    """Write the initramfs to *fd*, with *state* for the next stage. Raises Error.

    Ours come first and are not compressed: behind a compressed archive, some decompressors would stumble over them."""
    try:
        _write(fd, stage_state.archive(state))
        if initramfs.path is None:
            _pack(fd)
            return
        with open(initramfs.path, "rb", buffering=0) as source:
            while piece := source.read(_STEP):
                _write(fd, piece)
    except OSError as e:
        raise Error(f"{e.filename or initramfs}: {e.strerror}") from None


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _pack(fd: int) -> None:
    """The running root as an archive, compressed where the interpreter can do that."""
    pieces = _packed("/")
    try:
        from zlib import Z_BEST_SPEED, compressobj
    except ImportError:
        for piece in pieces:
            _write(fd, piece)
        return
    gzip = compressobj(Z_BEST_SPEED, wbits=31)
    for piece in pieces:
        _write(fd, gzip.compress(piece))
    _write(fd, gzip.flush())


def _packed(top: str) -> Iterator[bytes]:
    """The archive of all below the folder *top*, on its file system, less sockets and what vanishes meanwhile."""
    size = 0
    links: dict[int, int] = {}
    for number, (path, status) in enumerate(_walk(top), 1):
        name = os.path.relpath(path, top)
        data, rdev = b"", (0, 0)
        linked = stat.S_ISREG(status.st_mode) and status.st_nlink > 1 and status.st_dev == os.lstat(top).st_dev
        try:
            if stat.S_ISLNK(status.st_mode):
                data = os.fsencode(os.readlink(path))
            elif stat.S_ISREG(status.st_mode) and not (linked and status.st_ino in links):
                with open(path, "rb") as file:
                    data = file.read()
            elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                rdev = os.major(status.st_rdev), os.minor(status.st_rdev)
        except FileNotFoundError:
            continue
        ino = links.setdefault(status.st_ino, number) if linked else number
        piece = newc.member(ino, Entry(name, status.st_mode, data, rdev), linked)
        size += len(piece)
        yield piece
    yield newc.trailer(size)


def _walk(top: str) -> Iterator[tuple[str, os.stat_result]]:
    """What is to be packed, folders before what is in them."""
    device = os.lstat(top).st_dev
    left = [top]
    while left:
        folder = left.pop()
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                continue
            if path == stage_state.STATE or stat.S_ISSOCK(status.st_mode):
                continue
            if stat.S_ISDIR(status.st_mode) and status.st_dev == device and path not in _NOT_PACKED:
                left.append(path)
            yield path, status
