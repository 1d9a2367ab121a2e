# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loading the next kernel: by which way, where its segments lie, what is told where nothing can be loaded. A stand-in
answers for the kernel, and a shell script is kexec-tools."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from capture import kexec, programs
from capture.kexec import Image, Loaded
from guard._core import ffi
from guard.errors import Error
from guard.ranges import RangeSet
from tests.pace import patience
from tests.unit.stage_parts import open_files

TOOL_SAYS = """\
kernel: 0x7f49f83ff010 kernel_size: 0xd797c0
MEMORY RANGES
0000000000001000-000000000009fbff (0)
sym: sha256_starts info: 12 other: 00 shndx: 1 value: 2f0 size: 6f
kexec_load: entry = 0x2ef54730 flags = 0x3e0000
nr_segments = 4
segment[0].buf   = 0x7f49f7a88010
segment[0].bufsz = 0x8bf40f
segment[0].mem   = 0x2b140000
segment[0].memsz = 0x8c0000
segment[1].buf   = 0x7f49f834d010
segment[1].bufsz = 0xd797c0
segment[1].mem   = 0x2ba00000
segment[1].memsz = 0x3378000
segment[2].buf   = 0x559dd06bb300
segment[2].bufsz = 0x70e0
segment[2].mem   = 0x2ef4f000
segment[2].memsz = 0x9000
segment[3].buf   = 0x559dd06b2d10
segment[3].bufsz = 0x4278
segment[3].mem   = 0x2ef58000
segment[3].memsz = 0x5000
"""
TOOL_SEGMENTS = RangeSet(
    [(0x2B140000, 0x2BA00000), (0x2BA00000, 0x2ED78000), (0x2EF4F000, 0x2EF58000), (0x2EF58000, 0x2EF5D000)]
)
KERNEL_SAYS = """\
6,410,3379600,-;kexec_file: kernel: 00000000c2a1b5ef kernel_size: 0xd797c0
6,411,3379690,-;kexec_file: nr_segments = 3
6,412,3379691,-;segment[0]: buf=0x000000009fbe2c0a bufsz=0x70e0 mem=0x2eff7000 memsz=0x9000
6,413,3379702,-;kexec_file: segment[1]: buf=0x00000000b5a7f11c bufsz=0x12f8 mem=0x2eff5000 memsz=0x2000
 SUBSYSTEM=none
6,414,3381223,-;segment[2]: buf=0x00000000d1d2e3f4 bufsz=0xd797c0 mem=0x2ba00000 memsz=0x3378000
6,415,3381300,-;kexec_file: kexec_file_load: type:0, start:0x2eff7250 head:0x1 flags:0xa
"""
KERNEL_SEGMENTS = RangeSet([(0x2BA00000, 0x2ED78000), (0x2EFF5000, 0x2EFF7000), (0x2EFF7000, 0x2F000000)])
BY_FILE, BY_TOOLS = "kexec_file_load(2)", "kexec -c"


class World:
    """What a kernel and kexec-tools would do. Each call is a line in the file *calls*: loading runs in a process of its
    own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.loaded, self.kmsg, self._calls = folder / "kexec_loaded", folder / "kmsg", folder / "calls"
        self.loaded.write_text("0\n")
        self.kmsg.write_text(KERNEL_SAYS.replace("0x2b", "0xf0"))  # of an earlier load
        self._calls.touch()
        self.kernel = folder / "vmlinuz"
        self.kernel.write_bytes(b"the kernel")
        self.refused = self.unload_refused = 0
        self.says = KERNEL_SAYS
        self.killed_by = 0
        self.tool(TOOL_SAYS, "echo 1 > kexec_loaded")

    def tool(self, says: str, *commands: str) -> None:
        """kexec-tools that runs *commands*, then prints *says*."""
        (self.folder / "says").write_text(says)
        script = self.bin / "kexec"
        lines = ['echo "tool" "$@" >> calls', '[ "$1" = -u ] && echo 0 > kexec_loaded && exit 0', *commands, "cat says"]
        script.write_text("\n".join(["#!/bin/sh", f"cd {self.folder}", *lines]) + "\n")
        script.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text(errors="surrogateescape").splitlines()

    def _note(self, line: bytes) -> None:
        with self._calls.open("ab") as file:
            file.write(line + b"\n")

    # the kernel's part
    def kexec_file(self, kernel_fd: int, initramfs_fd: int, cmdline: object, tell: int) -> int:
        parts = [os.pread(kernel_fd, 99, 0), os.pread(initramfs_fd, 99, 0), ffi.string(cmdline), b"%d" % tell]
        self._note(b"file " + b"|".join(parts))
        if self.killed_by:
            os.kill(os.getpid(), self.killed_by)
        if not self.refused:
            self.loaded.write_text("1\n")
            with self.kmsg.open("a") as log:
                log.write(self.says if tell else "")
        return -self.refused

    def kexec_unload(self) -> int:
        self._note(b"unload")
        if not self.unload_refused:
            self.loaded.write_text("0\n")
        return -self.unload_refused

    def kexec_jump(self) -> int:
        self._note(b"jump")
        return -errno.EINVAL


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(kexec, "lib", made)
    monkeypatch.setattr(kexec, "_LOADED", str(made.loaded))
    monkeypatch.setattr(kexec, "_KMSG", str(made.kmsg))
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")
    return made


@pytest.fixture
def image(world: World) -> Iterator[Image]:
    """With a check that nothing stays open, and no process behind."""
    fd = os.memfd_create("initramfs")
    os.write(fd, b"the initramfs")
    before = open_files()
    yield Image(str(world.kernel), fd, 'quiet "a b" elfcorehdr=0x1000')
    assert open_files() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    os.close(fd)


def test_the_kernel_itself_loads_if_it_can(world: World, image: Image) -> None:
    assert kexec.load(image, False) == Loaded(BY_FILE, None)
    assert world.calls == ['file the kernel|the initramfs|quiet "a b" elfcorehdr=0x1000|0']
    assert kexec.is_loaded()


def test_command_line_goes_to_the_kernel_byte_by_byte(world: World, image: Image) -> None:
    kexec.load(image._replace(cmdline="name=\udcff\u00e9"), False)
    assert world.calls[0].encode(errors="surrogateescape").split(b"|")[2] == b"name=\xff\xc3\xa9"


def test_segments_are_those_that_the_kernel_logs_of_this_load(world: World, image: Image) -> None:
    assert kexec.load(image, True) == Loaded(BY_FILE, KERNEL_SEGMENTS)
    assert [call.rpartition("|")[2] for call in world.calls] == ["1"]


def test_tools_load_where_the_kernel_refuses(world: World, image: Image) -> None:
    world.refused = errno.ENOSYS
    world.tool(
        TOOL_SAYS,
        "echo 1 > kexec_loaded",
        'for w; do case $w in --initrd=*) cat "${w#--initrd=}" >> calls;; esac; done',
    )
    assert kexec.load(image, False) == Loaded(BY_TOOLS, TOOL_SEGMENTS)
    first, second, third = world.calls
    assert first.startswith("file ")
    given = [f"--initrd=/proc/self/fd/{image.initramfs}", f"--command-line={image.cmdline}", image.kernel]
    assert second == " ".join(["tool -c -d -l", *given])
    assert third == "the initramfs"


def test_tools_tell_their_segments_where_the_kernel_knows_no_way_to_tell(world: World, image: Image) -> None:
    world.refused = errno.EINVAL
    assert kexec.load(image, True) == Loaded(BY_TOOLS, TOOL_SEGMENTS)


@pytest.mark.parametrize(
    "says",
    [
        "",
        KERNEL_SAYS.replace("nr_segments = 3", "nr_segments = 4"),
        KERNEL_SAYS.replace("nr_segments = 3", "nr_segments"),
        "6,411,3379690,-;kexec_file: nr_segments = 0\n",
    ],
)
def test_load_whose_segments_are_not_all_told_is_undone(says: str, world: World, image: Image) -> None:
    world.says = says
    world.tool("no segments", "exit 1")
    with pytest.raises(Error, match=r"kexec_file_load\(2\): the kernel's log does not tell where the segments are; "):
        kexec.load(image, True)
    assert [call.split()[0] for call in world.calls] == ["file", "unload", "tool"]
    assert not kexec.is_loaded()


def test_log_that_was_overwritten_meanwhile_undoes_the_load(
    world: World, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(_fd: int, _size: int) -> bytes:
        raise BrokenPipeError  # EPIPE of /dev/kmsg

    world.tool("no segments", "exit 1")
    monkeypatch.setattr("os.read", overtaken)
    with pytest.raises(Error, match=r"kexec_file_load\(2\): the kernel's log does not tell where the segments are; "):
        kexec.load(image, True)
    assert not kexec.is_loaded()


def test_tools_that_do_not_tell_segments_are_undone_where_these_are_wanted(world: World, image: Image) -> None:
    world.refused = errno.ENOSYS
    world.tool("loaded", "echo 1 > kexec_loaded")
    assert kexec.load(image, False) == Loaded(BY_TOOLS, None)
    with pytest.raises(Error, match=r"; kexec -c: it does not tell where the segments are$"):
        kexec.load(image, True)
    assert not kexec.is_loaded()


@pytest.mark.parametrize(
    ("says", "command", "why"),
    [
        ("", "exit 3", "ended its process with status 3"),
        ("all fine so far", "exit 1", "ended its process with status 1"),
        ("", "echo 'Cannot open /boot/x: no such file' >&2; exit 255", "Cannot open /boot/x: no such file"),
        ("", "echo 'kexec_load failed: Operation not permitted'; echo bye; exit 1", "kexec_load failed: Operation not"),
        ("", "kill -9 $$", r"was ended by signal 9 \(Killed\)"),
    ],
)
def test_reasons_of_both_ways_are_one_line(says: str, command: str, why: str, world: World, image: Image) -> None:
    world.refused = errno.ENOSYS
    world.tool(says, command)
    with pytest.raises(Error, match=rf"^kexec_file_load\(2\): Function not implemented; kexec -c: {why}[^\n]*$"):
        kexec.load(image, False)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.EPERM, r"Operation not permitted \(lockdown, or kernel.kexec_load_disabled\)"),
        (errno.EKEYREJECTED, r"Key was rejected by service \(no signature that this kernel trusts\)"),
        (errno.ENODATA, r"No data available \(the kernel image has no signature\)"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_refusal_of_the_kernel_is_told_with_what_it_means(code: int, hint: str, world: World, image: Image) -> None:
    world.refused = code
    world.tool("", "exit 1")
    with pytest.raises(Error, match=rf"^kexec_file_load\(2\): {hint}; kexec -c: "):
        kexec.load(image, False)


def test_process_that_the_kernel_kills_while_it_loads_costs_nothing_else(world: World, image: Image) -> None:
    world.killed_by = signal.SIGKILL
    assert kexec.load(image, False).by == BY_TOOLS
    world.tool("", "exit 1")
    killed = r"kexec_file_load\(2\): its process was ended by signal 9 \(Killed\); kexec -c: "
    with pytest.raises(Error, match=killed):
        kexec.load(image, False)


def test_loader_that_hangs_is_ended(world: World, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    time_out = patience(1.0)
    monkeypatch.setattr(kexec, "TIMEOUT", time_out)
    world.killed_by = signal.SIGSTOP
    world.tool("", "echo $$ >> calls", "exec sleep 100000")
    no_answer = re.escape(f"no answer within {time_out:g} s")
    with pytest.raises(Error, match=f"process gave {no_answer}; kexec -c: gave {no_answer}$"):
        kexec.load(image, False)
    with pytest.raises(ProcessLookupError):
        os.kill(int(world.calls[-1]), 0)


def test_without_kexec_tools_the_kernels_reason_stays(
    world: World, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.refused = errno.ENOSYS
    monkeypatch.setattr(programs, "find", lambda name: None)
    with pytest.raises(Error, match=r"^kexec_file_load\(2\): Function not implemented; no kexec-tools$"):
        kexec.load(image, False)
    world.unload_refused = errno.ENOSYS
    kexec.unload()


def test_load_that_the_kernel_does_not_know_of_is_an_error(world: World, image: Image) -> None:
    world.refused = errno.ENOSYS
    world.tool(TOOL_SAYS)
    with pytest.raises(Error, match=r"^kexec -c loaded a kernel, but .*/kexec_loaded does not say so$"):
        kexec.load(image, False)


def test_kernel_or_log_that_cannot_be_read_is_told(world: World, image: Image) -> None:
    world.tool("", "exit 1")
    world.kmsg.unlink()
    with pytest.raises(Error, match=r"^[^;]*/kmsg: No such file or directory; kexec -c: "):
        kexec.load(image, True)
    world.kernel.unlink()
    with pytest.raises(Error, match=r"^[^;]*/vmlinuz: No such file or directory; kexec -c: "):
        kexec.load(image, False)
    assert not any(call.startswith("file") for call in world.calls)


@pytest.mark.parametrize(("text", "loaded"), [("1\n", True), ("0\n", False), ("", False), (None, False)])
def test_what_is_loaded_is_what_the_kernel_says(text: str | None, loaded: bool, world: World) -> None:
    world.loaded.unlink()
    if text is not None:
        world.loaded.write_text(text)
    assert kexec.is_loaded() is loaded


def test_tools_unload_only_where_the_kernel_cannot(world: World) -> None:
    world.loaded.write_text("1\n")
    kexec.unload()
    assert world.calls == ["unload"]
    world.loaded.write_text("1\n")
    world.unload_refused = errno.ENOSYS
    kexec.unload()
    assert world.calls[1:] == ["unload", "tool -u"]
    assert not kexec.is_loaded()


def test_jump_that_comes_back_is_an_error(world: World) -> None:
    with pytest.raises(Error, match=r"^reboot\(LINUX_REBOOT_CMD_KEXEC\): Invalid argument$"):
        kexec.jump()
    assert world.calls == ["jump"]
