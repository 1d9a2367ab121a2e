# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random rules, and damage to compiled guards that a right checksum hides."""

from __future__ import annotations

import struct

from hypothesis import strategies as st

from guard._core import ffi, lib
from guard.ranges import Range, RangeSet
from guard.registry import Registry, Rule, allow_rule, bitmap_rule, deny_rule

PAGE = 4096
END = 300  # pages that the rules speak about


def sealed(data: bytes) -> bytes:
    """*data* (a compiled guard) with the checksum that it would have."""
    body = data[:-8]
    return body + struct.pack("=Q", lib.guardfile_sum(ffi.from_buffer("char[]", body), len(body)))


def byte_ranges(pfns: list[tuple[int, int]]) -> RangeSet:
    return RangeSet((a * PAGE, b * PAGE) for a, b in pfns)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    name, reason = draw(st.text(min_size=1, max_size=9)), draw(st.text(max_size=9))
    pfns = draw(st.lists(st.tuples(st.integers(0, END), st.integers(0, END)), max_size=12))
    kind = draw(st.sampled_from(["deny", "allow", "bitmap"]))
    if kind == "deny":
        return deny_rule(name, byte_ranges(pfns), reason)
    first, blocks = draw(st.integers(0, END)), draw(st.integers(0, END))
    per = draw(st.sampled_from([1, 1, 2, 3, 8, 64]))
    domain = Range(first * PAGE, (first + blocks // per * per) * PAGE)
    if kind == "allow":
        return allow_rule(name, domain, byte_ranges(pfns), reason)
    return bitmap_rule(name, domain, per * PAGE, draw(st.binary(max_size=40)), reason)


def shown(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@st.composite
def registries(draw: st.DrawFn) -> Registry:
    registry = Registry()
    for rule in draw(st.lists(rules(), max_size=5, unique_by=lambda r: shown(r.name))):
        registry.register(rule)
    return registry


@st.composite
def damages(draw: st.DrawFn, compiled: bytes) -> bytes:
    """Some of its 32-bit words changed, and the checksum made right again."""
    data = bytearray(compiled)
    for _ in range(draw(st.integers(1, 3))):
        at = 4 * draw(st.integers(2, (len(data) - 8) // 4 - 1))
        (old,) = struct.unpack_from("=I", data, at)
        new = draw(st.one_of(st.integers(0, (1 << 32) - 1), st.integers(-9, 9).map(old.__add__)))
        struct.pack_into("=I", data, at, new & 0xFFFFFFFF)
    return sealed(bytes(data))
