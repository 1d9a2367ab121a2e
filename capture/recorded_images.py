# SPDX-License-Identifier: LGPL-2.1-or-later
"""The images of a recorded machine: whether they are there, are large enough, and are raw memory at all."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from capture import file_kind
from capture.json_file import error
from capture.sources.report import one_line

if TYPE_CHECKING:
    from capture.recorded import RecordedMachine


def needed(machine: RecordedMachine) -> list[tuple[str, str, int]]:
    """(place in machine.json, image, bytes it must have) for each image."""
    page = machine.page_size

    def end(offset: int, size: int, held: tuple[tuple[int, int], ...] | None) -> int:
        return offset + (size if held is None else page * sum(count for _, count in held))

    images = [(f"ram[{i}].image", r.image, end(r.offset, r.size, r.held)) for i, r in enumerate(machine.ram)]
    for i, v in enumerate(machine.virtio_mem):
        if v.image is not None:
            images.append((f"virtio_mem[{i}].image", v.image, end(v.offset, v.region_size, v.held)))
    return images


def size(what: str, path: str) -> int:
    """Bytes of the image *path*, which messages call *what*."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise error(f"{what} is neither a regular file nor a block device")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # A block device states no size in stat().
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
    except OSError as e:
        raise error(f"{what}: {e.strerror}") from None


def disguised(file: str, machine: RecordedMachine) -> list[str]:
    """Lines on images that are no raw memory by their first bytes. Raises SourceError where that is sure: at address 0
    there are the interrupt vectors of firmware, or a page that no kernel uses (arch/x86/kernel/setup.c reserves it),
    while any other page of memory may hold the first one of some file."""
    lines = []
    whole = [(f"ram[{i}]", r.image, r.offset, r.paddr, r.held) for i, r in enumerate(machine.ram)]
    whole += [(f"virtio_mem[{i}]", v.image or "", v.offset, v.addr, v.held) for i, v in enumerate(machine.virtio_mem)]
    for place, image, offset, paddr, held in whole:
        if offset or held is not None or not image:
            continue
        kind = file_kind.of_file(machine.resolve(image))
        if kind is None:
            continue
        line = f"{file}: {place}.image: {machine.resolve(image)}"
        if paddr == 0 and kind.surely:
            raise error(f"{line} is {kind.name}, expected raw memory: {kind.advice}")
        lines.append(one_line(f"{line} begins like {kind.name}; taken for raw memory all the same"))
    return lines
