# SPDX-License-Identifier: LGPL-2.1-or-later
"""The notes of a dump: those of the kernel's own header, in its order, and what the dead kernel's records add."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from capture.dump import Dump, build
from capture.image_machine import ImageMachine
from capture.recorded import load
from guard.physmem import ExactMemory
from tests.image.machines import BOOT, CRASH, MIB, OWN, VMCOREINFO_AT, RecordedKernel, minus, oldmem, phdrs_of
from tests.image.machines import vmcore_header as header_of
from tests.unit.test_notes import XEN, cpu_note, device_dump, prepared
from tests.unit.witness_memory import vmcoreinfo_note

HEADER_AT = OWN[1][1]
"""What the recorded command line says."""
LOADS = minus(BOOT, [(0, MIB), CRASH])
FW_CFG_NOTE = "sys/firmware/qemu_fw_cfg/by_name/etc/vmcoreinfo/raw"
FOREIGN = [device_dump(8192), device_dump(4096, b"ixgbe")]


class Made(NamedTuple):
    folder: Path
    notes: list[bytes]  # of the kernel's own header


def made(
    folder: Path,
    machine: RecordedKernel,
    foreign: bool = True,
    known: int = 2,
    header: bool = True,
    damage: bool = False,
    renamed: bool = False,
) -> Made:
    """A machine of two CPUs whose kernel has a /proc/vmcore with notes, and nothing else tells where VMCOREINFO is.
    *known*: CPUs that its header has; *header*: the one that it was booted with can be read; *damage*: of VMCOREINFO in
    memory; *renamed*: page.compound_head is called compound_info."""
    machine.notes = [cpu_note(1), cpu_note(2)]
    desc = machine.finish_kernel()
    if renamed:
        desc = desc.replace(b"page.compound_head", b"page.compound_info")
        machine.put_note(desc)
    info = vmcoreinfo_note(desc)[:-12]
    del machine.files[FW_CFG_NOTE]
    notes = [*map(cpu_note, range(1, known + 1)), *([XEN] if foreign else []), info]
    mem = machine.kernel.mem
    xen_at = 0x11800000
    mem.write(xen_at, XEN + bytes(12))
    pages = {bytes(page[:356]): number * 4096 for number, page in mem.pages.items()}
    at = [(pages[cpu_note(cpu)], 368) for cpu in range(1, known + 1)]
    at += [(xen_at, 500)] if foreign else []
    if header:
        mem.write(HEADER_AT, prepared([(4, paddr, size) for paddr, size in [*at, (VMCOREINFO_AT, 4132)]]))
    if damage:
        mem.write(VMCOREINFO_AT + 12, b"XXXX")
    notes = [*(FOREIGN if foreign else []), *notes]
    machine.put("proc/vmcore", header_of(LOADS, b"".join(notes)))
    return Made(machine.write(folder), notes)


def notes_of(path: Path) -> bytes:
    data = path.read_bytes()
    (head,) = [p for p in phdrs_of(data) if p.type == 4]
    return data[head.offset : head.offset + head.filesz]


def header(folder: Path, *arguments: str | Path, status: int = 0) -> tuple[bytes, list[str]]:
    out = folder / "header"
    result = oldmem("header", "-v", "--machine", folder, "-o", out, *arguments)
    assert result.status == status, result.lines
    lines = [
        line.removeprefix("oldmem: ") for line in result.lines if not re.search(r"memory read from|: absent$", line)
    ]
    return notes_of(out), lines


def opened(folder: Path) -> Dump:
    return build(ImageMachine(load(str(folder))))


@pytest.mark.parametrize("layout", ["cut", "kernel"])
def test_every_note_of_the_kernels_own_header_is_carried_over_in_its_order(layout: str, tmp_path: Path) -> None:
    machine = made(tmp_path, RecordedKernel())
    assert header(tmp_path, "--layout", layout) == (b"".join(machine.notes), [])


def test_notes_of_old_memory_keep_their_place_and_device_dumps_are_one_copy(tmp_path: Path) -> None:
    made(tmp_path, RecordedKernel())
    dump = opened(tmp_path)
    assert dump.shape is not None
    paddrs = [note.paddr for note in dump.shape.notes]
    assert paddrs[:2] == [None, None]
    assert None not in paddrs[2:]
    assert paddrs[-1] == VMCOREINFO_AT
    for note in dump.shape.notes:
        assert isinstance(note.data, memoryview)
        assert note.data.obj is dump.core.header
    dump.close()


def test_damaged_note_in_memory_is_served_as_the_kernel_read_it_and_so_are_the_dead_kernels_records(
    tmp_path: Path,
) -> None:
    machine = made(tmp_path, RecordedKernel(), damage=True)
    assert header(tmp_path)[0] == b"".join(machine.notes)
    dump = opened(tmp_path)
    assert dump.arch.dead is not None
    assert dump.arch.system_ram
    dump.close()


def test_without_the_prepared_header_the_contents_are_enough_and_records_tell_their_places(tmp_path: Path) -> None:
    machine = made(tmp_path, RecordedKernel(), header=False)
    found, lines = header(tmp_path)
    assert found == b"".join(machine.notes)
    (line,) = lines
    assert line == "note: prepared header at 0x6bff0000: offset 0x0: no ELF magic; where notes lie is not known from it"
    dump = opened(tmp_path)
    assert dump.shape is not None
    assert [note.paddr is None for note in dump.shape.notes] == [True, True, False, False, True, True]
    dump.close()


def test_cpu_that_came_after_the_crash_kernel_was_loaded_has_its_note_among_the_cpus(tmp_path: Path) -> None:
    made(tmp_path, RecordedKernel(), known=1)
    found, (line,) = header(tmp_path)
    expected = [*FOREIGN, cpu_note(1), cpu_note(2), XEN]
    assert found.startswith(b"".join(expected))
    assert line == "note: CPU 1: its note is not in /proc/vmcore; it is added"


def test_damaged_notes_of_the_kernels_file_are_one_line_and_what_they_lose_comes_from_the_records(
    tmp_path: Path,
) -> None:
    machine = RecordedKernel()
    made(tmp_path, machine, header=False)
    data = bytearray(machine.files["proc/vmcore"])
    at = data.index(cpu_note(2))
    struct.pack_into("<I", data, at + 4, 0xFFFFFF00)
    (tmp_path / "root/proc/vmcore").write_bytes(data)
    found, lines = header(tmp_path)
    assert found.startswith(b"".join([*FOREIGN, cpu_note(1), cpu_note(2)]))
    assert found.find(b"VMCOREINFO\0") >= 0
    assert lines[0].startswith("warning: notes of /proc/vmcore: no note that fits at byte 0x3164; ")
    assert "found by searching" in lines[1]


def test_prepared_header_alone_leads_to_all_notes_where_the_kernel_made_no_file(tmp_path: Path) -> None:
    machine = RecordedKernel()
    notes = made(tmp_path, machine).notes
    (tmp_path / "root/proc/vmcore").unlink()
    assert header(tmp_path) == (b"".join(notes[2:]), [])


# searching


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    read = ExactMemory.read

    def counting(self: ExactMemory, paddr: int, size: int) -> bytes:
        sizes.append(size)
        return read(self, paddr, size)

    monkeypatch.setattr(ExactMemory, "read", counting)
    return sizes


@pytest.mark.parametrize("prepared_header", [True, False])
def test_nothing_is_searched_where_the_kernels_own_header_tells(
    prepared_header: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, RecordedKernel(), header=prepared_header)
    sizes = counted(monkeypatch)
    opened(tmp_path).close()
    without_hint = sum(sizes)
    document = json.loads((tmp_path / "machine.json").read_text())
    (tmp_path / "machine.json").write_text(json.dumps(document | {"vmcoreinfo_paddr": VMCOREINFO_AT}))
    (tmp_path / "root/proc/vmcore").unlink()
    (tmp_path / "root/proc/cmdline").unlink()
    sizes.clear()
    opened(tmp_path).close()
    assert 0 < without_hint < sum(sizes) + 64 * 1024, "more than where the address is told"


def bare(folder: Path, machine: RecordedKernel) -> Path:
    """Nothing tells where VMCOREINFO is."""
    machine.finish_kernel()
    del machine.files[FW_CFG_NOTE]
    return machine.write(folder)


def test_search_ends_at_the_first_note_that_proves_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare(tmp_path, RecordedKernel())
    sizes = counted(monkeypatch)
    dump = opened(tmp_path)
    assert dump.arch.info is not None
    assert dump.arch.info.paddr == VMCOREINFO_AT
    (line,) = [line for line in dump.problems if "searching" in line]
    assert re.search(r"at 0x11000000 \(it proves itself\)", line)
    # of 6 GiB: it lies low, where there is RAM above 4 GiB
    assert sum(sizes) < 6 << 30
    dump.close()


def test_earlier_boots_note_is_not_taken_for_it_crashed_as_it_may_have(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.shrink()
    desc = machine.finish_kernel()
    earlier = desc.replace(b"CRASHTIME=1760000000", b"CRASHTIME=1790000000").replace(b"6.12.0-test", b"6.12.0-rest")
    machine.kernel.mem.write(0x10001000, vmcoreinfo_note(earlier))
    del machine.files[FW_CFG_NOTE]
    result = oldmem("header", "--machine", machine.write(tmp_path), "-o", tmp_path / "header")
    assert "found by searching at 0x11000000 (it proves itself)" in result.warnings[0]
    assert desc in notes_of(tmp_path / "header")


def test_search_time_is_the_users(tmp_path: Path) -> None:
    bare(tmp_path, RecordedKernel())
    _, lines = header(tmp_path, "--search-time", "0", status=4)
    assert lines[0] == (
        "warning: nothing tells where the VMCOREINFO note is, and memory is not searched for it: no notes, no symbols"
    )
    _, lines = header(tmp_path, "--search-time", "0.000001", status=4)
    assert "the time for it was over (--search-time)" in lines[0]
    assert oldmem("header", "--machine", tmp_path, "-o", tmp_path / "h", "--search-time", "-1").status == 2
    assert oldmem("header", "--machine", tmp_path, "-o", tmp_path / "h", "--search-time", "nan").status == 2


def test_address_of_a_kernel_before_is_told_and_the_headers_note_used(tmp_path: Path) -> None:
    machine = RecordedKernel()
    stale = struct.pack("<HHIQ", 0, 1, 0x1024, 0x11400000)
    machine.kernel.mem.write(0x11400000, vmcoreinfo_note(b"OSRELEASE=6.11.0\nPAGESIZE=4096\n"))
    notes = made(tmp_path, machine).notes
    path = tmp_path / "root" / FW_CFG_NOTE
    path.parent.mkdir()
    path.write_bytes(stale)
    found, (line,) = header(tmp_path)
    assert found == b"".join(notes)
    assert line == (
        "warning: VMCOREINFO note at 0x11400000, where it was said to be, is not the note of /proc/vmcore, which "
        "proves itself and is used"
    )


# older collectors


def test_old_name_of_a_renamed_key_is_added_where_the_header_is_ours_and_told(tmp_path: Path) -> None:
    notes = made(tmp_path, RecordedKernel(), renamed=True).notes
    found, lines = header(tmp_path)
    assert lines == ["note: VMCOREINFO is served with OFFSET(page.compound_head)=8 added, for makedumpfile up to 1.7.9"]
    assert found.startswith(b"".join(notes[:-1]))
    (size,) = struct.unpack_from("<4xI", found, len(b"".join(notes[:-1])))
    text = found[-((size + 3) & -4) :][:size]
    assert text == notes[-1][24:].rstrip(b"\0") + b"OFFSET(page.compound_head)=8\n"
    assert b"OFFSET(page.compound_info)=8\n" in text
    report = json.loads(oldmem("map", "--json", "--machine", tmp_path).out)
    assert report["compatibility"] == [{"line": "OFFSET(page.compound_head)=8", "for": "makedumpfile up to 1.7.9"}]
    dump = opened(tmp_path)
    assert dump.shape is not None
    assert dump.shape.notes[-1].paddr is None, "stage 2 has to bring it along"
    assert dump.arch.info is not None
    assert b"compound_head" not in dump.arch.info.desc
    dump.close()


@pytest.mark.parametrize(
    "arguments", [["--no-compatibility"], ["--layout", "kernel"], ["--mode", "preloaded"]], ids=lambda a: a[-1]
)
def test_nothing_is_added_to_the_kernels_own_header_or_where_it_is_not_wanted(
    arguments: list[str], tmp_path: Path
) -> None:
    notes = made(tmp_path, RecordedKernel(), renamed=True).notes
    found, lines = header(tmp_path, *arguments)
    assert found == b"".join(notes)
    assert lines == []
