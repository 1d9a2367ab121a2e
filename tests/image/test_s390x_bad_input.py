# SPDX-License-Identifier: LGPL-2.1-or-later
"""Damage of every kind to the image of an s390x machine: one line with structure, physical address and reason for each
thing that is left out; the header still has all that is sound, to the last byte."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from capture import cli
from tests.image.machines import oldmem
from tests.image.s390x_damage import (
    CRASH,
    IPL_ONLY,
    NO_NOTE,
    NOWHERE,
    OS_INFO,
    OWN_ONLY,
    USES_LOWCORES,
    VMCOREINFO_ENTRY,
    Damage,
    as_it_lies,
    assert_lines,
    both,
    cpu_pointer,
    crash_region,
    each,
    entry,
    has,
    impossible,
    ipl_cpu_only,
    machine,
    mcesad,
    no_cpu,
    no_note,
    no_os_info,
    no_text,
    pointer,
    prefix,
    put,
    register,
    sealed,
    text,
    warnings_of,
)
from tests.image.s390x_machine import MIB, NOTE_POINTER, OS_INFO_POINTER
from tests.image.s390x_oracle import PAGE, Header

DAMAGES = [
    # os_info
    Damage(
        "os_info pointer 0",
        ["os_info: lowcore 0xe18: the pointer is 0" + OS_INFO],
        after=pointer(OS_INFO_POINTER, 0),
        expect=no_os_info,
        full_command=True,
    ),
    Damage(
        "os_info pointer that is odd",
        ["os_info: lowcore 0xe18: the pointer 0x123457 is not to a page" + OS_INFO],
        after=pointer(OS_INFO_POINTER, 0x123457),
        expect=no_os_info,
    ),
    Damage(
        "os_info pointer outside RAM",
        ["os_info: old memory at 0x10000000000: refused by envelope" + OS_INFO],
        after=pointer(OS_INFO_POINTER, NOWHERE),
        expect=no_os_info,
    ),
    Damage(
        "os_info pointer to the last page of all",
        ["os_info: old memory at 0xfffffffffffff000: refused by envelope" + OS_INFO],
        after=pointer(OS_INFO_POINTER, (1 << 64) - PAGE),
        expect=no_os_info,
    ),
    Damage(
        "os_info pointer into the crash region",
        ["os_info: old memory at 0x1400000: refused by capture kernel" + OS_INFO],
        after=pointer(OS_INFO_POINTER, CRASH[0]),
        expect=no_os_info,
    ),
    Damage(
        "os_info without its magic",
        [r"os_info: {os_info}: magic 0x4f53494e464f5358, expected 0x4f53494e464f535a" + OS_INFO],
        after=put("os_info", 0, b"OSINFOSX"),
        expect=no_os_info,
    ),
    Damage(
        "os_info with a wrong checksum",
        [r"os_info: {os_info}: checksum 0x\w+, but its bytes give 0x\w+" + OS_INFO],
        after=put("os_info", PAGE - 1, b"\1"),
        expect=no_os_info,
    ),
    Damage(
        "os_info of version 2",
        ["os_info: {os_info}: major version 2, expected 1 or less" + OS_INFO],
        after=sealed(12, b"\0\2"),
        expect=no_os_info,
    ),
    Damage(
        "VMCOREINFO of os_info with a wrong checksum",
        [VMCOREINFO_ENTRY + r": checksum 0x\w+, but the 0x\w+ bytes at {vmcoreinfo} give 0x\w+" + USES_LOWCORES],
        before=both,
        after=put("vmcoreinfo", 50, b"?"),
    ),
    Damage(
        "VMCOREINFO of os_info without length",
        [VMCOREINFO_ENTRY + ": 0x0 bytes, expected 1 to 0x100000" + USES_LOWCORES],
        before=both,
        after=lambda m: m.poke_entry(0, m.at["vmcoreinfo"], 0),
    ),
    Damage(
        "VMCOREINFO of os_info of absurd length",
        [VMCOREINFO_ENTRY + ": 0xffffffffffffffff bytes, expected 1 to 0x100000" + USES_LOWCORES],
        before=both,
        after=lambda m: m.poke_entry(0, m.at["vmcoreinfo"], (1 << 64) - 1),
    ),
    Damage(
        "VMCOREINFO of os_info outside RAM",
        [VMCOREINFO_ENTRY + ": old memory at 0xffffffffffffff00: .*" + USES_LOWCORES],
        before=both,
        after=entry(0, (1 << 64) - 256),
    ),
    *(
        Damage(
            f"kernel image that {what}",
            ["os_info: {os_info}: kernel image " + shown + "; left out: no kernel text PT_LOAD"],
            after=entry(index, value),
            expect=no_text,
        )
        for what, index, value, shown in [
            ("ends in front of its start", 11, 0x1000, "0x3ffe0068000-0x1000 at physical 0x468000 is not possible"),
            ("starts inside a page", 10, 0x3FFE0068004, r"0x3ffe0068004-.* at physical 0x468000 is not possible"),
            ("is the largest there is", 10, 0x1000, "0x1000-0x3ffe01e8000 at physical 0x468000 is not possible"),
            ("lies outside RAM", 12, NOWHERE, "0x3ffe0068000-0x3ffe01e8000 at physical 0x10000000000 is not possible"),
            ("lies in the crash region", 12, CRASH[0], ".* at physical 0x1400000 is not possible"),
            ("ends behind all addresses", 12, (1 << 64) - PAGE, ".* at physical 0xfffffffffffff000 is not possible"),
        ]
    ),
    # VMCOREINFO
    Damage(
        "VMCOREINFO pointer 0",
        ["VMCOREINFO: lowcore 0xe0c: the pointer is 0; its note is left out", NO_NOTE],
        after=pointer(NOTE_POINTER, 0),
        expect=no_note,
        full_command=True,
    ),
    Damage(
        "VMCOREINFO pointer outside RAM",
        ["VMCOREINFO: old memory at 0xfffffffffffffffe: .*; its note is left out", NO_NOTE],
        after=pointer(NOTE_POINTER, (1 << 64) - 2),
        expect=no_note,
    ),
    Damage(
        "VMCOREINFO size that overflows",
        ["VMCOREINFO: .* at {note}: descsz 4294967295 where 1 to 1048576 was expected; its note is left out", NO_NOTE],
        after=put("note", 4, b"\xff\xff\xff\xff"),
        expect=no_note,
    ),
    Damage(
        "VMCOREINFO note that does not fit into RAM",
        ["VMCOREINFO: old memory at 0x2000000: refused by envelope; its note is left out", NO_NOTE],
        before=lambda m: m.used.append((32 * MIB - PAGE, 32 * MIB)),
        after=each(
            lambda m: m.put(32 * MIB - PAGE, struct.pack(">III12s", 11, PAGE, 0, b"VMCOREINFO")),
            pointer(NOTE_POINTER, 32 * MIB - PAGE),
        ),
        expect=no_note,
    ),
    Damage(
        "VMCOREINFO note of another name",
        ["VMCOREINFO: .* at {note}: name b'VMCOREINGO.*' where VMCOREINFO was expected; its note is left out", NO_NOTE],
        after=put("note", 12, b"VMCOREINGO"),
        expect=no_note,
    ),
    Damage("bad VMCOREINFO note beside a good one in os_info", [], before=both, after=put("note", 0, b"\xff" * 24)),
    Damage(
        "VMCOREINFO bad in both places",
        [
            VMCOREINFO_ENTRY + r": checksum 0x\w+, .*",
            "VMCOREINFO: .* at {note}: namesz .*; its note is left out",
            NO_NOTE,
        ],
        before=both,
        after=each(put("vmcoreinfo", 0, b"X"), put("note", 0, b"\xff" * 24)),
        expect=no_note,
    ),
    # lowcores
    Damage(
        "lowcore_ptr beyond memory",
        ["lowcore_ptr: old memory at 0x10000000000: refused by envelope" + IPL_ONLY],
        before=text(rb"SYMBOL.low.*=\w+", rb"SYMBOL(lowcore_ptr)=11200000000"),
        expect=ipl_cpu_only,
        full_command=True,
    ),
    Damage(
        "lowcore_ptr at the end of all addresses",
        ["lowcore_ptr: old memory at 0x[0-9a-f]+: .*" + IPL_ONLY],
        before=text(rb"SYMBOL.low.*=\w+", rb"SYMBOL(lowcore_ptr)=ffffffffffffffff"),
        expect=ipl_cpu_only,
    ),
    Damage(
        "kernel behind all addresses by VMCOREINFO, and no os_info",
        ["os_info: lowcore 0xe18: .*" + OS_INFO, "lowcore_ptr: old memory at 0x3ff[0-9a-f]+: .*" + IPL_ONLY],
        before=text(rb"KERNELOFFSET=\w+\nKERNELOFFPHYS=\w+", b"KERNELOFFSET=1\nKERNELOFFPHYS=ffffffffffffffff"),
        after=pointer(OS_INFO_POINTER, 0),
        expect=lambda h: ipl_cpu_only(no_os_info(h)),
    ),
    Damage(
        "lowcore_ptr of absurd length",
        ["lowcore_ptr: .*99999999 CPUs, expected 1 to 8192" + IPL_ONLY],
        before=text(rb"LENGTH.*=\d+", rb"LENGTH(lowcore_ptr)=99999999"),
        expect=ipl_cpu_only,
    ),
    Damage(
        "lowcore_ptr without length",
        ["lowcore_ptr: .*0 CPUs, expected 1 to 8192" + IPL_ONLY],
        before=text(rb"LENGTH.*=\d+", rb"LENGTH(lowcore_ptr)=0"),
        expect=ipl_cpu_only,
    ),
    Damage("no lowcore_ptr", [OWN_ONLY], before=text(rb"SYMBOL\(low.*\n", b""), expect=ipl_cpu_only),
    Damage(
        "lowcore that is odd",
        [
            r"lowcore_ptr\[1\]: 0x1200123457 is at physical 0x123457, expected a multiple of 0x2000; "
            "the CPU's register notes are left out"
        ],
        after=cpu_pointer(1, 0x12_0012_3457),
        expect=no_cpu(1),
    ),
    Damage(
        "lowcore outside RAM",
        ["CPU 1: save area at 0x10000001200: old memory at 0x10000001200: refused by envelope; its register notes .*"],
        after=cpu_pointer(1, NOWHERE + 0x12_0000_0000),
        expect=no_cpu(1),
        full_command=True,
    ),
    Damage(
        "lowcore in the crash region",
        ["CPU 2: save area at 0x1401200: old memory at 0x1401200: refused by capture kernel; its register notes .*"],
        after=cpu_pointer(2, CRASH[0] + 0x12_0000_0000),
        expect=no_cpu(2),
    ),
    Damage(
        "lowcore of the IPL CPU that is odd",
        [r"lowcore_ptr\[0\]: 0x1200000001 is at physical 0x1, expected a multiple of 0x2000"],
        after=cpu_pointer(0, 0x12_0000_0001),
    ),
    Damage(
        "prefix that is not the lowcore's",
        ["CPU 1: save area at .*: prefix 0x42000, expected its lowcore at {lowcore1}; taken as it is"],
        after=prefix(1, 0x42000),
        expect=register(1, prefix=0x42000),
    ),
    Damage(
        "prefix of the IPL CPU outside RAM",
        ["CPU 0: save area at 0x1200: prefix 0xffffe000, expected its lowcore at {lowcore0}; taken as it is"],
        after=prefix(0, 0xFFFFE000),
        expect=register(0, prefix=0xFFFFE000),
    ),
    Damage("prefix of the IPL CPU 0", [], after=prefix(0, 0), expect=no_cpu(0)),
    *(
        Damage(
            f"no save area for vector registers of CPU {cpu}",
            [f"CPU {cpu}: lowcore 0x[0-9a-f]+1b0: no machine check extended save area; its vector register notes .*"],
            after=mcesad(cpu, 11),
            expect=register(cpu, vector=None),
        )
        for cpu in (0, 1)
    ),
    Damage(
        "save area for vector registers outside RAM",
        ["CPU 2: lowcore .*: old memory at 0xfffffffffffffc00: refused by envelope; its vector register notes .*"],
        after=mcesad(2, (1 << 64) - 1),
        expect=register(2, vector=None),
    ),
    # the capture kernel's records
    Damage(
        "crash region without size", impossible(r"0x1400000\+0x0"), after=crash_region(CRASH[0], 0), expect=as_it_lies
    ),
    Damage(
        "crash region over the low memory that it holds",
        impossible(r"0x100000\+0x400000"),
        after=crash_region(MIB, 4 * MIB),
        expect=as_it_lies,
        full_command=True,
    ),
    Damage(
        "crash region that starts inside a page",
        impossible(r"0x1400010\+0x400000"),
        after=crash_region(CRASH[0] + 16, 4 * MIB),
        expect=as_it_lies,
    ),
    Damage(
        "crash region that ends inside a page",
        impossible(r"0x1400000\+0x400001"),
        after=crash_region(CRASH[0], 4 * MIB + 1),
        expect=as_it_lies,
    ),
    Damage(
        "crash region up to the last address and beyond",
        impossible(r"0xfffffffffffff000\+0x2000"),
        after=crash_region((1 << 64) - PAGE, 2 * PAGE),
        expect=as_it_lies,
    ),
    Damage(
        "crash region outside RAM",
        [
            "boot parameter area 0x10418: crash region 0x10000000000-0x100003fffff: of it and the low memory that it "
            "holds, 0x10000000000-0x100003fffff is not there",
            *("os_info: old memory at 0x.*" + OS_INFO, "VMCOREINFO: old memory at 0x.*; its note is left out", NO_NOTE),
            "CPU 0: save area at 0x1200: old memory at 0x.*; its register notes are left out",
            "0x0-0x3fffff is lost: no image holds it",
        ],
        after=crash_region(NOWHERE, 4 * MIB),
        expect=lambda h: Header([(0, 32 * MIB)], None, 0, [], None),
        status=4,
    ),
    *(
        Damage(
            f"capture kernel's release {release}",
            [r"the capture kernel's release .*is not to be had.*; header as by kernels from 6\.14 on"],
            before=has(capture_release=release),
        )
        for release in (None, "6.x-garbage", "99999999999.1", "6", "-6.14.0", "6.-1.0")
    ),
    Damage(
        "old capture kernel of no release",
        [r"the capture kernel's release .*is not to be had.*; header as by kernels from 0\.0 on"],
        before=has(capture_release=None, capture_os_info="6.1"),
    ),
    Damage(
        "nothing recorded at all",
        ["os_info: lowcore 0xe18: .*", "VMCOREINFO: lowcore 0xe0c: .*; its note is left out", NO_NOTE],
        before=has(os_info="", lowcore_note=False),
        expect=ipl_cpu_only,
    ),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.name.replace(" ", "_"))
def test_damage_is_told_and_the_header_has_all_that_is_sound(
    damage: Damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    m = machine()
    damage.before(m)
    sound = m.lay().expected()
    damage.after(m)
    out = tmp_path / "header"
    arguments = ["header", "--image", str(m.write(tmp_path) / "ram.raw"), "--layout", "kernel", "-o", str(out)]
    if damage.full_command:
        result = oldmem(*arguments)
        status, lines = result.status, result.warnings
    else:
        status = cli.run(arguments)
        lines = warnings_of(capsys.readouterr().err)
    assert_lines(lines, damage.warnings, m)
    assert status == damage.status
    assert out.read_bytes() == bytes(damage.expect(sound))
