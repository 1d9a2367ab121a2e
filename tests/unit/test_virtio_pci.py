# SPDX-License-Identifier: LGPL-2.1-or-later
"""The user-space virtio-pci transport against a device model: it works, it refuses, and it always cleans up."""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from guard import virtio_mem, virtio_pci, virtio_regs
from guard.errors import DeviceError
from guard.virtio_mem import DeviceResult, query, query_all, read_config
from guard.virtio_regs import ConfigSpace, PciFunction
from tests.unit.virtio_device import (
    BDF,
    FEATURES_OFFERED,
    MIB,
    NEVER,
    FakeDevice,
    WindowedConfigSpace,
    caps_of,
    config_space,
    make_config,
)

PLUGGED = {*range(0, 40), *range(100, 103), 511}


def run(device: FakeDevice, **how: bool | float) -> DeviceResult:
    """query_all() on a machine with this one device."""

    def connect(function: PciFunction, sysfs: str) -> virtio_pci.VirtioPci:
        assert sysfs == str(device.root)
        return device.transport()

    (result,) = query_all(str(device.root), connect=connect, answer_timeout=0.05, **how)  # type: ignore[arg-type]
    return result


def assert_given_back(device: FakeDevice) -> None:
    """The function is as it was found: reset, no bus mastering, and with its driver again."""
    assert device.log[-2:] == ["reset", "page freed"] or device.log[-1:] == ["reset"] or not device.log
    assert device.status == 0
    assert device.command() == 0x0002
    assert device.written("bus/pci/drivers/virtio-pci/unbind") == BDF
    assert device.written("bus/pci/drivers/virtio-pci/bind") == BDF
    assert device.written(f"bus/pci/devices/{BDF}/enable").strip() == "0"
    assert all(page.closed for page in device.pages)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_query_gives_the_bitmap_and_the_function_back(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    result = run(device)
    assert result.reason == ""
    assert result.problems == ()
    assert result.state is not None
    assert result.state.runs() == [(0, 40), (100, 3), (511, 1)]
    assert result.state.problems == ()
    assert result.state.kicks == device.kicks
    assert result.state.requests == len(device.asked)
    assert result.config == device.config
    assert_given_back(device)


def test_block_by_block_over_the_queue_agrees_and_wraps_the_rings(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    with device.transport() as transport:
        config = read_config(transport)
        whole = query(transport, config)
        single = query(transport, config, block_by_block=True)
    assert single.bitmap == whole.bitmap
    assert single.kicks == 512
    assert transport.slots == 32


def test_only_wanted_features_are_accepted(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    with device.transport():
        assert device.accepted == FEATURES_OFFERED & 0x1_0000_0007


def test_bus_mastering_is_off_until_the_queue_is_set_up_and_intx_stays_off(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    commands: list[int] = []
    set_status = device._set_status
    device._set_status = lambda value: (commands.append(device.command()), set_status(value))[1]  # type: ignore
    with device.transport():
        assert commands == [0x402] * 4 + [0x406]


def access_platform(device: FakeDevice) -> None:
    device.offered |= 1 << 33


def legacy(device: FakeDevice) -> None:
    device.offered &= ~(1 << 32)


def refuse_features(device: FakeDevice) -> None:
    device.refuse_features = True


def no_queue(device: FakeDevice) -> None:
    device.queue_max = 1
    device._reset_state()


def ever_changing(device: FakeDevice) -> None:
    device.generation_steps = 10**6


def impossible_config(device: FakeDevice) -> None:
    device.config = device.config._replace(block_size=12345)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (access_platform, "ACCESS_PLATFORM: addresses would go through an IOMMU"),
        (legacy, "not a modern virtio device"),
        (refuse_features, "refuses the features"),
        (no_queue, "queue of 1 entries"),
        (ever_changing, "changed under each of 16 reads"),
        (impossible_config, "block size 0x3039"),
    ],
)
def test_unusable_device_is_told_and_given_back(
    tmp_path: Path, spoil: Callable[[FakeDevice], None], words: str
) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    spoil(device)
    result = run(device)
    assert result.state is None
    assert words in result.reason
    assert device.kicks == 0
    assert_given_back(device)


def test_config_that_changes_once_is_read_again(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    device.generation_steps = 3
    assert run(device).state is not None


@pytest.mark.parametrize(
    ("ring", "words"),
    [
        ("wrong id", "names descriptor 0x4d, which was not offered"),
        ("reply descriptor", "names descriptor 0x1, which was not offered"),
        ("same id", "names descriptor 0x0 twice"),
        ("index jump", "the used index ran ahead: 16000 answers to 16 requests"),
        ("long", "4096 bytes in a reply of 10"),
    ],
)
def test_broken_used_ring_gives_no_ram_at_all(tmp_path: Path, ring: str, words: str) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    device.ring = ring
    state = run(device).state
    assert state is not None
    assert not state.plugged
    assert device.kicks == 2
    assert sum(words in line and "512 blocks taken as not RAM" in line for line in state.problems) == 1
    assert_given_back(device)


def test_one_broken_round_is_void_and_asked_again_after_a_reset(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    device.ring = "same id"
    device.on_kick = lambda kick: setattr(device, "ring", "")
    state = run(device).state
    assert state is not None
    assert state.runs() == [(0, 40), (100, 3), (511, 1)]
    (problem,) = state.problems
    assert "void rounds: 1, their requests asked once more (first: the used ring names" in problem
    assert device.log[:5] == ["reset", "driver ok", "kick", "reset", "driver ok"]
    assert_given_back(device)


def test_late_answer_never_counts(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    device.ring = "late"
    state = run(device).state
    assert state is not None
    assert not state.plugged
    assert any("no answer within 0.05 s" in line for line in state.problems)
    assert_given_back(device)


def test_late_answer_to_an_earlier_round_does_not_reach_the_next(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, {0})
    requests = [struct.pack("<H6xQH6x", 3, device.config.addr + i * 2 * MIB, 1) for i in (0, 1)]
    with device.transport() as transport:
        device.ring = "late"
        assert transport.exchange(requests[:1], 0.02) == [None]
        device.ring = ""
        (reply,) = transport.exchange(requests[1:], 0.5)
        assert reply == struct.pack("<H6xH", 0, 1)
    assert device.log[:5] == ["reset", "driver ok", "kick", "reset", "driver ok"]


def test_unanswered_request_is_none_among_answered_ones(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, {0, 1, 2, 3})
    device.reply = lambda first, count: NEVER if first == 2 else None
    requests = [struct.pack("<H6xQH6x", 3, device.config.addr + i * 2 * MIB, 1) for i in range(4)]
    with device.transport() as transport:
        replies = transport.exchange(requests, 0.02)
    plugged = struct.pack("<H6xH", 0, 0)
    assert replies == [plugged, plugged, None, plugged]


def test_device_that_asks_for_a_reset_is_reset_and_asked_on(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    device.needs_reset_at_kick = 1
    state = run(device).state
    assert state is not None
    assert state.runs() == [(0, 40), (100, 3), (511, 1)]
    assert any("asks for a reset (status 0x4f)" in line for line in state.problems)
    assert_given_back(device)


def test_page_that_moved_before_a_kick_leads_to_a_new_queue(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    with device.transport() as transport:
        device.pages[0].address += 0x10000
        state = query(transport, read_config(transport))
    assert state.runs() == [(0, 40), (100, 3), (511, 1)]
    assert state.problems == ()
    assert device.log.count("reset") == 3


def test_answers_in_a_page_that_moved_meanwhile_do_not_count(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)

    def move(kick: int) -> None:
        device.pages[0].address += 0x10000

    device.on_kick = move
    state = run(device).state
    assert state is not None
    assert not state.plugged
    assert any("moved from 0x50000000 to 0x50010000" in line for line in state.problems)
    assert_given_back(device)


def test_device_that_cannot_be_reset_is_not_given_to_a_kernel_that_would_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtio_pci, "_RESET_TIMEOUT", 0.02)
    device = FakeDevice(tmp_path, PLUGGED)
    device.stuck = True
    device.status = 0xF
    result = run(device)
    assert result.state is None
    assert "not reset after 0.02 s (status 0xf)" in result.reason
    assert device.command() == 0x0002
    assert device.written("bus/pci/drivers/virtio-pci/bind") == ""
    assert any("not given back to virtio-pci" in line for line in result.problems)


@pytest.mark.parametrize("step", ["_reset", "_negotiate", "_map_notify", "exchange", "read_config"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_any_exception_at_any_step_gives_the_function_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    original = getattr(virtio_pci.VirtioPci, step)
    calls = [0]

    def fail_once(*args: object) -> object:
        calls[0] += 1
        if calls[0] == 1:
            raise error
        return original(*args)

    monkeypatch.setattr(virtio_pci.VirtioPci, step, fail_once)
    with pytest.raises(error):
        run(device)
    assert_given_back(device)


def test_signal_while_waiting_ends_the_wait_and_is_delivered_after_the_cleanup(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    device.reply = lambda first, count: NEVER
    device.on_kick = lambda kick: signal.raise_signal(signal.SIGTERM)
    seen: list[list[str]] = []
    old = signal.signal(signal.SIGTERM, lambda *_: seen.append(list(device.log)))
    try:
        result = run(device)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert "interrupted by a signal" in result.reason
    assert device.kicks == 1
    assert seen == [["reset", "driver ok", "kick", "reset", "page freed"]]
    assert_given_back(device)


def test_ctrl_c_while_waiting_is_a_keyboard_interrupt_after_the_cleanup(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    device.reply = lambda first, count: NEVER
    device.on_kick = lambda kick: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(device)
    assert_given_back(device)


def test_lockdown_is_noticed_before_the_driver_is_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(tmp_path, PLUGGED)

    def forbidden(fd: int, data: bytes, offset: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "pwrite", forbidden)
    result = run(device)
    assert result.state is None
    assert "lockdown" in result.reason
    assert result.config is None
    assert device.log == []
    assert device.written("bus/pci/drivers/virtio-pci/unbind") == ""
    assert device.written("bus/pci/drivers/virtio-pci/bind") == ""


@pytest.mark.parametrize(
    ("code", "cause"), [(errno.EPERM, "lockdown"), (errno.EINVAL, "a driver still claims"), (errno.EBUSY, "claims")]
)
def test_bar_that_cannot_be_mapped_is_explained_and_the_region_still_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, cause: str
) -> None:
    device = FakeDevice(tmp_path, PLUGGED)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("mmap.mmap", refuse)
    monkeypatch.setattr(WindowedConfigSpace, "device", device, raising=False)
    monkeypatch.setattr(virtio_regs, "ConfigSpace", WindowedConfigSpace)
    transport = device.transport()
    transport._map_window = virtio_regs.Window
    (result,) = query_all(str(tmp_path), connect=lambda function, sysfs: transport)
    assert result.state is None
    assert cause in result.reason
    assert result.config == device.config
    assert device.command() == 0x0002
    assert device.written("bus/pci/drivers/virtio-pci/bind") == BDF


def test_bound_kernel_driver_is_left_alone_and_the_region_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(tmp_path, PLUGGED, virtio_driver="virtio_mem")
    monkeypatch.setattr(WindowedConfigSpace, "device", device, raising=False)
    monkeypatch.setattr(virtio_regs, "ConfigSpace", WindowedConfigSpace)
    result = run(device)
    assert result.state is None
    assert result.reason == "the in-kernel virtio_mem driver is bound to virtio1"
    assert result.config == device.config
    assert device.log == []
    assert device.written("bus/pci/drivers/virtio-pci/unbind") == ""


def test_bound_kernel_driver_is_unbound_and_bound_again_if_allowed(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED, virtio_driver="virtio_mem")
    result = run(device, allow_bound=True)
    assert result.state is not None
    assert_given_back(device)


def test_function_is_not_given_back_where_virtio_mem_would_bind_to_it(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED, registered=True)
    result = run(device)
    assert result.state is not None
    assert device.written("bus/pci/drivers/virtio-pci/bind") == ""
    assert result.problems == (f"{BDF}: not given back to virtio-pci: virtio_mem would bind to it",)


def test_function_without_a_driver_stays_without(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED, driver="")
    result = run(device)
    assert result.state is not None
    assert result.function.driver == ""
    assert device.written("bus/pci/drivers/virtio-pci/bind") == ""


def test_function_of_a_foreign_driver_is_left_alone(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED, driver="vfio-pci")
    result = run(device)
    assert "bound to vfio-pci, left alone" in result.reason
    assert device.log == []
    assert device.written("bus/pci/drivers/vfio-pci/unbind") == ""


def test_devices_come_in_pci_order_and_one_bad_device_does_not_hide_the_next(tmp_path: Path) -> None:
    addresses = ["0000:00:0a.0", "0000:00:04.0", "10000:00:01.0", "0000:01:00.0"]
    devices = {
        bdf: FakeDevice(tmp_path, {i}, make_config(8, addr=(i + 1) << 32), bdf=bdf) for i, bdf in enumerate(addresses)
    }
    (tmp_path / "bus/pci/devices/0000:00:02.0").mkdir()
    (tmp_path / "bus/pci/devices/0000:00:02.0/vendor").write_text("0x8086\n")
    (tmp_path / "bus/pci/devices/0000:00:02.0/device").write_text("0x1058\n")
    access_platform(devices["0000:00:0a.0"])
    results = query_all(str(tmp_path), connect=lambda function, sysfs: devices[function.bdf].transport())
    order = ["0000:00:04.0", "0000:00:0a.0", "0000:01:00.0", "10000:00:01.0"]
    assert [r.function.bdf for r in results] == order
    assert [r.state is not None for r in results] == [True, False, True, True]


def test_machine_without_pci_has_no_devices(tmp_path: Path) -> None:
    assert virtio_mem.discover(str(tmp_path)) == []
    assert query_all(str(tmp_path)) == []


def test_capabilities_are_found_as_qemu_lays_them_out() -> None:
    caps = caps_of(config_space())
    assert {kind: (c.bar, c.offset) for kind, c in caps.items()} == {
        1: (4, 0), 2: (4, 0x3000), 3: (4, 0x1000), 4: (4, 0x2000), 5: (0, 0),
    }  # fmt: skip
    assert caps[2].multiplier == 4


def test_capability_list_with_a_cycle_ends() -> None:
    space = bytearray(config_space())
    space[0x41] = 0x98
    assert sorted(caps_of(bytes(space))) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("at", "value"),
    [(0x44, 9), (0x44, 0), (0x48, 0x3FFD), (0x4A, 0x10), (0x4F, 0xFF), (0x42, 8), (0x50 - 4, 0)],
)
def test_capability_outside_its_bar_is_left_out(at: int, value: int) -> None:
    space = bytearray(config_space())
    if at == 0x4C:
        struct.pack_into("<I", space, at, 0)
    elif at == 0x48:
        struct.pack_into("<I", space, at, value)
    else:
        space[at] = value
    assert 1 not in caps_of(bytes(space))


def test_missing_capability_is_told_before_the_driver_is_disturbed(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    space = bytearray(config_space())
    space[0x34] = 0
    (device.function_path / "config").write_bytes(space)
    result = run(device)
    assert "no usable virtio capability for the common configuration" in result.reason
    assert device.written("bus/pci/drivers/virtio-pci/unbind") == ""


def test_short_config_space_and_resource_file_are_device_errors(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path, PLUGGED)
    (device.function_path / "resource").write_text("nonsense\n")
    assert "resource: " in run(device).reason
    (device.function_path / "config").write_bytes(bytes(1))
    assert "1 bytes instead of 2" in run(device).reason


def test_window_reads_and_writes_naturally_sized_registers(tmp_path: Path) -> None:
    path = tmp_path / "resource4"
    path.write_bytes(bytes(range(256)) * 64)
    window = virtio_regs.Window(str(path), 0x2010, 0x20)
    assert [window.read(4, size) for size in (1, 2, 4)] == [0x14, 0x1514, 0x17161514]
    window.write(8, 2, 0xBEEF)
    window.write(12, 4, 0x01020304)
    for offset, size in ((2, 4), (1, 2), (0x20, 1), (0x1E, 4), (-4, 4)):
        with pytest.raises(DeviceError, match="outside a BAR window"):
            window.read(offset, size)
    window.close()
    assert path.read_bytes()[0x2018:0x2020] == b"\xef\xbe\x1a\x1b\x04\x03\x02\x01"


def test_window_beyond_the_bar_is_a_device_error(tmp_path: Path) -> None:
    path = tmp_path / "resource4"
    path.write_bytes(bytes(4096))
    with pytest.raises(DeviceError, match="cannot map the BAR"):
        virtio_regs.Window(str(path), 0x2000, 56)
    with pytest.raises(DeviceError, match="cannot map the BAR"):
        virtio_regs.Window(str(tmp_path / "resource1"), 0, 56)


def test_config_space_that_is_missing_is_a_device_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="No such file"):
        ConfigSpace(str(tmp_path))
