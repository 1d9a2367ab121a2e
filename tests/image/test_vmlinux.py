# SPDX-License-Identifier: LGPL-2.1-or-later
"""The option --vmlinux of the command, over a made-up machine whose VMCOREINFO note is gone."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from capture.s390x import S390x
from capture.x86_64 import X86_64
from guard.errors import Error
from tests.image.machines import VMCOREINFO_AT, RecordedKernel, oldmem
from tests.unit import made_elf
from tests.unit.made_btf import MadeBtf
from tests.unit.witness_memory import START_KERNEL_MAP

BANNER = b"Linux version 6.12.0-test (kernel@example) #1 SMP\n"
MIB2 = 2 << 20


class Gone(RecordedKernel):
    """A machine that can be recorded with its note and without, and its vmlinux."""

    def __init__(self) -> None:
        super().__init__()
        kernel = self.kernel
        banner = kernel.variable("linux_banner", BANNER + b"\0")
        pointer = kernel.pointer("mem_section", 0)
        kernel.pointer("vmemmap_base", 0xFFFFEA0000000000)
        kernel.symbols.append(("T", "init_top_pgt", int(kernel.keys["SYMBOL(init_top_pgt)"], 16)))
        kernel.symbols.append(("t", "kaslr_get_random_long", kernel.text_vaddr + 64))
        for at in range(0, 0x6000000, MIB2):
            kernel.tables.map(kernel.text_vaddr + at, kernel.text_paddr + at, 21)
        self.desc = self.finish_kernel()
        kernel.write(pointer, struct.pack("<Q", int(kernel.keys["SYMBOL(mem_section)"], 16)))
        kaslr = int(kernel.keys["KERNELOFFSET"], 16)
        linked = [(kind, name, at - kaslr if at >= START_KERNEL_MAP else at) for kind, name, at in kernel.symbols]
        self.vmlinux = made_elf.vmlinux(linked, (banner - kaslr, BANNER), btf=self._btf())

    def _btf(self) -> bytes:
        made = MadeBtf()
        word, long = made.integer("unsigned int", 4), made.integer("unsigned long", 8)
        fields = [("flags", long, 0), ("compound_head", long, 64), ("_mapcount", word, 48 * 8)]
        made.structure("page", 64, fields)
        made.structure("mem_section", 32, [("section_mem_map", long, 0)])
        made.enum("pageflags", {"PG_hwpoison": 20})
        made.enum("pagetype", {"PGTY_offline": 0xF1})
        return made.section()

    def folders(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        """With the note, without it, and the vmlinux."""
        with_note, without, vmlinux = tmp_path / "with", tmp_path / "without", tmp_path / "vmlinux"
        for folder in (with_note, without):
            folder.mkdir()
        self.write(with_note)
        self.kernel.mem.write(VMCOREINFO_AT, bytes(8192))
        self.write(without)
        vmlinux.write_bytes(self.vmlinux)
        return with_note, without, vmlinux


def test_the_map_is_as_it_is_with_the_note(tmp_path: Path) -> None:
    with_note, without, vmlinux = Gone().folders(tmp_path)
    expected = json.loads(oldmem("map", "--machine", with_note, "--json").out)
    result = oldmem("map", "--machine", without, "--json", "--vmlinux", vmlinux)
    found = json.loads(result.out)
    assert found["entries"] == expected["entries"]
    assert found["readable"] == expected["readable"]
    assert json.loads(oldmem("map", "--machine", without, "--json").out)["entries"] != expected["entries"]
    assert result.status == 0
    assert result.warnings[-1] == (
        f"VMCOREINFO is made from {vmlinux}: its kernel lies at 0x2000000, KASLR offset 0x12000000"
    )


def test_the_header_has_the_cpus_notes_and_the_note_that_is_made(tmp_path: Path) -> None:
    with_note, without, vmlinux = Gone().folders(tmp_path)
    real, made = tmp_path / "real", tmp_path / "made"
    assert oldmem("header", "--machine", with_note, "-o", real).status == 0
    assert oldmem("header", "--machine", without, "--vmlinux", vmlinux, "-o", made).status == 0
    notes = [path.read_bytes()[4096:].partition(b"VMCOREINFO\0\0") for path in (real, made)]
    assert notes[0][0][:-12] == notes[1][0][:-12]  # the register notes
    assert b"KERNELOFFSET=12000000\n" in notes[1][2]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "No such file or directory"),
        ("machine.json", "begins with b'{\"fo', expected the ELF file vmlinux"),
        ("root/proc/vmcore", "has no symbol table, expected a vmlinux that is not stripped"),
    ],
)
@pytest.mark.parametrize("command", [("map",), ("header", "-o", "-"), ("save", "-o", "-")], ids=lambda c: c[0])
def test_what_is_no_vmlinux_ends_the_command_in_one_line(
    tmp_path: Path, command: tuple[str, ...], name: str, why: str
) -> None:
    folder, _, _ = Gone().folders(tmp_path)
    result = oldmem(*command, "--machine", folder, "--vmlinux", folder / name)
    assert result.status == 1
    assert result.out == ""
    (line,) = result.lines
    assert line.startswith(f"oldmem: {folder / name}: {why}")


def test_a_machine_that_needs_no_vmlinux_takes_none() -> None:
    with pytest.raises(Error, match=r"^--vmlinux: not for s390x, whose notes are found without$"):
        S390x.use_vmlinux(object.__new__(S390x), "vmlinux")


def test_a_capture_initramfs_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "guard.witness.made_note", None)
    monkeypatch.delattr("guard.witness.made_note", raising=False)
    with pytest.raises(
        Error, match=r"^--vmlinux is not part of a capture initramfs: use it where the dump is looked at$"
    ):
        X86_64.use_vmlinux(object.__new__(X86_64), "vmlinux")
