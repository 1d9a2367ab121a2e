# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stage 2 on three kernels: the kernel itself serves exactly what the guard lets pass, and nothing of the dead machine
has changed."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from guard.ranges import RangeSet
from tests.vm import truth
from tests.vm.conftest import MakeGuest
from tests.vm.harness import GENERATIONS, Device, Guest, MiB
from tests.vm.test_marks import BALLOON, FLAGS, poison

DEVICES = (Device("vm0", 1024 * MiB, 256 * MiB), Device("vm1", 512 * MiB, 256 * MiB, block_size=4 * MiB))
ROOM: dict[str, Any] = {"memory": 1024 * MiB, "below_4g": 768 * MiB, "crashkernel": "320M"}
HEAD = 1 << 16


def head(g: Guest) -> Path:
    """The first bytes of the guest's /proc/vmcore."""
    g.sh(f"dd if=/proc/vmcore of=/tmp/head bs={HEAD} count=1 2>/dev/null")
    return g.get("/tmp/head") / "tmp/head"


def notes(file: Path) -> bytes:
    with open(file, "rb") as stream:
        (note,) = [s for s in ELFFile(stream).iter_segments() if s.header["p_type"] == "PT_NOTE"]
        return bytes(note.data())


def with_lines(notes: bytes, lines: list[str]) -> bytes:
    """*notes*, which VMCOREINFO ends, with *lines* more in it."""
    at = notes.index(b"VMCOREINFO\0") - 12
    (size,) = struct.unpack_from("<4xI", notes, at)
    text = notes[at + 24 : at + 24 + size] + "".join(f"{line}\n" for line in lines).encode()
    head = struct.pack("<II", 11, len(text)) + notes[at + 8 : at + 24]
    return notes[:at] + head + text + bytes(-len(text) % 4)


def listed(file: Path) -> RangeSet:
    """What PT_LOADs have, kernel text's too."""
    with open(file, "rb") as stream:
        headers = [s.header for s in ELFFile(stream).iter_segments() if s.header["p_type"] == "PT_LOAD"]
    return RangeSet((h["p_paddr"], h["p_paddr"] + h["p_memsz"]) for h in headers)


def checksums(g: Guest, old: RangeSet) -> dict[int, int]:
    """Of each MiB of *old*, by the host's files, that is not all zeros."""
    found = {}
    with g.paused():
        for start, end in truth.on_host(g).outer_pages(MiB) & old:
            for at in range(start, end, MiB):
                data = truth.host_bytes(g, at, min(MiB, end - at))
                if any(data):
                    found[at] = zlib.crc32(data)
    return found


def resize(g: Guest) -> None:
    assert g.resize("vm0", 480 * MiB) == 480 * MiB
    assert g.resize("vm1", 64 * MiB) == 64 * MiB


@pytest.mark.parametrize(
    ("kernel", "load"),
    [*((kernel, load) for kernel in GENERATIONS for load in "sc"), ("6.12", "c iomem=relaxed")],
)
def test_kernel_serves_what_the_guard_lets_pass_and_old_memory_is_as_it_was(
    guest: MakeGuest, kernel: str, load: str
) -> None:
    g = guest(kernel, devices=DEVICES, balloon=True, **ROOM)
    g.put({"/tmp/flags.py": FLAGS})
    g.load("s" if load == "s" else "c", load[2:])
    g.sh("modprobe virtio_balloon")
    g.inflate(BALLOON)
    resize(g)
    broken = poison(g, 2)
    old = RangeSet([(0, 1 << 40)]) - truth.iomem(g, "Crash kernel") - truth.LOW
    g.crash()
    told = json.loads(g.sh("oldmem map --json 2>/dev/null"))
    readable = RangeSet((start, end) for start, end in told["readable"])
    of_the_kernel = notes(head(g))
    g.put_boot_files()
    before, populated = checksums(g, old), truth.on_host(g) & (old - readable)

    g.next_stage("oldmem stage2")
    g.sh("test $(grep -c virtio_mem /proc/modules) -eq 0")
    if load != "c":
        assert "memmap=" not in g.sh("cat /proc/cmdline"), "in place of the prepared header"
    served = head(g)
    assert listed(served) == readable
    ram = [span for _, span in truth.pt_loads(served)]
    assert ram == list(readable), "ascending, each page once"
    assert not [pfn for pfn in broken if pfn << 12 in readable]
    more = [added["line"] for added in told["compatibility"]]
    assert (len(more) > 0) == (kernel == "7"), "whose note has renamed keys"
    assert notes(served) == with_lines(of_the_kernel, more)
    assert b"CRASHTIME=" in of_the_kernel
    g.sh("cp /proc/vmcore /dev/null", timeout=200)
    assert truth.on_host(g) & (old - readable) == populated, "reading populated memory that was refused"
    assert checksums(g, old) == before

    said = g.sh("oldmem init")
    assert said.startswith("oldmem: the kernel serves the guarded vmcore at /proc/vmcore")
    assert g.sh("grep -c ^virtio_mem /proc/modules").strip() == "1", "a second gate"
    g.sh("cp /proc/vmcore /dev/null", timeout=200)
    assert truth.on_host(g) & (old - readable) == populated
    report = json.loads(g.sh("cat /run/oldmem/guard.json"))
    assert {"capture kernel", "PageOffline"} <= {rule["name"] for rule in report["rules"] if rule["refused_bytes"]}
    assert checksums(g, old) == before
