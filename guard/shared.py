# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that a process shares with those that it forks: what one of them counts there, all of them see, also when it
has been killed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guard._core import ffi

if TYPE_CHECKING:
    from guard._core import CData


def new(kind: str, n: int = 1) -> CData:
    """An array of *n* of the C type *kind*, all zero. It lives as long as what is returned does, and in each process
    that is forked meanwhile as long as it does there. Raises MemoryError."""
    from mmap import mmap  # not for those who only import guard

    try:
        return ffi.from_buffer(f"{kind}[]", mmap(-1, n * ffi.sizeof(kind)))
    except OSError as e:
        raise MemoryError(f"no {n} {kind} that processes could share: {e.strerror}") from None
