# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long tests wait. Their seconds are those of the machine that they were written on, when it does nothing else;
where it is slower, or busy, all of them are as much longer: there is one factor for all that waits.

It is measured before anything waits, by some work of this process, again whenever a time is up before the wait is
called a failure, and by each guest that boots. It never shrinks: who was slow once may be so again."""

from __future__ import annotations

import time
from collections.abc import Callable

WORK = 2_500_000
USUAL_WORK = 0.1
"""Seconds that WORK rounds take."""

_factor = 0.0


def factor() -> float:
    """How many times slower than usual this machine has been; 1 at least."""
    return _factor or measure()


def slow(factor: float) -> None:
    """Something took *factor* times as long as usual."""
    global _factor
    _factor = max(_factor, factor, 1.0)


def measure() -> float:
    """The factor, after some work."""
    start = time.perf_counter()
    number = 1
    for _ in range(WORK):
        number = number * 5 & 0xFFFFFFFF
    slow((time.perf_counter() - start) / USUAL_WORK)
    return _factor


def patience(seconds: float) -> float:
    """*seconds*, in those of this machine."""
    return seconds * factor()


class Deadline:
    """*seconds* of the usual machine from now on."""

    def __init__(self, seconds: float) -> None:
        self._start = time.monotonic()
        self._seconds = seconds

    def left(self) -> float:
        """Seconds of the clock that are left; none, or less, where the time is up on a machine as slow as this."""
        left = self._end() - time.monotonic()
        if left <= 0:
            measure()
            left = self._end() - time.monotonic()
        return left

    def _end(self) -> float:
        return self._start + patience(self._seconds)


def wait_until(what: str, done: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns when *done* says yes. Raises AssertionError if that is not so in *seconds* of the usual machine."""
    deadline = Deadline(seconds)
    while not done():
        assert deadline.left() > 0, f"{what}: not in {patience(seconds):.0f} s"
        time.sleep(0.02)
