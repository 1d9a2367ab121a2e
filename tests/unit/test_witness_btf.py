# SPDX-License-Identifier: LGPL-2.1-or-later
"""Layouts from BTF: sections written by hand, as compilers write them and as nobody should."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import WitnessError
from guard.witness.btf import Btf, Layout, Member, layouts, of_bytes
from tests.unit.made_btf import MadeBtf


def layout(made: MadeBtf, name: str, *members: str) -> Layout | None:
    data = made.section()
    return layouts(of_bytes(data), len(data), {name: members}).get(name)


def enum(made: MadeBtf, name: str) -> dict[str, int] | None:
    data = made.section()
    return Btf(of_bytes(data), len(data), [name]).enum(name)


def test_members_have_their_offsets_sizes_and_lengths() -> None:
    made = MadeBtf()
    made.one_of_each_kind()
    long = made.integer("unsigned long", 8)
    typedef = made.add("TYPEDEF", "u64", made.add("CONST", "", made.add("VOLATILE", "", long)))
    matrix = made.array(made.array(long, 3), 2)
    inner = made.structure("inner", 24, [("x", long, 0)])
    members = [
        ("plain", long, 0),
        ("behind", typedef, 64),
        ("pointer", made.pointer(inner), 128),
        ("matrix", matrix, 192),
        ("inner", inner, 576),
        ("color", made.enum("color", {"RED": 1}), 768),
        ("void", made.add("FWD", "unknown", 0), 832),
        ("not_asked_for", long, 896),
    ]
    made.structure("outer", 120, members)
    found = layout(made, "outer", "plain", "behind", "pointer", "matrix", "inner", "color", "void", "not_there")
    assert found == Layout(
        120,
        {
            "plain": Member(0, 8, 1),
            "behind": Member(8, 8, 1),
            "pointer": Member(16, 8, 1),
            "matrix": Member(24, 48, 6),
            "inner": Member(72, 24, 1),
            "color": Member(96, 4, 1),
            "void": Member(104, 0, 1),
        },
    )


def test_anonymous_structs_and_unions_are_seen_through() -> None:
    made = MadeBtf()
    word = made.integer("unsigned int", 4)
    deep = made.structure("", 8, [("c", word, 0), ("d", word, 32)])
    union = made.structure("", 8, [("b", word, 0), ("", made.add("CONST", "", deep), 0)], "UNION")
    made.structure("page", 20, [("a", word, 0), ("", union, 64), ("e", word, 128)])
    found = layout(made, "page", "a", "b", "c", "d", "e")
    assert found is not None
    assert {name: m.offset for name, m in found.members.items()} == {"a": 0, "b": 8, "c": 8, "d": 12, "e": 16}


def test_bitfields_are_left_out() -> None:
    made = MadeBtf()
    word, three = made.integer("unsigned int", 4), made.integer("unsigned int", 4, bits=3)
    late = made.integer("unsigned int", 4, bits=32, offset=8)
    bits = {"bit": 1, "byte": 8}
    made.structure("new", 8, [("bit", word, 0), ("byte", word, 8), ("word", word, 32)], bits=bits)
    made.structure("old", 12, [("three", three, 0), ("odd", word, 3), ("late", late, 32), ("word", word, 64)])
    assert layout(made, "new", "bit", "byte", "word") == Layout(8, {"word": Member(4, 4, 1)})
    assert layout(made, "old", "three", "odd", "late", "word") == Layout(12, {"word": Member(8, 4, 1)})


def test_a_typedef_counts_where_there_is_no_struct_of_the_name() -> None:
    made = MadeBtf()
    word = made.integer("long", 8)
    anonymous = made.structure("", 8, [("counter", word, 0)])
    made.add("TYPEDEF", "atomic_long_t", made.add("TYPEDEF", "atomic64_t", anonymous))
    both = made.structure("both", 16, [("counter", word, 64)])
    made.add("TYPEDEF", "both", anonymous)
    made.add("TYPEDEF", "number", word)
    assert both
    assert layout(made, "atomic_long_t", "counter") == Layout(8, {"counter": Member(0, 8, 1)})
    assert layout(made, "both", "counter") == Layout(16, {"counter": Member(8, 8, 1)})
    assert layout(made, "number") == Layout(8, {})


def test_types_of_one_name_count_only_where_they_agree() -> None:
    made = MadeBtf()
    word = made.integer("long", 8)
    for name, at in (("same", 0), ("same", 0), ("different", 0), ("different", 64)):
        made.structure(name, 16, [("x", word, at)])
    made.enum("twice", {"A": 1})
    made.enum("twice", {"A": 2})
    assert layout(made, "same", "x") == Layout(16, {"x": Member(0, 8, 1)})
    assert layout(made, "different", "x") is None
    assert layout(made, "different") == Layout(16, {})
    assert enum(made, "twice") is None


def test_enumerators_have_their_values_and_signs() -> None:
    made = MadeBtf()
    made.enum("pagetype", {"PGTY_buddy": 0xF0, "PGTY_high": 0xF0000000})
    made.enum("signed", {"MINUS": -1, "PLUS": 5}, signed=True)
    made.enum64("wide", {"BIG": 1 << 40, "HIGH": 1 << 63})
    made.enum64("wide_signed", {"MINUS": -(1 << 40), "PLUS": 1 << 40}, signed=True)
    assert enum(made, "pagetype") == {"PGTY_buddy": 0xF0, "PGTY_high": 0xF0000000}
    assert enum(made, "signed") == {"MINUS": -1, "PLUS": 5}
    assert enum(made, "wide") == {"BIG": 1 << 40, "HIGH": 1 << 63}
    assert enum(made, "wide_signed") == {"MINUS": -(1 << 40), "PLUS": 1 << 40}
    assert enum(made, "nothing") is None
    assert layout(made, "pagetype") is None


def test_a_section_of_thousands_of_types_is_read_in_pieces_and_only_once() -> None:
    made = MadeBtf()
    for i in range(4000):
        made.one_of_each_kind()
        made.add("FWD", f"filler_{i:x}" + "y" * (i % 50), 0)
    long = made.integer("unsigned long", 8)
    made.structure("resource", 64, [("start", long, 0), ("end", long, 64)])
    data = made.section()
    reads: list[int] = []

    def read(offset: int, size: int) -> bytes:
        reads.append(size)
        return of_bytes(data)(offset, size)

    found = layouts(read, len(data), {"resource": ("start", "end")})
    assert found == {"resource": Layout(64, {"start": Member(0, 8, 1), "end": Member(8, 8, 1)})}
    assert len(data) > 1 << 20
    assert max(reads) <= 1 << 16
    assert sum(reads) < len(data) + (1 << 16)


names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_struct_is_laid_out_as_its_compiler_did_wherever_it_stands(data: st.DataObject) -> None:
    """Random structs with anonymous ones in them, between random other types; offsets worked out as they are made."""
    made = MadeBtf()
    sizes = {made.integer(f"int{size}", size): size for size in (1, 2, 4, 8)}
    expected: dict[str, dict[str, Member]] = {}

    def noise() -> None:
        for _ in range(data.draw(st.integers(0, 3))):
            made.one_of_each_kind()

    def fill(base: int, depth: int, flat: dict[str, Member]) -> tuple[list[tuple[str, int, int]], int]:
        at = 0
        members: list[tuple[str, int, int]] = []
        for _ in range(data.draw(st.integers(1, 5))):
            at += data.draw(st.integers(0, 9))
            if depth < 3 and data.draw(st.booleans()):
                inner, size = fill(base + at, depth + 1, flat)
                noise()
                members.append(("", made.structure("", size, inner), at * 8))
                at += size
            else:
                of = data.draw(st.sampled_from(sorted(sizes)))
                name = f"m{len(flat)}"
                flat[name] = Member(base + at, sizes[of], 1)
                members.append((name, of, at * 8))
                at += sizes[of]
        return members, at

    for name in data.draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        noise()
        flat: dict[str, Member] = {}
        members, size = fill(0, 0, flat)
        made.structure(f"s_{name}", size, members)
        expected[f"s_{name}"] = flat
    section = made.section()
    found = layouts(of_bytes(section), len(section), {name: tuple(flat) for name, flat in expected.items()})
    assert {name: one.members for name, one in found.items()} == expected


def circle_of_typedefs(made: MadeBtf) -> None:
    made.add("TYPEDEF", "victim", made.count + 2)
    made.add("CONST", "", made.count)


def struct_in_itself(made: MadeBtf) -> None:
    made.structure("victim", 8, [("", made.count + 1, 0), ("x", 1, 0)])


def array_of_itself(made: MadeBtf) -> None:
    here = made.array(made.count + 1, 2)
    made.structure("victim", 8, [("x", here, 0)])


def type_that_is_not_there(made: MadeBtf) -> None:
    made.structure("victim", 8, [("x", 1 << 31, 0), ("", 77777, 0)])


@pytest.mark.parametrize(
    "make", [circle_of_typedefs, struct_in_itself, array_of_itself, type_that_is_not_there], ids=lambda f: f.__name__
)
def test_types_that_never_end_do(make: Callable[[MadeBtf], None]) -> None:
    made = MadeBtf()
    made.integer("int", 4)
    make(made)
    found = layout(made, "victim", "x")
    assert found is None or found.members.get("x") in (None, Member(0, 4, 1), Member(0, 0, 1), Member(0, 0, 1 << 32))


def good() -> bytearray:
    made = MadeBtf()
    made.one_of_each_kind()
    made.structure("victim", 8, [("x", 1, 0)])
    return bytearray(made.section())


def patched(offset: int, form: str, value: int) -> bytearray:
    data = good()
    struct.pack_into("=" + form, data, offset, value)
    return data


BAD = {
    "magic 0x9feb and version 1 where": patched(0, "H", 0x9FEB),  # of the other byte order
    "magic 0xeb9f and version 2 where": patched(2, "B", 2),
    "header of 0x17": patched(4, "I", 23),
    "types at 0x0\\+0xffffffff": patched(12, "I", 0xFFFFFFFF),
    "strings at 0xffffffff": patched(16, "I", 0xFFFFFFFF),
    "type 1 at 0x0 is of no known kind": patched(24 + 4, "I", 31 << 24),
    "type 2 at 0x10 is of no known kind": patched(24 + 16 + 4, "I", 0),
    r"type \d+ does not end with the types": patched(12, "I", len(MadeBtf().section()) + 40),
    "string at 0x0 has no end within 1 bytes": struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 0, 0, 1) + b"x",
    "BTF of 20 bytes, expected 24": good()[:20],
}


@pytest.mark.parametrize("why", BAD)
def test_what_is_no_btf_is_told_in_one_line(why: str) -> None:
    data = bytes(BAD[why])
    with pytest.raises(WitnessError, match=why) as error:
        layouts(of_bytes(data), len(data), {"victim": ("x",)})
    assert "\n" not in str(error.value)


def test_a_cut_section_is_no_btf() -> None:
    data = bytes(good())
    for size in range(len(data)):
        with pytest.raises(WitnessError):
            layouts(of_bytes(data[:size]), size, {"victim": ("x",)})


def test_an_error_of_the_reader_comes_through() -> None:
    data = bytes(good())

    def read(offset: int, size: int) -> bytes:
        if offset:
            raise WitnessError("not mapped")
        return data[:size]

    with pytest.raises(WitnessError, match="not mapped"):
        layouts(read, len(data), {"victim": ("x",)})


def types_with_a_last_one_to_find() -> tuple[MadeBtf, int]:
    """More types than the index has one entry for, and where the record of its second one is."""
    made = MadeBtf()
    for number in range(35):
        made.integer(f"int_{number}", 4)
    made.structure("page", 64, [("flags", 35, 0)])
    return made, 32 * 16


@pytest.mark.parametrize("vlen", [5, 60000], ids=["up to the end", "beyond the end"])
def test_types_that_change_between_two_passes_are_told_and_not_gone_through_for_ever(vlen: int) -> None:
    made, at = types_with_a_last_one_to_find()
    data = bytearray(made.section())
    btf = Btf(lambda offset, size: of_bytes(bytes(data))(offset, size), len(data), ["page"])
    assert len(made.types) - at == 12 + 12 * 5
    struct.pack_into("=I", data, 24 + at + 4, 4 << 24 | vlen)  # now a structure, and large
    with pytest.raises(WitnessError, match=r"BTF: types at .* are not what they were a moment ago"):
        btf.layout("page", ["flags"])


def test_type_that_is_called_otherwise_when_it_is_read_again_is_told() -> None:
    made, _ = types_with_a_last_one_to_find()
    data = made.section()
    passed = 0

    def read(offset: int, size: int) -> bytes:
        nonlocal passed
        piece = of_bytes(data)(offset, size)
        if size == 12:
            passed += 1
            return b"\x07" + piece[1:]
        return piece

    with pytest.raises(WitnessError, match=r"BTF: types at .* are not what they were a moment ago"):
        Btf(read, len(data), ["page"])
    assert passed == 1
