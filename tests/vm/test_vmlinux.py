# SPDX-License-Identifier: LGPL-2.1-or-later
"""A crashed guest whose VMCOREINFO note is gone: with a vmlinux (its BTF, notes and banner as the live kernel showed
them, its symbols less KASLR) everything is as it is with the note, and collectors can use the note that is made."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import drgn
import pytest

from guard import procvmcore
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.image.machines import Result, oldmem
from tests.unit import made_elf
from tests.vm.conftest import MakeCrashedGuest
from tests.vm.harness import GENERATIONS, Device, Guest, MiB, debian

DEVICES = (Device("vm0", 512 * MiB, 128 * MiB),)
IMAGES = {"ram": "ram.raw", "vm0": "vm0.raw"}
STEXT = 0xFFFFFFFF81000000  # where these kernels are linked
FACTS = ("/proc/kallsyms", "/proc/version", "/sys/kernel/notes", "/sys/kernel/btf/vmlinux")


def vmlinux_of(live: Path) -> bytes:
    """From copies of FACTS."""
    lines = [line.split() for line in (live / "kallsyms").read_text().splitlines()]
    symbols = [(kind, name, int(address, 16)) for address, kind, name, *module in lines if not module]
    offset = next(address for _, name, address in symbols if name == "_stext") - STEXT
    assert offset >= 0
    linked = [(kind, name, at - offset if at >= STEXT else at) for kind, name, at in symbols]
    banner = next(address for _, name, address in linked if name == "linux_banner")
    text, notes, btf = ((live / name).read_bytes() for name in ("version", "notes", "vmlinux"))
    return made_elf.vmlinux(linked, (banner, text), notes, btf)


def wipe_note(machine: Path) -> None:
    """In the image, and from what was recorded about it."""
    document = json.loads((machine / "machine.json").read_text())
    paddr = document.pop("vmcoreinfo_paddr")
    (ram,) = (r for r in document["ram"] if r["paddr"] <= paddr < r["paddr"] + r["size"])
    with (machine / ram["image"]).open("r+b") as image:
        image.seek(ram["offset"] + paddr - ram["paddr"])
        assert b"VMCOREINFO" in image.read(64)
        image.seek(-64, os.SEEK_CUR)
        image.write(bytes(8192))
    (machine / "machine.json").write_text(json.dumps(document))


def notes_of(vmcore: Path) -> list[tuple[str, int, bytes]]:
    """(name, type, text) of each ELF note, VMCOREINFO last."""
    with vmcore.open("rb") as stream:
        header = procvmcore.read_header(stream.fileno(), str(vmcore))
        (p,) = (p for p in header.phdrs if p.type == procvmcore.PT_NOTE)
        data = os.pread(stream.fileno(), p.filesz, p.offset)
    found, at = [], 0
    while at < len(data):
        namesz, descsz, kind = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (0, 4, 8))
        start = at + 12 + (namesz + 3 & ~3)
        found.append((data[at + 12 : at + 11 + namesz].decode(), kind, data[start : start + descsz]))
        at = start + (descsz + 3 & ~3)
    return found


def told(result: Result) -> Any:
    assert result.status == 0
    return json.loads(result.out)


def makedumpfile(*arguments: str | Path) -> None:
    """That of the guests' own system, with its own libraries."""
    root = debian.sysroot() / "usr"
    loader: list[str | Path] = [root / "lib64/ld-linux-x86-64.so.2", "--library-path", root / "lib/x86_64-linux-gnu"]
    subprocess.run([*loader, root / "bin/makedumpfile", *arguments], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_vmlinux_stands_in_for_a_note_that_is_gone(
    crashed_guest: MakeCrashedGuest, tmp_path: Path, kernel: str
) -> None:
    vmlinux, machine = tmp_path / "vmlinux", tmp_path / "machine"

    def keep(g: Guest) -> None:
        g.sh(f"mkdir /tmp/live && for f in {' '.join(FACTS)}; do cat $f > /tmp/live/${{f##*/}}; done")
        vmlinux.write_bytes(vmlinux_of(g.get("/tmp/live") / "tmp/live"))

    g = crashed_guest(kernel, devices=DEVICES, before_load=keep)
    g.sh("oldmem record -q /tmp/machine")
    status, output = g.run("oldmem map --vmlinux /proc/version")
    assert (status, output.count("\n")) == (1, 1)
    assert "--vmlinux is not part of a capture initramfs" in output
    subprocess.run(["cp", "-r", g.get("/tmp/machine") / "tmp/machine", machine], check=True)
    (machine / "root/proc/vmcore").unlink()  # it has the note too
    with g.paused():
        for file in {f.path for f in g.ram_files}:
            subprocess.run(["cp", "--sparse=always", file, machine / IMAGES[file.name]], check=True)
    g.close()
    with_note = told(oldmem("map", "--machine", machine, "--json"))
    assert oldmem("save", "-q", "--machine", machine, "-o", tmp_path / "with_note", timeout=120).status == 0
    assert oldmem("guard", "-q", "--machine", machine, "-o", tmp_path / "with_note.guard").status == 0
    wipe_note(machine)

    result = oldmem("map", "--machine", machine, "--json", "--vmlinux", vmlinux)
    made = told(result)
    for key in ("entries", "readable"):
        assert made[key] == with_note[key], key
    assert result.warnings[-1].startswith(f"VMCOREINFO is made from {vmlinux}: its kernel lies at 0x")
    assert len(result.warnings) == 3

    arguments = ("-q", "--machine", machine, "--vmlinux", vmlinux, "-o")
    assert oldmem("guard", *arguments, tmp_path / "made.guard").status == 0
    assert (tmp_path / "made.guard").read_bytes() == (tmp_path / "with_note.guard").read_bytes()
    assert oldmem("save", *arguments, tmp_path / "made", timeout=120).status == 0
    ours, real = notes_of(tmp_path / "made"), notes_of(tmp_path / "with_note")
    assert [name for name, _, _ in ours] == ["CORE", "CORE", "VMCOREINFO"]
    assert ours[:-1] == real[:-1]
    lines, expected = (Vmcoreinfo(notes[-1][2]).texts for notes in (ours, real))
    # 6.1 leaves the kallsyms tables out of its kallsyms, so this vmlinux has no such symbols
    lacking = {key for key, value in expected.items() if lines.get(key) != value and "(kallsyms_" not in key}
    assert lacking == {"CRASHTIME"}

    for name in ("made", "with_note"):
        makedumpfile("--dump-dmesg", tmp_path / name, tmp_path / f"{name}.dmesg")
        makedumpfile("-l", "-d", "31", tmp_path / name, tmp_path / f"{name}.dump")
    dmesg = (tmp_path / "made.dmesg").read_bytes()
    assert dmesg == (tmp_path / "with_note.dmesg").read_bytes()
    assert b"sysrq: Trigger a crash" in dmesg
    # the two pages that were wiped are all that differs
    assert abs((tmp_path / "made.dump").stat().st_size - (tmp_path / "with_note.dump").stat().st_size) < 3 * 4096

    program = drgn.Program()
    program.set_core_dump(tmp_path / "made")
    release = expected["OSRELEASE"].encode()
    assert program["UTS_RELEASE"].string_() == release
    uts = int(lines["SYMBOL(init_uts_ns)"], 16) + int(lines["OFFSET(uts_namespace.name)"])
    assert release in program.read(uts, 390)
