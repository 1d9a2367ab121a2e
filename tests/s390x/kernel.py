# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels that die and that capture, built from Debian's source packages: Debian's own ones for s390x have no kexec.

One configuration serves all (kernel.config, over allnoconfig). One edit is made: TCG has the random number generator
PRNO-TRNG but not the KMC-PRNG that arch/s390/boot/kaslr.c insists on, so KASLR would never be on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.s390x import pieces
from tests.vm.harness import FetchError
from tests.vm.harness.apt import unpack

SOURCES = {"6.1": "bookworm", "7.2": "sid"}
"""Versions, as Debian names its packages linux-source-VERSION, and the suites that have them."""

CONFIG = Path(__file__).with_name("kernel.config")
KASLR = "arch/s390/boot/kaslr.c"
BEFORE = "static int check_prng(void)\n{\n"
AFTER = f"{BEFORE}\tif (cpacf_query_func(CPACF_PRNO, CPACF_PRNO_TRNG))\n\t\treturn PRNG_MODE_TRNG;\n"
IMAGE = "arch/s390/boot/bzImage"
HOUR = 3600


def build(version: str) -> Path:
    """The bzImage of *version*, a key of :data:`SOURCES`; built if it is not there. Raises FetchError."""
    how = pieces.digest((CONFIG.read_bytes(), AFTER))
    return pieces.store().piece(f"kernel-{version}-{how}", lambda into: _build(version, into)) / "bzImage"


def _build(version: str, into: Path) -> None:
    work = into / "work"
    package = f"linux-source-{version}"
    unpack(pieces.store().suite(SOURCES[version]).download([package]), work / "package")
    _run(["tar", "-C", work, "-xf", work / f"package/usr/src/{package}.tar.xz"], into)
    source = work / package
    _enable_kaslr(source / KASLR)
    make: list[str | Path] = ["make", "-C", source, f"O={work}/out", f"-j{os.cpu_count()}"]
    _run([*make, f"KCONFIG_ALLCONFIG={CONFIG}", "allnoconfig"], into)
    _check_config(work / "out/.config")
    _run([*make, "bzImage"], into)
    (work / "out" / IMAGE).rename(into / "bzImage")
    (work / "out/.config").rename(into / "config")
    shutil.rmtree(work)


def _enable_kaslr(file: Path) -> None:
    text = file.read_text()
    if BEFORE not in text:
        raise FetchError(f"{KASLR}: no check_prng() to edit")
    file.write_text(text.replace(BEFORE, AFTER))


def _check_config(made: Path) -> None:
    """Kconfig drops what depends on what is not there without a word; what some version does not know is no matter."""
    lines = set(made.read_text().splitlines())
    for needed in ("CONFIG_PROC_VMCORE=y", "CONFIG_KEXEC_FILE=y", "CONFIG_VIRTIO_BLK=y", "CONFIG_FUSE_FS=y"):
        if needed not in lines:
            raise FetchError(f"{CONFIG.name}: {needed} did not come through")


def _run(command: list[str | Path], folder: Path) -> None:
    log = folder / "build.log"
    with open(log, "ab") as output:
        done = subprocess.run(
            command, env=pieces.tools_environment(), stdout=output, stderr=output, timeout=2 * HOUR, check=False
        )
    if done.returncode:
        end = " | ".join(log.read_text(errors="replace").splitlines()[-5:])
        raise FetchError(f"{command[0]} for the s390x kernel: status {done.returncode}: {end[-500:]}")
