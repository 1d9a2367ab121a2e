# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests/vm/test_field.py asks of every kind of machine: the live kernel's own word on its memory, taken before the
crash, and that the map, the collectors and the host agree with it afterwards."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import drgn

from guard.ranges import RangeSet
from tests.vm import truth
from tests.vm.harness import Guest, MiB

PAGE = 4096
HUGE = 2 * MiB
RAM = r"System RAM( \(.*\))?"  # "(kmem)", "(virtio_mem)": mm/memory_hotplug.c:register_memory_resource()
HERE = Path(__file__).resolve().parent
SCRIPTS = {f"/tmp/{name}": HERE / name for name in ("flags.py", "huge_pages.py")}
NEW_UTS_LEN = 65  # include/uapi/linux/utsname.h, with the NUL


class Word(NamedTuple):
    """The live kernel's word. *ram*: whole pages of its System RAM, less the crash reservation, the first MiB and
    *broken*; *touched*: the same with pages that are System RAM in part; *broken*: the pages that it had taken for
    poisoned, of HugeTLB with the whole folio."""

    ram: RangeSet
    touched: RangeSet
    broken: RangeSet


def python(g: Guest, script: str, *arguments: str) -> str:
    """Output of a script of this folder in the guest."""
    interpreter = g.sh("ls /usr/bin/python3.*").split()[0]
    return g.sh(f"{interpreter} -IS /tmp/{script} {' '.join(arguments)}", timeout=200)


def flagged(g: Guest, *names: str) -> dict[str, RangeSet]:
    """Physical ranges of the pages that have each flag of /proc/kpageflags."""
    runs: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    for line in python(g, "flags.py", *names).splitlines():
        name, first, end = line.split()
        runs[name].append((int(first) * PAGE, int(end) * PAGE))
    return {name: RangeSet(found) for name, found in runs.items()}


def live_word(g: Guest, doomed: Iterable[int] = ()) -> Word:
    """Asks the live kernel; *doomed* are addresses in pages that are going to break with it."""
    flags = flagged(g, "hwpoison", "hugetlb")
    huge = RangeSet((a & -HUGE, -(-b // HUGE) * HUGE) for a, b in flags["hwpoison"] & flags["hugetlb"])
    broken = flags["hwpoison"] | huge | RangeSet((a & -PAGE, (a & -PAGE) + PAGE) for a in doomed)
    ram = truth.iomem(g, RAM) - truth.iomem(g, "Crash kernel") - truth.LOW
    return Word(ram.inner_pages(PAGE) - broken, ram.outer_pages(PAGE) - broken, broken)


def break_page(g: Guest, paddr: int) -> None:
    """Has the kernel take the page for one with an uncorrectable error."""
    g.sh(f"echo {paddr:#x} > /sys/devices/system/memory/hard_offline_page")


def can_break(g: Guest) -> bool:
    """Whether the kernel has CONFIG_MEMORY_FAILURE."""
    return g.run("[ -e /sys/devices/system/memory/hard_offline_page ]").status == 0


def check_map(g: Guest, word: Word) -> dict[str, Any]:
    """In the capture kernel: what may be read is what the live kernel called RAM, and RAM to QEMU. Returns the map."""
    told: dict[str, Any] = json.loads(g.sh("oldmem map --json 2>/tmp/told", timeout=400))
    said = g.sh("cat /tmp/told")
    entries = told["entries"]
    read = RangeSet((e["start"], e["end"]) for e in entries if not e["refused_by"] and e.get("shown", True))
    assert word.ram - read == RangeSet(), f"RAM that is not read\n{said}"
    assert not read & word.broken, f"broken pages are read\n{said}"
    assert read - word.touched == RangeSet(), f"read, and no RAM to the dead kernel\n{said}"
    assert read - g.ram_map() == RangeSet(), f"read, and no RAM to the machine\n{said}"
    return told


def refused(told: dict[str, Any], *rules: str) -> RangeSet:
    """What the map says *rules* refuse, by the first words of their names."""
    names = tuple(rules)
    return RangeSet((e["start"], e["end"]) for e in told["entries"] if (e["refused_by"] or "").startswith(names))


def collect(g: Guest, word: Word, *also: str, makedumpfile: str = "makedumpfile") -> None:
    """Serves the vmcore and runs collectors over it, unmodified, each of which must succeed; *also* are more of them.
    The host must not see memory populated that the live kernel did not call RAM, and drgn must read the dead kernel
    from what was saved."""
    before = truth.on_host(g)
    own = truth.iomem(g, "System RAM|RAM buffer") | truth.LOW
    g.sh("oldmem init -q", timeout=400)
    # to a pipe and to a file, the two ways in which kdump scripts use it; -f: there is a file of that name, the disk
    g.sh(f"{makedumpfile} -F -l -d 31 /proc/vmcore 2>/dev/null > /dev/null", timeout=400)
    g.sh(f"{makedumpfile} -f -E -d 31 /proc/vmcore /dev/scratch > /dev/null 2>&1 && sync", timeout=400)
    for command in also:
        g.sh(command, timeout=400)
    g.sh("oldmem done")
    grown = truth.on_host(g) - before - own.outer_pages(PAGE)
    assert grown - word.touched == RangeSet(), "no RAM, and read all the same"
    check_core(g, g.scratch)


def check_core(g: Guest, core: Path) -> None:
    """drgn reads from *core* whose kernel it is, through page tables and by physical address."""
    info = truth.vmcoreinfo(core)
    program = drgn.Program()
    program.set_core_dump(core)
    uts = int(info["SYMBOL(init_uts_ns)"], 16) + int(info["OFFSET(uts_namespace.name)"])
    release = program.read(uts + 2 * NEW_UTS_LEN, NEW_UTS_LEN).split(b"\0")[0].decode()
    assert release == info["OSRELEASE"] == g.kernel.release
    spans = [span for _, span in truth.pt_loads(core) if span.size >= PAGE]
    with g.paused():
        for span in (spans[0], spans[-1]):
            at = span.end - PAGE
            assert program.read(at, PAGE, physical=True) in (truth.host_bytes(g, at, PAGE), bytes(PAGE))


_ENABLED, _HOT_PLUGGABLE = 1, 2


def azure_srat(boot: Iterable[tuple[int, int]], cpus: int) -> bytes:
    """A SRAT as Hyper-V and Azure have it: boot memory and windows up to 2^52, every entry enabled and
    hot-pluggable."""
    spans = sorted(boot)
    return srat([*spans, (spans[-1][1], 1 << 40), (1 << 40, 1 << 52)], cpus, _ENABLED | _HOT_PLUGGABLE)


def srat(spans: Iterable[tuple[int, int]], cpus: int, flags: int = _ENABLED) -> bytes:
    """A SRAT of these ranges (ACPI 6.5, 5.2.16.2). Its identifiers are those of QEMU's own tables, its OEM revision is
    higher than theirs."""
    body = struct.pack("<IQ", 1, 0)
    body += b"".join(struct.pack("<BBBBIB3sI", 0, 16, 0, cpu, 1, 0, bytes(3), 0) for cpu in range(cpus))
    body += b"".join(struct.pack("<BBIHQQIIQ", 1, 40, 0, 0, a, b - a, 0, flags, 0) for a, b in spans)
    head = struct.pack("<4sIBB6s8sI4sI", b"SRAT", 36 + len(body), 3, 0, b"BOCHS ", b"BXPC    ", 2, b"BXPC", 1)
    table = bytearray(head + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)
