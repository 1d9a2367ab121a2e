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
    g.sh(
        "oldmem run -q -- sh -c 'dd-dynamic if=/proc/vmcore bs=1 count=1 of=/dev/null && sleep 5' 2>/dev/null & sleep 3"
    )
    assert g.sh("head -c 4 /proc/vmcore | od -An -tx1").split() == ["7f", "45", "4c", "46"]
    g.sh("wait; sleep 5")
    assert g.sh("ls /run /tmp /dev | grep -c '^oldmem' || true").strip() == "0"


def test_killed_oldmem_leaves_no_half_gated_collector(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=resize)
    g.sh("oldmem run -q -- dd-dynamic if=/proc/vmcore of=/tmp/out bs=64k >/tmp/said 2>&1 & sleep 4; true")
    g.sh(
        "kill -9 $(pidof oldmem); i=0; while pidof dd-dynamic && [ $i -lt 60 ]; do sleep 1; i=$((i+1)); done",
        timeout=120,
    )
    # whichever way it ended, what it wrote is what is served, as far as it came, and nothing unplugged was touched
    assert populated(g) == 0
    size = int(g.sh("stat -c %s /tmp/out"))
    assert size > 0
    g.sh("oldmem init -q")
    assert g.sh(f"head -c {size} /tmp/out | sha256sum") == g.sh(f"head -c {size} /proc/vmcore | sha256sum")
