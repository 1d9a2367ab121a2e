# SPDX-License-Identifier: LGPL-2.1-or-later
"""Headers of real s390x crashes: rebuilt from the pages of old memory alone, byte for byte what the capture kernel of
that very crash built. No word about the machine is given that its image can tell."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.image import s390x_fixtures
from tests.image.machines import oldmem


def header_of(name: str, folder: Path, *arguments: str) -> bytes:
    s390x_fixtures.expand(name, folder)
    recorded = (folder / s390x_fixtures.MACHINE).exists()
    machine = ("--machine", folder) if recorded else ("--image", folder / "ram.raw")
    result = oldmem("header", *machine, "--layout", "kernel", *arguments, "-o", folder / "built")
    assert (result.status, result.lines) == (0, [])
    return (folder / "built").read_bytes()


@pytest.mark.parametrize("name", s390x_fixtures.names())
def test_header_is_what_the_real_capture_kernel_built(name: str, tmp_path: Path) -> None:
    built = header_of(name, tmp_path)
    real = (tmp_path / "header").read_bytes()
    assert built == real[: len(built)]
    assert not real[len(built) :].strip(b"\0")


def test_there_is_a_real_header_for_each_way_to_crash() -> None:
    wanted = {"smp1", "smp2", "smp3", "offline", "crash-on-cpu1", "vx-off", "nokaslr", "kaslr-identity", "load-c"}
    wanted |= {"vmem-ccw", "vmem-pci", "vmem-shrunk", "vmem-two"}
    wanted |= {"6.1-crashed-7.2-capturing", "7.2-crashed-6.1-capturing", "6.1-both"}
    assert wanted <= set(s390x_fixtures.names())


def test_readelf_accepts_the_header_as_it_accepts_the_real_one(tmp_path: Path) -> None:
    built = header_of("vmem-two", tmp_path)
    (tmp_path / "real").write_bytes((tmp_path / "header").read_bytes()[: len(built)])
    shown = []
    for name in ("built", "real"):
        done = subprocess.run(["readelf", "-lnW", name], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        shown.append((done.stdout, done.stderr))
    assert shown[0] == shown[1]
    assert "NT_S390_VXRS_HIGH" in shown[0][0]
