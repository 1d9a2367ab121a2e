# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU Machine Protocol over a connected socket (docs/interop/qmp-spec): one command, one answer; events are
skipped."""

from __future__ import annotations

import json
import socket
from typing import Any

from tests.pace import patience

TIMEOUT = 30.0


class QmpError(Exception):
    """QEMU refused a command, or closed the connection, or did not answer in time."""


class Qmp:
    """Client on *connection*, greeted and ready for :meth:`command`."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self._receive("greeting")
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        """The ``return`` member of the answer to *name*. Raises QmpError."""
        try:
            self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        except OSError as error:
            raise QmpError(f"{name}: {error}") from None
        while True:
            answer = self._receive(name)
            if "error" in answer:
                raise QmpError(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._socket.close()

    def _receive(self, what: str) -> dict[str, Any]:
        self._socket.settimeout(patience(TIMEOUT))
        while b"\n" not in self._buffer:
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise QmpError(f"{what}: no answer from QEMU in {patience(TIMEOUT):.0f} s") from None
            except OSError as error:
                raise QmpError(f"{what}: {error}") from None
            if not data:
                raise QmpError(f"{what}: QEMU has closed the connection")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer
