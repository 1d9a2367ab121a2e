# SPDX-License-Identifier: LGPL-2.1-or-later
"""/sys/devices/system/memory: which Linux memory blocks are online.

Layout: Linux drivers/base/memory.c. block_size_bytes is hexadecimal without 0x; block N covers [N, N + 1) x block
size. The files describe the kernel that shows them, so in a capture environment they tell of its own memory; in a
recording made before the crash they tell of the machine. Online says nothing about holes that virtio-mem or a balloon
leaves inside a block."""

from __future__ import annotations

from . import files, report
from .report import Finding, Problems, SourceReport

_FOLDER = "sys/devices/system/memory"

# A block that is going offline still has its memory map, and its pages may be in use until that ends.
_KINDS = {"online": report.ONLINE, "going-offline": report.ONLINE, "offline": report.OFFLINE}


def read(root: str) -> SourceReport:
    """Findings: ONLINE and OFFLINE ranges, neighbouring blocks of one state joined."""
    problems = Problems()
    path = files.under(root, _FOLDER)
    if not files.is_folder(root, _FOLDER):
        problems.absent(path)
        return SourceReport("memory_blocks", path, (), problems.lines(), available=False)
    size = files.read_hexadecimal(root, f"{_FOLDER}/block_size_bytes", problems)
    if size is not None and (size < 4096 or size & (size - 1)):
        problems.add(f"{path}/block_size_bytes: {size:#x} is not a power of two from 4096 on; all blocks are ignored")
        size = None
    numbers = files.numbered(root, _FOLDER, "memory", problems) if size is not None else None
    if size is None or numbers is None:
        return SourceReport("memory_blocks", path, (), problems.lines(), available=False)
    findings: list[Finding] = []
    run: tuple[int, int, str] | None = None
    for number in numbers:
        state = files.read_line(root, f"{_FOLDER}/memory{number}/state", problems)
        if state is None:
            continue
        if state not in _KINDS:
            expected = ", ".join(_KINDS)
            problems.add(
                f"{path}/memory{number}/state: expected one of {expected}, found {report.shown(state)}; block ignored"
            )
        elif run is not None and run[1] == number and run[2] == state:
            run = (run[0], number + 1, state)
        else:
            _add_run(run, size, path, findings, problems)
            run = (number, number + 1, state)
    _add_run(run, size, path, findings, problems)
    return SourceReport("memory_blocks", path, tuple(findings), problems.lines(), available=True)


def _add_run(
    run: tuple[int, int, str] | None, size: int, path: str, findings: list[Finding], problems: Problems
) -> None:
    if run is None:
        return
    first, end, state = run
    name = f"memory{first}" if end == first + 1 else f"memory{first} to memory{end - 1}"
    detail = f"{name}: {state}"
    report.add_range(findings, problems, f"{path}/memory{first}", first * size, end * size, _KINDS[state], detail)
