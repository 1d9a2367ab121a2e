# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtio PCI functions in sysfs, their capabilities, and access to their registers.

Layouts: virtio specification, "Virtio Over PCI Bus"; include/uapi/linux/virtio_pci.h, virtio_config.h, pci_regs.h.
Registers are reached by mapping a BAR (Window), or through configuration space alone (ConfigWindow)."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from typing import NamedTuple

from .errors import DeviceError

VIRTIO_VENDOR = 0x1AF4

# PCI configuration space (include/uapi/linux/pci_regs.h)
PCI_COMMAND = 0x04
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4
PCI_COMMAND_INTX_DISABLE = 0x400
PCI_STATUS = 0x06
PCI_STATUS_CAP_LIST = 0x10
PCI_CAPABILITY_LIST = 0x34
PCI_CAP_ID_VNDR = 0x09
IORESOURCE_MEM = 0x200

CAP_COMMON_CFG, CAP_NOTIFY_CFG, CAP_DEVICE_CFG, CAP_PCI_CFG = 1, 2, 4, 5
CAP_BAR, CAP_OFFSET, CAP_LENGTH, NOTIFY_CAP_MULT, PCI_CFG_DATA = 4, 8, 12, 16, 16

# struct virtio_pci_common_cfg
COMMON_DFSELECT, COMMON_DF, COMMON_GFSELECT, COMMON_GF = 0, 4, 8, 12
COMMON_MSIX, COMMON_STATUS, COMMON_CFGGENERATION = 16, 20, 21
COMMON_Q_SELECT, COMMON_Q_SIZE, COMMON_Q_MSIX, COMMON_Q_ENABLE, COMMON_Q_NOFF = 22, 24, 26, 28, 30
COMMON_Q_DESCLO, COMMON_Q_AVAILLO, COMMON_Q_USEDLO = 32, 40, 48
COMMON_SIZE = 56
MSI_NO_VECTOR = 0xFFFF

STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_DRIVER_OK, STATUS_FEATURES_OK = 1, 2, 4, 8
STATUS_NEEDS_RESET = 0x40
F_VERSION_1 = 32
F_ACCESS_PLATFORM = 33

_GENERATION_TRIES = 16


class PciFunction(NamedTuple):
    """A virtio PCI function and who drives it now (driver names, "" for none)."""

    bdf: str
    path: str
    driver: str
    virtio_name: str
    virtio_driver: str


class Capability(NamedTuple):
    """One virtio capability: where its structure lies (BAR number, byte offset and length in it)."""

    position: int
    bar: int
    offset: int
    length: int
    multiplier: int


def find_functions(sysfs: str, device_id: int) -> list[PciFunction]:
    """All functions VIRTIO_VENDOR:*device_id*, in PCI order. *sysfs* is where sysfs is mounted. No PCI: none."""
    root = f"{sysfs}/bus/pci/devices"
    try:
        names = os.listdir(root)
    except OSError:
        return []
    found = []
    for bdf in sorted(names, key=lambda name: [(len(part), part) for part in name.split(":")]):
        path = f"{root}/{bdf}"
        try:
            if (_read_hex(f"{path}/vendor"), _read_hex(f"{path}/device")) != (VIRTIO_VENDOR, device_id):
                continue
            virtio = [n for n in sorted(os.listdir(path)) if n.startswith("virtio") and n[6:].isdigit()]
        except (OSError, ValueError):
            continue
        name = virtio[0] if virtio else ""
        found.append(PciFunction(bdf, path, _driver(path), name, _driver(f"{path}/{name}") if name else ""))
    return found


def _read_hex(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read(32), 16)


def _driver(path: str) -> str:
    try:
        return os.path.basename(os.readlink(f"{path}/driver"))
    except OSError:
        return ""


def driver_registered(sysfs: str, name: str) -> bool:
    """True if the virtio driver *name* is in the kernel, and so would bind to any device of its type that appears."""
    return os.path.isdir(f"{sysfs}/bus/virtio/drivers/{name}")


def write_sysfs(path: str, text: str) -> None:
    """One write(2) of *text*: sysfs attributes take nothing less. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def read_capabilities(config: bytes, bar_sizes: list[int]) -> dict[int, Capability]:
    """The first usable virtio capability of each type in the 256 bytes *config*; *bar_sizes* in bytes, 0 = not a
    memory BAR. The list is walked with bounds and a cycle check; structures outside their BAR are left out."""
    caps: dict[int, Capability] = {}
    if len(config) < 256 or not config[PCI_STATUS] & PCI_STATUS_CAP_LIST:
        return caps
    seen: set[int] = set()
    position = config[PCI_CAPABILITY_LIST] & 0xFC
    while 0x40 <= position <= 0xF0 and position not in seen:
        seen.add(position)
        ident, following, size, kind, bar = config[position : position + 5]
        if ident == PCI_CAP_ID_VNDR and size >= 16 and position + size <= 256:
            offset, length = struct.unpack_from("<II", config, position + CAP_OFFSET)
            multiplier = 0
            if kind == CAP_NOTIFY_CFG and size >= 20:
                (multiplier,) = struct.unpack_from("<I", config, position + NOTIFY_CAP_MULT)
            inside = bar < len(bar_sizes) and length > 0 and offset + length <= bar_sizes[bar]
            # The BAR, offset and length of the configuration access capability are scratch registers.
            if (kind == CAP_PCI_CFG and size >= 20) or (kind != CAP_PCI_CFG and inside and offset % 4 == 0):
                caps.setdefault(kind, Capability(position, bar, offset, length, multiplier))
        position = following & 0xFC
    return caps


class ConfigSpace:
    """The PCI configuration space of a function through its sysfs file; DeviceError names what forbids an access."""

    def __init__(self, path: str) -> None:
        self._path = f"{path}/config"
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DeviceError(f"{self._path}: {error.strerror}") from None

    def read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as error:
            raise DeviceError(f"{self._path}: {error.strerror}") from None
        if len(data) != size:
            raise DeviceError(f"{self._path}: {len(data)} bytes instead of {size} at {offset:#x}")
        return data

    def write(self, offset: int, data: bytes) -> None:
        try:
            written = os.pwrite(self._fd, data, offset)
        except OSError as error:
            why = " (kernel lockdown?)" if error.errno == errno.EPERM else ""
            raise DeviceError(f"{self._path}: cannot write: {error.strerror}{why}") from None
        if written != len(data):
            raise DeviceError(f"{self._path}: {written} bytes instead of {len(data)} written at {offset:#x}")

    def close(self) -> None:
        os.close(self._fd)


def function_capabilities(function: PciFunction, config: ConfigSpace) -> dict[int, Capability]:
    """Capabilities of *function*, checked against the sizes of its BARs; DeviceError if a needed one is missing."""
    sizes = []
    try:
        with open(f"{function.path}/resource", encoding="ascii") as file:
            for line in file.readlines(4096)[:6]:
                start, end, flags = (int(word, 16) for word in line.split())
                sizes.append(end - start + 1 if flags & IORESOURCE_MEM and end > start else 0)
    except (OSError, ValueError) as error:
        raise DeviceError(f"{function.path}/resource: {error}") from None
    caps = read_capabilities(config.read(0, 256), sizes)
    for kind, name, least in ((CAP_COMMON_CFG, "common", COMMON_SIZE), (CAP_DEVICE_CFG, "device", 1)):
        if kind not in caps or caps[kind].length < least:
            raise DeviceError(f"{function.bdf}: no usable virtio capability for the {name} configuration in a BAR")
    return caps


class Window:
    """A mapped part of a memory BAR. Every access is one naturally sized load or store: that is how memoryview items
    of a native format are read and written, and unlike a ctypes store it does not read first."""

    def __init__(self, path: str, offset: int, length: int) -> None:
        start = offset & -mmap.ALLOCATIONGRANULARITY
        self._skip = offset - start
        self._length = length
        try:
            fd = os.open(path, os.O_RDWR | os.O_SYNC | os.O_CLOEXEC)
            try:
                size = (self._skip + length + 3) & ~3
                self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
            finally:
                os.close(fd)
        except ValueError as error:
            raise DeviceError(f"{path}: cannot map the BAR: {error}") from None
        except OSError as error:
            why = {
                errno.EPERM: "kernel lockdown, or CAP_SYS_RAWIO is missing",
                errno.EINVAL: "a driver still claims it (IO_STRICT_DEVMEM)",
                errno.EBUSY: "a driver still claims it (IO_STRICT_DEVMEM)",
            }.get(error.errno or 0, "no access from user space")
            raise DeviceError(f"{path}: cannot map the BAR: {error.strerror}: {why}") from None
        view = memoryview(self._map)
        self._views = {1: view, 2: view.cast("H"), 4: view.cast("I")}

    def _index(self, offset: int, size: int) -> int:
        if offset % size or not 0 <= offset <= self._length - size:
            raise DeviceError(f"access of {size} bytes at {offset:#x} outside a BAR window of {self._length:#x} bytes")
        return (self._skip + offset) // size

    def read(self, offset: int, size: int) -> int:
        return self._views[size][self._index(offset, size)]

    def write(self, offset: int, size: int, value: int) -> None:
        self._views[size][self._index(offset, size)] = value

    def close(self) -> None:
        for size in (4, 2, 1):
            self._views[size].release()
        self._map.close()


class ConfigWindow:
    """Reads a structure of a BAR through VIRTIO_PCI_CAP_PCI_CFG: no mapping, and a bound driver is not disturbed."""

    def __init__(self, config: ConfigSpace, access: Capability, target: Capability) -> None:
        self._config = config
        self._access = access.position
        self._target = target

    def read(self, offset: int, size: int) -> int:
        if offset + size > self._target.length:
            raise DeviceError(f"access of {size} bytes at {offset:#x} outside {self._target.length:#x} bytes of a BAR")
        self._config.write(self._access + CAP_BAR, bytes([self._target.bar]))
        self._config.write(self._access + CAP_OFFSET, struct.pack("<I", self._target.offset + offset))
        self._config.write(self._access + CAP_LENGTH, struct.pack("<I", size))
        return int.from_bytes(self._config.read(self._access + PCI_CFG_DATA, size), "little")


def stable_config(common: Window | ConfigWindow, device: Window | ConfigWindow, length: int) -> bytes:
    """*length* bytes (a multiple of 4) of the device configuration, all of one config_generation."""
    for _ in range(_GENERATION_TRIES):
        generation = common.read(COMMON_CFGGENERATION, 1)
        data = b"".join(device.read(offset, 4).to_bytes(4, "little") for offset in range(0, length, 4))
        if common.read(COMMON_CFGGENERATION, 1) == generation:
            return data
    raise DeviceError(f"the device configuration changed under each of {_GENERATION_TRIES} reads")


def peek_config(function: PciFunction, length: int) -> bytes:
    """The first *length* bytes (a multiple of 4) of the device configuration, without touching the driver: no reset,
    no BAR mapping. Raises DeviceError if configuration writes are forbidden or the capability is missing."""
    config = ConfigSpace(function.path)
    try:
        caps = function_capabilities(function, config)
        if CAP_PCI_CFG not in caps:
            raise DeviceError(f"{function.bdf}: no capability to read the BARs through configuration space")
        common, device = (ConfigWindow(config, caps[CAP_PCI_CFG], caps[k]) for k in (CAP_COMMON_CFG, CAP_DEVICE_CFG))
        return stable_config(common, device, length)
    finally:
        config.close()
