# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guarded reads against a plain model: which bytes come back, what is counted, what is told about pages that fail."""

from __future__ import annotations

import errno
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard._core import lib
from guard.errors import ReadError, SourceError
from guard.physmem import (
    ABSENT,
    MAX_FAULTS,
    MMAP,
    PREAD,
    ExactMemory,
    Fault,
    OldMemory,
    Segment,
    Touched,
    absent,
    covered,
    layer,
    only,
)
from guard.ranges import Range, RangeSet
from guard.registry import Registry, Rule, allow_rule, bitmap_rule, deny_rule

PAGE = 4096
END = 48  # pages that the model speaks about
MakeFile = Callable[[bytes], int]


@pytest.fixture
def make_file() -> Iterator[MakeFile]:
    """Makes a file with this content and returns a descriptor of it."""
    opened: list[int] = []

    def make(content: bytes) -> int:
        with tempfile.TemporaryFile() as stream:
            stream.write(content)
            stream.flush()
            opened.append(os.dup(stream.fileno()))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


def pattern(pages: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE)


def registry_of(*rules: Rule) -> Registry:
    registry = Registry()
    for rule in rules:
        registry.register(rule)
    return registry


class Layout(NamedTuple):
    """Segments, each (first page, pages, how, first page in its file, pages that its file really has)."""

    segments: list[tuple[int, int, int, int, int]]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    borders = sorted(draw(st.sets(st.integers(0, END), min_size=2, max_size=8)))
    segments = []
    for start, end in zip(borders[::2], borders[1::2], strict=False):
        size, offset = end - start, draw(st.integers(0, 3))
        there = draw(st.one_of(st.just(offset + size), st.integers(0, offset + size)))
        segments.append((start, size, draw(st.sampled_from([PREAD, MMAP, ABSENT])), offset, there))
    return Layout(segments)


@st.composite
def rules(draw: st.DrawFn) -> list[tuple[Rule, set[int]]]:
    """Rules and the pages that each refuses."""
    found = []
    for i in range(draw(st.integers(0, 3))):
        pages = draw(st.sets(st.integers(0, END - 1), max_size=12))
        ranges = RangeSet((p * PAGE, p * PAGE + PAGE) for p in pages)
        kind = draw(st.sampled_from(["deny", "allow", "bitmap"]))
        if kind == "deny":
            found.append((deny_rule(f"rule {i}", ranges, "listed"), pages))
            continue
        start, end = sorted((draw(st.integers(0, END)), draw(st.integers(0, END))))
        domain, inside = Range(start * PAGE, end * PAGE), set(range(start, end))
        if kind == "allow":
            found.append((allow_rule(f"rule {i}", domain, ranges, "not listed"), inside - pages))
        else:
            bits = sum(1 << p - start for p in pages & inside)
            bitmap = bits.to_bytes((end - start + 7) // 8, "little")
            found.append((bitmap_rule(f"rule {i}", domain, PAGE, bitmap, "unplugged"), inside - pages))
    return found


requests = st.lists(
    st.tuples(st.integers(0, (END + 2) * PAGE), st.one_of(st.integers(0, 20), st.integers(0, 20 * PAGE))), max_size=6
)


class Model:
    """What each page must read as."""

    def __init__(self, layout: Layout, refusals: list[tuple[Rule, set[int]]]) -> None:
        self.content: dict[int, bytes] = {}
        self.errors: dict[int, int] = {}
        self.files = [pattern(there, number) for number, (*_, there) in enumerate(layout.segments)]
        self.absent: set[int] = set()
        for (start, size, how, offset, there), data in zip(layout.segments, self.files, strict=True):
            if how == ABSENT:
                self.absent |= set(range(start, start + size))
            for i in range(size):
                at = offset + i
                if at < there and how != ABSENT:
                    self.content[start + i] = data[at * PAGE : (at + 1) * PAGE]
                else:
                    self.errors[start + i] = errno.EFAULT if how == MMAP else errno.ENODATA
        self.refused = {p: rule.name for rule, pages in reversed(refusals) for p in pages}

    def error(self, page: int) -> int:
        return 0 if page in self.content else self.errors.get(page, errno.ENXIO)

    def page(self, page: int) -> bytes:
        return bytes(PAGE) if page in self.refused else self.content.get(page, bytes(PAGE))

    def read(self, paddr: int, size: int) -> bytes:
        first = paddr // PAGE
        text = b"".join(self.page(p) for p in range(first, (paddr + size + PAGE - 1) // PAGE))
        return text[paddr - first * PAGE :][:size]


def pages_of(paddr: int, size: int) -> list[tuple[int, int]]:
    """(page, bytes of it) that a request touches."""
    return [
        (p, min(paddr + size, (p + 1) * PAGE) - max(paddr, p * PAGE))
        for p in range(paddr // PAGE, (paddr + size + PAGE - 1) // PAGE)
        if size
    ]


@settings(max_examples=150, deadline=None)
@given(layouts(), rules(), requests, st.sampled_from([PAGE, 4 * PAGE, 1 << 20]))
def test_reads_give_what_the_model_gives_and_count_it(
    layout: Layout, refusals: list[tuple[Rule, set[int]]], asked: list[tuple[int, int]], window: int
) -> None:
    model = Model(layout, refusals)
    registry = registry_of(*(rule for rule, _ in refusals))
    fds = [os.memfd_create("file") for _ in layout.segments]
    segments = []
    for (start, size, how, offset, _), fd, data in zip(layout.segments, fds, model.files, strict=True):
        os.write(fd, data)
        segment = Segment(start * PAGE, size * PAGE, fd, offset * PAGE, how, "file")
        segments.append(absent(segment.paddr, segment.size, "file") if how == ABSENT else segment)
    memory = OldMemory(segments, registry)
    memory.c.window_size = window
    read = refused = 0
    counted = dict.fromkeys(registry.counters(), 0)
    failed: set[tuple[int, int]] = set()
    for paddr, size in asked:
        assert memory.read(paddr, size) == model.read(paddr, size)
        for page, n in pages_of(paddr, size):
            if page in model.refused:
                refused += n
                counted[model.refused[page]] += 1
            elif model.error(page):
                failed.add((model.error(page), page))
            else:
                read += n
    assert memory.recorded == memory.covered - RangeSet((p * PAGE, p * PAGE + PAGE) for p in model.absent)
    assert (memory.bytes_read, memory.bytes_refused, registry.counters()) == (read, refused, counted)
    by_error = {e: RangeSet((p * PAGE, p * PAGE + PAGE) for e2, p in failed if e2 == e) for e, _ in failed}
    assert memory.faults() == sorted(Fault(r, e) for e, ranges in by_error.items() for r in ranges)
    before = memory.faults(), memory.bytes_read, memory.bytes_refused, registry.counters()
    for paddr, size in asked:
        touched = [p for p, _ in pages_of(paddr, size)]
        bad = [p for p in touched if p in model.refused] or [p for p in touched if model.error(p)]
        if not bad:
            assert memory.read_exact(paddr, size) == model.read(paddr, size)
            continue
        with pytest.raises(ReadError) as caught:
            memory.read_exact(paddr, size)
        assert caught.value.paddr == max(paddr, bad[0] * PAGE)
        assert f"{caught.value.paddr:#x}" in str(caught.value)
        if bad[0] in model.refused:
            why = f"refused by {model.refused[bad[0]]}"
        else:
            error = model.error(bad[0])
            why = "no source shows it" if error == errno.ENXIO else os.strerror(error)
            why = "not recorded" if bad[0] in model.absent else why
        assert why in str(caught.value)
    assert (memory.faults(), memory.bytes_read, memory.bytes_refused, registry.counters()) == before
    memory.close()
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("how", [PREAD, MMAP])
def test_of_a_large_request_only_the_pages_that_fail_are_zeros(how: int, make_file: MakeFile) -> None:
    """The file ends in the middle of a segment, and another segment shows a part of it that is there."""
    data = pattern(10)
    fd = make_file(data[: 6 * PAGE])
    segments = [
        Segment(0, 4 * PAGE, fd, 0, how, "image"),
        Segment(4 * PAGE, 4 * PAGE, fd, 4 * PAGE, how, "image"),
        Segment(8 * PAGE, 2 * PAGE, fd, 0, how, "image"),
    ]
    memory = OldMemory(segments, Registry())
    assert memory.read(0, 10 * PAGE) == data[: 6 * PAGE] + bytes(2 * PAGE) + data[: 2 * PAGE]
    error = errno.EFAULT if how == MMAP else errno.ENODATA
    assert memory.faults() == [Fault(Range(6 * PAGE, 8 * PAGE), error)]
    assert memory.bytes_read == 8 * PAGE


def test_file_that_is_cut_while_it_is_mapped_costs_only_what_was_cut(make_file: MakeFile) -> None:
    data = pattern(16)
    fd = make_file(data)
    memory = OldMemory([Segment(0, 16 * PAGE, fd, 0, MMAP, "image")], Registry())
    assert memory.read(0, 16 * PAGE) == data
    with open(f"/proc/self/fd/{fd}", "r+b") as stream:
        stream.truncate(5 * PAGE + 100)
    expected = (data[: 5 * PAGE + 100]).ljust(16 * PAGE, b"\0")
    assert memory.read(0, 16 * PAGE) == expected
    assert memory.faults() == [Fault(Range(6 * PAGE, 16 * PAGE), errno.EFAULT)]
    memory.close()


def test_faults_reported_from_any_side_are_joined_and_different_errors_are_not(make_file: MakeFile) -> None:
    fd = make_file(b"")
    segments = [Segment(0, 8 * PAGE, fd, 0, PREAD, "a"), Segment(8 * PAGE, 8 * PAGE, fd, 0, MMAP, "b")]
    memory = OldMemory(segments, Registry())
    for page in (3, 1, 2, 0, 12, 8, 10, 9, 11, 30, 29, 15, 20):
        memory.read(page * PAGE + 17, 5)
    assert memory.faults() == [
        Fault(Range(0, 4 * PAGE), errno.ENODATA),
        Fault(Range(8 * PAGE, 13 * PAGE), errno.EFAULT),
        Fault(Range(15 * PAGE, 16 * PAGE), errno.EFAULT),
        Fault(Range(20 * PAGE, 21 * PAGE), errno.ENXIO),
        Fault(Range(29 * PAGE, 31 * PAGE), errno.ENXIO),
    ]


def test_what_the_log_of_faults_has_no_room_for_is_counted_and_reads_go_on(make_file: MakeFile) -> None:
    memory = OldMemory([Segment(0, 10_000 * PAGE, make_file(b""), 0, PREAD, "image")], Registry())
    for page in range(0, 10_000, 2):
        assert memory.read(page * PAGE, 8) == bytes(8)
        assert memory.unlisted_faults == max(page // 2 + 1 - MAX_FAULTS, 0)
    assert memory.faults() == [
        Fault(Range(page * PAGE, (page + 1) * PAGE), errno.ENODATA) for page in range(0, 2 * MAX_FAULTS, 2)
    ]
    assert int(memory.c.tally.fault_pages) == 5000
    memory.read(0, 4 * PAGE)  # in the log, or next to what is there
    assert memory.unlisted_faults == 5000 - MAX_FAULTS


def test_pages_that_no_source_shows_leave_room_in_the_log_for_those_that_fail(make_file: MakeFile) -> None:
    memory = OldMemory([Segment(1 << 32, PAGE, make_file(b""), 0, PREAD, "image")], Registry())
    for page in range(0, 2 * MAX_FAULTS, 2):
        memory.read(page * PAGE, 8)
    memory.read(1 << 32, 8)
    assert memory.faults()[-1] == Fault(Range(1 << 32, (1 << 32) + PAGE), errno.ENODATA)
    assert len(memory.faults()) + memory.unlisted_faults == MAX_FAULTS + 1


def in_children(*works: Callable[[], object]) -> None:
    """Do all of that at the same time, in a process each, which is killed as soon as it is done."""
    pids = []
    for work in works:
        pid = os.fork()
        if not pid:
            try:
                work()
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [signal.SIGKILL] * len(pids)


def test_what_a_forked_process_has_read_is_counted_here_though_it_was_killed(make_file: MakeFile) -> None:
    registry = registry_of(deny_rule("one", RangeSet([(0, PAGE)]), "so"), deny_rule("two", RangeSet([(0, 9)]), "so"))
    memory = OldMemory([Segment(0, 8 * PAGE, make_file(pattern(6)), 0, PREAD, "image")], registry)
    memory.read(0, 2 * PAGE)
    in_children(lambda: memory.read(0, 7 * PAGE))
    assert (memory.bytes_read, memory.bytes_refused) == (6 * PAGE, 2 * PAGE)
    assert registry.counters() == {"one": 2, "two": 0}
    assert memory.faults() == [Fault(Range(6 * PAGE, 7 * PAGE), errno.ENODATA)]
    in_children(lambda: memory.read(0, 8 * PAGE), lambda: memory.read(0, 8 * PAGE))
    assert memory.faults() == [Fault(Range(6 * PAGE, 8 * PAGE), errno.ENODATA)]
    assert int(memory.c.tally.fault_pages) == 5
    assert registry.counters() == {"one": 4, "two": 0}


def test_processes_that_read_at_the_same_time_lose_no_count(make_file: MakeFile) -> None:
    registry = registry_of(deny_rule("odd", RangeSet((p * PAGE, (p + 1) * PAGE) for p in range(1, 64, 2)), "so"))
    memory = OldMemory([Segment(0, 64 * PAGE, make_file(pattern(32)), 0, PREAD, "image")], registry)

    def work() -> None:
        for i in range(400):
            memory.read(0 if i else 1 << 40, 64 * PAGE)

    in_children(work, work, work)
    assert memory.bytes_read == 3 * 399 * 16 * PAGE
    assert registry.counters() == {"odd": 3 * 399 * 32}
    assert int(memory.c.tally.fault_pages) == 3 * (399 * 16 + 64)
    assert memory.unlisted_faults == 0
    assert [f.range for f in memory.faults()] == [
        *(Range(page * PAGE, (page + 1) * PAGE) for page in range(32, 64, 2)),
        Range(1 << 40, (1 << 40) + 64 * PAGE),
    ]


def test_a_run_that_was_claimed_by_a_process_that_died_there_is_passed_over() -> None:
    memory = OldMemory([], Registry())
    memory.read(0, PAGE)
    memory.c.log.n += 1
    memory.c.tally.unlisted += 1
    memory.read(8 * PAGE, PAGE)
    assert [f.range.start for f in memory.faults()] == [0, 8 * PAGE]
    assert memory.unlisted_faults == 1


def test_rules_beyond_a_page_of_counters_are_counted_each_by_itself() -> None:
    rules = [deny_rule(f"rule {p}", RangeSet([(p * PAGE, (p + 1) * PAGE)]), "so") for p in range(1100)]
    memory = OldMemory([], registry_of(*rules))
    memory.read(0, 1100 * PAGE)
    memory.read(511 * PAGE, 2 * PAGE)
    assert memory.registry.counters() == {f"rule {p}": 2 if p in (511, 512) else 1 for p in range(1100)}


def test_what_another_process_tells_is_counted_and_merged_into_the_log() -> None:
    memory = OldMemory([], registry_of(deny_rule("one", RangeSet([(0, PAGE)]), "so")))
    memory.read(PAGE, PAGE)
    memory.account(3 * PAGE, [2], [Fault(Range(2 * PAGE, 4 * PAGE), errno.ENXIO)], unlisted_faults=7)
    assert (memory.bytes_read, memory.bytes_refused) == (3 * PAGE, 2 * PAGE)
    assert memory.registry.counters() == {"one": 2}
    assert memory.faults() == [Fault(Range(PAGE, 4 * PAGE), errno.ENXIO)]
    assert int(memory.c.log.n) == 1
    assert (memory.unlisted_faults, int(memory.c.tally.fault_pages)) == (7, 10)


def test_a_failing_page_does_not_make_its_neighbours_be_read_over_and_over(make_file: MakeFile) -> None:
    """Nor itself: a poisoned page raises a machine check at each touch."""

    def bytes_read_so_far() -> int:
        with open("/proc/self/io", encoding="ascii") as stats:
            return int(stats.readline().removeprefix("rchar:"))

    memory = OldMemory([Segment(0, 256 * PAGE, make_file(pattern(255)), 0, PREAD, "image")], Registry())
    before = bytes_read_so_far()
    memory.read(0, 256 * PAGE)
    assert bytes_read_so_far() - before < 3 * 256 * PAGE
    assert memory.faults() == [Fault(Range(255 * PAGE, 256 * PAGE), errno.ENODATA)]


def test_windows_are_reused_and_replaced_and_give_the_right_bytes(make_file: MakeFile) -> None:
    data = pattern(64)
    fd = make_file(data)
    memory = OldMemory([Segment(1 << 30, 64 * PAGE, fd, 0, MMAP, "image")], Registry())
    memory.c.window_size = 2 * PAGE
    rng = random.Random(5)
    for _ in range(500):
        at = rng.randrange(64 * PAGE)
        size = rng.randrange(min(10 * PAGE, 64 * PAGE - at) + 1)
        assert memory.read((1 << 30) + at, size) == data[at : at + size]
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = [line for line in maps if f"{os.fstat(fd).st_ino} " in line and " r--s " in line]
    assert 1 <= len(mapped) <= lib.PHYSMEM_WINDOWS
    memory.close()
    assert memory.read(1 << 30, 100) == data[:100], "a closed one maps again"
    memory.close()


def test_zero_length_reads_nothing() -> None:
    memory = OldMemory([], registry_of(deny_rule("all", RangeSet([(0, 1 << 40)]), "no")))
    assert memory.read(0, 0) == b""
    assert memory.read_exact(1 << 41, 0) == b""
    assert (memory.faults(), memory.bytes_refused) == ([], 0)


@pytest.mark.parametrize("refuse", [False, True])
def test_reads_at_the_end_of_the_address_space_end(refuse: bool, make_file: MakeFile) -> None:
    top = (1 << 64) - 2 * PAGE
    data = pattern(2)
    registry = registry_of(*([allow_rule("none", Range(0, 1 << 64), RangeSet(), "no")] if refuse else []))
    memory = OldMemory([Segment(top, 2 * PAGE, make_file(data), 0, PREAD, "image")], registry)
    shown = bytes(2 * PAGE) if refuse else data
    assert memory.read(top, 2 * PAGE) == shown
    assert memory.read((1 << 64) - 1, 1) == shown[-1:]
    assert memory.read((1 << 64) - 1, 3 * PAGE) == shown[-1:].ljust(3 * PAGE, b"\0")
    assert memory.read(top + PAGE, 5 * PAGE) == shown[PAGE:].ljust(5 * PAGE, b"\0")
    assert memory.faults() == []
    with pytest.raises(ReadError):
        memory.read_exact(top, 2 * PAGE + 1)
    if not refuse:
        assert memory.read_exact(top, 2 * PAGE) == data


def test_reads_where_nothing_is_are_zeros_and_end() -> None:
    memory = OldMemory([], Registry())
    for paddr in (0, 1 << 40, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1):
        assert memory.read(paddr, 2 * PAGE) == bytes(2 * PAGE)
    assert all(f.errno == errno.ENXIO for f in memory.faults())


def test_hole_of_a_sparse_file_is_zeros_and_its_end_is_a_fault(make_file: MakeFile) -> None:
    fd = make_file(b"")
    with open(f"/proc/self/fd/{fd}", "r+b") as stream:
        stream.truncate(64 << 20)
        stream.seek(32 << 20)
        stream.write(b"here")
    memory = OldMemory([Segment(0, 66 << 20, fd, 0, PREAD, "image")], Registry())
    text = memory.read(0, 66 << 20)
    assert text == bytes(32 << 20) + b"here".ljust(34 << 20, b"\0")
    assert memory.faults() == [Fault(Range(64 << 20, 66 << 20), errno.ENODATA)]


@pytest.mark.parametrize(
    ("segments", "wrong"),
    [
        ([(0, 100, 0, PREAD)], "not whole pages"),
        ([(100, PAGE, 0, PREAD)], "not whole pages"),
        ([(0, PAGE, 100, MMAP)], "not whole pages"),
        ([(0, 2 * PAGE, 0, PREAD), (PAGE, PAGE, 0, PREAD)], "both claim 0x1000"),
        ([(4 * PAGE, PAGE, 0, PREAD), (0, PAGE, 0, PREAD)], "both claim 0x0"),
        ([(0, 0, 0, PREAD)], "not possible"),
        ([((1 << 64) - PAGE, 2 * PAGE, 0, PREAD)], "not possible"),
        ([(0, PAGE, 1 << 63, PREAD)], "not possible"),
        ([(0, PAGE, -PAGE, MMAP)], "not possible"),
    ],
)
def test_impossible_segments_are_refused(segments: list[tuple[int, int, int, int]], wrong: str) -> None:
    with pytest.raises(SourceError, match=wrong):
        OldMemory([Segment(p, s, 0, o, how, "image") for p, s, o, how in segments], Registry())


def test_offset_of_a_read_segment_needs_no_alignment(make_file: MakeFile) -> None:
    data = pattern(3)
    memory = OldMemory([Segment(0, 2 * PAGE, make_file(data), 100, PREAD, "image")], Registry())
    assert memory.read(0, 2 * PAGE) == data[100 : 100 + 2 * PAGE]


page_ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6)


@given(page_ranges, page_ranges)
def test_layer_shows_the_upper_where_it_is_and_the_lower_elsewhere(
    a: list[tuple[int, int]], b: list[tuple[int, int]]
) -> None:
    def made(ranges: list[tuple[int, int]], fd: int) -> list[Segment]:
        pages = RangeSet((x * PAGE, y * PAGE) for x, y in ranges)
        return [Segment(r.start, r.size, fd, r.start + 1000, PREAD, "s") for r in pages]

    upper, lower = made(a, 1), made(b, 2)
    both = layer(upper, lower)
    shown = {p: s.fd for s in both for p in range(s.paddr, s.end, PAGE)}
    for p in range(0, 41 * PAGE, PAGE):
        expected = 1 if p in covered(upper) else 2 if p in covered(lower) else None
        assert shown.get(p) == expected
    assert both == sorted(both)
    assert all(s.offset == s.paddr + 1000 for s in both)
    OldMemory(both, Registry())
    assert covered(only(both, covered(upper))) == covered(upper)


def test_absent_memory_of_any_size_fails_at_once_and_what_is_beside_it_is_read(make_file: MakeFile) -> None:
    data = pattern(2)
    fd, far = make_file(data), 1 << 44
    record = [Segment(0, PAGE, fd, 0, PREAD, "a"), Segment(far, PAGE, fd, PAGE, PREAD, "a")]
    memory = OldMemory(layer(record, [absent(0, 2 * far, "a")]), Registry())
    assert memory.read(0, 2 * PAGE) == data[:PAGE] + bytes(PAGE)
    assert memory.read(far - PAGE, 3 * PAGE) == bytes(PAGE) + data[PAGE:] + bytes(PAGE)
    assert memory.read(2 * PAGE, 64 << 20) == bytes(64 << 20)
    assert memory.faults() == [
        Fault(Range(PAGE, (64 << 20) + 2 * PAGE), errno.ENODATA),
        Fault(Range(far - PAGE, far), errno.ENODATA),
        Fault(Range(far + PAGE, far + 2 * PAGE), errno.ENODATA),
    ]
    assert memory.covered == RangeSet([(0, 2 * far)])
    assert memory.recorded == RangeSet([(0, PAGE), (far, far + PAGE)])
    with pytest.raises(ReadError, match="old memory at 0x1000: not recorded"):
        memory.read_exact(0, 2 * PAGE)


def test_absent_memory_is_as_large_as_an_address_space() -> None:
    memory = OldMemory([absent(PAGE, (1 << 64) - PAGE, "a")], Registry())
    assert memory.read((1 << 64) - PAGE, PAGE) == bytes(PAGE)
    assert memory.faults() == [Fault(Range((1 << 64) - PAGE, 1 << 64), errno.ENODATA)]
    assert only([absent(0, 1 << 40, "a")], RangeSet([(PAGE, 2 * PAGE)])) == [absent(PAGE, PAGE, "a")]


asked_for = st.lists(st.tuples(st.integers(0, 60 * PAGE), st.integers(0, 3 * PAGE), st.sampled_from(["", "log"])))


@given(asked_for)
def test_touched_pages_are_those_of_what_was_asked_for(asked: list[tuple[int, int, str]]) -> None:
    touched = Touched(PAGE)
    touched._most = 4
    for paddr, size, tag in asked:
        touched.add(paddr, size, tag)
    for tags in (("",), ("log",), ("", "log")):
        expected = {p for paddr, size, tag in asked if tag in tags for p, _ in pages_of(paddr, size)}
        assert touched.pages(*tags) == RangeSet((p * PAGE, p * PAGE + PAGE) for p in expected)


def test_exact_reads_are_noted_by_their_tag_and_a_search_is_not(make_file: MakeFile) -> None:
    memory = OldMemory([Segment(0, 8 * PAGE, make_file(pattern(8)), 0, PREAD, "image")], Registry())
    touched = Touched(PAGE)
    exact = ExactMemory(memory, touched)
    exact.read(PAGE + 5, 3)
    exact.tagged("log").read(3 * PAGE, 1)
    exact.untracked().read(0, 8 * PAGE)
    with pytest.raises(ReadError):
        exact.read(8 * PAGE, 8)
    exact.touch(5 * PAGE, 1)
    assert touched.pages("") == RangeSet([(PAGE, 2 * PAGE), (5 * PAGE, 6 * PAGE), (8 * PAGE, 9 * PAGE)])
    assert touched.pages("log") == RangeSet([(3 * PAGE, 4 * PAGE)])
    assert ExactMemory(memory).tagged("log").read(0, 8) == memory.read_exact(0, 8)
