# SPDX-License-Identifier: LGPL-2.1-or-later
"""Layouts of structures from DWARF (version 4 and 5, through pyelftools), for a vmlinux that was built without BTF.

A kernel's DWARF is hundreds of megabytes in thousands of compilation units, and pyelftools is Python. But the file that
writes VMCOREINFO has all that it tells of in its own unit, so only that one and a few beside it are gone through."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from guard.errors import WitnessError
from guard.witness.btf import Layout, Member

T = TypeVar("T")

_UNITS = ("kernel/vmcore_info.c", "kernel/crash_core.c", "kernel/printk/printk.c")
"""crash_core.c wrote the note before 6.9; printk.c adds the lines of its ring buffer."""
_STRUCTS = {"DW_TAG_structure_type", "DW_TAG_union_type"}
_THROUGH = {"DW_TAG_typedef", "DW_TAG_const_type", "DW_TAG_volatile_type", "DW_TAG_atomic_type"}
_MAX_HOPS = 32
_MAX_STRUCTS = 256
_TIME_LIMIT = 120.0


class Dwarf:
    """The types called *names*, of the units that VMCOREINFO is written by. Raises WitnessError if there is none of
    these, or they take more than two minutes."""

    def __init__(self, elf: Any, names: Iterable[str]) -> None:
        deadline = time.monotonic() + _TIME_LIMIT
        wanted = frozenset(names)
        self._found: dict[str, list[Any]] = {}
        units = 0
        for unit in elf.get_dwarf_info(relocate_dwarf_sections=False, follow_links=False).iter_CUs():
            top = unit.get_top_DIE()
            name = top.attributes.get("DW_AT_name")
            if name is not None and name.value.decode("ascii", "replace").endswith(_UNITS):
                units += 1
                for die in _children(top):
                    label = _name(die)
                    if label in wanted and "DW_AT_declaration" not in die.attributes:
                        self._found.setdefault(label, []).append(die)
                    if time.monotonic() > deadline:
                        raise WitnessError(f"its DWARF takes more than {_TIME_LIMIT:g} s")
            if time.monotonic() > deadline:
                raise WitnessError(f"its DWARF takes more than {_TIME_LIMIT:g} s")
            if units == len(_UNITS):
                break
        if not units:
            raise WitnessError(f"its DWARF has no unit of {' or '.join(_UNITS)}")

    def layout(self, name: str, members: Iterable[str]) -> Layout | None:
        """Of the struct or union *name*, or else of what the typedef *name* stands for. Members in anonymous structs
        and unions count as its own; bitfields are left out. None if there is no such type. Raises WitnessError if its
        DWARF is cut or damaged."""
        return _undamaged(name, lambda: self._layout(name, frozenset(members)))

    def _layout(self, name: str, members: frozenset[str]) -> Layout | None:
        types = self._found.get(name, [])
        structs = [die for die in types if die.tag in _STRUCTS]
        if not structs:
            ends = [_end(die) for die in types if die.tag == "DW_TAG_typedef"]
            structs = [end for end in ends if end is not None and end.tag in _STRUCTS]
        if not structs or (size := _number(structs[0], "DW_AT_byte_size")) is None:
            return None
        return Layout(size, _members(structs[0], members))

    def enum(self, name: str) -> dict[str, int] | None:
        """The enumerators of enum *name*; None if there is no such type. Raises as :meth:`layout`."""
        return _undamaged(name, lambda: self._enum(name))

    def _enum(self, name: str) -> dict[str, int] | None:
        for die in self._found.get(name, []):
            if die.tag == "DW_TAG_enumeration_type":
                values = {_name(one): _number(one, "DW_AT_const_value") for one in _children(die)}
                return {key: value for key, value in values.items() if value is not None}
        return None


def _undamaged(name: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except WitnessError:
        raise
    except Exception as error:  # pyelftools checks little of what it reads: damage comes as an error of any kind
        raise WitnessError(f"DWARF of {name}: {' '.join(str(error).split()) or type(error).__name__}") from None


def _children(die: Any) -> Iterator[Any]:
    """The children of *die*: pyelftools goes where DW_AT_sibling leads, which has to be ahead."""
    reached = die.offset
    for child in die.iter_children():
        if child.offset <= reached:
            raise WitnessError(f"DWARF: the entry at {reached:#x} is followed by the one at {child.offset:#x}")
        reached = child.offset
        yield child


def _name(die: Any) -> str:
    name = die.attributes.get("DW_AT_name")
    return "" if name is None else str(name.value.decode("ascii", "backslashreplace"))


def _number(die: Any, attribute: str) -> int | None:
    value = die.attributes.get(attribute)
    return value.value if value is not None and isinstance(value.value, int) else None


def _end(die: Any) -> Any:
    """The type that *die* has, behind typedefs and qualifiers; None for void."""
    for _ in range(_MAX_HOPS):
        if "DW_AT_type" not in die.attributes:
            return None
        die = die.get_DIE_from_attribute("DW_AT_type")
        if die.tag not in _THROUGH:
            return die
    return None


def _members(outer: Any, wanted: frozenset[str]) -> dict[str, Member]:
    found: dict[str, Member] = {}
    pending = [(outer, 0)]
    seen = 0
    while pending and seen < _MAX_STRUCTS:
        one, base = pending.pop()
        seen += 1
        for die in _children(one):
            if die.tag != "DW_TAG_member" or "DW_AT_bit_size" in die.attributes:
                continue
            offset = base + (_number(die, "DW_AT_data_member_location") or 0)  # a union's members have none
            name = _name(die)
            if not name:
                if (end := _end(die)) is not None and end.tag in _STRUCTS:
                    pending.append((end, offset))
            elif name in wanted and name not in found:
                found[name] = _member(die, offset)
    return found


def _member(die: Any, offset: int) -> Member:
    length = 1
    for _ in range(_MAX_HOPS):
        die = _end(die)
        if die is None:
            break
        if die.tag == "DW_TAG_array_type":
            for part in _children(die):
                if part.tag == "DW_TAG_subrange_type":
                    last = _number(part, "DW_AT_upper_bound")
                    length *= (_number(part, "DW_AT_count") or 0) if last is None else last + 1
            continue
        if die.tag == "DW_TAG_pointer_type":
            return Member(offset, 8 * length, length)
        return Member(offset, (_number(die, "DW_AT_byte_size") or 0) * length, length)
    return Member(offset, 0, length)
