# SPDX-License-Identifier: LGPL-2.1-or-later
"""Under CI (``CI=true``) a test must not be skipped for what CI's machine has to have: root, QEMU, FUSE, loop devices
and the tools that ``make deps`` installs. Other skips (no second interpreter, no such kernel feature) stay skips."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.pace import patience

# A shell starts background jobs with SIGINT ignored, and all that they start inherits it; tests send that signal.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# not /root, which is only where something lies
REQUIRED = re.compile(
    r"(?<![\w/])(root|QEMU|FUSE|/dev/fuse|/dev/loop-control|loop devices?"
    r"|no (zstd|cpio|busybox|shellcheck|gcc|C compiler))\b",
    re.IGNORECASE,
)


TIMEOUT, GUEST_TIMEOUT = 300, 1800
"""Seconds of the usual machine after which a test is ended, whatever it waits for: what waits has an end of its own."""


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 64 KiB, or as many as the parameter says."""
    if os.geteuid():
        pytest.skip("needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={getattr(request, 'param', 64)}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


GUESTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vm", "")
LATER_GUESTS = os.path.join(GUESTS, "test_stage2")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Three groups for two processes (make test), given out in this order: what is no guest, a part of the guests, and
    the other part to the process that is done first. A guest keeps one processor busy, and tests that count loop
    devices and mounts are not to meet each other."""
    for item in items:
        path = str(item.path)
        group = "later guests" if path.startswith(LATER_GUESTS) else "guests" if path.startswith(GUESTS) else "others"
        item.add_marker(pytest.mark.xdist_group(group))
        if not (item.get_closest_marker("timeout") or config.getoption("timeout") or config.getini("timeout")):
            item.add_marker(pytest.mark.timeout(patience(TIMEOUT if group == "others" else GUEST_TIMEOUT)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if REQUIRED.search(reason):
            report.outcome = "failed"
            report.longrepr = f"skipped under CI, where it must run: {reason}"
    return report
