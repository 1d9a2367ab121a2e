# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the guests' harness does without a guest: lines that arrive in pieces, and seconds of a slow machine."""

from __future__ import annotations

import socket
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import pace
from tests.vm.harness.serial import ConsoleError, Ready, Result, Serial

CONSOLE = (
    b"oldmem: not there: 0x72ed000\r\n[    1.0] noise\r\nHARNESS-READY vmcore=yes release=6.12.9-amd64 uptime=12.34\r\n"
    b"HARNESS-BEGIN-1\r\nsome\r\noutput HARNESS-END-1\r\nHARNESS-END-1 12\r\n"
)


class Pieces:
    """A console that says *pieces*, one each time it is asked, and then nothing."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.sent = b""

    def settimeout(self, seconds: float) -> None:
        assert seconds > 0

    def recv(self, size: int) -> bytes:
        if not self._pieces:
            raise TimeoutError
        return self._pieces.pop(0)

    def sendall(self, data: bytes) -> None:
        self.sent += data


def serial(pieces: list[bytes]) -> Serial:
    return Serial(cast(socket.socket, Pieces(pieces)))


@given(st.sets(st.integers(1, len(CONSOLE) - 1)))
def test_what_is_waited_for_is_whole_however_its_bytes_arrive(cuts: set[int]) -> None:
    borders = [0, *sorted(cuts), len(CONSOLE)]
    console = serial([CONSOLE[a:b] for a, b in pairwise(borders)])
    assert console.wait_said("oldmem: not there: 0x([0-9a-f]+)", 1) == "72ed000"
    assert console.wait_ready(1) == Ready(True, "6.12.9-amd64", 12.34)
    assert console.run("x", 1) == Result(12, "some\noutput HARNESS-END-1\n")


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_factor", 1.0)
    monkeypatch.setattr(pace, "USUAL_WORK", 100.0)


@pytest.mark.usefixtures("usual")
def test_line_without_its_end_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConsoleError, match=r"no `0x\(\[0-9a-f\]\+\)` in 0 s; last lines:\n0x72"):
        serial([b"0x72"]).wait_said("0x([0-9a-f]+)", 0.01)


@pytest.mark.usefixtures("usual")
def test_one_slow_guest_makes_all_that_waits_patient_for_good() -> None:
    assert pace.patience(10) == 10
    pace.slow(3)
    pace.slow(2)
    assert pace.patience(10) == 30


@pytest.mark.usefixtures("usual")
def test_before_a_wait_fails_it_is_looked_how_slow_the_machine_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = pace.Deadline(0.001)
    while deadline.left() > 0:
        pass
    monkeypatch.setattr(pace, "USUAL_WORK", 1e-6)  # it has become a very slow one
    assert deadline.left() > 1
    assert pace.patience(1) > 1000


@pytest.mark.usefixtures("usual")
def test_what_never_comes_is_told_by_its_name() -> None:
    with pytest.raises(AssertionError, match=r"mount gone: not in 0 s"):
        pace.wait_until("mount gone", lambda: False, 0.01)
