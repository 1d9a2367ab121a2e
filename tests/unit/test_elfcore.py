# SPDX-License-Identifier: LGPL-2.1-or-later
"""The header's bytes against the ELF specification, as pyelftools and readelf know it, and /proc/vmcore's layout."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st

from capture import elfcore
from capture.elfcore import Load
from guard.errors import Error
from tests.image.machines import phdrs_of, vmcore_header
from tests.unit.witness_memory import PRSTATUS, vmcoreinfo_note

PAGE = 4096

loads_strategy = st.lists(
    st.builds(
        Load,
        st.integers(0, (1 << 52) - 1),
        st.integers(0, (1 << 64) - 1),
        st.integers(1, 1 << 40),
        st.sampled_from([0, 4096]),
    ),
    max_size=20,
)


@given(
    loads_strategy, st.integers(0, 3), st.sampled_from([0, 4]), st.sampled_from("<>"), st.sampled_from([4096, 65536])
)
def test_layout_is_that_of_proc_vmcore(loads: list[Load], cpus: int, align: int, order: str, page: int) -> None:
    notes = PRSTATUS * cpus
    core = elfcore.build(62, notes, loads, align, page, order)
    elf = ELFFile(io.BytesIO(core.header))
    assert (elf["e_type"], elf["e_machine"], elf.elfclass, elf.little_endian) == (
        "ET_CORE",
        "EM_X86_64",
        64,
        order == "<",
    )
    note, *rest = [s.header for s in elf.iter_segments()]
    assert note["p_type"] == "PT_NOTE"
    assert (note["p_offset"] % page, note["p_filesz"], note["p_memsz"]) == (0, len(notes), len(notes))
    assert (note["p_align"], note["p_vaddr"], note["p_paddr"], note["p_flags"]) == (align, 0, 0, 0)
    assert core.header[note["p_offset"] :][: len(notes)] == notes
    offset = len(core.header)
    assert offset % page == 0
    for load, p, extent in zip(loads, rest, core.extents, strict=True):
        start = load.paddr // page * page
        size = -(-(load.paddr + load.size) // page) * page - start
        assert p["p_type"] == "PT_LOAD"
        assert (p["p_paddr"], p["p_vaddr"], p["p_filesz"], p["p_memsz"], p["p_flags"], p["p_align"]) == (
            *(load.paddr, load.vaddr, load.size, load.size, 7, load.align),
        )
        assert p["p_offset"] == offset + load.paddr - start
        assert extent == (offset, size, start)
        offset += size
    assert core.size == offset
    assert [tuple(p) for p in core.phdrs] == (
        [tuple(p) for p in phdrs_of(core.header)] if order == "<" else [tuple(p) for p in core.phdrs]
    )


def test_bytes_are_those_of_a_header_written_by_hand() -> None:
    spans = [(0x100000, 0x7FFE0000), (0x100000800, 0x140000000)]
    notes = PRSTATUS + vmcoreinfo_note(b"OSRELEASE=6.12\n")[:-12]
    core = elfcore.build(62, notes, [Load(a, 0xFFFF888000000000 + a, b - a) for a, b in spans], 4)
    assert core.header == vmcore_header(spans, notes)


def test_e_phnum_is_used_as_far_as_it_goes() -> None:
    core = elfcore.build(62, b"", [Load(n * 0x4000, 0, 0x1000) for n in range(65_533)], 4)
    elf = ELFFile(io.BytesIO(core.header))
    assert elf["e_phnum"] == elf.num_segments() == 65_534
    assert elf.get_segment(65_533)["p_paddr"] == 65_532 * 0x4000


@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf")
def test_header_of_as_many_program_headers_as_16_bits_count_is_read_by_readelf(tmp_path: Path) -> None:
    core = elfcore.build(62, PRSTATUS, [Load(n * 0x4000, n * 0x4000, 0x1000) for n in range(65_533)], 4)
    (tmp_path / "core").write_bytes(core.header)
    done = subprocess.run(["readelf", "-lW", tmp_path / "core"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.count("  LOAD ") == 65_533
    assert "There are 65534 program headers, starting at offset 64" in done.stdout
    assert "Error" not in done.stderr


def test_more_program_headers_than_that_are_an_error() -> None:
    with pytest.raises(Error, match="65535 program headers where an ELF header counts at most 65534"):
        elfcore.build(62, b"", [Load(n * 0x4000, 0, 0x1000) for n in range(65_534)], 4)


def test_core_without_memory_is_header_and_notes_alone() -> None:
    core = elfcore.build(62, PRSTATUS, [], 0)
    assert core.size == len(core.header) == 2 * PAGE
    assert core.extents == ()
