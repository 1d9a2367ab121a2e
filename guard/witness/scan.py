# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding the dead kernel's VMCOREINFO note by searching old memory for it, when no one told where it is.

kernel/vmcore_info.c allocates the note as whole pages, so a note that starts a page is a strong hit, and any other is
a copy made by someone (a file in the page cache, a buffer). Several hits are normal: the capture kernel's own, notes
of an earlier boot that a warm reset left in RAM. The search ends at the first that proves itself (proof.py)."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.ranges import Range, RangeSet
from guard.witness.memory import Memory
from guard.witness.proof import Proof
from guard.witness.vmcoreinfo import NOTE_NAME, Vmcoreinfo, note_at

_PIECES = (1 << 20, 1 << 16, 1 << 12)
"""Sizes tried in turn, in bytes, where a larger read failed."""
_NHDR = struct.Struct("<III")
_MAX_FAILED_READS = 1 << 16
_MAX_STRONG = 1024
_MAX_WEAK = 64
"""Notes read at most, page-aligned and other: memory full of them is not a dead kernel's."""
_MAX_TRIED = 16
"""Notes that are asked for proof, each of which can cost a pass over a kernel's symbols."""
_MAX_KEPT = 8
_MAX_NOTE_SIZE = 1 << 16
_MIB, _GIB = 1 << 20, 1 << 30
_AT_START, _AT_END = 32 * _MIB, 256 * _MIB


class Candidate(NamedTuple):
    """A plausible note of another kernel than the running one, and why it was ranked as it was. *proof* is None if it
    was not asked for."""

    info: Vmcoreinfo
    page_aligned: bool
    reasons: tuple[str, ...]
    proof: Proof | None = None

    @property
    def proven(self) -> bool:
        return self.proof is not None and self.proof.proven


class Search(NamedTuple):
    """What a search came to: candidates, best first, one that has proven itself before all others; how many bytes were
    read for it in how many seconds; *late* if its time was over."""

    candidates: list[Candidate]
    size: int
    seconds: float
    late: bool


def scan(
    mem: Memory,
    ranges: RangeSet,
    own_paddr: int | None = None,
    *,
    verify: Memory | None = None,
    prove: Callable[[Vmcoreinfo], Proof] | None = None,
    time_limit: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Search:
    """Search *ranges* (physical bytes) of *mem*, the likely places first, until a note proves itself by *prove*, all is
    searched, or *time_limit* seconds are over. Each byte of *ranges* is read once, but where reading fails; what looks
    like a note is read from *verify* (default: *mem*).

    *own_paddr* is the running kernel's note (/sys/kernel/vmcoreinfo), which is none. Pages that cannot be read are
    skipped. Notes without proof are ranked: page-aligned ones come before others, those with CRASHTIME= before those
    without (only a crashed kernel writes it), the latest crash first."""
    start = clock()
    best: list[Candidate] = []
    left = {True: _MAX_STRONG, False: _MAX_WEAK}
    tried = size = 0
    late = False
    failures = [_MAX_FAILED_READS]
    for part in likely(ranges):
        for searched, hits in _hits(mem, part, failures):
            size += searched
            for paddr in hits:
                aligned = paddr % 4096 == 0
                if paddr % 4 or paddr == own_paddr or not left[aligned]:
                    continue
                left[aligned] -= 1
                found = _candidate(verify or mem, paddr)
                if found is None:
                    continue
                if prove and aligned and tried < _MAX_TRIED:
                    tried += 1
                    found = found._replace(proof=prove(found.info))
                if found.proven:
                    return Search([found, *best], size, clock() - start, False)
                best.append(found)
                best.sort(key=_rank, reverse=True)
                del best[_MAX_KEPT:]
            late = time_limit is not None and clock() - start >= time_limit
            if late:
                return Search(best, size, clock() - start, True)
    return Search(best, size, clock() - start, False)


def likely(ranges: RangeSet) -> Iterator[RangeSet]:
    """*ranges* in parts, in the order in which it pays to search them.

    The note is allocated by a subsys_initcall (crash_save_vmcoreinfo_init()), so from the highest zone of the first
    CPU's node, at a time when next to nothing is allocated: from one of the ends of what memblock had handed over. Seen
    in 39 boots of stock kernels (6.1, 6.12, 7.3; 0.5 to 12 GiB of RAM, one and two nodes): 24 times within 16 MiB of
    the start of the zone (4 GiB, or 16 MiB where all RAM is below), 9 times in the last 256 MiB of RAM, 6 times
    elsewhere above 16 MiB; never below 4 GiB where there was RAM above."""
    zones = ranges & RangeSet([(4 * _GIB, 1 << 64)]), ranges & RangeSet([(16 * _MIB, 4 * _GIB)])
    starts = [RangeSet((r.start, min(r.end, r.start + _AT_START)) for r in [*zone][:1]) for zone in zones]
    ends = [RangeSet((max(r.start, r.end - _AT_END & -_MIB), r.end) for r in zone) for zone in zones]
    left = ranges
    for part in (*starts, *ends, *zones, ranges):
        yield part & left
        left -= part


def _candidate(mem: Memory, paddr: int) -> Candidate | None:
    try:
        info = note_at(mem, paddr, _MAX_NOTE_SIZE)
    except (WitnessError, ReadError):
        return None
    if not info.desc.startswith(b"OSRELEASE="):
        return None
    aligned = paddr % 4096 == 0
    reasons = (
        "starts a page" if aligned else "does not start a page, so it may be a copy",
        "has no CRASHTIME=" if info.crash_time is None else f"has CRASHTIME={info.crash_time}",
    )
    return Candidate(info, aligned, reasons)


def _rank(candidate: Candidate) -> tuple[bool, bool, int, int]:
    time = candidate.info.crash_time
    against = bool(candidate.proof and candidate.proof.against)
    return candidate.page_aligned, not against, -1 if time is None else time, -(candidate.info.paddr or 0)


def _hits(mem: Memory, ranges: RangeSet, failures: list[int]) -> Iterator[tuple[int, list[int]]]:
    """For each read, how many bytes it gave, and the physical addresses where namesz, type and name of a VMCOREINFO
    note stand in them, ascending."""
    # What is kept is one byte short of a header and name, so nothing is found twice.
    kept = b""
    expected = -1
    for piece, data in _read_all(mem, ranges, failures):
        if piece.start != expected:
            kept = b""
        text = kept + data
        base = piece.start - len(kept)
        hits = []
        at = text.find(NOTE_NAME, 12)
        while at >= 0:
            namesz, _descsz, kind = _NHDR.unpack_from(text, at - 12)
            if (namesz, kind) == (len(NOTE_NAME), 0):
                hits.append(base + at - 12)
            at = text.find(NOTE_NAME, at + 1)
        yield len(data), hits
        kept = text[-(12 + len(NOTE_NAME) - 1) :]
        expected = piece.end


def _read_all(mem: Memory, ranges: RangeSet, failures: list[int]) -> Iterator[tuple[Range, bytes]]:
    """All of *ranges*, ascending; no bytes for a piece that could not be read."""
    for start, end in ranges:
        pending = [(start, end, 0)]
        while pending:
            start, end, level = pending.pop()
            size = _PIECES[level]
            piece = Range(start, min(end, (start // size + 1) * size))
            if piece.end < end:
                pending.append((piece.end, end, level))
            try:
                data = mem.read(piece.start, piece.size)
            except ReadError:
                failures[0] -= 1
                # Memory that fails throughout would cost a failed read per page: past the budget only chunks are tried.
                if level + 1 < len(_PIECES) and failures[0] > 0:
                    pending.append((piece.start, piece.end, level + 1))
                yield piece, b""
            else:
                yield piece, data
