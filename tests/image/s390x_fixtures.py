# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images of crashed s390x machines, as small as can be: tests/image/s390x/NAME has the pages that the header is built
from, and the header that the capture kernel of that machine built. Made by tests/s390x/fixture.py."""

from __future__ import annotations

import json
import lzma
import shutil
import struct
from pathlib import Path

FIXTURES = Path(__file__).resolve().parent / "s390x"

ABOUT = "about.json"
"""``images``: names and sizes in bytes; ``how``: what machine that was."""
HEADER = "header.xz"
MACHINE = "machine.json"
PAGES = "{}.pages.xz"
"""Of the image with that stem: records of u64 file offset, u64 length (little-endian), and the bytes; the rest is
zeros."""

_RECORD = struct.Struct("<QQ")


def names() -> list[str]:
    """All there are."""
    return sorted(path.name for path in FIXTURES.iterdir())


def expand(name: str, into: Path) -> Path:
    """Puts the images of fixture *name*, sparse, its machine.json if it has one, and ``header`` into the folder *into*,
    which is returned."""
    folder = FIXTURES / name
    sizes: dict[str, int] = json.loads((folder / ABOUT).read_text())["images"]
    for image, size in sizes.items():
        with open(into / image, "wb") as file:
            file.truncate(size)
            packed = folder / PAGES.format(Path(image).stem)
            data = lzma.decompress(packed.read_bytes()) if packed.exists() else b""
            at = 0
            while at < len(data):
                offset, length = _RECORD.unpack_from(data, at)
                at += _RECORD.size
                file.seek(offset)
                file.write(data[at : at + length])
                at += length
    (into / "header").write_bytes(lzma.decompress((folder / HEADER).read_bytes()))
    if (folder / MACHINE).exists():
        shutil.copy(folder / MACHINE, into)
    return into
