# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which blocks of a virtio-mem device are plugged, asked from the device with STATE requests and nothing else.

Layouts: virtio specification, "Memory Device"; include/uapi/linux/virtio_mem.h. As in the kernel's own gate
(virtio_mem_vmcore_pfn_is_ram), only a block that the device itself calls PLUGGED is RAM: any doubt, and it is not."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from .errors import DeviceError
from .ranges import Range, RangeSet
from .virtio_pci import VirtioPci
from .virtio_regs import PciFunction, find_functions, peek_config
from .virtio_search import STATE_MIXED, STATE_PLUGGED, STATE_UNPLUGGED, Ask, Search, plugged_runs

PCI_DEVICE_ID = 0x1058  # 0x1040 + VIRTIO_ID_MEM
FEATURES = (0, 1, 2)  # VIRTIO_MEM_F_ACPI_PXM, _UNPLUGGED_INACCESSIBLE, _PERSISTENT_SUSPEND
KERNEL_DRIVER = "virtio_mem"

REQ_STATE = 3
RESP_ACK, RESP_NACK, RESP_BUSY, RESP_ERROR = 0, 1, 2, 3
_REQUEST = struct.Struct("<H6xQH6x")  # struct virtio_mem_req with u.state
_RESPONSE = struct.Struct("<H6xH")  # struct virtio_mem_resp
_CONFIG = struct.Struct("<QH6xQQQQQ")  # struct virtio_mem_config
REQUEST_SIZE, RESPONSE_SIZE, CONFIG_SIZE = _REQUEST.size, _RESPONSE.size, _CONFIG.size

MAX_BLOCKS = 1 << 24  # 32 TiB of 2 MiB blocks; keeps the bitmap of a lying device at 2 MiB
MAX_BLOCKS_PER_REQUEST = 0xFFFF

_BUSY_RETRIES, _BUSY_PAUSE = 5, 0.01
_SILENT_ROUNDS = 2
_MAX_KINDS = 16


class Config(NamedTuple):
    """struct virtio_mem_config: sizes in bytes, *addr* the physical address of the region."""

    block_size: int
    node_id: int
    addr: int
    region_size: int
    usable_region_size: int
    plugged_size: int
    requested_size: int

    @classmethod
    def parse(cls, raw: bytes, page_size: int = mmap.PAGESIZE) -> Config:
        """From the bytes of the device configuration. Raises DeviceError if they describe no possible device."""
        config = cls(*_CONFIG.unpack_from(raw))
        config.check(page_size)
        return config

    def check(self, page_size: int = mmap.PAGESIZE) -> None:
        """Raise DeviceError if no device can be like that. A usable region beyond the region is only clamped."""
        size, addr = self.block_size, self.addr
        wrong = ""
        if size < page_size or size & (size - 1):
            wrong = f"block size {size:#x} is not a power of two of at least a page ({page_size:#x})"
        elif addr % size:
            wrong = f"region at {addr:#x} is not aligned to blocks of {size:#x}"
        elif not self.region_size or self.region_size % size:
            wrong = f"region size {self.region_size:#x} is not a multiple of the block size {size:#x}"
        elif addr + self.region_size > 1 << 64:
            wrong = f"region of {self.region_size:#x} bytes at {addr:#x} wraps around the address space"
        elif self.blocks > MAX_BLOCKS:
            wrong = f"{self.blocks:#x} usable blocks of {size:#x} are more than {MAX_BLOCKS:#x}"
        elif self.plugged_size > self.usable_region_size:
            wrong = f"plugged size {self.plugged_size:#x} exceeds the usable region ({self.usable_region_size:#x})"
        if wrong:
            raise DeviceError(f"virtio-mem configuration: {wrong}")

    @property
    def region(self) -> Range:
        return Range(self.addr, self.addr + self.region_size)

    @property
    def blocks(self) -> int:
        """Whole blocks in the usable region; only these may be asked about."""
        return min(self.usable_region_size, self.region_size) // self.block_size


class PlugState(NamedTuple):
    """What a device answered. ``bitmap``: bit i (LSB first) = block i of the usable region is plugged; everything else
    in the region is not RAM. ``problems``: one line for each kind of trouble. ``source``: who was asked."""

    config: Config
    bitmap: bytes
    requests: int
    kicks: int
    problems: tuple[str, ...]
    source: str

    def runs(self) -> list[tuple[int, int]]:
        """The plugged blocks as ascending (first block, count)."""
        return list(plugged_runs(self.bitmap))

    @property
    def plugged(self) -> RangeSet:
        """The plugged blocks as physical addresses."""
        size, addr = self.config.block_size, self.config.addr
        return RangeSet((addr + first * size, addr + (first + count) * size) for first, count in self.runs())


class Transport(Protocol):
    """What the protocol needs of a way to the device; VirtioPci is one."""

    source: str
    slots: int

    def read_config(self, length: int) -> bytes: ...

    def exchange(self, requests: list[bytes], timeout: float) -> list[bytes | None]: ...


class _Troubles:
    """Requests without a usable answer, gathered into one line for each kind."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._kinds: dict[str, list[int]] = {}
        self._void = 0
        self._first_void = ""

    def void_round(self, why: str) -> None:
        self._first_void = self._first_void or why
        self._void += 1

    def note(self, kind: str, ask: Ask) -> None:
        if len(self._kinds) >= _MAX_KINDS:
            kind = "other trouble"
        entry = self._kinds.setdefault(kind, [0, 0, ask.first])
        entry[0] += 1
        entry[1] += ask.blocks

    def lines(self) -> Iterator[str]:
        if self._void:
            yield f"void rounds: {self._void}, their requests asked once more (first: {self._first_void})"
        for kind, (requests, blocks, first) in self._kinds.items():
            where = self._config.addr + first * self._config.block_size
            yield f"{requests} STATE requests: {kind} (first at {where:#x}): {blocks} blocks taken as not RAM"


def read_config(transport: Transport) -> Config:
    """The checked configuration of the device. Raises DeviceError."""
    return Config.parse(transport.read_config(CONFIG_SIZE))


def query(
    transport: Transport,
    config: Config,
    *,
    block_by_block: bool = False,
    time_limit: float = 30.0,
    answer_timeout: float = 2.0,
) -> PlugState:
    """Ask for the state of every block of the usable region, in as few requests as it takes; *block_by_block*: one
    block and one request at a time, as the kernel does. Seconds: *time_limit* for all, *answer_timeout* for one round.

    Trouble costs the blocks in question, which then are not RAM, and a line in ``problems``; it never raises
    DeviceError. A device with plugged_size 0 is not asked, as the kernel does not ask it either."""
    problems = []
    if config.usable_region_size > config.region_size:
        problems.append(
            f"usable region {config.usable_region_size:#x} exceeds the region ({config.region_size:#x}): "
            f"nothing beyond the region was asked about"
        )
    if not config.plugged_size:
        return PlugState(config, bytes((config.blocks + 7) // 8), 0, 0, _lines(transport, problems), transport.source)
    most = 1 if block_by_block else transport.slots
    # A first round of half a queue of ranges saves the rounds for the upper levels, at the price of a few requests.
    step = 1 if block_by_block else min(MAX_BLOCKS_PER_REQUEST, max(1, -(-2 * config.blocks // most)))
    search = Search(config.blocks, step)
    troubles = _Troubles(config)
    requests, kicks, stopped = _run(transport, config, search, troubles, most, time_limit, answer_timeout)
    problems.extend(troubles.lines())
    if search.left:
        problems.append(f"{stopped}: {search.left} blocks without an answer taken as not RAM")
    bitmap = bytes(search.bitmap)
    found = int.from_bytes(bitmap, "little").bit_count() * config.block_size
    if found != config.plugged_size:
        problems.append(f"blocks of {found:#x} bytes are plugged, but the device tells of {config.plugged_size:#x}")
    line, same_region = _changes(transport, config)
    problems.extend(line)
    if not same_region:
        bitmap = bytes(len(bitmap))
    return PlugState(config, bitmap, requests, kicks, _lines(transport, problems), transport.source)


def _lines(transport: Transport, problems: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{transport.source}: {line}" for line in problems)


def _run(
    transport: Transport,
    config: Config,
    search: Search,
    troubles: _Troubles,
    most: int,
    time_limit: float,
    answer_timeout: float,
) -> tuple[int, int, str]:
    requests = kicks = silent = 0
    deadline = time.monotonic() + time_limit
    while batch := search.take(most):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return requests, kicks, f"stopped after {time_limit:g} s"
        packed = [_REQUEST.pack(REQ_STATE, config.addr + a.first * config.block_size, a.blocks) for a in batch]
        requests += len(batch)
        kicks += 1
        replies: list[bytes | None] = [None] * len(batch)
        kind = f"no answer within {answer_timeout:g} s"
        void = False
        try:
            replies = transport.exchange(packed, min(remaining, answer_timeout))
        except DeviceError as error:
            kind = str(error)
            troubles.void_round(kind)
            void = True
        silent = 0 if any(reply is not None for reply in replies) else silent + 1
        busy = False
        for ask, reply in zip(batch, replies, strict=True):
            if void and not ask.tries:
                search.retry(ask)
                continue
            if reply is None:
                troubles.note(kind, ask)
                search.settle(ask, None)
                continue
            state, trouble = _state(reply, ask.blocks)
            if trouble == "BUSY" and ask.tries < _BUSY_RETRIES:
                search.retry(ask)
                busy = True
                continue
            if trouble:
                troubles.note(f"answered {trouble}", ask)
            search.settle(ask, state)
        if silent >= _SILENT_ROUNDS:
            return requests, kicks, f"stopped: {_SILENT_ROUNDS} rounds in a row without a usable answer"
        if busy:
            time.sleep(_BUSY_PAUSE)
    return requests, kicks, ""


def _state(reply: bytes, count: int) -> tuple[int | None, str]:
    """The state that *reply* gives to *count* blocks, None if it gives none, and the kind of trouble, "" if none."""
    if len(reply) < 2:
        return None, "nothing"
    kind = int.from_bytes(reply[:2], "little")
    if kind != RESP_ACK:
        return None, {RESP_NACK: "NACK", RESP_BUSY: "BUSY", RESP_ERROR: "ERROR"}.get(kind, "an unknown type")
    if len(reply) != RESPONSE_SIZE:
        return None, "an ACK cut short"
    _, state = _RESPONSE.unpack(reply)
    if state not in (STATE_PLUGGED, STATE_UNPLUGGED, STATE_MIXED):
        return None, "an unknown state"
    if state == STATE_MIXED and count == 1:
        return None, "MIXED for a single block"
    return state, ""


def _changes(transport: Transport, before: Config) -> tuple[list[str], bool]:
    """What changed in the configuration while the blocks were asked about, and whether the region is still the same
    (nothing may plug or unplug without a driver, so any change is worth a line)."""
    try:
        after = Config(*_CONFIG.unpack_from(transport.read_config(CONFIG_SIZE)))
    except DeviceError as error:
        return [f"configuration not readable after the queries: {error}"], True
    fields = zip(before._fields, before, after, strict=True)
    changed = [f"{name} {old:#x} -> {new:#x}" for name, old, new in fields if old != new]
    if not changed:
        return [], True
    same = before[:4] == after[:4]
    verdict = "" if same else ": the whole region taken as not RAM"
    return [f"the configuration changed during the queries: {', '.join(changed)}{verdict}"], same


class DeviceResult(NamedTuple):
    """One device: ``state`` is its answer, or None, then ``reason`` tells why and the whole region is not RAM.
    ``config`` is None only if not even the region could be read. ``problems``: lines about the device as such."""

    function: PciFunction
    config: Config | None
    state: PlugState | None
    reason: str
    problems: tuple[str, ...]


def discover(sysfs: str = "/sys") -> list[PciFunction]:
    """The virtio-mem PCI functions in PCI order, with the drivers bound to them; nothing is touched."""
    return find_functions(sysfs, PCI_DEVICE_ID)


def connect(function: PciFunction, sysfs: str = "/sys") -> VirtioPci:
    """The transport to a virtio-mem *function*, not opened yet."""
    return VirtioPci(
        function,
        features=FEATURES,
        request_size=REQUEST_SIZE,
        reply_size=RESPONSE_SIZE,
        kernel_driver=KERNEL_DRIVER,
        sysfs=sysfs,
    )


def query_all(
    sysfs: str = "/sys",
    *,
    allow_bound: bool = False,
    block_by_block: bool = False,
    time_limit: float = 30.0,
    answer_timeout: float = 2.0,
    connect: Callable[[PciFunction, str], VirtioPci] = connect,
) -> list[DeviceResult]:
    """Ask every virtio-mem device, in PCI order; *time_limit* (seconds) is for each. Never raises DeviceError.

    A device that the in-kernel driver has bound is only asked with *allow_bound*: unbinding takes the kernel's own gate
    on /proc/vmcore away, and where is_kdump_kernel() is false, binding again sends UNPLUG_ALL (virtio_mem_run_wq)."""
    results = []
    for function in discover(sysfs):
        if function.virtio_driver and not allow_bound:
            why = f"the in-kernel {function.virtio_driver} driver is bound to {function.virtio_name}"
            results.append(_not_queried(function, None, why, ()))
            continue
        transport = connect(function, sysfs)
        config = state = None
        reason = ""
        try:
            with transport:
                config = read_config(transport)
                state = query(
                    transport,
                    config,
                    block_by_block=block_by_block,
                    time_limit=time_limit,
                    answer_timeout=answer_timeout,
                )
        except (DeviceError, InterruptedError) as error:
            reason = str(error)
        problems = tuple(transport.problems)
        if state is None:
            results.append(_not_queried(function, config, reason, problems))
        else:
            results.append(DeviceResult(function, config, state, "", problems))
    return results


def _not_queried(function: PciFunction, config: Config | None, reason: str, problems: tuple[str, ...]) -> DeviceResult:
    if config is None:
        try:
            config = Config.parse(peek_config(function, CONFIG_SIZE))
        except DeviceError as error:
            if str(error) != reason:
                problems = (*problems, f"virtio-mem {function.bdf}: region unknown: {error}")
    return DeviceResult(function, config, None, reason, problems)
