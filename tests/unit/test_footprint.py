# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory budgets of docs/design.md. Time is for ``make bench`` to tell; a test must not depend on it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

from tests.bench.footprint import footprint

MiB = 1 << 20

# A virtio-mem device of 2 TiB with every other block plugged, put in place of the recorded one. Prints the peak in KiB.
SHOW = """
import sys
from capture.dump import Dump
from capture.init import texts
from capture.image_machine import ImageMachine
from capture.recorded import load
from capture.memory_map import Device
from guard.ranges import Range
machine = ImageMachine(load(sys.argv[1]))
blocks = int(sys.argv[2])
if blocks:
    region = Range(1 << 40, (1 << 40) + (blocks << 21))
    machine.devices = [Device("large", region, region.size, 1 << 21, 0, 0, 0, b"\\x55" * (blocks // 8), "made up")]
dump = Dump(machine)
for make in texts(dump).values():
    make()
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def test_importing_guard_takes_at_most_3_mb() -> None:
    assert footprint("import guard", runs=3).rss_kib <= 3 * 1024


def test_importing_guard_takes_nothing_but_the_standard_library_and_cffis_backend() -> None:
    work = "import guard, sys; print(sorted({n.partition('.')[0] for n in sys.modules} - sys.stdlib_module_names))"
    out = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, timeout=60, check=True).stdout
    names = {n for n in ast.literal_eval(out) if not n.startswith(("__editable__", "_distutils_hack", "sitecustomize"))}
    assert names <= {"guard", "_cffi_backend", "__main__", "_virtualenv"}


def test_memory_does_not_grow_with_a_machine_in_half_a_million_pieces(tmp_path: Path) -> None:
    (tmp_path / "root/proc").mkdir(parents=True)
    (tmp_path / "root/proc/iomem").write_text("00001000-0009fbff : System RAM\n01000000-017fffff : System RAM\n")
    with open(tmp_path / "ram.raw", "wb") as image:
        image.truncate(64 * MiB)
    ram = [{"image": "ram.raw", "offset": 0, "paddr": 0, "size": 64 * MiB}]
    (tmp_path / "machine.json").write_text(json.dumps({"format": 1, "arch": "x86_64", "ram": ram, "virtio_mem": []}))

    def peak(blocks: int) -> int:
        command = [sys.executable, "-c", SHOW, str(tmp_path), str(blocks)]
        return int(subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout)

    assert peak(1 << 20) - peak(0) <= 8 * 1024
