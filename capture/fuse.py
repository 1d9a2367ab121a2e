# SPDX-License-Identifier: LGPL-2.1-or-later
"""Serving a vmcore through raw /dev/fuse and mount(2), without libfuse: over one file (/proc/vmcore), or as a folder
with the vmcore for mmap and small reads, vmcore.direct for large ones, and reports. The request loop is C."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from capture.mounts import KIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, mount, mounts_on, resolved
from capture.vmcore import Vmcore
from guard import shared
from guard._core import ffi, lib
from guard.errors import Error

if TYPE_CHECKING:
    from guard._core import CData

# One READ: the most that FUSE_MAX_PAGES allows by default; makedumpfile and dd live on large requests
MAX_READ = 1 << 20
HUGE_PAGE = 2 << 20
READ_AHEAD_KB = 1024


def _huge_page() -> CData:
    """A buffer of at least MAX_READ bytes, one huge page if the kernel has it: for each reply it looks up every page of
    the buffer by itself, and needs a tenth less time for all of it where that is one huge page. Children share it: it
    is not copied when they come to write there."""
    buffer = lib.service_buffer(HUGE_PAGE)
    if buffer == ffi.NULL:
        raise Error(f"no memory for the server's buffer: {os.strerror(ffi.errno)}")
    return ffi.cast("uint8_t *", buffer)


class FuseServer:
    """A FUSE file system that is to be mounted, by :meth:`mount`, and served, by :meth:`serve`, maybe in another
    process (capture/service.py).

    *target* decides the shape: an existing file is mounted over, a folder gets the files. *texts* maps names to
    functions that return a report's bytes whenever its name is looked up (folder only). *probe* is where the vmcore is,
    *source* what mountinfo tells the mount by. Raises Error."""

    def __init__(
        self, vmcore: Vmcore, target: str, texts: dict[str, Callable[[], bytes]], direct: bool = False
    ) -> None:
        self.vmcore = vmcore
        target = self.target = resolved(target)
        # asked now: once mounted, and until it is served, the target answers nobody
        self._folder = os.path.isdir(target)
        self.probe = os.path.join(target, "vmcore") if self._folder else target
        self.source = f"oldmem:{os.getpid()}"
        nodes: list[tuple[int, str, Callable[[], bytes] | None]]
        if self._folder:
            nodes = [
                (lib.FUSE_NODE_FOLDER, "", None),
                (lib.FUSE_NODE_CACHED, "vmcore", None),
                (lib.FUSE_NODE_DIRECT, "vmcore.direct", None),
                *((lib.FUSE_NODE_TEXT, name, make) for name, make in texts.items()),
            ]
        else:
            nodes = [(lib.FUSE_NODE_DIRECT if direct else lib.FUSE_NODE_CACHED, "vmcore", None)]
        self._makers = [make for _, _, make in nodes]
        self._nodes = ffi.new("struct fuse_node[]", len(nodes))
        for c, (kind, name, make) in zip(self._nodes, nodes, strict=True):
            c.kind, c.name = kind, name.encode()
            # a file: who goes on after this process has the bytes that a reader was told the size of
            c.text_fd = os.memfd_create(f"oldmem {name}", os.MFD_CLOEXEC) if make else -1
        self._shared = shared.new("struct fuse_shared")
        self.shared: CData = ffi.cast("struct fuse_shared *", self._shared)
        try:
            # not to block: between poll(2) and read(2) a request may be withdrawn
            self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise Error(f"/dev/fuse: {e.strerror} (is the fuse module loaded?)") from None
        self.c: CData = ffi.new("struct fuse_server *")
        self.c.fd, self.c.view, self.c.shared = self.fd, vmcore.c, self.shared
        self.c.n, self.c.nodes = len(nodes), self._nodes
        self.c.max_read, self.c.buffer = MAX_READ, _huge_page()
        self.c.time = int(time.time())

    def mount(self) -> None:
        """Put it over the target. From now on who looks at it waits until it is served. Raises Error, also if another
        one of ours came in between; undoing that is the caller's affair."""
        mode = (stat.S_IFDIR | 0o500) if self._folder else (stat.S_IFREG | 0o400)
        # as with the kernel's own file, its mode decides who may open it, and who has it open may become another user
        options = f"fd={self.fd},rootmode={mode:o},user_id=0,group_id=0,max_read={MAX_READ},"
        options += "allow_other,default_permissions"
        mount(self.source, self.target, KIND, MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
        for there in mounts_on(self.target):
            if there.source == self.source:
                self._raise_read_ahead(there.device)
            elif there.kind == KIND:
                raise Error(f"{self.target}: another oldmem has mounted on it at the same time")

    def _raise_read_ahead(self, device: str) -> None:
        """128 KiB, the default, costs cached readers 40 % (larger requests are fewer switches); not worth failing."""
        path = f"/sys/class/bdi/{device}/read_ahead_kb"
        with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
            file.write(str(READ_AHEAD_KB))

    def close(self) -> None:
        """Leave it to other processes: the last one's end is that of the mount's life. It may be called again."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _set_text(self, i: int, text: bytes) -> None:
        fd = self._nodes[i].text_fd
        os.posix_fallocate(fd, 0, len(text))  # what lacks memory fails here, with the old text as it was
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))

    def serve(self, watch: tuple[int, int], deadline: float) -> bool:
        """Answer requests until one of the descriptors *watch* (negative: none) wants the caller, or *deadline* has
        come (as of time.monotonic(); 0: none): True. Or until unmounted: False. Raises Error."""
        self.c.watch, self.c.deadline = watch, int(deadline * 1e9)
        while True:
            result = lib.fuse_serve(self.c)
            if result == lib.FUSE_SERVE_ENDED:
                return False
            if result in (lib.FUSE_SERVE_WOKEN, -errno.EINTR):
                return True
            if result != lib.FUSE_SERVE_REFRESH:
                raise Error(f"FUSE server of {self.target}: {os.strerror(-result)}")
            make = self._makers[self.c.refresh]
            assert make is not None
            with contextlib.suppress(MemoryError, OSError):  # the report stays as it was, and the vmcore is served on
                self._set_text(self.c.refresh, make())
