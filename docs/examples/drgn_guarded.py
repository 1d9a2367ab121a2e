# SPDX-License-Identifier: LGPL-2.1-or-later
"""drgn over guarded memory, without a vmcore: ``python drgn_guarded.py DIR PADDR...`` opens a recorded machine, prints
the dead kernel's release by its virtual address, through drgn's own walk of the page tables, and what drgn sees at
physical addresses. What the guard refuses is zeros there, and told."""

from __future__ import annotations

import sys

import drgn

from capture.guarded import MachineMemory, open_machine
from guard import Error

PLATFORMS = {"x86_64": drgn.Architecture.X86_64, "s390x": drgn.Architecture.S390X}


def program(memory: MachineMemory) -> drgn.Program:
    """The dead kernel for drgn; ``prog.load_debug_info([...])`` then brings types and symbols."""
    arch = memory.dump.arch
    if arch.info is None:
        raise Error("no VMCOREINFO of the dead kernel: drgn cannot know where its page tables are")
    prog = drgn.Program(drgn.Platform(PLATFORMS[arch.name]), vmcoreinfo=arch.info.desc)

    def read(address: int, count: int, offset: int, physical: bool) -> bytes:
        return memory.read(address, count)

    prog.add_memory_segment(0, memory.end, read, physical=True)
    prog.set_linux_kernel_custom(arch.info.desc, is_live=False)
    return prog


def main() -> None:
    with open_machine(sys.argv[1]) as memory:
        prog = program(memory)
        info = memory.dump.arch.info
        if info and (at := info.symbol("init_uts_ns")):
            name = prog.read(at + (info.offset("uts_namespace.name") or 0), 3 * 65)
            print(name[130:].split(b"\0")[0].decode())
        for word in sys.argv[2:]:
            paddr = int(word, 16)
            why = memory.why(paddr // memory.page_size)
            print(f"{paddr:#x}: {prog.read(paddr, 16, physical=True).hex()}{f' ({why})' if why else ''}")
        print({rule: pages for rule, pages in memory.counters().pages_refused.items() if pages})


if __name__ == "__main__":
    main()
