# SPDX-License-Identifier: LGPL-2.1-or-later
"""A collector with the vmcore inside of its own process: mmap at the kernel's speed.

For the command and all that it starts, a file of our own (FUSE) has the vmcore, in a mount namespace of theirs: over
the file that they open, and over the kernel's. So every program reads the right bytes, by whatever way it opens,
inherits, maps or has the kernel copy them. A library in front of libc (capture/csrc/preload.c, by LD_PRELOAD) makes
read(2) and mmap(2) of that file fast: it maps the files that show old memory into the collector itself."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from capture.dump import Dump
from capture.fuse import FuseServer
from capture.mounts import MS_BIND, mount, mount_points, unmount
from capture.plan import Plan
from capture.programs import wait
from capture.service import Service
from guard._core import ffi, lib
from guard.errors import Error

LIBRARY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_preload.abi3.so")
PLAN_VARIABLE = "OLDMEM_RUN"
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as env(1), nice(1) and timeout(1) end

# include/uapi/linux: sched.h, mount.h
CLONE_NEWNS = 0x00020000
MS_REC, MS_SLAVE = 16384, 1 << 19

FORWARDED = (signal.SIGTERM, signal.SIGHUP)


class CommandError(Error):
    """The command cannot be run, and ends with *status*."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _own_namespace() -> None:
    """What is mounted from here on, this process and its children alone see."""
    if lib.unshare(CLONE_NEWNS):
        raise Error(f"no mount namespace for the command: {os.strerror(ffi.errno)}")
    mount("none", "/", None, MS_REC | MS_SLAVE, None)


def _stand_in(server: FuseServer, service: Service, names: list[str]) -> int:
    """Put the file that *server* serves over each of *names*; a descriptor (O_PATH) that leads to it. A mount needs a
    place: it is made over *server*'s target, and taken away from there."""
    server.mount()
    try:
        service.mounted()
        fd = os.open(server.target, os.O_PATH | os.O_CLOEXEC)
        for name in names:
            mount(server.target, name, None, MS_BIND, None)
    finally:
        unmount(server.target)
    return fd


def _kernels(dump: Dump) -> Iterator[str]:
    """Names of the kernel's own vmcore: in each procfs that there is."""
    if dump.machine.live:
        names = (os.path.join(folder, "vmcore") for folder in mount_points("proc"))
        yield from filter(os.path.exists, names)


def _become(command: Sequence[str], plan: Plan, tell: int) -> NoReturn:
    """The child's part; what goes wrong is written to the pipe *tell*: status, and a line."""
    status, line = NOT_EXECUTABLE, ""
    try:
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


def _start(command: Sequence[str], plan: Plan) -> int:
    """The command's process id, once it is the command. Raises CommandError."""
    hear, tell = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        os.close(hear)
        _become(command, plan, tell)
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
    Error if the vmcore cannot be put in its place, or if memory was shifted meanwhile."""
    if not os.path.exists(LIBRARY):
        raise Error(f"{LIBRARY}: not there: this oldmem was built without what it puts into collectors")
    path = os.path.abspath(path)
    there = os.path.exists(path)
    names = list(dict.fromkeys([*([path] if there else []), *_kernels(dump)]))
    server = FuseServer(dump.vmcore, LIBRARY, {})
    service = Service(server, [])
    try:
        _own_namespace()
        vmcore = _stand_in(server, service, names)
        service.commit()  # if this process is killed, they serve until the command's namespace is gone
        plan = Plan(dump, vmcore, "" if there else path)
        try:
            with _Forwarding() as signals:
                pid = _start(command, plan)
                signals.to(pid)
                status = wait(pid)
            plan.account(dump)
            plan.check_in_place()
        finally:
            plan.close()
            os.close(vmcore)
    finally:
        service.stop()
    return status
