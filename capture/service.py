# SPDX-License-Identifier: LGPL-2.1-or-later
"""The processes behind a mount: one that serves, and a standby that goes on where it was if it dies.

A dead server's mount answers every access with ENOTCONN: over /proc/vmcore that costs the dump, and in the middle of
one it costs what was read. So two processes hold /dev/fuse, and what is shared between them (csrc/fuse.h) says where
the other one was. They are there before anything is mounted, and undo it all if the command that mounts dies before it
is done: one process may be killed at any moment. A normal end is for both."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, NoReturn

from capture.fuse import FuseServer
from capture.mounts import unmount_all
from guard import child
from guard._core import lib
from guard.errors import Error

if TYPE_CHECKING:
    from types import TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ELF_MAGIC = b"\x7fELF"

# Seconds. A new standby costs one PAUSE, of which BURST are there to begin with: a loop of kills is none of forks
PAUSE, BURST = 0.5, 16
TERM_PAUSE = 0.5  # who ended a server by a signal may mean all of them, and is on the way to the next one
FORK_PAUSE = 1.0
START, STOP, PROBE = 30.0, 10.0, 30.0


class _Bell:
    """A pipe that signals ring: what waits for descriptors wakes, and none is lost between a look and the wait."""

    def __init__(self) -> None:
        self._hang()
        for number in STOP_SIGNALS:
            signal.signal(number, self._sound)

    def _hang(self) -> None:
        self.rung = False
        self.fd, self._ring = os.pipe()
        for fd in (self.fd, self._ring):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._ring, warn_on_full_buffer=False)

    def silence(self) -> None:
        """Until it rings again; *rung* stays."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 64)

    def renew(self) -> None:
        """In a child: the parent's rings for the parent."""
        os.close(self.fd)
        os.close(self._ring)
        self._hang()

    def _sound(self, _signal: int, _frame: object) -> None:
        self.rung = True


class _Link:
    """To the other process: *there* can be read once that one has ended, as *here* tells it of this one."""

    def __init__(self, there: int, here: int) -> None:
        self.there, self.here = there, here

    @staticmethod
    def pair() -> tuple[_Link, _Link]:
        """The ends of parent and child. Raises OSError."""
        a, b = os.pipe(), os.pipe()
        return _Link(a[0], b[1]), _Link(b[0], a[1])

    def gone(self) -> bool:
        while (ready := lib.service_watch([self.there], 1, 0)) < 0:  # EINTR
            pass
        return bool(ready)

    def close(self) -> None:
        os.close(self.there)
        os.close(self.here)


class _Worker:
    """What each of the two processes is: it serves, or stands by. *orders* can be read when the command has something
    to say, or is dead; *life* is held open."""

    def __init__(self, server: FuseServer, undo: list[str], orders: int, life: int) -> None:
        self.server, self.shared, self.undo = server, server.shared, undo
        self.orders, self.life = orders, life
        os.set_blocking(orders, False)
        self.slot, self.serves = 0, True
        self.other: _Link | None = None
        self.child = 0  # the other one's process id, where it is a child of this one
        self.when = self.due = 0.0
        self.bell = _Bell()
        # who serves has forked the standby, and need not watch one more descriptor at each request
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> NoReturn:
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("-1000")
            self._settle()
            self._fork()
            if self.other is None:
                os._exit(1)
            while True:
                if self.serves:
                    self._serve()
                else:
                    self._stand_by()
        except BaseException:
            self._leave()
        finally:
            os._exit(1)

    def _settle(self) -> None:
        """After each fork. Pages are locked as they are: no read of the dead machine's memory has to wait for one of
        ours, and no image that is mapped later gets locked."""
        lib.physmem_unmap(self.server.vmcore.memory.c)
        lib.service_lock_memory()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, signal.SIGCHLD))

    def _fork(self) -> None:
        """A standby. Returns in both processes."""
        now = time.monotonic()
        self.due = max(self.due, now) + PAUSE
        self.when = self.due - BURST * PAUSE
        memory = self.server.vmcore.memory.c
        lib.physmem_rest(memory)  # the kernel's own vmcore is not to be held open there
        lib.physmem_unmap(memory)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        links: tuple[_Link, ...] = ()
        try:
            links = _Link.pair()
            self.child = os.fork()
        except OSError:  # better one process than none, and a new try later
            for link in links:
                link.close()
            self.when = now + FORK_PAUSE
        else:
            mine, other = links if self.child else links[::-1]
            other.close()
            self.other = mine
            if not self.child:
                self.slot, self.serves = 1 - self.slot, False
                self.bell.renew()
                self._settle()
                if not self.shared.mounted:
                    os.write(self.life, b"r")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _stand_by(self) -> None:
        assert self.other is not None
        while not self.other.gone():
            self.bell.silence()
            if self.bell.rung:
                self._leave()
            lib.service_watch([self.bell.fd, self.other.there], 2, -1)
        self._lost()
        self.serves = True

    def _lost(self) -> None:
        """The other one has ended."""
        assert self.other is not None
        self.other.close()
        self.other = None
        if self.child:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.child, 0)
            self.child = 0
        if lib.service_arrive(self.shared, 1 << (1 - self.slot)) & 1 << (1 - self.slot):
            self.when = max(self.when, time.monotonic() + TERM_PAUSE)

    def _serve(self) -> None:
        """See what there is to do, then serve until there is something again."""
        self.bell.silence()
        if self.bell.rung:
            self._leave()
        self._hear()
        if self.shared.stopping:
            self._end()
        if self.other and self.other.gone():
            self._lost()
        if self.other is None and time.monotonic() >= self.when:
            self._fork()
            return
        watch = (self.bell.fd, self.orders)
        deadline = 0.0 if self.other else self.when
        if not self.shared.mounted:  # read(2) would say EPERM
            lib.service_watch(watch, len(watch), 100 if deadline else -1)
        elif not self.server.serve(watch, deadline):
            self._end()

    def _hear(self) -> None:
        """What is to be done is in the shared page, to be known by either process; the pipe wakes, and its end tells of
        the command's."""
        if self.orders < 0:
            return
        with contextlib.suppress(BlockingIOError):
            if not os.read(self.orders, 16):
                os.close(self.orders)
                self.orders = -1
                if not self.shared.committed:
                    self.shared.stopping = 1

    def _leave(self) -> NoReturn:
        """By a signal, or because something went wrong: this one ends, and the other goes on unless it leaves too. Of
        two that leave at once, one has set its bit first, and the second sees it."""
        ours, theirs = 1 << self.slot, 1 << (1 - self.slot)
        if lib.service_leave(self.shared, ours) & theirs or self.other is None or self.other.gone():
            self._end()
        os._exit(0)

    def _end(self) -> NoReturn:
        """All is over, for the other one too, which does this again: this one may be killed meanwhile."""
        self.shared.stopping = 1
        unmount_all(self.undo, self.server.source)
        os._exit(0)


class Service:
    """Both processes of *server*, which is not mounted yet; *undo* is what they unmount in the end, last one first: the
    server's own mount, and what is to be mounted from it. As long as :meth:`commit` has not been called, they end with
    this process, whatever it dies of; as a context, with the block.

    Raises Error, as all its methods do, if they do not come up."""

    def __init__(self, server: FuseServer, undo: list[str]) -> None:
        self._server, self._undo = server, undo
        self._stopped = False
        orders, self._orders = os.pipe()
        self._life, life = os.pipe()
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._pid = os.fork()
            if not self._pid:
                try:
                    os.close(self._orders)
                    os.close(self._life)
                    _Worker(server, undo, orders, life).run()
                finally:
                    os._exit(1)
        except OSError as e:
            raise Error(f"no process for the server: {e.strerror}") from None
        finally:
            os.close(orders)
            os.close(life)
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
        if not self._hears(START):
            self.stop()
            raise Error("the server's processes did not come up")

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._server.shared.committed:
            self.stop()

    def _hears(self, seconds: float) -> bool:
        """Wait for a word of theirs; False if they have ended, or that takes too long."""
        end = time.monotonic() + seconds
        while (ready := lib.service_watch([self._life], 1, max(0, int(1000 * (end - time.monotonic()))))) < 0:  # EINTR
            pass
        return ready > 0 and os.read(self._life, 16) != b""

    def _tell(self) -> None:
        try:
            os.write(self._orders, b"!")
        except BrokenPipeError:
            raise Error(f"{self._server.target}: the server's processes have ended") from None

    def mounted(self) -> None:
        """mount(2) is done, in whatever mount namespace: they begin to serve."""
        self._server.shared.mounted = 1
        self._tell()
        # else the connection, and who waits for an answer, would outlive them
        self._server.close()

    def wait_until_served(self) -> None:
        """Read the first bytes in a child, so that a server that hangs cannot hang us."""
        probe = self._server.probe

        def look() -> None:
            os.close(self._orders)  # which tells of this process's end
            with open(probe, "rb", buffering=0) as file:
                if file.read(4) != ELF_MAGIC:
                    raise Error(f"{probe}: no vmcore")

        for _ in range(2):  # that process may be killed as any other one
            why = child.run(look, PROBE)
            if not why:
                return
        raise Error(f"{probe}: the FUSE server does not serve a vmcore: the process that looked {why}")

    def commit(self) -> None:
        """From here on they outlive this process."""
        self._server.shared.committed = 1
        try:
            self._tell()
        except Error:
            self._server.shared.committed = 0
            raise

    def wait_until_ended(self) -> None:
        """Wait until somebody unmounts, or for one of STOP_SIGNALS: then stop."""
        bell = _Bell()
        while not bell.rung:
            ready = lib.service_watch([bell.fd, self._life], 2, -1)
            if ready > 0 and ready & 2 and not os.read(self._life, 16):
                break
        self.stop()

    def stop(self) -> None:
        """They end and unmount; what they cannot within some seconds is unmounted here. It may be called again."""
        if self._stopped:
            return
        self._stopped = True
        self._server.shared.stopping = 1
        self._server.close()
        os.close(self._orders)
        end = time.monotonic() + STOP
        while self._hears(end - time.monotonic()):
            pass
        os.close(self._life)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0 if time.monotonic() < end else os.WNOHANG)
        unmount_all(self._undo, self._server.source)
