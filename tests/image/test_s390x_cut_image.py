# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images of s390x machines that end too early, within any structure: the header has all that can still be read. And
files that are no such image: one line."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.dump import build
from capture.image_machine import ImageMachine
from capture.recorded import load, of_image
from tests.image.machines import RecordedKernel, oldmem
from tests.image.s390x_machine import (
    MAGIC_AT,
    MCESAD,
    MIB,
    NOTE_POINTER,
    OLDMEM_BASE_AT,
    OS_INFO_POINTER,
    SAVE_AREA,
    S390xMachine,
    without,
)
from tests.image.s390x_oracle import PAGE, Header, Registers

CRASH = (12 * MIB, 16 * MIB)
LOW = CRASH[1] - CRASH[0]


def machine(seed: int, image: int = 0x468000) -> S390xMachine:
    m = S390xMachine(seed)
    m.image = m.image._replace(paddr=image)
    m.ram, m.crash = [(0, 24 * MIB)], CRASH
    m.cpus = (0, 1, 3)
    m.identity_base = 0x12_0000_0000
    return m.lay()


def structures(m: S390xMachine) -> list[tuple[int, int]]:
    """Address and length of everything that a header is made of."""
    found = [(OS_INFO_POINTER, 8), (NOTE_POINTER, 8), (m.at["os_info"], PAGE), (m.at["lowcore_ptr"], 8 * m.possible)]
    found += [(m.at["note"], 24 + len(m.text)), (SAVE_AREA, 512)]
    for cpu in m.found.values():
        found += [(cpu.lowcore + SAVE_AREA, 512), (cpu.lowcore + MCESAD, 8), (cpu.mcesa, 512)]
    return found


def cut_header(m: S390xMachine, end: int) -> tuple[Header, int]:
    """What can be built of the first *end* bytes, whole pages, and how many things are missing then."""
    missing = 0

    def there(paddr: int, size: int) -> bool:
        nonlocal missing
        pages = range(paddr & -PAGE, paddr + size, PAGE)
        found = all(page < end and m.now(page) < end for page in pages)
        missing += not found
        return found

    sound = m.expected()
    ranges = without([(0, end)], m.crash)
    header = Header(ranges, None, 0, [], None, sound.note_align)
    missing += end < CRASH[1]
    if there(OS_INFO_POINTER, 8) and there(m.at["os_info"], PAGE):
        text = sound.text if m.image.paddr < end else None
        missing += text is None
        header = header._replace(text=text, identity_base=sound.identity_base)
    if there(NOTE_POINTER, 8) and there(m.at["note"], 24 + len(m.text)):
        header = header._replace(vmcoreinfo=m.text)
    cpus = list(m.found.values())
    if header.vmcoreinfo is None:
        missing += 1
        cpus = cpus[:1]
    elif not there(m.at["lowcore_ptr"], 8 * m.possible):
        cpus = cpus[:1]
    kept: list[Registers] = []
    for cpu in cpus:
        if not there(cpu.lowcore + SAVE_AREA if cpu is not cpus[0] else SAVE_AREA, 512):
            continue
        vector = there(cpu.lowcore + MCESAD, 8) and there(cpu.mcesa, 512)
        kept.append(cpu.registers if vector else cpu.registers._replace(vector=None))
    return header._replace(cpus=kept), missing


def assert_cut(m: S390xMachine, end: int) -> None:
    expected, missing = cut_header(m, end & -PAGE)
    with tempfile.TemporaryDirectory() as folder:
        image = m.write(Path(folder)) / "ram.raw"
        os.truncate(image, end)
        dump = build(ImageMachine(of_image(str(image))), "kernel")
        try:
            assert len(dump.problems) == missing, dump.problems
            assert dump.core.header == bytes(expected)
        finally:
            dump.close()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), data=st.data())
def test_image_cut_in_the_middle_of_a_structure(seed: int, data: st.DataObject) -> None:
    m = machine(seed)
    paddr, size = data.draw(st.sampled_from(structures(m)))
    inside = data.draw(st.sampled_from([0, 1, size // 2, size - 1, size]) | st.integers(0, size))
    assert_cut(m, max(m.now(paddr + inside), 0x20000))


@pytest.mark.parametrize("what", ["a byte less", "last page", "memory behind the crash region", "crash region"])
def test_image_cut_at_the_end_of_something_larger(what: str) -> None:
    m = machine(3)
    ends = {"a byte less": 24 * MIB - 1, "last page": 24 * MIB - PAGE, "crash region": CRASH[0]}
    assert_cut(m, ends.get(what, CRASH[1]))


@pytest.mark.parametrize("kept", [0, 1, 16])
def test_kernel_image_that_is_there_in_part_keeps_its_program_header(kept: int) -> None:
    m = machine(6, image=20 * MIB)
    assert_cut(m, m.image.paddr + kept * PAGE)


@pytest.mark.parametrize(
    "end", [MAGIC_AT + 6, OLDMEM_BASE_AT, OLDMEM_BASE_AT + 8, OLDMEM_BASE_AT + 16, 0x14108, 0x15010]
)
def test_image_that_ends_in_the_capture_kernels_records(end: int, tmp_path: Path) -> None:
    image = machine(4).write(tmp_path) / "ram.raw"
    os.truncate(image, end)
    out = tmp_path / "header"
    result = oldmem("header", "--image", image, "--layout", "kernel", "-o", out)
    assert result.status in (0, 4)
    assert len(result.warnings) == len(result.lines) > 0
    header = out.read_bytes()
    cut = end & -PAGE
    assert header[120:128] + header[136:176] == struct.pack(">IIQQQQQ", 1, 7, 0, 0, cut, cut, PAGE)


def test_images_of_a_recorded_machine_without_the_mark_of_a_kernel(tmp_path: Path) -> None:
    m = machine(5)
    m.put_now(MAGIC_AT, b"DAMAGE")
    dump = build(ImageMachine(load(str(m.write(tmp_path)))), "kernel")
    assert dump.problems == ["RAM: b'DAMAGE' at 0x10008 where b'S390EP' is in every s390x kernel's memory"]
    assert dump.core.header == bytes(m.expected())
    dump.close()


def x86_image(path: Path) -> None:
    machine = RecordedKernel()
    machine.finish_kernel()
    folder = path.parent / "x86"
    folder.mkdir()
    (machine.write(folder) / "ram.raw").rename(path)


NO_IMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "random bytes": (lambda p: p.write_bytes(os.urandom(1 << 20)), "not the memory of an s390x machine"),
    "zeros": (lambda p: p.write_bytes(bytes(1 << 20)), "not the memory of an s390x machine"),
    "x86 memory": (x86_image, "not the memory of an s390x machine"),
    "empty file": (lambda p: p.write_bytes(b""), "not the memory of an s390x machine"),
    "few bytes": (lambda p: p.write_bytes(b"1234"), "not the memory of an s390x machine"),
    "file that ends in the mark": (
        lambda p: p.write_bytes(bytes(MAGIC_AT) + b"S390E"),
        "not the memory of an s390x machine",
    ),
    "folder": (Path.mkdir, "is neither a regular file nor a block device"),
    "pipe": (lambda p: os.mkfifo(p), "is neither a regular file nor a block device"),
    "missing file": (lambda _: None, "No such file or directory"),
}


@pytest.mark.parametrize("name", NO_IMAGE, ids=lambda name: name.replace(" ", "_"))
def test_file_that_is_no_image_of_an_s390x_machine_is_one_line_and_status_1(name: str, tmp_path: Path) -> None:
    make, why = NO_IMAGE[name]
    image, out = tmp_path / "image", tmp_path / "header"
    make(image)
    result = oldmem("header", "--image", image, "-o", out, timeout=20)
    assert result.status == 1
    assert len(result.lines) == 1
    assert result.lines[0].startswith(f"oldmem: {image}")
    assert why in result.lines[0]
    assert not out.exists()
