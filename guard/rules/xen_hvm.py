# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages of a Xen HVM guest without memory behind them, because they are in its balloon: reading one is emulated by the
device model, which is very slow and gives nothing.

Xen is asked through /dev/xen/privcmd what arch/x86/xen/mmu_hvm.c asks, but beforehand, so that no read waits for it.
That kernel's policy is kept: where Xen does not answer, the page is RAM, and that is told once. A guest's own privcmd
may be closed (drivers/xen/privcmd.c: without a target domain it blocks all hypercalls, unless it is unrestricted).
Little is lost then: the dead kernel's balloon driver has marked the same pages as PageOffline."""

from __future__ import annotations

import _thread
import errno
import os
import time
from collections.abc import Iterator

from guard._core import ffi, lib
from guard.ranges import Range, RangeSet
from guard.registry import RAM, Rule
from guard.witness.memmap import Collected
from guard.witness.memory import Problems

NAME = "Xen HVM"
PRIVCMD = "/dev/xen/privcmd"
TIME_LIMIT = 60.0
"""Seconds. A question takes about a microsecond, so that this is enough for some 200 GiB."""

_OPEN_LIMIT = 5.0
_PIECE = 1 << 15
"""Pages asked about between two looks at the clock."""


def rule(
    wanted: RangeSet, problems: Problems, page_size: int = 4096, path: str = PRIVCMD, time_limit: float = TIME_LIMIT
) -> Rule | None:
    """Refuses the pages of *wanted* behind which Xen has the device model. None, with a line in *problems*, where it
    cannot be asked; what could not be asked in *time_limit* seconds is RAM, and told there too."""
    try:
        fd = _open(path)
    except OSError as error:
        problems.note(f"{path}: {error.strerror}: Xen cannot be asked; no page is refused for it")
        return None
    try:
        return _ask(fd, wanted, problems, page_size, path, time_limit)
    finally:
        os.close(fd)


def _ask(fd: int, wanted: RangeSet, problems: Problems, page_size: int, path: str, time_limit: float) -> Rule | None:
    deadline = time.monotonic() + time_limit
    found = Collected(page_size)
    answered = failed = 0
    troubled: list[Range] = []
    error, why = ffi.new("int *"), ""
    for piece in _pieces(wanted, page_size):
        if time.monotonic() > deadline:
            unasked = wanted & RangeSet([(piece.start, 1 << 64)])
            problems.note(f"{path}: Xen could not be asked about {unasked} in {time_limit:g} s; taken as RAM")
            troubled += unasked
            break
        first, count = piece.start // page_size, piece.size // page_size
        bits = bytearray((count + 7) // 8)
        unanswered = int(lib.xen_mem_types(fd, first, count, ffi.from_buffer("uint8_t[]", bits), error))
        answered += count - unanswered
        if unanswered:
            failed += unanswered
            troubled.append(piece)
            why = why or os.strerror(error[0])
            if not answered:
                cure = ""
                if error[0] == errno.EPERM:
                    cure = "; xen_privcmd.unrestricted=1 on the capture kernel's command line cures it"
                problems.note(f"{path}: Xen answers no question ({why}): no page is refused for it{cure}")
                return None
        found.add(first, count, bits)
    if failed:
        problems.note(f"{path}: Xen did not answer for {failed} pages ({why}); taken as RAM")
    reason = "no memory behind it, says Xen"
    return Rule(NAME, Range(0, 1 << 64), found.pageset(), True, reason, RAM, RangeSet(troubled))


def _pieces(ranges: RangeSet, page_size: int) -> Iterator[Range]:
    step = _PIECE * page_size
    for start, end in ranges.inner_pages(page_size):
        for at in range(start, end, step):
            yield Range(at, min(at + step, end))


def _open(path: str) -> int:
    """As os.open(), for no longer than _OPEN_LIMIT: a guest's privcmd waits for xenstore, which may never come."""
    opened: list[int | OSError] = []
    done = _thread.allocate_lock()
    done.acquire()

    def work() -> None:
        try:
            opened.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            opened.append(error)
        done.release()

    _thread.start_new_thread(work, ())
    if not done.acquire(timeout=_OPEN_LIMIT):
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    if isinstance(opened[0], OSError):
        raise opened[0]
    return opened[0]
