# SPDX-License-Identifier: LGPL-2.1-or-later
"""The header for the next kernel, against what fs/proc/vmcore.c makes of one (kernel_header.py): the /proc/vmcore that
comes of it must begin as elfcore.build() says, byte for byte."""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import elfcore, elfcorehdr
from capture.arch import Note, Shape
from capture.elfcore import Load
from capture.elfcorehdr import EMPTY_NOTE, Prepared
from guard.errors import Error
from guard.ranges import Range
from tests.unit.kernel_header import vmcore_of
from tests.unit.witness_memory import PAGE, PRSTATUS, FakeMemory, vmcoreinfo_note

HEADER_AT = 0x7F000000
"""Where the header is put; nothing else lies from there on."""
NOTES_AT = 0x1000000


THERE = "there"
GONE = ("unknown", "changed", "not ended", "unreadable")


class Case(NamedTuple):
    shape: Shape
    memory: FakeMemory
    states: list[str]


@st.composite
def elf_notes(draw: st.DrawFn, order: str) -> bytes:
    data = b""
    for _ in range(draw(st.integers(1, 3))):
        name, desc = draw(st.sampled_from([b"CORE\0", b"VMCOREINFO\0", b"x"])), draw(st.binary(max_size=400))
        data += struct.pack(order + "III", len(name), len(desc), draw(st.integers(0, 9)))
        data += name + bytes(-len(name) % 4) + desc + bytes(-len(desc) % 4)
    return data


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A shape with notes, and what old memory has of each."""
    order = draw(st.sampled_from("<>"))
    memory, notes, states = FakeMemory(), [], []
    for i in range(draw(st.integers(1, 5))):
        data = draw(elf_notes(order))
        state = draw(st.one_of(st.just(THERE), st.sampled_from(GONE)))
        paddr = NOTES_AT + i * 0x100000 + 4 * draw(st.integers(0, PAGE // 4 - 1))
        if state != "unreadable":
            # only the name's size of the note behind must be 0
            ended = bytes(4) if state != "not ended" else struct.pack(order + "I", draw(st.integers(1, 1 << 31)))
            memory.write(paddr, data + ended + draw(st.binary(min_size=8, max_size=8)))
        if state == "changed":
            at = paddr + draw(st.integers(0, len(data) - 1))
            memory.write(at, bytes((memory.read(at, 1)[0] ^ 1 << draw(st.integers(0, 7)),)))
        notes.append(Note(data, None if state == "unknown" else paddr))
        states.append(state)
    shape = Shape(draw(st.sampled_from([22, 62])), order, None, 0, tuple(notes), 0, draw(st.sampled_from([0, 4])))
    return Case(shape, memory, states)


any_loads = st.builds(
    lambda text, rest: text + rest,
    st.lists(
        st.builds(Load, st.integers(0, 1 << 46), st.integers(0, (1 << 64) - 1), st.integers(1, 1 << 25), st.just(0)),
        max_size=2,
    ),
    st.lists(
        st.builds(
            lambda pfn, vaddr, pages, align: Load(pfn * PAGE, vaddr, pages * PAGE, align),
            st.integers(0, 1 << 34),
            st.integers(0, (1 << 64) - 1),
            st.integers(1, 1 << 24),
            st.sampled_from([0, 4096]),
        ),
        max_size=80,
    ),
)


@settings(deadline=None)
@given(cases(), any_loads)
def test_kernel_makes_of_it_the_header_that_was_foreseen(case: Case, loads: list[Load]) -> None:
    shape, memory, _ = case
    memory.write(HEADER_AT, elfcorehdr.prepare(shape, memory).build(loads, HEADER_AT))
    foreseen = elfcore.build(shape.machine, shape.merged_notes(), loads, shape.note_align, byteorder=shape.byteorder)
    assert vmcore_of(HEADER_AT, memory, shape.note_align) == foreseen.header


@given(cases())
def test_notes_are_copied_that_old_memory_has_not(case: Case) -> None:
    prepared = elfcorehdr.prepare(case.shape, case.memory)
    pairs = list(zip(case.shape.notes, case.states, strict=True))
    assert prepared.there == tuple(note for note, state in pairs if state == THERE)
    assert copied(prepared) == b"".join(note.data for note, state in pairs if state != THERE)
    assert prepared.left_out == ()


def copied(prepared: Prepared) -> bytes:
    return b"".join(note.data for note in prepared.copied)


def test_device_dump_that_no_kernel_can_read_at_boot_is_left_out_and_all_else_is_served() -> None:
    memory = FakeMemory()
    memory.write(NOTES_AT, PRSTATUS + EMPTY_NOTE)
    dumps = [
        struct.pack("<III", 6, size - 20, 0x700) + b"LINUX\0\0\0" + bytes(size - 20) for size in (3 << 20, 64 << 10)
    ]
    notes = (*map(Note, dumps), Note(PRSTATUS, NOTES_AT), Note(vmcoreinfo_note(b"OSRELEASE=6\n")[:-12]))
    shape = Shape(62, "<", None, 0, notes, 0, 4)
    prepared = elfcorehdr.prepare(shape, memory)
    assert prepared.left_out == notes[:1]
    assert prepared.shape.notes == notes[1:]
    assert len(prepared.build([], HEADER_AT)) < elfcorehdr.MOST_COPIED
    memory.write(HEADER_AT, prepared.build([], HEADER_AT))
    assert vmcore_of(HEADER_AT, memory, 4) == elfcore.build(62, prepared.shape.merged_notes(), [], 4).header


def test_note_whose_end_is_behind_a_page_that_cannot_be_read_is_copied() -> None:
    memory = FakeMemory()
    data = struct.pack("<III", 4, PAGE - 16, 1) + b"abc\0" + bytes(PAGE - 16)
    memory.write(NOTES_AT, data + EMPTY_NOTE)
    shape = Shape(62, "<", None, 0, (Note(data, NOTES_AT),), 0, 4)
    assert copied(elfcorehdr.prepare(shape, memory)) == b""
    memory.drop(NOTES_AT + PAGE)
    assert copied(elfcorehdr.prepare(shape, memory)) == data


def test_note_is_copied_where_not_all_that_the_kernel_reads_behind_it_can_be_read() -> None:
    memory = FakeMemory()
    data = struct.pack("<III", 4, PAGE - 20, 1) + b"abc\0" + bytes(PAGE - 20)
    memory.write(NOTES_AT, data + EMPTY_NOTE)  # the empty note begins four bytes before the border
    shape = Shape(62, "<", None, 0, (Note(data, NOTES_AT),), 0, 4)
    assert copied(elfcorehdr.prepare(shape, memory)) == b""
    memory.drop(NOTES_AT + PAGE)
    assert copied(elfcorehdr.prepare(shape, memory)) == data


@given(cases(), st.integers(0, 60))
def test_size_is_that_of_what_is_built(case: Case, n: int) -> None:
    prepared = elfcorehdr.prepare(case.shape, case.memory)
    loads = [case.shape.load(Range(i * 2 * PAGE, (i * 2 + 1) * PAGE)) for i in range(n)]
    assert len(prepared.build(loads, HEADER_AT)) == prepared.size(n)


@given(cases(), st.integers(-10, 1000), st.integers(-1, 1))
def test_most_is_the_largest_number_of_loads_that_fits(case: Case, n: int, more: int) -> None:
    prepared = elfcorehdr.prepare(case.shape, case.memory)
    room = max(0, prepared.size(n) + more)
    most = prepared.most(room)
    assert prepared.size(most + 1) > room
    assert most < 0 or prepared.size(most) <= room
    assert (most < 0) == (prepared.size(0) > room)


@pytest.mark.parametrize("states", [("there",), ("unknown",), ("there", "unknown"), ("there", "there", "there")])
def test_most_never_is_more_than_either_header_counts(states: tuple[str, ...]) -> None:
    note = struct.pack("<III", 4, 0, 1) + b"abc\0"
    there = tuple(Note(note, NOTES_AT) for state in states if state == THERE)
    unknown = (Note(note),) * ("unknown" in states)
    prepared = Prepared(Shape(62, "<", None, 0, there, 0, 4), (*there, *unknown))
    most = prepared.most(1 << 40)
    loads = [Load(n * PAGE, 0, PAGE) for n in range(most)]
    prepared.build(loads, HEADER_AT)
    elfcore.build(62, note * len(states), loads, 4)
    assert most > 65_500


def test_more_program_headers_than_can_be_counted_are_an_error() -> None:
    note = Note(struct.pack("<III", 4, 0, 1) + b"abc\0", NOTES_AT)
    prepared = Prepared(Shape(62, "<", None, 0, (note,), 0, 4), (note,))
    loads = [Load(n * PAGE, 0, PAGE) for n in range(65_534)]
    assert len(prepared.build(loads[1:], HEADER_AT)) == prepared.size(65_533)
    with pytest.raises(Error, match="65535 program headers where an ELF header counts at most 65534"):
        prepared.build(loads, HEADER_AT)
