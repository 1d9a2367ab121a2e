# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine recorded in the capture kernel, shown on another machine: the same map, header and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vm.conftest import MakeCrashedGuest
from tests.vm.harness import Device, Guest, MiB

DEVICES = (Device("vm0", 1024 * MiB, 256 * MiB), Device("vm1", 512 * MiB, 256 * MiB, block_size=4 * MiB))
IMAGES = {"ram": "ram.raw", "vm0": "vm0.raw", "vm1": "vm1.raw"}


def resize(g: Guest) -> None:
    assert g.resize("vm0", 480 * MiB) == 480 * MiB
    assert g.resize("vm1", 64 * MiB) == 64 * MiB


def oldmem(*arguments: str | Path) -> bytes:
    command = [sys.executable, "-m", "capture", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


@pytest.mark.parametrize("kernel", ["6.12"])
def test_recorded_machine_gives_the_same_map_header_and_bytes(
    crashed_guest: MakeCrashedGuest, tmp_path: Path, kernel: str
) -> None:
    g = crashed_guest(kernel, devices=DEVICES, load="c", after_load=resize)
    g.sh("oldmem record -q /tmp/machine")
    g.sh("mkdir /tmp/minimal && mount -t tmpfs -o size=100% none /tmp/minimal")  # the root has half of little memory
    g.sh("oldmem record -q --minimal /tmp/minimal", timeout=240)
    g.sh("oldmem header -q -o /tmp/cut && oldmem header -q --layout kernel -o /tmp/kernel")
    g.sh("oldmem map -q --json > /tmp/map")
    got = g.get("/tmp/machine", "/tmp/minimal", "/tmp/cut", "/tmp/kernel", "/tmp/map") / "tmp"
    g.sh("umount /tmp/minimal")
    g.sh("oldmem save -q -o /dev/scratch && sync", timeout=200)
    machine = tmp_path / "machine"
    subprocess.run(["cp", "-r", got / "machine", machine], check=True)
    with g.paused():
        for file in {f.path for f in g.ram_files}:
            subprocess.run(["cp", "--sparse=always", file, machine / IMAGES[file.name]], check=True)

    theirs = json.loads((got / "map").read_text())
    for folder in (machine, got / "minimal"):
        assert oldmem("header", "--machine", folder, "-o", "-") == (got / "cut").read_bytes()
        assert oldmem("header", "--machine", folder, "--layout", "kernel", "-o", "-") == (got / "kernel").read_bytes()
        ours = json.loads(oldmem("map", "--machine", folder, "--json"))
        assert ours["readable"] == theirs["readable"]
        assert ours["pt_load"] == theirs["pt_load"]
        spans = [
            [(e["start"], e["end"], e["kind"], bool(e["refused_by"])) for e in m["entries"]] for m in (ours, theirs)
        ]
        assert spans[0] == spans[1]
    # a device has its own name there, and is asked; all else is the same
    assert ours["entries"] == theirs["entries"]
    assert ours["problems"] == [
        line for line in theirs["problems"] if "makedumpfile" not in line
    ]  # which is there alone
    assert ours["envelope_source"] == theirs["envelope_source"]
    assert (got / "minimal/pages.raw").stat().st_blocks * 512 < 64 * MiB

    plain, loop = tmp_path / "plain", tmp_path / "loop"
    oldmem("save", "--machine", machine, "-o", plain)
    oldmem("save", "--machine", machine, "--loop", "-o", loop)
    assert plain.stat().st_size > 1024 * MiB
    size = str(plain.stat().st_size)
    subprocess.run(["cmp", "-n", size, plain, g.scratch], check=True)
    subprocess.run(["cmp", plain, loop], check=True)
