# SPDX-License-Identifier: LGPL-2.1-or-later
"""The header of a very large s390x machine, made up as sparse images: what it costs, and how that grows with size."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from time import process_time
from typing import NamedTuple

from capture.dump import build
from capture.image_machine import ImageMachine
from capture.recorded import load
from tests.bench.footprint import footprint
from tests.image.s390x_machine import GIB, MIB, S390xMachine

RANGE = 8 * GIB
ROUNDS = 9


class Cost(NamedTuple):
    """Milliseconds of the processor: *build* from the recorded machine on disk to the header, the best of some rounds;
    *command* for the whole command, over the bare interpreter. *growth* is *build* over that of half the machine."""

    build: float
    command: float
    growth: float


def large(folder: Path, ranges: int, cpus: int) -> bytes:
    """A machine of *ranges* times 8 GiB with standby gaps between, all its records in the first; returns its header."""
    m = S390xMachine(1)
    m.ram, m.crash = [(0, GIB)], (256 * MIB, 512 * MIB)
    m.cpus, m.possible = range(cpus), cpus
    m.lay()  # prefix registers have 31 bits: lowcores lie low
    m.ram = [(0, RANGE)]
    m.write(folder)
    spans = [(2 * n * RANGE, (2 * n + 1) * RANGE) for n in range(1, ranges)]
    document = m.document()
    entries = [{"image": "ram.raw", "offset": 0, "paddr": 0, "size": RANGE}]
    # no file system holds 32 TiB in a file: these all show the same memory, of which a header needs nothing
    entries += [{"image": "empty.raw", "offset": 0, "paddr": start, "size": RANGE} for start, _ in spans]
    (folder / "machine.json").write_text(json.dumps({**document, "ram": entries}))
    with (folder / "empty.raw").open("wb") as stream:
        stream.truncate(RANGE)
    expected = m.expected()
    return bytes(expected._replace(ranges=[*expected.ranges, *spans]))


def header(folder: Path) -> bytes:
    dump = build(ImageMachine(load(str(folder))), "kernel")
    found = dump.core.header
    dump.close()
    return found


def seconds(folder: Path) -> float:
    start = process_time()
    header(folder)
    return process_time() - start


def cost(ranges: int, cpus: int) -> Cost:
    """Both sizes are measured in turn. Raises RuntimeError if a header is not the right one."""
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as half:
        for name, parts in ((whole, 1), (half, 2)):
            expected = large(Path(name), ranges // parts, cpus // parts)
            if header(Path(name)) != expected:
                raise RuntimeError(
                    f"header of {ranges // parts} ranges and {cpus // parts} CPUs is not what it must be"
                )
        pairs = [(seconds(Path(whole)), seconds(Path(half))) for _ in range(ROUNDS)]
        command = ["header", "--machine", whole, "--layout", "kernel", "-o", f"{whole}/header"]
        over_bare = footprint(f"from capture import cli; assert cli.run({command!r}) == 0")
    build = min(a for a, _ in pairs)
    return Cost(build * 1000, over_bare.cpu_ms, build / min(b for _, b in pairs))
