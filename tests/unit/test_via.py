# SPDX-License-Identifier: LGPL-2.1-or-later
"""By which way the vmcore is handed over, and that the reason is told in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest

from capture import stage2, via
from capture.dump import Dump
from capture.stage2 import GivenUp, Options, Plan
from capture.via import FUSE, RUN, STAGE2
from guard.errors import Error
from guard.ranges import Range, RangeSet
from guard.registry import Registry, deny_rule
from tests.unit.stage_parts import MIB

OPTIONS = Options(place="pinned", kernel="/boot/vmlinuz")
STATIC, DYNAMIC = "/usr/bin/static", "/usr/bin/dynamic"
GATED = Range(16 * MIB, 32 * MIB)


class Machine:
    """Where stage 2 is possible: a plan with three PT_LOADs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.registry = Registry()
        self.devices = [SimpleNamespace(region=GATED, gated_by_kernel=False)]
        machine = SimpleNamespace(devices=self.devices)
        self.dump = cast(Dump, SimpleNamespace(machine=machine, registry=self.registry))
        self.plan = cast(Plan, SimpleNamespace(given_up=GivenUp(0, 0), loads=[1, 2, 3]))
        self.mounted: list[str] = []
        self.planned: list[Options] = []
        monkeypatch.setattr(via, "is_static", lambda command: command == STATIC)
        monkeypatch.setattr(stage2, "plan", self._plan)
        monkeypatch.setattr(stage2, "check_memory", lambda plan: None)
        monkeypatch.setattr(stage2, "mounted_for_writing", lambda: self.mounted)

    def _plan(self, dump: Dump, options: Options) -> Plan:
        assert dump is self.dump
        self.planned.append(options)
        return self.plan

    def refuse(self, what: str, why: str) -> None:
        def refusing(*_: object) -> NoReturn:
            raise Error(why)

        self.monkeypatch.setattr(stage2, what, refusing)

    def choose(self, *command: str) -> via.Choice:
        return via.choose(self.dump, command, OPTIONS)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_command_that_takes_a_library_is_run_with_it(machine: Machine) -> None:
    why = f"{DYNAMIC} takes a library, and maps at the kernel's speed without another boot"
    assert machine.choose(DYNAMIC, STATIC) == (RUN, why, None)
    assert machine.planned == []


def test_all_others_get_a_vmcore_of_the_kernels_own(machine: Machine) -> None:
    can = "the kernel itself can serve 3 PT_LOADs"
    assert machine.choose(STATIC, "-l") == (STAGE2, f"{STATIC} is statically linked; {can}", machine.plan)
    assert machine.choose() == (STAGE2, f"no command that could take a library; {can}", machine.plan)
    assert machine.planned == [OPTIONS, OPTIONS]


@pytest.mark.parametrize("what", ["plan", "check_memory"])
def test_without_stage_2_there_is_fuse_and_the_reason(what: str, machine: Machine) -> None:
    machine.refuse(what, "no kernel to go to")
    assert machine.choose(STATIC) == (FUSE, f"{STATIC} is statically linked; no stage 2: no kernel to go to", None)


def test_no_memory_is_given_up_for_speed(machine: Machine) -> None:
    machine.plan = cast(Plan, SimpleNamespace(given_up=GivenUp(7, 3 * MIB), loads=[1]))
    why = f"{STATIC} is statically linked; stage 2 has no room for 7 runs of 3M"
    assert machine.choose(STATIC) == (FUSE, why, None)


def test_no_memory_is_left_out_that_the_kernels_driver_gates(machine: Machine) -> None:
    machine.devices[0].gated_by_kernel = True
    machine.registry.register(deny_rule("test", RangeSet([(16 * MIB, 26 * MIB)]), "refused"))
    left = "stage 2 would leave out 6M that the kernel's own driver gates"
    assert machine.choose(STATIC) == (FUSE, f"{STATIC} is statically linked; {left}", None)
    machine.registry.register(deny_rule("all of it", RangeSet([GATED]), "refused"))
    assert machine.choose(STATIC).way == STAGE2


def test_no_file_system_goes_through_a_jump_unasked(machine: Machine) -> None:
    machine.mounted = ["/kdumproot", "/mnt"]
    why = f"{STATIC} is statically linked; no stage 2 while /kdumproot is mounted for writing"
    assert machine.choose(STATIC) == (FUSE, why, None)


def test_a_script_is_no_statically_linked_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "collect"
    script.write_text("#!/bin/sh\n")
    assert via.choose(cast(Dump, None), [str(script)], OPTIONS).way == RUN
