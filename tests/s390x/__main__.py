# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m tests.s390x [--kept] [NAME...]``: runs scenarios (all, if none is named), one after the other, and tells
of each whether oldmem built what the kernel built. Exit status: 0 all the same, 1 something differs or failed."""

from __future__ import annotations

import argparse
import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import SubprocessError
from typing import Protocol

from guard.errors import Error
from tests.s390x import live, pieces, units
from tests.s390x.compare import Verdict, compare
from tests.s390x.run import folder_of, run
from tests.s390x.scenarios import SCENARIOS
from tests.vm.harness import ConsoleError, FetchError, GuestError, QemuError, QmpError

FAULTS = (Error, FetchError, QemuError, QmpError, GuestError, ConsoleError, OSError, SubprocessError)
COLUMNS = "{:<28} {:<10} {:<10} {:<10} {:>8} {:>8} {:>9}"


class Outcome(Protocol):
    """A row of the table, and under it whatever deserves more words."""

    @property
    def good(self) -> bool: ...
    @property
    def cells(self) -> tuple[str, ...]: ...
    @property
    def lines(self) -> tuple[str, ...]: ...


def row(name: str, outcome: Outcome, seconds: float) -> None:
    print(COLUMNS.format(name, *outcome.cells, f"{seconds:.0f}"), flush=True)
    for line in outcome.lines:
        print(f"    {line}", flush=True)


def _compared(ran: Callable[[], Path]) -> Verdict:
    return compare(ran())


def scenarios(kept: bool) -> dict[str, Callable[[], Outcome]]:
    """What can be run, by name; with *kept*, what earlier runs left is compared once more."""
    steps: dict[str, Callable[[], Outcome]] = {}
    for scenario in SCENARIOS:
        ran = partial(folder_of, scenario.name) if kept else partial(run, scenario)
        steps[scenario.name] = partial(_compared, ran)
    if not kept:
        steps["live"] = live.run
        steps["units"] = units.run
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.s390x", description="Real s390x crashes under QEMU.")
    parser.add_argument("--kept", action="store_true", help="compare what earlier runs have kept, without QEMU")
    parser.add_argument("names", metavar="NAME", nargs="*", help=", ".join(scenarios(False)))
    args = parser.parse_args()
    steps = scenarios(args.kept)
    if unknown := [name for name in args.names if name not in steps]:
        parser.error(f"no such scenario: {', '.join(unknown)}")
    if reason := pieces.missing():
        print(f"s390x: {reason}", file=sys.stderr)
        return 1
    with alone():
        return 0 if run_all({name: steps[name] for name in args.names or steps}) else 1


@contextmanager
def alone() -> Iterator[None]:
    """One command at a time: they keep their runs in the same folders."""
    folder = pieces.store().folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "runs.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_all(steps: dict[str, Callable[[], Outcome]]) -> bool:
    """Prints the table; true if all is as it should be."""
    print(COLUMNS.format("scenario", "header", "vmcore", "readers", "warnings", "header s", "all s"), flush=True)
    good = True
    for name, step in steps.items():
        start = time.monotonic()
        try:
            outcome = step()
        except FAULTS as error:
            print(f"{name:<28} FAILED: {error}", flush=True)
            good = False
            continue
        row(name, outcome, time.monotonic() - start)
        good = good and outcome.good
    return good


if __name__ == "__main__":
    sys.exit(main())
