# SPDX-License-Identifier: LGPL-2.1-or-later
"""Layouts of the structures that the witness reads and no vmcoreinfo key describes.

They come from the dead kernel's own BTF, which lies in its read-only data between __start_BTF and __stop_BTF. That is
always done, in the capture kernel too: the 5 MB are passed over in a twentieth of the time that kallsyms takes (33 of
900 ms of `oldmem map` in an emulated capture kernel), and its peak memory does not change. Where there is no BTF, or it
makes no sense, the fixed layouts here count: these structures have been the same in every 64-bit kernel so far
(include/linux/ioport.h, include/linux/range.h, arch/x86/include/asm/e820/types.h, include/uapi/linux/utsname.h)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from guard.witness import btf
from guard.witness.btf import Layout, Member
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk

SYMBOLS = frozenset({"__start_BTF", "__stop_BTF"})

_MOST = 8
"""How many times as large a structure may have become: many of them are read."""
_CODES = {4: "I", 8: "Q"}


def _fixed(size: int, /, **members: tuple[int, int]) -> Layout:
    return Layout(size, {name: Member(offset, width, 1) for name, (offset, width) in members.items()})


FIXED: Mapping[str, Layout] = {
    "resource": _fixed(64, start=(0, 8), end=(8, 8), name=(16, 8), flags=(24, 8), sibling=(48, 8), child=(56, 8)),
    "range": _fixed(16, start=(0, 8), end=(8, 8)),
    "e820_table": _fixed(0, nr_entries=(0, 4), entries=(4, 0)),
    "e820_entry": _fixed(20, addr=(0, 8), size=(8, 8), type=(16, 4)),
    "new_utsname": _fixed(390, release=(130, 65)),
}
"""A size of 0 has no fixed value: how many entries the table holds is the kernel's configuration."""


def of_dead_kernel(walk: PageWalk, symbols: Mapping[str, int], problems: Problems) -> Mapping[str, Layout]:
    """FIXED, with what the BTF of the kernel whose *symbols* are given says in its place. A structure that is not what
    the witness could read keeps its fixed layout, and each contradiction is told in *problems*.

    Raises WitnessError or ReadError if there is BTF, and it cannot be used."""
    if not symbols.keys() >= SYMBOLS:
        return FIXED
    start, end = symbols["__start_BTF"], symbols["__stop_BTF"]
    wanted = {name: tuple(fixed.members) for name, fixed in FIXED.items()}
    found = btf.layouts(lambda at, size: walk.read(start + at, size), end - start, wanted)
    known: dict[str, Layout] = {}
    for name, fixed in FIXED.items():
        one = found.get(name)
        known[name] = fixed
        if one is None or _same(one, fixed):
            continue
        if _usable(one, fixed):
            known[name] = one
            believed = "BTF is believed"
        else:
            believed = "BTF is not believed"
        problems.note(f"struct {name} is {_told(one)} by the dead kernel's BTF, not {_told(fixed)}; {believed}")
    return known


def _same(one: Layout, fixed: Layout) -> bool:
    return fixed.size in (0, one.size) and all(
        name in one.members and one.members[name].offset == member.offset and member.size in (0, one.members[name].size)
        for name, member in fixed.members.items()
    )


def _usable(one: Layout, fixed: Layout) -> bool:
    """All members are there, as wide as they were, inside the structure, and none lies on another."""
    if not one.members.keys() >= fixed.members.keys() or (fixed.size and one.size > _MOST * fixed.size):
        return False
    reached = 0
    for name, member in sorted(one.members.items(), key=lambda item: item[1].offset):
        width = fixed.members[name].size
        if member.offset < reached or member.offset + member.size > one.size or width not in (0, member.size):
            return False
        reached = member.offset + member.size
    return True


def _told(layout: Layout) -> str:
    members = ", ".join(f"{name} at {member.offset}" for name, member in layout.members.items())
    return f"{layout.size or 'some'} bytes with {members or 'none of its members'}"


def unpacker(layout: Layout, *names: str) -> Callable[[bytes], tuple[int, ...]]:
    """A function that takes the bytes of a structure and gives the values of its members *names*, unsigned."""
    form, at = "<", 0
    ascending = sorted(names, key=lambda name: layout.members[name].offset)
    for name in ascending:
        member = layout.members[name]
        form += f"{member.offset - at}x{_CODES[member.size]}"
        at = member.offset + member.size
    unpack = struct.Struct(form).unpack_from
    order = [ascending.index(name) for name in names]
    if order == sorted(order):
        return unpack
    return lambda data: tuple([unpack(data)[i] for i in order])
