# SPDX-License-Identifier: LGPL-2.1-or-later
"""May this page of old memory be read, and reading it.

Knows nothing of ELF headers or of where memory maps come from: :class:`Registry` holds the rules, :class:`OldMemory`
reads segments of files through them, and guard.witness reads the dead kernel's own records through the same gate."""

from typing import TYPE_CHECKING, Any

from guard.errors import DeviceError, Error, ReadError, SourceError, WitnessError
from guard.pageset import PageSet
from guard.physmem import ExactMemory, Fault, OldMemory, Segment
from guard.ranges import Range, RangeSet
from guard.registry import GuardWarning, Registry, Rule, allow_rule, bitmap_rule, callback_rule, deny_rule

if TYPE_CHECKING:
    from guard.guarded import GuardedMemory, Image
    from guard.plugins import rule_plugin

__all__ = [
    "DeviceError",
    "Error",
    "ExactMemory",
    "Fault",
    "GuardWarning",
    "GuardedMemory",
    "Image",
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
    "rule_plugin",
]

# What no capture kernel needs, or not always: imported when it is asked for
_LATE = {"GuardedMemory": "guard.guarded", "Image": "guard.guarded", "rule_plugin": "guard.plugins"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(_LATE[name]), name)
    return found
