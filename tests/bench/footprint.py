# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the capture path costs before it does anything: import time and memory against a bare interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import NamedTuple

# user and system time in milliseconds (not wall: other processes run), peak memory in KiB
PROBE = """
import resource, sys
{work}
usage = resource.getrusage(resource.RUSAGE_SELF)
print(usage.ru_utime * 1000 + usage.ru_stime * 1000)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


class Footprint(NamedTuple):
    """Over the bare interpreter: CPU milliseconds and peak KiB."""

    cpu_ms: float
    rss_kib: int


def _run(interpreter: str, work: str) -> tuple[float, int]:
    out = subprocess.run(
        [interpreter, "-c", PROBE.format(work=work)], check=True, capture_output=True, text=True, timeout=60
    ).stdout.split()
    return float(out[0]), int(out[1])


def footprint(work: str, runs: int = 7, interpreter: str = sys.executable) -> Footprint:
    """Medians of *runs* pairs, bare and with *work*, in turn."""
    bare, full = [], []
    for _ in range(runs):
        bare.append(_run(interpreter, ""))
        full.append(_run(interpreter, work))
    cpu = statistics.median(f[0] for f in full) - statistics.median(b[0] for b in bare)
    rss = statistics.median(f[1] for f in full) - statistics.median(b[1] for b in bare)
    return Footprint(cpu, int(rss))
