# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recorded crash that other tests start from is what it is said to be."""

from __future__ import annotations

import json
from pathlib import Path

from tests.image import field
from tests.image.field import BOOT, NOTE, Field
from tests.image.machines import oldmem


def test_field_base_gives_the_map_that_the_live_kernels_word_asks_for(field_base: Path) -> None:
    result = oldmem("map", "--json", "--machine", field_base)
    assert (result.status, result.lines) == (0, [])
    entries = json.loads(result.out)["entries"]
    found = {(e["start"], e["end"]): e["refused_by"] for e in entries}
    for start, end in field.truth(field_base)["hwpoison"]:
        assert found[start, end] == "hwpoison"
    readable = [(e["start"], e["end"]) for e in entries if not e["refused_by"]]
    assert [r for r in readable if r[0] < field.WINDOW[0]] == BOOT


def test_copy_of_field_base_can_be_changed_and_the_base_stays(field_base: Path, tmp_path: Path) -> None:
    changed = Field(field_base, tmp_path / "changed")
    assert changed.peek(NOTE + 12, 10) == b"VMCOREINFO"
    changed.poke(NOTE + 12, b"XXXXXXXXXX")
    changed.without_note()
    changed.without_header()
    assert Field(field_base, tmp_path / "other").peek(NOTE + 12, 10) == b"VMCOREINFO"
    result = oldmem("map", "--machine", changed.write())
    assert any("no VMCOREINFO note" in line for line in result.warnings)


def test_note_of_field_base_is_found_by_searching(field_base: Path, tmp_path: Path) -> None:
    machine = Field(field_base, tmp_path / "machine")
    machine.without_note()
    machine.without_header()
    expected = json.loads(oldmem("map", "--json", "--machine", field_base).out)
    found = json.loads(oldmem("map", "--json", "--machine", machine.write()).out)
    assert found["readable"] == expected["readable"]
    assert found["problems"][0].startswith(f"VMCOREINFO note found by searching at {NOTE:#x}")
