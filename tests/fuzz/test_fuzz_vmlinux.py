# SPDX-License-Identifier: LGPL-2.1-or-later
"""A vmlinux that is cut anywhere, or damaged at random: no errors but our own, when opened and when used."""

from __future__ import annotations

import random
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.errors import Error
from guard.witness.made_note import complete, open_vmlinux
from guard.witness.memory import Problems
from tests.fuzz.changing import ends
from tests.unit import made_elf
from tests.unit.test_witness_vmlinux import BANNER, SOURCE, Dying


class Kernel:
    """The kernel of the vmlinux *data*, which begins to be of types at *types*; *path* is where to put what is made of
    it."""

    def __init__(self, kernel: Dying, path: Path, data: bytes, types: int) -> None:
        self.kernel, self.path, self.sound, self.types = kernel, path, data, types


def debug_sections(folder: Path, version: str) -> list[made_elf.Section]:
    (folder / "kernel").mkdir()
    (folder / "kernel/crash_core.c").write_text(SOURCE)
    command = ["cc", "-g", f"-gdwarf-{version}", "kernel/crash_core.c", "-o", "program"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    with (folder / "program").open("rb") as stream:
        sections = [s for s in ELFFile(stream).iter_sections() if s.name.startswith(".debug")]
        return [made_elf.Section(s.name, made_elf.PROGBITS, s.data()) for s in sections]


@pytest.fixture(scope="module", params=["btf", "4", "5"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    folder = tmp_path_factory.mktemp("vmlinux")
    kernel = Dying()
    kernel.finish()
    if request.param == "btf":
        data = kernel.vmlinux()
        return Kernel(kernel, folder / "vmlinux", data, data.index(b"\x9f\xeb\x01"))
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    symbols = kernel.linked()
    at = next(address for _, name, address in symbols if name == "linux_banner")
    debug = debug_sections(folder, request.param)
    data = made_elf.vmlinux(symbols, (at, BANNER), more=debug)
    return Kernel(kernel, folder / "vmlinux", data, data.index(debug[0].data))


def used(made: Kernel, data: bytes) -> list[str]:
    """The lines on what became of it; none where it was refused."""
    made.path.write_bytes(data)
    problems = Problems()
    with ends(), suppress(Error):
        complete(open_vmlinux(str(made.path)), None, made.kernel.mem, made.kernel.ram, problems)
    assert all("\n" not in line for line in problems)
    return problems


def damaged(data: bytes, start: int, seed: int) -> bytes:
    chance, new = random.Random(seed), bytearray(data)
    for _ in range(chance.choice((1, 2, 8, 64))):
        at = chance.randrange(start, len(data))
        new[at] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256), new[at] ^ 1 << chance.randrange(8)))
    if chance.randrange(4) == 0:
        del new[chance.randrange(start, len(data)) :]
    return bytes(new)


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=400)
@given(seed=st.integers(0, (1 << 32) - 1), types=st.booleans())
def test_damaged_vmlinux(made: Kernel, seed: int, types: bool) -> None:
    used(made, damaged(made.sound, made.types if types else 0, seed))


def test_sound_vmlinux_passes_the_same_check(made: Kernel) -> None:
    (line,) = used(made, made.sound)
    assert line.startswith("VMCOREINFO is made from ")
