# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which files a command finds ours over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capture import run


def machine(live: bool) -> Any:
    """Of a kernel's vmcore whose header this parser refuses: there is no descriptor of it."""
    return SimpleNamespace(machine=SimpleNamespace(live=live, core_fd=None, core_header=None))


def test_kernels_vmcore_is_covered_in_each_procfs_whatever_is_made_of_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("proc", "sysroot/proc", "old/proc"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("proc", "sysroot/proc"):
        (tmp_path / name / "vmcore").touch()
    points = [str(tmp_path / name) for name in ("proc", "sysroot/proc", "old/proc")]
    monkeypatch.setattr(run, "mount_points", lambda kind: points if kind == "proc" else [])
    assert list(run._kernels(machine(live=True))) == [f"{tmp_path}/proc/vmcore", f"{tmp_path}/sysroot/proc/vmcore"]


def test_no_kernels_file_is_covered_for_a_recorded_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "mount_points", lambda kind: ["/"])
    assert list(run._kernels(machine(live=False))) == []
