# SPDX-License-Identifier: LGPL-2.1-or-later
"""BTF sections written by hand (include/uapi/linux/btf.h), for tests: each method adds a type and returns its id."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

KINDS = (
    *("", "INT", "PTR", "ARRAY", "STRUCT", "UNION", "ENUM", "FWD", "TYPEDEF", "VOLATILE", "CONST", "RESTRICT", "FUNC"),
    *("FUNC_PROTO", "VAR", "DATASEC", "FLOAT", "DECL_TAG", "TYPE_TAG", "ENUM64"),
)


class MadeBtf:
    def __init__(self) -> None:
        self.types = bytearray()
        self.strings = bytearray(b"\0")
        self.count = 0
        self._known: dict[str, int] = {"": 0}

    def string(self, text: str) -> int:
        if text not in self._known:
            self._known[text] = len(self.strings)
            self.strings += text.encode() + b"\0"
        return self._known[text]

    def add(self, kind: str, name: str, value: int, vlen: int = 0, flag: bool = False, rest: bytes = b"") -> int:
        """A record: *value* is its size or type, *rest* what follows its head."""
        info = KINDS.index(kind) << 24 | vlen | flag << 31
        self.types += struct.pack("=III", self.string(name), info, value) + rest
        self.count += 1
        return self.count

    def integer(self, name: str, size: int, bits: int | None = None, offset: int = 0) -> int:
        encoding = offset << 16 | (size * 8 if bits is None else bits)
        return self.add("INT", name, size, rest=struct.pack("=I", encoding))

    def pointer(self, to: int) -> int:
        return self.add("PTR", "", to)

    def array(self, of: int, length: int) -> int:
        return self.add("ARRAY", "", 0, rest=struct.pack("=III", of, of, length))

    def structure(
        self,
        name: str,
        size: int,
        members: Sequence[tuple[str, int, int]],
        kind: str = "STRUCT",
        bits: Mapping[str, int] | None = None,
    ) -> int:
        """*members* are (name, type, offset in bits); *bits* the widths of bitfields among them, which makes kind_flag
        be set."""
        rest = b"".join(
            struct.pack("=III", self.string(member), of, at | (bits or {}).get(member, 0) << 24)
            for member, of, at in members
        )
        return self.add(kind, name, size, len(members), bits is not None, rest)

    def enum(self, name: str, values: Mapping[str, int], signed: bool = False) -> int:
        rest = b"".join(struct.pack("=II", self.string(key), value & 0xFFFFFFFF) for key, value in values.items())
        return self.add("ENUM", name, 4, len(values), signed, rest)

    def enum64(self, name: str, values: Mapping[str, int], signed: bool = False) -> int:
        rest = b"".join(
            struct.pack("=III", self.string(key), value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF)
            for key, value in values.items()
        )
        return self.add("ENUM64", name, 8, len(values), signed, rest)

    def one_of_each_kind(self) -> None:
        """Every kind there is, with two members where it has members."""
        number = self.integer("filler", 4)
        self.pointer(number)
        self.array(number, 3)
        self.structure("filler_struct", 8, [("a", number, 0), ("b", number, 32)])
        self.structure("filler_union", 4, [("a", number, 0), ("b", number, 0)], "UNION")
        self.enum("filler_enum", {"FILLER_A": 1, "FILLER_B": 2})
        self.add("FWD", "filler_fwd", 0)
        for kind in ("TYPEDEF", "VOLATILE", "CONST", "RESTRICT", "TYPE_TAG"):
            self.add(kind, "filler_t" if kind in ("TYPEDEF", "TYPE_TAG") else "", number)
        proto = self.add("FUNC_PROTO", "", number, 2, rest=struct.pack("=IIII", 0, number, 0, number))
        self.add("FUNC", "filler_function", proto, 1)
        variable = self.add("VAR", "filler_variable", number, rest=struct.pack("=I", 1))
        self.add("DATASEC", ".filler", 8, 2, rest=struct.pack("=IIIIII", variable, 0, 4, variable, 4, 4))
        self.add("FLOAT", "filler_float", 8)
        self.add("DECL_TAG", "filler_tag", number, rest=struct.pack("=i", -1))
        self.enum64("filler_enum64", {"FILLER_C": 1, "FILLER_D": 1 << 40})

    def section(self) -> bytes:
        head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return bytes(head + self.types + self.strings)
