# SPDX-License-Identifier: LGPL-2.1-or-later
"""A collector with the vmcore inside of its own process: no FUSE in between, mmap at the kernel's speed.

A library in front of libc (capture/csrc/preload.c, by LD_PRELOAD) answers for the file that the collector takes for
the vmcore. What it needs, header, extents, segments and rules, it finds in a memfd of this process, which waits for the
collector and then tells what could not be read. A program that takes no library (a static one) does not get the
unguarded vmcore instead: in the collector's mount namespace the kernel's own file is covered."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from capture.dump import Dump
from capture.elfcore import page_align
from capture.mounts import MS_BIND, mount
from capture.programs import is_static, wait
from guard import procvmcore
from guard._core import ffi, lib
from guard.compiled import ALIGN, compile_guard
from guard.errors import Error
from guard.physmem import CORE, Fault, Segment
from guard.ranges import Range

if TYPE_CHECKING:
    from guard._core import CData
    from guard.corefile import CoreFile

LIBRARY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_preload.abi3.so")
PLAN_VARIABLE = "OLDMEM_RUN"
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as env(1), nice(1) and timeout(1) end

# include/uapi/linux: sched.h, mount.h, memfd.h
CLONE_NEWNS = 0x00020000
MS_REC, MS_SLAVE = 16384, 1 << 19
MFD_NOEXEC_SEAL = 8

FORWARDED = (signal.SIGTERM, signal.SIGHUP)


class CommandError(Error):
    """The command cannot be run, and ends with *status*."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _memfd(name: str) -> int:
    for flags in (MFD_NOEXEC_SEAL, 0):  # since 6.3, where vm.memfd_noexec may insist on it
        try:
            return os.memfd_create(name, flags | os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as e:
            if e.errno != errno.EINVAL or not flags:
                raise Error(f"no memory files, which the collector's library needs: {e.strerror}") from None
    raise AssertionError


class Plan:
    """What the library is told about *dump*, whose vmcore programs open as *path*; and what it tells. Close it when the
    command has ended. Raises Error if this vmcore cannot be mapped."""

    def __init__(self, dump: Dump, path: str) -> None:
        self.path = path
        self._fds: list[int] = []
        self._core: CData | None = None
        try:
            self.fd = self._new("oldmem plan")
            tally = self._new("oldmem tally")
            size = ffi.sizeof("struct plan_tally")
            os.truncate(tally, size)
            self._map = mmap.mmap(tally, size)
            # sealed against writing, so that who opens it for writing only can do nothing with it but ask its size
            shape = self._new("vmcore")
            os.truncate(shape, dump.vmcore.size)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(shape, fcntl.F_ADD_SEALS, seals)
            self._write(dump, tally, shape)
        except BaseException:
            self.close()
            raise

    def _new(self, name: str) -> int:
        self._fds.append(_memfd(name))
        return self._fds[-1]

    def _write(self, dump: Dump, tally: int, shape: int) -> None:
        name = os.fsencode(self.path)
        if len(name) >= lib.PLAN_NAME:
            raise Error(f"{self.path}: a path of more than {lib.PLAN_NAME - 1} bytes")
        page_size, core, rules = dump.registry.page_size, dump.core, list(dump.registry)
        if len(rules) > lib.PLAN_RULES:
            raise Error(f"{len(rules)} rules: the library takes at most {lib.PLAN_RULES}")
        extents = ffi.new("struct view_extent[]", len(core.extents))
        behind = page_align(len(core.header), page_size)
        for c, e in zip(extents, core.extents, strict=True):
            if (e.offset | e.size | e.paddr) & (page_size - 1) or e.offset < behind:
                raise Error(
                    f"memory at {e.paddr:#x} is not at whole pages of the vmcore (offset {e.offset:#x}): it cannot be "
                    "mapped; use oldmem mount"
                )
            c.offset, c.size, c.paddr = e
            behind = e.offset + e.size
        to_map = self._in_place(dump.machine.to_map(dump.memory.segments), dump.machine.core)
        segments = ffi.new("struct physmem_segment[]", len(to_map))
        for c, s in zip(segments, to_map, strict=True):
            if s.offset % page_size:
                raise Error(
                    f"{s.name}: memory at {s.paddr:#x} is at offset {s.offset:#x}, not at a whole page: it cannot be "
                    "mapped; use oldmem mount or save"
                )
            c.paddr, c.size, c.offset, c.fd, c.how = s.paddr, s.size, s.offset, s.fd, s.how
        plan = ffi.new("struct plan *")
        plan.layout, plan.pid = ffi.sizeof("struct plan"), os.getpid()
        plan.plan_fd, plan.tally_fd, plan.shape_fd = self.fd, tally, shape
        stands = os.fstat(shape)
        plan.shape_dev, plan.shape_ino = stands.st_dev, stands.st_ino
        with contextlib.suppress(OSError):
            there = os.stat(self.path)
            plan.dev, plan.ino = there.st_dev, there.st_ino
        plan.page_shift, plan.size, plan.name = page_size.bit_length() - 1, core.size, name
        with open(self.fd, "wb", closefd=False) as file:
            file.write(ffi.buffer(plan))
            plan.extents, plan.n_extents = file.tell(), len(extents)
            file.write(ffi.buffer(extents))
            plan.segments, plan.n_segments = file.tell(), len(segments)
            file.write(ffi.buffer(segments))
            file.write(bytes(-file.tell() % ALIGN))
            guard = compile_guard(dump.registry)
            plan.guard, plan.guard_size = file.tell(), len(guard)
            file.write(guard)
            del guard
            plan.head, plan.head_size = page_align(file.tell(), page_size), len(core.header)
            file.seek(plan.head)
            file.write(core.header)
            plan.plan_size = page_align(file.tell(), page_size)
            file.truncate(plan.plan_size)
            file.seek(0)
            file.write(ffi.buffer(plan))

    def _in_place(self, segments: list[Segment], core: CoreFile | None) -> list[Segment]:
        """*segments*, those of the kernel's own vmcore where they are in that file now.

        It is open from here on until the command has ended, as it is for a collector of the kernel's own file. So no
        device dump can come in between where the kernel refuses it meanwhile (6.14+); where it does not,
        check_in_place() tells."""
        if core is None or not any(s.how == CORE for s in segments):
            return segments
        self._core = core.settled()
        fd, shift = self._core.fd, self._core.shift
        return [s._replace(fd=fd, offset=s.offset + shift) if s.how == CORE else s for s in segments]

    def stand_in(self, path: str) -> None:
        """From now on the file *path* is the one that programs find at this plan's path."""
        there = os.stat(path)
        for field, value in (("dev", there.st_dev), ("ino", there.st_ino)):
            os.pwrite(self.fd, struct.pack("=Q", value), ffi.offsetof("struct plan", field))

    def account(self, dump: Dump) -> int:
        """Add what the library saw to what *dump* has read; the number of processes that it was in."""
        tally = ffi.cast("struct plan_tally *", ffi.from_buffer("char[]", self._map))
        shift = dump.registry.page_size.bit_length() - 1
        faults = []
        for f in tally.faults[0 : min(tally.n_faults, lib.PLAN_FAULTS)]:
            faults.append(Fault(Range(f.first << shift, f.end << shift), f.error))
        refused = [tally.refused[i] for i, _ in enumerate(dump.registry)]
        unlisted = max(tally.n_faults - lib.PLAN_FAULTS, 0)
        dump.memory.account(tally.pages_shown << shift, refused, faults, unlisted)
        return int(tally.loaded)

    def check_in_place(self) -> None:
        """Raises Error if what the command has mapped of the kernel's own vmcore was not what it was taken for."""
        if self._core is not None and not lib.corefile_in_place(self._core):
            raise Error(
                f"{procvmcore.PATH}: a device dump was added to it while the command ran, and memory was shifted under "
                "its mappings: do not trust what it has read; run it again"
            )

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        if self._core is not None:
            lib.corefile_rest(self._core)


def _is_kernels(dump: Dump, path: str) -> bool:
    """Is *path* the kernel's own vmcore, so that programs without our library would read it unguarded?"""
    if dump.machine.core_fd is None or not dump.machine.live:
        return False
    try:
        return os.path.samestat(os.fstat(dump.machine.core_fd), os.stat(path))
    except OSError:
        return False


@contextlib.contextmanager
def _cover() -> Iterator[str]:
    """What to lay over the kernel's vmcore, for as long as that takes: a socket, which nobody can open (ENXIO)."""
    for folder in ("/run", "/tmp", "/dev"):
        path = f"{folder}/oldmem.{os.getpid()}"
        try:
            os.mknod(path, stat.S_IFSOCK | 0o400)
        except OSError:
            continue
        try:
            yield path
        finally:
            os.unlink(path)
        return
    raise Error("neither /run nor /tmp nor /dev takes the socket that covers the kernel's vmcore")


def _cover_in_namespace(cover: str, path: str) -> None:
    if lib.unshare(CLONE_NEWNS):
        raise Error(f"no mount namespace for the command: {os.strerror(ffi.errno)}")
    mount("none", "/", None, MS_REC | MS_SLAVE, None)
    mount(cover, path, None, MS_BIND, None)


def _become(command: Sequence[str], plan: Plan, cover: str | None, tell: int) -> NoReturn:
    """The child's part; what goes wrong is written to the pipe *tell*: status, and a line."""
    status, line = NOT_EXECUTABLE, ""
    try:
        if cover:
            _cover_in_namespace(cover, plan.path)
        os.environ[PLAN_VARIABLE] = f"/proc/{os.getppid()}/fd/{plan.fd}"
        os.environ["LD_PRELOAD"] = ":".join(filter(None, [LIBRARY, os.environ.get("LD_PRELOAD")]))
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by the interpreter, for itself
            signal.signal(ignored, signal.SIG_DFL)
        os.execvp(command[0], list(command))
    except OSError as e:
        status = NOT_FOUND if e.errno == errno.ENOENT else NOT_EXECUTABLE
        line = f"{command[0]}: {e.strerror}"
    except BaseException as e:
        line = str(e)
    os.write(tell, bytes([status]) + line.encode())
    os._exit(status)


def _start(command: Sequence[str], plan: Plan, cover: str | None) -> int:
    """The command's process id, once it is the command. Raises CommandError."""
    hear, tell = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        os.close(hear)
        _become(command, plan, cover, tell)
    os.close(tell)
    with open(hear, "rb") as pipe:
        said = pipe.read()
    if said:
        os.waitpid(pid, 0)
        raise CommandError(said[1:].decode(), said[0])
    return pid


class _Forwarding:
    """Signals that are meant to end the command reach it, also those that came before its process id was known."""

    def __enter__(self) -> _Forwarding:
        self._pid = 0
        self._early: list[int] = []
        self._earlier = {number: signal.signal(number, self._forward) for number in FORWARDED}
        return self

    def _forward(self, number: int, _frame: object) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)
        else:
            self._early.append(number)

    def to(self, pid: int) -> None:
        self._pid = pid
        for number in self._early:
            self._forward(number, None)

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        if not self._pid:
            for early in self._early:
                os.kill(os.getpid(), early)


def run(dump: Dump, command: Sequence[str], path: str) -> int:
    """Run *command*, to whose programs the file *path* is the guarded vmcore; returns its exit status.

    What it read and what was refused is in *dump* then, as if read by itself. Raises CommandError if it cannot be run,
    Error if it ended without having had the library, or if memory was shifted meanwhile."""
    if not os.path.exists(LIBRARY):
        raise Error(f"{LIBRARY}: not there: this oldmem was built without what it puts into collectors")
    plan = Plan(dump, os.path.abspath(path))
    try:
        with _Forwarding() as signals:
            with _cover() if _is_kernels(dump, plan.path) else contextlib.nullcontext() as cover:
                if cover:
                    plan.stand_in(cover)
                pid = _start(command, plan, cover)
            signals.to(pid)
            status = wait(pid)
        if not plan.account(dump):
            why = "is statically linked" if is_static(command[0]) else "took no library by LD_PRELOAD"
            raise Error(f"{command[0]} {why}, and has seen no vmcore (status {status}); use oldmem mount or init")
        plan.check_in_place()
    finally:
        plan.close()
    return status
