# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of a record: all that the sources read, so that they say the same of the copy, and no serial number."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import record_files
from capture.machine import SOURCES
from capture.record_files import nameless
from capture.sources import files, smbios
from capture.sources.report import Problems
from tests.image.machines import RecordedKernel

SECRET = b"S3CR3T"


def structure(kind: int, body: bytes, *strings: bytes) -> bytes:
    text = b"".join(s + b"\0" for s in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), kind << 8) + body + text + b"\0"


ARRAY = structure(19, struct.pack("<IIHBQQ", 0, 0x7FFFF, 0x1000, 1, 0, 0), SECRET)
TABLE = (
    structure(1, b"\1\2\3\4" + SECRET + b"0123456789", b"maker", SECRET, b"more")
    + structure(16, b"\3\3\6\0\0\0\x80\xfe\xff\1\0")
    + structure(17, bytes(20) + b"\1\2\3", b"DIMM 0", SECRET)
    + ARRAY
    + structure(11, b"\1", SECRET)
    + structure(127, b"")
)


def test_serial_numbers_and_strings_are_not_in_what_is_left_of_smbios() -> None:
    left = nameless(TABLE)
    assert SECRET not in left
    assert b"maker" not in left
    assert b"DIMM" not in left
    assert len(left) == len(TABLE)


def test_structures_on_memory_stay_as_they_are() -> None:
    at = TABLE.index(ARRAY)
    assert nameless(TABLE)[at : at + 31] == ARRAY[:31]
    at = TABLE.index(b"\3\3\6\0")
    assert nameless(TABLE)[at : at + 11] == TABLE[at : at + 11]


def said(table: bytes) -> tuple[list[object], list[str]]:
    problems = Problems()
    return list(smbios.parse(table, "DMI", problems)), list(problems.lines())


tables = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.one_of(
            st.builds(structure, st.sampled_from([0, 1, 16, 17, 19, 20, 127]), st.binary(max_size=40), st.just(SECRET)),
            st.binary(max_size=12),
            st.just(ARRAY),
            st.just(ARRAY[:20]),
        ),
        max_size=6,
    ).map(b"".join),
)


@given(tables)
def test_sources_say_the_same_of_smbios_without_names(table: bytes) -> None:
    assert said(nameless(table)) == said(table)
    assert nameless(nameless(table)) == nameless(table)


def _reports(root: Path) -> dict[str, object]:
    found = {name: read(str(root)) for name, read in SOURCES.items()}
    return {name: json.loads(json.dumps(report).replace(str(root), "ROOT")) for name, report in found.items()}


def _copied(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, object], dict[str, object]]:
    """What the sources say of *root*, and of the copy in *folder* of what they read."""
    seen: files.Seen = {}
    monkeypatch.setattr(files, "seen", seen)
    first = _reports(root)
    monkeypatch.setattr(files, "seen", None)
    record_files.write(str(folder), str(root), seen)
    return first, _reports(folder)


def _tree(tmp_path: Path) -> Path:
    kernel = RecordedKernel()
    root = tmp_path / "root"
    for name, data in kernel.files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for number in (3, 11):
        block = root / f"sys/devices/system/memory/memory{number}"
        block.mkdir(parents=True)
        (block / "state").write_text("online\n")
    return root


def test_sources_say_the_same_of_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _tree(tmp_path)
    first, second = _copied(root, tmp_path / "copy", monkeypatch)
    assert first == second


def test_smbios_structure_by_structure_is_copied_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _tree(tmp_path)
    (root / "sys/firmware/dmi/tables/DMI").unlink()
    entry = root / "sys/firmware/dmi/entries/19-0"
    entry.mkdir(parents=True)
    (entry / "raw").write_bytes(ARRAY)
    (root / "sys/firmware/dmi/entries/19-1").mkdir()
    first, second = _copied(root, tmp_path / "copy", monkeypatch)
    assert first == second
    assert SECRET not in (tmp_path / "copy/sys/firmware/dmi/entries/19-0/raw").read_bytes()


@pytest.mark.parametrize(
    "changed",
    ["sys/firmware/qemu_fw_cfg/by_name/etc/e820/raw", "sys/firmware/acpi/tables/SRAT", "proc/iomem", "proc/cmdline"],
)
@pytest.mark.parametrize("data", [None, b"", b"\xff" * 70, b"x" * (1 << 20) + b"\n"])
def test_sources_say_the_same_of_the_copy_of_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, data: bytes | None
) -> None:
    root = _tree(tmp_path)
    (root / changed).unlink()
    if data is not None:
        (root / changed).write_bytes(data)
    first, second = _copied(root, tmp_path / "copy", monkeypatch)
    assert first == second


def test_folder_without_any_of_its_files_stays_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    (root / "sys/firmware/qemu_fw_cfg").mkdir(parents=True)
    (root / "sys/firmware/memmap/7").mkdir(parents=True)
    first, second = _copied(root, tmp_path / "copy", monkeypatch)
    assert first == second


def test_what_nobody_reads_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _tree(tmp_path)
    (root / "proc/keys").write_text("secret")
    (root / "proc/version").write_text("Linux version 6.12\n")
    _copied(root, tmp_path / "copy", monkeypatch)
    assert not (tmp_path / "copy/proc/keys").exists()
    assert (tmp_path / "copy/proc/version").read_text() == "Linux version 6.12\n"
