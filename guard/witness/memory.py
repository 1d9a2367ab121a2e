# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the witness needs of its surroundings: a reader of physical addresses, and a place for warning lines.

Every reader in this package takes its bytes through :class:`Memory`, so nothing here can read a page that the guard
refuses."""

from __future__ import annotations

from typing import Protocol


class Memory(Protocol):
    """Guarded reads of old memory by physical address."""

    def read(self, paddr: int, size: int) -> bytes:
        """Exactly *size* bytes from physical address *paddr*.

        Raises guard.errors.ReadError if any of them is outside readable RAM, refused by a rule, or faulting."""


class Problems(list[str]):
    """Warning lines, one per thing that was not as expected. Bounded: damaged memory can complain without end."""

    __slots__ = ("_limit",)

    def __init__(self, limit: int = 64) -> None:
        super().__init__()
        self._limit = limit

    def note(self, line: str) -> None:
        """Append *line* (what, where, what was expected, what was done instead) unless the limit is reached."""
        if len(self) < self._limit:
            self.append(line)
        elif len(self) == self._limit:
            self.append(f"more than {self._limit} problems, the rest is not shown")
