# SPDX-License-Identifier: LGPL-2.1-or-later
"""A FUSE server that outlives the command that started it, and a watcher that undoes its mounts when it dies.

A dead server's mount answers every access with ENOTCONN; over /proc/vmcore that would cost the dump. So the server's
parent does nothing but wait for it and unmount what it leaves behind, and if the watcher dies first, the server
unmounts and ends (PR_SET_PDEATHSIG)."""

from __future__ import annotations

import os
import signal
import time

from capture.fuse import FuseServer, unmount_all
from guard._core import ffi, lib
from guard.errors import Error

PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
ELF_MAGIC = b"\x7fELF"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Stop(Exception):
    pass


def serve_until_stopped(server: FuseServer, undo: list[str]) -> None:
    """Serve in this process (its main thread) until unmounted or one of STOP_SIGNALS; then take the server's mounts on
    *undo* away, last one first."""
    server.c.wake_fd, ring = os.pipe()
    for fd in (server.c.wake_fd, ring):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    stopping = False

    def stop(_signal: int, _frame: object) -> None:
        nonlocal stopping
        if not stopping:  # the second of two signals must not interrupt what the first one has begun
            stopping = True
            raise _Stop

    try:
        try:
            for number in STOP_SIGNALS:
                signal.signal(number, stop)
            server.serve()
        finally:
            stopping = True
    except _Stop:
        pass
    finally:
        unmount_all(undo, server.device)


def _server_process(server: FuseServer, undo: list[str], watcher: int) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    lib.prctl(PR_SET_PDEATHSIG, ffi.cast("unsigned long", signal.SIGTERM))
    if os.getppid() != watcher:  # died before it could tell
        unmount_all(undo, server.device)
        return 1
    try:
        serve_until_stopped(server, undo)
    except Error:
        return 1
    return 0


def _watcher_process(server: FuseServer, undo: list[str]) -> int:
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    watcher = os.getpid()
    pid = os.fork()
    if pid == 0:
        os._exit(_server_process(server, undo, watcher))
    os.close(server.fd)  # else the connection would outlive the server
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    status = os.waitpid(pid, 0)[1]
    if status:
        unmount_all(undo, server.device)
    return 0


def serve_in_background(server: FuseServer, undo: list[str]) -> int:
    """Start serving and wait until the mounted vmcore can be read. Returns the watcher's pid.

    *undo* is what the watcher unmounts if the server dies: the server's own mount, and what is to be mounted from
    it. Raises Error, with the server gone and unmounted, if it does not come up."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _watcher_process(server, undo)
        finally:
            os._exit(code)
    os.close(server.fd)
    try:
        _wait_until_served(server.probe)
    except BaseException:
        unmount_all(undo, server.device)
        os.kill(pid, signal.SIGTERM)
        raise
    return pid


def _wait_until_served(probe: str, seconds: float = 30.0) -> None:
    """Read the first bytes in a child, so that a server that hangs cannot hang us."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(probe, "rb", buffering=0) as file:
                code = int(file.read(4) != ELF_MAGIC)
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise Error(f"{probe}: the FUSE server does not serve a vmcore")
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise Error(f"{probe}: the FUSE server did not answer within {seconds:.0f} s")
