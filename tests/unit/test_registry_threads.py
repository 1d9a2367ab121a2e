# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules that come and go while other threads read: cffi lets go of the interpreter's lock inside of every C call, so
that these truly run at the same time. ``make sanitize`` runs this with AddressSanitizer in the C core."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from capture import elfcore
from capture.elfcore import Load
from capture.vmcore import Vmcore
from guard._core import ffi, lib
from guard.compiled import compile_guard
from guard.physmem import MMAP, PREAD, OldMemory, Segment
from guard.ranges import Range, RangeSet
from guard.registry import GuardWarning, Registry, allow_rule, bitmap_rule, deny_rule

PAGE = 4096
PAGES = 64
MEMORY = b"".join(bytes([page + 1]) * PAGE for page in range(PAGES))
ALWAYS, COMING, NEVER = range(4), range(8, 48), range(60, PAGES)
ROUNDS, PASSING = 480, 12


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("memory")
    os.write(made, MEMORY)
    yield made
    os.close(made)


def pages_rule(registry: Registry, name: str, pages: range) -> None:
    registry.register(deny_rule(name, RangeSet((p * PAGE, (p + 1) * PAGE) for p in pages), "refused"))


def run_all(*jobs: Callable[[], None]) -> None:
    """Each in a thread of its own; raises what one of them has raised."""
    raised: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as e:
            raised.append(e)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


class Shared:
    """What the thread that changes rules tells the ones that read."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.registry = Registry()
        self.come = 0  # of COMING, the first so many are refused for good
        self.done = False
        self.reads = 0
        pages_rule(self.registry, "always", ALWAYS)

    def memory(self, how: int) -> OldMemory:
        return OldMemory([Segment(0, PAGES * PAGE, self.fd, 0, how, "memory")], self.registry)

    def check(self, data: bytes, come: int) -> None:
        """Every page is there, or refused; *come* is what had come before the read began."""
        for page in range(PAGES):
            shown = data[page * PAGE : (page + 1) * PAGE]
            refused = shown == bytes(PAGE)
            assert refused or shown == MEMORY[page * PAGE : (page + 1) * PAGE], f"page {page}"
            if page in ALWAYS or page in COMING[:come]:
                assert refused, f"page {page} must not be read"
            if page in NEVER:
                assert not refused, f"page {page} is RAM"

    def read(self, how: int) -> None:
        memory = self.memory(how)
        while not self.done:
            come = self.come
            self.check(memory.read(0, PAGES * PAGE), come)
            self.reads += 1
        memory.close()

    def read_vmcore(self) -> None:
        vmcore = Vmcore(elfcore.build(62, b"notes", [Load(0, 0, PAGES * PAGE)], 4), self.memory(PREAD))
        while not self.done:
            come = self.come
            self.check(vmcore.read(vmcore.size - PAGES * PAGE, PAGES * PAGE), come)

    def ask(self) -> None:
        registry = self.registry
        while not self.done:
            come = self.come
            rule = registry.refuser(ALWAYS[-1])
            assert rule
            assert rule.name == "always"
            assert not any(registry.pfn_is_ram(page) for page in COMING[:come])
            assert registry.next_ram(NEVER[0], PAGES) == NEVER[0]
            runs = list(registry.verdicts(0, PAGES * PAGE))
            assert [a.end for a, _ in runs[:-1]] == [b.start for b, _ in runs[1:]]
            assert registry.counters()["always"] >= 0
            compile_guard(registry)

    def change(self) -> None:
        try:
            for round_ in range(ROUNDS):
                for k in range(PASSING):
                    name = f"passing {k}"
                    if k % 3 == 0:
                        pages_rule(self.registry, name, range(4 + k, NEVER[0], 2 + k))
                    elif k % 3 == 1:
                        ram = RangeSet([(k * PAGE, (k + 20) * PAGE)])
                        self.registry.register(allow_rule(name, Range(0, NEVER[0] * PAGE), ram, "not listed"))
                    else:
                        domain = Range(4 * PAGE, NEVER[0] * PAGE)
                        self.registry.register(bitmap_rule(name, domain, PAGE, bytes([k, round_ % 256] * 4), "gone"))
                if round_ % (ROUNDS // len(COMING)) == 0 and self.come < len(COMING):
                    pages_rule(self.registry, f"coming {self.come}", COMING[self.come : self.come + 1])
                    self.come += 1
                for k in range(PASSING):
                    self.registry.unregister(f"passing {(k * 5 + round_) % PASSING}")
        finally:
            self.done = True


def test_reads_never_get_a_page_that_a_registered_rule_refuses(fd: int) -> None:
    shared = Shared(fd)
    run_all(lambda: shared.read(PREAD), lambda: shared.read(MMAP), shared.read_vmcore, shared.ask, shared.change)
    assert shared.come == len(COMING)
    assert [rule.name for rule in shared.registry] == ["always", *(f"coming {i}" for i in range(len(COMING)))]
    assert shared.reads


def test_counts_of_all_readers_add_up(fd: int) -> None:
    shared = Shared(fd)
    times = 2000

    def read() -> None:
        memory = shared.memory(MMAP)
        for _ in range(times):
            memory.read(0, 16 * PAGE)
        memory.close()

    def change() -> None:
        for _ in range(200):
            pages_rule(shared.registry, "passing", range(20, 30))
            shared.registry.unregister("passing")

    run_all(read, read, change)
    assert shared.registry.counters() == {"always": 2 * times * len(ALWAYS)}


def test_gate_that_a_read_may_still_ask_stays_as_it_was() -> None:
    registry = Registry()
    pages_rule(registry, "first", range(0, PAGES, 3))
    pages_rule(registry, "second", range(0, PAGES, 5))
    seen = registry.slot[0]  # keeps nothing alive
    before = [lib.gate_refuser(seen, page) for page in range(PAGES)]
    assert before == [0 if page % 3 == 0 else 1 if page % 5 == 0 else -1 for page in range(PAGES)]
    registry.unregister("first")
    for i in range(100):
        pages_rule(registry, f"rule {i}", range(PAGES))
        registry.unregister(f"rule {i}")
    registry.unregister("second")
    gc.collect()
    filled = [ffi.new("uint8_t[]", b"\xff" * size) for size in range(8, 520, 8) for _ in range(200)]
    assert [lib.gate_refuser(seen, page) for page in range(PAGES)] == before
    assert [seen.rules[i].refused[0] for i in range(2)] == [0, 0], "still there to be counted in"
    assert all(registry.pfn_is_ram(page) for page in range(PAGES))
    del filled


def test_of_two_threads_that_register_one_name_one_is_refused() -> None:
    registry = Registry()
    taken = []
    start = threading.Barrier(2)

    def register() -> None:
        for i in range(300):
            start.wait()
            try:
                pages_rule(registry, f"rule {i}", range(i % PAGES, i % PAGES + 1))
            except ValueError:
                taken.append(i)

    run_all(register, register)
    assert taken == list(range(300))
    assert [rule.name for rule in registry] == [f"rule {i}" for i in range(300)]


def test_unregistering_while_an_opened_memory_is_read_opens_no_hole(fd: int) -> None:
    shared = Shared(fd)
    for i in range(len(COMING)):
        pages_rule(shared.registry, f"coming {i}", COMING[i : i + 1])
    shared.come = len(COMING)
    shared.registry.opened = True

    def unregister() -> None:
        try:
            for i in range(len(COMING)):
                with pytest.warns(GuardWarning, match="stays in force"):
                    shared.registry.unregister(f"coming {i}")
        finally:
            shared.done = True

    run_all(lambda: shared.read(PREAD), lambda: shared.read(MMAP), unregister)
    assert len(list(shared.registry)) == 1 + len(COMING)
