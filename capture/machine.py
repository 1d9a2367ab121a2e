# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machine whose memory is to be shown: the one that this capture kernel came from, or a recorded one
(image_machine.py).

Both answer the same questions: what firmware and sysfs say, what belongs to the capture kernel, what the virtio-mem
devices say, and which files show its memory."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from capture.arch import Arch
from capture.memory_map import Device
from capture.sources import cmdline, firmware_memmap, fw_cfg, iomem, memory_blocks, report, smbios, srat
from capture.sources.report import SourceReport
from guard import devmem, procvmcore, virtio_mem
from guard.corefile import CoreFile
from guard.errors import Error, SourceError
from guard.physmem import Segment, Touched, covered, layer, only
from guard.procvmcore import CoreHeader
from guard.ranges import Range, RangeSet
from guard.witness.memory import Problems

if TYPE_CHECKING:
    from capture.recorded import RecordedMachine

SOURCES = {
    "fw_cfg": fw_cfg.read,
    "srat": srat.read,
    "smbios": smbios.read,
    "firmware_memmap": firmware_memmap.read,
    "iomem": iomem.read,
    "memory_blocks": memory_blocks.read,
    "cmdline": cmdline.read,
}


def arch_named(name: str) -> type[Arch]:
    """The architecture called so by uname(2). No machine needs another one's, so each is imported when it is asked for.
    Raises Error."""
    if name == "x86_64":
        from capture.x86_64 import X86_64

        return X86_64
    if name == "s390x":
        from capture.s390x import S390x

        return S390x
    raise Error(f"machine architecture {name}: headers are built for x86_64 and s390x only")


class NotCaptureError(Error):
    """This is no capture environment: there is no dead machine whose memory could be read."""


class Machine:
    """Facts and files; nothing is decided here. Close it when done."""

    page_size = 4096
    images = RangeSet()
    capture_release: str | None = None
    vmcoreinfo_paddr: int | None = None
    own_vmcoreinfo: int | None = None
    phdr_note_align: int | None = None
    machine_checks: RangeSet | None = None
    """What the dead kernel's log named in fatal machine checks (physical bytes); None: the log is to be asked."""
    touched: Touched | None = None
    """Where exact reads note their pages; None: nobody wants to know."""
    core_header: CoreHeader | None = None
    core: CoreFile | None = None
    """The kernel's own vmcore, never held open: a driver that adds a device dump to it must find it closed."""
    core_fd: int | None = None
    """The descriptor of :attr:`core`, by O_PATH: :meth:`read_core` reads."""
    header_is_the_kernels = False
    """The running kernel built the header of its /proc/vmcore itself, after the crash: there is none better."""
    live = False
    """It is the machine that this runs on."""
    record: RecordedMachine | None = None
    """What it was loaded from; None: it is live."""

    def __init__(self, root: str, arch: str) -> None:
        self.root = root
        self.arch: Arch = arch_named(arch)(self)
        self.problems = Problems(192)  # of each source up to 17 lines, and then some
        self.remarks = Problems()  # nothing wrong, but worth knowing: shown on request
        self.reports: dict[str, SourceReport] = {name: read(root) for name, read in SOURCES.items()}
        self.devices: list[Device] = []
        self.unlocated: list[tuple[str, bool]] = []  # virtio-mem whose region is not known; does the kernel gate it?
        self.source = ""
        self.unmapped: list[tuple[Range, str]] = []  # what the first choice of source refused, and why
        self._fds: list[int] = []
        for f in self.reports["fw_cfg"].findings:
            if f.kind == report.VMCOREINFO:
                self.vmcoreinfo_paddr = f.start

    @property
    def own(self) -> RangeSet:
        """What belongs to the capture kernel."""
        return self.arch.own()

    def open_segments(self, wanted: RangeSet) -> list[Segment]:
        """The files that show *wanted* (whole pages). Raises SourceError if there is none."""
        raise NotImplementedError

    def to_map(self, segments: list[Segment]) -> list[Segment]:
        """What *segments* show, through the files that are quickest to map."""
        return segments

    def firmware_segments(self, wanted: RangeSet) -> list[Segment]:
        """The files that show *wanted* (whole pages), which firmware keeps its tables in. Raises SourceError if there
        is none."""
        raise NotImplementedError

    def around_kernel(self) -> bool:
        """Is old memory read other than through /proc/vmcore, where the kernel has rules of its own?"""
        return True

    def only_through_kernel(self, why: str) -> None:
        """Read old memory through /proc/vmcore alone, for the reason *why*, if reading it otherwise can harm. Raises
        Error where that is not possible."""
        self.problems.note(f"{why}; nothing is refused for it")

    def core_header_bytes(self) -> bytes:
        """The kernel's own header and notes, as /proc/vmcore starts. Raises SourceError where there is none."""
        if self.core is None:
            raise SourceError(f"{procvmcore.PATH}: the kernel made none: there is no preloaded header")
        return self.core.read(self.core.header.size, 0)

    def read_core(self, size: int, offset: int) -> bytes:
        """*size* bytes from *offset* on of the kernel's own header and notes. Raises SourceError where it does not have
        them."""
        if self.core is None:
            raise SourceError(f"{procvmcore.PATH}: the kernel made none: it has no notes either")
        return self.core.read(size, offset)

    def late_dumps(self) -> list[str]:
        """What drivers have added to the kernel's own vmcore since its header was read, and no reader of ours sees: a
        line each. None is good."""
        if self.core is None or not self.live:
            return []
        try:
            added = self.core.added()
        except SourceError as e:
            return [f"{e}: whether a driver has added a device dump is not known"]
        lines = []
        if added.dumps:
            lines.append(f"{self.core.name}: {added.dumps} bytes of device dumps were added too late for this vmcore")
        if added.ram:
            lines.append(f"{self.core.name}: {added.ram} bytes of memory were added too late for this vmcore")
        return lines

    def _open_core(self, real_path: str, path: str) -> None:
        """Remember the kernel's own vmcore, before anything is mounted over it. *path* is what messages call it."""
        try:
            self.core = CoreFile(real_path, path)
        except OSError as e:
            if e.errno != errno.ENOENT:
                self.problems.note(f"{path}: {e.strerror}")
            return
        except SourceError as e:
            self.problems.note(str(e))
            return
        self._fds.append(self.core.fd)
        self.core_header, self.core_fd = self.core.header, self.core.fd
        notes = [p for p in self.core_header.phdrs if p.type == procvmcore.PT_NOTE]
        if notes and self.phdr_note_align is None:
            self.phdr_note_align = notes[0].align

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class LiveMachine(Machine):
    """The machine that this capture kernel came from. Raises NotCaptureError, or Error where going on would harm.

    *source* is "devmem", "vmcore" or "auto"; *force* skips the test for a capture environment."""

    live = True
    _devmem_fd: int | None = None

    def __init__(self, source: str = "auto", force: bool = False) -> None:
        super().__init__("/", os.uname().machine)
        self._wanted_source = source
        elfcorehdr = any(f.kind == report.ELFCOREHDR for f in self.reports["cmdline"].findings)
        self.kdump_mode = elfcorehdr or os.path.exists(procvmcore.PATH)
        if not (self.kdump_mode or force):
            raise NotCaptureError(
                f"this is no capture environment: no {procvmcore.PATH} and no elfcorehdr= (--force: go on anyway)"
            )
        self.header_is_the_kernels = self.arch.kernel_builds_header
        if self.header_is_the_kernels:
            self._wanted_source = self._only_vmcore(source)
        else:
            self._must_know_own(self.reports["iomem"])
        self._refuse_danger()
        self._open_core(procvmcore.PATH, procvmcore.PATH)
        self.own_vmcoreinfo = _own_vmcoreinfo()
        if not self.header_is_the_kernels:
            self.devices = self._query_devices()

    @staticmethod
    def _must_know_own(found: SourceReport) -> None:
        if not found.ranges(report.OWN_RAM):
            lacks = f"{found.path}: has no System RAM, expected this kernel's own"
            why = lacks if found.available or not found.problems else found.problems[0]
            raise Error(f"{why}; without it own memory cannot be told from old memory")

    def _only_vmcore(self, source: str) -> str:
        """Where the kernel builds the header, its drivers also add the memory of virtio-mem devices to it, and gate it:
        what the devices say is in /proc/vmcore already, and taking them from their drivers would lose that."""
        if source == "devmem":
            raise Error(f"--source devmem: on {self.arch.name} only {procvmcore.PATH} shows old memory")
        return "vmcore"

    def _refuse_danger(self) -> None:
        """Outside kdump mode the in-kernel virtio_mem driver sends UNPLUG_ALL and destroys what we are here to save."""
        claims = self.reports["iomem"].ranges(report.DRIVER_CLAIM)
        if claims:
            raise Error(
                f"virtio_mem is bound outside kdump mode and claims {claims}: old memory there is being destroyed"
            )
        if not self.kdump_mode and os.path.exists("/sys/module/virtio_mem"):
            raise Error(
                "virtio_mem is loaded and this kernel is not in kdump mode (no elfcorehdr=): "
                "the driver would unplug all memory of the dead machine; boot without it"
            )

    def _query_devices(self) -> list[Device]:
        """Ask each device. Where the kernel's own driver has it in kdump mode, taking it away for a moment is safe;
        where asking fails while that driver is there, the driver stays the gate, and /proc/vmcore the only way in."""
        found = []
        for result in virtio_mem.query_all("/sys", allow_bound=self.kdump_mode):
            name, c, state = result.function.bdf, result.config, result.state
            gated = state is None and self.kdump_mode and result.function.virtio_driver == virtio_mem.KERNEL_DRIVER
            if state is None:
                who = (
                    f"the in-kernel driver gates it, through {procvmcore.PATH} only"
                    if gated
                    else "nothing of it is read"
                )
                self.problems.note(f"{name}: plug state not to be had: {result.reason}; {who}")
            if c is None:
                self.unlocated.append((name, gated))
                continue
            found.append(
                Device(
                    name,
                    c.region,
                    *(c.usable_region_size, c.block_size, c.plugged_size, c.requested_size, c.node_id),
                    state.bitmap if state else None,
                    result.reason,
                    gated,
                    (*result.problems, *(state.problems if state else ())),
                    state.requests if state else 0,
                )
            )
        return found

    def open_segments(self, wanted: RangeSet) -> list[Segment]:
        gated = RangeSet(d.region for d in self.devices if d.gated_by_kernel)
        upper: list[Segment] = []
        if self._wanted_source != "vmcore":
            buffers = self.reports["iomem"].ranges(report.RAM_BUFFER)
            try:
                opened = devmem.open_devmem(wanted - gated, self.own, buffers)
            except SourceError as e:
                if self._wanted_source == "devmem" or self.core_fd is None:
                    raise
                self.problems.note(f"{e}; {procvmcore.PATH} is read instead, as far as its header reaches")
            else:
                upper = self._kept(opened)
                self.unmapped += opened.refused
        lower: list[Segment] = []
        if self._wanted_source != "devmem" and self.core_header is not None and self.core_fd is not None:
            lower = only(procvmcore.segments(self.core_fd, self.core_header), wanted)
        segments = layer(upper, lower)
        if not segments:
            raise SourceError(f"neither {devmem.PATH} nor {procvmcore.PATH} shows any old memory")
        names = [*filter(None, self.source.split(" and ")), *(s.name for s in segments)]
        self.source = " and ".join(dict.fromkeys(names))
        return segments

    def to_map(self, segments: list[Segment]) -> list[Segment]:
        """/proc/vmcore first: of each page of /dev/mem that is mapped, the kernel looks up what it is
        (drivers/char/mem.c:range_is_allowed())."""
        if self._wanted_source == "devmem" or self.core_header is None or self.core_fd is None:
            return segments
        kernels = procvmcore.segments(self.core_fd, self.core_header, self.page_size)
        aligned = [s for s in kernels if not s.offset % self.page_size]
        return layer(only(aligned, covered(segments)), segments)

    def firmware_segments(self, wanted: RangeSet) -> list[Segment]:
        return self._kept(devmem.open_devmem(wanted, self.own, RangeSet()))

    def _kept(self, opened: devmem.Opened) -> list[Segment]:
        """The segments of *opened*, by the one descriptor of /dev/mem that is kept until :meth:`close`."""
        if self._devmem_fd is None:
            self._devmem_fd = opened.fd
            self._fds.append(opened.fd)
            return opened.segments
        os.close(opened.fd)
        return [s._replace(fd=self._devmem_fd) for s in opened.segments]

    def around_kernel(self) -> bool:
        if self._wanted_source == "vmcore":
            return False
        try:
            os.close(os.open(devmem.PATH, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return False
        return True

    def only_through_kernel(self, why: str) -> None:
        if self._wanted_source == "devmem" or self.core_fd is None:
            raise Error(f"{why}: old memory is read through {procvmcore.PATH} then or not at all")
        self._wanted_source = "vmcore"
        self.problems.note(f"{why}; {procvmcore.PATH} alone is read, where the kernel has the same rule")


def _own_vmcoreinfo() -> int | None:
    """Physical address of this kernel's own note: never to be taken for the dead one's."""
    try:
        with open("/sys/kernel/vmcoreinfo", encoding="ascii") as file:
            return int(file.read().split()[0], 16)
    except (OSError, ValueError, IndexError):
        return None
