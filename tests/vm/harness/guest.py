# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stock Debian guest: booted, plugged, crashed, and looked at from the host. All that waits has a time-out, in
seconds of the usual machine: how long the guest takes to boot says how many of this one's that are (tests/pace.py).
Errors carry the last lines of the guest's console."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from guard.ranges import RangeSet
from tests import pace

from . import debian, images, memory
from .hardware import Board, Machine, microvm, q35
from .memory import Device, Dimm, GiB, MiB, Plugged, RamFile
from .qemu import Qemu
from .serial import ConsoleError, Ready, Result, Serial

BOOT_TIMEOUT = 180.0
SETTLE = 6.0  # longer than the driver's first retry of a refused request (virtio_mem: 5 s)
FRAGMENT = Path(__file__).resolve().parent / "guest" / "fragment.py"
# ACPI's "hardware reduced" keeps the kernel from the one timer that it could calibrate the TSC with, and only KVM would
# tell its frequency; a wrong one makes the guest's clock run at another pace, nothing else. What is left to watch over
# it are jiffies, which lag on a busy host: the TSC would be called unstable, and timers would stop.
MICROVM_APPEND = " tsc_early_khz=2500000 tsc=reliable"
KEEP = 160  # one pipe of 64 KiB in 10 MiB


class GuestError(Exception):
    """A step inside the guest failed; has the command and what it said."""


class AnyGuest(ABC):
    """A context manager: the guest is up inside ``with``, its first kernel at the shell, its devices plugged."""

    devices: dict[str, Device]
    capture_append: str
    """Command line of the capture kernel."""
    serial: Serial
    usual_boot: float
    """Seconds from the start of QEMU to the shell, on the usual machine."""
    _qemu: Qemu

    @abstractmethod
    def _start(self) -> Qemu: ...

    @property
    @abstractmethod
    def _capture(self) -> tuple[Path, bytes]:
        """Kernel and initramfs that :meth:`load` loads."""

    def __enter__(self) -> Self:
        start = time.monotonic()
        self._qemu = self._start()
        try:
            self.serial = Serial(self._qemu.console)
            self.ready = self.serial.wait_ready(BOOT_TIMEOUT)
            pace.slow((time.monotonic() - start) / self.usual_boot)
            for device in self.devices.values():
                self._wait_settled(device.name)
        except BaseException:
            self._qemu.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the guest; may be called again."""
        self._qemu.close()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._qemu.process.pid

    @property
    def console_tail(self) -> str:
        return self.serial.tail

    def run(self, command: str, timeout: float = 120) -> Result:
        """Runs *command* with the guest's shell; status and output. Raises ConsoleError."""
        return self.serial.run(command, timeout)

    def sh(self, command: str, timeout: float = 120) -> str:
        """Output of *command*. Raises GuestError if it fails, ConsoleError if it does not end in time."""
        status, output = self.run(command, timeout)
        if status:
            raise GuestError(f"`{command}` in the guest: status {status}\n{output}")
        return output

    def put(self, files: Mapping[str, Path | bytes]) -> None:
        """Copies *files* into the guest, by absolute path there; files given as bytes become executable."""
        with open(self._qemu.tools, "r+b") as disk, tarfile.open(fileobj=disk, mode="w") as archive:
            for name, content in files.items():
                if isinstance(content, Path):
                    archive.add(content, name)
                    continue
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o755
                archive.addfile(entry, io.BytesIO(content))
            archive.close()
            pieces = -(-disk.tell() // MiB)
        # no further than the archive's end: busybox's tar would read the whole disk
        self.sh(f"blockdev --flushbufs /dev/tools && dd if=/dev/tools bs=1M count={pieces} | tar -C / -xf -")

    def get(self, *paths: str, timeout: float = 300) -> Path:
        """Copies *paths* (absolute, in the guest) to a folder of the host, which lives as long as the guest does."""
        self.sh(f"tar -cf /dev/scratch {' '.join(paths)} && sync", timeout)
        folder = Path(tempfile.mkdtemp(prefix="get-", dir=self._qemu.folder))
        subprocess.run(["tar", "-C", folder, "-xf", self._qemu.scratch], check=True, capture_output=True)
        return folder

    @property
    def scratch(self) -> Path:
        """The disk /dev/scratch as a file of the host: what the guest wrote there raw (after a sync)."""
        return self._qemu.scratch

    def load(self, syscall: Literal["s", "c"] = "s", append: str = "", options: str = "") -> None:
        """Loads the capture kernel with kexec_file_load(2) ("s") or kexec_load(2) ("c");
        *append* is added to its command line, *options* to those of kexec."""
        vmlinuz, initramfs = self._capture
        self.put({"/tmp/vmlinuz": vmlinuz, "/tmp/initramfs": initramfs})
        line = f"{self.capture_append} {append}".rstrip()
        self.sh(
            f"kexec -{syscall} -p {options} --initrd=/tmp/initramfs --command-line='{line}' /tmp/vmlinuz &&"
            " grep -q 1 /sys/kernel/kexec_crash_loaded && rm /tmp/vmlinuz /tmp/initramfs"
        )

    def crash(self, timeout: float = BOOT_TIMEOUT, command: str = "echo c > /proc/sysrq-trigger") -> Ready:
        """Crashes the kernel by *command* and waits for the capture kernel's shell. Raises ConsoleError."""
        self.serial.send(command)
        return self.wait_crashed(timeout)

    def wait_crashed(self, timeout: float = BOOT_TIMEOUT) -> Ready:
        """Waits for the shell of the next kernel, where something else than :meth:`crash` ends the running one.
        Raises ConsoleError."""
        self.ready = self.serial.wait_ready(timeout)
        return self.ready

    def monitor(self, command: str) -> str:
        """What QEMU's monitor answers to *command* (``info mtree -f``, ``mce ...``). Raises QmpError."""
        answer: str = self._qemu.qmp.command("human-monitor-command", **{"command-line": command})
        return answer.replace("\r", "")

    def next_stage(self, command: str, timeout: float = 60) -> Ready:
        """Has the capture kernel go to another one by *command*, and waits for that one's shell. Raises ConsoleError,
        with what the command said, where it does not go."""
        return self.crash(timeout, f"{command} 2>&1; echo status $?")

    def resize(self, name: str, size: int, timeout: float = 120) -> int:
        """Requests *size* bytes of device *name*; waits until they are plugged, or the guest has given up on the rest.
        Bytes plugged then."""
        self._qemu.qmp.command("qom-set", path=f"/machine/peripheral/{name}", property="requested-size", value=size)
        return self._wait_settled(name, timeout)

    def fragment(self, name: str, size: int, keep: int = KEEP, timeout: float = 300) -> int:
        """Scatters unmovable pages over the guest's memory, then shrinks device *name* towards *size*: what is left
        plugged has holes. Needs ``online="kernel"`` and Python in the guest. Bytes plugged then."""
        self.put({"/tmp/fragment.py": FRAGMENT})
        self.sh(
            f"ulimit -n 1000000; python3 /tmp/fragment.py {keep} > /tmp/fragment.log 2>&1 &"
            " until [ -e /tmp/fragmented ]; do kill -0 $! || { cat /tmp/fragment.log; exit 1; }; sleep 0.2; done",
            timeout,
        )
        return self.resize(name, size)

    def bind_in_kdump_mode(self) -> None:
        """In the capture kernel: loads the driver of virtio-mem, and waits until it has all devices. It lets them keep
        what they have plugged only where there is a /proc/vmcore; elsewhere this is a GuestError."""
        said = "memory hot(un)plug disabled in kdump kernel"
        until = f"until [ $(dmesg | grep -cF '{said}') -ge {len(self.devices)} ]; do sleep 0.1; done"
        self.sh(f"test -e /proc/vmcore && modprobe virtio_mem && {until}")

    def ram_map(self) -> RangeSet:
        """Physical addresses at which a CPU finds RAM now, as QEMU has them (``info mtree -f``)."""
        views = self.monitor("info mtree -f").split("FlatView #")
        (view,) = (v for v in views if re.search(r'^ AS "memory", root: system$', v, re.M))
        lines = re.findall(r"^ +([0-9a-f]+)-([0-9a-f]+) \(prio -?\d+, ram\)", view, re.M)
        return RangeSet((int(first, 16), int(last, 16) + 1) for first, last in lines)

    def plug_truth(self) -> dict[str, Plugged]:
        """QEMU's own word on each virtio-mem device."""
        truth: dict[str, Plugged] = {}
        for item in self._qemu.qmp.command("query-memory-devices"):
            if item["type"] != "virtio-mem":
                continue
            data = item["data"]
            truth[data["id"]] = Plugged(
                data["memaddr"], data["size"], data["requested-size"], data["max-size"], data["block-size"]
            )
        return truth

    def extents(self, name: str) -> RangeSet:
        """Populated bytes of device *name*, as offsets into its region: the plugged blocks, and any unplugged page that
        was touched."""
        return memory.extents(self._qemu.ram_path(name))

    def populated(self, name: str) -> RangeSet:
        """:meth:`extents` as physical addresses."""
        base = self.plug_truth()[name].memaddr
        return RangeSet((base + start, base + end) for start, end in self.extents(name))

    def allocated(self, name: str) -> int:
        """Bytes of host memory behind device *name* (or ``ram``)."""
        return memory.allocated(self._qemu.ram_path(name))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the guest's CPUs, so that its memory holds still for the host to read."""
        self._qemu.qmp.command("stop")
        try:
            yield
        finally:
            self._qemu.qmp.command("cont")

    def _wait_settled(self, name: str, timeout: float = 120) -> int:
        deadline = pace.Deadline(timeout)
        last, since = -1, 0.0
        while True:
            truth = self.plug_truth()[name]
            now = time.monotonic()
            if truth.size != last:
                last, since = truth.size, now
            if truth.size == truth.requested or now - since > pace.patience(SETTLE):
                return truth.size
            if deadline.left() <= 0:
                raise ConsoleError(f"{name}: still changing, {truth}, last lines:\n{self.console_tail}")
            time.sleep(0.1)


class Guest(AnyGuest):
    """A stock x86_64 guest.

    *kernel* is one of ``debian.SUITES``, or one that was built, of which ``modules`` are in the initramfs; *memory*
    the boot RAM in bytes, of which *below_4g* lie below 4 GiB and the rest from 4 GiB on; *online* the zone that
    added memory goes to ("movable": can be unplugged again; "kernel": the kernel uses it for itself too); *oldmem*
    whether the initramfs has Python and oldmem, *testing* whether it has ``makedumpfile-testing``; *balloon* whether
    there is a virtio-balloon device (see :meth:`inflate`); *capture* the capture kernel's initramfs, if that is to be
    another one.

    What the machine tells of itself: *machine* ("microvm" has no PCI, SMBIOS or SRAT), *firmware*, *hint* (QEMU's
    vmcoreinfo device), *fw_cfg* (whether init loads qemu_fw_cfg), *numa* (a SRAT), *tables* (ACPI tables by name that
    both kernels take instead of the firmware's or in addition to it); *dimms* get slots, see :meth:`plug`."""

    capture_append = "console=ttyS0 irqpoll nr_cpus=1 reset_devices panic=-1 harness.capture"
    modules: tuple[str, ...] = images.MODULES
    usual_boot = 4.0

    def __init__(
        self,
        kernel: str | debian.Kernel = "6.12",
        *,
        memory: int = 768 * MiB,
        below_4g: int = 512 * MiB,
        devices: Sequence[Device] = (),
        dimms: Sequence[Dimm] = (),
        crashkernel: str = "192M",
        smp: int = 2,
        online: Literal["movable", "kernel"] = "movable",
        append: str = "",
        oldmem: bool = True,
        testing: bool = False,
        balloon: bool = False,
        capture: bytes | None = None,
        machine: Machine = "q35",
        firmware: Literal["seabios", "ovmf"] = "seabios",
        hint: bool = True,
        fw_cfg: bool = True,
        numa: bool = True,
        tables: Mapping[str, bytes] | None = None,
    ) -> None:
        self.kernel = debian.kernel(kernel) if isinstance(kernel, str) else kernel
        self.devices = {device.name: device for device in devices}
        self.dimms = {dimm.name: dimm for dimm in dimms}
        upgrades = images.table_upgrades(tables or {})
        self._initramfs = upgrades + images.initramfs(self.kernel, oldmem, testing, self.modules)
        self._capture_initramfs = self._initramfs if capture is None else upgrades + capture
        bios = debian.ovmf() if firmware == "ovmf" else None
        below_4g = min(below_4g, memory)
        self._board = Board(memory, below_4g, smp, devices, dimms, balloon, hint, numa, bios)
        self._make = microvm if machine == "microvm" else q35
        options = f"console=ttyS0 panic=-1 crashkernel={crashkernel} memhp_default_state=online_{online}"
        both = ("" if fw_cfg else " harness.no_fw_cfg") + (MICROVM_APPEND if machine == "microvm" else "")
        self.capture_append += both
        self._append = f"{options}{both} {append}".rstrip()

    @property
    def _capture(self) -> tuple[Path, bytes]:
        return self.kernel.vmlinuz, self._capture_initramfs

    def _start(self) -> Qemu:
        hardware = self._make(self._board)
        return Qemu(hardware, vmlinuz=self.kernel.vmlinuz, initramfs=self._initramfs, append=self._append)

    def plug(self, name: str) -> RamFile:
        """Puts the module *name* of *dimms* into its slot; the guest's kernel brings it online by itself, soon after.
        Returns where it is. Raises QmpError."""
        size = self.dimms[name].size
        backend = {"size": size, "mem-path": name, "share": True}
        self._qemu.qmp.command("object-add", **{"qom-type": "memory-backend-file", "id": f"mem-{name}", **backend})
        node = {"node": 0} if self._board.numa else {}
        self._qemu.qmp.command("device_add", driver="pc-dimm", id=name, memdev=f"mem-{name}", **node)
        return next(file for file in self.ram_files if file.name == name)

    def put_boot_files(self) -> None:
        """Copies kernel and initramfs to where ``oldmem stage2`` looks for a Debian machine's."""
        release = self.kernel.release
        files: dict[str, Path | bytes] = {f"/boot/vmlinuz-{release}": self.kernel.vmlinuz}
        self.put({**files, f"/var/lib/kdump/initrd.img-{release}": self._initramfs})

    def inflate(self, size: int, timeout: float = 60.0) -> None:
        """Has the guest's balloon driver (which the caller has loaded) give *size* bytes of boot RAM and of what is
        plugged back to the host."""
        total = self._qemu.qmp.command("query-balloon")["actual"]
        self._qemu.qmp.command("balloon", value=total - size)
        deadline = pace.Deadline(timeout)
        while self._qemu.qmp.command("query-balloon")["actual"] != total - size:
            if deadline.left() <= 0:
                raise GuestError(f"the balloon did not grow to {size} bytes, last lines:\n{self.console_tail}")
            time.sleep(0.1)

    @property
    def ram_files(self) -> tuple[RamFile, ...]:
        """Where the host finds each physical address: boot RAM below and above 4 GiB, then the devices' regions and
        the modules that are plugged."""
        memory, below = self._board.memory, self._board.below_4g
        ram = self._qemu.ram_path("ram")
        files = [RamFile("ram", ram, 0, 0, below)]
        if memory > below:
            files.append(RamFile("ram", ram, below, 4 * GiB, memory - below))
        for name, truth in self.plug_truth().items():
            files.append(RamFile(name, self._qemu.ram_path(name), 0, truth.memaddr, truth.max_size))
        for item in self._qemu.qmp.command("query-memory-devices"):
            if item["type"] == "dimm":
                data = item["data"]
                files.append(RamFile(data["id"], self._qemu.ram_path(data["id"]), 0, data["addr"], data["size"]))
        return tuple(files)
