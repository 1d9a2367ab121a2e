# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is mounted where, by lists as the kernel writes them (fs/proc_namespace.c:show_mountinfo())."""

from __future__ import annotations

from pathlib import Path

import pytest

from capture import mounts
from guard.errors import Error

INITRAMFS = "1 1 0:2 / / rw - rootfs rootfs rw"  # on itself, as mnt_alloc_vfsmnt() leaves it
ROOT = "30 29 8:1 / / rw - ext4 /dev/sda1 rw"  # on one that is not listed


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mounts, "_LIST", str(tmp_path / "mountinfo"))
    return tmp_path / "mountinfo"


@pytest.mark.parametrize("root", [INITRAMFS, ROOT])
def test_mounts_that_a_path_leads_through_are_told_and_hidden_ones_are_not(root: str, listed: Path) -> None:
    number = root.split()[0]
    lines = [
        root,
        f"31 {number} 0:20 / /no-run rw - tmpfs run rw",
        "32 31 0:21 / /no-run/old\\040mem ro - fuse.oldmem first ro",
        "33 32 0:22 / /no-run/old\\040mem ro shared:1 - fuse.oldmem second ro",
    ]
    listed.write_text("\n".join(lines) + "\n")
    assert [m.source for m in mounts.mounts_on("/no-run/old mem")] == ["first", "second"]
    assert [m.source for m in mounts.mounts_on("/no-run")] == ["run"]
    assert mounts.mounts_on("/no-run/old") == mounts.mounts_on("/") == []
    listed.write_text("\n".join([*lines, "34 31 0:23 / /no-run rw - tmpfs above rw"]) + "\n")
    assert mounts.mounts_on("/no-run/old mem") == []
    assert [m.source for m in mounts.mounts_on("/no-run")] == ["run", "above"]


def test_root_that_is_no_mount_takes_the_list_as_it_is(listed: Path) -> None:
    listed.write_text("41 40 0:21 / /no-run/x ro - fuse.oldmem first ro\n")
    assert [m.source for m in mounts.mounts_on("/no-run/x")] == ["first"]


def test_list_that_is_not_there_is_one_line(listed: Path) -> None:
    with pytest.raises(Error, match=r"mountinfo: No such file or directory: nothing tells what is mounted$"):
        mounts.mounts_on("/no-run")
