# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs code that is not ours in a child process, so that it can raise, hang in C, crash or exit, and costs no more than
what it had to say. Its results come back through what the two processes share: a file, or a shared mapping."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

_GRACE = 1.0  # seconds
_SHORTEST, _LONGEST = 0.0005, 0.05  # seconds between two looks


def run(work: Callable[[], None], timeout: float) -> str:
    """Why *work*, run in a child process, did not come to its end within *timeout* seconds; "" if it did.

    The child and what it has started are gone when this returns, unless one of them waits in the kernel for what does
    not come: its SIGKILL takes effect when that wait ends. To be called where no other thread holds what *work* needs:
    the child has this thread alone."""
    try:
        pid = os.fork()
    except OSError as e:
        return f"no process to run it in: {e.strerror}"
    if not pid:
        _child(work, timeout)
    try:
        return _outcome(pid, timeout)
    except ChildProcessError:
        return ""  # who ignores SIGCHLD is not told how it ended; what it has left must say
    finally:
        for kill in (os.killpg, os.kill):  # it may not have become the leader of its group yet
            with contextlib.suppress(OSError):
                kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            if _ended(pid, _GRACE):
                os.waitpid(pid, 0)


def _child(work: Callable[[], None], timeout: float) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)  # to be killed with all its children
        # If the parent is killed first, nobody else ends what hangs
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout + 2 * _GRACE)
        sys.stdout = sys.stderr  # standard output is the command's own, maybe a dump
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # better this one than the dump
        work()
        status = 0
    finally:
        os._exit(status)


def _ended(pid: int, timeout: float) -> os.waitid_result | None:
    """How the child ended; it is left to be reaped, so that its number is not another's when it is killed."""
    end, pause = time.monotonic() + timeout, _SHORTEST
    while not (result := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
        left = end - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST)
    return result


def _outcome(pid: int, timeout: float) -> str:
    result = _ended(pid, timeout)
    if result is None:
        return f"gave no answer within {timeout:g} s"
    if result.si_code == os.CLD_EXITED:
        return f"ended its process with status {result.si_status}" if result.si_status else ""
    return f"was ended by signal {result.si_status} ({signal.strsignal(result.si_status)})"
