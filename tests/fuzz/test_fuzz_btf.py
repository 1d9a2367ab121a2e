# SPDX-License-Identifier: LGPL-2.1-or-later
"""BTF damaged at random, as the memory of a dead kernel may be: an answer or WitnessError, within bounds."""

from __future__ import annotations

import struct
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import WitnessError
from guard.witness.btf import Btf
from tests.unit.made_btf import KINDS, MadeBtf

MOST_READ = 1 << 22
"""Bytes that a section of a few KiB may make its reader ask for: members and names are read one by one."""

NAMES = ("page", "atomic_long_t", "pageflags", "filler_struct", "filler_t")
MEMBERS = ("flags", "lru", "counter", "a", "b")


def sound() -> bytes:
    made = MadeBtf()
    made.one_of_each_kind()
    long = made.integer("unsigned long", 8)
    inner = made.structure("", 16, [("lru", made.array(long, 2), 0)], "UNION")
    made.structure("page", 64, [("flags", long, 0), ("", inner, 64)])
    made.add("TYPEDEF", "atomic_long_t", made.structure("", 8, [("counter", long, 0)]))
    made.enum("pageflags", {"PG_locked": 0, "PG_lru": 5})
    made.one_of_each_kind()
    return made.section()


SOUND = sound()
WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 0xFFFF, 1 << 24, 1 << 31, 0xFFFFFFFF, len(SOUND)]),
    st.builds(lambda kind, vlen: kind << 24 | vlen, st.integers(0, len(KINDS)), st.sampled_from([0, 1, 3, 0xFFFF])),
    st.integers(0, 0xFFFFFFFF),
)
DAMAGE = st.lists(st.tuples(st.integers(0, len(SOUND) // 4 - 1), WORDS), min_size=1, max_size=6)


def ask(data: bytes) -> None:
    asked = 0

    def read(offset: int, size: int) -> bytes:
        nonlocal asked
        asked += size
        assert offset >= 0
        assert size >= 0
        assert offset + size <= len(data)
        return data[offset : offset + size]

    try:
        with suppress(WitnessError):
            btf = Btf(read, len(data), NAMES)
            for name in NAMES:
                with suppress(WitnessError):
                    if layout := btf.layout(name, MEMBERS):
                        assert layout.members.keys() <= set(MEMBERS)
                        assert all(m.offset >= 0 and m.size >= 0 for m in layout.members.values())
                with suppress(WitnessError):
                    btf.enum(name)
    finally:
        assert asked < MOST_READ


@settings(max_examples=1500, deadline=None)
@given(damage=DAMAGE, end=st.one_of(st.just(len(SOUND)), st.integers(0, len(SOUND))))
def test_damaged_btf(damage: list[tuple[int, int]], end: int) -> None:
    data = bytearray(SOUND)
    for at, word in damage:
        struct.pack_into("<I", data, at * 4, word)
    ask(bytes(data[:end]))


@settings(max_examples=300, deadline=None)
@given(types=st.binary(max_size=4000), strings=st.binary(max_size=600))
def test_anything_behind_a_sound_header(types: bytes, strings: bytes) -> None:
    head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    ask(head + types + strings)


def test_sound_btf_passes_the_same_check() -> None:
    ask(SOUND)
    btf = Btf(lambda at, size: SOUND[at : at + size], len(SOUND), NAMES)
    page = btf.layout("page", MEMBERS)
    assert page is not None
    assert {name: m.offset for name, m in page.members.items()} == {"flags": 0, "lru": 8}
