# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m tests.ddump [GENERATION...]``: crashes a guest with each kernel of :data:`kernel.SUITES`, and has a
driver add device dumps to /proc/vmcore while oldmem serves. What is served must stay the same, byte for
byte, the driver must not be refused, and the dump must be told. Exit status: 0 all as it must be, 1 not."""

from __future__ import annotations

import argparse
import json
import sys
import time
from subprocess import SubprocessError

from guard.errors import Error
from tests.ddump import kernel
from tests.vm.harness import ConsoleError, FetchError, Guest, GuestError, MiB, QemuError, QmpError, missing

FAULTS = (Error, FetchError, QemuError, QmpError, GuestError, ConsoleError, OSError, SubprocessError)
SLOW = 600  # seconds for a pass over all of the vmcore
DUMP = 20_000  # bytes
ON_DISK = 20_480  # what the kernel makes of it: 64 bytes of header, whole pages
ADD = f"echo {DUMP} > /sys/module/ddump/parameters/add"
DIRECT = "/run/oldmem/vmcore.direct"  # not cached: what is read comes from the server
FIELD = "dd if={} bs=8 skip={} count=1 2>/dev/null | od -An -tu8"
NOTE_SIZE, MEMORY = 12, 16  # in units of 8 bytes: p_filesz of the first program header, p_offset of the second


class DumpGuest(Guest):
    modules = ("ddump",)


class Failure(Exception):
    """What is not as it must be."""


def expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise Failure(f"{what}: {found}, expected {expected}")


def field(g: Guest, at: int, file: str = "/proc/vmcore") -> int:
    return int(g.sh(FIELD.format(file, at)))


def memory_size(g: Guest) -> int:
    return int(g.sh("stat -c %s /proc/vmcore")) - field(g, MEMORY)


def digest(g: Guest, file: str, start: int, size: int) -> str:
    """SHA-256 of *size* bytes of *file* from *start* on. By large requests: dd makes them."""
    pipe = f"dd if={file} bs=1M 2>/dev/null | head -c {start + size} | tail -c +{start + 1} | sha256sum"
    return g.sh(pipe, timeout=SLOW).split()[0]


def served(g: Guest, source: str) -> str:
    """What oldmem serves from *source* stays the same while dumps are added; it is left serving. SHA-256 of the memory
    in it."""
    g.sh(f"oldmem init -q --source {source}", timeout=SLOW)
    memory = digest(g, DIRECT, field(g, MEMORY), memory_size(g))
    header = digest(g, DIRECT, 0, field(g, MEMORY))
    for count in (1, 2):
        status, said = g.run(ADD)
        expect(status, 0, f"status of adding a device dump while oldmem serves from {source} ({said.strip()})")
        found = digest(g, DIRECT, field(g, MEMORY), memory_size(g))
        expect(found, memory, f"SHA-256 of the memory from {source} after dump {count}")
        expect(digest(g, DIRECT, 0, field(g, MEMORY)), header, f"SHA-256 of the header after dump {count}")
    report = json.loads(g.sh("cat /run/oldmem/guard.json"))
    expect(report["unreadable"], [], f"faults from {source}")
    late = f"/proc/vmcore: {2 * ON_DISK} bytes of device dumps were added too late for this vmcore"
    expect(report["late_dumps"], [late], f"late dumps with {source}")
    return memory


def held_open(g: Guest) -> int:
    """The control: the status of adding a dump while somebody has /proc/vmcore open."""
    return g.run(f"exec 4< /proc/vmcore; {ADD}; status=$?; exec 4<&-; (exit $status)")[0]


def run(generation: str) -> list[str]:
    """What was seen, a line each. Raises Failure."""
    built = kernel.kernel(generation)
    lines = [f"kernel {built.release}"]
    with DumpGuest(built, memory=384 * MiB, crashkernel="160M", smp=1) as g:
        g.load()
        g.crash()
        g.sh("modprobe ddump")
        sums = set()
        size = field(g, NOTE_SIZE)
        for source in ("auto", "vmcore"):
            sums.add(served(g, source))
            size_of_memory = memory_size(g)
            g.sh("umount /proc/vmcore /run/oldmem")
            size += 2 * ON_DISK
            expect(field(g, NOTE_SIZE), size, "the kernel's own PT_NOTE")
            lines.append(f"--source {source}: two dumps added, the same bytes served, both told")
        expect(len(sums), 1, "kinds of memory by different sources")
        # the dumps are there from the start now, and in the collector's process offsets are the new ones
        g.sh("oldmem run -q --source vmcore -- cp-dynamic /proc/vmcore /dev/scratch", timeout=SLOW)
        copied = digest(g, "/dev/scratch", field(g, MEMORY, "/dev/scratch"), size_of_memory)
        expect({copied}, sums, "SHA-256 of the memory that a collector inside copied")
        lines.append("oldmem run: the same memory")
        status = held_open(g)
        lines.append(f"control, /proc/vmcore held open: a dump is {'refused' if status else 'added'}")
        expect(bool(status), generation != "6.12", "a dump is refused while /proc/vmcore is open")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ddump", description="Device dumps that come late.")
    parser.add_argument("names", metavar="GENERATION", nargs="*", help=", ".join(kernel.SUITES))
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in kernel.SUITES]:
        parser.error(f"no such kernel: {', '.join(unknown)}")
    if reason := missing() or kernel.missing():
        print(f"ddump: {reason}", file=sys.stderr)
        return 1
    good = True
    for name in args.names or kernel.SUITES:
        start = time.monotonic()
        try:
            for line in run(name):
                print(f"{name}: {line}", flush=True)
        except (Failure, *FAULTS) as error:
            print(f"{name}: FAILED: {error}", flush=True)
            good = False
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
