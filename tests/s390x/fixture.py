# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m tests.s390x.fixture RUNDIR NAME [ABOUT]``: a fixture (see tests/image/s390x_fixtures.py) from a run: of
the images only the pages that building the header reads, and the kernel's own header. ABOUT, a line on how the run
was made, defaults to the scenario of that folder's name. RUNDIR may have ``vmcore.header``, the start of the vmcore, in
the place of all of it. Exit status: 0 made, and the header built from it is the kernel's; 1 not."""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from capture import recorded
from capture.dump import KERNEL, build
from capture.image_machine import ImageMachine
from guard import procvmcore
from guard.errors import Error
from guard.physmem import OldMemory
from guard.ranges import RangeSet
from tests.image.s390x_fixtures import ABOUT, FIXTURES, HEADER, MACHINE, PAGES, expand
from tests.s390x.scenarios import SCENARIOS

PAGE = 4096


def make(run: Path, name: str, about: str) -> int:
    """Makes the fixture *name* from the folder *run*; returns its size in bytes. Raises Error if what oldmem builds
    from the fixture is not the kernel's header."""
    with logged_reads() as reads:
        built = header(run)
    real = kernels_header(run)
    if built != real:
        raise Error(f"{run}: the header built from it is not the kernel's: no fixture")
    final = FIXTURES / name
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / name
        folder.mkdir()
        images = sorted(path for path in run.glob("*.raw"))
        for image in images:
            pages = RangeSet(reads.get(str(image.resolve()), [])).outer_pages(PAGE)
            if stored := b"".join(_records(image, pages)):
                (folder / PAGES.format(image.stem)).write_bytes(_packed(stored))
        (folder / HEADER).write_bytes(_packed(real))
        if (run / MACHINE).exists():
            shutil.copy(run / MACHINE, folder / MACHINE)
        facts = {"images": {image.name: image.stat().st_size for image in images}, "how": about}
        (folder / ABOUT).write_text(json.dumps(facts, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        final.parent.mkdir(exist_ok=True)
        shutil.move(folder, final)
        again = Path(work) / "expanded"
        again.mkdir()
        if header(expand(name, again)) != real:
            raise Error(f"{final}: the header built from it is not the kernel's")
    return sum(path.stat().st_size for path in final.iterdir())


def header(run: Path) -> bytes:
    """What oldmem makes of a run's memory."""
    machine = recorded.load(str(run)) if (run / MACHINE).exists() else recorded.of_image(str(run / "ram.raw"))
    dump = build(ImageMachine(machine), KERNEL)
    dump.close()
    return dump.core.header


def kernels_header(run: Path) -> bytes:
    """What the kernel made."""
    whole = run / "vmcore"
    path = whole if whole.exists() else run / "vmcore.header"
    with open(path, "rb") as file:
        return file.read(procvmcore.read_header(file.fileno(), str(path)).size)


@contextmanager
def logged_reads() -> Iterator[dict[str, list[tuple[int, int]]]]:
    """Meanwhile, which bytes of which files (resolved paths) old memory is read from, as [start, end) file offsets."""
    reads: dict[str, list[tuple[int, int]]] = {}
    read_exact = OldMemory.read_exact

    def logged(self: OldMemory, paddr: int, size: int) -> bytes:
        for s in self.segments:
            start, end = max(paddr, s.paddr), min(paddr + size, s.end)
            if start < end:
                offset = s.offset + start - s.paddr
                reads.setdefault(os.path.realpath(s.name), []).append((offset, offset + end - start))
        return read_exact(self, paddr, size)

    with mock.patch.object(OldMemory, "read_exact", logged):
        yield reads


def _records(image: Path, ranges: RangeSet) -> Iterator[bytes]:
    with open(image, "rb") as file:
        for start, end in ranges:
            data = os.pread(file.fileno(), end - start, start)
            if data.strip(b"\0"):
                yield struct.pack("<QQ", start, len(data)) + data


def _packed(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def _scenario(name: str) -> str | None:
    return next((f"python -m tests.s390x {name}: {s}" for s in SCENARIOS if s.name == name), None)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.s390x.fixture", description="A small fixture from a run.")
    parser.add_argument("run", type=Path, metavar="RUNDIR")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("about", metavar="ABOUT", nargs="?")
    args = parser.parse_args()
    about = args.about or _scenario(args.run.resolve().name)
    if about is None:
        parser.error(f"{args.run}: no scenario is named so: ABOUT is needed")
    try:
        print(f"{args.name}: {make(args.run, args.name, about)} bytes")
    except (Error, OSError) as error:
        print(f"fixture: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
