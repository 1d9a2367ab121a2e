# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding the dead kernel's VMCOREINFO note by searching old memory for it, when no one told where it is.

kernel/vmcore_info.c allocates the note as whole pages, so a note that starts a page is a strong hit, and any other is
a copy made by someone (a file in the page cache, a buffer). Several hits are normal: the capture kernel's own, notes
of an earlier boot that a warm reset left in RAM."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.ranges import Range, RangeSet
from guard.witness.memory import Memory
from guard.witness.vmcoreinfo import NOTE_NAME, Vmcoreinfo, note_at

_PIECES = (1 << 20, 1 << 16, 1 << 12)
"""Sizes tried in turn, in bytes, where a larger read failed."""
_NHDR = struct.Struct("<III")
_MAX_FAILED_READS = 1 << 16
_MAX_STRONG = 1024
_MAX_WEAK = 64
"""Notes read at most, page-aligned and other: memory full of them is not a dead kernel's."""
_MAX_KEPT = 8
_MAX_NOTE_SIZE = 1 << 16


class Candidate(NamedTuple):
    """A plausible note of another kernel than the running one, and why it was ranked as it was."""

    info: Vmcoreinfo
    page_aligned: bool
    reasons: tuple[str, ...]


def scan(
    mem: Memory, ranges: RangeSet, own_paddr: int | None = None, excluded: RangeSet | None = None
) -> list[Candidate]:
    """Candidates found in *ranges* (physical bytes), best first; an empty list if there is none.

    *own_paddr* is the running kernel's note (/sys/kernel/vmcoreinfo), *excluded* the memory that the running kernel
    owns; neither is searched. Pages that cannot be read are skipped. Page-aligned notes come before others, those with
    CRASHTIME= before those without (only a crashed kernel writes it), the latest crash first."""
    best: list[Candidate] = []
    left = {True: _MAX_STRONG, False: _MAX_WEAK}
    for paddr in _hits(mem, ranges - excluded if excluded else ranges):
        aligned = paddr % 4096 == 0
        if paddr % 4 or paddr == own_paddr or not left[aligned]:
            continue
        left[aligned] -= 1
        try:
            info = note_at(mem, paddr, _MAX_NOTE_SIZE)
        except (WitnessError, ReadError):
            continue
        if not info.desc.startswith(b"OSRELEASE="):
            continue
        reasons = (
            "starts a page" if aligned else "does not start a page, so it may be a copy",
            "has no CRASHTIME=" if info.crash_time is None else f"has CRASHTIME={info.crash_time}",
        )
        best.append(Candidate(info, aligned, reasons))
        best.sort(key=_rank, reverse=True)
        del best[_MAX_KEPT:]
    return best


def _rank(candidate: Candidate) -> tuple[bool, int, int]:
    time = candidate.info.crash_time
    return candidate.page_aligned, -1 if time is None else time, -(candidate.info.paddr or 0)


def _hits(mem: Memory, ranges: RangeSet) -> Iterator[int]:
    """Physical addresses where namesz, type and name of a VMCOREINFO note stand, ascending."""
    # What is kept is one byte short of a header and name, so nothing is found twice.
    kept = b""
    expected = -1
    for piece, data in _read_all(mem, ranges):
        if piece.start != expected:
            kept = b""
        text = kept + data
        base = piece.start - len(kept)
        at = text.find(NOTE_NAME, 12)
        while at >= 0:
            namesz, _descsz, kind = _NHDR.unpack_from(text, at - 12)
            if (namesz, kind) == (len(NOTE_NAME), 0):
                yield base + at - 12
            at = text.find(NOTE_NAME, at + 1)
        kept = text[-(12 + len(NOTE_NAME) - 1) :]
        expected = piece.end


def _read_all(mem: Memory, ranges: RangeSet) -> Iterator[tuple[Range, bytes]]:
    failures = 0
    for start, end in ranges:
        pending = [(start, end, 0)]
        while pending:
            start, end, level = pending.pop()
            size = _PIECES[level]
            piece = Range(start, min(end, (start // size + 1) * size))
            if piece.end < end:
                pending.append((piece.end, end, level))
            try:
                yield piece, mem.read(piece.start, piece.size)
            except ReadError:
                failures += 1
                # Memory that fails throughout would cost a failed read per page: past the budget only chunks are tried.
                if level + 1 < len(_PIECES) and failures < _MAX_FAILED_READS:
                    pending.append((piece.start, piece.end, level + 1))
