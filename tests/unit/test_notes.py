# SPDX-License-Identifier: LGPL-2.1-or-later
"""The notes of the kernel's own header: telling them apart, where old memory has them, and what the dead kernel's
records add to them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import notes
from capture.arch import Note
from capture.notes import ElfNote, Listed, parse
from guard.errors import SourceError
from guard.witness.crash_notes import CpuNotes
from guard.witness.memory import Problems
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.unit.witness_memory import PAGE, PRSTATUS, FakeMemory, elf_note, vmcoreinfo_note

INFO = vmcoreinfo_note(b"OSRELEASE=6.12.0-test\nCRASHTIME=1760000000\n")[:-12]
XEN = elf_note(b"VMCOREINFO_XEN\0", 0, b"XEN=4.17\n")


def device_dump(size: int, name: bytes = b"cxgb4_0000:02") -> bytes:
    """As vmcoredd_write_header() makes it: *size* bytes in all."""
    return struct.pack("<III", 8, size - 20, 0x700) + b"LINUX\0\0\0" + name.ljust(44, b"\0") + b"D" * (size - 64)


def cpu_note(pid: int) -> bytes:
    return elf_note(b"CORE\0", 1, bytes(32) + struct.pack("<I", pid) + bytes(300))


def parsed(data: bytes) -> list[ElfNote]:
    problems = Problems()
    found = parse(data, "notes", problems)
    assert problems == []
    return found


def data_of(found: Sequence[ElfNote]) -> list[bytes]:
    return [bytes(note.data) for note in found]


any_note = st.one_of(
    st.builds(elf_note, st.binary(min_size=1, max_size=70), st.integers(0, (1 << 32) - 1), st.binary(max_size=400)),
    st.integers(1, 3).map(lambda pages: device_dump(pages * PAGE)),
    st.sampled_from([PRSTATUS, INFO, XEN]),
)


@given(st.lists(any_note, max_size=12))
def test_notes_of_any_kind_come_apart_and_together_again(made: list[bytes]) -> None:
    found = parsed(b"".join(made))
    assert data_of(found) == made
    assert b"".join(note.data for note in notes.joined(found)) == b"".join(made)


@given(st.lists(any_note, max_size=5), st.binary(max_size=200))
def test_damage_leaves_what_is_before_it_and_is_one_line(made: list[bytes], rest: bytes) -> None:
    problems = Problems()
    data = b"".join(made) + struct.pack("<III", 8, 1 << 31, 1) + rest
    assert data_of(parse(data, "notes", problems)) == made
    assert problems == [
        f"notes: no note that fits at byte {len(data) - 12 - len(rest):#x}; {12 + len(rest)} bytes from there on are "
        "left out"
    ]


@given(st.binary(max_size=3000))
def test_any_bytes_can_be_parsed_and_what_is_found_is_how_they_begin(data: bytes) -> None:
    found = b"".join(data_of(parse(data, "notes", Problems())))
    assert data.startswith(found)


def test_kind_name_and_address_of_each_are_told() -> None:
    data = device_dump(PAGE) + PRSTATUS + XEN + INFO
    found = parse(data, "notes", Problems(), 0x5000)
    assert [(n.name, n.kind, n.paddr) for n in found] == [
        (b"LINUX", 0x700, 0x5000),
        (b"CORE", 1, 0x6000),
        (b"VMCOREINFO_XEN", 0, 0x6000 + len(PRSTATUS)),
        (b"VMCOREINFO", 0, 0x6000 + len(PRSTATUS + XEN)),
    ]
    assert [n.is_cpu for n in found] == [False, True, False, False]
    assert [n.is_vmcoreinfo for n in found] == [False, False, False, True]


def test_notes_are_views_of_the_one_copy_that_was_read() -> None:
    data = bytearray(device_dump(1 << 20) + INFO)
    (dump, _) = parse(memoryview(data), "notes", Problems())
    data[100] = 0x55
    assert dump.data[100] == 0x55
    with pytest.raises(TypeError):
        dump.data[100] = 1


# the prepared header


def prepared(phdrs: Sequence[tuple[int, int, int]]) -> bytes:
    """(type, address, size) each, as crash_prepare_elf64_headers() writes them."""
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(phdrs), 0, 0, 0)
    return head + b"".join(struct.pack("<IIQQQQQQ", t, 0, at, 0, at, size, size, 0) for t, at, size in phdrs)


HEADER = 0x6BFF0000
A, B, C, D = 0x1A000, 0x1C200, 0x1E400, 0x20600
WHERE = [Listed(A, 368), Listed(B, 368), Listed(C, 4132)]


def test_addresses_of_notes_are_those_of_the_header_that_the_kernel_was_given() -> None:
    mem = FakeMemory()
    mem.write(HEADER, prepared([(4, A, 368), (4, B, 368), (4, C, 4132), (1, 0x100000, 0x1000)]))
    assert notes.listed_by(mem, HEADER) == WHERE


@pytest.mark.parametrize("damage", ["absent", "no ELF", "too many", "sections"])
def test_prepared_header_that_makes_no_sense_is_an_error_of_one_line(damage: str) -> None:
    mem, data = FakeMemory(), bytearray(prepared([(4, A, 368)]))
    if damage == "no ELF":
        data[0] = 0
    elif damage == "too many":
        struct.pack_into("<H", data, 56, 0xFFFE)
    elif damage == "sections":
        struct.pack_into("<H", data, 56, 0xFFFF)
        struct.pack_into("<Q", data, 40, 1 << 62)
    if damage != "absent":
        mem.write(HEADER, bytes(data))
    with pytest.raises(SourceError, match=r"^prepared header at 0x6bff0000: [^\n]+$"):
        FakeReads(mem).check()


class FakeReads:
    """Reads of any size, as guarded memory takes them."""

    def __init__(self, mem: FakeMemory) -> None:
        self.mem = mem

    def read(self, paddr: int, size: int) -> bytes:
        pieces = range(paddr, paddr + size, PAGE)
        return b"".join(self.mem.read(at, min(PAGE, paddr + size - at)) for at in pieces)

    def check(self) -> None:
        notes.listed_by(self, HEADER)


def test_note_is_located_where_old_memory_still_has_its_bytes() -> None:
    mem = FakeMemory()
    mem.write(A, cpu_note(1) + bytes(12))
    mem.write(B, cpu_note(7) + bytes(12))  # changed since
    mem.write(C, INFO + bytes(5000))
    found = notes.located(parsed(device_dump(PAGE) + cpu_note(1) + cpu_note(2) + INFO), WHERE, mem)
    assert [n.paddr for n in found] == [None, A, None, C]


def test_all_notes_of_a_buffer_are_located_or_none_and_make_one_note_of_the_next_header() -> None:
    xen = elf_note(b"Xen\0", 0x1000002, bytes(80))
    mem = FakeMemory()
    mem.write(A, cpu_note(1) + xen + bytes(12))
    mem.write(B, cpu_note(2) + bytes(120))
    found = notes.located(parsed(cpu_note(1) + xen + cpu_note(2) + xen), [Listed(A, 600), Listed(B, 600)], mem)
    assert [n.paddr for n in found] == [A, A + 356, B, None]
    assert [n.paddr for n in notes.joined(found)] == [A, B, None]
    assert bytes(notes.joined(found)[0].data) == cpu_note(1) + xen


def test_two_cpus_with_the_same_note_have_a_place_each() -> None:
    mem = FakeMemory()
    mem.write(A, PRSTATUS + bytes(12))
    mem.write(B, PRSTATUS + bytes(12))
    found = notes.located(parsed(PRSTATUS * 2), [Listed(A, 368), Listed(B, 368)], mem)
    assert [n.paddr for n in found] == [A, B]


def test_note_out_of_the_kernels_order_is_not_located() -> None:
    mem = FakeMemory()
    mem.write(A, cpu_note(1) + bytes(12))
    mem.write(B, cpu_note(2) + bytes(12))
    found = notes.located(parsed(cpu_note(1) + cpu_note(2)), [Listed(B, 368), Listed(A, 368)], mem)
    assert [n.paddr for n in found] == [None, B]


def test_where_the_kernel_made_no_file_the_notes_are_those_that_it_would_have_merged() -> None:
    mem = FakeMemory()
    mem.write(A, cpu_note(1) + bytes(12))
    mem.write(B, bytes(368))
    mem.write(C, INFO + bytes(5000))
    found = notes.of_memory(WHERE, mem, Problems())
    assert [(bytes(n.data), n.paddr) for n in found] == [(cpu_note(1), A), (INFO, C)]


# the dead kernel's records


def records(*pids: int | None) -> list[CpuNotes]:
    """CPUs 0.., at A.., with the note of such a pid; None: it saved none."""
    return [CpuNotes(i, A + 0x2200 * i, b"" if pid is None else cpu_note(pid)) for i, pid in enumerate(pids)]


def complete(data: bytes, cpus: list[CpuNotes], listed: Sequence[Listed] = ()) -> tuple[list[bytes], list[str]]:
    remarks = Problems()
    return data_of(notes.completed(parsed(data), cpus, listed, remarks)), remarks


def test_records_confirm_and_change_nothing() -> None:
    data = device_dump(PAGE) + cpu_note(1) + cpu_note(2) + XEN + INFO
    found, remarks = complete(data, records(1, None, 2))
    assert b"".join(found) == data
    assert remarks == []


def test_records_tell_where_a_note_is_that_the_header_does_not_locate() -> None:
    found = notes.completed(parsed(cpu_note(1) + cpu_note(2) + INFO), records(1, 2), [], Problems())
    assert [n.paddr for n in found] == [A, B, None]


@pytest.mark.parametrize(
    ("kernel", "dead"),
    [((1, 2), (1, 2, 3)), ((2, 3), (1, 2, 3)), ((1, 3), (1, 2, 3)), ((1,), (1, 2, 3, 4)), ((3,), (1, 2, 3, 4))],
)
def test_cpu_that_the_kernels_header_lacks_is_added_in_its_place(
    kernel: tuple[int, ...], dead: tuple[int, ...]
) -> None:
    data = device_dump(PAGE) + b"".join(map(cpu_note, kernel)) + XEN + INFO
    found, remarks = complete(data, records(*dead))
    assert found == [device_dump(PAGE), *map(cpu_note, dead), XEN, INFO]
    assert len(remarks) == len(dead) - len(kernel)
    assert all("is not in /proc/vmcore; it is added" in line for line in remarks)


def test_kernels_copy_counts_where_the_record_is_another_now() -> None:
    found, remarks = complete(cpu_note(1) + cpu_note(2) + cpu_note(3) + INFO, records(1, 99, 3))
    assert found == [cpu_note(1), cpu_note(2), cpu_note(3), INFO]
    assert remarks == ["CPU 1: its note in memory is not what this kernel read at boot, which is kept"]


def test_addresses_tell_a_new_cpu_from_one_whose_record_has_changed() -> None:
    # CPU 1 is new, CPU 2 has changed: by their bytes alone it might be the other way round
    listed = [Listed(A, 368), Listed(C, 368)]
    found, remarks = complete(cpu_note(1) + cpu_note(3) + INFO, records(1, 2, 99), listed)
    assert found == [cpu_note(1), cpu_note(2), cpu_note(3), INFO]
    assert [line.split(":")[0] for line in remarks] == ["CPU 1", "CPU 2"]


def test_without_a_file_of_the_kernels_the_records_are_all_there_is_and_that_is_not_worth_a_word() -> None:
    found, remarks = complete(b"", records(1, None, 2))
    assert found == [cpu_note(1), cpu_note(2)]
    assert remarks == []


def test_note_of_a_kernel_whose_records_are_lost_stays() -> None:
    assert complete(cpu_note(1) + INFO, []) == ([cpu_note(1), INFO], [])


@given(st.lists(st.integers(0, 5), max_size=6), st.lists(st.integers(0, 5), max_size=6), st.booleans())
def test_nothing_of_the_kernels_is_ever_dropped_or_moved(kernel: list[int], dead: list[int], located: bool) -> None:
    listed = [Listed(A + 0x2200 * i, 368) for i in range(len(kernel))] if located else []
    made = [device_dump(PAGE), *map(cpu_note, kernel), XEN, INFO]
    left, _ = complete(b"".join(made), records(*dead), listed)
    for note in made:
        left = left[left.index(note) + 1 :]


# VMCOREINFO


def test_vmcoreinfo_is_found_among_the_notes_and_xens_is_not_taken_for_it() -> None:
    info = notes.vmcoreinfo(parsed(PRSTATUS + XEN + INFO))
    assert info is not None
    assert (info.note, info.text("OSRELEASE"), info.crash_time) == (INFO, "6.12.0-test", 1760000000)
    assert notes.vmcoreinfo(parsed(PRSTATUS + XEN)) is None


def test_vmcoreinfo_from_elsewhere_takes_the_place_of_the_kernels_or_comes_last() -> None:
    other = Vmcoreinfo(b"OSRELEASE=x\n", vmcoreinfo_note(b"OSRELEASE=x\n")[:-12], 0x7000)
    assert data_of(notes.with_vmcoreinfo(parsed(PRSTATUS + INFO + XEN), other)) == [PRSTATUS, other.note, XEN]
    assert data_of(notes.with_vmcoreinfo(parsed(PRSTATUS), other)) == [PRSTATUS, other.note]
    assert data_of(notes.with_vmcoreinfo(parsed(PRSTATUS + INFO), None)) == [PRSTATUS, INFO]


def test_only_neighbours_in_memory_are_joined() -> None:
    found = parse(cpu_note(1) + cpu_note(2), "notes", Problems(), 0x5000) + parsed(INFO)
    assert notes.joined(found) == (Note(cpu_note(1) + cpu_note(2), 0x5000), Note(INFO))
