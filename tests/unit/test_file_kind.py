# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file is by its first page, and what becomes of one that is named where raw memory is wanted."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from capture import file_kind, recorded
from guard.errors import SourceError

PAGE = 4096


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return stream.getvalue()


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x", "y")
    return stream.getvalue()


def elf(kind: int, order: str = "<") -> bytes:
    return b"\x7fELF\2" + (b"\1" if order == "<" else b"\2") + b"\1".ljust(10, b"\0") + struct.pack(f"{order}H", kind)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (elf(4), "ELF core"),
        (elf(4, ">"), "ELF core"),
        (elf(2), "ELF file"),
        (b"\x7fELF", "ELF file"),
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"KDMV\1", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe", "VDI"),
        (b"EMiL\1\0\0\0", "LiME"),
        (b"AVML\2\0\0\0", "AVML"),
        (b"KDUMP   \6\0\0\0", "kdump-compressed"),
        (b"makedumpfile\0\0\0\0", "flattened"),
        (b"\xa8\x19\1\x73\x61\x8f\x23\xfd", "s390 dump"),
        (b"PAGEDU64", "Windows crash dump"),
        (b"QEVM\0\0\0\3", "savevm"),
        (b"\xd2\xbe\xd2\xbe", "VMware"),
        (gzip.compress(b"x"), "gzip"),
        (lzma.compress(b"x"), "xz"),
        (_tar(), "tar"),
        (_zip(), "zip"),
        (bytes(4086) + b"S1SUSPEND\0", "hibernation"),
    ],
)
def test_format_is_told_by_its_signature(head: bytes, name: str) -> None:
    kind = file_kind.of(head)
    assert kind is not None
    assert name in kind.name
    assert kind.advice


@pytest.mark.parametrize("head", [b"", bytes(PAGE), b"\x53\xff\x00\xf0" * 1024, b"\x7fEL", b"KDUMP", b"EMi"])
def test_raw_memory_is_taken_for_nothing_else(head: bytes) -> None:
    assert file_kind.of(head) is None


def test_file_that_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    assert file_kind.of_file(str(tmp_path / "nothing")) is None
    assert file_kind.of_file(str(tmp_path)) is None


def put(folder: Path, head: bytes, entry: dict[str, object] | None = None, size: int = 1 << 20) -> str:
    document = {
        "format": 1,
        "arch": "x86_64",
        "ram": [{"image": "image", "paddr": 0, "size": 1 << 20, **(entry or {})}],
    }
    (folder / "machine.json").write_text(json.dumps(document))
    with (folder / "image").open("wb") as stream:
        stream.write(head)
        stream.truncate(size)
    return str(folder)


def test_image_of_another_format_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"ram\[0\]\.image: .*/image is a LiME file, expected raw memory: "):
        recorded.load(put(tmp_path, b"EMiL\1\0\0\0"))


def test_compressed_image_is_named_though_it_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a qcow2 disk image"):
        recorded.load(put(tmp_path, b"QFI\xfb", size=PAGE))


@pytest.mark.parametrize("entry", [{"offset": PAGE}, {"held": [[0, 1]]}])
def test_file_in_a_page_of_memory_is_nothing_to_tell_of(tmp_path: Path, entry: dict[str, object]) -> None:
    head = b"\0" * PAGE + elf(4) if "offset" in entry else elf(4)
    assert recorded.load(put(tmp_path, head, entry, 2 << 20)).notes == ()


@pytest.mark.parametrize(("head", "entry"), [(elf(4), {"paddr": 1 << 32}), (gzip.compress(b"x"), {})])
def test_image_that_may_be_raw_all_the_same_is_taken_and_told(
    tmp_path: Path, head: bytes, entry: dict[str, object]
) -> None:
    (note,) = recorded.load(put(tmp_path, head, entry)).notes
    assert "ram[0].image" in note
    assert note.endswith("taken for raw memory all the same")


def test_wrong_image_of_an_s390x_machine_is_named(tmp_path: Path) -> None:
    (tmp_path / "dump").write_bytes(b"\xa8\x19\1\x73\x61\x8f\x23\xfd".ljust(1 << 20, b"\0"))
    with pytest.raises(SourceError, match="is an s390 dump with its header, expected raw memory"):
        recorded.of_image(str(tmp_path / "dump"))
