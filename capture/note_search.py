# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which VMCOREINFO note is the dead kernel's: what the kernel's own header has, else what is said to be its address
(fw_cfg, machine.json), and only where neither tells one, what a search of old memory finds.

The kernel's header was made by the kernel that loaded this one, and its notes were read after the crash: it can be
stale in its ranges of memory, not in its notes. An address in fw_cfg can be that of a kernel before, which has gone
into the one that died by kexec, so where the two differ, each is asked for proof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from capture import notes
from capture.notes import ElfNote
from guard import procvmcore
from guard.errors import ReadError, WitnessError
from guard.ranges import RangeSet
from guard.witness.proof import prove
from guard.witness.vmcoreinfo import Vmcoreinfo, note_at

if TYPE_CHECKING:
    from guard.witness.dead_kernel import DeadKernel
    from guard.witness.memory import Memory, Problems
    from guard.witness.scan import Candidate, Search


class Found(NamedTuple):
    """The note, and its kernel as far as that had to be asked already."""

    info: Vmcoreinfo | None
    dead: DeadKernel | None = None


class Wanted(NamedTuple):
    """What the search has to know: *hint* is the address that was told, *own* the capture kernel's memory without low
    memory, *own_note* its VMCOREINFO, *time_limit* in seconds, 0 for no search. All physical bytes."""

    hint: int | None
    own: RangeSet
    own_note: int | None
    time_limit: float
    provable: bool = True
    """Without --vmlinux: a note that has to be completed by it cannot prove itself yet."""


class Place(NamedTuple):
    """Where a search reads: *ranges* of *memory*, physical bytes. Others than those that verify what it finds: a search
    touches all of memory, which no recording may count, and a recording has only some of it."""

    memory: Memory
    ranges: RangeSet


def find(
    mem: Memory,
    known: Sequence[ElfNote],
    boot: RangeSet,
    wanted: Wanted,
    problems: Problems,
    search: Place | None = None,
) -> Found:
    """The dead kernel's note, from those *known* of the kernel's own header, or from *boot* RAM (physical bytes) of
    *mem*, searched at *search* if that is another place. Never raises: what was searched, what contradicts what, and
    that there is no note are lines in *problems*."""
    preloaded = notes.vmcoreinfo(known)
    told = _told(mem, wanted.hint, preloaded, problems)
    if preloaded is not None:
        if told is None:
            return Found(preloaded)
        if told.note == preloaded.note:
            return Found(told)
        return _decide(mem, preloaded, told, wanted.own, problems)
    if told is not None:
        if not wanted.provable:
            return Found(told)
        proof = prove(mem, told, wanted.own)
        if not proof.against:
            return Found(told, proof.dead)
        problems.note(f"{_at(told)}, where it was said to be: {proof.against}; searching for another one")
    return _searched(search or Place(mem, boot), mem, boot, wanted, told, problems)


def _told(mem: Memory, hint: int | None, preloaded: Vmcoreinfo | None, problems: Problems) -> Vmcoreinfo | None:
    if hint is None or (preloaded and preloaded.paddr == hint):
        return None
    try:
        return note_at(mem, hint)
    except (WitnessError, ReadError) as e:
        instead = f"the one of {procvmcore.PATH} is used" if preloaded else "searching for it"
        problems.note(f"VMCOREINFO note at {hint:#x}, where it was said to be: {e}; {instead}")
        return None


def _decide(mem: Memory, preloaded: Vmcoreinfo, told: Vmcoreinfo, own: RangeSet, problems: Problems) -> Found:
    """The kernel's header counts, unless only the other one proves itself."""
    proof = prove(mem, preloaded, own)
    name = f"the note of {procvmcore.PATH}"
    if not proof.proven:
        other = prove(mem, told, own)
        if other.proven:
            why = proof.against or proof.lacking
            problems.note(f"{_at(told)} proves itself, and is not {name} ({why}); it is used")
            return Found(told, other.dead)
    how = "proves itself" if proof.proven else "is believed"
    problems.note(f"{_at(told)}, where it was said to be, is not {name}, which {how} and is used")
    return Found(preloaded, proof.dead)


def _searched(
    search: Place, mem: Memory, boot: RangeSet, wanted: Wanted, told: Vmcoreinfo | None, problems: Problems
) -> Found:
    instead = "; the one that was told is used" if told else ": no notes, no symbols" if wanted.provable else ""
    if not wanted.time_limit:
        problems.note(f"nothing tells where the VMCOREINFO note is, and memory is not searched for it{instead}")
        return Found(told)
    from guard.witness.scan import scan  # of use to few machines

    ask = (lambda info: prove(mem, info, wanted.own)) if wanted.provable else None
    result = scan(search.memory, search.ranges, wanted.own_note, verify=mem, prove=ask, time_limit=wanted.time_limit)
    searched = _what(result, boot)
    if not result.candidates:
        problems.note(f"no VMCOREINFO note in {searched}{instead}")
        return Found(told)
    best = result.candidates[0]
    rest = f" in {searched}" if result.late else ""
    problems.note(f"VMCOREINFO note found by searching at {best.info.paddr or 0:#x} ({_why(best)}){rest}")
    return Found(best.info, best.proof.dead if best.proof else None)


def _what(result: Search, boot: RangeSet) -> str:
    if result.late:
        return f"{result.size >> 20} of {boot.size >> 20} MiB of old memory: the time for it was over (--search-time)"
    return f"{boot.size >> 20} MiB of old memory"


def _why(best: Candidate) -> str:
    if best.proven:
        return "it proves itself"
    reasons = [*best.reasons]
    if best.proof:
        reasons.append(best.proof.against or best.proof.lacking)
    return "not proven; " + ", ".join(dict.fromkeys(reasons))


def _at(info: Vmcoreinfo) -> str:
    return f"VMCOREINFO note at {info.paddr or 0:#x}"
