# SPDX-License-Identifier: LGPL-2.1-or-later
"""kexec: loading the next kernel, where its segments will lie, and going there.

kexec_file_load(2) is called directly: the kernel does all that is to be done. Where it refuses (not built in, no
signature that it trusts), kexec-tools builds the segments itself, for kexec_load(2). Both run in a child process, which
the kernel's OOM killer takes first: a load that is too large costs that process and nothing else."""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Callable
from typing import NamedTuple

from capture import programs
from guard import child
from guard._core import ffi, lib
from guard.errors import Error
from guard.ranges import Range, RangeSet

TIMEOUT = 300.0
_LOADED = "/sys/kernel/kexec_loaded"
_KMSG = "/dev/kmsg"
_MOST_TEXT = 1 << 20

# kexec-tools has a line for each number, the kernel (kernel/kexec_file.c) one for each segment
_TOOL_SEGMENT = re.compile(r"segment\[\d+\]\.mem\s*= 0x([0-9a-f]+)\nsegment\[\d+\]\.memsz\s*= 0x([0-9a-f]+)")
_KERNEL_SEGMENT = re.compile(r"segment\[\d+\]: .*\bmem=0x([0-9a-f]+) memsz=0x([0-9a-f]+)")
_KERNEL_COUNT = re.compile(r"nr_segments = (\d+)")


class Image(NamedTuple):
    """What is to be loaded: the kernel's path, the initramfs as a descriptor, the command line."""

    kernel: str
    initramfs: int
    cmdline: str


class Loaded(NamedTuple):
    """*by* whom it was loaded; *segments* where it will lie (physical bytes), None if that is not known."""

    by: str
    segments: RangeSet | None


def load(image: Image, want_segments: bool) -> Loaded:
    """Load *image*; with *want_segments* only by a way that tells them. Raises Error, with nothing loaded that had not
    been before."""
    refused = []
    for attempt in (_by_file, _by_tools):
        try:
            found = attempt(image, want_segments)
        except Error as e:
            refused.append(str(e))
            continue
        if not is_loaded():
            raise Error(f"{found.by} loaded a kernel, but {_LOADED} does not say so")
        return found
    raise Error("; ".join(refused))


def is_loaded() -> bool:
    try:
        with open(_LOADED, encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


def unload() -> None:
    """Nothing is loaded any more; where that cannot be had, what is loaded is not gone to either."""
    if lib.kexec_unload() and (tool := programs.find("kexec")):
        _run_tool([tool, "-u"])


def jump() -> None:
    """Go to what is loaded. Raises Error if the kernel does not."""
    err = lib.kexec_jump()
    raise Error(f"reboot(LINUX_REBOOT_CMD_KEXEC): {os.strerror(-err)}")


def _by_file(image: Image, tell: bool) -> Loaded:
    try:
        log = os.open(_KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if tell else -1
    except OSError as e:
        raise Error(f"{_KMSG}: {e.strerror}") from None
    try:
        if tell:
            os.lseek(log, 0, os.SEEK_END)
        kernel = os.open(image.kernel, os.O_RDONLY | os.O_CLOEXEC)
        try:
            cmdline = ffi.new("char[]", os.fsencode(image.cmdline))
            error = _in_child(lambda: -int(lib.kexec_file(kernel, image.initramfs, cmdline, tell)))
        finally:
            os.close(kernel)
        if error:
            raise Error(f"kexec_file_load(2): {error}")
        segments = _logged_segments(log) if tell else None
        if tell and not segments:
            unload()
            raise Error("kexec_file_load(2): the kernel's log does not tell where the segments are")
        return Loaded("kexec_file_load(2)", segments)
    except OSError as e:
        raise Error(f"{e.filename or _KMSG}: {e.strerror}") from None
    finally:
        if tell:
            os.close(log)


def _in_child(call: Callable[[], int]) -> str:
    """Why *call*, which returns an errno, failed; "" if it did not."""
    answer = mmap.mmap(-1, mmap.PAGESIZE)

    def work() -> None:
        code = call()
        answer[0:4] = code.to_bytes(4, "little")

    if why := child.run(work, TIMEOUT):
        return f"its process {why}"
    code = int.from_bytes(answer[0:4], "little")
    hints = {
        errno.EPERM: " (lockdown, or kernel.kexec_load_disabled)",
        errno.EKEYREJECTED: " (no signature that this kernel trusts)",
        errno.ENODATA: " (the kernel image has no signature)",
        errno.EINVAL: " (not asked as this kernel knows it)",
    }
    return f"{os.strerror(code)}{hints.get(code, '')}" if code else ""


def _logged_segments(log: int) -> RangeSet:
    """What the kernel has logged since *log* was at its end; nothing where it does not tell all segments."""
    text = ""
    try:
        while record := os.read(log, 8192):
            text += record.decode("ascii", "replace")
    except OSError:
        pass  # EAGAIN: that was all; EPIPE: records were overwritten, and the count below tells
    found = [_span(m) for m in _KERNEL_SEGMENT.finditer(text)]
    count = _KERNEL_COUNT.search(text)
    return RangeSet(found) if count and int(count[1]) == len(found) else RangeSet()


def _by_tools(image: Image, want_segments: bool) -> Loaded:
    tool = programs.find("kexec")
    if tool is None:
        raise Error("no kexec-tools")
    words = [tool, "-c", "-d", "-l", f"--initrd=/proc/self/fd/{image.initramfs}", f"--command-line={image.cmdline}"]
    why, text = _run_tool([*words, image.kernel], image.initramfs)
    if why:
        said = [line for line in text.splitlines() if "rror" in line or "annot" in line or "ailed" in line]
        raise Error(f"kexec -c: {said[-1].strip() if said else why}")
    segments = RangeSet(_span(m) for m in _TOOL_SEGMENT.finditer(text))
    if want_segments and not segments:
        unload()
        raise Error("kexec -c: it does not tell where the segments are")
    return Loaded("kexec -c", segments or None)


def _run_tool(words: list[str], passed: int = -1) -> tuple[str, str]:
    """Why the program failed, "" if it did not; and what it said."""
    said = os.memfd_create("kexec")

    def work() -> None:
        os.dup2(said, 1)
        os.dup2(said, 2)
        if passed >= 0:
            os.set_inheritable(passed, True)
        os.execv(words[0], words)

    try:
        why = child.run(work, TIMEOUT)
        return why, os.pread(said, _MOST_TEXT, 0).decode("ascii", "replace")
    finally:
        os.close(said)


def _span(match: re.Match[str]) -> Range:
    start, size = (int(word, 16) for word in match.groups())
    return Range(start, start + size)
