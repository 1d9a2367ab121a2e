# SPDX-License-Identifier: LGPL-2.1-or-later
"""Damage of every kind to a recorded machine, and the whole command over it: one clear line with what, where and what
was done instead; the header is still made of what is sound, all other memory still saved, and nothing else read."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from capture import cli
from tests.image.machines import (
    BLOCK,
    BOOT,
    CRASH,
    DEVICE,
    GIB,
    HIGH,
    MIB,
    READABLE,
    SMALL,
    VMCOREINFO_AT,
    RecordedKernel,
    Span,
    assert_memory,
    minus,
    oldmem,
    phdrs_of,
    plugged_spans,
    smbios,
    srat,
    vmcore_header,
)
from tests.unit.witness_memory import PRSTATUS, vmcoreinfo_note

FW_CFG = "sys/firmware/qemu_fw_cfg/by_name/etc/"
SRAT, DMI = "sys/firmware/acpi/tables/SRAT", "sys/firmware/dmi/tables/DMI"


def fixed(table: bytes) -> bytes:
    """With the checksum right again."""
    data = bytearray(table)
    data[9] = (data[9] - sum(data)) & 0xFF
    return bytes(data)


class Damage(NamedTuple):
    """*before* spoils the machine before its kernel is finished, *after* behind that. *warnings* are patterns, one for
    each line expected. *readable* is what must still be saved, *notes* the number of CPU notes."""

    name: str
    warnings: list[str]
    before: Callable[[RecordedKernel], object] = lambda _: None
    after: Callable[[RecordedKernel, bytes], object] = lambda _m, _d: None
    status: int = 0
    readable: list[Span] | None = None
    cpus: int = 2
    has_text: bool = True
    arguments: tuple[str, ...] = ()
    full: bool = False  # with gigabytes of RAM


def poke(name: str, data: bytes, at: int = 0) -> Callable[[RecordedKernel, bytes], object]:
    """Overwrite a variable of the dead kernel."""
    return lambda m, _: m.kernel.write(m.symbol(name) + at, data)


def note(change: Callable[[bytes], bytes]) -> Callable[[RecordedKernel, bytes], object]:
    """Another VMCOREINFO text."""

    def apply(m: RecordedKernel, desc: bytes) -> None:
        m.put_note(change(desc))

    return apply


def key(name: bytes, value: bytes) -> Callable[[bytes], bytes]:
    return lambda desc: re.sub(re.escape(name) + rb"=.*\n", name + b"=" + value + b"\n", desc)


def raw_note(change: Callable[[bytearray], object]) -> Callable[[RecordedKernel, bytes], object]:
    def apply(m: RecordedKernel, desc: bytes) -> None:
        raw = bytearray(vmcoreinfo_note(desc))
        change(raw)
        m.kernel.mem.write(VMCOREINFO_AT, bytes(raw))

    return apply


def spoil(name: str, change: Callable[[bytes], bytes]) -> Callable[[RecordedKernel], object]:
    """Change a file of /sys or /proc."""
    return lambda m: m.put(name, change(m.files[name]))


def drop(*names: str) -> Callable[[RecordedKernel], object]:
    def apply(m: RecordedKernel) -> None:
        for name in names:
            del m.files[name]

    return apply


def cycle(m: RecordedKernel, _desc: bytes) -> None:
    """The first child's sibling pointer leads back to the first child."""
    root = m.symbol("iomem_resource")
    (first,) = struct.unpack("<Q", m.kernel.mem.read(root - m.kernel.text_vaddr + m.kernel.text_paddr + 56, 8))
    m.kernel.write(first + 48, struct.pack("<Q", first))


def each(*changes: Callable[[RecordedKernel], object]) -> Callable[[RecordedKernel], object]:
    def apply(m: RecordedKernel) -> None:
        for change in changes:
            change(m)

    return apply


def tree_with(*more: tuple[int, int, str, int, list[object]]) -> Callable[[RecordedKernel], object]:
    return lambda m: m.tree.extend(more)


NO_WINDOW = r"^0x420000000-0x7ffffffff is lost: nothing tells what was hot-plugged there"
NO_TREE = [
    r"the dead kernel's resource tree does not count: ",
    r"dead kernel's e820_table_firmware not known, left out: kallsyms has no e820_table_firmware",
    NO_WINDOW,
]
NO_WALK = [
    r"no page tables of the dead kernel: no CPU notes, no kernel text PT_LOAD, p_vaddr from 0xffff888000000000",
    NO_WINDOW,
]
SEARCHED = r"VMCOREINFO note found by searching at 0x11000000 "
NO_NOTE = r"no VMCOREINFO note in \d+ MiB of old memory: no notes, no symbols"
WITHOUT_SYMBOLS = [
    r"dead kernel's symbols not known, left out: (kallsyms|page walk|vmcoreinfo|old memory).*",
    *(rf"dead kernel's {what} not known, .*kallsyms has no .*" for what in ("iomem_resource", "page_offset_base")),
    r"dead kernel's crash_notes not known, left out: kallsyms has no crash_notes",
    r"dead kernel's image extent not known, left out: kallsyms has no _text",
    *NO_TREE,
]

# without the kernel's word, what the capture kernel does not own of its reservation is old memory like any other
RESERVATION_UNKNOWN = minus([*BOOT, *plugged_spans()], [(0, MIB), (CRASH[0], CRASH[1] - 64 * 1024)])
SMALL_READABLE = [*SMALL, *plugged_spans()]

DAMAGES = [
    # firmware tables
    Damage(
        "SRAT with a bad checksum",
        [rf"{SRAT}: bytes sum up to 0x01, expected 0x00 \(bad checksum\); it may narrow .*, and adds nothing"],
        spoil(SRAT, lambda t: t[:9] + bytes(((t[9] + 1) & 0xFF,)) + t[10:]),
    ),
    Damage(
        "SRAT whose length is larger than the file",
        [rf"{SRAT}: length at offset 4 is 4096, expected 48 to \d+; ignored"],
        spoil(SRAT, lambda t: t[:4] + struct.pack("<I", 4096) + t[8:]),
    ),
    Damage(
        "SRAT cut short",
        [rf"{SRAT}: length at offset 4 is \d+, expected 48 to 100; ignored"],
        spoil(SRAT, lambda t: t[:100]),
    ),
    Damage(
        "SRAT of a few bytes", [rf"{SRAT}: has 7 bytes, expected at least 48; ignored"], spoil(SRAT, lambda t: t[:7])
    ),
    Damage(
        "SRAT with a subtable of length 0",
        [rf"{SRAT}: subtable at offset 48 has length 0, expected 2 to \d+; it and the rest are ignored"],
        spoil(SRAT, lambda t: fixed(t[:49] + b"\0" + t[50:])),
    ),
    Damage(
        "SRAT with a range beyond any address",
        [rf"{SRAT}: memory affinity entry at offset 48: range .* is beyond any physical address; ignored"],
        lambda m: m.put(SRAT, srat([((1 << 64) - (2 << 20), (1 << 64) - (1 << 20), 1), *((a, b, 1) for a, b in BOOT)])),
    ),
    Damage(
        "SMBIOS structure of length 1",
        [rf"{DMI}: structure at offset 0 has length 1, expected 4 to \d+; it and the rest are ignored"],
        spoil(DMI, lambda t: t[:1] + b"\1" + t[2:]),
    ),
    Damage(
        "SMBIOS that knows of less RAM",
        [r"smbios does not have 0x100000000-0x1ffffffff, which fw_cfg calls RAM; fw_cfg is believed"],
        lambda m: m.put(DMI, smbios(BOOT[:2])),
        full=True,
    ),
    Damage(
        "e820 with half an entry at the end",
        [rf"{FW_CFG}e820/raw: has \d+ bytes, expected a multiple of 20; the last 9 are ignored"],
        spoil(FW_CFG + "e820/raw", lambda t: t + bytes(9)),
    ),
    Damage(
        "e820 entry without length",
        [rf"{FW_CFG}e820/raw: entry 6 at offset 120: range starts at 0x1000 and ends before 0x1000, .*ignored"],
        spoil(FW_CFG + "e820/raw", lambda t: t + struct.pack("<QQI", 0x1000, 0, 1)),
        full=True,
    ),
    Damage("no firmware source but SRAT", [], drop(FW_CFG + "e820/raw", DMI), full=True),
    Damage(
        "no firmware source at all",
        [],
        drop(FW_CFG + "e820/raw", SRAT, DMI),
        full=True,
    ),
    Damage(
        "iomem with a line that is none",
        [r"proc/iomem: line 1: expected 'start-end : name', found 'nonsense'; ignored"],
        spoil("proc/iomem", lambda t: b"nonsense\n" + t),
    ),
    # where the note is
    Damage(
        "fw_cfg vmcoreinfo pointing nowhere",
        [
            r"VMCOREINFO note at 0x3000000, where it was said to be: .* namesz 0 and .*; searching for it",
            SEARCHED,
        ],
        lambda m: m.put(FW_CFG + "vmcoreinfo/raw", struct.pack("<HHIQ", 0, 1, 0x1024, 0x3000000)),
    ),
    Damage(
        "fw_cfg vmcoreinfo pointing into the capture kernel",
        [
            r"VMCOREINFO note at 0x5000, where it was said to be: .*refused by capture kernel; searching for it",
            SEARCHED,
        ],
        lambda m: m.put(FW_CFG + "vmcoreinfo/raw", struct.pack("<HHIQ", 0, 1, 0x1024, 0x5000)),
    ),
    Damage(
        "fw_cfg vmcoreinfo outside of all memory",
        [
            r"VMCOREINFO note at 0xf0000000000, where it was said to be: .*refused by envelope; searching for it",
            SEARCHED,
        ],
        lambda m: m.put(FW_CFG + "vmcoreinfo/raw", struct.pack("<HHIQ", 0, 1, 0x1024, 0xF0000000000)),
    ),
    Damage(
        "fw_cfg vmcoreinfo of the wrong size",
        [rf"{FW_CFG}vmcoreinfo/raw: has 15 bytes, expected 16; ignored", SEARCHED],
        spoil(FW_CFG + "vmcoreinfo/raw", lambda t: t[:-1]),
    ),
    Damage(
        "recorded address of the note in a hole",
        [r"VMCOREINFO note at 0xffffffffffffffff, where it was said to be: .*; searching for it", SEARCHED],
        lambda m: m.document.update(vmcoreinfo_paddr=(1 << 64) - 1),
    ),
    # the note itself
    Damage(
        "note with a huge descsz",
        [
            r"VMCOREINFO note at 0x11000000, .*descsz 4294967295 where 1 to \d+ was expected; searching for it",
            NO_NOTE,
            *NO_WALK,
        ],
        after=raw_note(lambda raw: struct.pack_into("<I", raw, 4, 0xFFFFFFFF)),
        cpus=0,
        has_text=False,
        status=4,
    ),
    Damage(
        "vmcoreinfo cut short, without newline",
        [r"vmcoreinfo at 0x11000000: text ends without a newline, its last line 'CRASHTIME=17600000' is left out"],
        after=note(lambda desc: desc[:-3]),
    ),
    Damage(
        "vmcoreinfo cut short in front of kallsyms",
        [r"vmcoreinfo at 0x11000000: text ends without a newline.*", *WITHOUT_SYMBOLS],
        after=note(lambda desc: desc[: desc.index(b"SYMBOL(kallsyms_num_syms)") + 9]),
        cpus=0,
        has_text=False,
        status=4,
    ),
    Damage(
        "vmcoreinfo with nothing but a release",
        [
            r"dead kernel's records: vmcoreinfo has no SYMBOL\(init_top_pgt\).*; firmware and devices alone .*",
            *NO_WALK,
        ],
        after=note(lambda _: b"OSRELEASE=6.12\n"),
        cpus=0,
        has_text=False,
        status=4,
    ),
    Damage(
        "vmcoreinfo with huge values",
        [
            r"dead kernel's records: vmcoreinfo has no SYMBOL\(init_top_pgt\) or no NUMBER\(phys_base\).*",
            *NO_WALK,
        ],
        after=note(key(b"NUMBER(phys_base)", b"9" * 5000)),
        cpus=0,
        has_text=False,
        status=4,
    ),
    Damage(
        "phys_base that is wrong",
        [*NO_WALK, r"dead kernel's records: page walk: .*plausible; firmware and devices alone are believed"],
        after=note(key(b"NUMBER(phys_base)", b"1152921504606846976")),
        cpus=0,
        has_text=False,
        status=4,
    ),
    Damage(
        "phys_base that points to other memory",
        [*WITHOUT_SYMBOLS, r"dead kernel's mem_section not known, left out: .* does not have section \d+, .*"],
        after=note(key(b"NUMBER(phys_base)", b"1073741824")),
        cpus=0,
        has_text=False,
        status=4,
    ),
    # kallsyms
    Damage(
        "kallsyms names that point nowhere",
        [r"kallsyms: only 0 of \d+ names at 0x1000 can be read: .*", *WITHOUT_SYMBOLS],
        after=note(key(b"SYMBOL(kallsyms_names)", b"1000")),
        cpus=0,
        has_text=False,
        status=4,
    ),
    Damage(
        "kallsyms token table outside of the kernel",
        WITHOUT_SYMBOLS,
        after=note(key(b"SYMBOL(kallsyms_token_table)", b"ffffffffffffff00")),
        cpus=0,
        has_text=False,
        status=4,
    ),
    Damage(
        "kallsyms with a huge count",
        WITHOUT_SYMBOLS,
        after=lambda m, d: m.kernel.write(int(re.findall(rb"kallsyms_num_syms\)=(\w+)", d)[0], 16), b"\xff" * 4),
        cpus=0,
        has_text=False,
        status=4,
    ),
    Damage(
        "kallsyms offsets that are all zero",
        [
            "the dead kernel tells of no crash reservation; only what this kernel owns is left out",
            r"dead kernel's page_offset_base not known, 0xffff888000000000 is taken: .*",
            r"dead kernel's crash_notes not known, left out: nr_cpu_ids is 0, expected 1 to 8192",
            r"the dead kernel's resource tree does not count: it has no System RAM at ",
            r"dead kernel's e820_table_firmware not known, left out: ",
            NO_WINDOW,
            r"dead kernel's image extent not known, left out: _text 0x\w+ to _end 0x\w+ is not plausible",
        ],
        after=note(key(b"SYMBOL(kallsyms_offsets)", b"ffffffff93002000")),
        cpus=0,
        has_text=False,
        status=4,
    ),
    # the resource tree
    Damage(
        "resource tree with a cycle",
        [
            r"^iomem_resource: node 0x[0-9a-f]+ is reached twice, the tree has a cycle; left there",
            r"the dead kernel's resource tree does not count: .*the tree has a cycle",
            *NO_TREE[1:],
        ],
        after=cycle,
        status=4,
    ),
    Damage(
        "resource tree whose root points nowhere",
        [r"^iomem_resource: node 0x1000 cannot be read, it and what follows it is left out: .*", *NO_TREE],
        after=poke("iomem_resource", struct.pack("<Q", 0x1000), 56),
        status=4,
    ),
    Damage(
        "resource with its end in front of its start",
        [r"^iomem_resource: node 0x[0-9a-f]+ has start 0x200000000 behind end 0x100000000, left out", *NO_TREE],
        tree_with((0x200000000, 0x100000000, "System RAM", 0x81000200, [])),
        status=4,
    ),
    Damage(
        "resource tree that has all addresses as RAM",
        [
            *NO_TREE,
            r"layout kernel needs the dead kernel's resource tree; laid out by the memory map",
        ],
        tree_with((1 << 50, (1 << 63) - 1, "System RAM", 0x81000200, [])),
        arguments=("--layout", "kernel"),
        full=True,
        status=4,
    ),
    Damage(
        "resource tree up to the last address",
        NO_TREE,
        tree_with(((1 << 64) - MIB, (1 << 64) - 1, "System RAM", 0x81000200, [])),
        status=4,
    ),
    Damage(
        "resource tree with device memory as RAM",
        [r"^0xe0000000-0xe00fffff is lost: the dead kernel used it as System RAM, but fw_cfg does not have it"],
        lambda m: m.tree.insert(2, (0xE0000000, 0xE00FFFFF, "System RAM", 0x81000200, [])),
        full=True,
        status=4,
    ),
    Damage(
        "resource tree without most RAM",
        [r"^0x100000000-0x1ffffffff is lost: the kernel's own header has it, and the dead kernel.s resource tree .*"],
        lambda m: m.tree.__delitem__(2),
        full=True,
        status=4,
        readable=minus(READABLE, [HIGH]),
    ),
    Damage(
        "crash reservation of most of the memory",
        [r"crashk_res 0x100000-0x7fffffff of the dead kernel is not what this kernel owns; only its own is left out"],
        after=lambda m, _: m.kernel.write(m.symbol("crashk_res"), struct.pack("<QQ", MIB, 2 * GIB - 1)),
        readable=RESERVATION_UNKNOWN,
        full=True,
    ),
    # CPU notes
    Damage(
        "crash_notes with a note of absurd size",
        [r"crash_notes: CPU 1: note of \d+ bytes at 0x\w+ does not fit into its page, 0 bytes before it are kept"],
        lambda m: m.notes.__setitem__(1, struct.pack("<III", 5, 0xFFFFFFF0, 1) + bytes(300)),
        cpus=1,
    ),
    Damage(
        "crash_notes that point nowhere",
        [r"crash_notes: CPU 0 is left out: page walk: .*", r"crash_notes: CPU 1 is left out: page walk: .*"],
        after=poke("crash_notes", struct.pack("<Q", 0x7FFF000000000000)),
        cpus=0,
    ),
    Damage("CPU that never saved its registers", [], lambda m: m.notes.__setitem__(0, b""), cpus=1),
    Damage(
        "absurd number of CPUs",
        [r"dead kernel's crash_notes not known, left out: nr_cpu_ids is 4294967295, expected 1 to 8192"],
        after=poke("nr_cpu_ids", b"\xff" * 4),
        cpus=0,
    ),
    # what the capture environment recorded
    Damage(
        "preloaded header that is none",
        [r"proc/vmcore: offset 0x0: no ELF magic"],
        lambda m: m.put("proc/vmcore", b"nonsense" * 100),
    ),
    Damage(
        "preloaded header cut short",
        [r"proc/vmcore: ends at 0x64, expected \d+ bytes at 0x40"],
        spoil("proc/vmcore", lambda t: t[:100]),
    ),
    Damage(
        "preloaded header with a PT_LOAD beyond all addresses",
        [r"proc/vmcore: program header 1: 0xffffffffffffffff bytes at offset 0x\w+ cannot be the memory at 0x\w+"],
        spoil("proc/vmcore", lambda t: t[: 64 + 56 + 40] + b"\xff" * 8 + t[64 + 56 + 48 :]),
    ),
    Damage(
        "no iomem",
        [
            r"proc/iomem: absent; only the first MiB is taken to be the capture kernel's own",
        ],
        drop("proc/iomem"),
        full=True,
    ),
]


def expect(lines: list[str], patterns: Iterable[str]) -> None:
    """Each line is one that is expected, and each that is expected is there once."""
    left = list(lines)
    for pattern in patterns:
        hits = [line for line in left if re.search(pattern, line)]
        assert len(hits) == 1, f"{pattern!r} is {len(hits)} times in {lines}"
        left.remove(hits[0])
    assert not left, f"not expected: {left}"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.name.replace(" ", "_"))
def test_damage_is_one_line_and_all_else_is_saved(
    damage: Damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = RecordedKernel()
    if not damage.full:
        machine.shrink()
    readable = damage.readable or (READABLE if damage.full else SMALL_READABLE)
    damage.before(machine)
    desc = machine.finish_kernel()
    damage.after(machine, desc)
    machine.write(tmp_path)
    out = tmp_path / "vmcore"
    result = oldmem("save", "--machine", tmp_path, "-o", out, *damage.arguments)
    expect(result.warnings, damage.warnings)
    assert result.status == damage.status
    assert_memory(out, machine.pages, readable)
    with out.open("rb") as stream:
        phdrs = phdrs_of(stream.read(1 << 20))
        stream.seek(phdrs[0].offset)
        notes = stream.read(phdrs[0].filesz)
    assert notes.count(PRSTATUS) == damage.cpus
    ram = [p for p in phdrs if p.type == 1 and p.vaddr < 0xFFFFFFFF80000000]
    assert len(phdrs) - 1 - len(ram) == int(damage.has_text)
    shown = {(p.paddr, p.paddr + p.memsz) for p in ram}
    if not damage.arguments:
        assert shown == set(readable)
    assert cli.run(["map", "--machine", str(tmp_path), *damage.arguments]) == damage.status
    told = capsys.readouterr()
    expect([line.removeprefix("oldmem: warning: ") for line in told.err.splitlines()], damage.warnings)
    assert told.out.splitlines()[-1].startswith("readable: ")


class Wrong(NamedTuple):
    """A machine that cannot be taken at all: one line that ends it."""

    name: str
    line: str
    before: Callable[[RecordedKernel], object] = lambda _: None
    after: Callable[[Path], object] = lambda _: None
    arguments: tuple[str, ...] = ()


def doc(change: Callable[[dict[str, Any]], object]) -> Callable[[RecordedKernel], object]:
    return lambda m: change(m.document)


def device(**values: object) -> Callable[[RecordedKernel], object]:
    return lambda m: m.document["virtio_mem"][0].update(values)


def instead(name: str, make: Callable[[Path], None]) -> Callable[[Path], object]:
    """Something else in the place of a file."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


WRONG = [
    Wrong(
        "no machine.json", r"machine\.json: No such file or directory", after=lambda f: (f / "machine.json").unlink()
    ),
    Wrong(
        "machine.json that is none",
        r"machine\.json:1:1: not JSON",
        after=lambda f: (f / "machine.json").write_text("x"),
    ),
    Wrong("empty machine.json", r"machine\.json:1:1: not JSON", after=lambda f: (f / "machine.json").write_text("")),
    Wrong(
        "machine.json that is a FIFO",
        r"machine\.json: is not a regular file",
        after=instead("machine.json", os.mkfifo),
    ),
    Wrong(
        "deeply nested machine.json",
        r"machine\.json: is nested too deeply",
        after=lambda f: (f / "machine.json").write_text("[" * 100_000),
    ),
    Wrong(
        "missing image",
        r"ram\[0\]\.image: .*ram\.raw: No such file or directory",
        after=lambda f: (f / "ram.raw").unlink(),
    ),
    Wrong(
        "truncated image",
        r"ram\[1\]\.image: .*ram\.raw has 4294967296 bytes, expected at least 6442450944",
        after=lambda f: os.truncate(f / "ram.raw", 4 * GIB),
    ),
    Wrong(
        "image that is a folder",
        r"vm0\.raw is neither a regular file nor a block device",
        after=instead("vm0.raw", os.mkdir),
    ),
    Wrong(
        "image that is a FIFO",
        r"vm0\.raw is neither a regular file nor a block device",
        after=instead("vm0.raw", os.mkfifo),
    ),
    Wrong(
        "overlap of RAM and device",
        r"virtio_mem\[0\]: 0x1c0000000-0x1dfffffff overlaps ram\[1\]: 0x100000000-0x1ffffffff",
        device(addr=HIGH[1] - GIB),
    ),
    Wrong(
        "overlap of RAM and RAM",
        r"ram\[1\]: 0x40000000-0x13fffffff overlaps ram\[0\]: 0x0-0x7fffffff",
        doc(lambda d: d["ram"][1].update(paddr=GIB)),
    ),
    Wrong(
        "other architecture",
        r"machine architecture aarch64: headers are built for x86_64 and s390x only",
        doc(lambda d: d.update(arch="aarch64")),
    ),
    Wrong("unknown architecture", r"arch: 'vax' is not known", doc(lambda d: d.update(arch="vax"))),
    Wrong(
        "page size of another machine",
        r"page_size: 65536 is not possible on x86_64, expected 4096",
        doc(lambda d: d.update(page_size=65536)),
    ),
    Wrong("block size 0", r"virtio_mem\[0\]\.block_size: 0 is not a power of two", device(block_size=0)),
    Wrong(
        "block size of no power of two",
        r"virtio_mem\[0\]\.block_size: 3145728 is not a power of two",
        device(block_size=3 * MIB),
    ),
    Wrong(
        "block size below a page",
        r"virtio_mem\[0\]\.block_size: 512 is smaller than a page of 4096 bytes",
        device(block_size=512),
    ),
    Wrong(
        "block size beyond the region",
        r"virtio_mem\[0\]\.(addr|region_size): .* is not a multiple of block_size",
        device(block_size=1 << 40),
    ),
    Wrong(
        "more blocks than any device has",
        r"virtio_mem\[0\]\.usable_region_size: 72057594037927936 is more than 16777216 blocks of 4096 bytes",
        device(block_size=4096, region_size=1 << 56, usable_region_size=1 << 56, addr=1 << 56, image=None),
    ),
    Wrong(
        "plugged size that contradicts",
        r"virtio_mem\[0\]\.plugged_size: 4096 contradicts plugged",
        device(plugged_size=4096),
    ),
    Wrong(
        "plugged blocks beyond the region",
        r"virtio_mem\[0\]\.plugged\[0\]: ends with block 255, but .* only 128 blocks",
        device(plugged=[[0, 256]], usable_region_size=256 * MIB),
    ),
    Wrong(
        "RAM beyond the address space",
        r"ram\[1\]\.size: .* leave the 64-bit address space",
        doc(lambda d: d["ram"][1].update(paddr=(1 << 64) - GIB)),
    ),
    Wrong(
        "preloaded mode without a header",
        r"/proc/vmcore: the kernel made none: there is no preloaded header",
        drop("proc/vmcore"),
        arguments=("--mode", "preloaded"),
    ),
    Wrong(
        "preloaded header that shows two things at one place",
        r"memory at 0x100000 and 0x200000 overlap in the file at 0x2000",
        lambda m: m.put("proc/vmcore", overlapping()),
        arguments=("--mode", "preloaded"),
    ),
]


def overlapping() -> bytes:
    data = bytearray(vmcore_header([(MIB, 2 * MIB), (2 * MIB, 3 * MIB)]))
    struct.pack_into("<Q", data, 64 + 2 * 56 + 8, 0x2000)
    return bytes(data)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: w.name.replace(" ", "_"))
def test_machine_that_cannot_be_taken_is_one_line_and_status_1(wrong: Wrong, tmp_path: Path) -> None:
    machine = RecordedKernel()
    wrong.before(machine)
    machine.finish_kernel()
    machine.write(tmp_path)
    wrong.after(tmp_path)
    out = tmp_path / "vmcore"
    result = oldmem("save", "--machine", tmp_path, "-o", out, *wrong.arguments, timeout=20)
    assert result.status == 1
    assert not out.exists()
    assert len(result.lines) == 1
    assert result.lines[0].startswith("oldmem: ")
    assert re.search(wrong.line, result.lines[0])


def test_root_that_leads_out_of_the_machine_or_blocks_is_not_read(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.finish_kernel()
    folder = machine.write(tmp_path)
    (folder / "root/proc/vmcore").unlink()
    os.mkfifo(folder / "root/proc/vmcore")
    (folder / "root" / SRAT).unlink()
    os.mkfifo(folder / "root" / SRAT)
    (folder / "root" / DMI).unlink()
    (folder / "root" / DMI).symlink_to("/etc/hostname")
    result = oldmem("header", "--machine", folder, "-o", tmp_path / "header", timeout=20)
    assert result.status == 0
    expect(
        result.warnings,
        [
            r"SRAT: is not a regular file; ignored",
            r"DMI: cannot be read \(symbolic link leads out of .*root\); ignored",
            r"proc/vmcore: is not a regular file; taken as absent",
        ],
    )
    (folder / "root/proc/vmcore").unlink()
    (folder / "root/proc/vmcore").symlink_to("/proc/self/exe")
    result = oldmem("header", "--machine", folder, "--mode", "preloaded", "-o", tmp_path / "header")
    assert result.status == 1
    assert "/proc/vmcore: the kernel made none" in result.lines[-1]


def test_image_outside_the_folder_is_told(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.finish_kernel()
    (tmp_path / "m").mkdir()
    folder = machine.write(tmp_path / "m")
    (folder / "vm0.raw").rename(tmp_path / "vm0.raw")
    (folder / "vm0.raw").symlink_to(tmp_path / "vm0.raw")
    result = oldmem("header", "--machine", folder, "-o", tmp_path / "header")
    assert result.status == 0
    expect(result.warnings, [r"virtio_mem\[0\]\.image: vm0\.raw is outside the folder"])


def test_image_cut_while_it_is_read_costs_what_was_cut_and_is_told(tmp_path: Path) -> None:
    """As by a block device that shrinks or fails: the check at the start has passed."""
    machine = RecordedKernel()
    machine.finish_kernel()
    folder = machine.write(tmp_path)
    code = (
        "import os, sys\n"
        "from capture import cli, image_machine\n"
        "opened = image_machine.ImageMachine.open_segments\n"
        "def cut(self, wanted):\n"
        f"    os.truncate({str(folder / 'ram.raw')!r}, {5 * GIB})\n"
        "    return opened(self, wanted)\n"
        "image_machine.ImageMachine.open_segments = cut\n"
        "sys.exit(cli.run(sys.argv[1:]))\n"
    )
    out = tmp_path / "vmcore"
    done = subprocess.run(
        [sys.executable, "-c", code, "save", "--machine", folder, "-o", out], capture_output=True, text=True, timeout=60
    )
    lost = (HIGH[0] + 3 * GIB, HIGH[1])
    assert done.returncode == 4, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert warnings == [
        f"oldmem: warning: {lost[0]:#x}-{lost[1] - 1:#x} could not be read and is zeros: No data available"
    ]
    assert_memory(out, machine.pages, minus(READABLE, [lost]))


def test_device_without_an_image_is_told_once_and_all_else_is_saved(tmp_path: Path) -> None:
    machine = RecordedKernel()
    del machine.document["virtio_mem"][0]["image"]
    machine.finish_kernel()
    out = tmp_path / "vmcore"
    result = oldmem("save", "--machine", machine.write(tmp_path), "-o", out)
    assert result.status == 4
    why = "is lost: there is no image of virtio-mem 0x400000000"
    expect(result.warnings, [f"^{a:#x}-{b - 1:#x} {why}" for a, b in plugged_spans()])
    assert_memory(out, machine.pages, [(a, b) for a, b in READABLE if b <= HIGH[1]])


def test_tree_of_thousands_of_devices_closes_the_window_and_takes_no_time(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.shrink()
    for n in range(20_000):
        start = DEVICE[1] + GIB + n * 0x10000
        machine.tree.append((start, start + 0xFFF, "System RAM (virtio_mem)", 0x81000200, []))
    machine.finish_kernel()
    out = tmp_path / "vmcore"
    result = oldmem("save", "--machine", machine.write(tmp_path), "-o", out, timeout=30)
    assert result.status == 4
    assert len(result.warnings) == 65
    assert_memory(out, machine.pages, SMALL_READABLE)


def test_nothing_but_the_first_lines_of_a_flood_are_shown(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.document["virtio_mem"][0] |= {
        "plugged": [[n, 1] for n in range(0, 256, 2)],
        "plugged_size": 128 * BLOCK,
    }
    del machine.document["virtio_mem"][0]["image"]
    machine.finish_kernel()
    result = oldmem("header", "--machine", machine.write(tmp_path), "-o", tmp_path / "header")
    assert result.status == 4
    assert len(result.warnings) == 65
    assert result.warnings[-1] == "64 more ranges of RAM are lost for such reasons"
