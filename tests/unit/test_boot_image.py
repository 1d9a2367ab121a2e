# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel and initramfs of the next stage: what a bzImage tells, which files are taken, and the running root packed
again, which the cpio tool unpacks as the same tree."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import socket
import stat
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import boot_image, stage_state
from capture.boot_image import Initramfs, Kernel
from guard.errors import Error
from tests.unit.stage_parts import MIB, bz_image, needs_cpio, needs_root, unpacked

RELEASE = "6.12.107-amd64"


def put(path: Path, data: bytes = b"") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


# ---- kernels


def test_what_a_kernel_image_tells_of_itself(tmp_path: Path) -> None:
    path = put(tmp_path / "vmlinuz", bz_image(RELEASE, 1023, 77 * MIB))
    assert boot_image.kernel_at(path) == Kernel(path, 0x9000, 77 * MIB, 1023, RELEASE)


@pytest.mark.parametrize(
    ("name", "release"), [(0, ""), (0xFE00, ""), (0x7FF0, RELEASE), (0x7FFC, RELEASE[:4]), (0x8000, "")]
)
def test_name_outside_of_what_is_read_is_cut_or_none(name: int, release: str, tmp_path: Path) -> None:
    data = bytearray(0x12000)
    data[:0x9000] = bz_image("elsewhere")
    struct.pack_into("<H", data, 0x20E, name)
    if name:
        data[0x200 + name :] = RELEASE.encode().ljust(len(data) - 0x200 - name, b"\0")
    assert boot_image.kernel_at(put(tmp_path / "vmlinuz", bytes(data))).release == release


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "offset 0x202: no bzImage (expected HdrS)"),
        (bz_image(RELEASE)[:0x263], "offset 0x202: no bzImage (expected HdrS)"),
        (b"\x7fELF".ljust(0x9000, b"\0"), "offset 0x202: no bzImage (expected HdrS)"),
        (bz_image(RELEASE, version=0x209), "offset 0x206: boot protocol 2.9, expected 2.10 or later"),
        (bz_image(RELEASE, version=0x1FF), "offset 0x206: boot protocol 1.255, expected 2.10 or later"),
    ],
)
def test_what_is_no_kernel_image_that_can_be_gone_to_is_one_clear_line(data: bytes, why: str, tmp_path: Path) -> None:
    path = put(tmp_path / "vmlinuz", data)
    with pytest.raises(Error) as caught:
        boot_image.kernel_at(path)
    assert str(caught.value) == f"{path}: {why}"


def test_protocol_that_first_has_the_size_in_memory_is_enough(tmp_path: Path) -> None:
    path = put(tmp_path / "vmlinuz", bz_image(RELEASE, version=0x20A, name=0x10)[:0x264])
    assert boot_image.kernel_at(path).init_size == 64 * MIB


@given(st.binary(min_size=0x62, max_size=0x90), st.binary(max_size=99))
def test_no_damage_makes_anything_but_a_kernel_or_our_own_error(header: bytes, behind: bytes) -> None:
    fd = os.memfd_create("vmlinuz")
    try:
        os.write(fd, bytes(0x202) + b"HdrS" + header[4:] + behind)
        try:
            found = boot_image.kernel_at(f"/proc/self/fd/{fd}")
        except Error:
            return
        assert 0 <= found.init_size < 1 << 32
        assert " " not in found.release
    finally:
        os.close(fd)


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/ and /sysroot are below tmp_path."""
    monkeypatch.setattr(boot_image, "_ROOTS", (str(tmp_path), f"{tmp_path}/sysroot"))
    monkeypatch.setattr(boot_image, "_root_kind", lambda: "ext4")
    return tmp_path


KERNELS = [text.format(RELEASE) for text in boot_image.KERNELS]
IMAGES = [text.format(RELEASE) for text in boot_image.INITRAMFS]


@pytest.mark.parametrize("place", [*KERNELS, *(f"/sysroot{path}" for path in KERNELS)])
def test_kernel_is_found_wherever_it_lies(place: str, roots: Path) -> None:
    path = put(roots / place[1:], bz_image(RELEASE))
    assert boot_image.find_kernel(None, RELEASE).path == path


def test_kernel_with_the_release_in_its_name_comes_before_the_one_without(roots: Path) -> None:
    put(roots / "boot/vmlinuz", bz_image("6.1.0"))
    put(roots / "sysroot/boot/vmlinuz", bz_image(RELEASE))
    path = put(roots / f"boot/vmlinuz-{RELEASE}", bz_image(RELEASE))
    assert boot_image.find_kernel(None, RELEASE).path == path
    other = put(roots / "other", bz_image(RELEASE))
    assert boot_image.find_kernel(other, RELEASE).path == other


def test_kernel_of_another_release_is_refused(roots: Path) -> None:
    path = put(roots / "boot/vmlinuz", bz_image("6.1.0-9"))
    why = f"{path}: is of kernel 6.1.0-9, expected the running one, {RELEASE}"
    with pytest.raises(Error) as caught:
        boot_image.find_kernel(path, RELEASE)
    assert str(caught.value) == why
    with pytest.raises(Error) as caught:
        boot_image.find_kernel(None, RELEASE)
    assert str(caught.value) == f"no image of this kernel ({RELEASE}): {why}; --kernel names it"
    put(roots / "boot/vmlinuz", bz_image("6.1.0-9", name=0))
    with pytest.raises(Error, match="is of kernel of no name, expected"):
        boot_image.find_kernel(None, RELEASE)


@pytest.mark.parametrize(
    "foreign",
    [bz_image("6.1.0-9"), b"no kernel at all", bz_image(RELEASE, version=0x209), None],
    ids=lambda f: len(f or ""),
)
def test_what_is_not_the_running_kernel_does_not_hide_it(foreign: bytes | None, roots: Path) -> None:
    for place in KERNELS:
        if foreign is None:
            (roots / place[1:]).mkdir(parents=True)
        else:
            put(roots / place[1:], foreign)
    right = put(roots / "sysroot" / KERNELS[-1][1:], bz_image(RELEASE))
    assert boot_image.find_kernel(None, RELEASE).path == right
    Path(right).unlink()
    with pytest.raises(Error) as caught:
        boot_image.find_kernel(None, RELEASE)
    for place in KERNELS:
        assert f"{roots}{place}: " in str(caught.value)


def test_kernel_that_is_nowhere_is_one_clear_line(roots: Path) -> None:
    with pytest.raises(Error) as caught:
        boot_image.find_kernel(None, RELEASE)
    looked = ", ".join(f"{roots}{path}" for path in KERNELS)
    assert str(caught.value) == f"no image of this kernel ({RELEASE}): none of {looked}; --kernel names it"
    with pytest.raises(Error, match=f"^{roots}/none: No such file or directory$"):
        boot_image.find_kernel(f"{roots}/none", RELEASE)


# ---- initramfs


def test_initramfs_is_the_distributions_first_then_the_kernels_own_copy(roots: Path) -> None:
    put(roots / "elsewhere", b"12345")
    for place in reversed([*IMAGES, *(f"/sysroot{path}" for path in IMAGES)]):
        path = put(roots / place[1:], b"123")
        assert boot_image.find_initramfs(None, RELEASE) == Initramfs(path)
    found = boot_image.find_initramfs(f"{roots}/elsewhere", RELEASE)
    assert (found.least_size(), str(found)) == (5, f"{roots}/elsewhere")


@pytest.mark.parametrize("kind", ["rootfs", "ramfs", "tmpfs"])
def test_running_root_is_packed_again_where_it_was_unpacked_and_there_is_no_file(
    kind: str, roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (roots / IMAGES[0][1:]).mkdir(parents=True)  # no file
    monkeypatch.setattr(boot_image, "_root_kind", lambda: kind)
    found = boot_image.find_initramfs(None, RELEASE)
    assert found == Initramfs(None)
    assert (found.least_size(), str(found)) == (0, "the running one, packed again")


def test_root_that_is_no_initramfs_is_never_packed(roots: Path) -> None:
    looked = ", ".join(f"{roots}{path}" for path in IMAGES)
    with pytest.raises(Error) as caught:
        boot_image.find_initramfs(None, RELEASE)
    assert str(caught.value) == f"no initramfs: none of {looked}, and / is ext4; --initramfs names it"
    with pytest.raises(Error, match=f"^{roots}/none: no such file$"):
        boot_image.find_initramfs(f"{roots}/none", RELEASE)
    assert Initramfs(f"{roots}/gone").least_size() == 0


@pytest.mark.parametrize(
    ("mounts", "kind"),
    [
        ("rootfs / rootfs rw 0 0\nproc /proc proc rw 0 0\n", "rootfs"),
        ("rootfs / rootfs rw 0 0\n/dev/vda1 / ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\n", "ext4"),
        ("tmpfs /run tmpfs rw 0 0\nbad\n", "not mounted"),
        (None, "not mounted"),
    ],
)
def test_root_is_what_was_mounted_there_last(
    mounts: str | None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mounts is not None:
        put(tmp_path / "mounts", mounts.encode())

    def open_instead(_path: str, **how: Any) -> Any:
        return builtins.open(tmp_path / "mounts", **how)

    monkeypatch.setattr(boot_image, "open", open_instead, raising=False)
    assert boot_image._root_kind() == kind


def written(initramfs: Initramfs, state: dict[str, bytes]) -> bytes:
    fd = os.memfd_create("initramfs")
    try:
        boot_image.write_initramfs(initramfs, state, fd)
        return os.pread(fd, 64 * MIB, 0)
    finally:
        os.close(fd)


STATE = {"meant.json": b"{}", "vmcore.head": bytes(range(256))}


def test_ours_come_first_and_the_file_follows_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, content = os.write, os.urandom(3 * MIB + 5)
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, data[:700_001]))  # as a kernel may
    data = written(Initramfs(put(tmp_path / "initrd", content)), STATE)
    ours = stage_state.archive(STATE)
    assert data == ours + content
    assert len(ours) % 4 == 0


def test_initramfs_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(Error, match=f"^{tmp_path}/none: No such file or directory$"):
        written(Initramfs(f"{tmp_path}/none"), STATE)
    path = put(tmp_path / "initrd", b"content")
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(Error, match=f"^{path}: No space left on device$"):
        boot_image.write_initramfs(Initramfs(path), STATE, full)
    os.close(full)


# ---- the running root


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    top = tmp_path / "root"
    put(top / "init", b"#!/bin/sh\n").encode()
    (top / "init").chmod(0o755)
    put(top / "usr/lib/modules/6.12/x.ko", os.urandom(70_000))
    put(top / "usr/bin/sh", b"shell")
    os.link(top / "usr/bin/sh", top / "usr/bin/dash")
    os.link(top / "usr/bin/sh", top / "a sh")
    put(top / os.fsdecode(b"\xff\xfe odd"), b"")
    (top / "bin").symlink_to("usr/bin")
    (top / "dangling").symlink_to("/nowhere/at/all")
    os.mkfifo(top / "fifo", 0o600)
    (top / "proc").mkdir(0o555)
    put(top / "run/pid", b"1")
    (top / "var").mkdir(0o1777)
    monkeypatch.setattr(boot_image, "_NOT_PACKED", (f"{top}/run",))
    monkeypatch.setattr(stage_state, "STATE", f"{top}/etc/oldmem-stage")
    return top


Listing = dict[str, tuple[int, bytes, int, str]]


def listing(top: Path) -> Listing:
    """What is below *top*: type and mode, content, device number, and the first name of the same file."""
    found: Listing = {}
    first: dict[int, str] = {}
    for path in sorted(top.rglob("*")):
        status, name = path.lstat(), str(path.relative_to(top))
        data = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[name] = (status.st_mode, data, status.st_rdev, first.setdefault(status.st_ino, name))
    return found


def packable(top: Path) -> Listing:
    return {path: what for path, what in listing(top).items() if path != "run/pid"}


def packed(top: Path) -> bytes:
    return b"".join(boot_image._packed(str(top)))


@needs_cpio
def test_packed_root_is_the_same_tree(tree: Path, tmp_path: Path) -> None:
    data = packed(tree)
    assert len(data) % 512 == 0
    expected = packable(tree)
    assert len(expected) == 17
    assert listing(unpacked(data, tmp_path / "again")) == expected


@needs_cpio
def test_sockets_and_what_one_stage_told_the_next_are_left_out(tree: Path, tmp_path: Path) -> None:
    (tree / "etc").mkdir()
    put(tree / "etc/passwd", b"root")
    expected = packable(tree)
    put(tree / "etc/oldmem-stage/why", b"of an earlier stage")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tree / "socket"))
        assert listing(unpacked(packed(tree), tmp_path / "again")) == expected


@needs_root
@needs_cpio
def test_device_nodes_are_packed_with_their_numbers(tree: Path, tmp_path: Path) -> None:
    os.mknod(tree / "loop7", stat.S_IFBLK | 0o660, os.makedev(7, 300))
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    expected = packable(tree)
    assert listing(unpacked(packed(tree), tmp_path / "again")) == expected
    assert expected["loop7"][2] == os.makedev(7, 300)


@needs_cpio
def test_what_vanishes_meanwhile_is_left_out_with_the_rest_whole(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder when it is listed, a file when its status is asked, one of two links when it is read."""
    put(tree / "gone/file", b"")
    put(tree / "late", b"")
    put(tree / "link a", b"both")
    os.link(tree / "link a", tree / "link b")
    listdir, lstat = os.listdir, os.lstat

    def listed(folder: str) -> list[str]:
        if folder == f"{tree}/gone":
            os.unlink(f"{folder}/file")
            os.rmdir(folder)
        return listdir(folder)

    def looked_at(path: str) -> os.stat_result:
        if path == f"{tree}/late":
            os.unlink(path)
        found = lstat(path)
        if path == f"{tree}/link a":
            os.unlink(path)
        return found

    monkeypatch.setattr(os, "listdir", listed)
    monkeypatch.setattr(os, "lstat", looked_at)
    data = packed(tree)
    monkeypatch.undo()
    (tree / "gone").mkdir()
    assert listing(unpacked(data, tmp_path / "again")) == packable(tree)


@needs_cpio
def test_other_file_systems_are_folders_with_nothing_in_them(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tree / "sys/kernel/notes", b"")
    lstat = os.lstat

    def other_device(path: Any) -> os.stat_result:
        found = lstat(path)
        return os.stat_result((*found[:2], found[2] + 1, *found[3:])) if str(path) == f"{tree}/sys" else found

    monkeypatch.setattr(os, "lstat", other_device)
    data = packed(tree)
    monkeypatch.undo()
    shutil.rmtree(tree / "sys/kernel")
    assert listing(unpacked(data, tmp_path / "again")) == packable(tree)


def test_file_that_cannot_be_read_is_one_clear_line(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = boot_image._packed

    def refusing(path: str, *how: Any) -> Any:
        if path == f"{tree}/usr/lib/modules/6.12/x.ko":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return builtins.open(path, *how)

    monkeypatch.setattr(boot_image, "open", refusing, raising=False)
    monkeypatch.setattr(boot_image, "_packed", lambda top: pack(str(tree)))
    with pytest.raises(Error, match=f"^{tree}/usr/lib/modules/6.12/x.ko: Input/output error$"):
        written(Initramfs(None), STATE)


@pytest.mark.parametrize("has_zlib", [True, False])
def test_running_root_follows_ours_compressed_where_that_can_be_done(
    has_zlib: bool, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot_image, "_packed", lambda top: iter([top.encode(), b"archive"]))
    if not has_zlib:
        monkeypatch.setitem(sys.modules, "zlib", None)
    data = written(Initramfs(None), STATE)
    ours = stage_state.archive(STATE)
    assert data.startswith(ours)
    assert (zlib.decompress(data[len(ours) :], wbits=31) if has_zlib else data[len(ours) :]) == b"/archive"
