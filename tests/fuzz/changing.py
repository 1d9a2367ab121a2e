# SPDX-License-Identifier: LGPL-2.1-or-later
"""Old memory that changes between two reads, as it does where a device of the dead machine still writes to it: what one
read has shown, the next one need not."""

from __future__ import annotations

import random
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

MOST_READS = 1 << 17
MOST_BYTES = 1 << 30
"""Of one dump of the machines here: a sound one takes 400 reads of 28 MiB."""
_HANG = 300
"""Seconds; no measure of speed, but of what never ends."""
_EDGES = (0, 1, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 52, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
Read = Callable[[int, int], bytes]


class Kind(NamedTuple):
    """Which answers change: of reads that have any byte that was read before (*again*) or all, one in *every*."""

    again: bool
    every: int


KINDS = tuple(Kind(again, every) for again in (True, False) for every in (1, 2, 10, 100, 300))


class Changing:
    """The bytes that *read* gives, changed at random, by *seed*, from one read to the next."""

    def __init__(self, seed: int, kind: Kind) -> None:
        self._random = random.Random(seed)
        self._kind = kind
        self._seen: set[int] = set()  # words
        self.reads = self.size = self.changed = 0

    def read(self, read: Read, at: int, size: int) -> bytes:
        self.reads += 1
        self.size += size
        assert self.reads <= MOST_READS, f"{self.reads} reads"
        assert self.size <= MOST_BYTES, f"{self.size} bytes read"
        assert at >= 0
        assert size >= 0
        data = read(at, size)
        words = range(at // 8, (at + min(size, 1 << 12) + 7) // 8)
        due = not self._kind.again or not self._seen.isdisjoint(words)
        self._seen.update(words)
        if due and data and not self._random.randrange(self._kind.every):
            self.changed += 1
            data = self._change(data)
        return data

    def _change(self, data: bytes) -> bytes:
        new, chance = bytearray(data), self._random
        for _ in range(chance.choice((1, 1, 1, 4, 64))):
            how = chance.randrange(6)
            at = chance.randrange(len(data))
            if how < 2:
                new[at] ^= 1 << chance.randrange(8)
            elif how == 2:
                new[at] = chance.randrange(256)
            elif how == 3:
                word = struct.pack("<Q", chance.choice((*_EDGES, chance.getrandbits(64), chance.getrandbits(32))))
                at &= ~7 if len(data) > 8 else -1
                new[at : at + 8] = word[: len(data) - at]
            elif how == 4:
                new[at : at + 4] = struct.pack("<I", chance.choice((0, 1, 0xFFFF, 1 << 31, 0xFFFFFFFF)))[
                    : len(data) - at
                ]
            elif chance.randrange(4) == 0:
                new[:] = bytes(len(data)) if chance.randrange(2) else chance.randbytes(len(data))
        return bytes(new)


@contextmanager
def ends() -> Iterator[None]:
    """What is done inside comes to an end, or fails."""

    def hang(*_: object) -> None:
        raise AssertionError("it does not end")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(_HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
