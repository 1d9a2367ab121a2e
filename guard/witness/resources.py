# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dead kernel's iomem_resource tree: what its /proc/iomem would have shown at the moment of the crash.

struct resource (include/linux/ioport.h) has start, end (inclusive), flags, and pointers to name, sibling and child;
where, layouts.py tells."""

from __future__ import annotations

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


def walk_resources(
    walk: PageWalk, root: int, problems: Problems, max_nodes: int = 1 << 15, layout: Layout = FIXED["resource"]
) -> list[Resource]:
    """All resources below the one at virtual address *root* (iomem_resource), in the order of /proc/iomem.

    Cycles, unreadable nodes and nodes that make no sense end their branch, and are told in *problems*. A tree is cut at
    *max_nodes* nodes and at 32 levels. Raises WitnessError or ReadError only if the root cannot be read."""
    found: list[Resource] = []
    names: dict[int, str] = {}
    seen = {root}
    node = unpacker(layout, "start", "end", "name", "flags", "sibling", "child")
    pending = [(node(walk.read(root, layout.size))[5], 0)]
    while pending:
        vaddr, depth = pending.pop()
        if not vaddr:
            continue
        if vaddr in seen:
            problems.note(f"iomem_resource: node {vaddr:#x} is reached twice, the tree has a cycle; left there")
            continue
        if len(seen) > max_nodes:
            problems.note(f"iomem_resource: more than {max_nodes} nodes, the rest is left out")
            break
        seen.add(vaddr)
        try:
            start, end, name_at, flags, sibling, child = node(walk.read(vaddr, layout.size))
        except (WitnessError, ReadError) as error:
            problems.note(
                f"iomem_resource: node {vaddr:#x} cannot be read, it and what follows it is left out: {error}"
            )
            continue
        pending.append((sibling, depth))
        if start > end + 1:
            problems.note(f"iomem_resource: node {vaddr:#x} has start {start:#x} behind end {end:#x}, left out")
            continue
        name = names.get(name_at)
        if name is None:
            name = _name(walk, name_at, problems)
            if len(names) < _MAX_NAMES:
                names[name_at] = name
        found.append(Resource(start, end + 1, name, flags, depth))
        if depth + 1 < _MAX_DEPTH:
            pending.append((child, depth + 1))
        elif child:
            problems.note(f"iomem_resource: node {vaddr:#x} is {_MAX_DEPTH} levels deep, its children are left out")
    return found


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
