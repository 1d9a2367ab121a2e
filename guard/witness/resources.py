# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dead kernel's iomem_resource tree: what its /proc/iomem would have shown at the moment of the crash.

struct resource (include/linux/ioport.h) has start, end (inclusive), flags, and pointers to name, sibling and child;
where, layouts.py tells."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.ranges import Range
from guard.witness.btf import Layout
from guard.witness.layouts import FIXED, unpacker
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk

SYSTEM_RAM = 0x01000200
"""IORESOURCE_SYSTEM_RAM: IORESOURCE_MEM and IORESOURCE_SYSRAM, both bits."""
EXCLUSIVE = 0x08000000
BUSY = 0x80000000

_MEMORY = (
    r"Soft Reserved|hmem\.\d+|CXL Window \d+|region\d+|dax\d+\.\d+|Persistent Memory( \(legacy\))?|namespace\d+\.\d+"
)
_MAX_DEPTH = 32
_MAX_NAMES = 1024
_NAME_LIMIT = 64


class Resource(NamedTuple):
    """One node of the tree: half-open physical range [start, end) in bytes, name, IORESOURCE_* flags, depth (0 =
    top)."""

    start: int
    end: int
    name: str
    flags: int
    depth: int


def resource_at(walk: PageWalk, vaddr: int, layout: Layout = FIXED["resource"]) -> Range:
    """The range of the single struct resource at *vaddr*, empty if nothing is reserved. WitnessError if start > end."""
    start, end = unpacker(layout, "start", "end")(walk.read(vaddr, layout.size))
    if start > end + 1:
        raise WitnessError(f"struct resource at {vaddr:#x}: start {start:#x} is behind end {end:#x}")
    # A resource that was never set up has start 0 and end 0, which would otherwise mean one byte at 0.
    return Range(start, end + 1 if end else start)


class Tree(NamedTuple):
    """All of a resource tree that could be read, in the order of /proc/iomem. *flaw* is the first reason why that is
    not all of it, or why it cannot be what a kernel had; None if it is sound. *unread* are the physical addresses of
    nodes that could not be read."""

    resources: list[Resource]
    flaw: str | None
    unread: tuple[int, ...] = ()


def walk_resources(
    walk: PageWalk, root: int, problems: Problems, max_nodes: int = 1 << 15, layout: Layout = FIXED["resource"]
) -> list[Resource]:
    """All resources below the one at virtual address *root*: what :func:`read_tree` finds, sound or not."""
    return read_tree(walk, root, problems, max_nodes, layout).resources


def read_tree(
    walk: PageWalk, root: int, problems: Problems, max_nodes: int = 1 << 15, layout: Layout = FIXED["resource"]
) -> Tree:
    """All resources below the one at virtual address *root* (iomem_resource), in the order of /proc/iomem.

    Cycles, unreadable nodes and nodes that make no sense end their branch, and are told in *problems*. A tree is cut at
    *max_nodes* nodes and at 32 levels. All of these are flaws, and so is what __request_resource() and
    __insert_resource() (kernel/resource.c) never let come about: a child that reaches out of its parent, siblings that
    do not ascend or that overlap; and System RAM inside of what is no memory.

    Raises WitnessError or ReadError only if the root cannot be read."""
    found: list[Resource] = []
    names: dict[int, str] = {}
    flaws = _Flaws(problems)
    unread: list[int] = []
    seen = {root}
    node = unpacker(layout, "start", "end", "name", "flags", "sibling", "child")
    start, end, _, _, _, child = node(walk.read(root, layout.size))
    pending = [_Branch(child, 0, start, end + 1, ())]
    while pending:
        vaddr, depth, floor, ceiling, inside = pending.pop()
        if not vaddr:
            continue
        if vaddr in seen:
            flaws.note(f"node {vaddr:#x} is reached twice, the tree has a cycle; left there")
            continue
        if len(seen) > max_nodes:
            flaws.note(f"more than {max_nodes} nodes, the rest is left out")
            break
        seen.add(vaddr)
        try:
            start, end, name_at, flags, sibling, child = node(walk.read(vaddr, layout.size))
        except (WitnessError, ReadError) as error:
            flaws.note(f"node {vaddr:#x} cannot be read, it and what follows it is left out: {error}")
            if isinstance(error, ReadError):
                unread.append(error.paddr)
            continue
        if start > end + 1:
            flaws.note(f"node {vaddr:#x} has start {start:#x} behind end {end:#x}, left out")
            pending.append(_Branch(sibling, depth, floor, ceiling, inside))
            continue
        pending.append(_Branch(sibling, depth, max(floor, end + 1), ceiling, inside))
        name = names.get(name_at)
        if name is None:
            name = _name(walk, name_at, problems)
            if len(names) < _MAX_NAMES:
                names[name_at] = name
        this = Resource(start, end + 1, name, flags, depth)
        found.append(this)
        if start < floor or end + 1 > ceiling:
            flaws.find(f"{_shown(this)} is not between {floor:#x} and {ceiling - 1:#x}, where its place in the tree is")
        if flags & SYSTEM_RAM != SYSTEM_RAM:
            inside = (*inside, this)
        elif other := next((around for around in inside if not _may_hold_ram(around)), None):
            flaws.find(f"{_shown(this)} lies in {_shown(other)}, which is no memory")
        if depth + 1 < _MAX_DEPTH:
            pending.append(_Branch(child, depth + 1, start, end + 1, inside))
        elif child:
            flaws.note(f"node {vaddr:#x} is {_MAX_DEPTH} levels deep, its children are left out")
    return Tree(found, flaws.first, tuple(unread))


class _Branch(NamedTuple):
    """A node still to be visited, with the siblings behind it: all of them have to lie in [floor, ceiling), and
    *inside* are the resources around them that are not System RAM, the outermost first."""

    vaddr: int
    depth: int
    floor: int
    ceiling: int
    inside: tuple[Resource, ...]


class _Flaws:
    """Why a tree is not sound: the first reason is kept."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self.first: str | None = None

    def note(self, line: str) -> None:
        """A flaw for which something was left out: that is told in any case."""
        self.find(line)
        self._problems.note(f"iomem_resource: {line}")

    def find(self, line: str) -> None:
        """A flaw in what was read: it matters only to who relies on the tree."""
        self.first = self.first or line


def _may_hold_ram(resource: Resource) -> bool:
    """Whether there may be System RAM in this resource without the flags of it (which another System RAM around it has,
    and the region of a virtio-mem device). Then it has a name that a driver gives to memory: "Soft Reserved" of the
    firmware's map (arch/x86/kernel/e820.c), "hmem.0" (drivers/dax/hmem), "CXL Window 0" and "region0" (drivers/cxl),
    "Persistent Memory" and "namespace0.0" (drivers/nvdimm), "dax0.0" (drivers/dax). Any other name is taken for that
    of a device or a bus, and what lies in there for its registers."""
    return re.fullmatch(_MEMORY, resource.name) is not None


def _shown(resource: Resource) -> str:
    return f"{resource.name!r} {Range(resource.start, resource.end)}"


def _name(walk: PageWalk, vaddr: int, problems: Problems) -> str:
    if not vaddr:
        return ""
    try:
        return walk.read_cstring(vaddr, _NAME_LIMIT).decode("utf-8", "backslashreplace")
    except (WitnessError, ReadError) as error:
        problems.note(f"iomem_resource: a name at {vaddr:#x} cannot be read, left empty: {error}")
        return ""


def system_ram(resources: Iterable[Resource]) -> list[Resource]:
    """What walk_system_ram_res() (kernel/resource.c) visits, which is what a kexec header is made of: busy System RAM
    at any depth, in order, each by itself. What lies within a resource already visited is not visited again."""
    visited: list[Resource] = []
    reached = 0
    for resource in resources:
        if resource.flags & (SYSTEM_RAM | BUSY) == SYSTEM_RAM | BUSY and resource.end > max(reached, resource.start):
            visited.append(resource._replace(start=max(resource.start, reached)))
            reached = resource.end
    return visited


def virtio_mem_regions(resources: Iterable[Resource]) -> list[Resource]:
    """The device regions that virtio-mem drivers claimed (virtio_mem_create_resource, drivers/virtio/virtio_mem.c):
    parents named after the virtio device, never busy themselves."""
    return [
        resource
        for resource in resources
        if resource.flags & (SYSTEM_RAM | EXCLUSIVE | BUSY) == SYSTEM_RAM | EXCLUSIVE
        and resource.name.startswith("virtio")
        and resource.name[6:].isdecimal()
    ]
