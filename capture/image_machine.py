# SPDX-License-Identifier: LGPL-2.1-or-later
"""A recorded machine in place of a live one: images for memory, copies of /sys and /proc for facts. No capture kernel
needs it, so none has it in its initramfs."""

from __future__ import annotations

import os

from capture.machine import Machine
from capture.memory_map import Device
from capture.recorded import CAPTURE_KERNEL, RecordedMachine, Runs
from capture.sources import files
from guard import loop
from guard.errors import SourceError
from guard.loop import LoopDevice
from guard.physmem import ABSENT, PREAD, Segment, absent, layer, only, whole_pages
from guard.ranges import Range, RangeSet
from guard.virtio_search import set_blocks


class ImageMachine(Machine):
    """A recorded machine: images for memory, copies of /sys and /proc for facts. *use_loop* attaches the images as
    read-only loop devices. Raises SourceError (images), DeviceError (loop devices), or Error."""

    def __init__(self, record: RecordedMachine, use_loop: bool = False) -> None:
        super().__init__(record.root_path, record.arch)
        self.record: RecordedMachine = record
        self._loops: list[LoopDevice] = []
        self.page_size, self.capture_release = record.page_size, record.capture_release
        if record.vmcoreinfo_paddr is not None:
            self.vmcoreinfo_paddr = record.vmcoreinfo_paddr
        self.own_vmcoreinfo, self.phdr_note_align = record.own_vmcoreinfo, record.phdr_note_align
        if record.machine_checks is not None:
            self.machine_checks = RangeSet(record.machine_checks)
        self._use_loop = use_loop
        for line in record.notes:
            self.problems.note(line)
        if not (self.arch.kernel_builds_header or self.reports["iomem"].available):
            self.problems.note(
                f"{self.reports['iomem'].problems[0]}; only the first MiB is taken to be the capture kernel's own"
            )
        core = os.path.join(record.root_path, "proc/vmcore")
        try:
            self._open_core(files.resolve(record.root_path, "proc/vmcore"), core)
        except OSError as e:
            self.problems.note(f"{core}: {e.strerror}; taken as absent")
        if record.seen_from != CAPTURE_KERNEL:
            self.images = RangeSet((r.paddr, r.paddr + r.size) for r in record.ram)
        for v in record.virtio_mem:
            blocks = v.usable_region_size // v.block_size
            bitmap = bytearray((blocks + 7) // 8)
            for first, count in v.plugged:
                set_blocks(bitmap, first, count)
            region = Range(v.addr, v.addr + v.region_size)
            self.devices.append(
                Device(
                    v.name or f"virtio-mem {v.addr:#x}",
                    region,
                    *(v.usable_region_size, v.block_size, v.plugged_size, v.requested_size, v.node_id),
                    bytes(bitmap),
                    "recorded",
                )
            )
        try:
            self._segments = self._open_images()
            self.arch.look(self._segments)
        except BaseException:
            self.close()
            raise

    def open_segments(self, wanted: RangeSet) -> list[Segment]:
        return only(self.arch.old_view(self._segments), wanted)

    def firmware_segments(self, wanted: RangeSet) -> list[Segment]:
        return only(self._segments, wanted)

    def _open_images(self) -> list[Segment]:
        """All images, by the addresses that memory had when they were taken; an image may begin inside of a page."""
        parts: list[tuple[str, int, int, int, Runs | None, Runs | None]] = [
            (r.image, r.offset, r.paddr, r.size, r.held, None) for r in self.record.ram
        ]
        for v in self.record.virtio_mem:
            if v.image is not None:
                parts.append((v.image, v.offset, v.addr, v.region_size, v.held, v.shown))
        opened: dict[str, int] = {}
        found: list[Segment] = []
        for image, offset, paddr, size, held, shown in sorted(parts, key=lambda p: p[2]):
            path = self.record.resolve(image)
            if path not in opened:
                opened[path] = self._open_image(path)
            whole = Segment(paddr, size, opened[path], offset, PREAD, path)
            there = self._pages(paddr, shown) if shown is not None else RangeSet([(paddr, paddr + size)])
            found += only([whole], there) if held is None else self._held(whole, held, there)
        if any(s.how == ABSENT for s in found):
            self.remarks.note("a minimal record: what is no page that map, header or guard need cannot be read")
        self.source = "images" + (" on loop devices" if self._use_loop else "")
        return whole_pages(found, self.page_size)

    def _pages(self, paddr: int, runs: Runs) -> RangeSet:
        page = self.page_size
        return RangeSet((paddr + first * page, paddr + (first + count) * page) for first, count in runs)

    def _held(self, whole: Segment, held: Runs, shown: RangeSet) -> list[Segment]:
        """The pages *held*, which lie back to back in the file of *whole*, and between them what was not recorded."""
        pieces, offset = [], whole.offset
        for piece in self._pages(whole.paddr, held):
            pieces.append(whole._replace(paddr=piece.start, size=piece.size, offset=offset))
            offset += piece.size
        return layer(pieces, [absent(rest.start, rest.size, whole.name) for rest in shown])

    def _open_image(self, path: str) -> int:
        if self._use_loop and os.path.isfile(path):
            device = loop.attach(path)
            self._loops.append(device)
            return device.fd
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise SourceError(f"{path}: {e.strerror}") from None
        self._fds.append(fd)
        return fd

    def close(self) -> None:
        super().close()
        for device in self._loops:
            device.close()
        self._loops = []
