# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/iomem: which physical addresses the running kernel uses for what.

Layout: Linux kernel/resource.c:r_show. Two spaces of indentation per depth, "start-end : name" in hexadecimal, ends
inclusive; all addresses read as zero for a reader without CAP_SYS_ADMIN. In a capture kernel, System RAM is that
kernel's own memory, and "RAM buffer" (from the end of a System RAM range to the next 64 MiB border,
arch/x86/kernel/e820.c) covers old memory that /dev/mem refuses unless iomem=relaxed is on the command line."""

from __future__ import annotations

from typing import NamedTuple

from . import files, report
from .report import Finding, Problems, SourceReport

_PATH = "proc/iomem"
_MAX_SIZE = 4 << 20
_VIRTIO_MEM_RAM = "System RAM (virtio_mem)"

_KINDS = {
    "RAM buffer": report.RAM_BUFFER,
    "Crash kernel": report.CRASH_KERNEL,
    "Reserved": report.RESERVED,
    "reserved": report.RESERVED,
    "ACPI Tables": report.ACPI,
    "ACPI Non-volatile Storage": report.NVS,
    "Unusable memory": report.UNUSABLE,
    "Persistent Memory": report.PERSISTENT,
    "Persistent Memory (legacy)": report.PERSISTENT,
    "Soft Reserved": report.SOFT_RESERVED,
}


class Resource(NamedTuple):
    """One line: physical bytes [start, end), *parent* is the index of the enclosing resource, -1 at depth 0."""

    depth: int
    start: int
    end: int
    name: str
    parent: int


def read(root: str) -> SourceReport:
    """Findings: the resources that tell about memory. The caller must not read OWN_RAM as old memory, and must not
    take an unavailable report for a kernel that owns nothing."""
    problems = Problems()
    path = files.under(root, _PATH)
    tree = read_tree(root, problems)
    if tree is None:
        return SourceReport("iomem", path, (), problems.lines(), available=False)
    findings = [Finding(r.start, r.end, kind, r.name) for r in tree if (kind := _kind(r.name))]
    findings += [Finding(r.start, r.end, report.DRIVER_CLAIM, r.name) for r in virtio_mem_claims(tree)]
    return SourceReport("iomem", path, tuple(findings), problems.lines(), available=True)


def read_tree(root: str, problems: Problems) -> tuple[Resource, ...] | None:
    """The whole tree in the file's order, parents first; None (and a problem) if it is absent, empty or hides its
    addresses."""
    data = files.read_file(root, _PATH, _MAX_SIZE, problems)
    if data is None:
        return None
    path = files.under(root, _PATH)
    tree = parse(data, path, problems)
    if not tree:
        problems.add(f"{path}: tells of no resource at all, expected the kernel's own memory; ignored")
        return None
    if all(r.start == 0 and r.end == 1 for r in tree):
        problems.add(f"{path}: all addresses read as zero, expected real ones (reader needs CAP_SYS_ADMIN); ignored")
        return None
    return tree


def parse(data: bytes, path: str, problems: Problems) -> tuple[Resource, ...]:
    """The resources in *data*; *path* names it in problems. A line whose indentation makes no sense is kept, since to
    lose one may mean to take the reader's own memory for old memory."""
    tree: list[Resource] = []
    enclosing: list[int] = []
    for number, line in enumerate(data.decode("ascii", "backslashreplace").split("\n"), 1):
        if not line:
            continue
        text = line.lstrip(" ")
        span, _, name = text.partition(" : ")
        first, _, last = span.partition("-")
        start, end = files.hexadecimal(first), files.hexadecimal(last)
        where = f"{path}: line {number}"
        if start is None or end is None or start > end or not name:
            problems.add(f"{where}: expected 'start-end : name', found {report.shown(line)}; ignored")
            continue
        depth, odd = divmod(len(line) - len(text), 2)
        if odd or depth > len(enclosing):
            problems.add(
                f"{where}: indented by {len(line) - len(text)}, expected an even number up to {2 * len(enclosing)}; "
                f"taken as depth {min(depth, len(enclosing))}"
            )
            depth = min(depth, len(enclosing))
        del enclosing[depth:]
        parent = enclosing[-1] if enclosing else -1
        enclosing.append(len(tree))
        tree.append(Resource(depth, start, end + 1, name, parent))
    return tuple(tree)


def virtio_mem_claims(tree: tuple[Resource, ...]) -> tuple[Resource, ...]:
    """The device regions that virtio_mem claimed, which it does in normal mode only: in kdump mode it claims nothing
    (Linux drivers/virtio/virtio_mem.c:virtio_mem_create_resource). Any claim in a capture environment means that the
    driver took the machine for a running one and has unplugged, hence destroyed, the old memory of that device.

    The resource has the device's name. virtiofs names its DAX window alike, but that lies in a PCI BAR, never at
    depth 0."""
    with_memory = {r.parent for r in tree if r.name == _VIRTIO_MEM_RAM}
    return tuple(
        r
        for i, r in enumerate(tree)
        if r.name.startswith("virtio")
        and files.decimal(r.name.removeprefix("virtio")) is not None
        and (r.depth == 0 or i in with_memory)
    )


def _kind(name: str) -> str | None:
    # "System RAM (virtio_mem)" and "System RAM (kmem)" are the running kernel's memory like any other.
    return report.OWN_RAM if name.startswith("System RAM") else _KINDS.get(name)
