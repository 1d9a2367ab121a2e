# SPDX-License-Identifier: LGPL-2.1-or-later
"""GuardedMemory against the plainest model of it: a dictionary of pages."""

from __future__ import annotations

import ast
import mmap
import os
import random
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import guard
from guard import GuardedMemory, Image, OldMemory, RangeSet, ReadError, Registry, Segment, SourceError, deny_rule
from guard.compiled import write_guard
from guard.physmem import PREAD

PAGE = 4096
END = 1 << 64
LOW, HIGH = (2, 40), (50, 80)  # pages that files show
REFUSED = {3, 4, 39, 45, 50, 51, 52, 70}
CUT = {78, 79}  # of the second file, which ends before
LAST = 80 * PAGE


def content(page: int) -> bytes:
    return page.to_bytes(8, "little") * (PAGE // 8)


def expected(page: int) -> bytes:
    shown = LOW[0] <= page < LOW[1] or HIGH[0] <= page < HIGH[1]
    return content(page) if shown and page not in REFUSED | CUT else bytes(PAGE)


MODEL = b"".join(expected(p) for p in range(100))


def registry() -> Registry:
    made = Registry()
    for name, pages in (("first", {3, 4, 39, 45, 50}), ("second", {4, 51, 52, 70})):
        made.register(deny_rule(name, RangeSet((p * PAGE, p * PAGE + 1) for p in pages), f"{name}'s"))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("memory")
    (made / "low").write_bytes(b"head" * PAGE + b"".join(content(p) for p in range(*LOW)))
    (made / "high").write_bytes(b"".join(content(p) for p in range(HIGH[0], 78)))
    write_guard(registry(), str(made / "guard"))
    return made


def images(folder: Path) -> list[Image]:
    high = Image(str(folder / "high"), HIGH[0] * PAGE, size=(HIGH[1] - HIGH[0]) * PAGE)
    return [high, Image(str(folder / "low"), LOW[0] * PAGE, 4 * PAGE)]


@pytest.fixture(scope="module")
def memory(folder: Path) -> Iterator[GuardedMemory]:
    with GuardedMemory.open(str(folder / "guard"), images(folder)) as opened:
        yield opened


places = st.integers(0, len(MODEL))
sizes = st.integers(0, 9 * PAGE)


@given(places, sizes)
def test_every_way_of_reading_gives_the_same_bytes(memory: GuardedMemory, paddr: int, size: int) -> None:
    wanted = MODEL[paddr : paddr + size].ljust(size, b"\0")
    assert memory.read(paddr, size) == wanted
    assert memory[paddr : paddr + size] == MODEL[:LAST][paddr : paddr + size]
    assert bytes(memory.view(paddr, size)) == wanted
    buffer = bytearray(b"\xaa" * size)
    assert memory.readinto(paddr, buffer) == size
    assert buffer == wanted


@given(places, sizes)
def test_exact_reads_give_ram_or_the_first_address_that_is_none(memory: GuardedMemory, paddr: int, size: int) -> None:
    pages = range(paddr // PAGE, (paddr + size + PAGE - 1) // PAGE) if size else range(0)
    bad = [p for p in pages if expected(p) == bytes(PAGE)]
    assert memory.covers(paddr, size) == (not set(bad) - CUT)
    if not bad:
        assert memory.read_exact(paddr, size) == MODEL[paddr : paddr + size]
        return
    with pytest.raises(ReadError) as caught:
        memory.read_exact(paddr, size)
    refused = [p for p in bad if p in REFUSED]  # rules are asked before anything is read
    assert caught.value.paddr == max(paddr, (refused or bad)[0] * PAGE)


@given(places)
def test_single_bytes_and_what_is_told_of_them(memory: GuardedMemory, paddr: int) -> None:
    page = paddr // PAGE
    shown = LOW[0] <= page < LOW[1] or HIGH[0] <= page < HIGH[1]
    assert memory.is_ram(page) == (page not in REFUSED)
    assert (paddr in memory) == (memory.why(page) is None) == (shown and page not in REFUSED)
    if paddr < LAST:
        assert memory[paddr] == MODEL[paddr]
    else:
        with pytest.raises(IndexError, match="is not between 0 and 0x4ffff"):
            memory[paddr]


def test_reasons_are_the_rule_that_is_asked_first_and_where_no_file_is(memory: GuardedMemory) -> None:
    reasons = [memory.why(p) for p in (2, 4, 45, 51, 48, 99, (1 << 52) - 1)]
    nothing = "no file shows it"
    assert reasons == [None, "first: first's", "first: first's", "second: second's", nothing, nothing, nothing]


def test_iteration_gives_all_that_is_ram_and_shown_in_the_longest_ranges(memory: GuardedMemory) -> None:
    found = [(r.start // PAGE, r.end // PAGE) for r in memory]
    assert found == [(2, 3), (5, 39), (53, 70), (71, 80)]
    assert len(memory) == memory.end == LAST


@pytest.mark.parametrize("key", [slice(-1, None), slice(None, -PAGE), slice(0, PAGE, 2), slice(PAGE, 0, -1)])
def test_slices_that_count_from_the_end_or_leave_bytes_out_are_refused(memory: GuardedMemory, key: slice) -> None:
    with pytest.raises(ValueError, match="sliced by physical addresses"):
        memory[key]


def test_slices_without_borders_and_beyond_the_end(memory: GuardedMemory) -> None:
    assert memory[:] == MODEL[:LAST]
    assert memory[LAST - 3 * PAGE :] == MODEL[LAST - 3 * PAGE : LAST]
    assert memory[LAST : LAST + PAGE] == memory[9:5] == memory[END : 2 * END] == b""
    with pytest.raises(IndexError):
        memory[-1]


def test_reads_up_to_the_last_address_and_none_beyond(memory: GuardedMemory) -> None:
    assert memory.read(END - 2 * PAGE, 2 * PAGE) == bytes(2 * PAGE)
    assert memory.read(END, 0) == b""
    assert memory.covers(END, 0)
    for paddr, size in ((END, 1), (END - 1, 2), (-1, 1), (0, -1), (-PAGE, PAGE)):
        for call in (memory.read, memory.read_exact, memory.view, memory.covers):
            with pytest.raises(ValueError, match="not in the 64-bit address space"):
                call(paddr, size)
    with pytest.raises(ValueError, match="not in the 64-bit address space"):
        memory.readinto(END - 1, bytearray(2))
    for pfn in (-1, 1 << 52, 1 << 64, 1 << 80):
        for ask in (memory.is_ram, memory.why):
            with pytest.raises(ValueError, match="is not between 0 and 0xfffffffffffff"):
                ask(pfn)
    assert (1 << 52) * PAGE not in memory
    assert "x" not in memory


def test_any_writable_buffer_is_filled_and_no_other(memory: GuardedMemory) -> None:
    words = array("Q", bytes(2 * PAGE))
    assert memory.readinto(5 * PAGE, words) == 2 * PAGE
    assert words.tobytes() == MODEL[5 * PAGE : 7 * PAGE]
    around = bytearray(b"\xaa" * 100)
    assert memory.readinto(5 * PAGE + 1, memoryview(around)[10:20]) == 10
    assert around == b"\xaa" * 10 + MODEL[5 * PAGE + 1 : 5 * PAGE + 11] + b"\xaa" * 80
    with mmap.mmap(-1, PAGE) as mapped:
        memory.readinto(60 * PAGE, mapped)
        assert mapped[:] == content(60)
    for wrong in (b"constant", memoryview(bytearray(9))[::2], "text", 5):
        with pytest.raises(TypeError):
            memory.readinto(0, wrong)  # type: ignore[arg-type]


def test_a_view_is_read_only_and_stays_as_memory_was(memory: GuardedMemory) -> None:
    view = memory.view(5 * PAGE, 16)
    assert view.readonly
    assert view == MODEL[5 * PAGE : 5 * PAGE + 16]
    with pytest.raises(TypeError):
        memoryview(memory)  # type: ignore[arg-type]


def test_what_reads_met_is_counted(folder: Path) -> None:
    with GuardedMemory.open(str(folder / "guard"), images(folder)) as mem:
        mem.read(0, LAST)
        counted = mem.counters()
        mem.read_exact(5 * PAGE, PAGE)
        assert mem.counters() == counted
        assert counted.pages_refused == {"first": 5, "second": 3}
        assert counted.bytes_refused == 8 * PAGE
        assert counted.bytes_read == (len(range(*LOW)) - 3 + len(range(*HIGH)) - 4 - 2) * PAGE
        unread = [(f.range.start // PAGE, f.range.end // PAGE) for f in mem.faults()]
        assert unread == [(0, 2), (40, 45), (46, 50), (78, 80)]


def test_threads_may_share_one_memory(folder: Path) -> None:
    wrong: list[int] = []
    reads, threads = 400, 4

    def reader(mem: GuardedMemory, seed: int) -> None:
        choice = random.Random(seed)
        buffer = bytearray(2 * PAGE)
        for _ in range(reads):
            paddr = choice.randrange(85 * PAGE)
            mem.readinto(paddr, buffer)
            if buffer != MODEL[paddr : paddr + 2 * PAGE] or mem.read(3 * PAGE, PAGE) != bytes(PAGE):
                wrong.append(paddr)

    with GuardedMemory.open(str(folder / "guard"), images(folder)) as mem:
        started = [threading.Thread(target=reader, args=(mem, i)) for i in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        assert not wrong
        assert mem.counters().pages_refused["first"] >= threads * reads


def test_closing_closes_the_files_and_every_later_read_says_so(folder: Path) -> None:
    before = os.listdir("/proc/self/fd")
    mem = GuardedMemory.open(registry(), images(folder))
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    mem.close()
    mem.close()
    assert os.listdir("/proc/self/fd") == before
    for call in (mem.read, mem.read_exact, mem.view, lambda at, n: mem.readinto(at, bytearray(n))):
        with pytest.raises(ValueError, match="memory is closed"):
            call(5 * PAGE, 8)


def test_segments_and_rules_of_ones_own_are_left_open(folder: Path) -> None:
    with (folder / "high").open("rb") as file:
        segment = Segment(HIGH[0] * PAGE, PAGE, file.fileno(), 0, PREAD, "high")
        with GuardedMemory(OldMemory([segment], Registry())) as mem:
            assert mem[HIGH[0] * PAGE : LAST] == content(HIGH[0])
        assert file.read(8) == content(HIGH[0])[:8]


def test_rules_that_come_after_it_was_opened_warn(folder: Path) -> None:
    rules = registry()
    with GuardedMemory.open(rules, images(folder)) as mem:
        with pytest.warns(guard.GuardWarning, match="after old memory was opened"):
            rules.register(deny_rule("late", RangeSet([(5 * PAGE, 6 * PAGE)]), "late"))
        assert mem.read(5 * PAGE, PAGE) == bytes(PAGE)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([Image("{}/nothing")], "{}/nothing: No such file or directory"),
        ([Image("{}/low"), Image("{}/low", 8 * PAGE)], "{}/low and {}/low both claim 0x8000"),
        ([Image("{}/low", 100)], "{}/low: 0x64+0x2a000 at offset 0x0 is not whole pages"),
        ([Image("{}/low", 0, PAGE // 2)], "{}/low: 0x0+0x29800 at offset 0x800 is not whole pages"),
        ([Image("{}/low", 0, 100 * PAGE)], "{}/low: 0x0+-0x3a000 at offset 0x64000 is not possible"),
        ([Image("{}/low", END - PAGE)], "{}/low: 0xfffffffffffff000+0x2a000 at offset 0x0 is not possible"),
    ],
)
def test_images_that_cannot_be_memory_are_one_line_and_nothing_stays_open(
    folder: Path, given: list[Image], line: str
) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SourceError) as caught:
        GuardedMemory.open(registry(), [i._replace(path=i.path.format(folder)) for i in given])
    assert str(caught.value) == line.replace("{}", str(folder))
    assert os.listdir("/proc/self/fd") == before


def test_a_guard_file_that_is_none_is_one_line(folder: Path) -> None:
    with pytest.raises(SourceError, match="low: is no compiled guard"):
        GuardedMemory.open(str(folder / "low"), images(folder))


def test_importing_guard_does_not_import_what_a_capture_kernel_has_no_use_for() -> None:
    late = {"guard.guarded", "guard.plugins", "guard.child", "guard.compiled", "threading"}
    shown = f"print(sorted(set(sys.modules) & {late!r}))"
    for use, expected_modules in (("pass", set()), ("guard.GuardedMemory, guard.rule_plugin", late)):
        command = [sys.executable, "-c", f"import sys, guard; {use}; {shown}"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert set(ast.literal_eval(out)) == expected_modules
    assert {name for name in guard.__all__ if not hasattr(guard, name)} == set()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        guard.nonsense  # noqa: B018
