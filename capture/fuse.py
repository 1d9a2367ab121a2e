# SPDX-License-Identifier: LGPL-2.1-or-later
"""Serving a vmcore through raw /dev/fuse and mount(2), without libfuse: over one file (/proc/vmcore), or as a folder
with the vmcore for mmap and small reads, vmcore.direct for large ones, and reports. The request loop is C."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from capture.vmcore import Vmcore
from guard._core import ffi, lib
from guard.errors import Error

if TYPE_CHECKING:
    from guard._core import CData

# include/uapi/linux/mount.h, fs.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND = 1, 2, 4, 8, 4096
MNT_DETACH = 2

# One READ: the most that FUSE_MAX_PAGES allows by default; makedumpfile and dd live on large requests
MAX_READ = 1 << 20
HUGE_PAGE = 2 << 20
MADV_COLLAPSE = 25  # Linux 6.1; works where transparent huge pages are off, as they are below 512 MiB of RAM
READ_AHEAD_KB = 1024


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    """mount(2). Raises Error naming the target and the reason."""

    def encode(text: str | None) -> CData:
        return ffi.NULL if text is None else ffi.new("char[]", os.fsencode(text))

    if lib.mount(encode(source), encode(target), encode(kind), flags, encode(options)):
        raise Error(f"cannot mount on {target}: {os.strerror(ffi.errno)}")


def unmount(target: str) -> None:
    """Detach the topmost mount on *target*; what still has files open keeps them. No mount there is no error."""
    lib.umount2(os.fsencode(target), MNT_DETACH)


def unmount_all(targets: list[str], device: str | None) -> None:
    """Take the mounts of *device* on *targets* away, last one first; what else is mounted there stays."""
    for target in reversed(targets):
        if mounted_device(target) == device:
            unmount(target)


def mounted_device(target: str) -> str | None:
    """major:minor of the topmost mount on *target*, from mountinfo: stat(2) would already ask the server. None if
    there is none, or no /proc to tell."""
    path = os.path.realpath(os.path.dirname(target) or ".").rstrip("/") + "/" + os.path.basename(target)
    found = None
    with contextlib.suppress(FileNotFoundError), open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields = line.split()
            # blanks and the like are written as \040
            if fields[4].decode("unicode_escape").encode("latin-1") == os.fsencode(path):
                found = fields[2].decode()
    return found


def _huge_page() -> CData:
    """A buffer of at least MAX_READ bytes, one huge page if the kernel has it: for each reply it looks up every page of
    the buffer by itself, and needs a tenth less time for all of it where that is one huge page."""
    memory = mmap.mmap(-1, 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = ffi.from_buffer("uint8_t[]", memory)
    offset = -int(ffi.cast("uintptr_t", buffer)) % HUGE_PAGE
    memory[offset] = 0  # what nothing is mapped in cannot be collapsed
    with contextlib.suppress(OSError):
        memory.madvise(MADV_COLLAPSE, offset, HUGE_PAGE)
    return ffi.from_buffer("uint8_t[]", memoryview(memory)[offset : offset + HUGE_PAGE])


class FuseServer:
    """A mounted FUSE file system that waits to be served.

    *target* decides the shape: an existing file is mounted over, a folder gets the files. *texts* maps names to
    functions that return a report's bytes whenever its name is looked up (folder only). *probe* is where the vmcore is,
    *device* the major:minor by which the mount can be known again."""

    def __init__(
        self, vmcore: Vmcore, target: str, texts: dict[str, Callable[[], bytes]], direct: bool = False
    ) -> None:
        self.vmcore = vmcore
        target = self.target = os.path.realpath(target)
        # asked now: once mounted, and until it is served, the target answers nobody
        folder = os.path.isdir(target)
        self.probe = os.path.join(target, "vmcore") if folder else target
        nodes: list[tuple[int, str, Callable[[], bytes] | None]]
        if folder:
            nodes = [
                (lib.FUSE_NODE_FOLDER, "", None),
                (lib.FUSE_NODE_CACHED, "vmcore", None),
                (lib.FUSE_NODE_DIRECT, "vmcore.direct", None),
                *((lib.FUSE_NODE_TEXT, name, make) for name, make in texts.items()),
            ]
        else:
            nodes = [(lib.FUSE_NODE_DIRECT if direct else lib.FUSE_NODE_CACHED, "vmcore", None)]
        self._makers = [make for _, _, make in nodes]
        self._texts: list[bytes] = [b""] * len(nodes)
        self._nodes = ffi.new("struct fuse_node[]", len(nodes))
        for c, (kind, name, _) in zip(self._nodes, nodes, strict=True):
            c.kind, c.name = kind, name.encode()
        self._buffer = _huge_page()
        try:
            self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise Error(f"/dev/fuse: {e.strerror} (is the fuse module loaded?)") from None
        self.c: CData = ffi.new("struct fuse_server *")
        self.c.fd, self.c.wake_fd, self.c.view = self.fd, -1, vmcore.c
        self.c.n, self.c.nodes = len(nodes), self._nodes
        self.c.max_read, self.c.buffer = MAX_READ, self._buffer
        self.c.time = int(time.time())
        mode = (stat.S_IFDIR | 0o500) if folder else (stat.S_IFREG | 0o400)
        options = f"fd={self.fd},rootmode={mode:o},user_id=0,group_id=0,max_read={MAX_READ}"
        try:
            mount("oldmem", target, "fuse.oldmem", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
        except Error:
            os.close(self.fd)
            raise
        self.device = mounted_device(target)
        self._raise_read_ahead()

    def _raise_read_ahead(self) -> None:
        """128 KiB, the default, costs cached readers 40 % (larger requests are fewer switches); not worth failing."""
        path = f"/sys/class/bdi/{self.device}/read_ahead_kb"
        with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
            file.write(str(READ_AHEAD_KB))

    def _set_text(self, i: int, text: bytes) -> None:
        self._texts[i] = text
        self._nodes[i].text, self._nodes[i].text_size = ffi.from_buffer("uint8_t[]", text), len(text)

    def serve(self) -> None:
        """Answer requests until unmounted. Signals are handled by Python between requests, for certain only if
        ``c.wake_fd`` reads what signal.set_wakeup_fd() writes. Raises Error."""
        while True:
            result = lib.fuse_serve(self.c)
            if result == lib.FUSE_SERVE_ENDED:
                return
            if result == lib.FUSE_SERVE_REFRESH:
                make = self._makers[self.c.refresh]
                assert make is not None
                with contextlib.suppress(MemoryError):  # the report stays as it was, and the vmcore is served on
                    self._set_text(self.c.refresh, make())
            elif result != -errno.EINTR:  # then the interpreter runs its signal handlers on the way round
                raise Error(f"FUSE server of {self.target}: {os.strerror(-result)}")
            elif self.c.wake_fd >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.c.wake_fd, 64)
