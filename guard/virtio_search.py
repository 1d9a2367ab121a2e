# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding the plugged blocks of a virtio-mem device with few STATE requests: bisection over an LSB-first bitmap.

A STATE request covers a range and is answered PLUGGED, UNPLUGGED or MIXED (virtio specification, "Memory Device";
include/uapi/linux/virtio_mem.h). Who asks, and what an unusable answer is, is not decided here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

STATE_PLUGGED, STATE_UNPLUGGED, STATE_MIXED = 0, 1, 2

# Below this many blocks, plug states aligned to more than a block make it likely that the other half is uniform too.
_SPLIT_UNASKED = 8


def set_blocks(bitmap: bytearray, first: int, count: int) -> None:
    """Mark blocks [first, first + count) as plugged in an LSB-first *bitmap*."""
    end = first + count
    while first < end and first % 8:
        bitmap[first // 8] |= 1 << first % 8
        first += 1
    whole = (end - first) // 8
    bitmap[first // 8 : first // 8 + whole] = b"\xff" * whole
    for block in range(first + 8 * whole, end):
        bitmap[block // 8] |= 1 << block % 8


def plugged_runs(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """The set bits of an LSB-first *bitmap* as ascending (first block, count)."""
    start = -1
    for index, byte in enumerate(bitmap):
        if byte == (0 if start < 0 else 0xFF):
            continue
        for bit in range(8):
            plugged = byte >> bit & 1
            if plugged and start < 0:
                start = 8 * index + bit
            elif not plugged and start >= 0:
                yield start, 8 * index + bit - start
                start = -1
    if start >= 0:
        yield start, 8 * len(bitmap) - start


class Ask(NamedTuple):
    """Ask about [first, first + blocks). The *tail* blocks behind it are the other half of a range that is known not to
    be uniformly of a state in *not_all* (bits 1 << state); they wait for this answer."""

    first: int
    blocks: int
    tail: int = 0
    not_all: int = 0
    tries: int = 0


class Search:
    """Bisection over *blocks* blocks, *step* at first, depth first, so that the work list stays short whatever the
    device answers. ``bitmap`` grows as answers come in; ``left`` counts the blocks that have none yet.

    Two inferences save about a quarter of the requests. Where one half of a mixed range is uniform, the other half is
    most likely mixed: it is split without asking about it as a whole. And the last single block of a mixed range whose
    rest is plugged is unplugged. Never the other way round: no block counts as plugged without an answer for it."""

    def __init__(self, blocks: int, step: int) -> None:
        self.bitmap = bytearray((blocks + 7) // 8)
        self.left = blocks
        self._starts: Iterator[Ask] = (Ask(i, min(step, blocks - i)) for i in range(0, blocks, step))
        self._todo: list[Ask] = []
        self._again: list[Ask] = []

    def take(self, most: int) -> list[Ask]:
        """The next questions, at most *most*; none left = done. Each must be handed to settle() or retry()."""
        batch: list[Ask] = []
        while len(batch) < most:
            if self._todo:
                batch.append(self._todo.pop())
            elif ask := next(self._starts, None):
                batch.append(ask)
            elif self._again and not batch:
                self._todo, self._again = self._again, []
            else:
                break
        return batch

    def retry(self, ask: Ask) -> None:
        """Ask the same once more, after all else."""
        self._again.append(ask._replace(tries=ask.tries + 1))

    def settle(self, ask: Ask, state: int | None) -> None:
        """The answer to *ask*; None = none that counts."""
        if state == STATE_MIXED:
            self._split(ask.first, ask.blocks, 1 << STATE_PLUGGED | 1 << STATE_UNPLUGGED)
        else:
            self.left -= ask.blocks
            if state == STATE_PLUGGED:
                set_blocks(self.bitmap, ask.first, ask.blocks)
        if not ask.tail:
            return
        first = ask.first + ask.blocks
        not_all = ask.not_all & 1 << state if state is not None else 0
        if not_all == 1 << STATE_PLUGGED and ask.tail == 1:
            self.left -= 1
        elif not_all and ask.tail >= _SPLIT_UNASKED:
            self._split(first, ask.tail, not_all)
        else:
            self._todo.append(Ask(first, ask.tail))

    def _split(self, first: int, count: int, not_all: int) -> None:
        half = (count + 1) // 2
        self._todo.append(Ask(first, half, count - half, not_all))
