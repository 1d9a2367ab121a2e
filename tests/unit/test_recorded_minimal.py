# SPDX-License-Identifier: LGPL-2.1-or-later
"""machine.json of a minimal record: what of a range an image holds, and what else a capture kernel knew."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import recorded
from capture.image_machine import ImageMachine
from capture.recorded import CAPTURE_KERNEL, HOST, RamImage
from guard.errors import SourceError
from guard.physmem import ABSENT, PREAD, Segment
from guard.ranges import RangeSet

PAGE = 4096
MIB = 1 << 20
Document = dict[str, Any]

GOOD: Document = {
    "format": 1,
    "arch": "x86_64",
    "seen_from": "capture kernel",
    "own_vmcoreinfo": 0x5000,
    "machine_checks": [[0x1000, 0x2000], [0x7000, 0x7001]],
    "ram": [
        {"image": "pages.raw", "paddr": 0, "size": 2 * MIB, "held": [[1, 2], [8, 1]]},
        {"image": "pages.raw", "paddr": 4 * MIB, "size": MIB, "held": [], "offset": 3 * PAGE},
    ],
    "virtio_mem": [
        {
            "addr": 128 * MIB,
            "region_size": 8 * MIB,
            "usable_region_size": 8 * MIB,
            "block_size": 2 * MIB,
            "plugged_size": 2 * MIB,
            "requested_size": 2 * MIB,
            "plugged": [[0, 1]],
            "name": "0000:00:03.0",
            "image": "pages.raw",
            "offset": 3 * PAGE,
            "held": [[3, 1]],
            "shown": [[0, 512], [1024, 1]],
        }
    ],
}


def put(folder: Path, document: object, pages: int = 4) -> str:
    (folder / "machine.json").write_text(json.dumps(document))
    (folder / "pages.raw").write_bytes(b"".join(bytes([i + 1]) * PAGE for i in range(pages)))
    return str(folder)


def test_minimal_record_is_loaded_and_comes_back_as_saved(tmp_path: Path) -> None:
    machine = recorded.load(put(tmp_path, GOOD))
    assert machine.ram[0] == RamImage("pages.raw", 0, 0, 2 * MIB, ((1, 2), (8, 1)))
    assert machine.ram[1].held == ()
    assert machine.virtio_mem[0].held == ((3, 1),)
    assert machine.virtio_mem[0].shown == ((0, 512), (1024, 1))
    assert (machine.seen_from, machine.own_vmcoreinfo) == (CAPTURE_KERNEL, 0x5000)
    assert machine.machine_checks == ((0x1000, 0x2000), (0x7000, 0x7001))
    recorded.save(str(tmp_path), machine)
    assert recorded.load(str(tmp_path)) == machine


def test_what_is_not_said_is_that_a_host_saw_all_of_it(tmp_path: Path) -> None:
    document = {"format": 1, "arch": "x86_64", "ram": [{"image": "pages.raw", "paddr": 0, "size": 4 * PAGE}]}
    machine = recorded.load(put(tmp_path, document))
    assert (machine.seen_from, machine.own_vmcoreinfo, machine.machine_checks) == (HOST, None, None)
    recorded.save(str(tmp_path), machine)
    saved = json.loads((tmp_path / "machine.json").read_text())
    assert not {"seen_from", "own_vmcoreinfo", "machine_checks"} & saved.keys()
    assert "held" not in saved["ram"][0]


def test_image_needs_no_more_than_the_pages_that_are_held(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"virtio_mem\[0\]\.image: .*pages\.raw has 12288 bytes, expected at least 16384"
    ):
        recorded.load(put(tmp_path, GOOD, pages=3))


@pytest.mark.parametrize(
    ("place", "value", "wrong"),
    [
        (("ram", 0, "held"), [[0, 513]], r"ram\[0\]\.held\[0\]: ends with page 512, but the range has only 512 pages"),
        (("ram", 0, "held"), [[3, 1], [2, 1]], r"ram\[0\]\.held\[1\]: starts at page 2, expected 4 or more"),
        (("ram", 0, "held"), [[3, 0]], r"ram\[0\]\.held\[0\]\[1\]: 0 found, expected at least one page"),
        (("ram", 0, "held"), [3], r"ram\[0\]\.held\[0\]: a number found, expected an array"),
        (("ram", 0, "held"), 3, r"ram\[0\]\.held: a number found, expected an array"),
        (("ram", 0, "held"), [[-1, 1]], r"ram\[0\]\.held\[0\]\[0\]: .* out of range"),
        (("ram", 1, "paddr"), 4 * MIB + 1, r"ram\[1\]\.held: the range starts at 0x400001, not with a page"),
        (("virtio_mem", 0, "shown"), [[0, 2049]], r"virtio_mem\[0\]\.shown\[0\]: ends with page 2048"),
        (("virtio_mem", 0, "name"), 7, r"virtio_mem\[0\]\.name: a number found, expected a string"),
        (("seen_from",), "afar", r"seen_from: .*afar.* is not known"),
        (("own_vmcoreinfo",), "0x5000", r"own_vmcoreinfo: string .* expected an integer"),
        (("machine_checks",), [[5, 5]], r"machine_checks\[0\]: ends at 0x5, expected more than its start 0x5"),
        (("machine_checks",), [[5]], r"machine_checks\[0\]: an array found, expected an array \[start, end\]"),
        (("machine_checks",), [[5, 1 << 70]], r"machine_checks\[0\]\[1\]: .* out of range"),
    ],
)
def test_each_wrong_value_is_told_by_its_place(
    tmp_path: Path, place: tuple[Any, ...], value: object, wrong: str
) -> None:
    document: Any = copy.deepcopy(GOOD)
    at = document
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(SourceError, match=wrong):
        recorded.load(put(tmp_path, document))


def test_segments_have_what_is_held_and_speak_for_all_that_was_shown(tmp_path: Path) -> None:
    machine = ImageMachine(recorded.load(put(tmp_path, GOOD)))
    segments = machine.firmware_segments(RangeSet([(0, 1 << 40)]))
    ram, device = 4 * MIB, 128 * MIB
    expected = RangeSet(
        [(0, 2 * MIB), (ram, ram + MIB), (device, device + 2 * MIB), (device + 4 * MIB, device + 4 * MIB + PAGE)]
    )
    assert RangeSet((s.paddr, s.end) for s in segments) == expected
    held = [(s.paddr, s.size, s.offset) for s in segments if s.how != ABSENT]
    assert held == [(PAGE, 2 * PAGE, 0), (8 * PAGE, PAGE, 2 * PAGE), (device + 3 * PAGE, PAGE, 3 * PAGE)]
    assert machine.devices[0].name == "0000:00:03.0"
    assert (machine.own_vmcoreinfo, machine.images) == (0x5000, RangeSet())
    assert machine.machine_checks == RangeSet([(0x1000, 0x2000), (0x7000, 0x7001)])
    machine.close()


runs = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=8)


@given(runs)
def test_held_pages_are_found_back_to_back(gaps: list[tuple[int, int]]) -> None:
    held, first, offset = [], 0, 0
    where: dict[int, int] = {}
    for gap, count in gaps:
        first += gap
        held.append([first, count])
        for i in range(count):
            where[first + i] = offset
            offset += PAGE
        first += count
    document = {**GOOD, "virtio_mem": [], "ram": [{**GOOD["ram"][0], "held": held}]}
    machine = recorded.from_document(document, "/nowhere")
    whole = recorded.RamImage(*machine.ram[0])
    image_machine = ImageMachine.__new__(ImageMachine)
    image_machine.page_size = PAGE
    pieces = image_machine._held(
        Segment(0, whole.size, 5, 0, PREAD, "x"), whole.held or (), RangeSet([(0, whole.size)])
    )
    found = {
        page: s.offset + (page * PAGE - s.paddr)
        for s in pieces
        if s.how != ABSENT
        for page in range(s.paddr // PAGE, s.end // PAGE)
    }
    assert found == where
    assert RangeSet((s.paddr, s.end) for s in pieces) == RangeSet([(0, whole.size)])
    assert pieces == sorted(pieces)
