# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loop devices over image files: read-only, detached by the kernel itself once the last user is gone.

Layouts and numbers are those of include/uapi/linux/loop.h. LO_FLAGS_AUTOCLEAR makes the detaching survive a SIGKILL:
the kernel clears the device when its last file descriptor is closed, whoever closes it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat

from .errors import DeviceError

LOOP_SET_FD = 0x4C00
LOOP_CLR_FD = 0x4C01
LOOP_SET_STATUS64 = 0x4C04
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_NAME_SIZE = 64
LO_KEY_SIZE = 32

SECTOR = 512
_CONTROL_DEV = (10, 237)  # MISC_MAJOR, LOOP_CTRL_MINOR
_LOOP_MAJOR = 7
_TRIES = 16


class LoopInfo64(ctypes.Structure):
    """struct loop_info64"""

    _fields_ = [
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * LO_NAME_SIZE),
        ("lo_crypt_name", ctypes.c_char * LO_NAME_SIZE),
        ("lo_encrypt_key", ctypes.c_uint8 * LO_KEY_SIZE),
        ("lo_init", ctypes.c_uint64 * 2),
    ]


class LoopConfig(ctypes.Structure):
    """struct loop_config"""

    _fields_ = [
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", LoopInfo64),
        ("reserved", ctypes.c_uint64 * 8),
    ]


class LoopDevice:
    """An attached loop device: ``path`` of its node and ``fd``, open for reading, which keeps it attached."""

    __slots__ = ("fd", "path")

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    def close(self) -> None:
        """Let go of the device; the kernel detaches it once nobody else has it open."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> LoopDevice:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def attach(path: str, offset: int = 0, size: int = 0) -> LoopDevice:
    """Attach bytes [*offset*, *offset* + *size*) of the file *path* to a free loop device; size 0 = up to its end.

    Raises DeviceError if there is no loop driver, the file cannot be read or is too short, or the part asked for
    does not consist of whole 512-byte sectors (a loop device would silently cut the tail)."""
    try:
        backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"{path}: {error.strerror}") from None
    try:
        size = _checked_size(path, backing, offset, size)
        return _attach_to_free(path, backing, offset, size)
    finally:
        os.close(backing)


def _checked_size(path: str, backing: int, offset: int, size: int) -> int:
    mode = os.fstat(backing).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise DeviceError(f"{path}: neither a regular file nor a block device: no loop device can be made of it")
    end = os.lseek(backing, 0, os.SEEK_END)
    if offset < 0 or size < 0 or offset + size > end or offset == end:
        raise DeviceError(f"{path}: {size:#x} bytes at {offset:#x} asked for, but the file ends at {end:#x}")
    size = size or end - offset
    if offset % SECTOR or size % SECTOR:
        raise DeviceError(
            f"{path}: {size} bytes at {offset} are not whole {SECTOR}-byte sectors: a loop device would cut the tail; "
            f"pad the image or use the file itself"
        )
    return size


def _attach_to_free(path: str, backing: int, offset: int, size: int) -> LoopDevice:
    for _ in range(_TRIES):
        number = _free_number()
        name = f"/dev/loop{number}"
        fd = _open_node(name, _loop_dev(number), stat.S_IFBLK)
        try:
            _configure(fd, backing, path, offset, size)
            seen = os.lseek(fd, 0, os.SEEK_END)
            if seen != size:
                raise DeviceError(f"{name}: {seen:#x} bytes long after attaching {size:#x} bytes of {path}")
            return LoopDevice(name, fd)
        except OSError as error:
            os.close(fd)
            # LOOP_CTL_GET_FREE reserves nothing: somebody else may have taken the device meanwhile.
            if error.errno != errno.EBUSY:
                raise DeviceError(f"{name}: cannot attach {path}: {error.strerror}") from None
        except BaseException:
            os.close(fd)
            raise
    raise DeviceError(f"cannot attach {path}: {_TRIES} free loop devices in a row were taken by somebody else")


def _free_number() -> int:
    fd = _open_node("/dev/loop-control", _CONTROL_DEV, stat.S_IFCHR)
    try:
        return fcntl.ioctl(fd, LOOP_CTL_GET_FREE)
    except OSError as error:
        raise DeviceError(f"/dev/loop-control: no free loop device: {error.strerror}") from None
    finally:
        os.close(fd)


def _loop_dev(number: int) -> tuple[int, int]:
    # With loop.max_part= the minor is not the number, so sysfs is asked first.
    try:
        with open(f"/sys/block/loop{number}/dev", encoding="ascii") as file:
            major, minor = file.read().split(":")
        return int(major), int(minor)
    except (OSError, ValueError):
        return _LOOP_MAJOR, number


def _open_node(name: str, dev: tuple[int, int], kind: int) -> int:
    # A capture initramfs may have a static /dev: make the node that devtmpfs would have made.
    try:
        if not os.path.exists(name):
            os.mknod(name, kind | 0o600, os.makedev(*dev))
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        hint = " (is the loop module loaded?)" if error.errno in (errno.ENXIO, errno.ENODEV) else ""
        raise DeviceError(f"{name}: {error.strerror}{hint}") from None


def _configure(fd: int, backing: int, path: str, offset: int, size: int) -> None:
    """Bind *backing* to the loop device *fd*; raises OSError as the kernel does. Direct I/O stays off: image files
    are often sparse or on filesystems that cannot do it, and their sector size need not be ours."""
    config = LoopConfig(fd=backing)
    config.info.lo_offset = offset
    config.info.lo_sizelimit = size
    config.info.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR
    config.info.lo_file_name = os.fsencode(path)[: LO_NAME_SIZE - 1]
    try:
        fcntl.ioctl(fd, LOOP_CONFIGURE, config)
        return
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTTY):
            raise
    # Before 5.8 there is no LOOP_CONFIGURE. Read-only then follows from how the backing file is open.
    fcntl.ioctl(fd, LOOP_SET_FD, backing)
    try:
        fcntl.ioctl(fd, LOOP_SET_STATUS64, config.info)
    except BaseException:
        fcntl.ioctl(fd, LOOP_CLR_FD)
        raise
