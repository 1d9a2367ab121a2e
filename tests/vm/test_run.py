# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collectors with the vmcore inside their own process, in a real capture kernel: what they get, and what they cannot
get past the library."""

from __future__ import annotations

import hashlib
import os

import pytest

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


def test_program_that_takes_no_library_gets_the_same_and_nobody_else_notices(crashed_guest: MakeCrashedGuest) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=resize)
    # a static shell, what is built into it, and a descriptor that a program inherits
    ways = (
        "dd-dynamic if=/proc/vmcore bs=1M 2>/dev/null",
        "cat /proc/vmcore",
        "cat </proc/vmcore",
        "cat /proc/self/fd/0 </proc/vmcore",
    )
    script = "; ".join(f"{way} | sha256sum" for way in ways)
    sums = [line.split()[0] for line in g.sh(f"oldmem run -q -- sh -c '{script}'", timeout=300).splitlines()]
    assert len(sums) == len(ways)
    assert len(set(sums)) == 1
    assert populated(g) == 0
    # meanwhile and afterwards the kernel's own file is where it was
    g.sh("mkfifo /tmp/up /tmp/end")
    hold = "dd-dynamic if=/proc/vmcore bs=1 count=1 of=/dev/null 2>/dev/null && echo >/tmp/up && read x </tmp/end"
    g.sh(f"(oldmem run -q -- sh -c '{hold}'; echo >/tmp/up) & read x </tmp/up")
    assert g.sh("grep -c oldmem /proc/mounts || true").strip() == "0"
    g.sh("echo >/tmp/end; read x </tmp/up")
    assert g.sh("ls /run /tmp /dev | grep -c '^oldmem' || true").strip() == "0"
    g.sh("oldmem init -q")
    assert g.sh("cat /proc/vmcore | sha256sum", timeout=300).split()[0] == sums[0]


@pytest.mark.parametrize("killed", ["oldmem run", "all of oldmem"])
def test_collector_whose_oldmem_is_killed_gets_its_bytes_or_an_error(
    crashed_guest: MakeCrashedGuest, killed: str
) -> None:
    g = crashed_guest(devices=DEVICES, load="c", after_load=resize)
    # the reader of the pipe holds the collector up until oldmem has been killed
    hold, rest = (
        "dd bs=1 count=4096 of=/tmp/first; until [ -e /tmp/go ]; do sleep 1; done",
        "tee /dev/scratch | wc -c >/tmp/size; sync",
    )
    reader = f"({hold}; {rest}; echo >/tmp/done) >/dev/null 2>&1"
    g.sh(f"(oldmem run -q -- dd-dynamic if=/proc/vmcore bs=1M 2>/tmp/said; true) | {reader} & true")
    g.sh("until [ -s /tmp/first ]; do sleep 1; done")
    first = "$(pidof oldmem | tr ' ' '\\n' | sort -n | head -n 1)"  # its servers came later
    g.sh(f"kill -9 {first if killed == 'oldmem run' else '$(pidof oldmem)'}; touch /tmp/go")
    g.sh("until [ -s /tmp/done ]; do sleep 1; done", timeout=300)
    said = g.sh("cat /tmp/said")
    size = int(g.sh("cat /tmp/size"))
    g.sh("oldmem init -q")
    whole = int(g.sh("stat -c %s /proc/vmcore")) - 4096
    if killed == "oldmem run":
        assert size == whole, said
    else:
        assert "error reading '/proc/vmcore'" in said
        assert 0 < size < whole
    assert populated(g) == 0
    with open(g.scratch, "rb") as file:
        got = hashlib.sha256(file.read(size)).hexdigest()
    assert g.sh(f"tail -c +4097 /proc/vmcore | head -c {size} | sha256sum", timeout=300).split()[0] == got
