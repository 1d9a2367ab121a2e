# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages that the dead kernel had marked in its struct pages, and sections that it had taken offline: a dump of the
machine does not read them, and says so."""

from __future__ import annotations

import json
from pathlib import Path

from tests.image.machines import GIB, MIB, PAGE, RecordedKernel, oldmem, phdrs_of
from tests.unit.witness_memory import OFFLINE_PAGE, POISONED_PAGE

BALLOON = (6 * GIB, 6 * GIB + 64 * MIB)
POISON = 5 * GIB
GONE = (7 * GIB, 7 * GIB + 128 * MIB)


def marked_machine(folder: Path) -> Path:
    machine = RecordedKernel()
    machine.marked = {
        BALLOON[0] // PAGE: OFFLINE_PAGE * ((BALLOON[1] - BALLOON[0]) // PAGE),
        POISON // PAGE: POISONED_PAGE,
    }
    machine.offline_sections = {GONE[0] >> 27}
    machine.finish_kernel()
    return machine.write(folder)


def test_marked_pages_and_offline_sections_are_in_no_pt_load(tmp_path: Path) -> None:
    header = tmp_path / "header"
    result = oldmem("header", "--machine", marked_machine(tmp_path), "-o", header)
    assert (result.status, result.lines) == (0, [])
    high = [p for p in phdrs_of(header.read_bytes()) if p.type == 1 and 4 * GIB <= p.paddr < 8 * GIB]
    assert [(p.paddr, p.paddr + p.memsz) for p in high] == [
        (4 * GIB, POISON),
        (POISON + PAGE, BALLOON[0]),
        (BALLOON[1], GONE[0]),
        (GONE[1], 8 * GIB),
    ]


def test_each_reason_is_a_rule_in_the_map(tmp_path: Path) -> None:
    told = json.loads(oldmem("map", "--machine", marked_machine(tmp_path), "--json").out)
    refused = {
        (e["start"], e["end"]): e["refused_by"]
        for e in told["entries"]
        if e["refused_by"] in ("hwpoison", "PageOffline", "offline section")
    }
    assert refused == {
        (POISON, POISON + PAGE): "hwpoison",
        BALLOON: "PageOffline",
        GONE: "offline section",
    }


def test_scattered_marks_cost_pt_loads_up_to_their_number_and_no_more(tmp_path: Path) -> None:
    """A balloon that took every other page of 256 MiB."""
    machine = RecordedKernel()
    kept = bytes(len(OFFLINE_PAGE))
    machine.marked = {(6 * GIB + i * 128 * MIB) // PAGE: (OFFLINE_PAGE + kept) * 16384 for i in range(2)}
    machine.finish_kernel()
    header = tmp_path / "header"
    result = oldmem("header", "--machine", machine.write(tmp_path), "-o", header)
    assert result.status == 0
    assert [line for line in result.lines if "memory in more than 8192 runs" in line] == result.lines
    loads = [p for p in phdrs_of(header.read_bytes()) if p.type == 1]
    assert len(loads) <= 8193
    told = json.loads(oldmem("map", "--machine", tmp_path, "--json").out)
    assert sum(e["refused_by"] == "PageOffline" for e in told["entries"]) == 32768
