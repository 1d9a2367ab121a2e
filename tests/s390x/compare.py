# SPDX-License-Identifier: LGPL-2.1-or-later
"""The vmcore that oldmem builds from a run's memory against the one that its capture kernel made."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from drgn import Program

from capture.check import check
from guard.errors import Error
from guard.procvmcore import PT_LOAD, read_header
from tests.pace import patience
from tests.vm.harness.cache import ROOT

TIMEOUT = 300
CHUNK = 1 << 20
SAMPLE = 4096


class Verdict(NamedTuple):
    """*header*: the header is the kernel's, byte for byte; *whole*: the whole file has the kernel's SHA-256;
    *readers*: which independent readers did not find the same in both; *warnings*: what oldmem said; *seconds*: that
    building the header took."""

    header: bool
    whole: bool
    readers: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float

    @property
    def good(self) -> bool:
        return self.header and self.whole and not self.readers

    @property
    def cells(self) -> tuple[str, ...]:
        """What the table says: header, vmcore, readers, warnings, seconds."""
        same = ["identical" if same else "DIFFERS" for same in (self.header, self.whole)]
        return (*same, "DIFFER" if self.readers else "agree", str(len(self.warnings)), f"{self.seconds:.2f}")

    @property
    def lines(self) -> tuple[str, ...]:
        """What deserves more words."""
        return self.readers + self.warnings


def compare(folder: Path) -> Verdict:
    """Compares what is in the folder of a run. Nothing is told to oldmem but where the memory is."""
    told: list[str | Path] = (
        ["--machine", folder] if (folder / "machine.json").exists() else ["--image", folder / "ram.raw"]
    )
    real = folder / "vmcore"
    with tempfile.TemporaryDirectory(dir=folder) as work:
        ours = Path(work) / "vmcore"
        start = time.monotonic()
        said = _oldmem(["header", *told, "--layout", "kernel", "-o", Path(work) / "header"], None)
        seconds = time.monotonic() - start
        header = _content(Path(work) / "header")
        with open(real, "rb") as file:
            same = bool(header) and file.read(len(header)) == header
        with open(ours, "wb") as output:
            _oldmem(["save", "-q", *told, "--layout", "kernel", "-o", "-"], output.fileno())
        whole = sha256(ours) == sha256(real)
        return Verdict(same, whole, _readers(str(ours), str(real)), tuple(said), seconds)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _oldmem(arguments: list[str | Path], output: int | None) -> list[str]:
    """What the command says on standard error, and that it failed if it did."""
    command = [sys.executable, "-m", "capture", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, timeout=patience(TIMEOUT), check=False
    )
    return done.stderr.splitlines() + ([f"exit status {done.returncode}"] if done.returncode else [])


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _readers(ours: str, real: str) -> tuple[str, ...]:
    differ = []
    for name, read in (("readelf", _readelf), ("pyelftools", _pyelftools), ("drgn", _drgn)):
        try:
            same = read(ours) == read(real)
        except Exception as error:  # whatever a reader chokes on is told, and the next one asked
            differ.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if not same:
            differ.append(f"{name} finds differences")
    return tuple(differ)


def _readelf(path: str) -> str:
    return subprocess.run(
        ["readelf", "--wide", "--headers", "--notes", path],
        capture_output=True,
        text=True,
        timeout=patience(TIMEOUT),
        check=True,
    ).stdout


def _pyelftools(path: str) -> list[str]:
    found = check(path)
    if found.wrong:
        raise Error("; ".join(found.wrong))
    return list(found.has)


def _drgn(path: str) -> tuple[str, list[bytes]]:
    """The platform, and the first page of each PT_LOAD by physical address."""
    with open(path, "rb") as file:
        loads = [p for p in read_header(file.fileno(), path).phdrs if p.type == PT_LOAD]
    program = Program()
    program.set_core_dump(path)
    return str(program.platform), [program.read(p.paddr, min(p.memsz, SAMPLE), physical=True) for p in loads]
