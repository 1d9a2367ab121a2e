# SPDX-License-Identifier: LGPL-2.1-or-later
"""Layouts of structures from BTF (include/uapi/linux/btf.h, Documentation/bpf/btf.rst): what a kernel tells of its own
types, where it was built with CONFIG_DEBUG_INFO_BTF.

A kernel's BTF is 4 to 6 MB with some 100000 types. It is passed over in pieces of 64 KiB by C (guard/csrc/btf.h), once
for the strings and once for the types, and nothing of it is kept but where the wanted types stand. Everything else is
read where it is needed. The bytes are untrusted: every walk is bounded, none recurses, and what one read has shown of a
dead kernel's memory, the next one need not: a device may still be writing to it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from guard._core import ffi, lib
from guard.errors import WitnessError

Read = Callable[[int, int], bytes]
"""``read(offset, size)`` gives exactly *size* bytes of a BTF section; raises what it will where it cannot."""

MAGIC = 0xEB9F
MAX_SIZE = 64 << 20
"""Largest section taken, in bytes."""

_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _FLOAT, _ENUM64 = 1, 2, 3, 4, 5, 6, 16, 19
_TYPEDEF = 8
_MODIFIERS = (_TYPEDEF, 9, 10, 11, 18)  # and volatile, const, restrict, type tag
_POINTER_SIZE = 8
_CHUNK = 1 << 16
_WINDOW = 1 << 12
_STRIDE = 32
_HITS = 4  # types of one name that are looked at
_MAX_HOPS = 32
_MAX_MEMBERS = 2048  # of one struct, with those of the anonymous ones in it
_MAX_NAME = 256


class Member(NamedTuple):
    """*offset* and *size* in bytes; *length* is the number of elements of an array, else 1. A size of 0: not known."""

    offset: int
    size: int
    length: int


class Layout(NamedTuple):
    """Size of a structure in bytes, and those of its members that were asked for and are there."""

    size: int
    members: dict[str, Member]


class _Type(NamedTuple):
    name: int  # offset of its name in the string section; 0: anonymous
    kind: int
    vlen: int
    flag: bool
    value: int  # size in bytes, or a type id
    at: int  # offset of what follows the head, in the type section


def of_bytes(data: bytes) -> Read:
    """A reader of *data*. It raises WitnessError beyond the end."""

    def read(offset: int, size: int) -> bytes:
        if offset + size > len(data):
            raise WitnessError(f"BTF: {size} bytes at {offset:#x} asked for, there are {len(data):#x}")
        return data[offset : offset + size]

    return read


def layouts(read: Read, size: int, wanted: dict[str, tuple[str, ...]]) -> dict[str, Layout]:
    """Layouts of those of the *wanted* types that there are, with the members asked for of each. Raises as Btf()."""
    btf = Btf(read, size, wanted)
    found = {name: btf.layout(name, members) for name, members in wanted.items()}
    return {name: layout for name, layout in found.items() if layout}


class Btf:
    """The types called *names* of the BTF section of *size* bytes.

    Raises WitnessError if it is no BTF or damaged, and what *read* raises."""

    def __init__(self, read: Read, size: int, names: Iterable[str]) -> None:
        if not 24 <= size <= MAX_SIZE:
            raise WitnessError(f"BTF of {size} bytes, expected 24 to {MAX_SIZE}")
        magic, version, _flags, length, types, types_size, strings, strings_size = struct.unpack(
            "=HBBIIIII", read(0, 24)
        )
        if (magic, version) != (MAGIC, 1):
            raise WitnessError(f"BTF: magic {magic:#x} and version {version} where {MAGIC:#x} and 1 were expected")
        if length < 24 or max(types + types_size, strings + strings_size) > size - length:
            raise WitnessError(
                f"BTF of {size:#x} bytes: header of {length:#x}, types at {types:#x}+{types_size:#x}, "
                f"strings at {strings:#x}+{strings_size:#x} are not possible"
            )
        self._read = read
        self._types, self._types_size = length + types, types_size
        self._strings, self._strings_size = length + strings, strings_size
        self._known: dict[int, _Type] = {}
        self._names = self._find_names(sorted(set(names)))
        self._found = self._find_types()

    def _find_names(self, names: list[str]) -> dict[int, str]:
        """Each of *names* that is in the string section, by its offset there."""
        text = "".join(f"{name}\0" for name in names).encode()
        offsets = ffi.new("uint32_t[]", len(names))
        at = 0
        while at < self._strings_size:
            data = self._read(self._strings + at, min(_CHUNK, self._strings_size - at))
            used = lib.btf_strings(ffi.from_buffer("char[]", data), len(data), at, text, len(names), offsets)
            if not used:
                raise WitnessError(f"BTF: string at {at:#x} has no end within {len(data)} bytes")
            at += used
        return {offset: name for offset, name in zip(offsets, names, strict=True) if offset}

    def _find_types(self) -> dict[str, list[_Type]]:
        walk = ffi.new("struct btf_walk *")
        walk.id, walk.stride = 1, _STRIDE
        walk.n_names = len(self._names)
        walk.max_hits = _HITS * len(self._names)
        walk.max_index = self._types_size // 12 // _STRIDE + 1
        # what a C struct points to lives only as long as Python holds it
        walk.names = names = ffi.new("uint32_t[]", list(self._names))
        walk.hits = hits = ffi.new("struct btf_hit[]", walk.max_hits)
        walk.index = self._index = ffi.new("uint32_t[]", walk.max_index)
        while walk.at < self._types_size:
            at = walk.at
            data = self._read(self._types + at, min(_CHUNK, self._types_size - at))
            if not lib.btf_walk(walk, ffi.from_buffer("char[]", data), len(data)):
                raise WitnessError(f"BTF: type {walk.id} at {walk.at:#x} is of no known kind")
            if walk.at == at:
                break
        if walk.at != self._types_size:
            raise WitnessError(f"BTF: type {walk.id - 1} does not end with the types, at {self._types_size:#x}")
        del names
        self._n_index, self._n_types = walk.n_index, walk.id - 1
        found: dict[str, list[_Type]] = {}
        for hit in hits[0 : walk.n_hits]:
            one = self._type_at(hit.at)
            if one.name not in self._names:
                raise _changed(hit.at)
            found.setdefault(self._names[one.name], []).append(one)
        return found

    def layout(self, name: str, members: Iterable[str]) -> Layout | None:
        """Of the struct or union *name*, or else of what the typedef *name* stands for. Members in anonymous structs
        and unions count as its own; bitfields are left out. None where there is no such type, or several that
        differ."""
        types = self._found.get(name, [])
        structs = [t for t in types if t.kind in (_STRUCT, _UNION)]
        if not structs:
            structs = [end for t in types if t.kind == _TYPEDEF and (end := self._end(t.value))]
        wanted = frozenset(members)
        different: list[Layout] = []
        for one in structs:
            layout = Layout(one.value, self._members(one, wanted))
            if layout not in different:
                different.append(layout)
        return different[0] if len(different) == 1 else None

    def enum(self, name: str) -> dict[str, int] | None:
        """The enumerators of enum *name*. None where there is no such type, or several that differ."""
        different: list[dict[str, int]] = []
        for one in self._found.get(name, []):
            if one.kind in (_ENUM, _ENUM64):
                values = self._enumerators(one)
                if values not in different:
                    different.append(values)
        return different[0] if len(different) == 1 else None

    def _enumerators(self, one: _Type) -> dict[str, int]:
        values: dict[str, int] = {}
        form = struct.Struct("=Ii" if one.flag else "=II") if one.kind == _ENUM else struct.Struct("=III")
        for at, low, *high in form.iter_unpack(self._bytes(one.at, form.size * one.vlen)):
            value = low
            if high:
                value |= high[0] << 32
                if one.flag and value >> 63:
                    value -= 1 << 64
            values[self._string(at)] = value
        return values

    def _members(self, outer: _Type, wanted: frozenset[str]) -> dict[str, Member]:
        found: dict[str, Member] = {}
        pending = [(outer, 0)]
        left = _MAX_MEMBERS
        while pending and left > 0:
            one, base = pending.pop()
            if one.kind not in (_STRUCT, _UNION):
                continue
            vlen = min(one.vlen, left)
            left -= vlen + 1
            for at, type_id, place in struct.iter_unpack("=III", self._bytes(one.at, 12 * vlen)):
                bits = 0
                if one.flag:
                    bits, place = place >> 24, place & 0xFFFFFF
                if bits or place % 8:
                    continue
                offset = base + place // 8
                name = self._string(at) if at else ""
                if not name:
                    if end := self._end(type_id):
                        pending.append((end, offset))
                elif name in wanted and name not in found and (member := self._member(type_id, offset)):
                    found[name] = member
        return found

    def _member(self, type_id: int, offset: int) -> Member | None:
        """None for a bitfield of the old encoding, where the integer type says so."""
        length = 1
        for _ in range(_MAX_HOPS):
            one = self._end(type_id)
            if one is None:
                break
            if one.kind == _ARRAY:
                type_id, _index, elements = struct.unpack("=III", self._bytes(one.at, 12))
                length *= elements
                continue
            if one.kind == _PTR:
                return Member(offset, _POINTER_SIZE * length, length)
            if one.kind == _INT:
                (encoding,) = struct.unpack("=I", self._bytes(one.at, 4))
                if encoding >> 16 & 0xFF or encoding & 0xFF != one.value * 8:
                    return None
            if one.kind in (_INT, _STRUCT, _UNION, _ENUM, _FLOAT, _ENUM64):
                return Member(offset, one.value * length, length)
            break
        return Member(offset, 0, length)

    def _end(self, type_id: int) -> _Type | None:
        """What *type_id* is behind typedefs and qualifiers; None for void and what goes in circles."""
        for _ in range(_MAX_HOPS):
            one = self._type(type_id)
            if one is None or one.kind not in _MODIFIERS:
                return one
            type_id = one.value
        return None

    def _type(self, type_id: int) -> _Type | None:
        if not 0 < type_id <= self._n_types:
            return None
        known = self._known.get(type_id)
        if known is None:
            known = self._known[type_id] = self._type_at(self._place(type_id))
        return known

    def _place(self, type_id: int) -> int:
        """Offset in the type section: from the last one that the index has, over the records between."""
        slot, more = divmod(type_id - 1, _STRIDE)
        walk = ffi.new("struct btf_walk *")
        walk.at, walk.id, walk.stride = self._index[slot], 1, 1
        walk.max_index = more + 1
        walk.index = index = ffi.new("uint32_t[]", more + 1)
        while walk.n_index <= more:
            at = walk.at
            if at >= self._types_size:
                raise _changed(at)
            data = self._bytes(at, min(_WINDOW, self._types_size - at))
            if not lib.btf_walk(walk, ffi.from_buffer("char[]", data), len(data)) or walk.at == at:
                raise _changed(at)
        return int(index[more])

    def _type_at(self, at: int) -> _Type:
        name, info, value = struct.unpack("=III", self._bytes(at, 12))
        return _Type(name, info >> 24 & 0x1F, info & 0xFFFF, bool(info >> 31), value, at + 12)

    def _bytes(self, at: int, size: int) -> bytes:
        """*size* bytes at *at* of the type section."""
        if at + size > self._types_size:
            raise WitnessError(f"BTF: {size} bytes at {at:#x} are beyond the end of the types")
        return self._read(self._types + at, size)

    def _string(self, at: int) -> str:
        size = min(_MAX_NAME, self._strings_size - at)
        if size <= 0:
            raise WitnessError(f"BTF: a name at {at:#x} is beyond the end of the strings")
        return self._read(self._strings + at, size).partition(b"\0")[0].decode("ascii", "backslashreplace")


def _changed(at: int) -> WitnessError:
    return WitnessError(f"BTF: types at {at:#x} are not what they were a moment ago")
