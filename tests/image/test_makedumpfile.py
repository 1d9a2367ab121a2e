# SPDX-License-Identifier: LGPL-2.1-or-later
"""`oldmem check` on what makedumpfile itself makes of a vmcore of ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.image.machines import oldmem

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("makedumpfile"), reason="no makedumpfile"),
]


@pytest.fixture(scope="module")
def vmcore(field_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vmcore") / "vmcore"
    assert oldmem("save", "-q", "--machine", field_base, "-o", out).status == 4
    return out


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["-E"], None),
        (["-l"], "kdump-compressed"),
        (["-c"], "kdump-compressed"),
        (["-F", "-l"], "flattened"),
        (["-F", "-E"], "flattened"),
    ],
)
def test_file_of_makedumpfile_is_sound_and_named(
    vmcore: Path, tmp_path: Path, options: list[str], kind: str | None
) -> None:
    to = tmp_path / "made"
    command = ["makedumpfile", *options, "-d", "31", str(vmcore)]
    if "-F" in options:
        with to.open("wb") as stream:
            subprocess.run(command, check=True, stdout=stream, stderr=subprocess.DEVNULL, timeout=200)
    else:
        subprocess.run(
            [*command, str(to)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=200
        )
    result = oldmem("check", to)
    assert result.status == 0
    assert "WRONG" not in result.out
    assert len(result.lines) == (0 if kind is None else 1)
    assert all(kind in line for line in result.lines if kind)
    with to.open("r+b") as stream:
        stream.truncate(to.stat().st_size * 3 // 4)
    assert oldmem("check", to).status == 1
