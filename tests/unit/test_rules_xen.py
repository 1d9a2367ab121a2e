# SPDX-License-Identifier: LGPL-2.1-or-later
"""Xen's word on the pages of an HVM guest, given by a library that answers in place of /dev/xen/privcmd: no Xen has run
any of this."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from capture import x86_platform
from guard.ranges import RangeSet
from guard.registry import RAM, Registry, Rule
from guard.rules import xen_hvm
from guard.witness.memory import Problems

PAGE = 4096
MIB = 1 << 20
ASK = """
import json, sys
from guard.ranges import RangeSet
from guard.registry import Registry
from guard.rules import xen_hvm
from guard.witness.memory import Problems
wanted, limit = RangeSet(json.loads(sys.argv[2])), float(sys.argv[3])
problems = Problems()
rule = xen_hvm.rule(wanted, problems, path=sys.argv[1], time_limit=limit)
registry = Registry()
if rule:
    registry.register(rule)
refused = [list(r) for r in wanted - registry.ram(wanted)]
said = rule and [rule.name, rule.trouble, [list(r) for r in rule.troubled]]
print(json.dumps([refused, said, problems]))
"""


class Told(NamedTuple):
    refused: list[list[int]]
    rule: list[Any] | None
    problems: list[str]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    out = tmp_path_factory.mktemp("xen") / "privcmd.so"
    source = Path(__file__).with_name("privcmd.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", source, "-o", out, "-ldl"], check=True)
    return out


def ask(library: Path, wanted: list[list[int]], limit: float = 60.0, path: str = "/dev/null", **answers: str) -> Told:
    """What the rule refuses of *wanted* (bytes), its name, policy and troubled ranges, and the problems."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, path, json.dumps(wanted), str(limit)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "LD_PRELOAD": str(library), **answers},
    )
    assert done.stderr == ""
    return Told(*json.loads(done.stdout))


def test_pages_behind_which_the_device_model_is_are_refused(library: Path) -> None:
    wanted = [[MIB, 3 * MIB], [256 * MIB, 1024 * MIB], [4096 * MIB, 4096 * MIB + PAGE]]
    told = ask(library, wanted, MMIO_DM="0-101 180-200 10000-10001 17fff-18001 3ffff-40000 100000-100001")
    assert told.refused == [
        [0x100 * PAGE, 0x101 * PAGE],
        [0x180 * PAGE, 0x200 * PAGE],
        [0x10000 * PAGE, 0x10001 * PAGE],
        [0x17FFF * PAGE, 0x18001 * PAGE],
        [0x3FFFF * PAGE, 0x40000 * PAGE],
        [0x100000 * PAGE, 0x100001 * PAGE],
    ]
    assert told.rule == ["Xen HVM", RAM, []]
    assert told.problems == []


def test_guest_without_a_balloon_has_a_rule_that_refuses_nothing(library: Path) -> None:
    assert ask(library, [[0, 64 * MIB]]) == Told([], ["Xen HVM", RAM, []], [])


def test_page_for_which_the_question_fails_is_ram_and_told_once(library: Path) -> None:
    told = ask(library, [[0, 512 * MIB]], MMIO_DM="0-20", FAIL=f"{errno.EINVAL} 10-18 9000-9008")
    assert told.refused == [[0, 0x10 * PAGE], [0x18 * PAGE, 0x20 * PAGE]]
    assert told.rule == ["Xen HVM", RAM, [[0, 256 * MIB]]]
    assert told.problems == ["/dev/null: Xen did not answer for 16 pages (Invalid argument); taken as RAM"]


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (
            errno.EPERM,
            "(Operation not permitted): no page is refused for it; xen_privcmd.unrestricted=1 on the capture kernel's "
            "command line cures it",
        ),
        (errno.ENOSYS, "(Function not implemented): no page is refused for it"),
    ],
)
def test_closed_privcmd_is_told_once_and_nothing_is_refused(library: Path, number: int, line: str) -> None:
    told = ask(library, [[0, 8192 * MIB]], FAIL=f"{number} 0-ffffffffff")
    assert told == Told([], None, [f"/dev/null: Xen answers no question {line}"])


def test_device_that_is_not_xens_is_told() -> None:
    problems = Problems()
    assert xen_hvm.rule(RangeSet([(0, MIB)]), problems, path="/dev/null") is None
    assert problems == [
        "/dev/null: Xen answers no question (Inappropriate ioctl for device): no page is refused for it"
    ]


def test_missing_device_is_told() -> None:
    problems = Problems()
    assert xen_hvm.rule(RangeSet([(0, MIB)]), problems, path="/nonexistent") is None
    assert problems == ["/nonexistent: No such file or directory: Xen cannot be asked; no page is refused for it"]


def test_device_that_does_not_open_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO opens when its other end does; privcmd, when xenstore answers."""
    monkeypatch.setattr(xen_hvm, "_OPEN_LIMIT", 0.05)
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened(path, flags & ~os.O_RDWR | os.O_WRONLY))
    fifo = tmp_path / "privcmd"
    os.mkfifo(fifo)
    problems = Problems()
    assert xen_hvm.rule(RangeSet([(0, MIB)]), problems, path=str(fifo)) is None
    assert problems == [f"{fifo}: Connection timed out: Xen cannot be asked; no page is refused for it"]
    os.close(opened(fifo, os.O_RDONLY | os.O_NONBLOCK))  # the thread that waits goes away


def test_what_could_not_be_asked_in_time_is_ram_and_told(library: Path) -> None:
    told = ask(library, [[0, 64 * MIB], [128 * MIB, 256 * MIB]], limit=-1, MMIO_DM="0-fffff")
    assert told.refused == []
    assert told.rule == ["Xen HVM", RAM, [[0, 64 * MIB], [128 * MIB, 256 * MIB]]]
    assert told.problems == [
        "/dev/null: Xen could not be asked about 0x0-0x3ffffff, 0x8000000-0xfffffff in -1 s; taken as RAM"
    ]


@pytest.mark.parametrize(
    ("kind", "guest", "live", "around", "asked"),
    [
        ("xen", "HVM", True, True, True),
        ("xen", "PVH", True, True, True),
        ("xen", None, True, True, True),
        ("xen", "PV", True, True, False),
        ("xen", "HVM", False, True, False),
        ("xen", "HVM", True, False, False),
        ("kvm", "HVM", True, True, False),
        (None, None, True, True, False),
    ],
)
def test_xen_is_asked_in_an_hvm_guest_whose_memory_is_read_around_the_kernel(
    kind: str | None,
    guest: str | None,
    live: bool,
    around: bool,
    asked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sys/hypervisor").mkdir(parents=True)
    for name, value in (("type", kind), ("guest_type", guest)):
        if value is not None:
            (tmp_path / "sys/hypervisor" / name).write_text(value + "\n")
    questions: list[RangeSet] = []

    def rule(wanted: RangeSet, problems: Problems, page_size: int) -> Rule | None:
        questions.append(wanted)
        return None

    monkeypatch.setattr(xen_hvm, "rule", rule)
    ram = RangeSet([(MIB, 64 * MIB)])
    machine = SimpleNamespace(
        root=str(tmp_path), live=live, around_kernel=lambda: around, problems=Problems(), page_size=PAGE
    )
    dump = SimpleNamespace(machine=machine, registry=Registry(), envelope=SimpleNamespace(all=ram))
    x86_platform._xen(cast(Any, dump))
    assert questions == ([ram] if asked else [])
