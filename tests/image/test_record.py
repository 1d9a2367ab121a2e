# SPDX-License-Identifier: LGPL-2.1-or-later
"""Minimal records: they replay to the same map, header and guard, and hold nothing else of memory."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from capture import record as record_module
from capture import recorded, report
from capture.dump import CUT, DYNAMIC, KERNEL, PRELOADED, Dump
from capture.image_machine import ImageMachine
from capture.record import record_minimal
from capture.sources import files
from guard.compiled import compile_guard
from guard.errors import Error
from guard.physmem import LOG, Touched
from guard.ranges import RangeSet
from tests.image.conftest import Recorded
from tests.image.machines import BLOCK, HIGH, PAGE, VMCOREINFO_AT, RecordedKernel, oldmem
from tests.unit.witness_memory import POISONED_PAGE

LRU_PAGE = struct.pack("<QQQQQQII", 1 << 5, 0, 0, 0, 0, 0, 0xFFFFFFFF, 1).ljust(64, b"\0")
ANONYMOUS_PAGE = struct.pack("<QQQQQQII", 0, 0, 0, 0xFFFF888000001001, 0, 0, 0, 1).ljust(64, b"\0")


class Replay(NamedTuple):
    """All that must come out of a record as it went in."""

    header: bytes
    guard: bytes
    map: dict[str, Any]
    told: dict[str, Any]


def replay(dump: Dump) -> Replay:
    root = dump.machine.root.rsplit("/", 1)[0]

    def elsewhere(value: dict[str, Any]) -> Any:
        return json.loads(json.dumps(value).replace(root, "MACHINE"))

    the_map = elsewhere(report.map_json(dump))
    told = elsewhere(report.guard_json(dump))
    del the_map["memory_source"], told["bytes_read"]
    # paths of images are in lines on what cannot be read
    return Replay(dump.core.header, compile_guard(dump.registry), the_map, told)


def opened(folder: Path, layout: str = CUT, mode: str = DYNAMIC) -> tuple[Dump, files.Seen]:
    """The machine in *folder*, with what is read of it noted."""
    seen: files.Seen = {}
    files.seen = seen
    try:
        machine = ImageMachine(recorded.load(str(folder)))
        machine.touched = Touched(PAGE)
        return Dump(machine, layout, mode), seen
    finally:
        files.seen = None


def recorded_minimal(folder: Path, to: Path, change: Callable[[Dump], None] | None = None, **options: Any) -> list[str]:
    """Record the machine in *folder* minimally; returns the warnings."""
    dump, seen = opened(folder)
    if change:
        change(dump)
    warnings: list[str] = []
    try:
        record_minimal(dump, str(to), seen, warnings.append, **options)
    finally:
        dump.close()
    return warnings


def assert_same(one: Path, other: Path) -> None:
    for layout, mode in ((CUT, DYNAMIC), (KERNEL, DYNAMIC), (CUT, PRELOADED)):
        found: list[Replay | str] = []
        for folder in (one, other):
            try:
                dump, _ = opened(folder, layout, mode)
            except Error as e:
                found.append(str(e).replace(str(folder), "MACHINE"))
                continue
            found.append(replay(dump))
            dump.close()
        assert found[0] == found[1]


def held(folder: Path) -> RangeSet:
    machine = recorded.load(str(folder))
    entries = [(r.paddr, r.held) for r in machine.ram] + [(v.addr, v.held) for v in machine.virtio_mem]
    return RangeSet((at + first * PAGE, at + (first + n) * PAGE) for at, runs in entries for first, n in runs or ())


def test_minimal_record_replays_to_the_same_map_header_and_guard(image_machine: Recorded, tmp_path: Path) -> None:
    result = oldmem("record", "--minimal", "--machine", image_machine.folder, tmp_path / "new")
    assert (result.status, result.lines) == (0, [])
    assert re.search(r"\d+ pages of memory, \d+ files of /sys and /proc and machine\.json in ", result.out)
    assert sorted(os.listdir(tmp_path / "new")) == ["machine.json", "pages.raw", "root"]
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert_same(image_machine.folder, tmp_path / "new")


def test_record_of_a_record_has_the_same_pages_and_files(image_machine: Recorded, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert recorded_minimal(image_machine.folder, one) == []
    assert recorded_minimal(one, two) == []
    for name in ("machine.json", "pages.raw"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (one, two)]
    assert names[0] == names[1]


def test_held_pages_are_what_memory_has_there_and_far_less_than_all(image_machine: Recorded, tmp_path: Path) -> None:
    recorded_minimal(image_machine.folder, tmp_path / "new")
    machine = recorded.load(str(tmp_path / "new"))
    pages = held(tmp_path / "new")
    assert VMCOREINFO_AT in pages
    with (tmp_path / "new/pages.raw").open("rb") as image:
        for entry in machine.ram:
            image.seek(entry.offset)
            for first, count in entry.held or ():
                for page in range(first, first + count):
                    paddr = entry.paddr + page * PAGE
                    assert image.read(PAGE) == image_machine.pages.get(paddr, bytes(PAGE))
    assert pages.size < 64 << 20


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6),
    st.sets(st.integers(0x11E00, 0x11E10), max_size=3),
    st.sets(st.sampled_from([0, 3, 128, 129]), max_size=2),
    st.sampled_from([(), ("e820",), ("etc/vmcoreinfo",), ("SRAT", "DMI"), ("e820", "etc/vmcoreinfo", "SRAT")]),
    st.booleans(),
)
def test_any_machine_replays_to_the_same(
    gaps: list[tuple[int, int]], poisoned: set[int], offline: set[int], missing: tuple[str, ...], no_iomem: bool
) -> None:
    kernel = RecordedKernel()
    kernel.shrink()
    runs, first = [], 0
    for gap, count in gaps:
        first += gap + 1
        runs.append([first, count])
        first += count
    size = 64 * BLOCK
    plugged = sum(count for _, count in runs) * BLOCK
    kernel.plugged = [(a, b) for a, b in runs]
    kernel.document["virtio_mem"][0] |= {"region_size": size, "usable_region_size": size, "plugged": runs}
    kernel.document["virtio_mem"][0] |= {"plugged_size": plugged, "requested_size": plugged}
    kernel.marked = dict.fromkeys(poisoned, POISONED_PAGE)
    kernel.offline_sections = offline
    kernel.files = {n: data for n, data in kernel.files.items() if not any(m in n for m in missing)}
    if no_iomem:
        del kernel.files["proc/iomem"]
    kernel.finish_kernel()
    assert not any(pfn in kernel.kernel.mem.pages for pfn in poisoned)
    with tempfile.TemporaryDirectory() as folder:
        machine = kernel.write(Path(folder))
        assert recorded_minimal(machine, machine / "new") == []
        assert_same(machine, machine / "new")


def test_what_is_not_held_reads_as_zeros_with_a_line_and_exit_status_4(small_machine: Recorded, tmp_path: Path) -> None:
    recorded_minimal(small_machine.folder, tmp_path / "new")
    assert oldmem("header", "--machine", tmp_path / "new", "-o", tmp_path / "h").status == 0
    result = oldmem("save", "--machine", tmp_path / "new", "-o", tmp_path / "vmcore")
    assert result.status == 4
    pages = held(tmp_path / "new")
    lines = [line for line in result.warnings if "could not be read and is zeros: No data available" in line]
    assert lines
    told = json.loads(oldmem("map", "--machine", tmp_path / "new", "--json").out)
    with (tmp_path / "vmcore").open("rb") as vmcore:
        for load in told["pt_load"][1:]:
            for at in range(0, load["size"], PAGE):
                vmcore.seek(load["offset"] + at)
                paddr = load["paddr"] + at
                expected = small_machine.pages.get(paddr, bytes(PAGE)) if paddr in pages else bytes(PAGE)
                assert vmcore.read(PAGE) == expected


def test_collector_inside_of_which_a_minimal_record_is_gets_zeros_and_all_is_counted(
    small_machine: Recorded, tmp_path: Path
) -> None:
    recorded_minimal(small_machine.folder, tmp_path / "new")
    oldmem("save", "--machine", tmp_path / "new", "-o", tmp_path / "saved")
    vmcore, out = tmp_path / "vmcore", tmp_path / "out"
    line = f"dd if={vmcore} of={out} bs=1M status=none"
    options = ("--machine", tmp_path / "new", "--vmcore", vmcore, "--report", tmp_path / "report")
    result = oldmem("run", *options, "--", "sh", "-c", line)
    assert result.status == 4
    assert out.read_bytes() == (tmp_path / "saved").read_bytes()
    told = json.loads((tmp_path / "report").read_text())
    assert {u["why"] for u in told["unreadable"]} == {"No data available"}


@pytest.mark.parametrize("made", [LRU_PAGE, ANONYMOUS_PAGE])
def test_page_of_a_user_is_never_written_and_is_told(tmp_path: Path, made: bytes) -> None:
    kernel = RecordedKernel()
    kernel.shrink()
    kernel.marked[VMCOREINFO_AT // PAGE] = made
    kernel.finish_kernel()
    (tmp_path / "machine").mkdir()
    machine = kernel.write(tmp_path / "machine")
    (line,) = recorded_minimal(machine, tmp_path / "new")
    assert (
        line
        == f"not written: 1 pages, the first at {VMCOREINFO_AT:#x}, are not the kernel's own, but a user's or nobody's"
    )
    assert VMCOREINFO_AT not in held(tmp_path / "new")
    assert b"VMCOREINFO" not in (tmp_path / "new/pages.raw").read_bytes()


@pytest.fixture
def without_struct_pages(tmp_path: Path) -> Path:
    kernel = RecordedKernel()
    kernel.shrink()
    desc = kernel.finish_kernel()
    kernel.put_note(b"".join(line for line in desc.splitlines(True) if b"page.mapping" not in line))
    (tmp_path / "machine").mkdir()
    return kernel.write(tmp_path / "machine")


def test_nothing_is_written_where_nothing_tells_whose_pages_are(without_struct_pages: Path, tmp_path: Path) -> None:
    result = oldmem("record", "--minimal", "--machine", without_struct_pages, tmp_path / "new")
    assert result.status == 1
    assert re.search(r"OFFSET\(page\.mapping\).*nothing tells whose \d+ pages are \(--force", result.lines[-1])
    assert not (tmp_path / "new").exists()
    assert oldmem("record", "--minimal", "--force", "--machine", without_struct_pages, tmp_path / "new").status == 0
    assert_same(without_struct_pages, tmp_path / "new")


def test_page_without_struct_page_is_left_out_unless_forced(tmp_path: Path) -> None:
    kernel = RecordedKernel()
    kernel.shrink()
    kernel.tree = [entry for entry in kernel.tree if entry[0] != HIGH[0]]
    kernel.finish_kernel()
    (tmp_path / "machine").mkdir()
    machine = kernel.write(tmp_path / "machine")

    def touch(dump: Dump) -> None:
        dump.exact.touch(HIGH[0], 1)

    assert recorded_minimal(machine, tmp_path / "new", touch) == [
        f"not written: 1 pages, the first at {HIGH[0]:#x}, have no struct page that tells whose they are "
        "(--force: write them all the same)"
    ]
    assert HIGH[0] not in held(tmp_path / "new")
    assert recorded_minimal(machine, tmp_path / "forced", touch, force=True) == []
    assert HIGH[0] in held(tmp_path / "forced")


def test_pages_of_the_log_are_left_out_unless_asked_for(small_machine: Recorded, tmp_path: Path) -> None:
    both, alone = VMCOREINFO_AT, VMCOREINFO_AT + 16 * PAGE

    def touch(dump: Dump) -> None:
        log = dump.exact.tagged(LOG)
        log.read(both, 16)
        log.read(alone, 16)
        dump.machine.machine_checks = RangeSet([(0x1000, 0x2000)])

    recorded_minimal(small_machine.folder, tmp_path / "without", touch)
    recorded_minimal(small_machine.folder, tmp_path / "with", touch, with_log=True)
    assert both in held(tmp_path / "without")
    assert alone not in held(tmp_path / "without")
    assert alone in held(tmp_path / "with")
    machine = ImageMachine(recorded.load(str(tmp_path / "without")))
    assert machine.machine_checks == RangeSet([(0x1000, 0x2000)])
    machine.close()


def test_note_that_was_searched_for_is_found_by_searching_the_record(tmp_path: Path) -> None:
    kernel = RecordedKernel()
    kernel.shrink()
    del kernel.files["sys/firmware/qemu_fw_cfg/by_name/etc/vmcoreinfo/raw"]
    kernel.finish_kernel()
    (tmp_path / "machine").mkdir()
    machine = kernel.write(tmp_path / "machine")
    recorded_minimal(machine, tmp_path / "new")
    assert held(tmp_path / "new").size < 16 << 20
    dump, _ = opened(tmp_path / "new")
    assert any("found by searching" in line for line in dump.problems)
    dump.close()
    assert_same(machine, tmp_path / "new")


def as_if_live(dump: Dump) -> None:
    """What a capture kernel has: segments, no word of a host."""
    dump.machine.record = None


def test_record_of_a_live_machine_replays_to_the_same(small_machine: Recorded, tmp_path: Path) -> None:
    recorded_minimal(small_machine.folder, tmp_path / "new", as_if_live)
    assert json.loads((tmp_path / "new/machine.json").read_text())["seen_from"] == "capture kernel"
    assert_same(small_machine.folder, tmp_path / "new")


def test_ram_that_no_source_showed_is_lost_in_the_replay_too(small_machine: Recorded, tmp_path: Path) -> None:
    def partly(dump: Dump) -> None:
        as_if_live(dump)
        regions = RangeSet(d.region for d in dump.machine.devices)
        hidden = [s for s in dump.memory.segments if s.paddr in regions]
        assert hidden
        device = hidden[0].part(type(dump.machine.devices[0].region)(hidden[0].paddr, hidden[0].paddr + BLOCK))
        dump.memory.segments = [s for s in dump.memory.segments if s not in hidden] + [device]

    recorded_minimal(small_machine.folder, tmp_path / "new", partly)
    document = json.loads((tmp_path / "new/machine.json").read_text())
    assert document["virtio_mem"][0]["shown"] == [[0, BLOCK // PAGE]]
    dump, _ = opened(tmp_path / "new")
    start = dump.machine.devices[0].region.start
    assert dump.lost() == RangeSet([(start + BLOCK, start + 16 * BLOCK), (start + 20 * BLOCK, start + 24 * BLOCK)])
    dump.close()


def test_plain_record_of_a_recorded_machine_is_refused(small_machine: Recorded, tmp_path: Path) -> None:
    result = oldmem("record", "--machine", small_machine.folder, tmp_path / "new")
    assert result.status == 1
    assert "--minimal" in result.lines[-1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["--with-log"], ["--minimal", "--vmlinux", "/nowhere"]])
def test_what_makes_no_sense_is_told(small_machine: Recorded, tmp_path: Path, arguments: list[str]) -> None:
    result = oldmem("record", *arguments, "--machine", small_machine.folder, tmp_path / "new")
    assert result.status == 1
    assert len(result.lines) == 1


def test_folder_with_something_in_it_is_left_alone(small_machine: Recorded, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/letter").write_text("dear")
    result = oldmem("record", "--minimal", "--machine", small_machine.folder, tmp_path / "new")
    assert (result.status, result.lines[-1]) == (
        1,
        f"oldmem: {tmp_path}/new: is not empty (letter): a record needs a folder of its own",
    )
    assert os.listdir(tmp_path / "new") == ["letter"]
    assert oldmem("record", "--minimal", "--machine", small_machine.folder, tmp_path / "new/letter").status == 1


def test_record_that_fails_leaves_nothing(
    small_machine: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/lost+found").mkdir()

    def fail(folder: str, _machine: object) -> None:
        assert sorted(set(os.listdir(folder)) - {"lost+found"}) == ["pages.raw", "record-incomplete", "root"]
        raise KeyboardInterrupt

    monkeypatch.setattr(record_module, "save", fail)
    for folder in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(KeyboardInterrupt):
            recorded_minimal(small_machine.folder, folder)
    assert not (tmp_path / "new").exists()
    assert os.listdir(tmp_path / "empty") == ["lost+found"]


def test_half_a_record_of_a_process_that_was_killed_is_begun_again(small_machine: Recorded, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    command = [sys.executable, "-c", KILLED_BEFORE_IT_IS_WHOLE, str(small_machine.folder), str(folder)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    assert sorted(os.listdir(folder)) == ["pages.raw", "record-incomplete", "root"]
    with pytest.raises(Error, match=r"machine\.json"):
        recorded.load(str(folder))
    recorded_minimal(small_machine.folder, folder)
    assert sorted(os.listdir(folder)) == ["machine.json", "pages.raw", "root"]
    assert_same(small_machine.folder, folder)
    (folder / "record-incomplete").touch()
    (folder / "machine.json").rename(folder / "letter")
    with pytest.raises(Error, match=r"is not empty \(letter\)"):
        recorded_minimal(small_machine.folder, folder)


KILLED_BEFORE_IT_IS_WHOLE = """
import os, sys
from pathlib import Path
from capture import record
from tests.image.test_record import recorded_minimal
record.save = lambda *_: os.kill(os.getpid(), 9)
recorded_minimal(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("umask", [0o000, 0o777], ids=oct)
@pytest.mark.parametrize("there", [False, True], ids=["new folder", "folder that all may read"])
def test_record_is_for_the_user_alone_whatever_the_umask(
    umask: int, there: bool, small_machine: Recorded, tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    if there:
        folder.mkdir(0o755)
    before = os.umask(umask)
    try:
        recorded_minimal(small_machine.folder, folder)
    finally:
        assert os.umask(before) == umask
    found = {path: path.stat().st_mode & 0o7777 for path in folder.rglob("*")}
    assert {mode for path, mode in found.items() if path.is_file()} == {0o600}
    assert {mode for path, mode in found.items() if path.is_dir()} == {0o700}
    assert folder.stat().st_mode & 0o7777 == (0o755 if there else 0o700)


def test_two_records_in_one_folder_do_not_meet(
    small_machine: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = recorded.save

    def meanwhile(folder: str, machine: recorded.RecordedMachine) -> None:
        monkeypatch.setattr(record_module, "save", save)
        with pytest.raises(Error, match="record-incomplete: another process is writing it"):
            recorded_minimal(small_machine.folder, tmp_path / "new")
        save(folder, machine)

    monkeypatch.setattr(record_module, "save", meanwhile)
    recorded_minimal(small_machine.folder, tmp_path / "new")
    assert_same(small_machine.folder, tmp_path / "new")
