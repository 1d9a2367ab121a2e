# SPDX-License-Identifier: LGPL-2.1-or-later
"""A recorded machine: a folder with machine.json, memory images and a copy of the capture environment's /sys and /proc.

It stands in for a crashed machine in test mode, so whatever is taken from it is checked here once, and each thing
that is wrong is told by its place in machine.json. Keys that are not known are ignored; keys with a default may be
left out."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from typing import NamedTuple

from guard import whole_file
from guard.virtio_mem import MAX_BLOCKS

from .json_file import U64, Object, error, found, read
from .sources.report import one_line, shown

FORMAT = 1
FILE = "machine.json"

PAGE_SIZES = {"aarch64": (4096, 16384, 65536), "s390x": (4096,), "x86_64": (4096,)}
"""Known machines, and the sizes in bytes that a page of their kernels can have."""

_MAX_JSON = 16 << 20


HOST, CAPTURE_KERNEL = "host", "capture kernel"
"""Who saw the memory that the images show. A host has all the RAM there is; a capture kernel what firmware told it of,
so that its images are no witness to what was RAM."""

Runs = tuple[tuple[int, int], ...]
"""Ascending, disjoint (first, count)."""


class RamImage(NamedTuple):
    """*size* bytes of boot RAM at physical address *paddr*, held by *image* from byte *offset* on.

    With *held*, runs of pages from *paddr* on, *image* has these pages alone, back to back; what the others held was
    not recorded."""

    image: str
    offset: int
    paddr: int
    size: int
    held: Runs | None = None


class VirtioMemState(NamedTuple):
    """A virtio-mem device as its configuration space told it (virtio specification, section "Memory Device"; all in
    bytes, *addr* physical), and its plug bitmap as ascending runs of (first block, number of blocks).

    *image* holds the region from byte *offset* on, of it the pages *held* alone if there are any such; None if the
    memory itself was not recorded. *shown* are the pages that any source showed where it was recorded; None: all.
    *name* is what the device was called there."""

    addr: int
    region_size: int
    usable_region_size: int
    block_size: int
    plugged_size: int
    requested_size: int
    node_id: int
    plugged: Runs
    image: str | None = None
    offset: int = 0
    held: Runs | None = None
    shown: Runs | None = None
    name: str | None = None


class RecordedMachine(NamedTuple):
    """A machine recorded in the folder *path*. Images and *root* are as written in machine.json: see :meth:`resolve`.

    *virtio_mem* is in the order in which the devices were probed. *phdr_note_align* is the p_align that the capture
    kernel gave its merged PT_NOTE, *vmcoreinfo_paddr* the physical address of the crashed kernel's VMCOREINFO note,
    *own_vmcoreinfo* that of the capture kernel's; None: not recorded. *machine_checks* are the ranges of physical bytes
    that the crashed kernel's log named in fatal machine checks; None: the log is to be asked. *seen_from* is HOST or
    CAPTURE_KERNEL. *notes* are lines worth telling the user about, and are not saved."""

    path: str
    arch: str
    ram: tuple[RamImage, ...]
    virtio_mem: tuple[VirtioMemState, ...] = ()
    root: str = "root"
    capture_release: str | None = None
    page_size: int = 4096
    phdr_note_align: int | None = None
    vmcoreinfo_paddr: int | None = None
    own_vmcoreinfo: int | None = None
    machine_checks: Runs | None = None
    seen_from: str = HOST
    notes: tuple[str, ...] = ()

    def resolve(self, name: str) -> str:
        """The path to open for an image or root: relative ones are relative to the folder."""
        return os.path.join(self.path, name)

    @property
    def root_path(self) -> str:
        """Root of the recorded /sys and /proc, as the sources take it. Need not exist: each source then tells so."""
        return self.resolve(self.root)


def load(folder: str) -> RecordedMachine:
    """The machine recorded in *folder*, with every image there and large enough.

    Raises SourceError: one line with the file, the place in it, what was expected and what was found."""
    from . import recorded_images  # no capture kernel reads what others have made

    file = os.path.join(folder, FILE)
    machine = from_document(read(file, _MAX_JSON), folder)
    notes = recorded_images.disguised(file, machine)  # first, for what is compressed is too short as well
    sizes: dict[str, int] = {}
    outside: dict[str, str] = {}
    inside = os.path.realpath(folder).rstrip("/") + "/"
    for place, name, expected in recorded_images.needed(machine):
        path = machine.resolve(name)
        if name not in sizes:  # thousands of ranges may lie in one image
            sizes[name] = recorded_images.size(f"{file}: {place}: {path}", path)
            if not os.path.realpath(path).startswith(inside):
                outside[name] = place
        if sizes[name] < expected:
            raise error(f"{file}: {place}: {path} has {sizes[name]} bytes, expected at least {expected}")
    if not os.path.realpath(machine.root_path).startswith(inside):
        outside[machine.root] = "root"
    notes += [one_line(f"{file}: {place}: {name} is outside the folder") for name, place in outside.items()]
    return machine._replace(notes=tuple(notes))


def of_image(path: str) -> RecordedMachine:
    """A machine of which there is nothing but *path*, an image of all its RAM from address 0 on.

    Only s390x capture kernels tell by themselves what they are and what they dump, so it must be one of those. Raises
    SourceError where it is not."""
    from . import file_kind, recorded_images, s390x_capture  # no other machine needs it

    size = recorded_images.size(path, path) & -PAGE_SIZES["s390x"][0]
    try:
        with open(path, "rb") as image:
            image.seek(s390x_capture.MAGIC_AT)
            found = image.read(len(s390x_capture.MAGIC))
    except OSError as e:
        raise error(f"{path}: {e.strerror}") from None
    if kind := file_kind.of_file(path):
        raise error(f"{path}: is {kind.name}, expected raw memory: {kind.advice}")
    if why := s390x_capture.not_s390x(found):
        raise error(f"{path}: not the memory of an s390x machine ({why}); of others a machine.json must tell more")
    folder, name = os.path.split(os.path.abspath(path))
    return RecordedMachine(folder, "s390x", (RamImage(name, 0, 0, size),), root=f"{name}.root")


def save(folder: str, machine: RecordedMachine) -> None:
    """Writes machine.json into *folder*, replacing an old one at once or not at all. Images need not be there yet.

    Raises SourceError if the machine contradicts itself or the file cannot be written."""
    text = _text(_document(machine))
    from_document(json.loads(text), folder)
    file = os.path.join(folder, FILE)
    try:
        whole_file.replace(file, text.encode("ascii") + b"\n")
    except OSError as e:
        raise error(f"{file}: cannot be written: {e.strerror}") from None


def from_document(document: object, folder: str) -> RecordedMachine:
    """The machine that a parsed machine.json describes; no image is looked at. Raises SourceError as load()."""
    file = os.path.join(folder, FILE)
    top = Object(file, "", document)
    version = top.integer("format")
    if version != FORMAT:
        top.fail("format", f"{version} is not known, expected {FORMAT}")
    arch = top.text("arch")
    if arch not in PAGE_SIZES:
        top.fail("arch", f"{shown(arch)} is not known, expected one of {', '.join(PAGE_SIZES)}")
    page_size = top.integer("page_size", 4096)
    if page_size not in PAGE_SIZES[arch]:
        expected = " or ".join(str(size) for size in PAGE_SIZES[arch])
        top.fail("page_size", f"{page_size} is not possible on {arch}, expected {expected}")
    align = top.integer("phdr_note_align") if top.has("phdr_note_align") else None
    if align not in (None, 0, 4):
        top.fail("phdr_note_align", f"{align} is not possible, expected 0 or 4")
    ram = tuple(_ram(item, page_size) for item in top.objects("ram"))
    if not ram:
        top.fail("ram", "is empty, expected at least one range")
    virtio_mem = tuple(_virtio_mem(item, page_size) for item in top.objects("virtio_mem", required=False))
    _check_overlaps(file, ram, virtio_mem)
    seen_from = top.text("seen_from", HOST)
    if seen_from not in (HOST, CAPTURE_KERNEL):
        top.fail("seen_from", f'{shown(seen_from)} is not known, expected "{HOST}" or "{CAPTURE_KERNEL}"')
    return RecordedMachine(
        path=folder,
        arch=arch,
        ram=ram,
        virtio_mem=virtio_mem,
        root=top.text("root", "root"),
        capture_release=top.text("capture_release") if top.has("capture_release") else None,
        page_size=page_size,
        phdr_note_align=align,
        vmcoreinfo_paddr=top.integer("vmcoreinfo_paddr") if top.has("vmcoreinfo_paddr") else None,
        own_vmcoreinfo=top.integer("own_vmcoreinfo") if top.has("own_vmcoreinfo") else None,
        machine_checks=_spans(top, "machine_checks"),
        seen_from=seen_from,
    )


def _ram(item: Object, page_size: int) -> RamImage:
    image = item.text("image")
    offset = item.integer("offset", 0)
    paddr = item.integer("paddr")
    size = item.integer("size")
    if size == 0:
        item.fail("size", "0 found, expected at least one byte")
    if paddr + size - 1 > U64:
        item.fail("size", f"{size} bytes from paddr {paddr:#x} on leave the 64-bit address space")
    held = _pages(item, "held", paddr, size, page_size)
    return RamImage(image, offset, paddr, size, held)


def _virtio_mem(item: Object, page_size: int) -> VirtioMemState:
    block_size = item.integer("block_size")
    if block_size == 0 or block_size & (block_size - 1):
        item.fail("block_size", f"{block_size} is not a power of two")
    if block_size < page_size:
        item.fail("block_size", f"{block_size} is smaller than a page of {page_size} bytes")

    def multiple(key: str) -> int:
        value = item.integer(key)
        if value % block_size:
            item.fail(key, f"{value} is not a multiple of block_size {block_size}")
        return value

    addr = multiple("addr")
    region_size = multiple("region_size")
    if region_size == 0:
        item.fail("region_size", "0 found, expected at least one block")
    if addr + region_size - 1 > U64:
        item.fail("region_size", f"{region_size} bytes from addr {addr:#x} on leave the 64-bit address space")
    usable = multiple("usable_region_size")
    if usable > region_size:
        item.fail("usable_region_size", f"{usable} is larger than region_size {region_size}")
    requested = multiple("requested_size")
    if requested > region_size:
        item.fail("requested_size", f"{requested} is larger than region_size {region_size}")
    if usable // block_size > MAX_BLOCKS:
        item.fail("usable_region_size", f"{usable} is more than {MAX_BLOCKS} blocks of {block_size} bytes")
    blocks = usable // block_size
    limit = f"usable_region_size has only {blocks} blocks"
    plugged = _runs(item, "plugged", "block", blocks, limit)
    plugged_size = item.integer("plugged_size")
    blocks = sum(count for _, count in plugged)
    if plugged_size != blocks * block_size:
        item.fail(
            "plugged_size",
            f"{plugged_size} contradicts plugged: {blocks} blocks of {block_size} bytes are {blocks * block_size}",
        )
    return VirtioMemState(
        addr=addr,
        region_size=region_size,
        usable_region_size=usable,
        block_size=block_size,
        plugged_size=plugged_size,
        requested_size=requested,
        node_id=item.integer("node_id", 0, high=0xFFFF),
        plugged=plugged,
        image=item.text("image") if item.has("image") else None,
        offset=item.integer("offset", 0),
        held=_pages(item, "held", addr, region_size, page_size),
        shown=_pages(item, "shown", addr, region_size, page_size),
        name=item.text("name") if item.has("name") else None,
    )


def _pages(item: Object, key: str, start: int, size: int, page_size: int) -> Runs | None:
    """The runs of pages *key* of a range of memory, None where there are none such."""
    if not item.has(key):
        return None
    if start % page_size:
        item.fail(key, f"the range starts at {start:#x}, not with a page of {page_size} bytes")
    pages = size // page_size
    return _runs(item, key, "page", pages, f"the range has only {pages} pages")


def _runs(item: Object, key: str, unit: str, most: int, limit: str) -> Runs:
    """The runs *key* of what is counted in *unit*, all within the first *most*, which *limit* tells."""
    runs: list[tuple[int, int]] = []
    free = 0
    for i, run in enumerate(item.array(key)):
        place = f"{key}[{i}]"
        if not isinstance(run, list) or len(run) != 2:
            item.fail(place, f"{found(run)} found, expected an array [first {unit}, number of {unit}s]")
        first = item.checked_integer(f"{place}[0]", run[0])
        count = item.checked_integer(f"{place}[1]", run[1])
        if count == 0:
            item.fail(f"{place}[1]", f"0 found, expected at least one {unit}")
        if first < free:
            item.fail(place, f"starts at {unit} {first}, expected {free} or more: runs ascend and do not overlap")
        if first + count > most:
            item.fail(place, f"ends with {unit} {first + count - 1}, but {limit}")
        free = first + count
        runs.append((first, count))
    return tuple(runs)


def _spans(item: Object, key: str) -> Runs | None:
    """The half-open ranges [start, end) of physical bytes *key*; None where there is no such key."""
    if not item.has(key):
        return None
    spans: list[tuple[int, int]] = []
    for i, span in enumerate(item.array(key)):
        place = f"{key}[{i}]"
        if not isinstance(span, list) or len(span) != 2:
            item.fail(place, f"{found(span)} found, expected an array [start, end]")
        start = item.checked_integer(f"{place}[0]", span[0])
        end = item.checked_integer(f"{place}[1]", span[1], U64 + 1)
        if end <= start:
            item.fail(place, f"ends at {end:#x}, expected more than its start {start:#x}")
        spans.append((start, end))
    return tuple(spans)


def _check_overlaps(file: str, ram: tuple[RamImage, ...], virtio_mem: tuple[VirtioMemState, ...]) -> None:
    spans = [(r.paddr, r.paddr + r.size, f"ram[{i}]") for i, r in enumerate(ram)]
    spans += [(v.addr, v.addr + v.region_size, f"virtio_mem[{i}]") for i, v in enumerate(virtio_mem)]
    spans.sort()
    # As long as none overlaps, each ends before the next starts, so neighbours are all there is to compare.
    for (start, end, name), (start2, end2, name2) in pairwise(spans):
        if start2 < end:
            raise error(f"{file}: {name2}: {start2:#x}-{end2 - 1:#x} overlaps {name}: {start:#x}-{end - 1:#x}")


def _document(machine: RecordedMachine) -> dict[str, object]:
    """What machine.json holds for *machine*: plain values first, nothing that is None."""
    values: dict[str, object] = {"format": FORMAT, **machine._asdict()}
    del values["path"], values["notes"], values["ram"], values["virtio_mem"]
    if machine.seen_from == HOST:
        del values["seen_from"]
    values["ram"] = [_present(ram._asdict()) for ram in machine.ram]
    values["virtio_mem"] = [_present(device._asdict()) for device in machine.virtio_mem]
    return _present(values)


def _present(values: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None}


def _text(value: object, indent: str = "") -> str:
    """*value* as JSON with one key a line, and arrays of plain values or runs on one line."""
    inner = indent + " "
    if isinstance(value, dict):
        items = [f"{inner}{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(inner + _text(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value)
