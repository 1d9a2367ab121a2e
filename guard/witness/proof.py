# SPDX-License-Identifier: LGPL-2.1-or-later
"""Is a VMCOREINFO note that of the kernel which died?

Old memory can hold several: of an earlier boot, which a warm reset left there, of a kernel that kexec'ed into the one
that died, copies. A note *proves itself* if the kernel that it describes can be found by it (symbols through page
tables), leads back to it (vmcoreinfo_note in kernel/vmcore_info.c; without that symbol by its release), and had set
aside the memory that this capture kernel runs in: what an earlier boot has left proves itself too, but for that, and
for CRASHTIME=, which only a crash writes (kernel/vmcore_info.c:crash_save_vmcoreinfo())."""

from __future__ import annotations

from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.ranges import RangeSet
from guard.witness.dead_kernel import DeadKernel
from guard.witness.memory import Memory
from guard.witness.vmcoreinfo import Vmcoreinfo


class Proof(NamedTuple):
    """*dead* is the kernel that the note describes, None if its records are not to be had. *against* says what speaks
    against the note, *lacking* what would be needed to be sure of it; it has proven itself where both are empty.
    *paddr* is where that kernel has the very note, if it does."""

    dead: DeadKernel | None
    against: str = ""
    lacking: str = ""
    paddr: int | None = None

    @property
    def proven(self) -> bool:
        return not (self.against or self.lacking)


def prove(mem: Memory, info: Vmcoreinfo, own: RangeSet) -> Proof:
    """Ask the kernel that *info* describes about itself. *own* is the memory of the capture kernel that runs now,
    physical bytes, without low memory; where it is empty (an image) nothing is concluded from it. Never raises."""
    try:
        dead = DeadKernel(mem, info)
    except (WitnessError, ReadError) as error:
        return Proof(None, lacking=f"no page walk: {error}")
    if not dead.symbols():
        return Proof(dead, lacking="its kernel's symbols are not to be had")
    against, paddr = _elsewhere(dead, info)
    if against:
        return Proof(dead, against)
    if paddr is None:
        release = dead.release()
        if release is None:
            return Proof(dead, lacking="neither vmcoreinfo_note nor its release can be read")
        if release != info.text("OSRELEASE"):
            return Proof(dead, f"its kernel calls itself {release!r}")
    where = info.paddr if paddr is None else paddr
    ram = RangeSet((r.start, r.end) for r in dead.system_ram())
    if where is not None and where not in ram:
        return Proof(dead, lacking=f"its kernel tells of no System RAM at {where:#x}", paddr=paddr)
    if own:
        reserved = RangeSet((r.start, r.end) for r in dead.reservations())
        if not reserved:
            return Proof(dead, lacking="its kernel tells no crash reservation", paddr=paddr)
        if beyond := own - reserved:
            return Proof(dead, f"its kernel had not reserved {beyond}, which this kernel runs in", paddr=paddr)
        if info.crash_time is None:
            return Proof(dead, lacking="has no CRASHTIME=", paddr=paddr)
    return Proof(dead, paddr=paddr)


def place_of(dead: DeadKernel, info: Vmcoreinfo) -> int | None:
    """Where *dead* itself has the very note *info*: physical address; None where that is not to be had, or holds
    something else."""
    vaddr = dead.note_vaddr()
    try:
        if vaddr is not None and info.note:
            # its pages are neighbours: alloc_pages_exact(), kernel/vmcore_info.c
            paddr = dead.walk.translate(vaddr)
            if dead.walk.mem.read(paddr, len(info.note)) == info.note:
                return paddr
    except (WitnessError, ReadError):
        pass  # damaged, or not shown
    return None


def _elsewhere(dead: DeadKernel, info: Vmcoreinfo) -> tuple[str, int | None]:
    """Why the kernel's own note is another one than *info*; where it is, if it is the same and something tells that."""
    vaddr = dead.note_vaddr()
    if vaddr is None or info.paddr is None:
        return "", place_of(dead, info)
    try:
        paddr = dead.walk.translate(vaddr)
    except (WitnessError, ReadError):
        return "", None
    return ("", paddr) if paddr == info.paddr else (f"its kernel has its note at {paddr:#x}", None)
