# SPDX-License-Identifier: LGPL-2.1-or-later
"""What oldmem init does where stage 2 has come up: is the kernel's /proc/vmcore the one that was meant? If it is not,
back to the capture kernel as it was before, once."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from typing import NoReturn

from capture import boot_image, kexec, programs, stage_state
from capture.elfcore import page_align
from capture.header_place import Window
from capture.init import FOLDER
from capture.sources import cmdline
from capture.stage2 import BACK, HERE, running_cmdline
from capture.stage_state import Meant
from guard import child, procvmcore, whole_file
from guard.errors import Error, SourceError

_MODULE_TIMEOUT = 30.0
_NOTE_ALIGN = procvmcore.EHDR_SIZE + 48  # p_align of the first program header


class Arrival:
    """A stage behind the first. *stage* is the value of oldmem.stage=; *state* what the stage before has left."""

    def __init__(self, stage: str, state: Mapping[str, bytes]) -> None:
        self.stage = stage
        self._state = state

    @property
    def why_back(self) -> str:
        """Why stage 2 went back here."""
        return self._state.get(stage_state.WHY, b"it left no word").decode("utf-8", "replace")

    @property
    def incomplete(self) -> list[str]:
        """What the vmcore lacks that should have been readable, a line each."""
        meant = self._meant()
        runs, size = meant.given_up
        lines = [f"{runs} runs of readable memory, {size} bytes, had no room in the header"] if runs else []
        return lines + [f"{r} was RAM and is left out: nothing tells its state" for r in meant.lost]

    def _meant(self) -> Meant:
        return stage_state.decode(self._left(stage_state.MEANT))

    def _left(self, name: str) -> bytes:
        if not self._state.get(name):
            raise Error(f"{stage_state.STATE}/{name} is not there: nothing tells what was meant")
        return self._state[name]

    def verify(self, path: str = procvmcore.PATH) -> str:
        """What is wrong with the kernel's vmcore; "" if it begins, and ends, as was meant. Raises Error where nothing
        tells what was meant."""
        facts = self._meant()
        meant = self._left(stage_state.HEAD)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                found = procvmcore.pread_exact(file.fileno(), len(meant), 0, path)
        except FileNotFoundError:
            return f"{path}: the kernel made none: it did not take the header"
        except OSError as e:
            return f"{path}: {e.strerror}"
        except SourceError as e:
            return str(e)
        if not facts.knows_note_align:
            end = _NOTE_ALIGN + 8
            found = found[:_NOTE_ALIGN] + meant[_NOTE_ALIGN:end] + found[end:]
        if found != meant:
            at = next(i for i, (a, b) in enumerate(zip(found, meant, strict=True)) if a != b)
            return f"{path}: offset {at:#x}: not the header that was meant"
        if size != facts.size:
            return f"{path}: {size} bytes, expected {facts.size}"
        return ""

    def report(self, folder: str = FOLDER) -> None:
        """Lay the reports of the stage before at *folder*. Raises Error."""
        try:
            os.makedirs(folder, 0o755, exist_ok=True)
            for name in (stage_state.MAP, stage_state.GUARD):
                whole_file.replace(f"{folder}/{name}", self._state.get(name, b"{}\n"))
        except OSError as e:
            raise Error(f"{e.filename or folder}: {e.strerror}") from None

    def go_back(self, why: str) -> NoReturn:
        """To the capture kernel with the header that it had. Raises Error if there is no way."""
        meant = self._meant()
        kernel = boot_image.find_kernel(_if_there(meant.kernel), os.uname().release)
        initramfs = boot_image.find_initramfs(_if_there(meant.initramfs), kernel.release)
        line = cmdline.rewritten(meant.cmdline, (cmdline.STAGE,), [f"{cmdline.STAGE}={BACK}"])
        fd = os.memfd_create("oldmem initramfs")
        try:
            boot_image.write_initramfs(initramfs, {stage_state.WHY: why.encode()}, fd)
            kexec.load(kexec.Image(kernel.path, fd, line), False)
        finally:
            os.close(fd)
        try:
            original = self._state.get(stage_state.ORIGINAL, b"")
            if original and meant.elfcorehdr is not None:
                size = page_align(len(original), mmap.PAGESIZE)
                if not Window(meant.elfcorehdr, size).write(original):
                    raise Error(f"the prepared header could not be put back at {meant.elfcorehdr:#x}")
            os.sync()
            kexec.jump()
        except Error:
            kexec.unload()
            raise
        raise AssertionError


def _if_there(path: str | None) -> str | None:
    """What the stage before had found or been given may be on a file system that is not mounted yet."""
    return path if path and os.path.exists(path) else None


def arrived() -> Arrival | None:
    """Is this kernel a stage behind the first? Raises Error where its state cannot be read."""
    stage = cmdline.stage_of(running_cmdline())
    return None if stage is None else Arrival(stage, stage_state.read())


def settle(say: Callable[[str], None], warn: Callable[[str], None]) -> list[str] | None:
    """Where this is stage 2: the kernel serves what was meant, and the lines tell what that lacks; or this does not
    return. None where the vmcore has to be put in place here: in a first stage, in one that was gone back to, and in
    stage 2 where there is no way back."""
    try:
        here = arrived()
        if here is None:
            return None
        if here.stage != HERE:
            warn(f"came back from stage 2: {here.why_back}")
            return None
        load_driver()
        wrong = here.verify()
        if not wrong:
            here.report()
            say(f"the kernel serves the guarded vmcore at {procvmcore.PATH}, report in {FOLDER}/{stage_state.GUARD}")
            return here.incomplete
        warn(f"stage 2 is not what was meant: {wrong}; going back")
        here.go_back(wrong)
    except Error as e:
        warn(f"{e}; the vmcore is put in place here")
        return None


def load_driver() -> None:
    """Have the kernel's virtio_mem, if the initramfs has it, as a second gate. Only where the kernel knows that it is a
    capture kernel: elsewhere the driver would begin by unplugging all memory. To be called before anything opens
    /proc/vmcore, which the driver's callback should precede."""
    if not os.path.exists(procvmcore.PATH):
        return
    if tool := programs.find("modprobe"):
        child.run(lambda: os.execv(tool, [tool, "-q", "virtio_mem"]), _MODULE_TIMEOUT)
