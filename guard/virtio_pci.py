# SPDX-License-Identifier: LGPL-2.1-or-later
"""Modern virtio-pci transport in user space: one function, one split queue in one pinned page, no interrupts.

Order of steps: virtio specification, "Device Initialization" and "Virtio Over PCI Bus". The function is taken from
virtio-pci, reset, used, reset again and given back, whatever happens in between."""

from __future__ import annotations

import errno
import signal
import sys
import time
from collections.abc import Callable, Iterable

from . import virtio_regs as regs
from .errors import DeviceError
from .pinned import PinnedPage
from .virtio_queue import SplitQueue
from .virtio_regs import ConfigSpace, PciFunction, Window

_RESET_TIMEOUT = 2.0
_FAST_POLLS = 500
_FIRST_PAUSE, _LONGEST_PAUSE = 20e-6, 2e-3


class VirtioPci:
    """Context manager around one virtio function; inside it, read_config() and exchange() talk to the device.

    *features* are the bits of the device type to accept if offered; *kernel_driver* is the virtio driver of this
    device type: unless it was bound before, it will not become bound by giving the function back. Signals that would
    end the process are held from open() to close(), so that the cleanup is never cut short; a wait for an answer ends
    with InterruptedError when one arrives. After close(), ``problems`` tells what could not be undone."""

    def __init__(
        self,
        function: PciFunction,
        *,
        features: Iterable[int],
        request_size: int,
        reply_size: int,
        kernel_driver: str,
        sysfs: str = "/sys",
        map_window: Callable[[str, int, int], Window] = Window,
        new_page: Callable[[], PinnedPage] = PinnedPage,
    ) -> None:
        self.function = function
        self.source = f"virtio device {function.bdf}"
        self.slots = 0
        self.problems: list[str] = []
        self._accepted = sum(1 << bit for bit in {*features, regs.F_VERSION_1})
        self._request_size = request_size
        self._reply_size = reply_size
        self._kernel_driver = kernel_driver
        self._sysfs = sysfs
        self._map_window = map_window
        self._new_page = new_page
        self._config: ConfigSpace | None = None
        self._command: int | None = None
        self._caps: dict[int, regs.Capability] = {}
        self._windows: dict[int, Window] = {}
        self._page: PinnedPage | None = None
        self._queue: SplitQueue | None = None
        self._unbound = self._enabled = False
        self._stale = True
        self._held: set[int] = set()

    def __enter__(self) -> VirtioPci:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def open(self) -> None:
        """Take the function over and set its queue up. Raises DeviceError naming what forbids it; close() is due then
        too (the context manager does it)."""
        self._hold_signals()
        function = self.function
        if sys.byteorder != "little":
            # s390x, the one big-endian machine with PCI here, has no memory-mapped BARs in user space either.
            raise DeviceError(f"{function.bdf}: no user-space virtio-pci on a big-endian machine")
        if function.driver not in ("", "virtio-pci"):
            raise DeviceError(f"{function.bdf}: bound to {function.driver}, left alone")
        self._config = config = ConfigSpace(function.path)
        # The vendor ID is read-only: this write tells whether lockdown forbids them, before anything is disturbed.
        config.write(0, config.read(0, 2))
        self._caps = regs.function_capabilities(function, config)
        if regs.CAP_NOTIFY_CFG not in self._caps:
            raise DeviceError(f"{function.bdf}: no usable virtio capability for notifications in a BAR")
        try:
            if function.driver:
                regs.write_sysfs(f"{function.path}/driver/unbind", function.bdf)
                self._unbound = True
            regs.write_sysfs(f"{function.path}/enable", "1")
            self._enabled = True
        except OSError as error:
            raise DeviceError(f"{function.bdf}: cannot be taken from the kernel: {error}") from None
        self._command = int.from_bytes(config.read(regs.PCI_COMMAND, 2), "little")
        # No bus mastering yet: the queue set up by the dead kernel may still be there. And no INTx: nobody would
        # acknowledge it, and the kernel would switch off a line that the disk may share.
        self._set_command(regs.PCI_COMMAND_MEMORY | regs.PCI_COMMAND_INTX_DISABLE, regs.PCI_COMMAND_MASTER)
        for kind, length in ((regs.CAP_COMMON_CFG, regs.COMMON_SIZE), (regs.CAP_DEVICE_CFG, 0)):
            cap = self._caps[kind]
            self._windows[kind] = self._map_bar(cap.bar, cap.offset, length or min(cap.length, 4096))
        self._page = self._new_page()
        self._start()

    def _map_bar(self, bar: int, offset: int, length: int) -> Window:
        return self._map_window(f"{self.function.path}/resource{bar}", offset, length)

    def _set_command(self, set_bits: int, clear_bits: int) -> None:
        assert self._config is not None
        old = int.from_bytes(self._config.read(regs.PCI_COMMAND, 2), "little")
        self._config.write(regs.PCI_COMMAND, ((old | set_bits) & ~clear_bits).to_bytes(2, "little"))

    def _status(self) -> int:
        return self._windows[regs.CAP_COMMON_CFG].read(regs.COMMON_STATUS, 1)

    def _reset(self) -> None:
        self._windows[regs.CAP_COMMON_CFG].write(regs.COMMON_STATUS, 1, 0)
        deadline = time.monotonic() + _RESET_TIMEOUT
        while status := self._status():
            if time.monotonic() > deadline:
                raise DeviceError(f"{self.function.bdf}: not reset after {_RESET_TIMEOUT:g} s (status {status:#x})")
            time.sleep(_LONGEST_PAUSE)

    def _start(self) -> None:
        """Reset the device, negotiate and hand it an empty queue."""
        assert self._page is not None
        common = self._windows[regs.CAP_COMMON_CFG]
        bdf = self.function.bdf
        self._reset()
        status = regs.STATUS_ACKNOWLEDGE
        common.write(regs.COMMON_STATUS, 1, status)
        status |= regs.STATUS_DRIVER
        common.write(regs.COMMON_STATUS, 1, status)
        self._negotiate(common)
        status |= regs.STATUS_FEATURES_OK
        common.write(regs.COMMON_STATUS, 1, status)
        if not self._status() & regs.STATUS_FEATURES_OK:
            raise DeviceError(f"{bdf}: the device refuses the features (status {self._status():#x})")
        common.write(regs.COMMON_MSIX, 2, regs.MSI_NO_VECTOR)
        common.write(regs.COMMON_Q_SELECT, 2, 0)
        if self._queue is None:
            most = common.read(regs.COMMON_Q_SIZE, 2)
            self._queue = SplitQueue(self._page, most, self._request_size, self._reply_size)
            self.slots = self._queue.layout.slots
            self._windows[regs.CAP_NOTIFY_CFG] = self._map_notify(common.read(regs.COMMON_Q_NOFF, 2))
        common.write(regs.COMMON_Q_SIZE, 2, self._queue.layout.entries)
        common.write(regs.COMMON_Q_MSIX, 2, regs.MSI_NO_VECTOR)
        parts = (regs.COMMON_Q_DESCLO, regs.COMMON_Q_AVAILLO, regs.COMMON_Q_USEDLO)
        for register, paddr in zip(parts, self._queue.prepare(self._page.paddr()), strict=True):
            common.write(register, 4, paddr & 0xFFFFFFFF)
            common.write(register + 4, 4, paddr >> 32)
        common.write(regs.COMMON_Q_ENABLE, 2, 1)
        self._set_command(regs.PCI_COMMAND_MASTER, 0)
        common.write(regs.COMMON_STATUS, 1, status | regs.STATUS_DRIVER_OK)
        self._check_health()
        self._stale = False

    def _negotiate(self, common: Window) -> None:
        offered = 0
        for half in (0, 1):
            common.write(regs.COMMON_DFSELECT, 4, half)
            offered |= common.read(regs.COMMON_DF, 4) << 32 * half
        if offered >> regs.F_ACCESS_PLATFORM & 1:
            raise DeviceError(
                f"{self.function.bdf}: offers VIRTIO_F_ACCESS_PLATFORM: addresses would go through an IOMMU, which "
                f"cannot be set up from here; falling back"
            )
        if not offered >> regs.F_VERSION_1 & 1:
            raise DeviceError(f"{self.function.bdf}: not a modern virtio device (features {offered:#x})")
        for half in (0, 1):
            common.write(regs.COMMON_GFSELECT, 4, half)
            common.write(regs.COMMON_GF, 4, (offered & self._accepted) >> 32 * half & 0xFFFFFFFF)

    def _map_notify(self, queue_notify_off: int) -> Window:
        cap = self._caps[regs.CAP_NOTIFY_CFG]
        offset = queue_notify_off * cap.multiplier
        if offset + 2 > cap.length or offset % 2:
            raise DeviceError(f"{self.function.bdf}: notify address {offset:#x} outside {cap.length:#x} bytes")
        return self._map_bar(cap.bar, cap.offset + offset, 2)

    def _check_health(self) -> None:
        status = self._status()
        if status & regs.STATUS_NEEDS_RESET:
            raise DeviceError(f"{self.function.bdf}: the device asks for a reset (status {status:#x})")

    def read_config(self, length: int) -> bytes:
        """The first *length* bytes (a multiple of 4) of the device configuration. Raises DeviceError if it is shorter
        or never stable."""
        windows = self._windows
        return regs.stable_config(windows[regs.CAP_COMMON_CFG], windows[regs.CAP_DEVICE_CFG], length)

    def exchange(self, requests: list[bytes], timeout: float) -> list[bytes | None]:
        """Send at most ``slots`` requests with one notification and wait at most *timeout* seconds for the answers:
        one per request, in their order, as long as the device says it wrote; None for no answer in time.

        Raises DeviceError if none of the answers can be trusted, InterruptedError if a held signal arrived. After any
        trouble the next call starts with a reset, so that a late answer cannot reach a later request."""
        assert self._page is not None
        assert self._queue is not None
        if not self._stale:
            try:
                self._page.check_still_there()
            except DeviceError:
                self._stale = True
        if self._stale:
            self._start()
        self._stale = True
        self._queue.offer(requests)
        self._windows[regs.CAP_NOTIFY_CFG].write(0, 2, 0)
        answered = self._wait(len(requests), timeout)
        replies = self._queue.take(len(requests), answered)
        self._check_health()
        self._page.check_still_there()
        self._stale = answered < len(requests)
        return replies

    def _wait(self, wanted: int, timeout: float) -> int:
        assert self._queue is not None
        deadline = time.monotonic() + timeout
        for _ in range(_FAST_POLLS):
            if (answered := self._queue.answered()) >= wanted:
                return answered
        pause = _FIRST_PAUSE
        while (answered := self._queue.answered()) < wanted:
            if signal.sigpending() & self._held:
                raise InterruptedError(errno.EINTR, f"{self.function.bdf}: interrupted by a signal")
            self._check_health()
            if time.monotonic() >= deadline:
                break
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return answered

    def close(self) -> None:
        """Undo open(), as far as it got: reset, bus mastering off, back to the driver it had. Never raises for a step
        that fails; ``problems`` tells."""
        try:
            # Each step on its own: a failing one must not keep the next from being done.
            silent = regs.CAP_COMMON_CFG not in self._windows or self._try(self._reset)
            mastering_off = self._command is None or self._try(self._restore_command)
            if self._queue is not None:
                self._queue.close()
            for window in self._windows.values():
                window.close()
            # A device that may still write to the page keeps it: memory lost is better than memory overwritten.
            if self._page is not None and (silent or mastering_off):
                self._page.close()
            if self._config is not None:
                self._config.close()
            if self._enabled:
                self._try(lambda: regs.write_sysfs(f"{self.function.path}/enable", "0"))
            if self._unbound:
                self._rebind(silent)
        finally:
            self._queue = self._page = self._config = self._command = None
            self._windows = {}
            self._unbound = self._enabled = False
            self._release_signals()

    def _try(self, step: Callable[[], None]) -> bool:
        try:
            step()
        except (OSError, DeviceError) as error:
            self.problems.append(f"{self.function.bdf}: cleaning up: {error}")
            return False
        return True

    def _restore_command(self) -> None:
        assert self._config is not None
        assert self._command is not None
        self._config.write(regs.PCI_COMMAND, (self._command & ~regs.PCI_COMMAND_MASTER).to_bytes(2, "little"))

    def _rebind(self, silent: bool) -> None:
        function = self.function
        if not silent:
            # virtio-pci waits without limit for a device to come out of reset (vp_reset): it would hang.
            self.problems.append(f"{function.bdf}: not given back to {function.driver}: the device does not reset")
        elif not function.virtio_driver and regs.driver_registered(self._sysfs, self._kernel_driver):
            self.problems.append(
                f"{function.bdf}: not given back to {function.driver}: {self._kernel_driver} would bind to it"
            )
        else:
            bind = f"{self._sysfs}/bus/pci/drivers/{function.driver}/bind"
            self._try(lambda: regs.write_sysfs(bind, function.bdf))

    def _hold_signals(self) -> None:
        deadly = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        wanted: set[int] = {number for number in deadly if signal.getsignal(number) is not signal.SIG_IGN}
        self._held = wanted - set(signal.pthread_sigmask(signal.SIG_BLOCK, wanted))

    def _release_signals(self) -> None:
        held, self._held = self._held, set()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
