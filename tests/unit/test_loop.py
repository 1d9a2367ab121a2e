# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loop devices: read-only, exactly the bytes asked for, gone when the last user is gone, however it went."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guard import loop
from guard.errors import DeviceError
from guard.loop import LoopInfo64, attach

SIZE = 64 * 1024
LOOP_GET_STATUS64 = 0x4C05


def loop_driver_missing() -> str:
    if os.geteuid() != 0:
        return "loop devices need root"
    try:
        os.close(os.open("/dev/loop-control", os.O_RDONLY))
    except OSError as error:
        return f"/dev/loop-control: {error.strerror}"
    return ""


WHY_NOT = loop_driver_missing()
needs_loop = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "loop works")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "ram.raw"
    path.write_bytes(b"".join(i.to_bytes(8, "little") for i in range(SIZE // 8)))
    return path


def backing_file(device: str) -> str:
    try:
        return Path(f"/sys/block/{os.path.basename(device)}/loop/backing_file").read_text().strip()
    except OSError:
        return ""


def wait_until_detached(device: str, image: Path) -> bool:
    deadline = time.monotonic() + 10
    while backing_file(device) == str(image):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def status(fd: int) -> LoopInfo64:
    info = LoopInfo64()
    fcntl.ioctl(fd, LOOP_GET_STATUS64, info)
    return info


@needs_loop
def test_device_shows_the_image_read_only_and_is_detached_on_close(image: Path) -> None:
    with attach(str(image)) as device:
        assert os.lseek(device.fd, 0, os.SEEK_END) == SIZE
        assert os.pread(device.fd, SIZE, 0) == image.read_bytes()
        assert backing_file(device.path) == str(image)
        info = status(device.fd)
        assert info.lo_flags & (loop.LO_FLAGS_READ_ONLY | loop.LO_FLAGS_AUTOCLEAR) == 5
        name = os.path.basename(device.path)
        assert Path(f"/sys/block/{name}/ro").read_text().strip() == "1"
        assert Path(f"/sys/block/{name}/loop/dio").read_text().strip() == "0"
    assert wait_until_detached(device.path, image)


@needs_loop
def test_part_of_an_image_can_be_attached(image: Path) -> None:
    with attach(str(image), offset=4096, size=8192) as device:
        assert os.pread(device.fd, SIZE, 0) == image.read_bytes()[4096:12288]
    with attach(str(image), offset=512) as device:
        assert os.lseek(device.fd, 0, os.SEEK_END) == SIZE - 512


@needs_loop
def test_two_images_get_two_devices(image: Path) -> None:
    with attach(str(image)) as first, attach(str(image), offset=512) as second:
        assert first.path != second.path


@needs_loop
def test_device_is_detached_when_its_user_is_killed(image: Path) -> None:
    code = (
        "import sys, time; from guard.loop import attach; d = attach(sys.argv[1]); "
        "print(d.path, flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", code, str(image)], cwd=root, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        device = child.stdout.readline().decode().strip()
        assert backing_file(device) == str(image)
        child.send_signal(signal.SIGKILL)
    assert wait_until_detached(device, image)


@needs_loop
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTTY])
def test_kernel_without_loop_configure_gets_the_older_calls(
    image: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    ioctl = fcntl.ioctl
    calls: list[int] = []

    def old_kernel(fd: int, request: int, *args: object) -> int:
        calls.append(request)
        if request == loop.LOOP_CONFIGURE:
            raise OSError(code, os.strerror(code))
        return ioctl(fd, request, *args)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(fcntl, "ioctl", old_kernel)
    with attach(str(image), offset=4096) as device:
        assert os.pread(device.fd, SIZE, 0) == image.read_bytes()[4096:]
        assert status(device.fd).lo_flags & 5 == 5
    assert calls[:4] == [loop.LOOP_CTL_GET_FREE, loop.LOOP_CONFIGURE, loop.LOOP_SET_FD, loop.LOOP_SET_STATUS64]
    assert wait_until_detached(device.path, image)


@needs_loop
def test_device_taken_by_somebody_else_is_tried_again_with_another(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ioctl = fcntl.ioctl
    others: list[loop.LoopDevice] = []

    def racing(fd: int, request: int, *args: object) -> int:
        number = ioctl(fd, request, *args)  # type: ignore[call-overload]
        if request == loop.LOOP_CTL_GET_FREE and len(others) < 2:
            monkeypatch.setattr(fcntl, "ioctl", ioctl)
            others.append(attach(str(image)))
            monkeypatch.setattr(fcntl, "ioctl", racing)
        return number  # type: ignore[no-any-return]

    monkeypatch.setattr(fcntl, "ioctl", racing)
    with attach(str(image)) as device:
        assert device.path not in [other.path for other in others]
        assert os.pread(device.fd, SIZE, 0) == image.read_bytes()
    assert len(others) == 2
    for other in others:
        other.close()


def test_device_that_is_always_taken_ends_in_an_error(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always_busy(fd: int, request: int, *args: object) -> int:
        if request == loop.LOOP_CTL_GET_FREE:
            return 7
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(fcntl, "ioctl", always_busy)
    monkeypatch.setattr(loop, "_open_node", lambda name, dev, kind: os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(DeviceError, match="16 free loop devices in a row"):
        attach(str(image))


def test_missing_device_node_is_made_with_the_kernels_numbers(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mknod needs root")
    path = tmp_path / "null"
    try:
        os.close(loop._open_node(str(path), (1, 3), 0o020000))
    except DeviceError as error:
        pytest.skip(f"device nodes cannot be used here: {error}")
    assert os.stat(path).st_rdev == os.makedev(1, 3)


@pytest.mark.parametrize("extra", [1, 511, 513])
def test_image_whose_tail_would_be_cut_is_refused(image: Path, extra: int) -> None:
    with image.open("ab") as file:
        file.write(bytes(extra))
    with pytest.raises(DeviceError, match="would cut the tail"):
        attach(str(image))


@pytest.mark.parametrize(
    ("offset", "size", "words"),
    [
        (1, 512, "whole 512-byte sectors"),
        (0, 100, "whole 512-byte sectors"),
        (SIZE, 0, "the file ends at"),
        (SIZE - 512, 1024, "the file ends at"),
        (-512, 512, "the file ends at"),
    ],
)
def test_part_that_is_not_in_the_image_is_refused(image: Path, offset: int, size: int, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        attach(str(image), offset, size)


def test_image_that_is_missing_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="No such file"):
        attach(str(tmp_path / "missing"))
    with pytest.raises(DeviceError, match="neither a regular file nor a block device"):
        attach(str(tmp_path))
