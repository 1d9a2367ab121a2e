# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's serial console as a shell. The guest's side is guest/init: a non-interactive ``sh`` on a raw tty. Each
command runs in a shell of its own between two markers, so what the kernel prints before or after does no harm. Bytes
arrive as they like: whatever is waited for ends with the end of its line. Time-outs are in seconds of the usual machine
(tests/pace.py)."""

from __future__ import annotations

import re
import shlex
import socket
from typing import NamedTuple

from tests.pace import Deadline, patience

READY = re.compile(rb"HARNESS-READY vmcore=(yes|no) release=(\S+) uptime=(\S+)\r?\n")
TAIL = 40


class ConsoleError(Exception):
    """The guest did not say what it should have in time, or is gone; ends with the last lines of its console."""


class Ready(NamedTuple):
    """The marker that init prints: whether /proc/vmcore exists, ``uname -r``, seconds since the kernel started."""

    vmcore: bool
    release: str
    uptime: float


class Result(NamedTuple):
    """Exit status of a command, and its standard output and error together."""

    status: int
    output: str


class Serial:
    """Console on *connection*."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self._log = bytearray()
        self._count = 0

    @property
    def log(self) -> str:
        """All that was ever printed."""
        return self._log.decode(errors="replace").replace("\r", "")

    @property
    def tail(self) -> str:
        """The last lines of the console."""
        return "\n".join(self.log.splitlines()[-TAIL:])

    def wait_ready(self, timeout: float) -> Ready:
        """Waits for the next kernel's init. Raises ConsoleError."""
        match = self._wait(READY, timeout, "init of the next kernel")
        return Ready(match[1] == b"yes", match[2].decode(), float(match[3]))

    def wait_said(self, pattern: str, timeout: float) -> str:
        """Waits for a line in which *pattern* matches, to its end, and returns the first group. Raises ConsoleError."""
        line = re.compile(pattern.encode() + rb"[^\r\n]*\r*\n")
        return self._wait(line, timeout, f"`{pattern}`")[1].decode()

    def run(self, command: str, timeout: float) -> Result:
        """Runs *command* with sh in the guest. Raises ConsoleError."""
        begin, end = self._markers()
        self.send(f"echo {begin}; sh -c {shlex.quote(command)} < /dev/null 2>&1; echo {end} $?")
        # the markers stand quoted in no other place: the tty does not echo
        pattern = re.compile(rf"{begin}\r?\n(.*?){end} (\d+)\r?\n".encode(), re.S)
        match = self._wait(pattern, timeout, f"end of `{command}`")
        return Result(int(match[2]), match[1].decode(errors="replace").replace("\r", ""))

    def send(self, line: str) -> None:
        """Sends *line* to the guest's shell and waits for nothing."""
        try:
            self._socket.sendall(line.encode() + b"\n")
        except OSError as error:
            raise ConsoleError(f"console: {error}\n{self.tail}") from None

    def _markers(self) -> tuple[str, str]:
        self._count += 1
        return f"HARNESS-BEGIN-{self._count}", f"HARNESS-END-{self._count}"

    def _wait(self, pattern: re.Pattern[bytes], timeout: float, what: str) -> re.Match[bytes]:
        deadline = Deadline(timeout)
        while not (match := pattern.search(self._buffer)):
            left = deadline.left()
            if left <= 0:
                raise ConsoleError(f"console: no {what} in {patience(timeout):.0f} s; last lines:\n{self.tail}")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                raise ConsoleError(f"console: QEMU has ended, no {what}; last lines:\n{self.tail}")
            self._buffer += data
            self._log += data
        self._buffer = self._buffer[match.end() :]
        return match
