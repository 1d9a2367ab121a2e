# SPDX-License-Identifier: LGPL-2.1-or-later
"""One QEMU process and the files it lives on. Whatever becomes of the process that started it - even SIGKILL - QEMU
ends with it (PR_SET_PDEATHSIG) and a waiting shell removes the files, since guest memory lies in /dev/shm."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .memory import MiB
from .qmp import Qmp, QmpError

PROGRAM = "qemu-system-x86_64"
SHM = Path("/dev/shm")
TOOLS_SIZE = 256 * MiB
SCRATCH_SIZE = 8192 * MiB


class QemuError(Exception):
    """QEMU did not start; ends with what it said."""


class Hardware(NamedTuple):
    """What differs by machine: the words that start QEMU, those that describe processors and memory (whose files lie
    in QEMU's working folder), those that make the character device ``console`` the console, the type of disks."""

    program: Sequence[str]
    options: Sequence[str]
    console: Sequence[str]
    disk: str


class Qemu:
    """A started guest: ``qmp``, the ``console`` socket, and the files in ``folder`` (/dev/shm), where QEMU runs:
    ``ram``, one for each device, ``tools`` (read-only disk of the guest) and ``scratch`` (disk that it may write).
    ``command`` are the words that started it."""

    def __init__(self, hardware: Hardware, *, vmlinuz: Path, initramfs: bytes, append: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="oldmem-vm-", dir=SHM))
        self._reaper = subprocess.Popen(
            ["sh", "-c", 'read -r _; rm -rf -- "$1"', "sh", self.folder], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self.tools = self._sparse("tools", TOOLS_SIZE)
            self.scratch = self._sparse("scratch", SCRATCH_SIZE)
            image = self.folder / "initramfs"
            image.write_bytes(initramfs)
            self.console, console = socket.socketpair()
            control, qmp = socket.socketpair()
            with console, qmp:
                self.command = [
                    *hardware.program,
                    *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                    *hardware.options,
                    *("-kernel", str(vmlinuz), "-initrd", image.name, "-append", append),
                    *("-chardev", f"socket,id=console,fd={console.fileno()}", *hardware.console),
                    *("-chardev", f"socket,id=qmp,fd={qmp.fileno()}", "-mon", "chardev=qmp,mode=control"),
                    *self._disk_options(hardware.disk),
                ]
                with open(self.folder / "stderr", "wb") as errors:
                    self.process = subprocess.Popen(
                        ["setpriv", "--pdeathsig", "KILL", "--", *self.command],
                        cwd=self.folder,
                        stdin=subprocess.DEVNULL,
                        stdout=errors,
                        stderr=errors,
                        pass_fds=(console.fileno(), qmp.fileno()),
                        start_new_session=True,
                    )
            try:
                self.qmp = Qmp(control)
            except QmpError as error:
                self._end_process()
                raise QemuError(f"{hardware.program[-1]}: {error}: {self._said()}") from None
        except BaseException:
            self._remove_files()
            raise

    def ram_path(self, name: str) -> Path:
        """The backing file of boot RAM (``ram``) or of a device."""
        return self.folder / name

    def close(self) -> None:
        """Ends QEMU and removes its files. May be called again."""
        if self.process.poll() is None:
            try:
                self.qmp.command("quit")
            except QmpError:
                pass
        self._end_process()
        self.console.close()
        self.qmp.close()
        self._remove_files()

    def _disk_options(self, kind: str) -> list[str]:
        options: list[str] = []
        for name, path, readonly in (("tools", self.tools, "on"), ("scratch", self.scratch, "off")):
            options += ["-drive", f"if=none,id={name},format=raw,file={path.name},readonly={readonly}"]
            # names such as vda are given in order of probing, which is not that of the command line
            options += ["-device", f"{kind},drive={name},serial={name}"]
        return options

    def _sparse(self, name: str, size: int) -> Path:
        path = self.folder / name
        with open(path, "wb") as file:
            file.truncate(size)
        return path

    def _end_process(self) -> None:
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _said(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace").strip()

    def _remove_files(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._reaper.communicate()


def missing() -> str | None:
    """Why no guest can be started on this machine, or None."""
    for program in (PROGRAM, "setpriv"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if not SHM.is_dir():
        return f"{SHM}: no such folder"
    return None
