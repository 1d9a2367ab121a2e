# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is particular to s390x: the header that its capture kernel builds for itself (arch/s390/kernel/crash_dump.c).

Before the capture kernel starts, purgatory swaps low memory [0, size) with the crash region [base, base + size): the
capture kernel runs at 0, and the dead machine's low memory lies where the capture kernel was loaded. So an image taken
then is seen through that swap, and everything that the header needs (os_info, lowcores, VMCOREINFO) is read at the
addresses that the dead machine had for it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from capture import s390x_capture
from capture.arch import Arch, Note, Shape
from capture.elfcore import Load
from capture.memory_map import Device
from capture.s390x_capture import CaptureKernel
from guard.errors import ReadError, WitnessError
from guard.physmem import ExactMemory, OldMemory, Segment, only
from guard.ranges import Range, RangeSet
from guard.registry import Registry
from guard.witness import lowcore, os_info
from guard.witness.lowcore import SaveArea
from guard.witness.os_info import OsInfo
from guard.witness.vmcoreinfo import Vmcoreinfo

if TYPE_CHECKING:
    from capture.dump import Dump

EM_S390 = 22
PAGE = 4096
SECTION_SIZE_BITS = 27  # 128 MiB since virtio-mem came to s390x (6.13); VMCOREINFO's own number goes before

# include/uapi/linux/elf.h
NT_PRSTATUS, NT_PRFPREG, NT_PRPSINFO = 1, 2, 3
NT_S390_TIMER, NT_S390_TODCMP, NT_S390_TODPREG, NT_S390_CTRS, NT_S390_PREFIX = 0x301, 0x302, 0x303, 0x304, 0x305
NT_S390_VXRS_LOW, NT_S390_VXRS_HIGH = 0x309, 0x30A

_NOTE = struct.Struct(">III")
_PRSTATUS_SIZE, _PRPSINFO_SIZE = 336, 136


class S390x(Arch):
    name = "s390x"
    kernel_builds_header = True

    capture: CaptureKernel | None = None
    """The capture kernel that an image was taken of; None in that kernel itself."""
    records: OsInfo | None = None
    cpus: tuple[SaveArea, ...] = ()

    def look(self, segments: list[Segment]) -> None:
        current = ExactMemory(OldMemory(segments, Registry(PAGE)))
        self.capture = s390x_capture.read(
            current, self.machine.images, self.machine.capture_release, self.machine.problems
        )

    def own(self) -> RangeSet:
        return RangeSet([self.capture.crash] if self.capture and self.capture.crash else [])

    def old_view(self, segments: list[Segment]) -> list[Segment]:
        return swapped(segments, self.capture.crash) if self.capture and self.capture.crash else segments

    def hear(self, dump: Dump) -> None:
        self.records = os_info.read_os_info(dump.exact, dump.problems)
        if self.records and (image := self.records.image) and image.paddr not in dump.envelope.boot - self.own():
            dump.problems.note(os_info.image_line(self.records.paddr, image))
            self.records = self.records._replace(image=None)
        try:
            self.info = lowcore.vmcoreinfo_note(dump.exact)
        except (ReadError, WitnessError) as e:
            if not (self.records and self.records.vmcoreinfo):
                dump.problems.note(f"VMCOREINFO: {e}; its note is left out")
        if self.records and self.records.vmcoreinfo:
            self.info = Vmcoreinfo(self.records.vmcoreinfo)
        for line in self.info.problems if self.info else ():
            dump.problems.note(line)
        self.cpus = tuple(lowcore.read_save_areas(dump.exact, self.info, self._translate, dump.problems))

    def _translate(self, vaddr: int) -> int:
        """Physical address of *vaddr* (arch/s390/include/asm/page.h). VMCOREINFO tells too, if os_info is damaged."""
        image, base = (self.records.image, self.records.identity_base) if self.records else (None, 0)
        if image and image.start <= vaddr < image.end:
            return vaddr - image.start + image.paddr
        if not image and self.info:
            offset, phys = self.info.address("KERNELOFFSET"), self.info.address("KERNELOFFPHYS")
            if offset and phys is not None and vaddr >= offset:
                return (vaddr - offset + phys) % (1 << 64)
            base = base or self.info.address("IDENTITYBASE") or 0
        return (vaddr - base) % (1 << 64)

    def shape(self, dump: Dump) -> Shape:
        generation = self.capture.generation if self.capture else s390x_capture.NEWEST
        text, page_offset = None, 0
        if self.records and generation.image:
            page_offset = self.records.identity_base
            if image := self.records.image:
                text = Load(image.paddr, image.start, image.size, PAGE)
        notes = [prpsinfo()]
        for number, cpu in enumerate(self.cpus, 1):
            notes += cpu_notes(cpu, number)
        if self.info:
            notes.append(note(0, b"VMCOREINFO", self.info.desc))
        return Shape(EM_S390, ">", text, page_offset, (Note(b"".join(notes)),), PAGE, generation.note_align)

    def kernel_ranges(self, dump: Dump) -> list[Range] | None:
        """All memory but the crash region, then the memory of virtio-mem devices in the order of their probing."""
        ranges = list(dump.envelope.boot - self.own())
        if self.capture is None or self.capture.generation.device_ram:
            bits = self.capture.section_size_bits if self.capture else None
            for device in self.machine.devices:
                ranges += device_ram(device, 1 << (bits or SECTION_SIZE_BITS))
        return ranges


def swapped(segments: list[Segment], crash: Range) -> list[Segment]:
    """*segments* by the addresses of the dead machine: [0, crash.size) and *crash* change places; its own inverse."""
    low = Range(0, crash.size)
    stay = only(segments, RangeSet([(0, 1 << 64)]) - RangeSet([low, crash]))
    moved = [s._replace(paddr=s.paddr - crash.start) for s in only(segments, RangeSet([crash]))]
    moved += [s._replace(paddr=s.paddr + crash.start) for s in only(segments, RangeSet([low]))]
    return sorted([*stay, *moved])


def device_ram(device: Device, section: int) -> RangeSet:
    """What the kernel's driver adds to the header for *device*: each chunk of *section* bytes, or of a block where that
    is larger, with anything plugged in it, whole (drivers/virtio/virtio_mem.c:virtio_mem_vmcore_get_device_ram())."""
    chunk = max(section, device.block_size)
    usable = RangeSet([(device.region.start, device.region.start + device.usable)])
    return RangeSet((r.start & -chunk, (r.end + chunk - 1) & -chunk) for r in device.plugged_runs()) & usable


def note(kind: int, name: bytes, desc: bytes) -> bytes:
    name += b"\0"
    head = _NOTE.pack(len(name), len(desc), kind)
    return head + name + bytes(-len(name) % 4) + desc + bytes(-len(desc) % 4)


def prpsinfo() -> bytes:
    """All zero but pr_sname and pr_fname (crash_dump.c:nt_prpsinfo())."""
    desc = bytearray(_PRPSINFO_SIZE)
    desc[1] = ord("R")
    desc[40:47] = b"vmlinux"
    return note(NT_PRPSINFO, b"CORE", bytes(desc))


def cpu_notes(cpu: SaveArea, number: int) -> list[bytes]:
    """The notes of one CPU in the kernel's order (crash_dump.c:fill_cpu_elf_notes()); pr_pid is a running number."""
    raw = cpu.raw
    status = bytearray(_PRSTATUS_SIZE)
    struct.pack_into(">I", status, 32, number)
    status[112:128] = raw[0x100:0x110]  # PSW
    status[128:256] = raw[0x80:0x100]  # general registers
    status[256:320] = raw[0x140:0x180]  # access registers
    notes = [
        note(NT_PRSTATUS, b"CORE", bytes(status)),
        note(NT_PRFPREG, b"CORE", raw[0x11C:0x120] + bytes(4) + raw[:0x80]),
        note(NT_S390_TIMER, b"LINUX", raw[0x128:0x130]),
        note(NT_S390_TODCMP, b"LINUX", raw[0x130:0x138]),
        note(NT_S390_TODPREG, b"LINUX", raw[0x124:0x128]),
        note(NT_S390_CTRS, b"LINUX", raw[0x180:0x200]),
        note(NT_S390_PREFIX, b"LINUX", raw[0x118:0x11C]),
    ]
    if cpu.vector is not None:
        low = b"".join(cpu.vector[16 * i + 8 : 16 * i + 16] for i in range(16))
        notes += [note(NT_S390_VXRS_HIGH, b"LINUX", cpu.vector[256:]), note(NT_S390_VXRS_LOW, b"LINUX", low)]
    return notes
