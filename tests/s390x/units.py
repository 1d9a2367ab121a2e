# SPDX-License-Identifier: LGPL-2.1-or-later
"""Those of tests/unit that exercise the C core and the layouts of bytes, on a big-endian machine."""

from __future__ import annotations

from typing import NamedTuple

from tests.s390x import images
from tests.s390x.guest import Guest
from tests.vm.harness import MiB

TESTS = (
    *("ranges", "gate", "compiled", "physmem", "vmcore", "elfcore", "save", "procvmcore"),
    *("witness_lowcore", "witness_os_info"),
)
TIMEOUT = 1200.0
# This kernel has no /proc/self/io, which that test counts reads by
LEFT_OUT = "not over_and_over"
# Emulated, examples take their time, which is no fault of theirs
DRIVER = """\
import sys
import pytest
from hypothesis import HealthCheck, settings
settings.register_profile("slow", deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
settings.load_profile("slow")
options = ["-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-W", "ignore"]
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


class Units(NamedTuple):
    """How it ended: pytest's exit status, and what it said."""

    status: int
    output: str

    @property
    def good(self) -> bool:
        return self.status == 0

    @property
    def cells(self) -> tuple[str, ...]:
        return ("-", "-", "-", "-", "-")

    @property
    def lines(self) -> tuple[str, ...]:
        """pytest's last line, or all if something failed."""
        lines = tuple(self.output.splitlines())
        return lines[-1:] if self.good else lines


def run() -> Units:
    """Raises FetchError, QemuError, GuestError or ConsoleError."""
    files = " ".join(f"tests/unit/test_{name}.py" for name in TESTS)
    with Guest("7.2", "7.2", memory=1024 * MiB, crashkernel="64M", smp=1, contents="tests") as g:
        g.put({"/tmp/driver.py": DRIVER.encode()})
        return Units(*g.run(f"cd {images.SOURCE} && python3 /tmp/driver.py -k '{LEFT_OUT}' {files}", TIMEOUT))
