# SPDX-License-Identifier: LGPL-2.1-or-later
"""The device's side of virtio-mem over virtio-pci, for tests: registers, queue, STATE requests, and misbehaviour on
demand. It works on a fake sysfs, and on fake pages that stand in for guest memory."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from guard import virtio_mem, virtio_pci, virtio_regs
from guard.errors import DeviceError
from guard.pinned import PAGE_SIZE, PinnedPage
from guard.virtio_mem import Config
from guard.virtio_regs import Capability, ConfigSpace, PciFunction, Window

BDF = "0000:00:04.0"
BAR = 4
COMMON, ISR, DEVICE, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
NOTIFY_MULTIPLIER = 4
BAR_SIZE = 0x4000
FEATURES_OFFERED = 0x10130000007
NEVER = "never"
MIB = 1 << 20

Reply = tuple[int, int] | bytes | str


def make_config(blocks: int = 512, **changes: int) -> Config:
    """A device of *blocks* 2 MiB blocks, all usable, nothing plugged."""
    size = blocks * 2 * MIB
    fields = Config(2 * MIB, 0, 0x1_4000_0000, size, size, 0, size)
    return fields._replace(**changes)


def capability(kind: int, bar: int, offset: int, length: int, following: int, extra: bytes = b"") -> bytes:
    return struct.pack("<BBBBB3xII", 9, following, 16 + len(extra), kind, bar, offset, length) + extra


def config_space() -> bytes:
    """256 bytes as QEMU lays them out: an MSI-X capability, then the virtio ones."""
    space = bytearray(256)
    struct.pack_into("<HHHH", space, 0, 0x1AF4, 0x1058, 0x0006, 0x0010)
    space[0x34] = 0x98
    space[0x98:0xA4] = struct.pack("<BBH8x", 0x11, 0x84, 0)
    space[0x84:0x98] = capability(5, 0, 0, 0, 0x70, bytes(4))
    space[0x70:0x84] = capability(2, BAR, NOTIFY, 0x1000, 0x60, struct.pack("<I", NOTIFY_MULTIPLIER))
    space[0x60:0x70] = capability(4, BAR, DEVICE, 0x1000, 0x50)
    space[0x50:0x60] = capability(3, BAR, ISR, 0x1000, 0x40)
    space[0x40:0x50] = capability(1, BAR, COMMON, 0x1000, 0)
    return bytes(space)


class FakePage:
    """Guest memory at a made-up physical address; ``moved`` counts up to make compaction happen at a given check."""

    def __init__(self, device: FakeDevice, paddr: int) -> None:
        self._memory = bytearray(PAGE_SIZE)
        self.view = memoryview(self._memory)
        self._device = device
        self._known = self.address = paddr
        self.closed = False

    def paddr(self) -> int:
        self._known = self.address
        return self._known

    def check_still_there(self) -> None:
        if self._known != self.address:
            raise DeviceError(f"the page shared with the device moved from {self._known:#x} to {self.address:#x}")

    def close(self) -> None:
        self._device.log.append("page freed")
        self.view.release()
        self.closed = True


class FakeWindow:
    def __init__(self, device: FakeDevice, offset: int, length: int) -> None:
        self._device = device
        self._offset = offset
        self._length = length

    def _check(self, offset: int, size: int) -> None:
        assert offset % size == 0, "not a naturally aligned access"
        if offset + size > self._length:
            raise DeviceError("outside the window")
        assert self._device.command() & 2, "access while memory decoding is off"

    def read(self, offset: int, size: int) -> int:
        self._check(offset, size)
        return self._device.read(self._offset + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._check(offset, size)
        self._device.write(self._offset + offset, size, value)

    def close(self) -> None:
        pass


class FakeDevice:
    """A virtio-mem device with *plugged* blocks, which appears in the fake sysfs below *root*.

    ``log`` records in order what the driver did. Misbehaviour: ``reply`` may return (type, state), raw bytes or NEVER
    for a request about (first block, count), None = the truth; ``ring`` names a way to break the used ring;
    ``stuck`` = will not be reset; the other attributes speak for themselves."""

    def __init__(
        self,
        root: Path,
        plugged: set[int] | None = None,
        config: Config | None = None,
        *,
        bdf: str = BDF,
        driver: str = "virtio-pci",
        virtio_driver: str = "",
        registered: bool = False,
    ) -> None:
        self.plugged = plugged or set()
        config = config or make_config()
        self.config = config._replace(plugged_size=config.plugged_size or len(self.plugged) * config.block_size)
        self.offered = FEATURES_OFFERED
        self.queue_max = 128
        self.reply: Callable[[int, int], Reply | None] = lambda first, count: None
        self.ring = ""
        self.stuck = False
        self.refuse_features = False
        self.needs_reset_at_kick = 0
        self.generation_steps = 0
        self.on_kick: Callable[[int], None] = lambda kick: None
        self.log: list[str] = []
        self.asked: list[tuple[int, int]] = []
        self.pages: list[FakePage] = []
        self.kicks = 0
        self._reset_state()
        self._generation = 0
        self._late: list[Callable[[], None]] = []
        self.root = root
        self.function_path = root / "bus/pci/devices" / bdf
        self._make_sysfs(bdf, driver, virtio_driver, registered)

    def _make_sysfs(self, bdf: str, driver: str, virtio_driver: str, registered: bool) -> None:
        path = self.function_path
        path.mkdir(parents=True)
        (path / "vendor").write_text("0x1af4\n")
        (path / "device").write_text("0x1058\n")
        (path / "enable").write_text("0\n")
        (path / "config").write_bytes(config_space())
        bars = [(0, 0, 0)] * 6
        bars[1] = (0xFEBD5000, 0xFEBD5FFF, 0x40200)
        bars[BAR] = (0xFE00004000, 0xFE00004000 + BAR_SIZE - 1, 0x14220C)
        (path / "resource").write_text("".join(f"{a:#018x} {b:#018x} {c:#018x}\n" for a, b, c in bars))
        (path / f"resource{BAR}").write_bytes(bytes(BAR_SIZE))
        for name in {"virtio-pci", driver or "virtio-pci"}:
            directory = self.root / "bus/pci/drivers" / name
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "bind").touch()
            (directory / "unbind").touch()
        if driver:
            (path / "driver").symlink_to(self.root / "bus/pci/drivers" / driver)
            (path / "virtio1").mkdir()
        if registered or virtio_driver:
            (self.root / "bus/virtio/drivers" / (virtio_driver or "virtio_mem")).mkdir(parents=True, exist_ok=True)
        if virtio_driver:
            (path / "virtio1/driver").symlink_to(self.root / "bus/virtio/drivers" / virtio_driver)

    @property
    def function(self) -> PciFunction:
        return next(f for f in virtio_mem.discover(str(self.root)) if f.path == str(self.function_path))

    def transport(self) -> virtio_pci.VirtioPci:
        transport = virtio_mem.connect(self.function, str(self.root))
        transport._map_window = self.map_window
        transport._new_page = self.new_page
        return transport

    def map_window(self, path: str, offset: int, length: int) -> Window:
        assert path == f"{self.function_path}/resource{BAR}"
        return FakeWindow(self, offset, length)  # type: ignore[return-value]

    def new_page(self) -> PinnedPage:
        self.pages.append(FakePage(self, 0x5000_0000 + len(self.pages) * PAGE_SIZE))
        return self.pages[-1]  # type: ignore[return-value]

    def command(self) -> int:
        return int.from_bytes((self.function_path / "config").read_bytes()[4:6], "little")

    def written(self, name: str) -> str:
        """What the driver wrote last to the attribute *name*, relative to the fake sysfs."""
        return (self.root / name).read_text()

    def _reset_state(self) -> None:
        self.status = 0
        self._select = [0, 0]
        self.accepted = 0
        self._queue = {"size": self.queue_max, "enable": 0, 32: 0, 36: 0, 40: 0, 44: 0, 48: 0, 52: 0}
        self._seen = self._used = 0

    def read(self, offset: int, size: int) -> int:
        """A register access of the driver to the BAR."""
        if DEVICE <= offset < DEVICE + virtio_mem.CONFIG_SIZE:
            raw = struct.pack("<QH6xQQQQQ", *self.config)
            at = offset - DEVICE
            return int.from_bytes(raw[at : at + size], "little")
        assert size == {4: 4, 18: 2, 20: 1, 21: 1, 24: 2, 28: 2, 30: 2}[offset], "access of the wrong size"
        if offset == virtio_regs.COMMON_DF:
            return self.offered >> 32 * self._select[0] & 0xFFFFFFFF if self._select[0] < 2 else 0
        if offset == virtio_regs.COMMON_CFGGENERATION and self.generation_steps:
            self.generation_steps -= 1
            self._generation = (self._generation + 1) & 0xFF
        return {18: 1, 20: self.status, 21: self._generation, 24: self._queue["size"], 28: 1, 30: 0}[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == NOTIFY:
            assert (size, value) == (2, 0)
            self._kick()
            return
        assert size == {0: 4, 8: 4, 12: 4, 16: 2, 20: 1, 22: 2, 24: 2, 26: 2, 28: 2}.get(offset, 4)
        if offset == virtio_regs.COMMON_STATUS:
            self._set_status(value)
        elif offset in (virtio_regs.COMMON_DFSELECT, virtio_regs.COMMON_GFSELECT):
            self._select[offset == virtio_regs.COMMON_GFSELECT] = value
        elif offset == virtio_regs.COMMON_GF:
            self.accepted |= value << 32 * self._select[1]
        elif offset == virtio_regs.COMMON_Q_SIZE:
            assert 0 < value <= self.queue_max
            assert not value & (value - 1)
            self._queue["size"] = value
        elif offset == virtio_regs.COMMON_Q_ENABLE:
            self._queue["enable"] = value
        elif offset in self._queue:
            self._queue[offset] = value
        elif offset in (virtio_regs.COMMON_MSIX, virtio_regs.COMMON_Q_MSIX):
            assert value == virtio_regs.MSI_NO_VECTOR
        else:
            assert offset == virtio_regs.COMMON_Q_SELECT
            assert value == 0

    def _set_status(self, value: int) -> None:
        if value == 0:
            self.log.append("reset")
            for answer in self._late:
                answer()
            self._late = []
            if not self.stuck:
                self._reset_state()
            return
        if value & virtio_regs.STATUS_FEATURES_OK and not self.status & virtio_regs.STATUS_FEATURES_OK:
            assert not self.accepted & ~self.offered
            if self.refuse_features:
                value &= ~virtio_regs.STATUS_FEATURES_OK
        if value & virtio_regs.STATUS_DRIVER_OK:
            assert self._queue["enable"]
            assert value & virtio_regs.STATUS_FEATURES_OK
            self.log.append("driver ok")
        self.status = value

    def _memory(self, paddr: int, size: int) -> memoryview:
        """DMA: only into pages that are there now, and only with bus mastering on."""
        assert self.command() & 4, "DMA while bus mastering is off"
        for page in self.pages:
            if not page.closed and page._known <= paddr and paddr + size <= page._known + PAGE_SIZE:
                at = paddr - page._known
                return page.view[at : at + size]
        raise AssertionError(f"DMA to {paddr:#x}, which nobody shares")

    def _part(self, register: int) -> int:
        return self._queue[register] | self._queue[register + 4] << 32

    def _kick(self) -> None:
        self.kicks += 1
        self.log.append("kick")
        if not self.status & virtio_regs.STATUS_DRIVER_OK or self.status & virtio_regs.STATUS_NEEDS_RESET:
            return
        if self.kicks == self.needs_reset_at_kick:
            self.status |= virtio_regs.STATUS_NEEDS_RESET
            return
        size, desc, avail, used = self._queue["size"], self._part(32), self._part(40), self._part(48)
        flags, index = struct.unpack("<HH", self._memory(avail, 4))
        assert flags == 1, "interrupts wanted"
        while self._seen != index:
            (head,) = struct.unpack("<H", self._memory(avail + 4 + 2 * (self._seen % size), 2))
            self._seen = (self._seen + 1) & 0xFFFF
            address, length, out_flags, following = struct.unpack("<QIHH", self._memory(desc + 16 * head, 16))
            assert (length, out_flags) == (24, 1)
            request = bytes(self._memory(address, length))
            address, length, in_flags, _ = struct.unpack("<QIHH", self._memory(desc + 16 * following, 16))
            assert (length, in_flags) == (10, 2)
            self._answer(head, request, address, used, size)
        self.on_kick(self.kicks)

    def _answer(self, head: int, request: bytes, address: int, used: int, size: int) -> None:
        kind, paddr, count = struct.unpack("<H6xQH6x", request)
        assert kind == 3, "anything but STATE may destroy memory"
        first = (paddr - self.config.addr) // self.config.block_size
        self.asked.append((first, count))
        reply = self.reply(first, count)
        if reply == NEVER:
            return
        if reply is None:
            reply = self.truth(paddr, count)
        raw = reply if isinstance(reply, bytes) else struct.pack("<H6xH", *reply)
        length = len(raw)
        if self.ring == "wrong id":
            head = 77
        elif self.ring == "reply descriptor":
            head += 1
        elif self.ring == "same id":
            head = 0
        elif self.ring == "long":
            length = 4096
        step = 1000 if self.ring == "index jump" else 1

        def complete() -> None:
            self._memory(address, len(raw))[:] = raw
            self._memory(used + 4 + 8 * (self._used % size), 8)[:] = struct.pack("<II", head, length)
            self._used = (self._used + step) & 0xFFFF
            self._memory(used + 2, 2)[:] = struct.pack("<H", self._used)

        if self.ring == "late":
            self._late.append(complete)
        else:
            complete()

    def truth(self, paddr: int, count: int) -> tuple[int, int]:
        config = self.config
        offset = paddr - config.addr
        size = count * config.block_size
        if offset % config.block_size or not count or offset < 0 or offset + size > config.usable_region_size:
            return 3, 0
        first = offset // config.block_size
        plugged = sum(block in self.plugged for block in range(first, first + count))
        return 0, 0 if plugged == count else 1 if not plugged else 2


class DirectTransport:
    """The protocol's view of a device, without PCI: requests are answered by a FakeDevice-like function at once."""

    source = "virtio-mem test"

    def __init__(self, config: Config, plugged: set[int], slots: int = 32) -> None:
        self.slots = slots
        self.config = config
        self.reply: Callable[[int, int], Reply | None] = lambda first, count: None
        self.asked: list[tuple[int, int]] = []
        self._prefix = [0]
        for block in range(config.blocks):
            self._prefix.append(self._prefix[-1] + (block in plugged))

    def read_config(self, length: int) -> bytes:
        return struct.pack("<QH6xQQQQQ", *self.config)[:length]

    def exchange(self, requests: list[bytes], timeout: float) -> list[bytes | None]:
        assert 0 < len(requests) <= self.slots
        return [self._answer(request) for request in requests]

    def _answer(self, request: bytes) -> bytes | None:
        kind, paddr, count = struct.unpack("<H6xQH6x", request)
        assert kind == 3, "anything but STATE may destroy memory"
        first = (paddr - self.config.addr) // self.config.block_size
        assert 0 <= first < first + count <= self.config.blocks
        self.asked.append((first, count))
        reply = self.reply(first, count)
        if reply == NEVER:
            return None
        if isinstance(reply, bytes):
            return reply
        if reply is None:
            plugged = self._prefix[first + count] - self._prefix[first]
            reply = (0, 0 if plugged == count else 1 if not plugged else 2)
        assert isinstance(reply, tuple)
        return struct.pack("<H6xH", *reply)


class WindowedConfigSpace(ConfigSpace):
    """Configuration space whose VIRTIO_PCI_CAP_PCI_CFG window works: it shows registers of ``device``."""

    device: FakeDevice

    def read(self, offset: int, size: int) -> bytes:
        access = virtio_regs.read_capabilities(os.pread(self._fd, 256, 0), [0] * 6).get(virtio_regs.CAP_PCI_CFG)
        if access and offset == access.position + virtio_regs.PCI_CFG_DATA:
            bar, at, length = struct.unpack("<B3xII", os.pread(self._fd, 12, access.position + 4))
            assert (bar, length) == (BAR, size)
            return self.device.read(at, size).to_bytes(size, "little")
        return super().read(offset, size)


def caps_of(space: bytes) -> dict[int, Capability]:
    return virtio_regs.read_capabilities(space, [0, 0x1000, 0, 0, BAR_SIZE, 0])
