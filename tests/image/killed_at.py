# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts commands of which one process ends itself at one line of its Python: MACHINE is what they serve.

Each line of standard input says what to do: a name for the processes, "init" or "foreground", the folder, the file to
lay it over, which process (ROLES), at which of its lines, by which signal. The answers are the command's process id,
its wait status once it has ended, and whether that line was come to."""

from __future__ import annotations

import mmap
import os
import signal
import sys
from types import FrameType
from typing import Any

from capture import fuse, init, mounts, service
from capture.dump import Dump, build
from capture.image_machine import ImageMachine
from capture.recorded import load
from guard._core import ffi, lib

PR_SET_NAME = 15
WAITING, KILLED, OVER = range(3)

# by who forked it, and as which of that one's children
ROLES = {("", 1): "command", ("command", 1): "server", ("server", 1): "standby", ("command", 2): "probe"}

FILES = {module.__file__ for module in (fuse, init, mounts, service)}
DULL = {"mounts_on", "_listed", "_unescaped", "resolved"}  # loops that change nothing

fork = os.fork


class Killing:
    """What this process is, and whether it is to end."""

    def __init__(self) -> None:
        self.role, self.children, self.lines = "", 0, 0
        self.whom, self.line, self.number = "", 0, 0
        self.state = mmap.mmap(-1, 1)  # shared with all children

    def fork(self) -> int:
        self.children += 1
        pid = fork()
        if not pid:
            self.role, self.children, self.lines = ROLES.get((self.role, self.children), "another"), 0, 0
        return pid

    def trace(self, frame: FrameType, event: str, _what: object) -> Any:
        if frame.f_code.co_filename not in FILES or frame.f_code.co_name in DULL:
            return None
        if event == "line" and self.role == self.whom:
            self.lines += 1
            if self.lines == self.line and self.state[0] == WAITING:
                self.state[0] = KILLED
                os.kill(os.getpid(), self.number)
        return self.trace


def command(dump: Dump, how: str, folder: str, over: str) -> None:
    if how == "init":
        init.bring_up(dump, folder, over)
        return
    server = fuse.FuseServer(dump.vmcore, folder, {})
    with service.Service(server, [server.target]) as served:
        server.mount()
        served.mounted()
        served.wait_until_served()
        served.wait_until_ended()


def main() -> None:
    dump = build(ImageMachine(load(sys.argv[1])), "kernel")
    killing = Killing()
    os.fork = killing.fork
    for words in sys.stdin:
        name, how, folder, over, killing.whom, line, number = words.rstrip("\n").split("\t")
        killing.line, killing.number, killing.children = int(line), int(number), 0
        killing.state[0] = WAITING
        # a signal between fork(2) and what the interpreter does after it is forgotten there (PyOS_AfterFork_Child())
        signal.pthread_sigmask(signal.SIG_BLOCK, service.STOP_SIGNALS)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, service.STOP_SIGNALS)
                lib.prctl(PR_SET_NAME, ffi.new("char[]", name.encode()))
                sys.settrace(killing.trace)
                command(dump, how, folder, over)
                code = 0
            except KeyboardInterrupt:
                code = 130
            finally:
                sys.settrace(None)
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, service.STOP_SIGNALS)
        print(pid, flush=True)
        status = os.waitpid(pid, 0)[1]
        print(status, int(killing.state[0] == KILLED), flush=True)
        killing.state[0] = OVER


if __name__ == "__main__":
    main()
