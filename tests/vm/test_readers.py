# SPDX-License-Identifier: LGPL-2.1-or-later
"""What makedumpfile leaves out of the vmcore that oldmem serves, page by page, against a count of struct pages that
shares nothing with either (page_oracle)."""

from __future__ import annotations

import struct
from pathlib import Path

import drgn

from tests.vm.conftest import MakeCrashedGuest
from tests.vm.harness import Guest, MiB
from tests.vm.page_oracle import Memory, Pages, Piece, bitmaps, judge

LOAD = Path(__file__).parent / "harness" / "guest" / "pages.py"
PAGE = 4096
LIVE_DRIFT = 0.05  # of the pages that the live kernel had told of: it ran on for a moment


def take_pages(g: Guest) -> dict[str, set[int]]:
    """Runs the load; pfns of what the live kernel calls a user's page, and a tail page."""
    g.put({"/tmp/pages.py": LOAD})
    interpreter = g.sh("ls /usr/bin/python3.*").split()[0]
    g.sh(
        f"{interpreter} -IS /tmp/pages.py > /tmp/pages.log 2>&1 &"
        " until [ -e /tmp/pages ]; do kill -0 $! || { cat /tmp/pages.log; exit 1; }; sleep 0.2; done",
        timeout=200,
    )
    live: dict[str, set[int]] = {}
    for line in g.sh("cat /tmp/pages").splitlines():
        name, first, end = line.split()
        live.setdefault(name, set()).update(range(int(first), int(end)))
    return live


def dead_memory(g: Guest, note: str) -> Memory:
    """The memory of the crashed guest; *note* is what its /sys/kernel/vmcoreinfo said: address and size, in hex."""
    pieces = [Piece(file.path, file.offset, file.paddr, file.size) for file in g.ram_files]
    paddr, size = (int(word, 16) for word in note.split())
    raw = Memory(pieces, "").physical(paddr, size)
    name, desc, _ = struct.unpack_from("<3I", raw)
    start = 12 + (name + 3 & -4)
    return Memory(pieces, raw[start : start + desc].decode())


def dump(g: Guest, command: str) -> tuple[set[int], set[int]]:
    """Dumps to the scratch disk; pfns of the pages left out, and of those in the dump."""
    g.sh(f"{command} -f /proc/vmcore /dev/scratch > /tmp/log 2>&1 && sync", timeout=300)
    there, kept = bitmaps(g.scratch)
    return there - kept, kept


def close(ours: set[int], live: set[int]) -> bool:
    return len(ours ^ live) <= LIVE_DRIFT * len(live)


def test_makedumpfile_of_before_the_rename_keeps_every_page_that_is_no_users(crashed_guest: MakeCrashedGuest) -> None:
    live: dict[str, set[int]] = {}
    note: list[str] = []

    def before_crash(g: Guest) -> None:
        note.append(g.sh("cat /sys/kernel/vmcoreinfo"))
        live.update(take_pages(g))

    g = crashed_guest("7", memory=512 * MiB, below_4g=512 * MiB, after_load=before_crash, testing=True)
    memory = dead_memory(g, note[0])
    pages: Pages = judge(memory)
    assert close(pages.user, live["user"])
    assert len(pages.seconds - live["tail"]) <= LIVE_DRIFT * len(pages.seconds)
    assert len(pages.user) >= 28 * MiB // PAGE
    assert len(pages.seconds) >= 300

    # what is wrong with the kernel's own file: not knowing tail pages, these collectors take the second page of each
    # compound page for anonymous, for what lies in its `mapping` is folio._entire_mapcount, which is -1
    left_out, kept = dump(g, "makedumpfile -d 8")
    assert left_out == (pages.user | pages.seconds) & (left_out | kept)
    assert pages.seconds & left_out

    g.sh("oldmem init -q", timeout=200)
    left_out, kept = dump(g, "makedumpfile-testing -l -d 31")
    assert kept == pages.kept(31) & (left_out | kept)
    left_out, kept = dump(g, "makedumpfile -l -d 31")
    # (1.7.6 also keeps free pages on kernels since 6.12: it takes them for slab)
    assert kept == (pages.kept(31) | pages.free) & (left_out | kept)
    left_out, kept = dump(g, "makedumpfile -d 8")
    assert kept == pages.kept(8) & (left_out | kept)

    program = drgn.Program()
    program.set_core_dump(g.scratch)
    for pfn in pages.seconds & kept:
        assert program.read(pfn * PAGE, PAGE, physical=True) == memory.physical(pfn * PAGE, PAGE), hex(pfn)
