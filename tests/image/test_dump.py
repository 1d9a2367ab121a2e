# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole command over a recorded machine: what it says, the header's and the memory's every byte, by readers that
share nothing with the writer."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import drgn
import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from guard.ranges import RangeSet
from guard.witness.resources import EXCLUSIVE, SYSTEM_RAM
from tests.image.conftest import Recorded
from tests.image.machines import (
    BLOCK,
    BOOT,
    CRASH,
    DEVICE,
    GIB,
    HIGH,
    MIB,
    PAGE,
    RAM_TREE,
    READABLE,
    SMALL,
    STALE,
    RecordedKernel,
    assert_memory,
    data_extents,
    minus,
    oldmem,
    phdrs_of,
    plugged_spans,
    vmcore_header,
)
from tests.unit.witness_memory import PRSTATUS, vmcoreinfo_note

PAGE_OFFSET = 0xFFFF9A8040000000
TEXT = (0xFFFFFFFF93000000, 0x2000000, 0x5000000)  # virtual, physical, size: as DyingKernel has it
NONE_LOST = "oldmem: saving vmcore complete"


def loads(path: Path) -> list[tuple[int, int, int]]:
    with path.open("rb") as stream:
        return [(p.vaddr, p.paddr, p.memsz) for p in phdrs_of(stream.read(32 << 20)) if p.type == 1]


@pytest.fixture(scope="module")
def saved(image_machine: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "vmcore"
    result = oldmem("save", "--machine", image_machine.folder, "-o", out)
    assert result.status == 0, result.lines
    assert result.warnings == []
    assert result.lines[-1] == NONE_LOST
    return out


def test_cut_layout_is_boot_ram_without_the_capture_kernel_and_exactly_the_plugged_blocks(saved: Path) -> None:
    assert loads(saved) == [TEXT, *((PAGE_OFFSET + a, a, b - a) for a, b in READABLE)]


def test_every_byte_of_the_saved_memory_is_the_images_or_zero(saved: Path, image_machine: Recorded) -> None:
    assert_memory(saved, image_machine.pages, READABLE)


def test_poison_of_unplugged_blocks_is_nowhere_in_the_dump(saved: Path) -> None:
    assert b"POISON!!" not in b"".join(pieces(saved))


def pieces(path: Path) -> list[bytes]:
    with path.open("rb") as stream:
        found = []
        for start, end in data_extents(path, path.stat().st_size):
            stream.seek(start)
            found.append(stream.read(end - start))
        return found


def test_saved_dump_takes_no_more_room_than_what_is_not_zero(saved: Path, image_machine: Recorded) -> None:
    assert saved.stat().st_size > 6 * GIB
    assert saved.stat().st_blocks * 512 < 3 * len(image_machine.pages) * PAGE


def test_header_alone_is_how_the_saved_dump_starts(saved: Path, image_machine: Recorded, tmp_path: Path) -> None:
    result = oldmem("header", "--machine", image_machine.folder, "-o", tmp_path / "header")
    assert (result.status, result.lines) == (0, [])
    header = (tmp_path / "header").read_bytes()
    with saved.open("rb") as stream:
        assert stream.read(len(header)) == header
    assert len(header) == min(p.offset for p in phdrs_of(header) if p.type == 1)


def test_kernel_layout_is_what_kexec_file_load_would_have_written(image_machine: Recorded, tmp_path: Path) -> None:
    """From the resource tree at the time of the crash: each System RAM resource by itself, no cut by the device."""
    out = tmp_path / "vmcore"
    result = oldmem("save", "--machine", image_machine.folder, "--layout", "kernel", "-o", out)
    assert (result.status, result.warnings) == (0, [])
    ram = minus([*BOOT, DEVICE], [(0, MIB), CRASH])
    assert loads(out) == [TEXT, *((PAGE_OFFSET + a, a, b - a) for a, b in ram)]
    assert_memory(out, image_machine.pages, READABLE)


def test_preloaded_mode_serves_the_kernels_own_header_still_guarded(image_machine: Recorded, tmp_path: Path) -> None:
    out = tmp_path / "vmcore"
    result = oldmem("save", "--machine", image_machine.folder, "--mode", "preloaded", "-o", out)
    assert (result.status, result.warnings) == (0, [])
    preloaded = (image_machine.folder / "root/proc/vmcore").read_bytes()
    with out.open("rb") as stream:
        assert stream.read(len(preloaded)) == preloaded
    assert_memory(out, image_machine.pages, READABLE)


@pytest.mark.parametrize("layout", ["cut", "kernel"])
def test_loop_devices_give_the_same_header_and_bytes(
    layout: str, image_machine: Recorded, tmp_path: Path, loop_driver: None
) -> None:
    """A small machine: what is sparse in a file is read byte by byte from a device."""
    machine = RecordedKernel()
    machine.shrink()
    machine.document["virtio_mem"][0] |= {"plugged": [[0, 4], [70, 1], [80, 3]], "plugged_size": 8 * BLOCK}
    machine.finish_kernel()
    machine.write(tmp_path)
    plain, looped = tmp_path / "plain.core", tmp_path / "loop.core"
    before = attached(tmp_path)
    for out, more in ((plain, []), (looped, ["--loop"])):
        result = oldmem("save", "--machine", tmp_path, "--layout", layout, "-o", out, *more)
        assert (result.status, result.warnings) == (0, [])
    assert filecmp.cmp(plain, looped, shallow=False)
    assert attached(tmp_path) == before == [], "no loop device is left behind"
    result = oldmem("map", "-v", "--machine", tmp_path, "--loop")
    assert "oldmem: memory read from images on loop devices" in result.lines


def attached(folder: Path) -> list[str]:
    found = []
    for name in os.listdir("/sys/block"):
        try:
            backing = Path(f"/sys/block/{name}/loop/backing_file").read_text().strip()
        except OSError:
            continue
        if backing.startswith(str(folder)):
            found.append(name)
    return found


def test_map_tells_ranges_verdicts_and_where_each_is_known_from(image_machine: Recorded) -> None:
    result = oldmem("map", "--machine", image_machine.folder)
    assert (result.status, result.lines) == (0, [])
    rows = {line.split()[0]: line for line in result.out.splitlines()}
    assert rows["0x100000-0x5fffffff"].split()[1:4] == ["1.50G", "ram", "yes"]
    assert "no: capture kernel" in rows["0x60000000-0x6bfeffff"]
    assert "no: crash reservation" in rows["0x6bff0000-0x6bffffff"]
    assert "no: virtio-mem 0x400000000" in rows["0x408000000-0x408bfffff"]
    assert rows["0x420000000-0x7ffffffff"].split()[2] == "hotplug"
    for line in ("0x100000-0x5fffffff", "0x400000000-0x407ffffff"):
        assert "preloaded" in rows[line]
    assert "preloaded" not in rows["0x408c00000-0x408dfffff"]
    assert (
        result.out.splitlines()[-1] == f"readable: {sum(b - a for a, b in READABLE) / GIB:.2f}G, envelope from fw_cfg"
    )


def test_map_as_json_has_the_same_ranges(image_machine: Recorded) -> None:
    result = oldmem("map", "--json", "--machine", image_machine.folder)
    told = json.loads(result.out)
    assert [tuple(r) for r in told["readable"]] == READABLE
    assert [(e["start"], e["end"]) for e in told["entries"] if not e["refused_by"]] == READABLE
    assert [(p["paddr"], p["size"]) for p in told["pt_load"]][1:] == [(a, b - a) for a, b in READABLE]
    assert told["problems"] == []


def test_compare_tells_range_by_range_what_the_stale_header_misses_and_has_too_much(tmp_path: Path) -> None:
    machine = RecordedKernel()
    stale = minus([*BOOT, (DEVICE[0], DEVICE[0] + STALE + 32 * MIB)], [(0, MIB), CRASH, (HIGH[1] - GIB, HIGH[1])])
    machine.put("proc/vmcore", vmcore_header(stale))
    machine.finish_kernel()
    result = oldmem("map", "--compare", "--machine", machine.write(tmp_path))
    assert (result.status, result.lines) == (0, [])
    assert result.out == (
        "preloaded header  range                    size  why\n"
        "missing           0x1c0000000-0x1ffffffff  1G    RAM that the preloaded header does not list\n"
        "too much          0x408000000-0x408bfffff  12M   virtio-mem 0x400000000: unplugged\n"
        "too much          0x408e00000-0x409ffffff  18M   virtio-mem 0x400000000: unplugged\n"
        "missing           0x40a000000-0x40d3fffff  52M   RAM that the preloaded header does not list\n"
        "missing           0x419000000-0x41dffffff  80M   RAM that the preloaded header does not list\n"
        "the preloaded header misses 1.13G and has 30M too much\n"
    )


def test_compare_of_a_header_that_is_right_says_so(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.put("proc/vmcore", vmcore_header(READABLE))
    machine.finish_kernel()
    result = oldmem("map", "--compare", "--machine", machine.write(tmp_path))
    assert (result.status, result.out) == (0, "the preloaded header and the memory map agree\n")


def test_plug_shows_the_device(image_machine: Recorded) -> None:
    result = oldmem("plug", "--machine", image_machine.folder)
    assert (result.status, result.lines) == (0, [])
    assert result.out.splitlines()[1].split() == [
        *("virtio-mem", "0x400000000", "0x400000000-0x41fffffff", "2M", "262M", "512M", "4", "recorded"),
    ]
    told = json.loads(oldmem("plug", "--json", "--machine", image_machine.folder).out)
    assert [tuple(r) for r in told["devices"][0]["plugged"]] == plugged_spans()


def test_notes_are_each_cpus_prstatus_and_then_vmcoreinfo(saved: Path, image_machine: Recorded) -> None:
    with saved.open("rb") as stream:
        (note,) = [p for p in phdrs_of(stream.read(1 << 20)) if p.type == 4]
        stream.seek(note.offset)
        assert stream.read(note.filesz) == PRSTATUS * 2 + vmcoreinfo_note(image_machine.desc)[:-12]


def test_pyelftools_reads_it(saved: Path, image_machine: Recorded) -> None:
    with saved.open("rb") as stream:
        elf = ELFFile(stream)
        assert (elf["e_type"], elf["e_machine"]) == ("ET_CORE", "EM_X86_64")
        first, *rest = elf.iter_segments()
        assert isinstance(first, NoteSegment)
        notes = [(n["n_name"], n["n_type"]) for n in first.iter_notes()]
        assert [name for name, _ in notes] == ["CORE", "CORE", "VMCOREINFO"]
        assert [(s["p_paddr"], s["p_memsz"]) for s in rest[1:]] == [(a, b - a) for a, b in READABLE]


@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf")
def test_readelf_reads_it_without_a_complaint(saved: Path) -> None:
    done = subprocess.run(["readelf", "-hlnW", saved], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    assert "CORE (Core file)" in done.stdout
    assert done.stdout.count("  LOAD ") == len(READABLE) + 1
    assert done.stdout.count("NT_PRSTATUS") == 2
    assert "VMCOREINFO" in done.stdout


def test_drgn_reads_memory_from_it(tmp_path: Path) -> None:
    """Of a machine whose kernel left no VMCOREINFO: with one, drgn wants that kernel's debugging symbols."""
    machine = RecordedKernel()
    machine.finish_kernel()
    machine.kernel.mem.drop(0x11000000)
    del machine.files["sys/firmware/qemu_fw_cfg/by_name/etc/vmcoreinfo/raw"]
    machine.shrink()
    out = tmp_path / "vmcore"
    result = oldmem("save", "--machine", machine.write(tmp_path), "-o", out)
    assert result.status == 4, "nothing tells what was hot-plugged"
    program = drgn.Program()
    program.set_core_dump(out)
    asked = 0
    for paddr, page in machine.pages.items():
        if any(a <= paddr < b for a, b in [*SMALL, *plugged_spans()]):
            assert program.read(paddr, PAGE, physical=True) == page
            asked += 1
    assert asked > 10


def test_check_finds_nothing_wrong_with_it(saved: Path) -> None:
    result = oldmem("check", saved)
    assert (result.status, result.lines) == (0, [])
    assert result.out == (
        f"{saved}: {len(READABLE) + 1} PT_LOAD, {sum(b - a for a, b in READABLE) >> 20} MiB of RAM\n"
        f"{saved}: 2 NT_PRSTATUS, VMCOREINFO of 6.12.0-test\n"
    )


def test_note_alignment_follows_the_recorded_kernel(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.document["phdr_note_align"] = 0
    machine.finish_kernel()
    oldmem("header", "--machine", machine.write(tmp_path), "-o", tmp_path / "header")
    assert phdrs_of((tmp_path / "header").read_bytes())[0].align == 0


def test_vmcoreinfo_is_found_without_anybody_telling_where_it_is(tmp_path: Path, image_machine: Recorded) -> None:
    machine = RecordedKernel()
    del machine.files["sys/firmware/qemu_fw_cfg/by_name/etc/vmcoreinfo/raw"]
    machine.shrink()
    machine.finish_kernel()
    result = oldmem("header", "--machine", machine.write(tmp_path), "-o", tmp_path / "header")
    assert result.status == 0
    (line,) = result.warnings
    assert re.fullmatch(
        r"VMCOREINFO note found by searching at 0x11000000 \(it proves itself\)",
        line,
    )
    assert image_machine.desc in (tmp_path / "header").read_bytes()


def test_recorded_address_of_vmcoreinfo_is_used(tmp_path: Path) -> None:
    machine = RecordedKernel()
    del machine.files["sys/firmware/qemu_fw_cfg/by_name/etc/vmcoreinfo/raw"]
    machine.document["vmcoreinfo_paddr"] = 0x11000000
    desc = machine.finish_kernel()
    result = oldmem("header", "--machine", machine.write(tmp_path), "-o", tmp_path / "header")
    assert (result.status, result.lines) == (0, [])
    assert desc in (tmp_path / "header").read_bytes()


def test_very_many_runs_are_bridged_in_the_header_but_not_in_the_guard(tmp_path: Path) -> None:
    """Every other block of a large device plugged."""
    machine = RecordedKernel()
    blocks = 131_072
    device = machine.document["virtio_mem"][0]
    device |= {
        "addr": 1 << 40,
        "region_size": blocks * BLOCK,
        "usable_region_size": blocks * BLOCK,
        "plugged": [[n, 1] for n in range(0, blocks, 2)],
        "plugged_size": blocks // 2 * BLOCK,
    }
    ram: list[object] = [(1 << 40, (1 << 40) + blocks * BLOCK - 1, "System RAM (virtio_mem)", RAM_TREE, [])]
    machine.tree[3] = (1 << 40, (1 << 40) + blocks * BLOCK - 1, "virtio0", SYSTEM_RAM | EXCLUSIVE, ram)
    machine.finish_kernel()
    machine.write(tmp_path)
    with (tmp_path / "vm0.raw").open("r+b") as stream:
        stream.truncate(blocks * BLOCK)
    out = tmp_path / "header"
    result = oldmem("header", "--machine", tmp_path, "-o", out)
    assert result.status == 0
    sections, runs = result.lines
    assert "lie in no section that is there" in sections  # the made-up kernel has none for this device
    assert "more than 8192 runs" in runs
    assert "0x200000" in runs
    with out.open("rb") as stream:
        loads = [s.header for s in ELFFile(stream).iter_segments("PT_LOAD")]
    listed = RangeSet((h["p_paddr"], h["p_paddr"] + h["p_memsz"]) for h in loads if h["p_vaddr"] != TEXT[0])
    region = RangeSet([(1 << 40, (1 << 40) + (blocks - 1) * BLOCK)])  # the last block is not plugged
    boot = RangeSet((a, b) for a, b in READABLE if b <= HIGH[1])
    assert listed == boot | region
    told = json.loads(oldmem("map", "--machine", tmp_path, "--json").out)
    assert [[a, b] for a, b in told["readable"] if a >= 1 << 40] == [
        [(1 << 40) + n * BLOCK, (1 << 40) + (n + 1) * BLOCK] for n in range(0, blocks, 2)
    ]


def test_dump_of_64_sparse_gigabytes_is_a_matter_of_seconds(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.document["ram"][1]["size"] = 62 * GIB
    machine.document["virtio_mem"] = []
    del machine.tree[3]
    machine.resize([BOOT[1], (HIGH[0], HIGH[0] + 62 * GIB)])
    machine.finish_kernel()
    machine.write(tmp_path)
    with (tmp_path / "ram.raw").open("r+b") as stream:
        stream.truncate(64 * GIB)
    result = oldmem("save", "--machine", tmp_path, "-o", tmp_path / "vmcore", timeout=40)
    assert (result.status, result.warnings) == (0, [])
    assert (tmp_path / "vmcore").stat().st_size > 63 * GIB


def test_ranges_that_the_user_denies_are_left_out_and_told(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.finish_kernel()
    machine.write(tmp_path)
    header = tmp_path / "header"
    result = oldmem("header", "--machine", tmp_path, "--deny", "140000000-14fffffff", "-o", header)
    assert (result.status, result.lines) == (0, [])
    with header.open("rb") as stream:
        loads = [s.header for s in ELFFile(stream).iter_segments("PT_LOAD")]
    listed = RangeSet((h["p_paddr"], h["p_paddr"] + h["p_memsz"]) for h in loads if h["p_vaddr"] != TEXT[0])
    assert listed == RangeSet(READABLE) - RangeSet([(0x140000000, 0x150000000)])
    wrong = oldmem("map", "--machine", tmp_path, "--deny", "nowhere")
    assert (wrong.status, len(wrong.lines)) == (1, 1)
