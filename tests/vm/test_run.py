# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collectors with the vmcore inside their own process, in a real capture kernel: what they get, and what they cannot
get past the library."""

from __future__ import annotations

import hashlib
import os

from tests.image.machines import data_extents
from tests.vm.conftest import MakeCrashedGuest
from tests.vm.harness import Guest, MiB
from tests.vm.test_served import DEVICES, populated, resize

COPY, DUMP = "cp-dynamic /proc/vmcore /dev/scratch", "makedumpfile -F -l -d 31 /proc/vmcore > /dev/scratch"
# what each of them writes over FUSE, and others that must write the same inside of their process
COLLECTORS = {
    COPY: (COPY, "dd-dynamic if=/proc/vmcore bs=1M of=/dev/scratch"),
    DUMP: (DUMP, "makedumpfile -F -l -d 31 --non-mmap /proc/vmcore > /dev/scratch"),
}


def written(g: Guest, command: str) -> str:
    """SHA-256 of what *command* writes to the disk, and of where."""
    size = g.scratch.stat().st_size
    os.truncate(g.scratch, 0)
    os.truncate(g.scratch, size)
    g.sh(f"{command} 2>/dev/null && sync && echo 3 > /proc/sys/vm/drop_caches", timeout=200)
    digest = hashlib.sha256()
    with open(g.scratch, "rb") as file:
        for start, end in data_extents(g.scratch, size):
            digest.update(f"{start:x}-{end:x}".encode())
            for at in range(start, end, MiB):
                file.seek(at)
                digest.update(file.read(min(MiB, end - at)))
    return digest.hexdigest()


def test_collectors_get_the_bytes_that_fuse_serves_and_populate_nothing(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=resize)
    g.sh("grep -q virtio_mem /proc/modules && exit 1; true")
    inside = {}
    for collector in (c for several in COLLECTORS.values() for c in several):
        inside[collector] = written(g, f"oldmem run -q -- {collector}")
        assert populated(g) == 0, collector
    g.sh("oldmem init -q")
    for collector, several in COLLECTORS.items():
        assert {inside[c] for c in several} == {written(g, collector)}
    assert populated(g) == 0


def test_program_that_takes_no_library_gets_no_vmcore_and_nobody_else_notices(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=resize)
    status, said = g.run("oldmem run -q -- busybox cat /proc/vmcore")
    assert status == 1
    assert "busybox: can't open '/proc/vmcore': No such device or address" in said.replace("cat: ", "busybox: ")
    assert "busybox is statically linked, and has seen no vmcore" in said
    # a static shell may run what is not static: that is given the vmcore, beside what is not
    script = (
        "cat /proc/vmcore; head -c 4 /proc/vmcore; dd-dynamic if=/proc/vmcore bs=4 count=1 2>/dev/null | od -An -tx1"
    )
    status, said = g.run(f'oldmem run -q -- sh -c "{script}"')
    assert status == 0, said
    assert "7f 45 4c 46" in said
    assert said.count("No such device or address") == 2
    # meanwhile and afterwards the kernel's own file is where it was
    inside = "dd-dynamic if=/proc/vmcore bs=1 count=1 of=/tmp/inside; until [ -e /tmp/go ]; do sleep 0.1; done"
    g.sh(f"(oldmem run -q -- sh -c '{inside}'; touch /tmp/ended) >/dev/null 2>&1 & true")
    g.sh("until [ -s /tmp/inside ]; do sleep 0.1; done")
    assert g.sh("head -c 4 /proc/vmcore | od -An -tx1").split() == ["7f", "45", "4c", "46"]
    g.sh("touch /tmp/go; until [ -e /tmp/ended ]; do sleep 0.1; done")
    assert g.sh("ls /run /tmp /dev | grep -c '^oldmem' || true").strip() == "0"


def test_collector_whose_oldmem_is_killed_ends_with_an_error_and_not_with_zeros(
    crashed_guest: MakeCrashedGuest,
) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=resize)
    # the reader of the pipe holds the collector up until oldmem has been killed
    hold, rest = "dd bs=1 count=4096 of=/tmp/first; until [ -e /tmp/go ]; do sleep 1; done", "cat >/dev/scratch; sync"
    reader = f"({hold}; {rest}; echo >/tmp/done) >/dev/null 2>&1"
    g.sh(f"oldmem run -q -- dd-dynamic if=/proc/vmcore bs=1M 2>/tmp/said | {reader} & true")
    g.sh("until [ -s /tmp/first ]; do sleep 1; done; kill -9 $(pidof oldmem); touch /tmp/go")
    g.sh("until [ -s /tmp/done ]; do sleep 1; done")
    said = g.sh("cat /tmp/said")
    assert "Input/output error" in said
    size = next(int(line.split()[0]) for line in said.splitlines() if " bytes " in line) - 4096
    assert 0 < size < int(g.sh("stat -c %s /proc/vmcore"))
    assert populated(g) == 0
    with open(g.scratch, "rb") as file:
        got = hashlib.sha256(file.read(size)).hexdigest()
    g.sh("oldmem init -q")
    assert g.sh(f"tail -c +4097 /proc/vmcore | head -c {size} | sha256sum").split()[0] == got
