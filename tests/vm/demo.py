# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make demo``: a guest dies with memory that its loaded kdump header does not know of, and is captured all the same.

Everything printed is measured in this run: sizes by the guest's own tools, host memory by the RAM files' blocks."""

from __future__ import annotations

import json
import re
import sys
import time

from capture.report import bytes_text, table
from guard.errors import Error
from tests.vm.harness import ConsoleError, Device, FetchError, Guest, GuestError, MiB, QemuError, missing, prefetch

DEVICES = (Device("vm0", 1024 * MiB, 256 * MiB), Device("vm1", 512 * MiB, 256 * MiB, block_size=4 * MiB))
LOG_LINES = 5


class Story:
    """Prints what happens, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def tell(self, line: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {line}", flush=True)


def touched(g: Guest) -> int:
    """Bytes of host memory behind unplugged blocks of the devices."""
    return sum(g.allocated(name) - plugged.size for name, plugged in g.plug_truth().items())


def sizes(g: Guest) -> str:
    return ", ".join(f"{name} {bytes_text(plugged.size)}" for name, plugged in g.plug_truth().items())


def capture(g: Guest, story: Story) -> str:
    """In the capture kernel: what the stale header has wrong, then a dump through the guard. Returns the result."""
    compared = g.sh("oldmem map -q --compare")
    story.tell("oldmem map --compare:")
    print(compared, end="")
    story.tell("oldmem init: " + g.sh("oldmem init").strip().removeprefix("oldmem: "))
    story.tell("makedumpfile -F -l -d 31 /proc/vmcore, unmodified, through the guard")
    before = time.monotonic()
    saved = int(g.sh("makedumpfile -F -l -d 31 /proc/vmcore 2>/dev/null | tee /dev/scratch | wc -c", timeout=200))
    seconds = time.monotonic() - before
    report = json.loads(g.sh("cat /run/oldmem/guard.json"))
    size = int(g.sh("stat -c %s /proc/vmcore"))
    g.sh("makedumpfile --dump-dmesg /proc/vmcore /tmp/dmesg >/dev/null 2>&1")
    crash = [line for line in g.sh("cat /tmp/dmesg").splitlines() if line]
    clean = touched(g)
    g.sh("umount /proc/vmcore /run/oldmem")
    story.tell("the same machine once more without the guard: cp /proc/vmcore /dev/null")
    g.sh("cp /proc/vmcore /dev/null", timeout=200)
    refused = [r for r in report["rules"] if r["refused_bytes"] and r["name"].startswith("virtio-mem")]
    missing, excess = re.search(r"misses (\S+) and has (\S+) too much", compared).groups()  # type: ignore[union-attr]
    rows = [
        ("the stale header would have lost", missing),
        ("and has too much", excess),
        ("oldmem's vmcore has", f"{bytes_text(size)}, dumped with -d 31 to {bytes_text(saved)} in {seconds:.0f} s"),
        *((f"the guard refuses of {r['name']}", f"{bytes_text(r['refused_bytes'])} ({r['reason']})") for r in refused),
        ("unplugged host memory touched by that", f"{bytes_text(clean)} bytes"),
        ("  and by cp without the guard", bytes_text(touched(g))),
    ]
    ends = [line for line in crash if "Trigger a crash" in line or "Kernel panic" in line]
    log = ["the dead kernel's log:", *crash[:LOG_LINES], "...", *ends]
    return table(rows) + "\n".join("  " * (i > 0) + line[:110] for i, line in enumerate(log))


def main() -> int:
    if reason := missing():
        print(f"demo: {reason}; `make deps` installs what is needed", file=sys.stderr)
        return 1
    try:
        prefetch()
        story = Story()
        with Guest("6.12", devices=DEVICES) as g:
            story.tell(f"guest up: Linux {g.kernel.release}, 768M boot RAM, virtio-mem {sizes(g)}")
            g.load("c")
            story.tell("kdump loaded with kexec -c -p: from now on its header is what it is")
            g.resize("vm0", 480 * MiB)
            g.resize("vm1", 64 * MiB)
            story.tell(f"memory added and removed: virtio-mem {sizes(g)}")
            g.crash()
            story.tell("crashed; the capture kernel is up in crashkernel=192M")
            result = capture(g, story)
        story.tell("done")
        print("\n" + result)
    except (Error, FetchError, QemuError, GuestError, ConsoleError) as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
