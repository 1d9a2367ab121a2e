# SPDX-License-Identifier: LGPL-2.1-or-later
"""May this page of old memory be read, and reading it.

Knows nothing of ELF headers or of where memory maps come from: :class:`Registry` holds the rules, :class:`OldMemory`
reads segments of files through them, and guard.witness reads the dead kernel's own records through the same gate."""

from guard.errors import DeviceError, Error, ReadError, SourceError, WitnessError
from guard.pageset import PageSet
from guard.physmem import ExactMemory, Fault, OldMemory, Segment
from guard.ranges import Range, RangeSet
from guard.registry import GuardWarning, Registry, Rule, allow_rule, bitmap_rule, callback_rule, deny_rule

__all__ = [
    "DeviceError",
    "Error",
    "ExactMemory",
    "Fault",
    "GuardWarning",
    "OldMemory",
    "PageSet",
    "Range",
    "RangeSet",
    "ReadError",
    "Registry",
    "Rule",
    "Segment",
    "SourceError",
    "WitnessError",
    "allow_rule",
    "bitmap_rule",
    "callback_rule",
    "deny_rule",
]
