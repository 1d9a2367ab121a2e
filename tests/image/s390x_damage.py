# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ways to damage a made-up s390x machine, and what of its header is then left out."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.image.s390x_machine import MCESAD, MIB, OLDMEM_BASE_AT, SAVE_AREA, S390xMachine
from tests.image.s390x_oracle import Header, Text

NOWHERE = 1 << 40
"""No RAM is there."""
CRASH = (20 * MIB, 24 * MIB)


def machine() -> S390xMachine:
    m = S390xMachine(11)
    m.crash = CRASH
    m.cpus = (0, 1, 2)
    m.identity_base = 0x12_0000_0000
    return m


Change = Callable[[S390xMachine], object]
Expect = Callable[[Header], Header]


class Damage(NamedTuple):
    """*before* is done to the machine before it is laid out, *after* behind that. *warnings* are patterns, one for each
    line, in their order; names in braces stand for where the machine has it. *expect* changes what comes out."""

    name: str
    warnings: list[str]
    before: Change = lambda _: None
    after: Change = lambda _: None
    expect: Expect = lambda header: header
    status: int = 0
    full_command: bool = False


def pointer(at: int, value: int) -> Change:
    return lambda m: m.poke(at, value)


def sealed(at: int, data: bytes) -> Change:
    """Overwrite bytes of os_info, and make its checksum right."""

    def change(m: S390xMachine) -> None:
        m.put(m.at["os_info"] + at, data)
        m.seal()

    return change


def entry(index: int, value: int, size: int | None = None) -> Change:
    return lambda m: m.poke_entry(index, value, size)


def text(old: bytes, new: bytes) -> Change:
    """Another line in VMCOREINFO."""

    def edit(found: bytes) -> bytes:
        assert re.search(old, found)
        return re.sub(old, new, found)

    return has(edit=edit)


def has(**values: object) -> Change:
    return lambda m: vars(m).update(values)


def put(place: str, at: int, data: bytes) -> Change:
    """Overwrite bytes of what lies at the place of that name."""
    return lambda m: m.put(m.at[place] + at, data)


def each(*changes: Change) -> Change:
    def change(m: S390xMachine) -> None:
        for one in changes:
            one(m)

    return change


def cpu_pointer(cpu: int, value: int) -> Change:
    return lambda m: m.poke(m.at["lowcore_ptr"] + 8 * cpu, value)


def mcesad(cpu: int, value: int) -> Change:
    return lambda m: m.poke(m.found[cpu].lowcore + MCESAD, value)


def prefix(cpu: int, value: int) -> Change:
    def change(m: S390xMachine) -> None:
        at = m.found[cpu].lowcore + SAVE_AREA if cpu else SAVE_AREA
        m.put(at + 0x118, struct.pack(">I", value))

    return change


def crash_region(base: int, size: int) -> Change:
    return lambda m: m.put_now(OLDMEM_BASE_AT, struct.pack(">QQ", base, size))


def register(cpu: int, **values: Any) -> Expect:
    return lambda h: h._replace(cpus=[*h.cpus[:cpu], h.cpus[cpu]._replace(**values), *h.cpus[cpu + 1 :]])


def no_cpu(cpu: int) -> Expect:
    return lambda h: h._replace(cpus=[*h.cpus[:cpu], *h.cpus[cpu + 1 :]])


def no_os_info(h: Header) -> Header:
    return h._replace(text=None, identity_base=0)


def no_text(h: Header) -> Header:
    return h._replace(text=None)


def ipl_cpu_only(h: Header) -> Header:
    return h._replace(cpus=h.cpus[:1])


def no_note(h: Header) -> Header:
    return ipl_cpu_only(h)._replace(vmcoreinfo=None)


def as_it_lies(h: Header) -> Header:
    """What the capture kernel's own memory shows of itself; of a CPU nothing."""
    own = Text(0x3FFE0100000, 0, 0x100000)
    return Header([(0, 32 * MIB)], own, 0, [], b"OSRELEASE=7.2.13-test\nPAGESIZE=4096\n", h.note_align)


OS_INFO = "; left out: no kernel text PT_LOAD, and p_vaddr is p_paddr"
IPL_ONLY = "; only the IPL CPU's registers are known"
NO_NOTE = "lowcore_ptr: no VMCOREINFO tells of it" + IPL_ONLY
USES_LOWCORES = "; left out, lowcore's note is used"
VMCOREINFO_ENTRY = "os_info: {os_info}: VMCOREINFO entry"
AS_IT_LIES = "boot parameter area 0x10418: crash region {}; memory is taken as it lies, a capture kernel's own included"
OWN_ONLY = r"lowcore_ptr: VMCOREINFO( at 0x[0-9a-f]+)? does not tell of it" + IPL_ONLY
both = has(os_info_vmcoreinfo=True)


def impossible(what: str) -> list[str]:
    return [AS_IT_LIES.format(what + r" is not possible"), OWN_ONLY]


def assert_lines(lines: list[str], patterns: list[str], m: S390xMachine) -> None:
    places = {name: f"{at:#x}" for name, at in m.at.items()}
    places |= {f"lowcore{n}": f"{cpu.lowcore:#x}" for n, cpu in m.found.items()}
    patterns = [re.sub(r"\{(\w+)\}", lambda name: places[name[1]], pattern) for pattern in patterns]
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}"


def warnings_of(err: str) -> list[str]:
    start = "oldmem: warning: "
    lines = err.splitlines()
    assert all(line.startswith(start) for line in lines)
    return [line.removeprefix(start) for line in lines]
