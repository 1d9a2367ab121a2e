# SPDX-License-Identifier: LGPL-2.1-or-later
"""`oldmem check`: a good vmcore passes, and each thing that a collector would stumble over is told."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import cli, elfcore
from capture.check import Checked, check
from capture.elfcore import Load
from guard.errors import Error
from tests.unit.witness_memory import PRSTATUS, elf_note

PAGE = 4096
VMCOREINFO = elf_note(b"VMCOREINFO\0", 0, b"OSRELEASE=6.12.0-test\nPAGESIZE=4096\n")
KERNEL_TEXT = Load(0x100000, 0xFFFFFFFF81000000, 0x2000)
RAM = [Load(0x100000, 0xFFFF888000100000, 0x8000), Load(0x200800, 0xFFFF888000200800, 0x3000)]


def vmcore(notes: bytes = PRSTATUS * 2 + VMCOREINFO, loads: list[Load] | None = None) -> bytes:
    core = elfcore.build(62, notes, [KERNEL_TEXT, *RAM] if loads is None else loads, 4)
    return core.header + bytes(core.size - len(core.header))


def write(folder: Path, data: bytes) -> str:
    (folder / "vmcore").write_bytes(data)
    return str(folder / "vmcore")


def patch(at: int, form: str, *values: object) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        changed = bytearray(data)
        struct.pack_into(form, changed, at, *values)
        return bytes(changed)

    return apply


def phdr(number: int, field: int) -> int:
    return 64 + 56 * number + field


TYPE, OFFSET, PADDR, FILESZ, MEMSZ = 0, 8, 24, 32, 40


def test_good_vmcore_has_nothing_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, vmcore())
    assert check(path) == Checked([], ["3 PT_LOAD, 0 MiB of RAM", "2 NT_PRSTATUS, VMCOREINFO of 6.12.0-test"])
    assert cli.run(["check", path]) == 0
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data[:-PAGE], r"program header 3: data ends at 0x\w+, the file at 0x\w+"),
        (lambda data: data[: 5 * PAGE], r"program header 2: data ends at"),
        (patch(phdr(1, TYPE), "<I", 4), r"2 PT_NOTE, expected one, as program header 0"),
        (patch(phdr(0, TYPE), "<I", 0), r"0 PT_NOTE, expected one, as program header 0"),
        (patch(phdr(2, OFFSET), "<Q", 0), r"program header 2: p_offset 0 means 'not in the file'"),
        (
            patch(phdr(2, OFFSET), "<Q", 0x2010),
            r"program header 2: p_offset 0x2010 and p_paddr 0x100000 differ in page",
        ),
        (patch(phdr(3, PADDR), "<Q", 0x104800), r"PT_LOADs overlap at 0x104800"),
        (patch(phdr(3, OFFSET), "<Q", 0x4800), r"program headers 2 and 3 share the file from 0x4800 on"),
        (patch(phdr(2, FILESZ), "<Q", 1 << 62), r"program header 2: data ends at"),
        (patch(phdr(2, MEMSZ), "<Q", 0x7000), r"program header 2: p_filesz 0x8000 is more than p_memsz 0x7000"),
        (lambda _: vmcore(PRSTATUS), "no VMCOREINFO note"),
        (lambda _: vmcore(VMCOREINFO), "no NT_PRSTATUS note"),
        (lambda _: vmcore(loads=[]), "no PT_LOAD: the file has no memory"),
    ],
)
def test_each_corruption_is_told_and_the_status_is_1(
    spoil: Callable[[bytes], bytes], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, spoil(vmcore()))
    wrong = check(path).wrong
    assert [line for line in wrong if re.search(told, line)]
    assert cli.run(["check", path]) == 1
    assert f"{path}: WRONG: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda _: b"", "ends within the ELF header|Magic number"),
        (lambda data: data[:10], "."),
        (lambda data: data[:63], "."),
        (lambda data: data[:100], "."),
        (lambda _: b"QFI\xfb" + bytes(4096), r"Magic number does not match \(a qcow2 disk image: "),
        (patch(16, "<H", 2), "e_type is ET_EXEC, expected ET_CORE"),
        (patch(4, "B", 9), "."),
        (patch(32, "<Q", 1 << 63), "."),
        (patch(32, "<Q", (1 << 64) - 1), "."),
        (patch(54, "<H", 0), "."),
        (patch(phdr(0, OFFSET), "<Q", (1 << 64) - 1), "."),
        (patch(phdr(0, FILESZ), "<Q", 1 << 62), "."),
    ],
)
def test_what_is_no_core_at_all_or_breaks_its_reader_is_one_line(
    spoil: Callable[[bytes], bytes], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, spoil(vmcore()))
    assert cli.run(["check", path]) == 1
    out, err = capsys.readouterr()
    lines = (out + err).splitlines()
    assert all(line.startswith((f"oldmem: {path}: ", f"{path}: ")) for line in lines)
    assert [line for line in lines if re.search(told, line)]
    assert err.count("\n") <= 1


@pytest.mark.parametrize(("name", "why"), [("nothing", "No such file or directory"), ("", "Is a directory")])
def test_file_that_cannot_be_read_is_one_line_without_repeating_itself(
    name: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / name)
    assert cli.run(["check", path]) == 1
    assert capsys.readouterr().err == f"oldmem: {path}: {why}\n"


def test_core_with_as_many_program_headers_as_16_bits_count_passes(tmp_path: Path) -> None:
    loads = [Load(n * 0x2000, n * 0x2000, 0x10) for n in range(1, 65_534)]
    core = elfcore.build(62, PRSTATUS + VMCOREINFO, loads, 4)
    path = tmp_path / "vmcore"
    with path.open("wb") as stream:
        stream.write(core.header)
        stream.truncate(core.size)
    assert check(str(path)) == Checked([], ["65533 PT_LOAD, 0 MiB of RAM", "1 NT_PRSTATUS, VMCOREINFO of 6.12.0-test"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3 * PAGE), st.binary(min_size=1, max_size=9)), min_size=1, max_size=5))
def test_no_damage_makes_it_raise_anything_but_its_own_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(vmcore())
    for at, change in changes:
        at %= phdr(4, 0) if at % 2 else 2 * PAGE
        data[at : at + len(change)] = change
    path = write(tmp_path_factory.getbasetemp(), bytes(data))
    try:
        wrong, has, _ = check(path)
    except Error as e:
        wrong, has = [str(e)], []
    assert all("\n" not in line for line in (*wrong, *has))


def filtered(loads: list[tuple[int, int, int, int]], distance: int = 0x960) -> bytes:
    """An ELF core as makedumpfile -E writes it: behind the notes each (vaddr, paddr, filesz, memsz), without the pages
    at its end that were left out, all of them *distance* bytes off whole pages."""
    notes = PRSTATUS + VMCOREINFO
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(loads) + 1, 0, 0, 0)
    at = 64 + 56 * (len(loads) + 1)
    head += struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(notes), len(notes), 4)
    start = (at + len(notes) + PAGE) // PAGE * PAGE + distance
    data = b""
    for vaddr, paddr, filesz, memsz in loads:
        head += struct.pack("<IIQQQQQQ", 1, 7, start + len(data) if filesz else 0, vaddr, paddr, filesz, memsz, 0)
        data += b"x" * filesz
    return (head + notes).ljust(start, b"\0") + data


MAP = 0xFFFF888000000000
LEFT_OUT = [
    (0xFFFFFFFF81000000, 0x100000, 0x2000, 0x3000),  # kernel text, in pieces
    (0xFFFFFFFF81003000, 0x103000, 0x1000, 0x1000),
    (MAP + 0x100000, 0x100000, 0x2000, 0x5000),
    (MAP + 0x105000, 0x105000, 0, 0x9000),
    (MAP + 0x10E000, 0x10E000, 0x4000, 0x4000),
]


def test_pages_that_makedumpfile_left_out_are_nothing_wrong(tmp_path: Path) -> None:
    wrong, has, kinds = check(write(tmp_path, filtered(LEFT_OUT)))
    assert (wrong, kinds) == ([], ())
    assert "pages of 0 MiB were left out (p_filesz below p_memsz), as makedumpfile -E does" in has
    assert "memory is not at whole pages of the file: it can be read, but not mapped" in has


@pytest.mark.parametrize(
    ("loads", "told"),
    [
        ([*LEFT_OUT[:4], (MAP + 0x10D000, 0x10D000, 0x4000, 0x4000)], "PT_LOADs overlap at 0x10d000"),
        ([*LEFT_OUT[:1], (0xFFFFFFFF81002000, 0x102000, 0, 0x1000), *LEFT_OUT[2:]], "PT_LOADs overlap at 0x102000"),
        ([*LEFT_OUT[:4], (MAP + 0x10E010, 0x10E010, 0x4000, 0x4000)], "program header 5: .* differ in page"),
    ],
)
def test_damage_of_a_filtered_file_is_told(tmp_path: Path, loads: list[tuple[int, int, int, int]], told: str) -> None:
    wrong = check(write(tmp_path, filtered(loads))).wrong
    assert len([line for line in wrong if re.search(told, line)]) == 1


def test_filtered_file_that_was_cut_off_is_told(tmp_path: Path) -> None:
    wrong = check(write(tmp_path, filtered(LEFT_OUT)[:-1])).wrong
    assert len(wrong) == 1
    assert re.match(r"program header 5: data ends at", wrong[0])
