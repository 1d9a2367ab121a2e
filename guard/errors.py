# SPDX-License-Identifier: LGPL-2.1-or-later
"""The errors that oldmem raises on purpose. Each message is one line that a user can act on: which file or
address, what was expected, what was found. Anything else that escapes is a bug."""


class Error(Exception):
    """Base of all errors raised on purpose; ``str()`` of it is the one line shown to the user."""


class SourceError(Error):
    """A source of old memory, or of facts about it, cannot be used at all (missing, refused, malformed)."""


class ReadError(Error):
    """Old memory at *paddr* (bytes, physical) cannot be read: outside every segment, refused by a rule, or faulting."""

    def __init__(self, message: str, paddr: int) -> None:
        super().__init__(message)
        self.paddr = paddr


class DeviceError(Error):
    """A device (virtio-mem, loop) did not answer, or answered what its specification does not allow."""


class WitnessError(Error):
    """The dead kernel's own records are absent or not plausible; never fatal for the dump as a whole."""
