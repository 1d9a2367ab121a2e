# SPDX-License-Identifier: LGPL-2.1-or-later
"""oldmem inside a real s390x capture kernel: what it serves over /proc/vmcore is what the kernel made."""

from __future__ import annotations

import shlex
import shutil
import time

from guard import procvmcore
from tests.s390x.compare import Verdict, sha256
from tests.s390x.guest import Guest
from tests.s390x.run import COPY_TIMEOUT, copy, folder_of
from tests.vm.harness import GuestError, MiB

COPY = "dd if=/proc/vmcore of=/dev/scratch bs=1M 2>/dev/null && sync && stat -c %s /proc/vmcore"
DUMP = "makedumpfile -F -l -d 31 /proc/vmcore 2>&1 >/dev/null"


def run() -> Verdict:
    """Raises FetchError, QemuError, GuestError or ConsoleError."""
    folder = folder_of("live")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kernels, served = folder / "vmcore", folder / "served"
    with Guest("7.2", "7.2", memory=640 * MiB, crashkernel="128M", smp=2, to_capture="oldmem") as g:
        (folder / "cmd.txt").write_text(shlex.join(g.command) + "\n")
        try:
            g.load("s")
            g.crash()
            copy(g.scratch, kernels, int(g.sh(COPY, COPY_TIMEOUT)))
            start = time.monotonic()
            said = g.sh("oldmem init")
            seconds = time.monotonic() - start
            (folder / "oldmem.log").write_text(said + g.sh("cat /run/oldmem/map.json /run/oldmem/guard.json"))
            if "/proc/vmcore" not in g.sh("cat /proc/mounts"):
                raise GuestError("oldmem init has mounted nothing over /proc/vmcore")
            copy(g.scratch, served, int(g.sh(COPY, COPY_TIMEOUT)))
            status, output = g.run(DUMP, COPY_TIMEOUT)
        finally:
            (folder / "console.log").write_text(g.console)
    with open(kernels, "rb") as file, open(served, "rb") as other:
        size = procvmcore.read_header(file.fileno(), str(kernels)).size
        header = file.read(size) == other.read(size)
    readers = (f"makedumpfile: status {status}: {output}",) if status else ()
    warnings = tuple(line for line in said.splitlines() if "warning" in line)
    return Verdict(header, sha256(kernels) == sha256(served), readers, warnings, seconds)
