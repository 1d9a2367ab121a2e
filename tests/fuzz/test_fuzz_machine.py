# SPDX-License-Identifier: LGPL-2.1-or-later
"""The law of tests/fuzz/whole_machine.py: for some runs here, for many by ``make fuzz``; and what it has found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from capture import elfcore
from capture.dump import Dump
from capture.x86_64 import X86_64
from guard.errors import ReadError
from guard.ranges import Range
from tests.fuzz.whole_machine import Run, WholeMachine, parse
from tests.image import field

RUNS = 300


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeMachine]:
    machine = WholeMachine(field.unpack(tmp_path_factory.mktemp("field")))
    yield machine
    machine.close()


def test_untouched_machine_passes(machine: WholeMachine) -> None:
    for layout in machine.sound:
        assert machine.breaches(Run(layout, ())) == []


def test_flipped_bits_of_what_is_read(machine: WholeMachine) -> None:
    for number in range(RUNS):
        run = machine.run(Random(number))
        assert machine.breaches(run) == [], f"python -m tests.fuzz '{run}'"


FOUND = {
    "kernel image that would end in MMIO": "kernel 0x18372897.3",
    "kernel image that would begin in the crash reservation": "cut 0x182b19f3.3",
    "tree without the first part of high memory": "kernel 0x10ffd3dc3.3",
    "tree without the memory of a device": "kernel 0x100cf219b.0",
    "tree with RAM where there is none": "kernel 0x10ffd3dcb.5",
    "crash reservation whose symbol has another name": "kernel 0x1834f764.4",
    "crash reservation that this kernel owns nothing of": "cut 0x18d7672a.6",
    "crash reservation that reaches into what the given header lists": "cut 0x18d76763.1",
    "array of sections that is another one": "cut 0x10ffcf5c1.0",
}


@pytest.mark.parametrize("run", FOUND.values(), ids=[name.replace(" ", "_") for name in FOUND])
def test_breach_that_was_found_once(run: str, machine: WholeMachine) -> None:
    assert machine.breaches(parse(run)) == []


BROKEN: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "outside of the envelope": (Dump, "_inside", lambda dump, ranges: [Range(0xFEB00000, 0xFEC00000)]),
    "not listed with status 0": (X86_64, "kernel_ranges", lambda arch, dump: [Range(0x100000, 0xA000000)]),
    "KeyError in": (X86_64, "kernel_ranges", lambda arch, dump: {}[dump]),
    "no line for people": (X86_64, "kernel_ranges", lambda arch, dump: dump.problems.note("a\nb")),
    "Endless": (X86_64, "kernel_ranges", lambda arch, dump: [None for _ in iter(int, 1)]),
}


@pytest.mark.parametrize("breach", BROKEN)
def test_law_sees_what_breaks_it(breach: str, machine: WholeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.whole_machine.PROCESSOR_SECONDS", 0.5)
    monkeypatch.setattr(*BROKEN[breach])
    assert any(breach in found for found in machine.breaches(Run("kernel", ())))


def test_law_sees_a_header_that_ends_too_early(machine: WholeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    build = elfcore.build

    def cut(*how: Any) -> elfcore.Core:
        core = build(*how)
        return core._replace(header=core.header[:500])

    monkeypatch.setattr(elfcore, "build", cut)
    assert any("the header is not one" in found for found in machine.breaches(Run("cut", ())))


def test_law_lets_our_own_errors_pass(machine: WholeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arch: X86_64, dump: object) -> None:
        raise ReadError("old memory at 0x1000: refused", 0x1000)

    monkeypatch.setattr(X86_64, "kernel_ranges", fails)
    assert machine.breaches(Run("kernel", ())) == []
